"""Charts of the group report: colours, positions, tooltips, and which charts are drawn."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from bids_uad.evaluation.analyses import analyse
from bids_uad.evaluation.experiments import COLUMNS, REFERENCE
from bids_uad.methods.registry import DETECTORS
from bids_uad.reports import group_charts
from bids_uad.reports.analysis_charts import age_effects, cliques, experiment_charts, rank_plot
from bids_uad.reports.charts import ChartCanvas, power_of_ten, round_up
from bids_uad.reports.group_charts import detector_colours
from tests.evaluation.fake_tables import EDGES, beta_counts
from tests.evaluation.test_bias import cohort
from tests.evaluation.test_comparison import scans

COLOURS = dict.fromkeys(("disyre", "good", "worse", "bad", "made0"), "#0072B2")
KNOWN = list(DETECTORS)


def test_round_up_and_power_of_ten():
    assert [round_up(value) for value in (0.43, 0.5, 7.2, 130)] == pytest.approx([0.5, 0.5, 8, 150])
    assert [power_of_ten(value) for value in (1e-6, 1.0, 1e3)] == ["10⁻⁶", "1", "10³"]


def test_canvas_adds_tooltips_and_links_in_order():
    canvas = ChartCanvas(200, "a & b")
    axes = canvas.panel(100, 50, 400, 100)
    axes.set(xlim=(0, 4), ylim=(0, 1))
    canvas.markers(axes, [1, 3], [0.25, 1], "#0072B2", tips=["one", ""], links=["", "sub-01.html"])
    svg = canvas.svg()
    assert svg == svg.strip()
    assert svg.startswith("<svg xmlns")
    assert 'aria-label="a &amp; b"' in svg
    # Data (1, 0.25) lie at 100 + 400/4 and 50 + 100 * 0.75 pixels, data (3, 1) at 400 and 50.
    assert re.search(r'<use [^>]*x="200" y="125"[^>]*><title>one</title></use>', svg)
    assert re.search(r'<a href="sub-01.html"><use [^>]*x="400" y="50"[^>]*/></a>', svg)
    for identifier in re.findall(r' id="([^"]+)"', svg):
        assert f"#{identifier}" in svg


def test_display_bins_keep_the_voxels():
    counts = beta_counts(np.random.default_rng(0), 10_000, 2, 9)
    edges, fractions = group_charts._display_bins(EDGES, counts, (0, 1.05), "linear")
    assert len(edges) == len(fractions) + 1
    assert fractions.sum() == pytest.approx(1)


def test_swarm_separates_close_dots():
    positions = [10.0, 10.0, 10.5, 200.0]
    offsets = group_charts._swarm(positions, 3)
    assert len(set(offsets[:3])) == 3
    assert offsets[3] == 0


def colours_of(detectors):
    return detector_colours(SimpleNamespace(curves=dict.fromkeys((name, "T2w") for name in detectors)))


@pytest.mark.parametrize(
    "detectors",
    [KNOWN, [KNOWN[0], KNOWN[-1]], ["pls", "pls+normative", "disyre", "disyre+normative", "mine"]],
)
def test_detector_colours_differ_between_detectors(detectors):
    colours = colours_of(detectors)
    assert sorted(colours) == sorted(detectors)
    assert len(set(colours.values())) == len(detectors)


def test_detector_colours_of_registered_detectors_do_not_depend_on_the_cohort():
    alone, among = colours_of(KNOWN[3:4]), colours_of([*KNOWN[:8], "mine", "yours+normative"])
    assert alone[KNOWN[3]] == among[KNOWN[3]]


def test_detector_colours_repeat_if_there_are_more_detectors_than_colours():
    assert len(set(colours_of([*KNOWN, "a", "b", "c"]).values())) == len(KNOWN)


def pairs(**p: float) -> pd.DataFrame:
    rows = [{"detector_a": key[0], "detector_b": key[1], "p_holm": value} for key, value in p.items()]
    return pd.DataFrame(rows, columns=["detector_a", "detector_b", "p_holm"])


def test_cliques_join_detectors_without_difference():
    ranked = list("abcd")
    assert cliques(ranked, pairs()) == [(0, 3)]
    assert cliques(ranked, pairs(ad=0.01)) == [(0, 2), (1, 3)]
    assert cliques(ranked, pairs(ab=0.01, ac=0.01, ad=0.01, bd=0.02, cd=0.02)) == [(1, 2)]
    assert cliques(ranked, pairs(ab=0.01, bc=0.01, cd=0.01)) == []
    assert cliques(ranked, pairs(ab=np.nan, ac=0.2)) == [(0, 3)]


def test_rank_plot_needs_three_detectors():
    subjects = scans().assign(source_image="x", lesion_volume_mm3=np.nan)
    analyses = analyse(subjects.assign(n_brain_voxels=1e6, n_lesion_voxels=0), {}, [], seed=0)
    figure = rank_plot(subjects, analyses.comparison, COLOURS)
    svg = ET.fromstring(figure.svg)  # noqa: S314
    tips = [element.text for element in svg.iter() if element.tag.endswith("title")][1:]
    lesions = subjects[subjects["role"] == "lesion"].pivot(
        index="participant_id", columns="detector", values="dice"
    )
    ranks = stats.rankdata(-lesions[["good", "worse", "bad"]].to_numpy(), axis=1).mean(axis=0)
    names = ("Good", "Worse", "Bad")
    assert tips == [f"{name}: mean rank {rank:.2f}" for name, rank in zip(names, ranks, strict=True)]
    texts = [element.text for element in svg.iter() if element.tag.endswith("text")]
    places = [texts.index(name) for name in ("Good", "Worse", "Bad")]
    assert places == sorted(places)
    assert rank_plot(subjects[subjects["detector"] != "bad"], analyses.comparison, COLOURS) is None


def test_age_effects_are_drawn_from_the_bias_model():
    subjects = cohort(0).assign(source_image=[f"{k}" for k in range(200)], auprc=np.nan, sensitivity=np.nan)
    analyses = analyse(subjects, {}, ["sex", "age"], seed=0)
    assert set(analyses.disparities["factor"]) == {"sex", "age"}
    figure = age_effects(analyses.bias.effects, COLOURS)
    assert figure.name == "bias_age"
    svg = ET.fromstring(figure.svg)  # noqa: S314
    markers = [
        element
        for element in svg.iter()
        if element.tag.endswith("use") and "fill: #0072b2" in element.get("style", "")
    ]
    assert 190 <= len(markers) <= 200
    # The text above the panel has the first and last expected rate.
    line = next(effect.line for effect in analyses.bias.effects if effect.term == "age")
    assert line[-1, 1] > 2 * line[0, 1]
    text = next(
        e.text for e in svg.iter() if e.tag.endswith("text") and e.text.endswith(" %") and " to " in e.text
    )
    assert float(text.split(" to ")[0]) == pytest.approx(100 * line[0, 1], rel=0.06)
    assert age_effects([], COLOURS) is None


def row(variant, n, outcome="dice", mean=0.2, changes=None, steps=60):
    values = dict.fromkeys(COLUMNS, np.nan)
    values |= {"detector": "disyre", "modality": "T2w", "outcome": outcome, "variant": variant}
    values |= {"n_training_subjects": n, "changes": changes, "n_steps": steps, "mean": mean}
    return values | {"mean_ci_low": mean - 0.05, "mean_ci_high": mean + 0.05}


def drawn(*rows):
    charts = experiment_charts(pd.DataFrame(list(rows)), COLOURS)
    figures = [chart.of_modality("T2w") for chart in charts if chart is not None]
    return {figure.name: re.findall(r"<title>(Disyre[^<]*)</title>", figure.svg) for figure in figures}


def test_experiments_with_fewer_subjects_make_a_curve():
    figures = drawn(
        row(REFERENCE, 76), row("tenth", 8, mean=0.1), row("nobias", 76, changes="anomalies=disc, texture")
    )
    assert figures == {
        "scaling_T2w": ["Disyre, tenth: 0.1 (8 subjects)", "Disyre, reference: 0.2 (76 subjects)"],
        "ablation_T2w": ["Disyre, reference: 0.2", "Disyre, nobias: 0.2"],
    }


def test_experiments_with_other_steps_make_no_curve():
    assert set(drawn(row(REFERENCE, 76), row("tenth", 8, steps=30))) == {"ablation_T2w"}
    assert set(drawn(row(REFERENCE, 76), row("tenth", 8))) == {"scaling_T2w"}


def test_experiments_without_number_of_subjects_make_no_curve():
    figures = drawn(row(REFERENCE, np.nan, steps=np.nan), row("other", np.nan, steps=np.nan))
    assert figures == {"ablation_T2w": ["Disyre, reference: 0.2", "Disyre, other: 0.2"]}
    assert drawn(row(REFERENCE, 76)) == {}


def test_experiments_curve_has_the_means():
    rows = [row(REFERENCE, 80, mean=0.4), row("a", 20, mean=0.2), row("b", 5, mean=0.1)]
    figure, _ = experiment_charts(pd.DataFrame(rows), COLOURS)
    spots = re.findall(r'x="([\d.]+)" y="([\d.]+)"[^>]*><title>Disyre', figure.svg)
    places = [tuple(map(float, spot)) for spot in spots]
    (x1, y1), (x2, y2), (x3, y3) = places
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)  # four times as many each
    assert (y1 - y2) * 2 == pytest.approx(y2 - y3, abs=0.3)
