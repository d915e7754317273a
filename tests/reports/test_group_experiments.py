"""Figures of experiments: which variants make a curve, and which stand side by side."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from bids_uad.evaluation.experiments import COLUMNS, REFERENCE
from bids_uad.reports.group_charts import experiment_charts

COLOURS = {"disyre": "#0072B2"}


def row(variant, n, outcome="dice", mean=0.2, changes=None, steps=60):
    values = dict.fromkeys(COLUMNS, np.nan)
    values |= {"detector": "disyre", "modality": "T2w", "outcome": outcome, "variant": variant}
    values |= {"n_training_subjects": n, "changes": changes, "n_steps": steps, "mean": mean}
    return values | {"mean_ci_low": mean - 0.05, "mean_ci_high": mean + 0.05}


def drawn(*rows):
    charts = experiment_charts(pd.DataFrame(list(rows)), COLOURS)
    figures = [chart.of_modality("T2w") for chart in charts if chart is not None]
    return {figure.name: re.findall(r"<title>(Disyre[^<]*)</title>", figure.svg) for figure in figures}


def test_fewer_subjects_make_a_curve_and_other_changes_do_not():
    figures = drawn(
        row(REFERENCE, 76), row("tenth", 8, mean=0.1), row("nobias", 76, changes="anomalies=disc, texture")
    )
    assert figures == {
        "scaling_T2w": ["Disyre, tenth: 0.1 (8 subjects)", "Disyre, reference: 0.2 (76 subjects)"],
        "ablation_T2w": ["Disyre, reference: 0.2", "Disyre, nobias: 0.2"],
    }


def test_fewer_subjects_and_other_steps_are_no_curve():
    assert set(drawn(row(REFERENCE, 76), row("tenth", 8, steps=30))) == {"ablation_T2w"}
    assert set(drawn(row(REFERENCE, 76), row("tenth", 8))) == {"scaling_T2w"}


def test_what_is_not_known_stands_side_by_side():
    figures = drawn(row(REFERENCE, np.nan, steps=np.nan), row("other", np.nan, steps=np.nan))
    assert figures == {"ablation_T2w": ["Disyre, reference: 0.2", "Disyre, other: 0.2"]}
    assert drawn(row(REFERENCE, 76)) == {}


def test_the_curve_is_where_the_numbers_are():
    rows = [row(REFERENCE, 80, mean=0.4), row("a", 20, mean=0.2), row("b", 5, mean=0.1)]
    figure, _ = experiment_charts(pd.DataFrame(rows), COLOURS)
    spots = re.findall(r'x="([\d.]+)" y="([\d.]+)"[^>]*><title>Disyre', figure.svg)
    places = [tuple(map(float, spot)) for spot in spots]
    (x1, y1), (x2, y2), (x3, y3) = places
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)  # four times as many each
    assert (y1 - y2) * 2 == pytest.approx(y2 - y3, abs=0.3)
