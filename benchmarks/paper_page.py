"""Figures and text of docs/benchmark.md, from the tables of ``benchmarks/results/paper``."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.paper_claims import (
    CLAIMS,
    EIGHT,
    NOT_REPRODUCED,
    PATHOLOGIES,
    REPRODUCED,
    RESULTS,
    SMALL_DICE,
    UNDECIDED,
)
from benchmarks.simulated import markdown
from bids_uad.evaluation.deviations import NORMATIVE
from bids_uad.methods.registry import DETECTORS

DOCS = Path(__file__).parents[1] / "docs"
MODALITY_COLOURS = {"T1w": "#0072B2", "T2w": "#D55E00"}
FOREST = {
    "threshold": "Loss of Dice\nby the fixed threshold",
    "scanner": "Dice, seen minus\nunseen scanners",
    "age": "Odds ratio of a false\npositive per 10 years",
    "sex": "Odds ratio of a false\npositive, male to female",
    "load": "Voxels found, small\nminus larger loads",
    "contrast": "Lesions found, low\nminus higher contrast",
    "deviation": "AUPRC, deviations\nminus scores",
}
"""Claims with an estimate for each detector, and titles of their panels."""
FOREST_TEXT = [
    "![Estimates of each detector](benchmark/detectors.svg)",
    "The same numbers for each detector. Bars are 95 % intervals.",
]
NO_FIGURE = {
    "deviation": "open question",
    "ranking": "1 (its own order)",
    "ablation": "no figure known",
    "independent": "no figure known",
}
"""Text in place of a published figure."""


def title(detector: str) -> str:
    """Return the name of a detector in text."""
    name = detector.removesuffix(NORMATIVE)
    text = DETECTORS[name].title if name in DETECTORS else name
    return f"{text}, deviations" if detector.endswith(NORMATIVE) else text


def _number(value: float, *, signed: bool = False, digits: int = 3) -> str:
    if not np.isfinite(value):
        return "n/a"
    return f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"


def _estimate(row: pd.Series) -> str:
    """Write an estimate with its interval; logarithms as ratios."""
    if not np.isfinite(row["value"]):
        return "not measured"
    numbers = [row["value"], row["low"], row["high"]]
    ratio = CLAIMS[row["claim"]].ratio
    value, low, high = np.exp(numbers) if ratio else numbers
    text = _number(value, digits=2 if ratio else 3)
    if np.isfinite(low):
        text += f" ({_number(low, digits=2 if ratio else 3)} to {_number(high, digits=2 if ratio else 3)})"
    return text


def claims_markdown(claims: pd.DataFrame) -> str:
    """Write the table of claims and verdicts.

    Parameters
    ----------
    claims : pandas.DataFrame
        Result of :func:`benchmarks.paper_claims.estimate`.

    Returns
    -------
    str
        Markdown, one row for each claim and contrast.
    """
    lines = [
        "| claim | contrast | published | ours (95 % interval) | n | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for row in claims[claims["detector"].isna() | (claims["detector"] == "")].to_dict("records"):
        claim = CLAIMS[row["claim"]]
        published = _number(row["published"]) if np.isfinite(row["published"]) else "stated without a figure"
        published = {"deviation": "open question", "ranking": "1 (its own order)"}.get(
            row["claim"], published
        )
        cells = [f"{claim.title}: {claim.measure}", row["modality"], published, _estimate(row)]
        cells += [str(int(row["n"])), f"**{row['verdict']}**"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _wide(table: pd.DataFrame, modality: str) -> pd.DataFrame:
    """Arrange Dice by detector and pathology: ours / published, at the fixed threshold."""
    own = table[table["modality"] == modality]
    rows = []
    for name in [*EIGHT, *sorted(set(own["detector"]) - set(EIGHT))]:
        of_detector = own[own["detector"] == name].set_index("pathology")
        if of_detector.empty:
            continue
        row = {"detector": title(name)}
        for pathology in sorted(set(own["pathology"])):
            if pathology not in of_detector.index:
                row[pathology] = "n/a"
                continue
            entry = of_detector.loc[pathology]
            text = _number(entry["dice"], digits=2)
            if np.isfinite(entry["low"]):
                text += f" ({_number(entry['low'], digits=2)} to {_number(entry['high'], digits=2)})"
            if np.isfinite(entry.get("published", np.nan)):
                text += f"; {_number(entry['published'], digits=2)}"
            row[pathology] = text
        rows.append(row)
    return pd.DataFrame(rows)


def read_results(results: Path = RESULTS) -> tuple[dict[str, pd.DataFrame], dict]:
    """Read the tables of the study.

    Parameters
    ----------
    results : pathlib.Path
        Folder of the tables.

    Returns
    -------
    tables : dict of str to pandas.DataFrame
        Tables by name; those without rows have none.
    facts : dict
        Contents of study.json.
    """
    tables = {}
    for path in sorted(results.glob("*.tsv")):
        tables[path.stem] = pd.read_csv(path, sep="\t", keep_default_na=False, na_values=["n/a", ""])
    return tables, json.loads((results / "study.json").read_text())


def page(tables: dict[str, pd.DataFrame], facts: dict) -> str:
    """Write the page.

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
    claims, cohort = tables["claims"], tables["cohort"]
    overall = claims[claims["detector"].isna()]
    counts = overall["verdict"].value_counts()
    scored = ", ".join(f"{n} with {modality}" for modality, n in sorted(facts["scored"].items()))
    planned = facts["planned"]
    partial = max(facts["scored"].values()) < planned or len(facts["scored"]) < 2
    sections = [
        INTRODUCTION,
        f"Participants scored: {scored}, of {planned} planned. "
        + (
            "**The cohort is not complete.** These are the participants scored so far, in an order in which "
            "every first part has all groups; the first of the commands below continues where it ended."
            if partial
            else "The cohort is complete."
        ),
        COMMANDS,
        "## Verdicts",
        RULE,
        f"Of {len(overall)} rows: {counts.get(REPRODUCED, 0)} reproduced, {counts.get(NOT_REPRODUCED, 0)} "
        f"not reproduced, {counts.get(UNDECIDED, 0)} cannot be told, of which "
        f"{int(overall['value'].isna().sum())} are not measured.",
        claims_markdown(claims),
        *(FOREST_TEXT if claims["detector"].notna().any() else []),
        "## Cohort",
        _cohort_text(cohort, facts),
        "## Dice",
        "Mean Dice at the fixed threshold of the model, with its interval; after the semicolon the published "
        "mean Dice of the cohorts with this pathology.",
    ]
    for modality in sorted(set(tables["dice"]["modality"])):
        sections += [f"### {modality}", markdown(_wide(tables["dice"], modality))]
    if len(tables["dice"]):
        sections += ["![Dice of each detector and pathology](benchmark/dice.svg)"]
    sections += ["## Ranking", _rank_text(tables["ranks"])]
    sections += ["## Lesion load and contrast", LESIONS]
    sections += ["![Lesions found](benchmark/lesions.svg)"] if len(tables["lesions"]) else []
    sections += _missed(tables["missed"])
    sections += ["## Scanners", *_scanner_text(tables["subgroups"])]
    sections += ["## Other training data", _variant_text(tables["variants"])]
    sections += ["## Real scans", _real_text(tables.get("real"))]
    sections += ["## What simulation can and cannot show", LIMITS]
    return "\n\n".join(section.strip() for section in sections) + "\n"


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


def _cohort_text(cohort: pd.DataFrame, facts: dict) -> str:
    """Describe the cohort, with lesion volumes and their sources."""
    rows = []
    for row in cohort.to_dict("records"):
        load = "n/a"
        if np.isfinite(row["load_median"]):
            load = " / ".join(_number(row[f"load_{name}"], digits=1) for name in ("q1", "median", "q3"))
        rows.append(
            {
                "contrast": row["modality"],
                "group": row["group"],
                "n": str(row["n"]),
                "women": str(row["women"]),
                "age": f"{row['age_min']:.0f} to {row['age_max']:.0f}",
                "scanners": str(row["scanners"]),
                "on unseen scanners": str(row["unseen_scanner"]),
                "lesion volume, quartiles, mL": load,
            }
        )
    sources = "\n".join(f"- {name}: {each.source}" for name, each in PATHOLOGIES.items())
    text = markdown(pd.DataFrame(rows))
    text += "\n\nA scanner is unseen if it is not in the training data of any of the models. "
    text += f"Lesion volumes are drawn from log-normal distributions:\n\n{sources}\n\n"
    text += f"Label maps: {', '.join(facts['label_maps'])}. "
    trained = facts["trained_on_them"]
    text += (
        f"Trained on some of these anatomies: {', '.join(trained)}."
        if trained
        else "No model was trained on these anatomies."
    )
    return text


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


def _missed(missed: pd.DataFrame) -> list[str]:
    """Describe lesions that all detectors miss."""
    return [
        f"{row['modality']}, {row['lesions']}: {100 * row['missed_fraction']:.0f} % of {row['n_lesions']} "
        f"lesions are missed by all {row['n_detectors']} detectors (with deviations)."
        for row in missed.to_dict("records")
    ]


def _scanner_text(subgroups: pd.DataFrame) -> list[str]:
    """Tabulate false positives and Dice by properties of the acquisition, means of the eight detectors."""
    chosen = subgroups[
        subgroups["detector"].isin(EIGHT)
        & subgroups["factor"].isin(["manufacturer", "field_strength", "slices", "scanner_seen"])
        & subgroups["outcome"].isin(["fpr", "dice"])
    ]
    if chosen.empty:
        return ["Not measured."]
    keys = ["modality", "factor", "level", "outcome"]
    table = chosen.groupby(keys)["mean"].mean().unstack("outcome").reset_index()
    table["factor"] = table["factor"].str.replace("_", " ")
    names = {
        "modality": "contrast",
        "factor": "property",
        "level": "value",
        "dice": "Dice",
        "fpr": "healthy FPR",
    }
    table = table.rename(columns=names).rename_axis(None, axis=1)
    for column in ("Dice", "healthy FPR"):
        if column in table:
            table[column] = [_number(value, digits=4) for value in table[column]]
    return ["Means over the eight detectors; intervals and tests are in `subgroups.tsv`.", markdown(table)]


def _variant_text(variants: pd.DataFrame) -> str:
    """Tabulate models with other training data."""
    if variants.empty:
        return "Data scaling (3, 10, 30 and 100 %) and the ablation of Disyre's anomalies: not measured."
    rows = [
        {
            "models": row["variant"],
            "contrast": row["modality"],
            "detector": title(row["detector"]),
            "n": str(row["n"]),
            "Dice": _number(row["dice"]),
            "packaged models minus these (95 % interval)": f"{_number(row['gain'], signed=True)} "
            f"({_number(row['low'], signed=True)} to {_number(row['high'], signed=True)})",
        }
        for row in variants.to_dict("records")
    ]
    return markdown(pd.DataFrame(rows))


def _real_text(real: pd.DataFrame | None) -> str:
    """Tabulate Dice of real scans."""
    command = (
        "`python -m benchmarks.real DATA REAL` and `python -m benchmarks.paper evaluate OUT --real DATA REAL`"
    )
    if real is None or real.empty:
        return f"Not measured. {command} add them."
    parts = [
        f"Real scans with manual lesion masks ({command}), mean Dice at the fixed threshold; after the "
        "semicolon the published one. The participants are too few for verdicts."
    ]
    for modality in sorted(set(real["modality"])):
        own = real[real["modality"] == modality]
        counts = own.groupby("pathology")["n"].max()
        text = ", ".join(f"{name} {n}" for name, n in counts.items())
        parts += [f"{modality} (scans: {text}):", markdown(_wide(real, modality))]
    return "\n\n".join(parts)


def draw_figures(tables: dict[str, pd.DataFrame], folder: Path) -> None:
    """Draw the figures of the page.

    Parameters
    ----------
    tables : dict of str to pandas.DataFrame
        Tables of the study.
    folder : pathlib.Path
        Folder of the SVG files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The same tables give the same files.
    matplotlib.rcParams.update({"svg.hashsalt": "bids_uad", "font.size": 8, "axes.spines.top": False})
    parts = {"claims": _draw_forest, "dice": _draw_dice, "lesions": _draw_lesions, "ranks": _draw_ranks}
    for name, draw in parts.items():
        path = folder / f"{'detectors' if name == 'claims' else name}.svg"
        path.unlink(missing_ok=True)
        if len(tables[name]) and (name != "claims" or tables[name]["detector"].notna().any()):
            draw(tables[name]).savefig(path, metadata={"Date": None}, bbox_inches="tight")


def _draw_forest(claims: pd.DataFrame) -> Figure:
    """Draw the estimates of each detector, one panel for each claim."""
    figure = Figure(figsize=(12, 3.2))
    axes = figure.subplots(1, len(FOREST), sharey=True)
    names = list(EIGHT)
    for axis, (claim, text) in zip(axes, FOREST.items(), strict=True):
        ratio = CLAIMS[claim].ratio
        for shift, (modality, colour) in zip((-0.15, 0.15), MODALITY_COLOURS.items(), strict=True):
            own = claims[(claims["claim"] == claim) & (claims["modality"] == modality)]
            for row in own[own["detector"].isin(names)].to_dict("records"):
                place = names.index(row["detector"]) + shift
                value, low, high = (
                    np.exp(row[key]) if ratio else row[key] for key in ("value", "low", "high")
                )
                axis.plot([low, high], [place, place], color=colour, linewidth=1.2)
                axis.plot(value, place, "o", color=colour, markersize=3.5)
        axis.axvline(1.0 if ratio else 0.0, color="#888888", linewidth=0.8)
        axis.set_title(text, fontsize=8)
        axis.spines["right"].set_visible(False)
    axes[0].set_yticks(range(len(names)), [title(name) for name in names])
    axes[0].invert_yaxis()
    handles = [
        matplotlib.lines.Line2D([], [], color=c, marker="o", markersize=3.5)
        for c in MODALITY_COLOURS.values()
    ]
    figure.legend(
        handles, MODALITY_COLOURS, loc="lower center", ncols=2, frameon=False, bbox_to_anchor=(0.5, -0.08)
    )
    return figure


def _draw_dice(dice: pd.DataFrame) -> Figure:
    """Draw Dice at the fixed and best threshold, and the published one."""
    cells = list(dict.fromkeys(zip(dice["modality"], dice["pathology"], strict=True)))
    figure = Figure(figsize=(2.1 * max(len(cells), 2), 3.6))
    axes = np.atleast_1d(figure.subplots(1, len(cells), sharey=True, sharex=True))
    names = [*EIGHT, *sorted({name for name in dice["detector"] if NORMATIVE not in name} - set(EIGHT))]
    for axis, (modality, pathology) in zip(axes, cells, strict=True):
        own = dice[(dice["modality"] == modality) & (dice["pathology"] == pathology)]
        for row in own[own["detector"].isin(names)].to_dict("records"):
            place, colour = names.index(row["detector"]), DETECTORS[row["detector"]].colour
            axis.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=1.2)
            axis.plot(row["dice"], place, "o", color=colour, markersize=4)
            axis.plot(row["dice_best"], place, "o", color=colour, markersize=4, fillstyle="none")
            axis.plot(row["published"], place, "x", color="#444444", markersize=4)
        axis.set_title(f"{modality}\n{pathology}", fontsize=8)
        axis.spines["right"].set_visible(False)
        axis.set_xlabel("Dice")
    axes[0].set_yticks(range(len(names)), [title(name) for name in names])
    axes[0].invert_yaxis()
    marks = {
        "fixed threshold (95 % interval)": ("o", "full"),
        "best threshold": ("o", "none"),
        "published": ("x", "full"),
    }
    handles = [
        matplotlib.lines.Line2D(
            [], [], color="#444444", marker=marker, fillstyle=fill, linestyle="none", markersize=4
        )
        for marker, fill in marks.values()
    ]
    figure.legend(handles, marks, loc="lower center", ncols=3, frameon=False, bbox_to_anchor=(0.5, -0.08))
    return figure


def _draw_lesions(lesions: pd.DataFrame) -> Figure:
    """Draw the fraction of lesions found by lesion load, volume and contrast."""
    factors = [
        name for name in ("lesion load", "lesion volume", "lesion contrast") if name in set(lesions["factor"])
    ]
    modalities = sorted(set(lesions["modality"])) or ["T2w"]
    figure = Figure(figsize=(9, 2.6 * len(modalities)))
    axes = figure.subplots(len(modalities), max(len(factors), 1), sharey=True, squeeze=False)
    for line, modality in zip(axes, modalities, strict=True):
        for axis, factor in zip(line, factors, strict=False):
            own = lesions[(lesions["modality"] == modality) & (lesions["factor"] == factor)]
            levels = list(dict.fromkeys(own["level"]))
            for name in EIGHT:
                part = own[own["detector"] == name].set_index("level")["lesion_sensitivity"].reindex(levels)
                if part.notna().any():
                    axis.plot(
                        range(len(levels)),
                        part,
                        "o-",
                        color=DETECTORS[name].colour,
                        markersize=3,
                        label=title(name),
                    )
            axis.set_xticks(range(len(levels)), [text.replace(" ", "\n", 1) for text in levels], fontsize=7)
            axis.set_title(f"{modality}, {factor}", fontsize=8)
            axis.spines["right"].set_visible(False)
        line[0].set_ylabel("lesions found")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="lower center", ncols=8, frameon=False, bbox_to_anchor=(0.5, -0.08)
        )
    figure.tight_layout()
    return figure


def _draw_ranks(ranks: pd.DataFrame) -> Figure:
    """Draw mean ranks, with a bar of the length of the critical difference from the best."""
    modalities = sorted(set(ranks["modality"]))
    figure = Figure(figsize=(8, 2.4 * len(modalities)))
    axes = np.atleast_1d(figure.subplots(len(modalities), 1, sharex=True))
    for axis, modality in zip(axes, modalities, strict=True):
        own = ranks[ranks["modality"] == modality].sort_values("mean_rank").reset_index(drop=True)
        best, distance = own["mean_rank"].iloc[0], own["cd"].iloc[0]
        axis.axvspan(best, best + distance, color="#DDDDDD", label="not significantly worse than the first")
        for place, row in own.iterrows():
            colour = DETECTORS[row["detector"]].colour
            axis.plot(row["mean_rank"], place, "o", color=colour, markersize=5)
        axis.set_yticks(range(len(own)), [title(name) for name in own["detector"]])
        axis.invert_yaxis()
        axis.set_title(f"{modality}, {own['n'].iloc[0]} participants", fontsize=8)
        axis.spines["right"].set_visible(False)
    axes[-1].set_xlabel("mean rank in Dice")
    axes[0].legend(frameon=False, loc="lower left", fontsize=7)
    figure.tight_layout()
    return figure


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
    (docs / "benchmark.md").write_text(page(tables, facts), encoding="utf-8")
