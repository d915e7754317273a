"""Maps of deviation from a normative reference, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_uad.cli.main import main
from tests.levels.fakes import add_reference
from tests.levels.test_participant_run import Bench, reference, stand_ins, validator_issues  # noqa: F401

T1W = ["sub-01/anat/sub-01_T1w.nii.gz", "sub-02/anat/sub-02_T1w.nii.gz", "sub-03/anat/sub-03_T1w.nii.gz"]
BOTH = ["--deviation", "none", "normative"]


@pytest.fixture
def bench(tmp_path):
    found = Bench(tmp_path)
    found.dataset(*T1W)
    add_reference(Path(found.models[0]))
    people(found, {"sub-01": ("50", "F"), "sub-02": ("n/a", "M"), "sub-03": ("75", "n/a")})
    return found


def people(bench, ages):
    rows = [f"{subject}\t{age}\t{sex}\n" for subject, (age, sex) in ages.items()]
    (bench.raw / "participants.tsv").write_text("participant_id\tage\tsex\n" + "".join(rows))


def z_map(bench, subject):
    path = bench.out / subject / "anat" / f"{subject}_space-SRI24_desc-T1wDisyreNormative_anomalymap.nii.gz"
    return nib.load(path).get_fdata(), json.loads(Path(str(path).replace(".nii.gz", ".json")).read_text())


def test_scores_and_deviations_share_one_anomaly_map(bench, capfd):
    assert bench.run(*BOTH) == 0
    stderr = " ".join(capfd.readouterr().err.split())
    assert "deviation of sub-02: age is not known; the mean of the reference (50 years) is used" in stderr
    assert "deviation of sub-03: age is outside the range of the reference; 60 years is used" in stderr
    assert "deviation of sub-03: sex is not known" in stderr
    assert sum(call.startswith("detect") for call in bench.take_calls()) == 3

    # The scores are 0, 0.75 and 1.5; those of people of 50, of 50 for want of an age, and of 60 for 75.
    for subject, location in (("sub-01", 0.25), ("sub-02", 0.25), ("sub-03", 0.35)):
        z, sidecar = z_map(bench, subject)
        expected = [0, (0.75 - location) / 0.1, (1.5 - location) / 0.1]
        np.testing.assert_allclose(np.unique(z.round(3)), np.round(expected, 3), atol=0.01)
        assert z[5, 5, 5] == 0
        assert sidecar["Deviation"] == "normative"
        assert sidecar["Threshold"] == 4.0
        assert "standard deviations" in sidecar["Description"]
    assert sidecar["NormativeAge"] == 60
    assert len(sidecar["NormativeRemarks"]) == 2
    anat = bench.out / "sub-01" / "anat"
    for name, key, above in (("Disyre", "disyre", 0.5), ("DisyreNormative", "disyre+normative", 4.0)):
        row = pd.read_csv(anat / f"sub-01_space-SRI24_desc-T1w{name}_metrics.tsv", sep="\t").iloc[0]
        assert (row["detector"], row["threshold"]) == (key, above)
        assert row["anomaly_volume_mm3"] == 250 + 8
    descriptions = pd.read_csv(bench.out / "descriptions.tsv", sep="\t")["desc_id"].tolist()
    assert {"desc-T1wDisyre", "desc-T1wDisyreNormative"} <= set(descriptions)
    assert "normative" in (bench.out / "logs" / "CITATION.md").read_text()

    assert bench.run(*BOTH) == 0
    assert bench.take_calls() == []


@pytest.mark.slow
def test_changed_age_updates_deviations_without_preprocessing(bench):
    assert bench.run(*BOTH, "--participant-label", "01") == 0
    bench.take_calls()
    before, _ = z_map(bench, "sub-01")
    people(bench, {"sub-01": ("40", "F")})
    assert bench.run(*BOTH, "--participant-label", "01") == 0
    assert bench.take_calls() == ["detect sub-01_T1w disyre-T1w"]
    after, _ = z_map(bench, "sub-01")
    assert after.max() == pytest.approx(before.max() + 1, abs=0.01)


def test_deviations_are_from_the_age_at_the_session(bench):
    images = [f"sub-01/ses-{number}/anat/sub-01_ses-{number}_T1w.nii.gz" for number in (1, 2, 3)]
    bench.dataset(*images)
    (bench.raw / "participants.tsv").write_bytes(
        b"Participant_ID\tsession_id\tAGE\tGender\r\n01\tses-1\t35+\t2\r\n01\tses-2\t40\t2\r\n01\tses-3\t41\t2\r\n"
    )
    (bench.raw / "sub-01" / "sub-01_sessions.tsv").write_text("session_id\tage\nses-2\t45\nses-3\tn/a\n")
    assert bench.run(*BOTH, "--participant-label", "01", "--session-label", "1", "2", "3") == 0
    for session, age in (("1", 35), ("2", 45), ("3", 41)):
        anat = bench.out / "sub-01" / f"ses-{session}" / "anat"
        sidecar = anat / f"sub-01_ses-{session}_space-SRI24_desc-T1wDisyreNormative_anomalymap.json"
        fields = json.loads(sidecar.read_text())
        assert (fields["NormativeAge"], fields["NormativeSex"], fields["NormativeRemarks"]) == (
            age,
            "female",
            [],
        )


def test_unreadable_participants_table_is_an_error_for_deviations_only(bench, capfd):
    (bench.raw / "participants.tsv").write_text("subject\tage\nsub-01\t50\n")
    assert bench.run(*BOTH, "--participant-label", "01") == 66
    stderr = " ".join(capfd.readouterr().err.split())
    assert "participants.tsv: no column participant_id (columns: subject, age); add it" in stderr
    assert "Traceback" not in stderr
    assert bench.run("--deviation", "none", "--participant-label", "01") == 0
    stderr = " ".join(capfd.readouterr().err.split())
    assert "separate columns by tabs; the table is not used" in stderr


def test_group_compares_scores_and_deviations(bench):
    assert bench.run(*BOTH) == 0
    assert main([str(bench.raw), str(bench.out), "group"]) == 0
    benchmark = pd.read_csv(bench.out / "group_benchmark.tsv", sep="\t")
    assert sorted(benchmark["detector"]) == ["disyre", "disyre+normative"]
    pairs = pd.read_csv(bench.out / "group_deviations.tsv", sep="\t")
    assert pairs["deviation"].tolist() == ["none", "normative"]
    page = (bench.out / "group.html").read_text()
    assert "Raw scores and normative deviations" in page
    assert "Disyre (Z)" in page
    assert validator_issues(bench.out) == []


def test_bundle_without_normative_reference_is_refused(bench, capsys):
    bench.dataset("sub-04/anat/sub-04_T2w.nii.gz")
    assert bench.run("--deviation", "normative") == 69
    stderr = " ".join(capsys.readouterr().err.split())
    assert "disyre-T2w has no normative reference" in stderr
    assert not bench.out.exists()
    assert bench.take_calls() == []


def test_an_altered_reference_is_refused(bench, capsys):
    path = Path(bench.models[0]) / "normative.nii.gz"
    path.write_bytes(path.read_bytes() + b"x")
    assert bench.run() == 69
    assert "normative.nii.gz differs from its sha256" in " ".join(capsys.readouterr().err.split())
    path.unlink()
    assert bench.run() == 69
    assert "normative.nii.gz is missing" in " ".join(capsys.readouterr().err.split())
