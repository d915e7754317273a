"""Group report: the page, its links, and its figures as files."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from bids_uad.dataset.participants import read_participants
from bids_uad.evaluation.analyses import analyse
from bids_uad.evaluation.benchmark import evaluate
from bids_uad.evaluation.provenance import read_model_provenance
from bids_uad.evaluation.subjects import add_participant_columns
from bids_uad.evaluation.tables import find_metrics_tables
from bids_uad.reports import group_charts
from bids_uad.reports.group import CHAPTERS, Provenance, write_group_report
from bids_uad.reports.group_text import no_interval, number
from tests.evaluation.fake_tables import EDGES, Scan, beta_counts, write_cohort


def assess(root):
    people = read_participants(root)
    return evaluate(root, find_metrics_tables(root), people, seed=0), people


def write_page(root, evaluation, people, analyses=None):
    analyses = analyses or analyse(evaluation.subjects, evaluation.cohort_curves, (), seed=0)
    origins = read_model_provenance(root, evaluation.subjects)
    provenance = Provenance(("bids_uad", "a b", str(root), "group"), "2026-11-25", origins)
    return write_group_report(root, evaluation, analyses, people, provenance)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    write_cohort(root, root, n_voxels=20_000)
    (root / "sub-01.html").write_text("report")
    evaluation, people = assess(root)
    write_page(root, evaluation, people)
    return root


def charts(evaluation):
    analyses = analyse(evaluation.subjects, evaluation.cohort_curves, (), seed=0)
    return group_charts.group_charts(evaluation, analyses)


class _Balance(HTMLParser):
    VOID = frozenset({"meta", "br", "line", "circle", "rect"})

    def __init__(self):
        super().__init__()
        self.open = []
        self.links = []

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_starttag(self, tag, attrs):
        self.links += [value for key, value in attrs if key in ("href", "src")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_is_valid_and_needs_no_other_resource(study):
    page = (study / "group.html").read_text()
    parser = _Balance()
    parser.feed(page)
    assert not parser.open
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", page)
    assert "@import" not in page
    anchors = [link[1:] for link in parser.links if link.startswith("#")]
    assert anchors
    for anchor in anchors:
        assert f'id="{anchor}"' in page
    files = {link for link in parser.links if not link.startswith("#")}
    names = ("benchmark", "subjects", "comparison", "subgroups", "disparities", "thresholds", "bias")
    names += ("lesions", "missed", "deviations")
    assert files == {"sub-01.html", *(f"group_{name}.tsv" for name in names)}


def test_page_contains_the_required_texts(study):
    page = (study / "group.html").read_text()
    assert "Not for clinical use" in page
    assert "optimistic upper bound" in page
    assert "max_dice" in page
    assert "Every expected participant" in page
    assert re.search(
        r'<th [^>]*title="Number of lesion scans with an empty lesion mask"[^>]*>empty mask', page
    )
    for column in ("dice_optimal", "auprc_pooled", "fpr_healthy_mean", "n_both_empty"):
        assert f'<dt class="name">{column}</dt>' in page
    for text in (
        "Summary",
        "Highest mean Dice: Disyre",
        "@media print",
        "2026-11-25",
        "bids_uad &#39;a b&#39;",
    ):
        assert text in page


def test_table_heads_have_definitions(study):
    page = (study / "group.html").read_text()
    heads = re.findall(r'<th scope="col"[^>]*data-sort[^>]*>', page)
    explained = [head for head in heads if re.search(r'title="[^"]{5,}"', head)]
    # Without definition: modality and three cohorts, in two tables.
    assert len(heads) - len(explained) == 8
    assert 'title="Mean Dice at the fixed threshold, lesion scans"' in page


def bold_cells(page):
    return re.findall(r'<td class="[^"]*\bbest\b', page)


def test_values_of_a_detector_with_fewer_scans_are_not_bold(tmp_path):
    write_cohort(tmp_path, tmp_path, n_voxels=20_000)
    evaluation, people = assess(tmp_path)
    assert bold_cells(write_page(tmp_path, evaluation, people).read_text())
    for table in [*tmp_path.rglob("*Disyre*")]:
        if not table.name.startswith("sub-01"):
            table.unlink()
    evaluation, people = assess(tmp_path)
    assert not bold_cells(write_page(tmp_path, evaluation, people).read_text())


def test_figures_are_valid_svg_with_working_links(study):
    figures = sorted((study / "group" / "figures").glob("*.svg"))
    assert [figure.stem for figure in figures] == [
        "dice_T1w",
        "dice_T2w",
        "dice_by_threshold_T1w",
        "dice_by_threshold_T2w",
        "dice_by_volume",
        "fpr_healthy_T1w",
        "fpr_healthy_T2w",
        "precision_recall",
        "score_histograms_T1w",
        "score_histograms_T2w",
        "thresholds_T1w",
        "thresholds_T2w",
    ]
    assert {figure.stem.removesuffix("_T1w").removesuffix("_T2w") for figure in figures} <= {
        name for chapter in CHAPTERS for name in chapter.figures
    }
    for figure in figures:
        root = ET.fromstring(figure.read_text())  # noqa: S314
        assert root.tag.endswith("svg")
        assert not re.search(r'="[^"]*\b(nan|inf)\b[^"]*"', figure.read_text())
        for link in root.iter("{http://www.w3.org/2000/svg}a"):
            assert (figure.parent / link.get("href")).is_file()


def test_dots_are_at_their_dice(study):
    evaluation, _ = assess(study)
    dice = next(figure for figure in charts(evaluation) if figure.name == "dice_T1w")
    tips = re.findall(r" x=\"([\d.]+)\"[^>]*><title>(sub-\d+): ([\d.]+)</title>", dice.svg)
    scans = evaluation.subjects[evaluation.subjects["modality"] == "T1w"]
    assert len(tips) == (scans["role"] == "lesion").sum()
    positions = np.array([float(x) for x, _, _ in tips])
    values = np.array([float(value) for _, _, value in tips])
    slope, offset = np.polyfit(values, positions, 1)
    np.testing.assert_allclose(positions, slope * values + offset, atol=0.7)
    assert slope > 0


def test_many_scans_are_drawn_as_densities(study, monkeypatch):
    monkeypatch.setattr(group_charts, "MAX_DOTS", 3)
    monkeypatch.setattr(group_charts, "_VOLUME_GROUPS", 2)
    evaluation, _ = assess(study)
    figures = {figure.name: figure.svg for figure in charts(evaluation)}
    assert "<title>sub-" not in figures["dice_T1w"]  # four lesion scans
    assert figures["dice_T1w"].count("fill-opacity: 0.35") == 2
    assert "<title>sub-" in figures["fpr_healthy_T1w"]  # two healthy scans
    assert "<title>sub-" not in figures["dice_by_volume"]
    scans = evaluation.subjects.query("detector == 'disyre' and modality == 'T1w' and role == 'lesion'")
    small = scans.nsmallest(2, "lesion_volume_mm3")
    expected = (small["lesion_volume_mm3"].mean(), small["dice"].mean())
    assert group_charts._medians_by_volume(scans)[0] == pytest.approx(expected)


@pytest.mark.parametrize("position", [0, 200])
def test_thresholds_of_zero_are_at_the_left_end_of_a_logarithmic_axis(tmp_path, position):
    """Lesions have the lowest scores, so that the best threshold is 0, which matplotlib would not draw."""
    (tmp_path / "participants.tsv").write_text("participant_id\tgroup\nsub-1\tpatient\n")
    lesion, nonlesion = np.zeros((2, len(EDGES)), int)
    lesion[0], nonlesion[1], nonlesion[390] = 500, 900, 100
    Scan("1", n_nonlesion=nonlesion, n_lesion=lesion, threshold=EDGES[position]).write(tmp_path)
    evaluation, _ = assess(tmp_path)
    (curve,) = evaluation.curves.values()
    assert curve.optimal[1] == 0
    figures = {figure.name: figure.svg for figure in charts(evaluation)}
    svg = figures["dice_by_threshold_T1w"]
    left = re.search(r'd="M ([\d.]+) ([\d.]+) \nL [\d.]+ \2 \n" clip-path', svg)[1]
    lines = re.findall(r'd="M ([\d.]+) [\d.]+ \nL \1 [\d.]+ \n" clip-path', svg)
    dots = re.findall(r'<use [^>]* x="([\d.]+)"', svg)[-2:]
    assert lines == dots
    best, fixed = dots
    assert best == left
    assert (fixed == left) == (position == 0)


def test_a_cohort_of_controls_has_no_dice_figures(tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "participants.tsv").write_text("participant_id\tgroup\nsub-1\thc\nsub-2\thc\n")
    for who in "12":
        Scan(who, n_nonlesion=beta_counts(generator, 5000, 1, 9)).write(tmp_path)
    evaluation, people = assess(tmp_path)
    names = [figure.name for figure in charts(evaluation)]
    assert names == ["fpr_healthy_T1w", "score_histograms_T1w"]
    stale = tmp_path / "group" / "figures" / "dice_T1w.svg"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier run")
    page = write_page(tmp_path, evaluation, people).read_text()
    assert 'id="dice_' not in page
    assert not stale.exists()


def test_page_without_usable_scans(tmp_path):
    Scan("1").write(tmp_path)
    Scan("<b>2".replace("<b>", ""), n_lesion=EDGES.astype(int) * 0).write(tmp_path)
    evaluation, people = assess(tmp_path)
    page = write_page(tmp_path, evaluation, people).read_text()
    assert "No participants.tsv" in page
    assert "No lesion mask contains a lesion" in page


def test_text_of_the_dataset_is_escaped(tmp_path):
    write_cohort(tmp_path, tmp_path, n_voxels=5_000)
    table = tmp_path / "participants.tsv"
    table.write_text(table.read_text().replace("stroke", "<script>alert(1)</script>"))
    evaluation, people = assess(tmp_path)
    subjects, _ = add_participant_columns(evaluation.subjects, people)
    analyses = analyse(subjects, evaluation.cohort_curves, ["pathology"], seed=0)
    page = write_page(tmp_path, evaluation, people, analyses).read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.1234, "0.123"), (12.0, "12"), (1234.5, "1,234"), (0.00002, "2.0e-5"),
     (float("nan"), "n/a"), (100.0, "100")],
)  # fmt: skip
def test_number_format(value, text):
    assert number(value) == text


def test_missing_intervals_are_explained(study, tmp_path):
    evaluation, people = assess(study)  # four participants with lesions
    found = analyse(evaluation.subjects, evaluation.cohort_curves, (), seed=0, lesions=evaluation.lesions)
    write_page(study, evaluation, people, found)
    page = (study / "group.html").read_text()
    assert "no interval (n = 4)" in page
    assert "Lesion-wise, at least 3 mm³" in page
    assert "of at least 3 mm³; it is found if the prediction touches it" in page
    strip = (study / "group" / "figures" / "dice_T1w.svg").read_text()
    assert "4 scans, n = 4: no interval" in strip
    write_cohort(tmp_path, tmp_path, n_lesion=12, n_voxels=5_000)
    write_page(tmp_path, *assess(tmp_path))
    assert "no interval" not in (tmp_path / "group" / "figures" / "dice_T1w.svg").read_text()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"x": 0.5, "x_ci_low": np.nan, "n_participants": 4}, "no interval (n = 4)"),
        ({"x": 0.5, "x_ci_low": np.nan, "n_participants": 6}, "no interval"),  # from 0 to 1
        ({"x": 0.5, "x_ci_low": np.nan}, "no interval"),
        ({"x": 0.5, "x_ci_low": 0.2, "n_participants": 4}, ""),
        ({"x": np.nan, "x_ci_low": np.nan, "n_participants": 0}, ""),
    ],
)
def test_no_interval_gives_the_reason(row, words):
    assert no_interval(row, "x", "x") == words
