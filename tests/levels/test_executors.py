"""Worker processes, SLURM jobs and plugin files."""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from nipype import Function
from nipype.interfaces.base import BaseInterfaceInputSpec, SimpleInterface, TraitedSpec, traits
from nipype.pipeline.engine import Node, Workflow
from nipype.utils.filemanip import loadpkl

from bids_uad.config import RunConfig
from bids_uad.errors import ConfigError, InputError
from bids_uad.levels.participant import executors
from bids_uad.levels.participant.executors import (
    Call,
    CallError,
    IsolatedPlugin,
    SlurmGraphPlugin,
    SlurmPlugin,
    configure_nipype,
    describe_job_end,
    make_plugins,
    read_plugin_file,
)
from bids_uad.levels.participant.interfaces import describe_failure
from bids_uad.levels.participant.summary import error_line
from bids_uad.resources import describe_exit


class Task:
    """Stands in for a node: pickled to the worker and run there."""

    def __init__(self, act):
        self.act = act
        self.result = None

    def run(self, updatehash):
        if self.act == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.act == "raise":
            raise ValueError("no")
        if self.act == "hold the lock":
            ctypes.PyDLL(None).sleep(60)
        if self.act == "sleep":
            time.sleep(60)
        return (self.act, os.getpid())


@pytest.fixture
def plugin():
    plugin = IsolatedPlugin({"n_procs": 2, "memory_gb": 1, "n_gpu_procs": 1})
    yield plugin
    plugin.close()


def wait(plugin, taskid):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        result = plugin._get_result(taskid)
        if result is not None:
            return result
        time.sleep(0.05)
    raise AssertionError("no result")


def test_killed_worker_fails_only_its_task(plugin):
    sleeping = plugin._submit_job(Task("sleep"))
    killed = plugin._submit_job(Task("kill"))
    result = wait(plugin, killed)
    assert "SIGKILL" in "".join(result["traceback"])
    assert plugin._get_result(sleeping) is None
    fine = wait(plugin, plugin._submit_job(Task("work")))
    assert fine["traceback"] is None
    assert fine["result"][0] == "work"


def test_workers_are_reused_and_return_errors(plugin):
    first = wait(plugin, plugin._submit_job(Task("work")))
    failed = wait(plugin, plugin._submit_job(Task("raise")))
    second = wait(plugin, plugin._submit_job(Task("work")))
    assert "ValueError: no" in "".join(failed["traceback"])
    assert first["result"][1] == second["result"][1]


class Unreadable(Task):
    """A node whose arrival in the worker fails."""

    def __reduce__(self):
        return (int, ("x",))


def test_a_node_that_cannot_be_received_fails_without_a_traceback_on_the_terminal(plugin, capfd):
    result = wait(plugin, plugin._submit_job(Unreadable("work")))
    line = "ValueError: the step cannot be received by its process: invalid literal for int()"
    assert result["traceback"][0].startswith(line)
    assert wait(plugin, plugin._submit_job(Task("work")))["traceback"] is None
    assert "Traceback" not in capfd.readouterr().err


class Keeping(Task):
    """A node that keeps a process in its worker."""

    def __init__(self, act):
        super().__init__(act)
        self.interface = SimpleNamespace(keeps_process=True)


def test_nodes_that_keep_a_process_have_workers_of_their_own(plugin):
    def numbers(*tasks):
        """Run nodes at the same time, and return the numbers of their workers."""
        started = [plugin._submit_job(task) for task in tasks]
        return [wait(plugin, number)["result"][1] for number in started]

    keeping, other = numbers(Keeping("work"), Task("work"))
    for _ in range(3):
        assert numbers(Task("work")) == [other]
        assert numbers(Keeping("work")) == [keeping]
        assert numbers(Task("work"), Keeping("work")) == [other, keeping]
    both = numbers(Keeping("work"), Keeping("work"))
    assert keeping in both
    assert other not in both
    assert set(numbers(Keeping("work"), Keeping("work"))) == set(both)


def test_workers_end_when_closed(plugin):
    worker_id = wait(plugin, plugin._submit_job(Task("work")))["result"][1]
    plugin.close()
    assert not is_running(worker_id)


def steps_of(*workflows):
    """Steps of a participant that only runs workflows."""
    yield from workflows


def answer():
    return 42


def test_imported_modules_are_frozen_during_a_run(tmp_path):
    frozen = []
    plugin = IsolatedPlugin(
        {
            "n_procs": 1,
            "memory_gb": 1,
            "n_gpu_procs": 1,
            "status_callback": lambda node, status: frozen.append(gc.get_freeze_count()),
        }
    )
    workflow = Workflow("garbage", base_dir=str(tmp_path))
    workflow.add_nodes([Node(Function(function=answer, output_names=["out"]), name="one")])
    plugin.process([steps_of(workflow)])
    plugin.close()
    assert min(frozen) > 10_000
    assert gc.get_freeze_count() == 0


_RUN = """
import time
from bids_uad.levels.participant.executors import IsolatedPlugin, configure_nipype
from tests.levels.test_executors import Task, wait
if __name__ == "__main__":
    configure_nipype()
    plugin = IsolatedPlugin({"n_procs": 1, "memory_gb": 1, "n_gpu_procs": 1})
    print(wait(plugin, plugin._submit_job(Task("work")))["result"][1], flush=True)
    plugin._submit_job(Task("hold the lock"))
    time.sleep(60)
"""


def test_killed_run_leaves_no_worker_that_holds_the_interpreter_lock(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(_RUN)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    ) as run:
        worker_id = int(run.stdout.readline())
        time.sleep(3)
        os.kill(worker_id, 0)
        run.kill()
    deadline = time.monotonic() + 20
    while is_running(worker_id):
        assert time.monotonic() < deadline, "the worker goes on"
        time.sleep(0.1)


def is_running(process_id):
    """Return whether a process is running and not a zombie."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_describe_exit():
    assert "memory" in describe_exit(-signal.SIGKILL, 0)
    assert "SIGSEGV" in describe_exit(-signal.SIGSEGV, 0)
    assert "exit code 3" in describe_exit(3, 0)


def test_describe_failure_of_the_scoring_process():
    assert "memory ran out" in describe_failure(-signal.SIGKILL, "", 0)
    assert "--device cpu" in describe_failure(1, "x\ntorch.OutOfMemoryError: CUDA out of memory. Tried", 0)
    assert describe_failure(69, "model bundle x: y\n", 0) == "model bundle x: y (exit code 69)"
    assert describe_failure(-signal.SIGSEGV, "", 0) == "the process was ended by SIGSEGV"
    assert describe_failure(None, "Traceback\n  File x\nValueError: y\n", 0) == "ValueError: y"


@pytest.mark.parametrize(
    ("traceback", "line"),
    [
        ("Traceback:\n  File x\nValueError: bad value", "ValueError: bad value"),
        (
            "NodeError: Exception\n\nTraceback:\n\tFile y\n\tbids_uad.errors.InputError: a: b; c\n\n",
            "a: b; c",
        ),
        ("ProcessKilled: the step was killed", "the step was killed"),
        ("odd\nlast words", "last words"),
        ("", "no message"),
    ],
)
def test_error_line(traceback, line):
    assert error_line(traceback) == line


def pass_on(value, log, name):
    """Work of one step: note its name."""
    import time
    from pathlib import Path

    time.sleep(0.02)
    with Path(log).open("a") as stream:
        stream.write(name + "\n")
    if value == "fail":
        raise ValueError("this step fails")
    return value


def chain_of_nodes(folder, name, n_steps=3, n_procs=1, value=0):
    """Build a workflow of nodes that run one after the other."""
    chain = Workflow(name, base_dir=str(folder))
    steps = [
        Node(
            Function(["value", "log", "name"], ["value"], pass_on), f"step{step}", n_procs=1 + step % n_procs
        )
        for step in range(n_steps)
    ]
    steps[0].inputs.value = value
    for step in steps:
        step.inputs.log, step.inputs.name = str(folder / "log.txt"), f"{name} {step.name}"
    for before, after in itertools.pairwise(steps):
        chain.connect(before, "value", after, "value")
    return chain


@pytest.fixture
def start(request):
    """Return a function that makes a plugin, closed after the test."""

    def make(n_procs, watch=None):
        own = {"n_procs": n_procs, "memory_gb": 4, "n_gpu_procs": 0, "raise_insufficient": False}
        plugin = IsolatedPlugin({**own, "status_callback": watch})
        request.addfinalizer(plugin.close)
        return plugin

    configure_nipype()
    return make


def double(value):
    """A call; fails for text, and kills its process for None."""
    if value is None:
        os.kill(os.getpid(), signal.SIGKILL)
    logging.getLogger("bids_uad").warning("the value is %s", value)
    if value == 13:
        raise InputError("scan.nii", "an unlucky number", "choose another")
    return 2 * value + 0


@pytest.mark.parametrize("n_participants", [3, 7])
@pytest.mark.parametrize("n_procs", [1, 2])
def test_participants_are_finished_one_after_the_other(tmp_path, start, n_procs, n_participants):
    """At most `n_procs + 1` are unfinished at any time, and each call gets its own result."""
    begun, finished, most = [], [], 0

    def process(number):
        nonlocal most
        begun.append(number)
        most = max(most, len(begun) - len(finished))
        assert (yield Call(double, (number,))) == 2 * number
        yield chain_of_nodes(tmp_path, f"sub_{number:02d}_wf", n_procs=n_procs)
        assert (yield Call(double, (-number,))) == -2 * number
        finished.append(number)

    plugin = start(n_procs)
    assert plugin.process(map(process, range(n_participants))) == 0
    assert sorted(finished) == list(range(n_participants))
    assert begun == sorted(begun)
    assert most <= n_procs + 1
    assert all(abs(number - place) <= n_procs for place, number in enumerate(finished))
    assert plugin.procs == []
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert sorted(lines) == [
        f"sub_{number:02d}_wf step{step}" for number in range(n_participants) for step in range(3)
    ]


def test_first_participant_is_finished_before_most_others_are_begun(tmp_path, start):
    """The number of participants that are begun first does not depend on how many there are."""
    begun_at_first_end = []
    for n_participants in (5, 50):
        begun = []

        def process(number, begun=begun, n_participants=n_participants):
            begun.append(number)
            if len(begun_at_first_end) < 1 + (n_participants == 50):
                yield chain_of_nodes(tmp_path, f"sub_{n_participants}_{number}_wf")
            if len(begun_at_first_end) < 1 + (n_participants == 50):
                begun_at_first_end.append(len(begun))

        start(1).process(map(process, range(n_participants)))
    assert begun_at_first_end == [2, 2]


def test_errors_of_calls_are_raised_in_the_steps_and_warnings_logged(start, caplog, monkeypatch):
    caught = []

    def process(value):
        try:
            yield Call(double, (value,))
        except (CallError, InputError) as error:
            caught.append((type(error), str(error)))

    monkeypatch.setattr(logging.getLogger("bids_uad"), "propagate", True)
    start(1).process(map(process, ["text", None, 13, 1]))
    assert {"the value is 13", "the value is 1"} <= set(caplog.messages)
    assert [kind for kind, _ in caught] == [CallError, CallError, InputError]
    assert "TypeError" in caught[0][1]
    assert "was killed (SIGKILL)" in caught[1][1]
    assert caught[2][1] == "scan.nii: an unlucky number; choose another"


def test_failed_node_leaves_out_only_what_depends_on_it(tmp_path, start):
    after = []

    def process(number):
        value = "fail" if number == 1 else number
        chain = chain_of_nodes(tmp_path, f"sub_{number:02d}_wf", value=value)
        chain.config["execution"] = {"crashdump_dir": str(tmp_path)}
        yield chain
        after.append(number)

    plugin = start(1)
    assert plugin.process(map(process, range(3))) == 0
    assert sorted(after) == [0, 1, 2]
    assert [failure.node for failure in plugin.failures] == ["sub_01_wf.step0"]
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line for line in lines if "sub_01" in line] == ["sub_01_wf step0"]
    assert len(lines) == 7


def test_stop_on_failure_drops_the_other_participants(tmp_path, start):
    ended = []

    def process(number):
        chain = chain_of_nodes(tmp_path, f"sub_{number:02d}_wf", value="fail" if number == 1 else number)
        chain.config["execution"] = {"crashdump_dir": str(tmp_path)}
        yield chain
        assert (yield Call(double, (number,))) == 2 * number  # such as its report
        ended.append(number)

    plugin = start(1)
    n_dropped = plugin.process(map(process, range(9)), stop_on_failure=True)
    assert sorted(ended) in ([0, 1], [0, 1, 2])  # those that were begun
    assert n_dropped == 9 - len(ended)
    assert (tmp_path / "log.txt").read_text().splitlines()[-1] == "sub_01_wf step0"


def test_participants_that_wait_for_another_run_do_not_hold_up_others(tmp_path, start, monkeypatch):
    monkeypatch.setattr(executors, "POLL_LOCKS", 0.05)
    ended = []

    def process(number):
        while number < 4 and len(ended) < 3:  # locked by another run until three are finished
            yield None
        yield chain_of_nodes(tmp_path, f"sub_{number:02d}_wf")
        ended.append(number)

    start(1).process(map(process, range(8)))
    assert ended[:3] == [4, 5, 6]
    assert sorted(ended) == list(range(8))


def test_interrupted_run_closes_the_steps_after_its_workers(tmp_path, start):
    closed = []

    def watch(node, status):
        if node.fullname == "sub_01_wf.step0" and status == "end":
            raise KeyboardInterrupt

    def process(number):
        try:
            yield chain_of_nodes(tmp_path, f"sub_{number:02d}_wf", n_steps=9)
        finally:
            closed.append((number, len(plugin._idle) + len(plugin._busy)))

    plugin = start(1, watch)
    with pytest.raises(KeyboardInterrupt):
        plugin.process(map(process, range(5)))
    assert closed[-1] == (2, 0)
    assert [number for number, _ in closed] == [0, 1, 2]
    assert closed[1] == (1, 0)


class Cluster:
    """Stands in for a plugin that submits jobs: runs one graph of all participants."""

    def __init__(self):
        self.graphs, self.failures = [], []

    def run(self, graph, config, updatehash=False):
        self.graphs.append(sorted(node.fullname for node in graph))


def test_cluster_plugin_runs_the_workflows_of_all_participants_as_one_graph(tmp_path, start):
    cluster, ended = Cluster(), []

    def process(number):
        if (yield Call(double, (number,))) == 4:
            return  # nothing to do
        yield chain_of_nodes(tmp_path, f"sub_{number:02d}_wf", n_steps=2)
        yield Call(double, (number,))
        ended.append(number)

    start(1).process(map(process, range(5)), cluster=cluster)
    others = (0, 1, 3, 4)
    assert cluster.graphs == [[f"sub_{n:02d}_wf.step{step}" for n in others for step in range(2)]]
    assert ended == [0, 1, 3, 4]


EXAMPLES = Path(__file__).parents[2] / "containers" / "slurm"


def config(tmp_path, **options):
    places = {name: tmp_path / name for name in ("bids_dir", "output_dir", "work_dir")}
    return RunConfig(**places, levels=("participant",), nprocs=2, mem_gb=4.0, **options)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("multiproc", IsolatedPlugin), ("slurm", SlurmPlugin), ("slurmgraph", SlurmGraphPlugin)],
)
def test_plugin_file_examples_are_valid(tmp_path, name, kind):
    local, cluster = make_plugins(config(tmp_path, plugin_file=EXAMPLES / f"{name}.yml"), print)
    assert type(local) is IsolatedPlugin
    local.close()
    if kind is IsolatedPlugin:
        assert cluster is None
        assert (local.processors, local.memory_gb) == (4, 12)
    else:
        assert type(cluster) is kind
        assert (local.processors, local.memory_gb) == (2, 4)
        assert cluster.failures == []
        assert "--mem=4G" in cluster._sbatch_args


def test_resource_monitor_leaves_the_logger_of_nipype_as_it_was(tmp_path):
    log, others = logging.getLogger("callback"), logging.NullHandler()
    log.addHandler(others)
    before = (list(log.handlers), log.level, log.propagate)
    runtime = SimpleNamespace(startTime="0", endTime="2", duration=2.0)
    node = SimpleNamespace(
        name="detect", _id="detect.a0", result=SimpleNamespace(runtime=runtime), mem_gb=1, n_procs=1
    )
    calls = []
    try:
        paths = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
        first, second = (
            executors._record_resources(lambda *call: calls.append(call), path) for path in paths
        )
        for record in (first, second, first):
            record(node, "start")
            record(node, "end")
        assert (log.handlers, log.level, log.propagate) == before
    finally:
        log.removeHandler(others)
    assert [[json.loads(line)["duration"] for line in path.read_text().splitlines()] for path in paths] == [
        [2.0, 2.0],
        [2.0],
    ]
    assert calls == [(node, "start"), (node, "end")] * 3


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("plugin: Dask", "none of MultiProc, SLURM, SLURMGraph"),
        ("plugin_args: {}", "write 'plugin: SLURM'"),
        ("plugin: SLURM\nnprocs: 4", "write 'plugin: SLURM'"),
        ("plugin: SLURM\nplugin_args: [1]", "must be a mapping"),
        ("plugin: [", "cannot be read"),
        ("SLURM", "write 'plugin: SLURM'"),
    ],
)
def test_invalid_plugin_files_are_refused(tmp_path, text, problem):
    path = tmp_path / "plugin.yml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_plugin_file(path)


def test_describe_job_end():
    assert "memory ran out" in describe_job_end(7, "OUT_OF_MEMORY")
    assert "time limit" in describe_job_end(7, "TIMEOUT")
    assert describe_job_end(7, "FAILED") == "ProcessKilled: SLURM job 7 ended as FAILED"


class _OnGpuInputSpec(BaseInterfaceInputSpec):
    use_cuda = traits.Bool(True, usedefault=True)


class _OnGpuOutputSpec(TraitedSpec):
    span = traits.Tuple(traits.Float, traits.Float)


class OnGpu(SimpleInterface):
    """Record when the node occupied the GPU."""

    input_spec = _OnGpuInputSpec
    output_spec = _OnGpuOutputSpec

    def _run_interface(self, runtime):
        start = time.monotonic()
        time.sleep(1)
        self._results["span"] = (start, time.monotonic())
        return runtime


@pytest.mark.parametrize("at_once", [1, 2])
def test_gpu_nodes_run_n_gpu_procs_at_a_time(tmp_path, at_once):
    configure_nipype()
    workflow = Workflow(name="gpu", base_dir=str(tmp_path))
    nodes = [Node(OnGpu(), name=f"node{number}") for number in range(4)]
    workflow.add_nodes(nodes)
    plugin = IsolatedPlugin(
        {"n_procs": 4, "memory_gb": 4, "n_gpu_procs": at_once, "raise_insufficient": False}
    )
    plugin.process([steps_of(workflow)])
    plugin.close()
    spans = [loadpkl(path).outputs.span for path in tmp_path.glob("gpu/*/result_*.pklz")]
    assert len(spans) == 4
    most = max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)
    assert most == at_once
