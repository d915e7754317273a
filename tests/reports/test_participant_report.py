"""Participant report of a phantom: complete, repeatable, and robust to missing derivatives."""

from __future__ import annotations

import json
import re
import shutil
from functools import lru_cache
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest

from bids_uad import space
from bids_uad.dataset.participants import Participants
from bids_uad.files import write_json, write_tsv
from bids_uad.reports.derivatives import find_images
from bids_uad.reports.participant import write_subject_report
from bids_uad.reports.participant_findings import component_rows

TAU = 0.5
P = "sub-01_space-SRI24"
RUN = {"run_id": "r1", "command": "bids_uad <a> b"}
METHODS = "Corrected with N4 [@n4].\n"


def save(path, data, dtype):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = space.to_image(data, dtype)
    image.to_filename(path)


@lru_cache(maxsize=8)
def ellipsoid(centre, radii):
    axes = np.ogrid[tuple(slice(0, n) for n in space.SHAPE)]
    return sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, radii, strict=True)) < 1


def write_template(out):
    brain = ellipsoid((119, 134, 77), (60, 80, 60))
    folder = out / "tpl-SRI24" / "anat"
    save(folder / "tpl-SRI24_desc-brain_T1w.nii.gz", brain * 700, np.int16)
    save(folder / "tpl-SRI24_desc-brain_mask.nii.gz", brain, np.uint8)
    write_json(
        folder / "tpl-SRI24_desc-brain_T1w.json",
        {
            "ReferenceName": "Phantom atlas",
            "ReferenceSource": "made here",
            "License": "CC0",
            "ReferenceSHA256": "ab12",
        },
    )


def write_derivatives(out, start, modality="T1w", detector="Patchcore", with_lesion=True, empty=False):
    """Write the derivatives of one scan; `start` ends with the space entity."""
    folder, name = start.parent, start.name
    brain = ellipsoid((119, 134, 77), (58, 78, 58))
    lesion = ellipsoid((150, 120, 80), (9, 9, 9)) & (not empty)
    scores = np.where(brain, 0.1, 0).astype(np.float32)
    found = ellipsoid((150, 122, 80), (9, 9, 9))
    scores[found] = 0.9
    far = ellipsoid((90, 150, 60), (4, 4, 4))
    scores[far] = 0.7
    md = f"{modality}{detector}"
    save(folder / f"{name}_desc-preproc_{modality}.nii.gz", np.where(brain, 0.6, 0), np.float32)
    brain_desc = "brain" if modality == "T1w" else f"{modality}Brain"
    save(folder / f"{name}_desc-{brain_desc}_mask.nii.gz", brain, np.uint8)
    save(folder / f"{name}_desc-{md}_anomalymap.nii.gz", scores, np.float32)
    save(folder / f"{name}_label-anomaly_desc-{md}_mask.nii.gz", scores > TAU, np.uint8)
    write_json(
        folder / f"{name}_label-anomaly_desc-{md}_mask.json", {"Threshold": TAU, "Device": "cuda:0 (test)"}
    )
    save(folder / f"{name}_seg-{md}_dseg.nii.gz", found * 1 + far * 2, np.int16)
    rows = [
        (1, "anomaly-1", found.sum(), 0.9, 0.9, -150, 117, 80),
        (2, "anomaly-2", far.sum(), 0.7, 0.7, -90, 89, 60),
    ]
    columns = [
        "index",
        "name",
        "volume_mm3",
        "peak_score",
        "mean_score",
        "centroid_x",
        "centroid_y",
        "centroid_z",
    ]
    write_tsv(folder / f"{name}_seg-{md}_dseg.tsv", pd.DataFrame(rows, columns=columns))
    edges = np.append(np.linspace(0, 1, 101), np.inf)
    lesion_counts = np.histogram(scores[brain & lesion], edges)[0] if with_lesion else np.nan
    others = brain & ~lesion if with_lesion else brain
    histogram = {
        "score_lower": edges[:-1],
        "score_upper": [*edges[1:-1], "inf"],
        "n_nonlesion": np.histogram(scores[others], edges)[0],
        "n_lesion": lesion_counts,
    }
    write_tsv(folder / f"{name}_desc-{md}_histogram.tsv", pd.DataFrame(histogram))
    metrics = {
        "source_image": f"bids:raw:sub-01/anat/sub-01_{modality}.nii.gz",
        "modality": modality,
        "detector": detector.lower(),
        "preset": "lite",
        "model_sha256": "0123abcd",
        "app_version": "0.1.0",
        "threshold": TAU,
        "threshold_name": "max_dice",
        "seen_in_training": "no",
        "brain_volume_mm3": int(brain.sum()),
        "anomaly_volume_mm3": int((scores > TAU).sum()),
        "lesion_volume_mm3": int(lesion.sum()) if with_lesion else np.nan,
        "n_components": 2,
        "min_lesion_volume_mm3": 3.0,
        "n_lesions": int(not empty) if with_lesion else np.nan,
        "n_lesions_detected": int(not empty) if with_lesion else np.nan,
        "n_false_components": 1 + empty if with_lesion else np.nan,
    }
    write_tsv(folder / f"{name}_desc-{md}_metrics.tsv", pd.DataFrame([metrics]))
    if with_lesion:
        save(folder / f"{name}_label-lesion_desc-manual_mask.nii.gz", lesion, np.uint8)
    return 2 * (lesion & (scores > TAU)).sum() / (lesion.sum() + (scores > TAU).sum())


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    """Derivatives of one scan with one detector and ground truth, and their report."""
    out = tmp_path_factory.mktemp("out")
    write_template(out)
    dice = write_derivatives(out, out / "sub-01" / "anat" / P)
    page = write_subject_report(out, "01", run_info=RUN, methods=METHODS, viewer=True)
    return out, page, dice


def headings(html):
    return re.findall(r"<h[234]>(.*?)</h[234]>", html)


def test_page_has_all_sections_in_order(phantom):
    out, page, _ = phantom
    assert page == out / "sub-01.html"
    found = headings(page.read_text())
    expected = ["Summary", "Errors", "T1w", "Registration to SRI24", "Brain mask", "PatchCore", "Anomaly map"]
    expected += ["Scores in the brain", "Components", "Methods", "References", "About"]
    assert found == expected


def test_figures_and_viewer_exist_and_the_page_can_be_moved(phantom):
    out, page, _ = phantom
    figures = out / "sub-01" / "figures"
    names = {path.name for path in figures.iterdir()}
    assert names == {
        f"{P}_desc-registration_T1w.svg",
        f"{P}_desc-brain_T1w.svg",
        f"{P}_desc-T1wPatchcore_anomalymap.svg",
        f"{P}_desc-T1wPatchcore_histogram.svg",
        f"{P}_desc-T1wPatchcore_viewer.html",
    }
    html = page.read_text()
    shown = re.findall(r' (?:data|src)="data:image/svg\+xml,([^"]+)"', html)
    drawn = {path.name: path.read_text() for path in figures.glob("*.svg")}
    assert sorted(map(unquote, shown)) == sorted(drawn.values())
    assert not re.search(r' (?:data|src)="(?!data:)', html)
    for name in names:
        assert f'href="./sub-01/figures/{name}"' in html
        assert (figures / name).stat().st_size < (8_000_000 if name.endswith("html") else 1_000_000)


def test_page_needs_no_network(phantom):
    for path in (phantom[1], *phantom[0].glob("sub-01/figures/*_viewer.html")):
        html = path.read_text()
        assert not re.search(r'(?:src|data)="(?:https?:)?//', html)
        assert "<link " not in html
        assert "@import" not in html


def test_page_contains_the_numbers(phantom):
    _, page, dice = phantom
    html = page.read_text()
    assert "not for clinical use" in html.lower()
    assert f"<b>{dice:.3f}</b><span>Dice with the ground truth" in html
    assert "best Dice on validation lesions" in html
    assert "<b>1 of 1</b><span>lesions of at least 3 mm³ found" in html
    assert "cuda:0 (test)" in html
    assert "Phantom atlas (made here)" in html
    assert "bids:raw:sub-01/anat/sub-01_T1w.nii.gz" in html
    assert "bids_uad &lt;a&gt; b" in html
    assert "sha256 0123abcd" in html
    assert '<a href="#ref-n4">1</a>' in html
    table = html[html.index("Components</h4>") :]
    first, second = table.index("touches a lesion"), table.index("false positive")
    assert first < second
    assert table.index(">left<") < table.index(">right<")


def test_internal_links_have_targets(phantom):
    html = phantom[1].read_text()
    ids = set(re.findall(r' id="([^"]+)"', html))
    assert set(re.findall(r'href="#([^"]+)"', html)) <= ids


def test_writing_again_changes_nothing(phantom):
    out, page, _ = phantom
    files = [page, *sorted((out / "sub-01" / "figures").iterdir())]
    before = [path.read_bytes() for path in files]
    stale = out / "sub-01" / "figures" / f"{P}_desc-T1wGone_anomalymap.svg"
    stale.write_text("<svg/>")

    write_subject_report(str(out), "sub-01", errors=[], run_info=RUN, methods=METHODS, viewer=True)

    assert [path.read_bytes() for path in files] == before
    assert not stale.exists()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.fixture
def bare(phantom, tmp_path):
    """A copy of the phantom that a test may change."""
    out = tmp_path / "out"
    shutil.copytree(phantom[0], out)
    return out


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        ("tpl-SRI24", ["Registration to SRI24"]),
        (f"sub-01/anat/{P}_desc-preproc_T1w.nii.gz", ["Registration to SRI24", "Brain mask", "Anomaly map"]),
        (f"sub-01/anat/{P}_desc-T1wPatchcore_anomalymap.nii.gz", ["Anomaly map"]),
        (f"sub-01/anat/{P}_desc-T1wPatchcore_histogram.tsv", ["Scores in the brain"]),
        (f"sub-01/anat/{P}_seg-T1wPatchcore_dseg.tsv", ["Components"]),
        (f"sub-01/anat/{P}_desc-brain_mask.nii.gz", []),
        (f"sub-01/anat/{P}_seg-T1wPatchcore_dseg.nii.gz", []),
        (f"sub-01/anat/{P}_desc-T1wPatchcore_metrics.tsv", []),
        (f"sub-01/anat/{P}_label-anomaly_desc-T1wPatchcore_mask.nii.gz", []),
    ],
)
def test_missing_derivatives_are_skipped(bare, phantom, missing, gone):
    path = bare / missing
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    html = write_subject_report(bare, "01", methods=METHODS).read_text()
    assert headings(html) == [name for name in headings(phantom[1].read_text()) if name not in gone]


def test_page_without_methods_text_and_viewer(bare):
    html = write_subject_report(bare, "01").read_text()
    assert not list(bare.rglob("*_viewer.html"))
    assert "Interactive viewer" not in html
    assert "References" not in headings(html)
    assert "No image of this participant was processed." in html


def test_threshold_comes_from_the_sidecar_without_metrics(bare):
    (bare / f"sub-01/anat/{P}_desc-T1wPatchcore_metrics.tsv").unlink()
    html = write_subject_report(bare, "01").read_text()
    assert "<b>0.5</b><span>fixed threshold" in html
    assert "source not recorded" in html


def test_training_data_of_a_model_are_reported(bare):
    assert "not an independent test" not in write_subject_report(bare, "01").read_text()
    (path,) = bare.rglob("*_metrics.tsv")
    path.write_text(path.read_text().replace("\tno\t", "\ttraining\t"))
    html = write_subject_report(bare, "01").read_text()
    assert "This participant was in the training data of PatchCore" in html


def test_marked_fraction_far_above_that_of_healthy_scans_is_shown_in_summary_and_section(bare):
    (path,) = bare.rglob("*_metrics.tsv")
    table = pd.read_csv(path, sep="\t", na_values="n/a")
    warning = "but in healthy validation scans 0.1 % or less in 95 % of them: either the lesion is large"
    for p95, expected in ((0.5, 0), (0.001, 3)):
        write_tsv(path, table.assign(healthy_p95=p95, anomaly_volume_mm3=0.1 * table["brain_volume_mm3"]))
        html = write_subject_report(bare, "01").read_text()
        assert html.count(f"PatchCore marks 10 % of the brain, {warning}") == expected


def test_quality_warnings_are_shown(bare):
    warning = "Only 70 % of the brain mask lies on the SRI24 grid & in view."
    sidecar = bare / f"sub-01/anat/{P}_desc-preproc_T1w.json"
    write_json(sidecar, {"PreprocessingQuality": {"warnings": [warning]}})
    assert f"<td>{warning.replace('&', '&amp;')}</td>" in write_subject_report(bare, "01").read_text()


def test_excluded_scan_is_shown_with_its_quality(bare):
    quality = {
        "warnings": ["Turned."],
        "failures": ["Turned."],
        "cnr": 2.3,
        "brain_volume_mm3": 1_234_567.0,
    }
    write_json(bare / f"sub-01/anat/{P}_desc-preproc_T1w.json", {"PreprocessingQuality": quality})
    table = bare / f"sub-01/anat/{P}_desc-T1wPreproc_qc.tsv"
    table.write_text("exclude\texclude_reasons\nyes\tTurned.\n")
    page = write_subject_report(bare, "01").read_text()
    assert '<span class="status bad">excluded</span>' in page
    assert "Excluded from the group level:" not in page  # the warning gives the reason
    table.write_text("exclude\texclude_reasons\nyes\tghosts\n")
    assert "Turned. Excluded from the group level: ghosts" in write_subject_report(bare, "01").read_text()
    table.write_text("exclude\texclude_reasons\nno\tn/a\n")
    page = write_subject_report(bare, "01").read_text()
    assert '<span class="status">processed</span>' in page
    assert '<td class="n">2.30</td>' in page
    assert '<td class="n">1,235</td>' in page


def test_components_have_the_regions_of_the_parcellations(tmp_path):
    table = pd.DataFrame(
        {
            **{name: [1.0, 2.0] for name in ("volume_mm3", "peak_score", "mean_score")},
            **{f"centroid_{axis}": [0.0, 0.0] for axis in "xyz"},
            **dict(zip(("mni_x", "mni_y", "mni_z"), ([-12.4, 3.0], [0.2, 4.0], [30.6, 5.0]), strict=True)),
            "index": [1, 2],
            "region": ["left insula", None],
            "location_class": ["juxtacortical/cortical", None],
            "lpba40": ["left insular cortex", None],
            "tzo116plus": ["Insula_L", "Insula_R"],
        }
    )
    rows = component_rows(table, None, None)
    assert [row["regions"] for row in rows] == ["Insula_R", "left insula, left insular cortex, Insula_L"]
    assert [row["mni"] for row in rows] == ["3, 4, 5", "\N{MINUS SIGN}12, 0, 31"]
    assert [row["class"] for row in rows] == ["", "juxtacortical/cortical"]
    without = table.drop(columns=["mni_x", "mni_y", "mni_z", "location_class"])
    assert [row["mni"] for row in component_rows(without, None, None)] == ["", ""]


def test_report_of_a_subject_whose_images_all_failed(tmp_path):
    crash = tmp_path / "sub-02" / "log" / "20260101-000000_a" / "crash-1-node.txt"
    crash.parent.mkdir(parents=True)
    crash.write_text("Node: x\n<traceback>\n")
    images = [{"image": "sub-02_T1w", "status": "unusable", "message": "truncated"}]

    page = write_subject_report(
        tmp_path, "02", errors=["sub-02_T1w: bad <gzip>"], run_info={"images": images}
    )

    html = page.read_text()
    assert headings(html) == ["Summary", "Errors", "Methods", "About"]
    assert "1 problem." in html
    assert "sub-02_T1w: bad &lt;gzip&gt;" in html
    assert "&lt;traceback&gt;" in html
    assert "unusable" in html
    assert "truncated" in html


def test_crash_files_of_earlier_runs_are_not_shown(tmp_path):
    for run in ("20260101-000000_a", "20260102-000000_b"):
        (tmp_path / "sub-02" / "log" / run).mkdir(parents=True)
    (tmp_path / "sub-02" / "log" / "20260101-000000_a" / "crash-1.txt").write_text("old")
    html = write_subject_report(tmp_path, "02", run_info={"run_id": "20260102-000000_b"}).read_text()
    assert "crash-1.txt" not in html
    assert "No errors." in html
    html = write_subject_report(tmp_path, "02", run_info={"run_id": "20260101-000000_a"}).read_text()
    assert "crash-1.txt" in html


def test_sessions_and_runs_are_kept_apart(tmp_path):
    # A parent folder that looks like an entity must not be read as one.
    out = tmp_path / "ses-99" / "run-7" / "out"
    names = [("ses-1", "ses-1_run-1"), ("ses-1", "ses-1_run-2"), ("ses-2", "ses-2")]
    for folder, entities in names:
        start = out / "sub-01" / folder / "anat" / f"sub-01_{entities}_space-SRI24"
        write_derivatives(out, start, modality="T2w", with_lesion=False)

    whole = write_subject_report(out, "01").read_text()

    pages = {session: (out / f"sub-01_{session}.html").read_text() for session in ("ses-1", "ses-2")}
    sections = ["T2w, session 1, run 1", "T2w, session 1, run 2", "T2w, session 2"]
    assert [name for html in pages.values() for name in headings(html) if name in sections] == sections
    assert not set(headings(whole)) & set(sections)
    for folder, entities in names:
        html = pages[folder]
        figure = f"sub-01/figures/sub-01_{entities}_space-SRI24_desc-T2wPatchcore_anomalymap.svg"
        assert html.count(f'href="./{figure}"') == 1
        assert (out / figure).is_file()
        assert "Dice with the ground truth" not in html
        assert "mm³ found" not in html


def test_echoes_and_parts_are_kept_apart(tmp_path):
    names = ["", "_echo-1", "_echo-2", "_part-mag", "_rec-UNIT1"]
    for entities in names:
        start = tmp_path / "sub-01/anat" / f"sub-01{entities}_space-SRI24"
        write_derivatives(tmp_path, start, with_lesion=False)
    html = write_subject_report(tmp_path, "01").read_text()
    for entities in names:
        figure = f"sub-01/figures/sub-01{entities}_space-SRI24_desc-T1wPatchcore_anomalymap.svg"
        assert html.count(f'href="./{figure}"') == 1
    assert len(re.findall('href="[^"]*_desc-T1wPatchcore_anomalymap.svg"', html)) == len(names)


CONTROL = Participants({"sub-01": {None: {"group": "control"}}})


def test_controls_are_those_of_a_session(tmp_path):
    for session in ("1", "2"):
        start = tmp_path / "sub-01" / f"ses-{session}" / "anat" / f"sub-01_ses-{session}_space-SRI24"
        write_derivatives(tmp_path, start)
    people = Participants({"sub-01": {None: {}, "ses-1": {"group": "HC"}, "ses-2": {"group": "stroke"}}})
    whole = write_subject_report(tmp_path, "01", participants=people).read_text()
    assert whole.count("healthy control; its lesion mask is not used") == 1
    control, patient = ((tmp_path / f"sub-01_ses-{session}.html").read_text() for session in ("1", "2"))
    assert "Dice with the ground truth" not in control
    assert patient.count("Dice with the ground truth") == 1


@pytest.mark.parametrize("empty", [False, True])
def test_controls_are_not_compared_with_a_mask(tmp_path, empty):
    write_derivatives(tmp_path, tmp_path / "sub-01" / "anat" / P, empty=empty)
    html = write_subject_report(tmp_path, "01", participants=CONTROL).read_text()
    assert "healthy control; its lesion mask is not used" in html
    for words in (
        "Dice with",
        "Dice</th>",
        "lesions of at least 3 mm³ found",
        "false-positive components of at least 3 mm³",
        "touches a lesion",
        "voxel-wise",
    ):
        assert words not in html
    (histogram,) = (tmp_path / "sub-01" / "figures").glob("*_histogram.svg")
    assert "ground truth" not in histogram.read_text()


def test_empty_mask_of_a_patient_is_reported(tmp_path):
    write_derivatives(tmp_path, tmp_path / "sub-01" / "anat" / P, empty=True)
    html = write_subject_report(tmp_path, "01").read_text()
    assert "<td>lesion mask without a voxel in the brain</td>" in html
    assert "<b>0.000</b><span>Dice: no lesion voxel in the brain, so it is 1 without findings, else 0" in html
    assert ">0.000 (empty mask)</td>" in html
    assert "<b>2</b><span>false-positive components of at least 3 mm³" in html
    for words in ("mm³ found", "voxel-wise"):
        assert words not in html


def test_find_images_assigns_masks_by_run(tmp_path):
    folder = tmp_path / "sub-01" / "anat"
    folder.mkdir(parents=True)
    for run in (1, 2, 3):
        (folder / f"sub-01_run-{run}_space-SRI24_desc-preproc_T1w.nii.gz").touch()
    masks = [f"sub-01_run-{run}_space-SRI24_label-lesion_desc-manual_mask.nii.gz" for run in (1, 2)]
    for name in masks:
        (folder / name).touch()
    found = [image.lesion and image.lesion.name for image in find_images(tmp_path, "01")]
    assert found == [*masks, None]


def test_one_mask_serves_all_scans_of_a_session(tmp_path):
    folder = tmp_path / "sub-01" / "anat"
    folder.mkdir(parents=True)
    names = ["desc-preproc_T1w", "desc-preproc_T2w", "desc-brain_mask", "desc-T2wBrain_mask"]
    names += ["label-lesion_desc-manual_mask", "desc-T1wFae_anomalymap", "desc-T2wFae_anomalymap"]
    for name in names:
        (folder / f"{P}_{name}.nii.gz").touch()
    (folder / "sub-01_acq-lo_space-SRI24_desc-preproc_T2w.nii.gz").touch()

    images = {(image.prefix, image.modality): image for image in find_images(tmp_path, "01")}

    assert set(images) == {("sub-01", "T1w"), ("sub-01", "T2w"), ("sub-01_acq-lo", "T2w")}
    assert images["sub-01", "T1w"].brain.name == f"{P}_desc-brain_mask.nii.gz"
    assert images["sub-01", "T2w"].brain.name == f"{P}_desc-T2wBrain_mask.nii.gz"
    assert {image.lesion.name for image in images.values()} == {f"{P}_label-lesion_desc-manual_mask.nii.gz"}
    assert [detection.desc for detection in images["sub-01", "T2w"].detections] == ["T2wFae"]
    assert images["sub-01_acq-lo", "T2w"].brain is None
    assert json.dumps(images["sub-01_acq-lo", "T2w"].name) == '"T2w, acquisition lo"'
