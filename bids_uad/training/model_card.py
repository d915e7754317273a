"""The text that travels with a bundle: what it has learnt from, and how well it did on validation scans."""

from __future__ import annotations

from textwrap import fill
from typing import Any

from bids_uad.config import RunConfig

VALIDATION = "\n## Validation\n"
POOR_DICE = 0.1


def model_card(config: RunConfig, training: dict[str, Any], parameters: int) -> str:
    """Write what a bundle has learnt from.

    Parameters
    ----------
    config : RunConfig
    training : dict
        As in ``bundle.json``.
    parameters : int
        Numbers in the weights that training set.

    Returns
    -------
    str
        Text of ``MODEL_CARD.md``, without its validation.
    """
    ages = training["age_range"]
    sexes = ", ".join(f"{count} {sex}" for sex, count in (training["sex"] or {}).items())
    stages = "\n".join(
        "- " + ", ".join(f"{key} {value}" for key, value in stage.items()) for stage in training["stages"]
    )
    changes = f" --hyper {' '.join(config.hyper)}" if config.hyper else ""
    if config.synthetic:
        changes += f" \\\n        --synthetic {config.synthetic}"
        changes += " --labelmaps PATH" if config.label_maps else ""
    changes += " --contrast-transfer" if config.contrast_transfer else ""
    if "backbone" in training:
        changes += f" \\\n        --backbone-weights MODELS/{training['backbone']['bundle']}"
    return f"""# {config.detector} for {config.modality}, preset {config.preset}

Research software, not for clinical use.

A detector of anomalies in skull-stripped {config.modality} scans on the SRI24 grid, with {parameters:,}
trained numbers. It has only seen healthy brains.

## Training

- Source: {training["source"]}; licence of the scans: {training["licence"]}
- {training["n_scans"]} scans of {training["n_subjects"]} subjects, {training["n_slices"]} slices
- Age: {_years(ages)}
- Sex: {sexes or "not given"}
- Scanners: {", ".join(training["scanners"] or ["not given"])}
- Anatomies of synthetic scans: {", ".join(training["anatomies"] or ["none is synthetic"])}
- Seed {training["seed"]}, {training["minutes"]} minutes on {training["device"]} in {training["precision"]},
  torch {training["torch"]}

{stages}

## Make it again

    bids_uad train DERIVATIVES MODELS --detector {config.detector} --modality {config.modality} \\
        --preset {config.preset} --random-seed {config.random_seed}{changes}
    bids_uad calibrate VALIDATION MODELS --detector {config.detector} --modality {config.modality} \\
        --preset {config.preset}
"""


def _failures(calibration: dict[str, Any]) -> str:
    """What a model is known to fail at, from its validation."""
    default = calibration["default_threshold"]
    missed = [
        f"- Finds little of {kind}: mean Dice {found['mean_dice'][default]:.3f} in {found['n']} scans."
        for kind, found in calibration["validation"]["by_kind"].items()
        if found["mean_dice"][default] < POOR_DICE
    ]
    always = [
        "- Children, contrast agents, post-mortem scans and other sequences are outside what it has seen.",
        "- What is rare and harmless (large perivascular spaces, cysts, remnants of skull) scores high, too.",
    ]
    return "\n".join([*missed, *always])


def _deviations(calibration: dict[str, Any]) -> str:
    """What is known of the deviations from a normative reference, where there is one."""
    if "normative" not in calibration:
        return ""
    normative = calibration["normative"]
    ages = normative["reference"]["covariates"]["age_range"]
    default = normative["default_threshold"]
    rate = normative["validation"]["healthy_fpr"][default]
    others = ""
    if "cohort" in normative:
        cohort = normative["cohort"]
        others = f" {cohort['n_subjects']} of them are there for that alone ({cohort['source']})."
    text = (
        f"A normative reference of {normative['n_healthy_subjects']} healthy people (age {_years(ages)}) "
        f"turns scores into deviations (`--deviation normative`).{others} The threshold `{default}` of "
        f"deviations is {normative['thresholds'][default]:.4g}; above it are {100 * rate:.2f} % of healthy "
        "voxels, each person judged by the others."
    )
    return f"\n{fill(text, 80)}\n"


def _years(ages: list[float] | None) -> str:
    return f"{ages[0]:.0f} to {ages[1]:.0f} years" if ages else "not given"


def add_validation(card: str, calibration: dict[str, Any]) -> str:
    """Put the figures of a calibration at the end of a card, in place of earlier ones.

    Parameters
    ----------
    card : str
    calibration : dict
        As in ``calibration.json``.

    Returns
    -------
    str
    """
    figures = calibration["validation"]

    def percent(name: str) -> str:
        return f"{100 * figures['healthy_fpr'][name]:.2f} %" if name in figures["healthy_fpr"] else "unknown"

    def dice(name: str) -> str:
        return f"{figures['mean_dice'][name]:.3f}" if name in figures["mean_dice"] else "unknown"

    empty = ""
    if figures.get("n_empty_mask"):
        empty = f"\nScans of patients with an empty lesion mask, left out of them: {figures['n_empty_mask']}."
    rows = "\n".join(
        f"| {name}{' (default)' if name == calibration['default_threshold'] else ''} | {value:.4g} "
        f"| {percent(name)} | {dice(name)} |"
        for name, value in calibration["thresholds"].items()
    )
    return f"""{card.split(VALIDATION)[0]}{VALIDATION}
Source: {calibration["cohort"]["source"]}; {figures["n_healthy"]} healthy scans and {figures["n_lesion"]} with
lesions. The thresholds were fixed on these very scans.{empty}

| threshold | value | healthy voxels above it | mean Dice |
|---|---|---|---|
{rows}
{_deviations(calibration)}
## Known failures

{_failures(calibration)}
"""
