import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bids_uad import space
from bids_uad.cli.main import main
from bids_uad.dataset.lesion_masks import written_mask
from bids_uad.dataset.participants import image_hash, read_participants
from bids_uad.evaluation.benchmark import evaluate
from bids_uad.evaluation.tables import find_metrics_tables
from bids_uad.files import CHECKSUMS, file_sha256
from bids_uad.levels.participant import run, summary, workflow
from bids_uad.levels.participant import workflow as writing
from bids_uad.methods import registry
from bids_uad.reports.boilerplate import describe_rule
from bids_uad.reports.derivatives import find_images
from tests.dataset.skeleton import write_dataset, write_image, write_mask
from tests.header_contract import faults_below
from tests.levels.fakes import (
    FakeDetect,
    fake_bundle,
    fake_reference,
    init_fake_preproc_wf,
    refuse_page,
    write_page,
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return fake_reference(tmp_path_factory.mktemp("reference"))


class Bench:
    """A dataset, bundles, and the command line on them."""

    def __init__(self, folder: Path):
        self.raw, self.out, self.calls = folder / "raw", folder / "out", folder / "calls.txt"
        self.work, self.folder = folder / "work", folder
        self.models = [
            str(fake_bundle(folder / f"disyre-{modality}", "disyre", modality)) for modality in ("T1w", "T2w")
        ]

    def dataset(self, *names):
        write_dataset(self.raw, {name: {"SkullStripped": True} for name in names})

    def run(self, *extra, models=None):
        # Inputs of an earlier run in this process are remembered by path.
        CHECKSUMS.clear()
        arguments = [str(self.raw), str(self.out), "participant", "-w", str(self.work), "--device", "cpu"]
        return main([*arguments, "--nprocs", "1", *extra, "--models", *(models or self.models)])

    def copied(self, folder):
        """Return a copy of dataset, models and outputs in another folder."""
        left_out = shutil.ignore_patterns("work", "calls.txt")
        shutil.copytree(self.folder, folder, dirs_exist_ok=True, ignore=left_out)
        return Bench(folder)

    def take_calls(self):
        lines = sorted(self.calls.read_text().splitlines()) if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return lines

    def maps(self):
        return {
            path.relative_to(self.out).as_posix(): file_sha256(path)
            for path in self.out.rglob("sub-*/**/anat/*")
        }


@pytest.fixture(scope="module", autouse=True)
def stand_ins(reference):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "init_preproc_wf", init_fake_preproc_wf)
        patch.setattr(writing, "Detect", FakeDetect)
        patch.setattr(run, "resolve_reference", lambda atlas, cache: reference)
        patch.setattr(summary, "write_report", write_page)
        patch.setattr(registry, "has_native_bf16", lambda: False)
        yield


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, stand_ins):
    """Return a finished run with sessions and ground truth, which tests must not change."""
    bench = Bench(tmp_path_factory.mktemp("finished"))
    bench.dataset(T1W, T2W, "sub-02/ses-a/anat/sub-02_ses-a_acq-x_run-1_T1w.nii.gz")
    write_mask(bench.folder / "lesions" / "sub-01" / "anat" / "sub-01_label-lesion_mask.nii.gz")
    description = {"Name": "Masks", "BIDSVersion": "1.9.0", "DatasetType": "derivative"}
    (bench.folder / "lesions" / "dataset_description.json").write_text(json.dumps(description))
    assert bench.run("--nprocs", "2", "-d", f"lesions={bench.folder / 'lesions'}") == 0
    return bench


KINDS = ("T1w", "T2w")
T1W, T2W = "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz"


def validator_issues(root):
    """List what the BIDS validator reports about a dataset; skip the test where it is not installed."""
    validator = shutil.which(
        "bids-validator-deno", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if validator is None:
        pytest.skip("bids-validator-deno is not installed")
    done = subprocess.run(
        [validator, "--format", "json", str(root)],
        capture_output=True,
        text=True,
        check=False,
    )
    issues = json.loads(done.stdout)["issues"]["issues"]
    return [(i["severity"], i["code"], i.get("subCode"), i.get("location")) for i in issues]


def test_complete_output_tree_passes_the_validator(finished):
    bench = finished
    assert validator_issues(bench.out) == []
    assert len(list(bench.out.rglob("*_mask.nii.gz"))) == 3 * 4 + 1 + 1

    links = json.loads((bench.out / "dataset_description.json").read_text())["DatasetLinks"]
    assert links == {"raw": "../raw", "lesions": "../lesions"}
    for path in bench.out.rglob("sub-*/**/anat/*.json"):
        assert str(bench.folder) not in path.read_text(), path


def test_all_images_of_a_run_keep_the_header_contract(finished):
    assert faults_below(finished.out) == []


def test_outputs_agree_with_the_anomaly_map(finished):
    bench = finished
    anat = bench.out / "sub-01" / "anat"
    for modality in ("T1w", "T2w"):
        start = f"sub-01_space-SRI24_desc-{modality}Disyre"
        row = pd.read_csv(anat / f"{start}_metrics.tsv", sep="\t").iloc[0]
        assert row["source_image"] == f"bids:raw:sub-01/anat/sub-01_{modality}.nii.gz"
        assert row["brain_volume_mm3"] == 30**3
        assert row["anomaly_volume_mm3"] == 250 + 8
        assert row["lesion_volume_mm3"] == 125
        assert (
            row["n_components"],
            row["n_lesions"],
            row["n_lesions_detected"],
            row["n_false_components"],
        ) == (2, 1, 1, 1)
        counts = pd.read_csv(anat / f"{start}_histogram.tsv", sep="\t")
        assert counts["n_lesion"].tolist() == [0, 0, 125, 0]
        assert counts["n_nonlesion"].tolist() == [30**3 - 258, 0, 125, 8]
        assert counts["score_upper"].iloc[-1] == np.inf
        image = nib.load(anat / f"{start}_anomalymap.nii.gz")
        assert image.get_data_dtype() == np.float32
        np.testing.assert_array_equal(image.affine, space.AFFINE)
        assert image.get_fdata()[5, 5, 5] == 0
        probability = nib.load(
            anat / f"sub-01_space-SRI24_label-anomaly_desc-{modality}Disyre_probseg.nii.gz"
        ).get_fdata()
        assert probability[112, 112, 72] == pytest.approx(0.75 / 1.25)
        native = nib.load(anat / f"sub-01_space-orig_label-anomaly_desc-{modality}Disyre_mask.nii.gz")
        raw = nib.load(bench.raw / f"sub-01/anat/sub-01_{modality}.nii.gz")
        assert native.shape == raw.shape
        np.testing.assert_array_equal(native.affine, raw.affine)
        sidecar = json.loads(
            (anat / f"sub-01_space-SRI24_label-anomaly_desc-{modality}Disyre_mask.json").read_text()
        )
        assert (sidecar["Threshold"], sidecar["ThresholdName"], sidecar["Device"]) == (0.5, "max_dice", "cpu")
        assert sidecar["Precision"] == "fp32"
        assert "3 x 3 x 3" in sidecar["PostProcessing"]
        assert sidecar["Scaling"]["upper"] == 99.5
    assert (anat / "sub-01_desc-T2wBrain_mask.nii.gz").is_file()
    assert (anat / "sub-01_space-SRI24_label-lesion_desc-manual_mask.nii.gz").is_file()
    quality = pd.read_csv(anat / "sub-01_space-SRI24_desc-T2wPreproc_qc.tsv", sep="\t").iloc[0]
    assert (quality["exclude"], quality["modality"]) == ("no", "T2w")
    assert quality["source_image"] == "bids:raw:sub-01/anat/sub-01_T2w.nii.gz"
    described = json.loads((anat / "sub-01_space-SRI24_desc-T2wPreproc_qc.json").read_text())
    assert set(quality.index) <= set(described)
    preproc = json.loads((anat / "sub-01_space-SRI24_desc-preproc_T2w.json").read_text())
    assert preproc["PreprocessingQuality"]["warnings"] == ["look at sub-01_T2w.nii.gz"]


def test_broken_sidecar_of_a_lesion_mask_is_named_and_the_mask_is_used(bench, capfd):
    bench.dataset(T1W)
    mask = write_mask(bench.folder / "lesions/sub-01/anat/sub-01_label-lesion_mask.nii.gz")
    sidecar = mask.with_name("sub-01_label-lesion_mask.json")
    sidecar.write_text("{")
    assert bench.run("-d", f"lesions={bench.folder / 'lesions'}", models=["none"]) == 0
    stderr = "".join(capfd.readouterr().err.split())
    assert f"{sidecar}:notvalidJSON" in stderr
    assert list(bench.out.rglob("*_label-lesion_desc-manual_mask.nii.gz"))


@pytest.mark.slow
def test_mp2rage_image_is_processed_beside_a_t1w_image(bench):
    unit1 = T1W.replace("_T1w", "_UNIT1")
    bench.dataset(T1W, unit1, T2W, "sub-02/anat/sub-02_UNIT1.nii.gz", "sub-02/anat/sub-02_T2w.nii.gz")
    assert bench.run() == 0
    anat = bench.out / "sub-01/anat"
    for start, source in (("sub-01", T1W), ("sub-01_rec-UNIT1", unit1)):
        sidecar = json.loads((anat / f"{start}_space-SRI24_desc-preproc_T1w.json").read_text())
        assert sidecar["Sources"] == [f"bids:raw:{source}"]
        row = pd.read_csv(anat / f"{start}_space-SRI24_desc-T1wDisyre_metrics.tsv", sep="\t").iloc[0]
        assert row["source_image"] == f"bids:raw:{source}"
        assert (anat / f"{start}_from-T1w_to-SRI24_mode-image_xfm.txt").is_file()
    for subject, anchor in (("01", T1W), ("02", "sub-02/anat/sub-02_UNIT1.nii.gz")):
        folder = bench.out / f"sub-{subject}/anat"
        sidecar = json.loads((folder / f"sub-{subject}_space-SRI24_desc-preproc_T2w.json").read_text())
        assert sidecar["Sources"][-1] == f"bids:raw:{anchor}"
    assert "the MP2RAGE image" in (bench.out / "logs/CITATION.md").read_text()
    bench.take_calls()
    assert bench.run() == 0
    assert bench.take_calls() == []
    assert validator_issues(bench.out) == []


def test_second_run_only_restores_lost_files(bench, capsys):
    bench.dataset(T1W, T2W)
    assert bench.run() == 0
    assert list(bench.work.glob("*_wf/*")) == []
    assert len(bench.take_calls()) == 4
    before = bench.maps()
    assert bench.run() == 0
    assert bench.take_calls() == []
    assert capsys.readouterr().err.count("up to date") >= 2

    lost = bench.out / "sub-01/anat/sub-01_space-SRI24_label-anomaly_desc-T2wDisyre_mask.nii.gz"
    lost.unlink()
    assert bench.run() == 0
    assert bench.take_calls() == ["detect sub-01_T2w disyre-T2w"]  # on the outputs of preprocessing
    assert bench.maps() == before

    (bench.out / "sub-01/anat/sub-01_space-SRI24_desc-preproc_T2w.nii.gz").unlink()
    assert bench.run("--keep-workdir") == 0
    assert bench.take_calls() == ["preproc sub-01_T1w.nii.gz", "preproc sub-01_T2w.nii.gz"]
    assert bench.maps() == before
    assert list(bench.work.glob("*_wf/*/*")) != []
    assert bench.run("--clean-workdir") == 0
    assert list(bench.work.glob("*_wf/*")) == []


def test_work_folder_and_unfinished_participants_do_not_grow(bench, monkeypatch):
    """Each participant has its report before the next but one is begun, and leaves no intermediate files."""
    labels = [f"{number:02d}" for number in range(4)]
    bench.dataset(*(f"sub-{label}/anat/sub-{label}_T1w.nii.gz" for label in labels), T2W)
    begun, reported, folders = [], [], []

    class Watch(summary.Progress):
        def begin(self, subject):
            begun.append(subject)
            reported.append({path.stem.removeprefix("sub-") for path in bench.out.glob("sub-*.html")})
            super().begin(subject)

        def watch(self, node, status):
            folders.append(len(list(bench.work.glob("*_wf/*_wf"))))
            super().watch(node, status)

    monkeypatch.setattr(run, "Progress", Watch)
    assert bench.run() == 0
    assert begun == labels
    for number, reports in enumerate(reported):
        assert set(labels[: max(number - 1, 0)]) <= reports <= set(labels[:number])
    assert 1 <= max(folders) <= 2
    assert list(bench.work.glob("*_wf/*")) == []
    assert len(list(bench.out.glob("sub-*.html"))) == len(labels)


def test_working_folders_of_images_that_are_not_processed_are_kept(bench):
    """Another job may be using them."""
    bench.dataset(T1W, T2W)
    assert bench.run("--keep-workdir") == 0
    other = str(fake_bundle(bench.folder / "patchcore-T2w", "patchcore", "T2w"))
    assert bench.run(models=[bench.models[0], other]) == 0  # processes the T2w only
    names = {path.name for path in bench.work.glob("*_wf/sub_01_wf/*")}
    assert names == {"sub_01_T1w_preproc_wf", "sub_01_T1w_derivatives_wf"}


def test_failed_participants_keep_their_intermediate_files(bench):
    bench.dataset("sub-crash/anat/sub-crash_T1w.nii.gz", "sub-02/anat/sub-02_T1w.nii.gz")
    assert bench.run() == 1
    assert [path.name for path in bench.work.glob("*_wf/*")] == ["sub_crash_wf"]


@pytest.mark.slow
def test_another_precision_scores_again(bench):
    bench.dataset(T1W)
    assert bench.run("--precision", "fp32") == 0
    assert len(bench.take_calls()) == 2
    assert bench.run("--precision", "bf16") == 0
    assert [call.split()[0] for call in bench.take_calls()] == ["detect"]
    name = "sub-01_space-SRI24_label-anomaly_desc-T1wDisyre_mask.json"
    sidecar = json.loads((bench.out / "sub-01" / "anat" / name).read_text())
    assert sidecar["Precision"] == "bf16"


def test_sidecar_has_the_precision_of_the_detector_on_this_cpu(bench, finished, monkeypatch):
    name = "sub-01/anat/sub-01_space-SRI24_label-anomaly_desc-T1wDisyre_mask.json"
    assert json.loads((finished.out / name).read_text())["Precision"] == "fp32"
    monkeypatch.setattr(registry, "has_native_bf16", lambda: True)
    bench.dataset(T1W)
    assert bench.run() == 0
    assert json.loads((bench.out / name).read_text())["Precision"] == "bf16"


def test_new_model_only_adds_its_outputs(bench):
    bench.dataset(T1W)
    assert bench.run() == 0
    bench.take_calls()
    other = str(fake_bundle(bench.folder / "patchcore-T1w", "patchcore", "T1w"))
    assert bench.run(models=[other]) == 0
    assert bench.take_calls() == ["detect sub-01_T1w patchcore-T1w"]
    assert bench.run(models=[other, *bench.models]) == 0
    assert bench.take_calls() == []
    descriptions = pd.read_csv(bench.out / "descriptions.tsv", sep="\t")["desc_id"].tolist()
    assert {"desc-T1wDisyre", "desc-T1wPatchcore"} <= set(descriptions)


def test_quality_tables_name_what_an_image_depends_on_and_keep_changes_by_hand(bench):
    bench.dataset(T1W, "sub-01/anat/sub-01_T2w.nii.gz")
    assert bench.run(models=["none"]) == 0
    tables = {name: bench.out / f"sub-01/anat/sub-01_space-SRI24_desc-{name}Preproc_qc.tsv" for name in KINDS}
    rows = {name: pd.read_csv(path, sep="\t").iloc[0] for name, path in tables.items()}
    assert pd.isna(rows["T1w"]["depends_on"])
    assert rows["T2w"]["depends_on"] == "sub-01_T1w"
    assert rows["T1w"]["exclude_dependents"] == "no"
    changed = pd.read_csv(tables["T1w"], sep="\t", dtype=str, keep_default_na=False)
    changed.assign(exclude="yes", exclude_reasons="ghosts").to_csv(tables["T1w"], sep="\t", index=False)
    assert bench.run() == 0  # writes the table again, now with models
    row = pd.read_csv(tables["T1w"], sep="\t").iloc[0]
    assert (row["exclude"], row["exclude_reasons"], row["exclude_dependents"]) == ("yes", "ghosts", "no")
    write_image(bench.raw / T1W, shape=(22, 24, 24))  # another scan: the verdict was not about it
    assert bench.run() == 0
    assert pd.read_csv(tables["T1w"], sep="\t")["exclude"].tolist() == ["no"]


@pytest.mark.slow
def test_changed_inputs_and_options_are_processed_again(bench):
    bench.dataset(T1W)
    assert bench.run() == 0
    bench.take_calls()
    assert bench.run("--random-seed", "3") == 0
    # Preprocessing does not depend on the seed.
    assert bench.take_calls() == ["detect sub-01_T1w disyre-T1w"]
    write_image(bench.raw / T1W, shape=(22, 24, 24))
    assert bench.run("--random-seed", "3") == 0
    # The working folder of the participant is removed.
    assert bench.take_calls() == ["detect sub-01_T1w disyre-T1w", "preproc sub-01_T1w.nii.gz"]
    fake_bundle(Path(bench.models[0]), "disyre", "T1w", threshold=1.0)
    assert bench.run("--random-seed", "3") == 0
    assert bench.take_calls() == ["detect sub-01_T1w disyre-T1w"]
    table = pd.read_csv(bench.out / "sub-01/anat/sub-01_space-SRI24_desc-T1wDisyre_metrics.tsv", sep="\t")
    assert table["anomaly_volume_mm3"].tolist() == [8]


def test_one_failing_participant_does_not_stop_the_others(bench, capfd):
    names = ["01", "crash", "killed", "refused", "zz"]
    bench.dataset(
        *[f"sub-{name}/anat/sub-{name}_T1w.nii.gz" for name in names], "sub-crash/anat/sub-crash_T2w.nii.gz"
    )
    assert bench.run("--nprocs", "2") == 1
    stderr = " ".join(capfd.readouterr().err.split())
    assert "ZeroDivisionError: nothing to divide by" in stderr
    assert "was killed (SIGKILL), most likely because memory ran out" in stderr
    assert "no brain was found; give a brain mask" in stderr
    assert "sub-crash_T2w: not run" in stderr
    assert "Traceback" not in stderr
    done = {path.name.split("_")[0] for path in bench.out.rglob("*_metrics.tsv")}
    assert done == {"sub-01", "sub-zz"}
    assert len(list((bench.out / "sub-crash" / "log").rglob("crash*.txt"))) == 1
    bench.take_calls()
    assert bench.run("--participant-label", "01", "zz") == 0
    assert bench.take_calls() == []


def test_errors_are_reported_in_the_order_of_participants(bench, capfd):
    """An image that cannot be read is found before another one fails."""
    bench.dataset(*[f"sub-{name}/anat/sub-{name}_T1w.nii.gz" for name in ("crash", "damaged", "killed")])
    path = bench.raw / "sub-damaged/anat/sub-damaged_T1w.nii.gz"
    path.write_bytes(path.read_bytes()[:2000])
    assert bench.run("--nprocs", "3") == 1
    stderr = "".join(capfd.readouterr().err.split())
    errors = stderr[stderr.index("ERROR") :]
    places = [errors.index(f"sub-{name}") for name in ("crash", "damaged", "killed")]
    assert places == sorted(places)


def test_unusable_images_are_reported_and_the_others_processed(bench, capfd):
    bench.dataset(T1W, T2W, "sub-02/anat/sub-02_T1w.nii.gz", "sub-03/anat/sub-03_PDw.nii.gz")
    truncated = bench.raw / "sub-02/anat/sub-02_T1w.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[:2000])
    constant = nib.load(bench.raw / T1W)
    nib.save(nib.Nifti1Image(np.full(constant.shape, 7, np.float32), constant.affine), bench.raw / T1W)
    assert bench.run() == 1
    stderr = " ".join(capfd.readouterr().err.split()).replace(" ", "")
    assert "sub-02_T1w.nii.gz" in stderr
    assert "sub-01_T1w.nii.gz" in stderr
    assert "sub-03:nousableT1w,T2worFLAIRimage" in stderr
    # The T2w of a participant whose T1w is broken goes to the atlas directly.
    assert (bench.out / "sub-01/anat/sub-01_space-SRI24_desc-brain_mask.nii.gz").is_file()
    assert bench.take_calls() == ["detect sub-01_T2w disyre-T2w", "preproc sub-01_T2w.nii.gz"]


def test_run_without_usable_images_returns_no_input(bench, capsys):
    bench.dataset("sub-03/anat/sub-03_PDw.nii.gz")
    assert bench.run() == 66
    assert bench.run("--participant-label", "99") == 66
    assert "no participant 99; choose from 03" in capsys.readouterr().err


def test_dry_run_writes_nothing(bench, capsys):
    bench.dataset("sub-10/anat/sub-10_T1w.nii.gz", "sub-2/anat/sub-2_T1w.nii.gz", T1W, T2W)
    assert bench.run("--dry-run") == 0
    stderr = capsys.readouterr().err
    assert "to do" in stderr
    listed = re.findall(r"^│ (sub-\w+)", stderr, re.MULTILINE)
    assert listed == ["sub-01_T1w", "sub-01_T2w", "sub-2_T1w", "sub-10_T1w"]
    assert not bench.out.exists()
    assert bench.take_calls() == []


def test_preprocessing_alone(bench):
    bench.dataset(T1W)
    assert bench.run(models=["none"]) == 0
    assert bench.take_calls() == ["preproc sub-01_T1w.nii.gz"]
    assert not list(bench.out.rglob("*_metrics.tsv"))


@pytest.mark.slow
def test_unselected_anchor_is_preprocessed_but_not_scored(bench):
    bench.dataset(T1W, T2W)
    assert bench.run("--modalities", "T2w") == 0
    assert bench.take_calls() == [
        "detect sub-01_T2w disyre-T2w",
        "preproc sub-01_T1w.nii.gz",
        "preproc sub-01_T2w.nii.gz",
    ]


@pytest.mark.slow
def test_mask_in_sri24_space_is_used_without_a_transform(bench):
    bench.dataset(T1W)
    target = bench.folder / "lesions/sub-01/anat/sub-01_space-SRI24_label-lesion_mask.nii.gz"
    target.parent.mkdir(parents=True)
    truth = np.zeros(space.SHAPE, np.uint8)
    truth[110:112, 110:112, 70:72] = 1
    canonical = nib.as_closest_canonical(space.to_image(truth, np.uint8))
    nib.save(canonical, target)
    assert bench.run("-d", f"lesions={bench.folder / 'lesions'}") == 0
    written = nib.load(bench.out / "sub-01/anat/sub-01_space-SRI24_label-lesion_desc-manual_mask.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), truth)
    row = pd.read_csv(bench.out / "sub-01/anat/sub-01_space-SRI24_desc-T1wDisyre_metrics.tsv", sep="\t").iloc[
        0
    ]
    assert row["lesion_volume_mm3"] == 8


def test_changed_minimum_lesion_volume_recounts_lesions(bench):
    bench.dataset(T1W)
    truth = np.zeros(space.SHAPE, np.uint8)
    truth[110:112, 110:112, 70:72] = 1
    path = bench.folder / "lesions/sub-01/anat/sub-01_space-SRI24_label-lesion_mask.nii.gz"
    path.parent.mkdir(parents=True)
    nib.save(space.to_image(truth, np.uint8), path)
    metrics = bench.out / "sub-01/anat/sub-01_space-SRI24_desc-T1wDisyre_metrics.tsv"
    written = []
    for option, least, n_lesions in (((), 3, 1), (("50",), 50, 0), (("50",), 50, 0), (("0",), 0, 1)):
        options = ["--min-counted-volume", *option] if option else []
        assert bench.run("-d", f"lesions={bench.folder / 'lesions'}", *options) == 0
        row = pd.read_csv(metrics, sep="\t").iloc[0]
        assert (row["min_lesion_volume_mm3"], row["n_lesions"]) == (least, n_lesions)
        assert row["lesion_volume_mm3"] == 8
        assert len(pd.read_csv(metrics.with_name(metrics.name.replace("metrics", "lesions")), sep="\t")) == 1
        assert json.loads(metrics.with_suffix(".json").read_text())["MinLesionVolume"] == least
        written.append(metrics.stat().st_mtime_ns)
    assert written[0] != written[1] == written[2] != written[3]  # the third run had nothing to do
    sidecar = json.loads(metrics.with_suffix(".json").read_text())
    assert (sidecar["MinComponentVolume"], "LowThreshold" in sidecar) == (0, False)
    assert sidecar["MinComponentVolumeSource"].startswith("decision rule of the model")
    volumes = pd.read_csv(component_table := next(metrics.parent.glob("*_dseg.tsv")), sep="\t")["volume_mm3"]
    least = volumes.max()
    assert (volumes < least).any()
    assert bench.run("--min-lesion-size", f"{least:g}") == 0
    kept = pd.read_csv(component_table, sep="\t")["volume_mm3"]
    assert kept.tolist() == volumes[volumes >= least].tolist()
    assert pd.read_csv(metrics, sep="\t")["min_component_volume_mm3"].tolist() == [least]
    sidecar = json.loads(metrics.with_suffix(".json").read_text())
    assert (sidecar["MinComponentVolume"], sidecar["MinComponentVolumeSource"]) == (
        least,
        "--min-lesion-size",
    )
    rule = find_images(bench.out, "01")[0].detections[0].rule
    words = f"and at least {least:g} mm\N{SUPERSCRIPT THREE} (--min-lesion-size)"
    assert describe_rule(rule).endswith(words)
    assert words in (bench.out / "logs/CITATION.md").read_text()


def test_graph_resources_and_methods_text_as_with_fmriprep(bench, monkeypatch):
    """The graph is drawn by Graphviz, and the text converted by pandoc, only where they are installed."""
    bench.dataset(T1W)
    asked = []
    monkeypatch.setattr(shutil, "which", lambda name, **_: asked.append(name))
    options = ["--md-only-boilerplate", "--low-mem", "--skip-bids-validation", "--output-layout", "bids"]
    assert bench.run("--write-graph", "--resource-monitor", *options) == 0
    assert ("dot" in asked, "pandoc" in asked) == (True, False)
    (graph,) = bench.out.glob("sub-01/log/*/graph.dot")
    assert {"digraph", "sub_01_T1w_preproc_wf", "detect_disyre"} <= set(re.findall(r"\w+", graph.read_text()))
    assert (bench.out / "logs/CITATION.md").is_file()
    (usage,) = bench.out.glob("logs/*_resources.jsonl")
    steps = {step["name"]: step for step in map(json.loads, usage.read_text().splitlines())}
    assert steps["detect_disyre"]["duration"] > 0
    assert not [*Path.cwd().glob(".proc-*"), *(bench.folder / "work").glob(".proc-*")]
    assert 0.01 < steps["detect_disyre"]["runtime_memory_gb"] < 50
    assert "low_mem = true" in next(bench.out.glob("logs/*.toml")).read_text()


@pytest.mark.slow
def test_mask_on_the_t2w_grid_is_used_for_the_t1w_image(bench):
    bench.dataset(T1W, T2W)
    image = nib.load(bench.raw / T2W)
    moved = image.affine.copy()
    moved[0, 3] += 3
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), moved), bench.raw / T2W)
    write_mask(bench.folder / "lesions/sub-01/anat/sub-01_label-lesion_mask.nii.gz", moved)
    assert bench.run("-d", f"lesions={bench.folder / 'lesions'}") == 0
    for modality in ("T1w", "T2w"):
        path = bench.out / f"sub-01/anat/sub-01_space-SRI24_desc-{modality}Disyre_metrics.tsv"
        assert pd.read_csv(path, sep="\t")["lesion_volume_mm3"].tolist() == [125]


@pytest.mark.slow
def test_masks_of_runs_are_kept_apart(bench):
    """Each run has its own mask; that of the whole session serves the T2w, which has no run."""
    runs = [f"sub-01/anat/sub-01_run-{run}_T1w.nii.gz" for run in (1, 2, 3)]
    bench.dataset(*runs, T2W)
    masks = bench.folder / "lesions/sub-01/anat"
    for entity in ("_run-1", "_run-2", ""):
        write_mask(masks / f"sub-01{entity}_label-lesion_mask.nii.gz")
    assert bench.run("-d", f"lesions={bench.folder / 'lesions'}") == 0
    anat = bench.out / "sub-01/anat"
    written = sorted(path.name for path in anat.glob("*_label-lesion_desc-manual_mask.nii.gz"))
    name = "_space-SRI24_label-lesion_desc-manual_mask.nii.gz"
    assert written == [f"sub-01_run-1{name}", f"sub-01_run-2{name}", f"sub-01{name}"]
    for image, mask in (
        ("_run-1_T1w", "_run-1"),
        ("_run-2_T1w", "_run-2"),
        ("_run-3_T1w", ""),
        ("_T2w", ""),
    ):
        entities, modality = image.rsplit("_", 1)
        metrics = anat / f"sub-01{entities}_space-SRI24_desc-{modality}Disyre_metrics.json"
        sources = json.loads(metrics.read_text())["Sources"]
        assert f"bids::sub-01/anat/sub-01{mask}{name}" in sources, image
        assert written_mask(metrics).name == f"sub-01{mask}{name}"
    sidecar = json.loads((anat / f"sub-01{name}".replace(".nii.gz", ".json")).read_text())
    assert sidecar["Sources"] == ["bids:lesions:sub-01/anat/sub-01_label-lesion_mask.nii.gz"]


def test_masks_with_other_names_are_reported(bench, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    bench.dataset(T1W)
    write_mask(bench.folder / "lesions/sub-01/anat/sub-01_label-L_desc-T1lesion_mask.nii.gz")
    assert bench.run("-d", f"lesions={bench.folder / 'lesions'}", "--dry-run") == 0
    assert "lesions: no usable lesion mask for any of the images; names must end" in capfd.readouterr().err


def test_masks_of_controls_and_empty_masks_are_reported(bench, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    groups = {"zero": "patient", "masked": "control", "plain": "control"}
    bench.dataset(*(f"sub-{label}/anat/sub-{label}_T1w.nii.gz" for label in groups))
    rows = [f"sub-{label}\t{group}\n" for label, group in groups.items()]
    (bench.raw / "participants.tsv").write_text("participant_id\tgroup\n" + "".join(rows))
    truth = np.zeros(space.SHAPE, np.uint8)
    for label in groups:
        truth[110:112, 110:112, 70:72] = label == "masked"
        path = bench.folder / f"lesions/sub-{label}/anat/sub-{label}_space-SRI24_label-lesion_mask.nii.gz"
        path.parent.mkdir(parents=True)
        nib.save(space.to_image(truth, np.uint8), path)
    assert bench.run("-d", f"lesions={bench.folder / 'lesions'}", "--modalities", "T1w") == 0
    stderr = capfd.readouterr().err
    assert "Empty lesion mask: sub-zero; Dice is 1 if no anomaly is detected" in stderr
    assert "with a lesion in the lesion mask: sub-masked; they are evaluated as controls" in stderr
    table = {
        label: next(line for line in stderr.splitlines() if f"sub-{label}_T1w" in line and "done" in line)
        for label in groups
    }
    assert "Disyre 0.3 (empty mask)" in table["zero"]
    assert "(" not in table["masked"] + table["plain"]
    people = read_participants(bench.raw)
    evaluation = evaluate(bench.out, find_metrics_tables(bench.out), people, seed=0)
    row = evaluation.benchmark.iloc[0]
    names = ("n_lesion_scans", "n_empty_mask", "n_both_empty", "n_healthy_scans", "n_missing_mask")
    assert [row[name] for name in names] == [1, 1, 0, 2, 0]
    assert row["dice_mean"] == 0
    assert not evaluation.unreadable
    assert any(
        "Lesion mask without a voxel inside the brain: sub-zero" in line for line in evaluation.warnings
    )
    assert any("with a lesion in the lesion mask: sub-masked" in line for line in evaluation.warnings)


def test_foreign_output_folder_is_refused(bench, capsys):
    bench.dataset(T1W)
    write_dataset(bench.out, {})
    assert bench.run() == 2
    assert "already holds another dataset" in capsys.readouterr().err


@pytest.mark.slow
def test_another_reference_image_is_refused(bench, capsys):
    bench.dataset(T1W)
    assert bench.run(models=["none"]) == 0
    path = bench.out / "tpl-SRI24/anat/tpl-SRI24_desc-brain_T1w.json"
    path.write_text(path.read_text().replace("0" * 64, "1" * 64))
    assert bench.run(models=["none"]) == 2
    assert "another reference image" in capsys.readouterr().err


def test_unknown_model_is_refused_before_anything_is_done(bench, capsys):
    bench.dataset(T1W)
    assert bench.run(models=["nosuchmodel"]) == 69
    assert "nosuchmodel" in capsys.readouterr().err
    assert not bench.out.exists()


def test_workflow_that_cannot_be_built_fails_only_its_participant(bench, monkeypatch, capsys):
    bench.dataset(T1W, "sub-02/anat/sub-02_T1w.nii.gz")

    def broken(name, **options):
        if "sub_01" in name:
            raise KeyError("no such field")
        return init_fake_preproc_wf(name=name, **options)

    monkeypatch.setattr(workflow, "init_preproc_wf", broken)
    assert bench.run() == 1
    assert "could not be built: KeyError: 'no such field'" in " ".join(capsys.readouterr().err.split())
    assert (bench.out / "sub-02/log/sub-02_T1w.json").is_file()


def test_failed_report_returns_exit_code_1(bench, monkeypatch, capsys):
    bench.dataset(T1W)
    monkeypatch.setattr(summary, "write_report", refuse_page)
    assert bench.run() == 1
    assert "report not written" in " ".join(capsys.readouterr().err.split())


def test_participants_of_the_training_data_are_reported(bench, capsys):
    bench.dataset(T1W, T2W, "sub-02/anat/sub-02_T1w.nii.gz")
    bundle = Path(bench.models[0])
    info = json.loads((bundle / "bundle.json").read_text())
    info["training"] = {
        "subjects": [image_hash(file_sha256(bench.raw / T1W))],
        "source": "Others; Phantoms",
        "n_scans": 1,
        "n_subjects": 1,
        "anatomies": None,
        "scanners": ["A"],
    }
    (bundle / "bundle.json").write_text(json.dumps(info))
    (bench.raw / "participants.tsv").write_text("participant_id\tscanner\nsub-01\tA\nsub-02\tB\n")
    assert bench.run() == 0
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("disyre-T1w: sub-01 seen in training") == 2  # before and after
    assert "sub-02 in" not in said
    assert "disyre-T2w: sub" not in said
    tables = list(bench.out.rglob("*_metrics.tsv"))
    names = [f"{path.name.split('_')[0]} {path.name.split('desc-')[1][:3]}" for path in tables]
    rows = {name: pd.read_csv(path, sep="\t").iloc[0] for name, path in zip(names, tables, strict=True)}
    seen = {name: row["scanner_seen"] for name, row in rows.items()}
    assert pd.isna(seen.pop("sub-01 T2w"))  # that model does not say where it has learnt
    assert seen == {"sub-01 T1w": "seen", "sub-02 T1w": "unseen"}
    met = {name: row["seen_in_training"] for name, row in rows.items()}
    assert met == {"sub-01 T1w": "training", "sub-01 T2w": "no", "sub-02 T1w": "no"}
    assert main([str(bench.raw), str(bench.out), "group"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "training data of the model of disyre for T1w include sub-01" in said


def test_preprocessed_images_of_another_pipeline_are_used(bench):
    bench.dataset(T1W, T2W)
    earlier = bench.folder / "fmriprep"
    image = write_image(earlier / "sub-01/anat/sub-01_desc-preproc_T1w.nii.gz")
    mask = write_mask(earlier / "sub-01/anat/sub-01_desc-brain_mask.nii.gz")
    description = {"Name": "fMRIPrep", "BIDSVersion": "1.9.0", "DatasetType": "derivative"}
    (earlier / "dataset_description.json").write_text(json.dumps(description))
    chained = ("-d", f"fmriprep={earlier}")
    assert bench.run(*chained) == 0
    assert [call for call in bench.take_calls() if call.startswith("preproc")] == [
        "preproc sub-01_T2w.nii.gz",
        f"preproc {image.name}",
    ]
    sidecar = json.loads((bench.out / "sub-01/anat/sub-01_space-SRI24_desc-preproc_T1w.json").read_text())
    assert sidecar["Sources"] == [
        f"bids:raw:{T1W}",
        "bids:fmriprep:sub-01/anat/sub-01_desc-preproc_T1w.nii.gz",
        "bids:fmriprep:sub-01/anat/sub-01_desc-brain_mask.nii.gz",
    ]
    assert bench.run(*chained) == 0
    assert bench.take_calls() == []

    write_mask(mask, shape=(22, 24, 24))
    assert bench.run(*chained) == 66  # the mask fits no grid any more
    mask.unlink()
    assert bench.run(*chained) == 0
    assert len(bench.take_calls()) == 4
