"""The configurations for Nipoppy and BABS are valid, and start the program with options that it has."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from bids_uad import __version__
from bids_uad.cli.parser import build_parser
from boutiques import bosh

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "containers" / "nipoppy"
BABS = ROOT / "containers" / "babs.yaml"
OUTPUTS = ROOT / "tests" / "levels" / "expected" / "sessions_and_runs.txt"
CONFIG = json.loads((BUNDLE / "config.json").read_text())


def replaced(path: Path, **values: object) -> str:
    """Return the text of a file with Nipoppy's placeholders replaced, of which none may be left."""
    text = path.read_text()
    for name, value in values.items():
        text = text.replace(f"[[NIPOPPY_{name}]]", str(value))
    assert "[[" not in text
    return text


def test_nipoppy_bundle_has_the_descriptor_and_version_of_this_release():
    for name in ("config.json", "descriptor.json"):
        assert (BUNDLE / name).is_file()
    assert (BUNDLE / "descriptor.json").read_bytes() == (ROOT / "boutiques/descriptor.json").read_bytes(), (
        "run `make descriptor`"
    )
    assert (CONFIG["NAME"], CONFIG["VERSION"], CONFIG["PIPELINE_TYPE"]) == (
        "bids_uad",
        __version__,
        "processing",
    )
    used = {step[key] for step in CONFIG["STEPS"] for key in step if key.endswith("_FILE")}
    assert used == {path.name for path in BUNDLE.iterdir()} - {"config.json"}


@pytest.mark.parametrize("step", CONFIG["STEPS"], ids=lambda step: step["NAME"])
def test_nipoppy_invocation_is_parsed(step, capsys, tmp_path):
    paths = {"DPATH_BIDS": tmp_path, "DPATH_PIPELINE_OUTPUT": "/out", "DPATH_PIPELINE_WORK": "/work"}
    file = tmp_path / "invocation.json"
    file.write_text(replaced(BUNDLE / step["INVOCATION_FILE"], PARTICIPANT_ID="01", **paths))
    command = bosh(["exec", "simulate", "-i", str(file), str(BUNDLE / step["DESCRIPTOR_FILE"])]).shell_command
    capsys.readouterr()
    program, *arguments = shlex.split(command)
    expected = {
        "bids_dir": tmp_path,
        "output_dir": Path("/out"),
        "levels": [step["ANALYSIS_LEVEL"]],
        "work_dir": Path("/work"),
    }
    if step["ANALYSIS_LEVEL"] == "participant":
        expected["participants"] = ["01"]
    assert program == "bids_uad"
    assert vars(build_parser().parse_args(arguments)) == expected


def test_nipoppy_tracks_the_outputs_of_a_session_with_their_record():
    outputs = [*OUTPUTS.read_text().split(), "sub-01/ses-a/log/sub-01_ses-a_run-1_T1w.json", "sub-01.html"]

    def missing(session: str) -> list[str]:
        ids = {"BIDS_PARTICIPANT_ID": "sub-01", "BIDS_SESSION_ID": session}
        paths = json.loads(replaced(BUNDLE / "tracker.json", **ids))["PATHS"]
        return [path for path in paths if not any(fnmatch(name, path) for name in outputs)]

    assert missing("ses-a") == []
    assert len(missing("ses-unprocessed")) == 2
    assert json.loads((BUNDLE / "tracker_group.json").read_text())["PATHS"] == ["group.html"]


@pytest.mark.skipif(not shutil.which("nipoppy"), reason="requires nipoppy")
def test_nipoppy_accepts_the_bundle():
    done = subprocess.run(["nipoppy", "pipeline", "validate", BUNDLE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_babs_options_are_parsed(tmp_path):
    config = yaml.safe_load(BABS.read_text())
    options = dict(config["bids_app_args"])
    selection = options.pop("$SUBJECT_SELECTION_FLAG")
    assert options["-w"] == "$BABS_TMPDIR"
    arguments = [word for option in options.items() for word in option]
    arguments += ["--bids-filter-file", str(BABS), selection, "sub-01"]
    parsed = build_parser().parse_args([str(tmp_path), "out", "participant", *arguments])
    resources = config["cluster_resources"]["customized_text"]
    assert f"--cpus-per-task={parsed.nprocs}\n" in resources
    assert f"--mem={parsed.mem_gb:g}G\n" in resources
    assert config["zip_foldernames"] == {"bids_uad": __version__.replace(".", "-")}


def test_babs_writes_the_command_of_a_participant(tmp_path):
    babs = pytest.importorskip("babs.container", reason="requires babs")
    from babs.input_datasets import InputDatasets

    datasets = InputDatasets("subject", yaml.safe_load(BABS.read_text())["input_datasets"])
    datasets.update_abs_paths(str(tmp_path))
    script = tmp_path / "bids_uad_zip.sh"
    container = babs.Container(str(tmp_path), "bids_uad-0-1-0", str(BABS))
    container.generate_bash_run_bidsapp(str(script), datasets, "subject")
    command = script.read_text().split("singularity run")[1].split("\n\n")[0].replace("\\\n", " ")
    words = shlex.split(command.replace("${PWD}", str(tmp_path)).replace("${subid}", "sub-01"))
    parsed = build_parser().parse_args(words[words.index("participant") - 2 :])
    assert parsed.bids_dir == tmp_path / "inputs" / "data" / "BIDS"
    assert parsed.participants == ["01"]
