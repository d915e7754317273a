"""The study of the publication: cohort, resumption, statistics, verdicts and the page."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from benchmarks import simulated
from benchmarks.paper import cohort, estimates, scoring
from benchmarks.paper.__main__ import main
from benchmarks.paper.bootstrap import dice_by_threshold, interval, resampling_weights, stratum_means
from benchmarks.paper.claims import (
    CLAIMS,
    NOT_REPRODUCED,
    REPRODUCED,
    UNDECIDED,
    published_value,
    verdict,
)
from benchmarks.paper.page import DOCS, compose_page, write_page
from benchmarks.paper.published import EIGHT, PATHOLOGIES, PUBLISHED, Load, published_dice
from benchmarks.paper.study import read_study, read_tables
from benchmarks.paper.tables import (
    critical_difference,
    read_results,
    variant_table,
    write_real,
    write_results,
)
from bids_uad.engine.bundle import NORMATIVE, PACKAGED, load_bundle
from bids_uad.simulation.anatomy import BUILT_IN
from bids_uad.simulation.pathology import CAVITY_AGE, LesionTarget, make_lesion
from bids_uad.simulation.subject import random_stream
from tests.evaluation.fake_tables import Scan, beta_counts, write_participants

EDGES = np.concatenate([[0.0], np.linspace(0.02, 0.98, 25)])
FIXED = 12
"""Index of the fixed threshold among `EDGES`."""


@pytest.mark.parametrize(
    ("low", "high", "claim", "expected"),
    [
        (0.01, 0.03, "scanner", REPRODUCED),
        (-0.03, -0.01, "scanner", NOT_REPRODUCED),
        (-0.01, 0.03, "scanner", UNDECIDED),
        (np.nan, np.nan, "scanner", UNDECIDED),
        (-0.2, -0.1, "load", REPRODUCED),
        (0.01, 0.049, "threshold", REPRODUCED),
        (0.05, 0.2, "threshold", NOT_REPRODUCED),
        (0.04, 0.2, "threshold", UNDECIDED),
        (-0.3, -0.1, "age", REPRODUCED),
        (0.1, 0.3, "age", REPRODUCED),
        (0.01, 0.04, "age", NOT_REPRODUCED),
        (-0.1, 0.2, "age", UNDECIDED),
        (0.5, 0.9, "winner", REPRODUCED),
        (1.0, 1.0, "winner", NOT_REPRODUCED),
    ],
)
def test_verdict_compares_the_interval_with_the_claim(low, high, claim, expected):
    assert verdict(low, high, CLAIMS[claim].holds, CLAIMS[claim].fails) == expected


def test_published_figures():
    assert PUBLISHED["fixed"].shape == PUBLISHED["best"].shape == (8, 8)
    loss = (PUBLISHED["best"] - PUBLISHED["fixed"]).to_numpy()
    assert loss.min() >= 0
    assert loss.max() == pytest.approx(0.048)
    assert published_dice("T2w", "glioma", "disyre") == 0.645
    assert published_dice("T1w", "chronic stroke", "fae") == pytest.approx((0.183 + 0.166 + 0.047) / 3)
    assert np.isnan(published_dice("T2w", "chronic stroke", "fae"))
    assert np.isnan(published_dice("T1w", "glioma", "pls"))
    assert published_value("winner", "T1w and T2w") == 7 / 8
    drops = {
        "riad": -16,
        "itermask": 23,
        "andi": 72,
        "disyre": 48,
        "fae": 17,
        "uniad": 0,
        "rd": -13,
        "patchcore": -1,
    }
    assert published_value("scanner", "T1w") == pytest.approx(sum(drops.values()) / 8000)
    family = sum(list(drops.values())[:4]) / 4000 - sum(list(drops.values())[4:]) / 4000
    assert published_value("scanner_family", "T1w") == pytest.approx(family)
    strongest = (0.425 + 0.104 + 0.645 + 0.172) / 4
    features = (0.467 + 0.031 + 0.381 + 0.055 + 0.283 + 0.035 + 0.372 + 0.015) / 8
    assert published_value("families", "T2w") == pytest.approx(strongest - features)
    assert np.isnan(published_value("scanner", "T2w"))
    assert np.isnan(published_value("age", "T1w"))


@pytest.mark.parametrize(("detectors", "quantile"), [(2, 1.960), (4, 2.569), (8, 3.031), (10, 3.164)])
def test_critical_difference_has_the_values_of_demsar(detectors, quantile):
    expected = quantile * np.sqrt(detectors * (detectors + 1) / (6 * 30))
    assert critical_difference(detectors, 30) == pytest.approx(expected, rel=2e-3)


def test_intervals_of_stratified_means_agree_with_the_normal_approximation():
    """The standard error of the mean of strata is that of independent samples."""
    rng = np.random.default_rng(1)
    values = pd.DataFrame({"a": np.concatenate([rng.normal(0.2, 0.1, 60), rng.normal(0.6, 0.05, 40)])})
    strata = pd.Series(["x"] * 60 + ["y"] * 40)
    means, names = stratum_means(values, strata)
    assert names == ["x", "y"]
    value, low, high = interval(means.mean(1)[:, 0])
    parts = [values["a"][:60], values["a"][60:]]
    error = np.sqrt(sum(part.var(ddof=0) / len(part) for part in parts)) / 2
    assert value == pytest.approx(np.mean([part.mean() for part in parts]))
    assert [low, high] == pytest.approx([value - 1.96 * error, value + 1.96 * error], abs=0.15 * error)
    few, _ = stratum_means(values[:63], strata[:63])
    assert np.isnan(few[1:, 1]).all()
    assert np.isfinite(few[0]).all()


def test_plan_has_all_groups_and_both_kinds_of_scanners_in_any_first_part():
    people = cohort.plan()
    assert len({person.name for person in people}) == len(people) == 315
    for part in (people[:30], people):
        groups = pd.Series([person.group for person in part])
        assert set(groups) == {"healthy", *PATHOLOGIES}
        counts = pd.crosstab(groups, [person.seed for person in part])
        assert (counts[cohort.SEEN_SEED] - counts[cohort.UNSEEN_SEED]).abs().max() <= 1
        assert counts.loc["healthy"].sum() == len(part) / 3
    brain = torch.zeros(8, 8, 8)
    target = LesionTarget(shape=lambda scale: brain)
    for person in people[:60]:
        if person.group.endswith("stroke"):
            draw = partial(random_stream, person.seed, person.index, "lesion")
            drawn = make_lesion("stroke", brain, brain, draw, target=target).drawn
            assert (drawn["old"] > CAVITY_AGE) == (person.group == "chronic stroke")
    table = cohort.participants_table(people, [BUILT_IN])
    assert table["age"].between(20, 90).all()
    assert table["age"].max() > 85
    assert set(table["sex"]) == {"F", "M"}
    assert table["scanner"].nunique() == cohort.SEEN_SCANNERS + cohort.UNSEEN_SCANNERS


def test_lesion_volumes_have_the_published_quartiles():
    load = Load(5.0, 1.7, 0.1, 497.0)
    drawn = [load.draw(np.random.default_rng(k)) for k in range(4000)]
    expected = 5.0 * np.exp(1.7 * stats.norm.ppf([0.25, 0.5, 0.75]))
    assert np.quantile(drawn, [0.25, 0.5, 0.75]) == pytest.approx(expected, rel=0.12)
    assert min(drawn) >= 0.1
    population = cohort.plan(2)[1].population([BUILT_IN])
    assert population.volume(5) == population.volume(5) != population.volume(6)


def test_only_missing_tables_are_scored_again(tmp_path, monkeypatch):
    """What has tables of the same model and threshold is skipped; damaged or old tables are not."""
    bundle = load_bundle(PACKAGED / "intensity-T1w-lite")
    written = []

    def fake(person, missing, labelmaps, people, out):
        for tables, model in missing:
            scan = scoring.expected_scan(person, model.modality)
            for each in (model.with_deviation(NORMATIVE), model):  # tables of deviations and of scores
                metrics, histogram = simulated.tables_of(scan, each, out / tables)
                metrics.parent.mkdir(parents=True, exist_ok=True)
                row = {"model_sha256": each.sha256, "threshold": repr(each.default_threshold[1])}
                pd.DataFrame([row]).to_csv(metrics, sep="\t", index=False)
                histogram.touch()
                if person.group != "healthy":
                    metrics.with_name(metrics.name.replace("_metrics.", "_lesions.")).touch()
            written.append(metrics)

    monkeypatch.setattr(scoring, "score_participant", fake)
    command = ["score", str(tmp_path), "--participants", "3", "--models", "intensity", "--modalities", "T1w"]
    main(command)
    assert len(written) == 3
    main(command)
    assert len(written) == 3
    damaged, old = written[1], written[2]
    damaged.with_name(damaged.name.replace("_metrics.", "_lesions.")).unlink()
    old.write_text(old.read_text().replace(bundle.sha256, "0" * 64))
    main(command)
    assert written[3:] == [damaged, old]
    main([*command, "--minutes", "0"])
    assert json.loads((tmp_path / "study.json").read_text())["planned"] == 3


def test_drawn_parameters_of_earlier_contrasts_are_kept(tmp_path):
    """A run for T1w scans does not lose the slice thickness of T2w scans."""
    kept = tmp_path / "kept.json"
    for modality, thickness in (("T2w", 5.0), ("T1w", 1.0), ("T2w", 4.0)):
        (tmp_path / "new.json").write_text(json.dumps({"index": 3, modality: {"thickness": thickness}}))
        scoring.keep_parameters(tmp_path / "new.json", kept)
    assert json.loads(kept.read_text()) == {"index": 3, "T2w": {"thickness": 4.0}, "T1w": {"thickness": 1.0}}


@pytest.mark.parametrize("written", range(4))
def test_metrics_table_exists_only_with_the_other_tables_of_a_scan(tmp_path, monkeypatch, written):
    """A run is interrupted after some of the three tables."""
    bundle = load_bundle(PACKAGED / "intensity-T1w-lite")
    scan = replace(scoring.expected_scan(cohort.plan(2)[1], "T1w"), lesion=Path("lesion"))
    write_tsv, names = simulated.write_tsv, []

    def interrupted(path, table):
        if len(names) == written:
            raise KeyboardInterrupt
        names.append(path)
        return write_tsv(path, table)

    box = np.zeros((12, 12, 12), np.float32)
    box[2:10, 2:10, 2:10] = 1
    monkeypatch.setattr(simulated, "read", lambda path: box)
    monkeypatch.setattr(simulated, "write_tsv", interrupted)
    with nullcontext() if written == 3 else pytest.raises(KeyboardInterrupt):
        simulated.write_tables(scan, bundle, 9 * box, box > 0, [], None, tmp_path)
    metrics, _ = simulated.tables_of(scan, bundle, tmp_path)
    assert metrics.is_file() == (written == 3)
    assert scoring.is_scored(scan, bundle, tmp_path, with_lesion=True) == (written == 3)


def write_study(out: Path, *, n_healthy: int = 22, n_lesion: int = 30) -> None:
    """Write score tables: healthy false positives rise with age, and small lesions are missed."""
    rng = np.random.default_rng(3)
    rows, names = [], ["glioma", "multiple sclerosis", "acute stroke"]
    for index in range(n_healthy + n_lesion):
        healthy, seen = index < n_healthy, index % 2 == 0
        subject, age, size = f"{index + 1:03d}", rng.uniform(20, 90), int(10 ** rng.uniform(2.3, 4.3))
        rows.append(
            {
                "participant_id": f"sub-{subject}",
                "age": round(age, 1),
                "sex": "MF"[index // 2 % 2],
                "group": "control" if healthy else "patient",
                "pathology": "none" if healthy else names[index % 3],
                "scanner": f"{'seen' if seen else 'unseen'}{index % 3}",
                "manufacturer": "GE",
                "field_strength": "3 T",
            }
        )
        for position, detector in enumerate([*EIGHT, "fae+normative"]):
            rate = 6 - 0.05 * (age - 55) if healthy else 12
            found = 0.9 * rng.random() < (size > 2000)
            lesions = pd.DataFrame(
                {"lesion": [1], "volume_mm3": [size], "detected_fraction": [0.5 * found]}
                | {"detected": [int(found)], "contrast": [0.5 + 2.5 * found]}
            )
            strength = (1.0 + position / 3) * (1.4 if seen else 0.6) * (1 if size > 2000 else 0.4)
            path = Scan(
                subject,
                "T2w",
                detector,
                edges=EDGES,
                n_nonlesion=beta_counts(rng, 100_000, 1.1, rate, EDGES),
                n_lesion=None if healthy else beta_counts(rng, size, 3 * strength, 6, EDGES),
                threshold=EDGES[FIXED],
                sha256=str(position) * 64,
                scanner_seen="seen" if seen else "unseen",
                n_lesions=1,
                lesions=None if healthy else lesions,
            ).write(out / "tables")
            if "+" in detector:
                for written in path.parent.glob("*+*"):
                    written.rename(written.with_name(written.name.replace("+", "")))
    write_participants(out, rows)
    facts = {"planned": 315, "label_maps": ["a"], "trained_on_them": [], "models": {}}
    (out / "study.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    write_study(out)
    return read_study(out)


@pytest.fixture(scope="module")
def results(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    write_results(study, folder)
    return folder


@pytest.fixture(scope="module")
def claims(study):
    return estimates.estimate_claims(study)


def row_of(claims: pd.DataFrame, claim: str, modality: str = "T2w") -> pd.Series:
    """Return the row of the mean over the detectors."""
    own = claims[(claims["claim"] == claim) & (claims["modality"] == modality) & (claims["detector"] == "")]
    assert len(own) == 1, claim
    return own.iloc[0]


def test_effects_of_the_made_up_scores_are_found(claims):
    assert {"scanner", "load", "contrast", "age"} <= set(claims.loc[claims["verdict"] == REPRODUCED, "claim"])
    assert np.exp(row_of(claims, "age")["value"]) > 1.1
    for claim in CLAIMS:
        for modality in ["T1w and T2w"] if claim == "winner" else ["T1w", "T2w"]:
            row = row_of(claims, claim, modality)
            if modality != "T2w" or claim in ("scaling", "ablation"):
                assert np.isnan(row["value"])
                assert row["verdict"] == UNDECIDED


def test_threshold_loss_equals_a_plain_search(study, claims):
    """Mean over pathologies and detectors of the best mean Dice minus that at the fixed threshold."""
    losses, resampled = [], []
    rows = study.subjects[study.subjects["role"] == "lesion"].drop_duplicates("participant_id")
    for position, (_, own) in enumerate(sorted(rows.groupby("cohort")["participant_id"])):
        drawn = resampling_weights(len(own), position)[1]
        for name in EIGHT:
            curves = study.dice[name, "T2w"].loc[sorted(own)].to_numpy()
            losses.append(max(column.mean() for column in curves.T) - curves[:, FIXED].mean())
            means = [sum(w * d for w, d in zip(drawn, column, strict=True)) for column in curves.T]
            resampled.append(max(means) - means[FIXED])
    row = row_of(claims, "threshold")
    assert row["value"] == pytest.approx(np.mean(losses))
    dice = dice_by_threshold(study, "T2w", EIGHT)
    assert (dice.best - dice.fixed)[1].mean() == pytest.approx(np.mean(resampled))
    assert row["published"] == pytest.approx(
        np.mean(
            [
                published_dice("T2w", p, d, "best") - published_dice("T2w", p, d)
                for p in ("glioma", "multiple sclerosis")
                for d in EIGHT
            ]
        )
    )


def test_ranking_is_kendalls_tau_of_the_means(study, claims):
    dice = study.scores("T2w", "dice")
    pathology = study.column(dice.index, "cohort")
    pathologies = ["glioma", "multiple sclerosis"]
    ours = [np.mean([dice.loc[pathology == p, name].mean() for p in pathologies]) for name in dice]
    published = [np.mean([published_dice("T2w", p, name) for p in pathologies]) for name in dice]
    row = row_of(claims, "ranking")
    assert row["value"] == pytest.approx(stats.kendalltau(ours, published)[0])


def test_difference_between_scanners_is_that_of_pathologies(study, claims):
    """With equal numbers on both kinds of scanners, it is the mean difference within a pathology."""
    dice = study.scores("T2w", "dice")
    groups = [study.column(dice.index, name) for name in ("cohort", "scanner_seen")]
    means = dice.mean(axis=1).groupby(groups).mean().unstack()
    assert row_of(claims, "scanner")["value"] == pytest.approx((means["seen"] - means["unseen"]).mean())


def test_mean_detector_has_the_mean_log_odds(study):
    rows = study.subjects
    healthy = rows[(rows["role"] == "healthy") & rows["detector"].isin(EIGHT)]
    mean = estimates.mean_detector(healthy).set_index("source_image")

    def log_odds(table):
        positive = table["fpr"] * table["n_brain_voxels"]
        return np.log((positive + 50) / (table["n_brain_voxels"] - positive + 50))

    expected = log_odds(healthy).groupby(healthy["source_image"]).mean()
    assert log_odds(mean)[expected.index].to_numpy() == pytest.approx(expected.to_numpy())


def test_variants_are_compared_on_the_same_participants(study):
    worse = replace(study, subjects=study.subjects.assign(dice=study.subjects["dice"] - 0.1))
    more = replace(study, variants={"scaling/3": worse, "ablation/patches": worse})
    claims = pd.DataFrame([each.row for each in estimates.variants(more, "T2w")])
    for claim, expected in {"scaling": NOT_REPRODUCED, "ablation": REPRODUCED}.items():
        row = row_of(claims, claim)
        assert row["value"] == pytest.approx(0.1)
        assert row["verdict"] == expected
    table = variant_table(more)
    assert set(table["variant"]) == set(more.variants)
    assert table["gain"].to_numpy() == pytest.approx(0.1)


def test_dice_of_real_scans_is_that_of_the_masks(tmp_path):
    """A decision rule other than a threshold gives masks that the score histogram does not have."""
    generator, rows, expected = np.random.default_rng(5), [], []
    for index in range(6):
        subject, size = f"{index:02d}", 400 + 50 * index
        counts = beta_counts(generator, size, 6, 3)
        path = Scan(subject, "T2w", "pls", n_lesion=counts, sha256="a" * 64).write(tmp_path)
        table = pd.read_csv(path, sep="\t")
        table.assign(anomaly_volume_mm3=300.0, detected_volume_mm3=200.0).to_csv(path, sep="\t", index=False)
        rows.append({"participant_id": f"sub-{subject}", "pathology": "glioma", "group": "patient"})
        expected.append(2 * 200 / (300 + size))
    write_participants(tmp_path, rows)
    write_real(read_tables(tmp_path, tmp_path), tmp_path / "results")
    (row,) = pd.read_csv(tmp_path / "results" / "real.tsv", sep="\t").to_dict("records")
    assert (row["modality"], row["pathology"], row["detector"], row["n"]) == ("T2w", "glioma", "pls", 6)
    assert row["dice"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert row["low"] < row["dice"] < row["high"]


def test_page_names_models_that_are_not_the_packaged_ones(results):
    tables, facts = read_results(results)
    assert "were replaced" not in compose_page(tables, facts)
    kept = load_bundle(PACKAGED / "rd-T2w-lite").sha256[:12]
    facts["models"] = {"rd-T2w-lite": kept, "uniad-T2w-lite": "0" * 12, "other-T2w-lite": "0" * 12}
    text = compose_page(tables, facts)
    assert "These models were replaced after the participants were scored: `uniad-T2w-lite`." in text


def test_page_states_what_the_tables_hold(results, tmp_path):
    write_page(results, tmp_path)
    text = (tmp_path / "benchmark.md").read_text()
    assert "52 with T2w, of 315 planned" in text
    assert "not complete" in text
    for claim in CLAIMS.values():
        assert claim.title in text
    claims = pd.read_csv(results / "claims.tsv", sep="\t")
    overall = claims[claims["detector"].isna()]
    assert len(overall) == 2 * len(CLAIMS) - 1
    assert text.count(f"**{UNDECIDED}** |") == (overall["verdict"] == UNDECIDED).sum()
    figures = sorted(path.name for path in (tmp_path / "benchmark").iterdir())
    assert figures == ["detectors.svg", "dice.svg", "lesions.svg", "ranks.svg"]
    for name in figures:
        assert f"(benchmark/{name})" in text


def test_page_in_the_documentation_is_that_of_the_tables():
    assert (DOCS / "benchmark.md").read_text() == compose_page(*read_results())
