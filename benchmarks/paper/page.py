"""Text of docs/benchmark.md, from the tables of ``benchmarks/results/paper``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.paper.claims import CLAIMS, NOT_REPRODUCED, REPRODUCED, SMALL_DICE, UNDECIDED
from benchmarks.paper.figures import detector_title, draw_figures
from benchmarks.paper.published import EIGHT, PATHOLOGIES
from benchmarks.paper.tables import RESULTS, read_results
from benchmarks.simulated import markdown
from bids_uad.engine.bundle import PACKAGED, load_bundle, packaged_bundles

DOCS = Path(__file__).parents[2] / "docs"
INTRODUCTION = """
# The published study, claim by claim

[Frotscher, Baumgartner and Wolfers (2025)](https://arxiv.org/abs/2512.01534) compared eight detectors,
trained on 2,976 T1w and 2,972 T2w scans of healthy people, on 2,221 T1w and 1,262 T2w test scans. Their
scans and weights are not open. This page tests their claims with the packaged models on a simulated cohort,
and states for each claim the published figure, the figure measured here with its interval, and a verdict.
Published figures are the bars of the figure in the [repository of the
publication](https://github.com/AlexanderFrotscher/UAD-IMAG), read within 0.001; claims of the abstract come
without figures. For the domain shift, the cohorts ATLAS-I and ATLAS-O of that figure are taken for scanners
in and out of the training data, which the repository does not state.
"""
COMMANDS = """
All figures and tables of this page are made by

    python -m benchmarks.paper score OUT --labelmaps LABELMAPS --nprocs 2
    python -m benchmarks.paper evaluate OUT
    python -m benchmarks.paper page

in several hours on two cores. A stopped run continues where it ended; `--participants N` limits the number.
The tables are in `benchmarks/results/paper`. LABELMAPS are label maps that were not used for training. Models
with other training data or synthetic anomalies (see [](models.md)) are added by `--variants DIR`, with the
bundles of models trained on 3 % of the scans in `DIR/scaling/3`, and those of Disyre with fewer kinds of
anomalies in `DIR/ablation/NAME`:

    bids_uad train TRAIN DIR/scaling/3 --detector uniad --modality T2w --preset lite --train-fraction 0.03
    bids_uad train TRAIN DIR/ablation/texture --detector disyre --modality T2w --preset lite \\
        --hyper 'anomalies=["rectangle", "disc", "blobs", "texture"]'
    bids_uad calibrate VALIDATION DIR/scaling/3 --detector uniad --modality T2w --preset lite
"""
RULE = f"""
Each claim is a statement about one number, averaged over the eight published detectors. The verdict
compares its 95 % interval with the values that agree with the claim:

- **reproduced**: all values of the interval agree;
- **not reproduced**: all values disagree;
- **cannot be told**: otherwise, or if there is no interval (fewer than five participants in a stratum), or
  if the number was not measured.

A difference agrees if it has the claimed sign. A loss or gain that is claimed to be small agrees up to
{SMALL_DICE:g} Dice, about the largest published loss by a fixed threshold. An odds ratio or ratio of rates
that is claimed to differ agrees if the interval excludes 1, and disagrees if it is within 1/1.05 to 1.05.
Intervals are percentile bootstraps over participants, within pathologies (2,000 samples); those of odds
ratios are of the models of [](evaluation.md). The verdicts are not corrected for the number of claims.
"""
FOREST = [
    "![Estimates of each detector](benchmark/detectors.svg)",
    "The same numbers for each detector. Bars are 95 % intervals.",
]
LESIONS = """
Fraction of lesions that the anomaly mask touches, by lesion load of the scan (quartiles), volume and
contrast of the lesion.
"""
LIMITS = """
Simulation has exact lesion masks, known age, sex and scanner, and as many participants as needed. It can
therefore show whether thresholds carry over, how scores depend on acquisition and anatomy *as simulated*,
and whether a difference between detectors is larger than its sampling error. It cannot show:

- **how well a detector works on patients.** Simulated lesions are simpler than real ones, and the packaged
  models are small and trained on simulated scans, so that absolute Dice values are not comparable with the
  published ones; only their order, signs and differences are;
- **effects of sex.** In the simulation, sex changes the size of the brain only, by 3 %;
- **effects of age beyond those simulated:** ventricles, sulci, white matter changes and normal variants;
- **scanner effects beyond those simulated:** tissue contrast, noise, blur, bias field, slice thickness and
  gamma. Seen scanners have the contrasts of training scans exactly; unseen ones are drawn from the same
  distribution, so that the shift is milder than between real scanners, and manufacturer and field strength
  act through these properties only;
- **errors of preprocessing.** Scans are simulated in SRI24 space.

A claim that is not reproduced here may hold for the published models on their scans, and the reverse.
"""
PUBLISHED_TEXT = {"deviation": "open question", "ranking": "1 (its own order)"}
"""Text in place of a published figure, for claims without one."""


def compose_page(tables: dict[str, pd.DataFrame], facts: dict) -> str:
    """Compose the page.

    Parameters
    ----------
    tables : dict of str to pandas.DataFrame
        Tables of the study.
    facts : dict
        Contents of study.json.

    Returns
    -------
    str
        Markdown of docs/benchmark.md.
    """
    claims = tables["claims"]
    overall = claims[claims["detector"].isna()]
    counts = overall["verdict"].value_counts()
    scored, planned = facts["scored"], facts["planned"]
    numbers = ", ".join(f"{n} with {modality}" for modality, n in sorted(scored.items()))
    partial = max(scored.values()) < planned or len(scored) < 2
    sections = [
        INTRODUCTION,
        f"Participants scored: {numbers}, of {planned} planned. "
        + (
            "**The cohort is not complete.** These are the participants scored so far, in an order in which "
            "every first part has all groups; the first of the commands below continues where it ended."
            if partial
            else "The cohort is complete."
        ),
        *_former_models(facts["models"]),
        COMMANDS,
        "## Verdicts",
        RULE,
        f"Of {len(overall)} rows: {counts.get(REPRODUCED, 0)} reproduced, {counts.get(NOT_REPRODUCED, 0)} "
        f"not reproduced, {counts.get(UNDECIDED, 0)} cannot be told, of which "
        f"{int(overall['value'].isna().sum())} are not measured.",
        _claims_text(overall),
        *(FOREST if len(overall) < len(claims) else []),
        "## Cohort",
        _cohort_text(tables["cohort"], facts),
        "## Dice",
        "Mean Dice at the fixed threshold of the model, with its interval; after the semicolon the published "
        "mean Dice of the cohorts with this pathology.",
    ]
    for modality in sorted(set(tables["dice"]["modality"])):
        sections += [f"### {modality}", _dice_text(tables["dice"], modality)]
    if len(tables["dice"]):
        sections += ["![Dice of each detector and pathology](benchmark/dice.svg)"]
    sections += ["## Ranking", _rank_text(tables["ranks"]), "## Lesion load and contrast", LESIONS]
    if len(tables["lesions"]):
        sections += ["![Lesions found](benchmark/lesions.svg)"]
    sections += _missed_text(tables["missed"])
    sections += ["## Scanners", _scanner_text(tables["subgroups"])]
    sections += ["## Other training data", _variant_text(tables["variants"])]
    sections += ["## Real scans", _real_text(tables.get("real"))]
    sections += ["## What simulation can and cannot show", LIMITS]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _number(value: float, *, digits: int = 3, signed: bool = False) -> str:
    if not np.isfinite(value):
        return "n/a"
    return f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"


def _with_interval(value: float, low: float, high: float, *, digits: int = 3, signed: bool = False) -> str:
    """Write a value and, if it is known, its interval."""
    text, *limits = (_number(number, digits=digits, signed=signed) for number in (value, low, high))
    return f"{text} ({limits[0]} to {limits[1]})" if np.isfinite(low) else text


def _former_models(scored: dict[str, str]) -> list[str]:
    """Name the models of the study that are no longer the packaged ones, if any."""
    former = [
        name
        for name in packaged_bundles()
        if name in scored and not load_bundle(PACKAGED / name).sha256.startswith(scored[name])
    ]
    names = ", ".join(f"`{name}`" for name in former)
    return [f"These models were replaced after the participants were scored: {names}."] if former else []


def _claims_text(overall: pd.DataFrame) -> str:
    """Tabulate claims and verdicts; logarithms as ratios."""
    lines = [
        "| claim | contrast | published | ours (95 % interval) | n | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for row in overall.to_dict("records"):
        claim = CLAIMS[row["claim"]]
        published = PUBLISHED_TEXT.get(row["claim"], "stated without a figure")
        if np.isfinite(row["published"]):
            published = _number(row["published"])
        numbers = np.array([row["value"], row["low"], row["high"]])
        ours = "not measured"
        if np.isfinite(row["value"]):
            ours = _with_interval(*np.exp(numbers), digits=2) if claim.ratio else _with_interval(*numbers)
        cells = [f"{claim.title}: {claim.measure}", row["modality"], published, ours]
        lines.append(f"| {' | '.join(cells)} | {row['n']} | **{row['verdict']}** |")
    return "\n".join(lines)


def _dice_text(table: pd.DataFrame, modality: str) -> str:
    """Tabulate Dice at the fixed threshold by detector and pathology: ours; published."""
    own = table[table["modality"] == modality]
    rows = []
    for name in [*EIGHT, *sorted(set(own["detector"]) - set(EIGHT))]:
        of_detector = own[own["detector"] == name].set_index("pathology")
        if of_detector.empty:
            continue
        row = {"detector": detector_title(name)}
        for pathology in sorted(set(own["pathology"])):
            row[pathology] = "n/a"
            if pathology in of_detector.index:
                entry = of_detector.loc[pathology]
                row[pathology] = _with_interval(entry["dice"], entry["low"], entry["high"], digits=2)
                if np.isfinite(entry["published"]):
                    row[pathology] += f"; {_number(entry['published'], digits=2)}"
        rows.append(row)
    return markdown(pd.DataFrame(rows))


def _cohort_text(cohort: pd.DataFrame, facts: dict) -> str:
    """Describe the cohort, with lesion volumes and their sources."""
    rows = []
    for row in cohort.to_dict("records"):
        loads = [_number(row[f"load_{name}"], digits=1) for name in ("q1", "median", "q3")]
        rows.append(
            {
                "contrast": row["modality"],
                "group": row["group"],
                "n": str(row["n"]),
                "women": str(row["women"]),
                "age": f"{row['age_min']:.0f} to {row['age_max']:.0f}",
                "scanners": str(row["scanners"]),
                "on unseen scanners": str(row["unseen_scanner"]),
                "lesion volume, quartiles, mL": " / ".join(loads)
                if np.isfinite(row["load_median"])
                else "n/a",
            }
        )
    sources = "\n".join(f"- {name}: {each.source}" for name, each in PATHOLOGIES.items())
    trained = facts["trained_on_them"]
    return "\n\n".join(
        [
            markdown(pd.DataFrame(rows)),
            "A scanner is unseen if it is not in the training data of any of the models. "
            "Lesion volumes are drawn from log-normal distributions:",
            sources,
            f"Label maps: {', '.join(facts['label_maps'])}. "
            + (
                f"Trained on some of these anatomies: {', '.join(trained)}."
                if trained
                else "No model was trained on these anatomies."
            ),
        ]
    )


def _rank_text(ranks: pd.DataFrame) -> str:
    """Describe the mean ranks."""
    if ranks.empty:
        return "Not measured: fewer than five participants were scored by all detectors."
    lines = []
    for modality, own in ranks.groupby("modality"):
        first = own.iloc[0]
        p = "< 0.001" if first["p"] < 0.001 else f"= {first['p']:.3f}"
        lines.append(
            f"{modality}: {first['n']} participants with lesions, Friedman test p {p}; mean ranks that "
            f"differ by less than {first['cd']:.2f} do not differ significantly (Nemenyi, 5 %)."
        )
    return "\n\n".join(["![Mean ranks](benchmark/ranks.svg)", *lines])


def _missed_text(missed: pd.DataFrame) -> list[str]:
    """Describe lesions that all detectors miss."""
    return [
        f"{row['modality']}, {row['lesions']}: {100 * row['missed_fraction']:.0f} % of {row['n_lesions']} "
        f"lesions are missed by all {row['n_detectors']} detectors (with deviations)."
        for row in missed.to_dict("records")
    ]


def _scanner_text(subgroups: pd.DataFrame) -> str:
    """Tabulate false positives and Dice by properties of the acquisition, means of the eight detectors."""
    chosen = subgroups[
        subgroups["detector"].isin(EIGHT)
        & subgroups["factor"].isin(["manufacturer", "field_strength", "slices", "scanner_seen"])
        & subgroups["outcome"].isin(["fpr", "dice"])
    ]
    if chosen.empty:
        return "Not measured."
    keys = ["modality", "factor", "level", "outcome"]
    table = chosen.groupby(keys)["mean"].mean().unstack("outcome")
    table = table.map(lambda value: _number(value, digits=4)).reset_index()
    table["factor"] = table["factor"].str.replace("_", " ")
    names = {"modality": "contrast", "factor": "property", "level": "value"}
    table = table.rename(columns={**names, "dice": "Dice", "fpr": "healthy FPR"})
    note = "Means over the eight detectors; intervals and tests are in `subgroups.tsv`."
    return f"{note}\n\n{markdown(table)}"


def _variant_text(variants: pd.DataFrame) -> str:
    """Tabulate models with other training data."""
    if variants.empty:
        return "Data scaling (3, 10, 30 and 100 %) and the ablation of Disyre's anomalies: not measured."
    rows = [
        {
            "models": row["variant"],
            "contrast": row["modality"],
            "detector": detector_title(row["detector"]),
            "n": str(row["n"]),
            "Dice": _number(row["dice"]),
            "packaged models minus these (95 % interval)": _with_interval(
                row["gain"], row["low"], row["high"], signed=True
            ),
        }
        for row in variants.to_dict("records")
    ]
    return markdown(pd.DataFrame(rows))


def _real_text(real: pd.DataFrame | None) -> str:
    """Tabulate Dice of real scans."""
    command = (
        "`python -m benchmarks.real DATA REAL` and `python -m benchmarks.paper evaluate --real DATA REAL`"
    )
    if real is None or real.empty:
        return f"Not measured. {command} add them."
    parts = [
        f"Real scans with lesion masks ({command}), mean Dice at the fixed threshold, with interval; after "
        "the semicolon the published one. The participants are too few for verdicts."
    ]
    for modality in sorted(set(real["modality"])):
        own = real[real["modality"] == modality]
        counts = own.groupby("pathology")["n"].max()
        text = ", ".join(f"{name} {n}" for name, n in counts.items())
        parts += [f"{modality} (scans: {text}):", _dice_text(real, modality)]
    return "\n\n".join(parts)


def write_page(results: Path = RESULTS, docs: Path = DOCS) -> None:
    """Draw the figures, and write the page.

    Parameters
    ----------
    results : pathlib.Path
        Folder of the tables.
    docs : pathlib.Path
        Folder of the documentation.
    """
    tables, facts = read_results(results)
    draw_figures(tables, docs / "benchmark")
    (docs / "benchmark.md").write_text(compose_page(tables, facts), encoding="utf-8")
