import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from bids_uad.cli import main as cli
from bids_uad.errors import (
    ConfigError,
    ExitCode,
    InputError,
    ModelError,
    UnavailableError,
    UserError,
)


@pytest.fixture
def arguments(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.9.0"}')
    (tmp_path / "out").mkdir()
    return [str(raw), str(tmp_path / "out"), "-w", str(tmp_path / "w")]


@pytest.fixture
def levels(monkeypatch):
    """Replace the levels by functions that return or raise the values set by a test."""
    outcomes, called = {}, []

    class Module:
        def __getattr__(self, name):
            def run(config):
                called.append(name)
                outcome = outcomes.get(name, 0)
                if isinstance(outcome, BaseException):
                    raise outcome
                return outcome

            return run

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: Module())
    return outcomes, called


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (InputError("f", "p", "r"), 66),
        (ModelError("x"), 69),
        (UnavailableError("x"), 69),
        (UserError("x"), 70),
    ],
)
def test_user_error_is_one_line_and_an_exit_code(arguments, levels, capsys, error, code):
    levels[0]["run_participant"] = error
    assert cli.main([*arguments, "participant"]) == code
    printed = capsys.readouterr().err
    assert printed == f"bids_uad: {error}\n"


def test_traceback_with_vv_only(arguments, levels, capsys):
    levels[0]["run_participant"] = ConfigError("x")
    cli.main([*arguments, "participant", "-vv"])
    assert "Traceback" in capsys.readouterr().err


def test_group_runs_after_exit_code_1_only(arguments, levels):
    outcomes, called = levels
    outcomes["run_participant"] = 1
    assert cli.main([*arguments, "group", "participant"]) == 1
    assert called == ["run_participant", "run_group"]
    called.clear()
    outcomes["run_participant"] = 69
    assert cli.main([*arguments, "participant", "group"]) == 69
    assert called == ["run_participant"]


@pytest.mark.parametrize("error", [ZeroDivisionError("x\ny"), OSError("x")])
@pytest.mark.parametrize("verbose", [[], ["-vv"]])
def test_unexpected_errors_return_70_with_their_place(arguments, levels, capsys, error, verbose):
    levels[0]["run_participant"] = error
    assert cli.main([*arguments, "participant", *verbose]) == ExitCode.SOFTWARE == 70
    *before, line = capsys.readouterr().err.splitlines()
    assert line.startswith("bids_uad: internal error in ")
    assert f"{__file__}:" in line
    assert f"{type(error).__name__}: x; please report it" in line
    assert (before[:1] == ["Traceback (most recent call last):"]) is bool(verbose)
    assert bool(before) is bool(verbose)


def test_interrupt_returns_130(arguments, levels):
    levels[0]["run_participant"] = KeyboardInterrupt()
    assert cli.main([*arguments, "participant"]) == 130


def test_help_imports_no_heavy_modules():
    script = (
        "import sys; from bids_uad.cli.main import main\n"
        "for line in (['--version'], ['--help'], ['train', '--help']):\n"
        "    try: main(line)\n"
        "    except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'ants', 'nipype', 'bids', 'nilearn'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "bids_uad", "a", "b", "participant"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "does not exist" in done.stderr


@pytest.mark.parametrize("command", ["simulate", "atlas", "extraction"])
def test_programs_get_the_arguments_after_their_name(command, monkeypatch):
    module = SimpleNamespace(main=lambda arguments: arguments)
    imported = []
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: imported.append(name) or module)
    assert cli.main([command, "out", "--seed", "1"]) == ["out", "--seed", "1"]
    assert imported == [cli.PROGRAMS[command]]


@pytest.mark.parametrize("command", ["simulate", "atlas", "extraction"])
def test_programs_have_their_own_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: bids_uad {command} ")
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "a", "b", "--hlep"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("error: unknown option --hlep; did you mean --help?\n")


def test_train_as_a_level_is_deprecated_and_runs(arguments, levels, capsys):
    folders = arguments[:2]
    assert cli.main([*folders, "train", "calibrate"]) == 0
    text = capsys.readouterr().err
    assert "use 'bids_uad train DERIVATIVES MODELS'" in text
    assert "use 'bids_uad calibrate DERIVATIVES MODELS'" in text
    assert cli.main(["train", *folders]) == 0
    assert capsys.readouterr().err == ""
    assert levels[1] == ["run_train", "run_calibrate", "run_train"]


def test_sigterm_returns_143(arguments, monkeypatch, capsys):
    def run(config):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(run_participant=run))
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main([*arguments, "participant"]) == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_in_a_destructor_ends_the_run(arguments, monkeypatch, capsys, request, number, code):
    """Python drops exceptions that a destructor raises."""
    # Shells start background jobs with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    class Interrupted:
        def __del__(self):
            os.kill(os.getpid(), number)
            time.sleep(0.1)

    def run(config):
        Interrupted()
        time.sleep(10)
        return 0

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(run_participant=run))
    hook = sys.unraisablehook
    assert cli.main([*arguments, "participant"]) == code
    assert sys.unraisablehook is hook
    assert capsys.readouterr().err.splitlines()[-1].startswith("bids_uad: interrupted")


@pytest.mark.parametrize(
    ("own", "spins"),
    [({}, "10000"), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "5"}, "5")],
)
def test_spin_count_is_set_unless_the_user_sets_a_wait_policy(arguments, levels, monkeypatch, own, spins):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    assert cli.main([*arguments[:2], "participant", *arguments[2:]]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == spins
