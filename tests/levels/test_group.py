from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from bids_uad.config import RunConfig
from bids_uad.dataset.describe import BIDSIGNORE
from bids_uad.errors import ConfigError, InputError
from bids_uad.evaluation.benchmark import COLUMNS
from bids_uad.levels.group import run_group
from bids_uad.reports import group as report
from bids_uad.reports.group_charts import group_charts
from tests.evaluation.fake_tables import Scan, beta_counts, write_cohort, write_participants
from tests.evaluation.test_missing import write_quality


def config(root, **options):
    (root / "raw").mkdir(exist_ok=True)
    return RunConfig(
        bids_dir=root / "raw",
        output_dir=root / "out",
        work_dir=root / "work",
        levels=("group",),
        **options,
    )


def group(root, **options):
    console = Console(width=80, record=True, file=(root / "console.txt").open("w"))
    with console.file:
        code = run_group(config(root, **options), console)
    return code, console.export_text()


@pytest.fixture
def charts():
    """Draw the charts in the report."""


@pytest.fixture(autouse=True)
def only_asked_charts(request, monkeypatch):
    """Leave out the charts, which take most of the time of a run, unless a test asks for them."""
    if "charts" not in request.fixturenames:
        monkeypatch.setattr(report, "group_charts", lambda *_: [])


@pytest.fixture
def study(tmp_path):
    write_cohort(tmp_path / "out", tmp_path / "raw", n_voxels=20_000)
    return tmp_path


def test_writes_tables_that_describe_themselves(study, charts):
    code, text = group(study)
    assert code == 0
    out = study / "out"
    for name in ("group_benchmark", "group_subjects", "participants"):
        table = pd.read_csv(out / f"{name}.tsv", sep="\t")
        columns = json.loads((out / f"{name}.json").read_text())
        assert columns.pop("Description")
        assert list(columns) == list(table.columns)
        assert all(column["Description"] for column in columns.values())
    benchmark = pd.read_csv(out / "group_benchmark.tsv", sep="\t")
    assert list(benchmark.columns) == list(COLUMNS)
    subjects = pd.read_csv(out / "group_subjects.tsv", sep="\t")
    assert len(subjects) == 6 * 4
    assert {"age", "sex", "group", "pathology"} <= set(subjects.columns)
    everyone = benchmark[benchmark["cohort"] == "all"].set_index(["detector", "modality"])
    lesions = subjects[subjects["role"] == "lesion"].groupby(["detector", "modality"])
    assert lesions["dice"].mean().to_dict() == pytest.approx(everyone["dice_mean"].to_dict())
    assert "Disyre" in text
    assert "group.html" in text
    assert max(map(len, text.splitlines()[:20])) <= 80
    assert {path.suffix for path in (out / "group" / "figures").iterdir()} == {".svg"}
    assert "[@bootstrap]" in (out / "logs" / "CITATION_group.md").read_text()
    assert 'id="ref-bootstrap"' in (out / "group.html").read_text()
    assert not list(out.rglob(".*"))


def test_needs_no_images_and_of_the_raw_dataset_only_tables(study):
    assert [path.name for path in (study / "raw").iterdir()] == ["participants.tsv"]
    assert group(study)[0] == 0
    table = pd.read_csv(study / "out" / "group_benchmark.tsv", sep="\t")
    assert (table.loc[table["cohort"] == "all", "n_healthy_scans"] == 2).all()


def test_written_participants_tables_are_not_read(study):
    assert group(study)[0] == 0
    (study / "raw" / "participants.tsv").unlink()
    assert group(study)[0] == 0
    table = pd.read_csv(study / "out" / "group_benchmark.tsv", sep="\t")
    assert (table["n_healthy_scans"] == 0).all()
    people = pd.read_csv(study / "out" / "participants.tsv", sep="\t")
    assert list(people.columns) == ["participant_id"]
    assert "No participants.tsv" in (study / "out" / "group.html").read_text()


def test_without_a_raw_dataset_nothing_is_written(study):
    options = config(study)
    assert run_group(options) == 0
    before = contents(study / "out")
    shutil.rmtree(study / "raw")
    with pytest.raises(
        InputError, match=r"raw: no such folder; use the raw dataset, or a folder with copies"
    ):
        run_group(options)
    assert contents(study / "out") == before


def test_a_foreign_participants_file_in_the_output_is_neither_read_nor_replaced(study):
    (study / "raw" / "participants.tsv").rename(study / "out" / "participants.tsv")
    before = contents(study / "out")
    with pytest.raises(InputError, match=r"participants\.tsv: not written by the group level"):
        group(study)
    assert contents(study / "out") == before


def test_odd_and_plain_participants_give_the_same_tables(tmp_path):
    numbers = range(1, 31)
    rows = [
        {"participant_id": f"sub-{k:02d}", "age": 20 + 2 * k, "sex": "MF"[k % 2], "scanner": 101 + k % 9}
        | {"group": "patient" if k < 5 else "control"}
        for k in numbers
    ]
    odd = "Participant_ID\tAge\tGender\tSCANNER\tDiagnosis\tplace\r\n" + "".join(
        f"{k:02d}\t{12 * (20 + 2 * k)}\t{1 + k % 2}.0\t{101 + k % 9}\t{group}\tKöln\r\n"
        for k in numbers
        for group in ["P" if k < 5 else "Healthy control"]
    )
    found = []
    for name in ("plain", "odd"):
        study = tmp_path / name
        write_cohort(study / "out", study / "raw", n_lesion=4, n_healthy=26, n_voxels=2_000)
        write_participants(study / "raw", rows)
        if name == "odd":
            (study / "raw" / "participants.tsv").write_bytes(odd.encode("latin-1"))
            (study / "raw" / "participants.json").write_text('{"Age": {"Units": "months"}}')
        asked = ("Age", "gender", "Scanner") if name == "odd" else ("age", "sex", "scanner")
        assert group(study, subgroups=asked)[0] == 0
        tables = ("benchmark", "subgroups", "disparities", "bias")
        found.append({table: (study / "out" / f"group_{table}.tsv").read_text() for table in tables})
    assert found[0] == found[1]
    subgroups = pd.read_csv(tmp_path / "odd" / "out" / "group_subgroups.tsv", sep="\t", dtype=str)
    assert set(subgroups["factor"]) == {"age", "sex", "scanner"}
    assert set(subgroups.loc[subgroups["factor"] == "scanner", "level"]) <= {str(101 + k) for k in range(9)}
    assert {"age", "sex"} <= set(pd.read_csv(tmp_path / "odd" / "out" / "group_bias.tsv", sep="\t")["term"])
    subjects = pd.read_csv(tmp_path / "odd" / "out" / "group_subjects.tsv", sep="\t")
    assert subjects.groupby("participant_id")[["age", "sex"]].first().loc["sub-05"].tolist() == [
        30.0,
        "female",
    ]
    page = (tmp_path / "odd" / "out" / "group.html").read_text()
    assert "participants.tsv: not UTF-8, read as Latin-1" in page
    assert "column Gender: 30 values are 1 or 2 without a description" in page


def test_participant_columns_are_those_of_the_image_session(tmp_path):
    for session in ("1", "2"):
        Scan("01", session=session).write(tmp_path / "out")
    (tmp_path / "raw" / "sub-01").mkdir(parents=True)
    (tmp_path / "raw" / "participants.tsv").write_text(
        "participant_id\tage\tgroup\tpathology\tsite\nsub-01\t30\tHC\tn/a\tA\n"
    )
    (tmp_path / "raw" / "sub-01" / "sub-01_sessions.tsv").write_text(
        "session_id\tage\tgroup\tpathology\tsite\tscanner\nses-1\tn/a\tn/a\tn/a\tn/a\t1\nses-2\t33\tMS\tMS\tB\t2\n"
    )
    assert group(tmp_path)[0] == 0
    subjects = pd.read_csv(tmp_path / "out" / "group_subjects.tsv", sep="\t")
    columns = ["session_id", "cohort", "role", "age", "site", "scanner"]
    assert subjects[columns].values.tolist() == [
        ["ses-1", "healthy", "healthy", 30, "A", 1],
        ["ses-2", "MS", "missing_mask", 33, "B", 2],
    ]


def contents(folder):
    """Return the bytes of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def score(study, subject, session=None):
    """Write the tables of one more image of the same model."""
    model = next(study.glob("out/sub-02/**/*T1wDisyre_metrics.tsv"))
    threshold = pd.read_csv(model, sep="\t").loc[0, "threshold"]
    Scan(subject, session=session, threshold=threshold).write(study / "out")


def change_nothing(study):
    pass


def take_the_participants_away(study):
    (study / "raw" / "participants.tsv").unlink()


def drop_and_add_participants(study):
    people = pd.read_csv(study / "raw" / "participants.tsv", sep="\t").iloc[2:]
    more = pd.DataFrame(
        [{"participant_id": "sub-99", "age": 50, "sex": "F", "group": "control", "height": 2}]
    )
    pd.concat([people, more]).to_csv(study / "raw" / "participants.tsv", sep="\t", index=False, na_rep="n/a")
    score(study, "99")


def add_sessions(study):
    for folder in (study / "raw" / "sub-01", study / "raw" / "sub-02"):
        folder.mkdir()
        (folder / f"{folder.name}_sessions.tsv").write_text("session_id\tage\tgroup\nses-1\t20\thealthy\n")


@pytest.mark.parametrize(
    ("between", "final"),
    [
        (drop_and_add_participants, change_nothing),
        (take_the_participants_away, add_sessions),
        pytest.param(add_sessions, take_the_participants_away, marks=pytest.mark.slow),
    ],
)
def test_result_does_not_depend_on_earlier_runs(tmp_path, monkeypatch, between, final):
    if between is drop_and_add_participants:
        monkeypatch.setattr(report, "group_charts", group_charts)
    study = tmp_path / "study"

    def fresh():
        shutil.rmtree(study, ignore_errors=True)
        write_cohort(study / "out", study / "raw", n_voxels=2_000)
        score(study, "01", session="1")

    def run(**options):
        assert group(study, run_id="20260102-030405_x", **options)[0] == 0

    fresh()
    final(study)
    run()
    expected = contents(study / "out")
    run()
    assert contents(study / "out") == expected
    fresh()
    between(study)
    run(**({} if between is take_the_participants_away else {"cohort": "sex", "subgroups": ("age", "group")}))
    shutil.rmtree(study / "raw")
    write_cohort(tmp_path / "spare", study / "raw", n_voxels=2_000)
    shutil.rmtree(study / "out" / "sub-99", ignore_errors=True)
    final(study)
    run()
    assert contents(study / "out") == expected


def test_run_is_reproducible(study, charts):
    write_cohort(study / "out", study / "raw", n_lesion=5, n_voxels=20_000)  # enough for intervals
    day = "20260102-030405_x"
    group(study, run_id=day)
    first = (study / "out" / "group_benchmark.tsv").read_bytes()
    page = (study / "out" / "group.html").read_bytes()
    assert b"2026-01-02" in page
    group(study, run_id=day)
    assert (study / "out" / "group_benchmark.tsv").read_bytes() == first
    assert (study / "out" / "group.html").read_bytes() == page
    group(study, random_seed=1)
    assert (study / "out" / "group_benchmark.tsv").read_bytes() != first


def test_run_without_score_tables_names_the_remedy(tmp_path, caplog):
    (tmp_path / "out").mkdir()
    assert group(tmp_path)[0] == 66
    assert "run the participant level first" in caplog.text
    assert not list((tmp_path / "out").iterdir())


def test_unreadable_table_is_reported_and_counted(study, caplog):
    bad = next((study / "out" / "sub-01").rglob("*T1wDisyre_histogram.tsv"))
    bad.unlink()
    assert group(study)[0] == 1
    assert bad.name in caplog.text
    assert bad.name in (study / "out" / "group.html").read_text()
    table = pd.read_csv(study / "out" / "group_benchmark.tsv", sep="\t")
    assert table.loc[0, ["detector", "modality", "cohort", "n_scans"]].tolist() == [
        "disyre",
        "T1w",
        "all",
        5,
    ]


def test_all_participants_excluded(tmp_path):
    Scan("01").write(tmp_path / "out")
    quality = tmp_path / "out/sub-01/anat/sub-01_space-SRI24_desc-T1wPreproc_qc.tsv"
    quality.write_text("exclude\texclude_reasons\nyes\tblurred\n")
    assert group(tmp_path)[0] == 0
    page = (tmp_path / "out" / "group.html").read_text()
    assert "No usable image." in page
    assert "1 scan excluded by quality control." in page


def test_t2w_is_excluded_with_its_anchor(tmp_path):
    for subject in ("01", "02"):
        for modality in ("T1w", "T2w"):
            Scan(subject, modality).write(tmp_path / "out")
    failed = {"failures": ["The registration failed."]}
    write_quality(tmp_path / "out", "sub-01_T1w", failed)
    write_quality(tmp_path / "out", "sub-01_T2w", {}, depends_on="sub-01_T1w")
    assert group(tmp_path)[0] == 0
    subjects = pd.read_csv(tmp_path / "out" / "group_subjects.tsv", sep="\t")
    assert set(subjects["participant_id"]) == {"sub-02"}
    benchmark = pd.read_csv(tmp_path / "out" / "group_benchmark.tsv", sep="\t")
    assert benchmark["n_excluded_scans"].tolist() == [1, 1]
    page = (tmp_path / "out" / "group.html").read_text()
    assert "depends on sub-01_T1w, which is excluded: The registration failed." in page
    assert "by quality control" in page


def test_a_single_participant(tmp_path):
    Scan("01").write(tmp_path / "out")
    assert group(tmp_path)[0] == 0
    table = pd.read_csv(tmp_path / "out" / "group_benchmark.tsv", sep="\t")
    assert table.loc[0, "n_missing_mask"] == 1


def test_participant_label_restricts_the_cohort(study):
    assert group(study, participants=("01", "05"))[0] == 0
    table = pd.read_csv(study / "out" / "group_benchmark.tsv", sep="\t")
    assert (table["n_participants"] == 2).all()
    assert (table["n_missing_participants"] == 0).all()
    people = pd.read_csv(study / "out" / "participants.tsv", sep="\t")
    assert len(people) == 6


def test_all_participants_are_listed(study):
    people = pd.read_csv(study / "raw" / "participants.tsv", sep="\t").iloc[:-1]
    ghost = pd.DataFrame([{"participant_id": "sub-77", "group": "patient"}])
    pd.concat([people, ghost]).to_csv(study / "raw" / "participants.tsv", sep="\t", index=False, na_rep="n/a")
    group(study)
    written = pd.read_csv(study / "out" / "participants.tsv", sep="\t")
    assert {"sub-06", "sub-77"} <= set(written["participant_id"])
    page = (study / "out" / "group.html").read_text()
    assert "Not listed in participants.tsv, so not known to be healthy controls: sub-06." in page
    assert "sub-77" in page


def test_outputs_pass_the_bids_validator(study):
    validator = shutil.which("bids-validator-deno") or shutil.which(
        "bids-validator-deno", path=str(Path(pd.__file__).parents[4] / "bin")
    )
    if validator is None:
        pytest.skip("bids-validator-deno is not installed")
    score(study, "01", session="1")
    add_sessions(study)
    group(study)
    out = study / "out"
    assert (out / "sub-01" / "sub-01_sessions.tsv").is_file()
    (out / ".bidsignore").write_text("\n".join(BIDSIGNORE) + "\n")
    description = {
        "Name": "test",
        "BIDSVersion": "1.10.1",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "bids_uad"}],
    }
    (out / "dataset_description.json").write_text(json.dumps(description))
    done = subprocess.run(
        [validator, str(out), "--format", "json"], capture_output=True, text=True, check=False
    )
    issues = json.loads(done.stdout)["issues"]["issues"]
    errors = [issue for issue in issues if issue["severity"] == "error"]
    assert not errors
    ours = [
        issue for issue in issues if issue.get("location", "").endswith(("participants.tsv", "sessions.tsv"))
    ]
    assert not ours


def test_healthy_participants_file_with_other_columns_is_kept(tmp_path):
    Scan("01").write(tmp_path / "out")
    write_participants(
        tmp_path / "raw", [{"participant_id": "sub-01", "diagnosis": "Healthy", "dice": "six"}]
    )
    assert group(tmp_path)[0] == 0
    subjects = pd.read_csv(tmp_path / "out" / "group_subjects.tsv", sep="\t")
    assert subjects.loc[0, "participants_dice"] == "six"
    assert subjects.loc[0, "role"] == "healthy"


def test_experiments_are_compared_on_the_same_participants(study):
    write_cohort(study / "tenth", study / "raw", n_voxels=20_000, seed=0)
    for path in (study / "tenth").rglob("*Patchcore_*"):
        path.unlink()
    sidecar = study / "tenth/sub-01/anat/sub-01_space-SRI24_desc-T1wDisyre_metrics.json"
    fields = {"TrainingSubjects": 8, "TrainingFraction": 0.1, "HyperParameters": {"stride": 4}}
    sidecar.write_text(json.dumps(fields))
    out = study / "out"
    assert group(study, experiments={"tenth": study / "tenth"})[0] == 0
    table = pd.read_csv(out / "group_experiments.tsv", sep="\t")
    columns = json.loads((out / "group_experiments.json").read_text())
    assert columns.pop("Description")
    assert list(columns) == list(table.columns)
    tenth = table[table["variant"] == "tenth"].set_index(["detector", "modality", "outcome"])
    assert set(tenth.index.get_level_values("detector")) == {"disyre"}
    assert tenth.loc[("disyre", "T1w", "dice"), ["n_training_subjects", "changes"]].tolist() == [
        8,
        "stride=4",
    ]
    assert (tenth["difference"] == 0).all()
    benchmark = pd.read_csv(out / "group_benchmark.tsv", sep="\t")
    everyone = benchmark[benchmark["cohort"] == "all"].set_index(["detector", "modality"])
    own = table[(table["variant"] == "reference") & (table["outcome"] == "dice")]
    own = own.set_index(["detector", "modality"])["mean"]
    assert own.to_dict() == pytest.approx(everyone["dice_mean"].to_dict())
    page = (out / "group.html").read_text()
    assert 'id="experiments"' in page
    assert f"--experiments tenth={study / 'tenth'}" in page
    methods = (out / "logs" / "CITATION_group.md").read_text()
    assert "trained differently (tenth)" in methods
    assert group(study)[0] == 0
    assert not list(out.glob("group_experiments*"))
    assert 'id="experiments"' not in (out / "group.html").read_text()


def test_models_of_other_detectors_leave_nothing_to_compare(study):
    Scan("01", modality="T2w", detector="fae", sha256="f" * 64).write(study / "fae")
    assert group(study, experiments={"fae": study / "fae"})[0] == 0
    page = (study / "out" / "group.html").read_text()
    assert "The other outputs have no detector and modality in common with these." in page


def test_experiments_without_tables_are_refused(study):
    (study / "empty").mkdir()
    with pytest.raises(InputError, match="no score tables"):
        group(study, experiments={"empty": study / "empty"})
    with pytest.raises(ConfigError, match="reference"):
        group(study, experiments={"reference": study / "out"})


def test_cohorts_are_values_of_the_requested_column(study):
    people = pd.read_csv(study / "raw" / "participants.tsv", sep="\t")
    people["site"] = ["north", "south", "north", "south", "north", "south"]
    people.to_csv(study / "raw" / "participants.tsv", sep="\t", index=False, na_rep="n/a")
    assert group(study, cohort="site")[0] == 0
    benchmark = pd.read_csv(study / "out" / "group_benchmark.tsv", sep="\t")
    rows = benchmark[benchmark["detector"] == "disyre"].drop_duplicates("cohort")
    assert rows.set_index("cohort")["n_lesion_scans"].to_dict() == {"all": 4, "north": 2, "south": 2}
    subjects = pd.read_csv(study / "out" / "group_subjects.tsv", sep="\t")
    assert set(subjects["cohort"]) == {"healthy", "north", "south"}
    page = (study / "out" / "group.html").read_text()
    assert "By site" in page
    with pytest.raises(InputError, match="no column hospital for cohorts; choose one of age, sex"):
        group(study, cohort="hospital")


def test_subgroups_from_scans_tables_and_sidecars(study, caplog):
    people = pd.read_csv(study / "raw" / "participants.tsv", sep="\t")
    anat = None
    for k, who in enumerate(people["participant_id"]):
        anat = study / "raw" / who / "anat"
        anat.mkdir(parents=True)
        field = {"Manufacturer": "ABC"[k // 3], "Only": "one"}
        (anat / f"{who}_T1w.json").write_text(json.dumps(field))
        (anat / f"{who}_T2w.json").write_text(json.dumps(field))
        (anat.parent / f"{who}_scans.tsv").write_text(
            f"filename\toperator\nanat/{who}_T1w.nii.gz\t{'kim' if k % 2 else 'lee'}\n"
            f"anat/{who}_T2w.nii.gz\tn/a\n"
        )
    people["group"] = "control"
    people.to_csv(study / "raw" / "participants.tsv", sep="\t", index=False, na_rep="n/a")
    assert group(study, subgroups=("Manufacturer", "operator", "Only", "shoe size"))[0] == 0
    subjects = pd.read_csv(study / "out" / "group_subjects.tsv", sep="\t")
    first = subjects["participant_id"] <= "sub-03"
    assert set(subjects.loc[first, "Manufacturer"]) == {"A"}
    assert set(subjects.loc[~first, "Manufacturer"]) == {"B"}
    subgroups = pd.read_csv(study / "out" / "group_subgroups.tsv", sep="\t")
    assert set(subgroups["factor"]) == {"Manufacturer", "operator"}
    operators = subgroups[subgroups["factor"] == "operator"]
    assert set(operators["modality"]) == {"T1w"}
    assert set(operators["n_participants"]) == {3}
    fpr = subjects[(subjects["detector"] == "disyre") & (subjects["modality"] == "T1w")]
    row = operators[(operators["level"] == "kim") & (operators["detector"] == "disyre")].iloc[0]
    assert row["mean"] == pytest.approx(fpr.loc[fpr["operator"] == "kim", "fpr"].mean())
    columns = json.loads((study / "out" / "group_subjects.json").read_text())
    assert "sidecar of the raw image" in columns["Manufacturer"]["Description"]
    assert "--subgroups shoe size: no such column" in caplog.text
    assert "--subgroups Only: fewer than two subgroups" in caplog.text
    assert "--subgroups shoe size: no such column" in (study / "out" / "group.html").read_text()


def test_scanners_of_the_training_data_form_a_subgroup(tmp_path):
    rows = []
    for k in range(9):
        seen = ("seen", "unseen", None)[k // 3]
        counts = beta_counts(np.random.default_rng(k), 20_000, 1.1, 14 if seen == "seen" else 8)
        Scan(f"{k}", n_nonlesion=counts, scanner_seen=seen).write(tmp_path / "out")
        rows.append({"participant_id": f"sub-{k}", "group": "control"})
    write_participants(tmp_path / "raw", rows)
    assert group(tmp_path)[0] == 0
    subgroups = pd.read_csv(tmp_path / "out" / "group_subgroups.tsv", sep="\t").set_index("level")
    assert set(subgroups["factor"]) == {"scanner_seen"}
    assert subgroups["n_participants"].to_dict() == {"seen": 3, "unseen": 3}
    subjects = pd.read_csv(tmp_path / "out" / "group_subjects.tsv", sep="\t")
    context = subjects.groupby("scanner_seen")["fpr"].mean()
    assert subgroups["mean"].to_dict() == pytest.approx(context.to_dict())
    assert subgroups.loc["unseen", "hedges_g_ci_low"] > 0


def test_tables_of_earlier_versions_have_no_scanner_column(study):
    for path in (study / "out").rglob("*_metrics.tsv"):
        table = pd.read_csv(path, sep="\t").drop(columns="scanner_seen")
        table.to_csv(path, sep="\t", index=False, na_rep="n/a")
    assert group(study)[0] == 0
    assert pd.read_csv(study / "out" / "group_subjects.tsv", sep="\t")["scanner_seen"].isna().all()


def test_lesions_are_grouped_by_size_if_their_tables_exist(study, charts):
    assert group(study)[0] == 0
    out = study / "out"
    for name in ("lesions", "missed"):
        table = pd.read_csv(out / f"group_{name}.tsv", sep="\t")
        columns = json.loads((out / f"group_{name}.json").read_text())
        assert columns.pop("Description")
        assert list(columns) == list(table.columns)
        assert len(table)
    everything = pd.read_csv(out / "group_lesions.tsv", sep="\t").query("factor == 'all lesions'")
    benchmark = pd.read_csv(out / "group_benchmark.tsv", sep="\t").query("cohort == 'all'")
    keys, columns = ["detector", "modality"], ["n_lesions", "lesion_sensitivity", "lesion_sensitivity_ci_low"]
    pd.testing.assert_frame_equal(
        everything.set_index(keys)[columns].sort_index(),
        benchmark.set_index(keys)[columns].sort_index(),
        check_dtype=False,
    )
    page = (out / "group.html").read_text()
    assert 'id="lesions"' in page
    assert 'id="lesion_size_T1w"' in page
    assert "without a lesion table" not in page
    first, *others = out.glob("sub-*/anat/*_lesions.tsv")
    first.unlink()
    assert group(study)[0] == 0
    page = (out / "group.html").read_text()
    assert "1 score tables of images with lesions were written by an earlier version" in page
    for path in others:
        path.unlink()
    assert group(study)[0] == 0
    page = (out / "group.html").read_text()
    assert "16 score tables of images with lesions were written by an earlier version" in page
    assert 'id="lesion_size_T1w"' not in page
