"""Figures of comparison and bias, and what the page says about them."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from bids_uad.evaluation.analyses import analyse
from bids_uad.reports.group_charts import age_effects, cliques, rank_plot
from tests.evaluation.test_bias import cohort
from tests.evaluation.test_comparison import scans

COLOURS = dict.fromkeys(("good", "worse", "bad", "made0"), "#0072B2")


def pairs(**p: float) -> pd.DataFrame:
    rows = [{"detector_a": key[0], "detector_b": key[1], "p_holm": value} for key, value in p.items()]
    return pd.DataFrame(rows, columns=["detector_a", "detector_b", "p_holm"])


def test_bars_join_what_does_not_differ() -> None:
    ranked = list("abcd")
    assert cliques(ranked, pairs()) == [(0, 3)]
    assert cliques(ranked, pairs(ad=0.01)) == [(0, 2), (1, 3)]
    assert cliques(ranked, pairs(ab=0.01, ac=0.01, ad=0.01, bd=0.02, cd=0.02)) == [(1, 2)]
    assert cliques(ranked, pairs(ab=0.01, bc=0.01, cd=0.01)) == []
    assert cliques(ranked, pairs(ab=np.nan, ac=0.2)) == [(0, 3)]


def test_ranks_are_drawn_for_three_detectors_and_not_for_two() -> None:
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


def test_ages_are_drawn_where_they_were_modelled() -> None:
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
    # The line's ends are the first and last expected share, written above the panel.
    line = next(effect.line for effect in analyses.bias.effects if effect.term == "age")
    assert line[-1, 1] > 2 * line[0, 1]
    text = next(
        e.text for e in svg.iter() if e.tag.endswith("text") and e.text.endswith(" %") and " to " in e.text
    )
    assert float(text.split(" to ")[0]) == pytest.approx(100 * line[0, 1], rel=0.06)
    assert age_effects([], COLOURS) is None
