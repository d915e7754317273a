"""Bias models of simulated score maps with known effects of age, sex and scanner."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from bids_uad.calibration.thresholds import score_counts
from bids_uad.dataset.participants import read_participants
from bids_uad.evaluation.benchmark import evaluate
from bids_uad.evaluation.bias import model_bias
from bids_uad.evaluation.subjects import add_participant_columns
from bids_uad.evaluation.tables import find_metrics_tables
from tests.evaluation.fake_tables import Scan, write_participants

SHAPE = (40, 40, 40)
EDGES = np.concatenate([[0.0], np.linspace(0.05, 1.0, 20), [np.inf]])
THRESHOLD = 0.5
SCANNERS = "ABCD"
# Log odds of a false positive, and Dice: per decade, male against female, scanner A against the others.
EFFECTS = {"fpr": (0.30, 0.40, 0.60), "dice": (-0.03, 0.06, -0.10)}
PER_TENFOLD = 0.10
N_HEALTHY, N_LESION, SEEDS = 200, 120, 20


def write_cohort(root, seed: int, *, scale: float) -> None:
    """Write the tables of 200 healthy and 120 lesion scans, effects times `scale`."""
    rng = np.random.default_rng(seed)
    participants = []
    for k in range(N_HEALTHY + N_LESION):
        sick = k >= N_HEALTHY
        person = {
            "participant_id": f"sub-{k:03d}",
            "age": round(rng.uniform(20, 85), 2),
            "sex": "MF"[rng.integers(2)],
            "scanner": SCANNERS[rng.integers(4)],
            "group": "patient" if sick else "control",
        }
        participants.append(person)
        slope, gap, deviation = (scale * effect for effect in EFFECTS["dice" if sick else "fpr"])
        pushed = (
            slope * (person["age"] - 52) / 10
            + gap * ((person["sex"] == "M") - 0.5)
            + deviation * (person["scanner"] == SCANNERS[0])
        )
        brain = np.zeros(SHAPE, bool)
        brain[2:-2, 2:-2, : int(rng.integers(34, 40))] = True
        scores = rng.uniform(0, THRESHOLD, SHAPE)
        lesion = None
        if sick:
            size = int(10 ** rng.uniform(2, 3.5))
            lesion = np.zeros(SHAPE, bool)
            lesion.ravel()[rng.choice(np.flatnonzero(brain), size, replace=False)] = True
            dice = 0.45 + pushed + scale * PER_TENFOLD * (np.log10(size) - 2.75) + rng.normal(0, 0.05)
            false = size // 4
            # Dice = 2 hits / (size + hits + false).
            hits = int(np.clip(round(dice * (size + false) / (2 - dice)), 0, size))
            raised = [np.flatnonzero(lesion)[:hits], np.flatnonzero(brain & ~lesion)[:false]]
        else:
            odds = np.exp(-3 + pushed + rng.normal(0, 0.5))
            inside = np.flatnonzero(brain)
            raised = [inside[rng.random(inside.size) < odds / (1 + odds)]]
        for voxels in raised:
            scores.ravel()[voxels] += THRESHOLD
        n_nonlesion, n_lesion = score_counts(np.where(brain, scores, 0), brain, lesion, EDGES)
        Scan(
            f"{k:03d}", edges=EDGES[:-1], n_nonlesion=n_nonlesion, n_lesion=n_lesion, threshold=THRESHOLD
        ).write(root)
    write_participants(root, participants)


def models(root, seed: int, *, scale: float) -> pd.DataFrame:
    """Return the coefficients of a simulated cohort."""
    write_cohort(root, seed, scale=scale)
    participants = read_participants(root)
    evaluation = evaluate(root, find_metrics_tables(root), participants, seed=0)
    subjects, _ = add_participant_columns(evaluation.subjects, participants)
    assert subjects["role"].value_counts().to_dict() == {"healthy": N_HEALTHY, "lesion": N_LESION}
    return model_bias(subjects).coefficients.set_index(["outcome", "term"])


def truth() -> dict[tuple[str, str], float]:
    """Return the injected coefficients; that of a scanner is the difference from the mean of scanners."""
    known = {}
    for outcome, (slope, gap, deviation) in EFFECTS.items():
        known |= {(outcome, "age"): slope, (outcome, "sex"): gap, (outcome, "brain volume"): 0.0}
        for scanner in SCANNERS:
            known[outcome, f"scanner: {scanner}"] = deviation * ((scanner == SCANNERS[0]) - 0.25)
    return known | {("dice", "lesion volume"): PER_TENFOLD}


@pytest.mark.slow
def test_bias_models_recover_effects_injected_into_score_maps(tmp_path):
    covered = dict.fromkeys(truth(), 0)
    found = {term: 0 for term, value in truth().items() if abs(value) > 0.02}
    tested = false_alarms = null_alarms = 0
    for seed in range(SEEDS):
        table = models(tmp_path / f"{seed}", seed, scale=1)
        assert set(table.index) == set(truth())
        for term, value in truth().items():
            row = table.loc[term]
            covered[term] += int(row["ci_low"] <= value <= row["ci_high"])
            if term in found:
                found[term] += int(row["p_fdr"] < 0.05)
        nothing = [term for term, value in truth().items() if value == 0]
        tested += len(nothing)
        false_alarms += int((table.loc[nothing, "p_fdr"] < 0.05).sum())
        quiet = models(tmp_path / f"null{seed}", 1000 + seed, scale=0)
        null_alarms += int((quiet["p_fdr"] < 0.05).any())
    print(f"covered of {SEEDS}: {covered}\nfound of {SEEDS}: {found}")
    print(
        f"false alarms beside effects: {false_alarms} of {tested} tests; without any: {null_alarms} cohorts"
    )
    strong = [term for term in found if not term[1].startswith("scanner") or term[1].endswith(SCANNERS[0])]
    assert all(found[term] >= 0.9 * SEEDS for term in strong)
    assert sum(covered.values()) >= 0.9 * SEEDS * len(covered)
    assert min(covered.values()) >= 0.8 * SEEDS
    # A false discovery rate of 5 % allows one false discovery in twenty.
    assert false_alarms <= 0.1 * tested
    assert null_alarms <= 0.1 * SEEDS
