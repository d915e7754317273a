"""Who runs the nodes: what a plugin file says, and GPU nodes one at a time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from nipype.interfaces.base import BaseInterfaceInputSpec, SimpleInterface, TraitedSpec, traits
from nipype.pipeline.engine import Node, Workflow

from bids_uad.config import RunConfig
from bids_uad.errors import ConfigError
from bids_uad.levels.participant.executors import (
    IsolatedPlugin,
    SlurmGraphPlugin,
    SlurmPlugin,
    configure_nipype,
    describe_job_end,
    make_plugin,
    read_plugin_file,
)

EXAMPLES = Path(__file__).parents[2] / "containers" / "slurm"


def config(tmp_path, **options):
    places = {name: tmp_path / name for name in ("bids_dir", "output_dir", "work_dir")}
    return RunConfig(**places, levels=("participant",), nprocs=2, mem_gb=4.0, **options)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("multiproc", IsolatedPlugin), ("slurm", SlurmPlugin), ("slurmgraph", SlurmGraphPlugin)],
)
def test_the_examples_are_understood(tmp_path, name, kind):
    plugin = make_plugin(config(tmp_path, plugin_file=EXAMPLES / f"{name}.yml"), print)
    assert type(plugin) is kind
    assert plugin.failures == []
    if kind is IsolatedPlugin:
        assert (plugin.processors, plugin.memory_gb) == (4, 12)
        plugin.close()
    else:
        assert "--mem=4G" in plugin._sbatch_args


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("plugin: Dask", "none of MultiProc, SLURM, SLURMGraph"),
        ("plugin_args: {}", "write 'plugin: SLURM'"),
        ("plugin: SLURM\nnprocs: 4", "write 'plugin: SLURM'"),
        ("plugin: SLURM\nplugin_args: [1]", "must be a mapping"),
        ("plugin: [", "cannot be read"),
        ("SLURM", "write 'plugin: SLURM'"),
    ],
)
def test_what_is_no_plugin_file_is_refused(tmp_path, text, told):
    path = tmp_path / "plugin.yml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_plugin_file(path)


def test_ends_of_jobs_in_words():
    assert "memory ran out" in describe_job_end(7, "OUT_OF_MEMORY")
    assert "time limit" in describe_job_end(7, "TIMEOUT")
    assert describe_job_end(7, "FAILED") == "ProcessKilled: SLURM job 7 ended as FAILED"


class _OnGpuInputSpec(BaseInterfaceInputSpec):
    use_cuda = traits.Bool(True, usedefault=True)


class _OnGpuOutputSpec(TraitedSpec):
    span = traits.Tuple(traits.Float, traits.Float)


class OnGpu(SimpleInterface):
    """Say when it had the GPU."""

    input_spec = _OnGpuInputSpec
    output_spec = _OnGpuOutputSpec

    def _run_interface(self, runtime):
        start = time.monotonic()
        time.sleep(1)
        self._results["span"] = (start, time.monotonic())
        return runtime


@pytest.mark.parametrize("at_once", [1, 2])
def test_gpu_nodes_run_as_many_at_a_time_as_asked(tmp_path, at_once):
    configure_nipype()
    workflow = Workflow(name="gpu", base_dir=str(tmp_path))
    nodes = [Node(OnGpu(), name=f"node{number}") for number in range(4)]
    workflow.add_nodes(nodes)
    plugin = IsolatedPlugin(
        {"n_procs": 4, "memory_gb": 4, "n_gpu_procs": at_once, "raise_insufficient": False}
    )
    graph = workflow.run(plugin=plugin)
    spans = [node.result.outputs.span for node in graph.nodes]
    most = max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)
    assert most == at_once
