"""Model card of a bundle: training data, how to reproduce it, and results on validation scans."""

from __future__ import annotations

from textwrap import fill
from typing import Any

from bids_uad.config import RunConfig

VALIDATION = "\n## Validation\n"
POOR_DICE = 0.1


def model_card(config: RunConfig, training: dict[str, Any], parameters: int) -> str:
    """Write the model card of a trained bundle, without results on validation scans.

    Parameters
    ----------
    config : RunConfig
        Settings of the training.
    training : dict
        Section ``training`` of ``bundle.json``.
    parameters : int
        Number of trained parameters.

    Returns
    -------
    str
        Text of ``MODEL_CARD.md``.
    """
    ages = training["age_range"]
    sexes = ", ".join(f"{count} {sex}" for sex, count in (training["sex"] or {}).items())
    stages = "\n".join(
        "- " + ", ".join(f"{key} {value}" for key, value in stage.items()) for stage in training["stages"]
    )
    return f"""# {config.detector} for {config.modality}, preset {config.preset}

Research software, not for clinical use.

A detector of anomalies in skull-stripped {config.modality} scans on the SRI24 grid, with {parameters:,}
trained parameters. Training data are scans of healthy controls only.

## Training

- Source: {training["source"]}; licence of the scans: {training["licence"]}
- {training["n_scans"]} scans of {training["n_subjects"]} subjects, {training["n_slices"]} slices
- Age: {_years(ages)}
- Sex: {sexes or "not given"}
- Scanners: {", ".join(training["scanners"] or ["not given"])}
- Label maps of simulated scans: {", ".join(training["anatomies"] or ["no simulated scans"])}
- Seed {training["seed"]}, {training["minutes"]} minutes on {training["device"]} in {training["precision"]},
  torch {training["torch"]}
{_sources(training)}
{stages}

## Reproduce

    bids_uad train DERIVATIVES MODELS --detector {config.detector} --modality {config.modality} \\
        --preset {config.preset} --random-seed {config.random_seed}{_options(config, training)}
    bids_uad calibrate VALIDATION MODELS --detector {config.detector} --modality {config.modality} \\
        --preset {config.preset}
"""


def _options(config: RunConfig, training: dict[str, Any]) -> str:
    """Return the options of a training that differ from the defaults."""
    lines = [f" --hyper {' '.join(config.hyper)}" if config.hyper else ""]
    if config.steps or config.batch_size:
        values = {"--steps": config.steps, "--batch-size": config.batch_size}
        lines.append(" ".join(f"{name} {value}" for name, value in values.items() if value))
    if config.synthetic:
        lines.append(f"--synthetic {config.synthetic}" + " --labelmaps PATH" * bool(config.label_maps))
    if config.contrast_transfer:
        lines.append("--contrast-transfer")
    if config.lesion_masks:
        lines.append("--lesion-masks PATH")
    if "backbone" in training:
        lines.append(f"--backbone-weights MODELS/{training['backbone']['bundle']}")
    elif config.backbone_weights:
        lines.append("--backbone-weights PATH" + " --force" * config.force)
    if training["precision"] != "fp32":
        lines.append(f"--precision {training['precision']}")
    return " \\\n        ".join(lines)


def _sources(training: dict[str, Any]) -> str:
    """List what else a detector was trained with: shapes of lesions, and the weights of another bundle."""
    lines = []
    if "lesion_shapes" in training:
        lines += [
            f"- Shapes of half of the large synthetic lesions: {training['lesion_shapes']} components of",
            "  real lesion masks. Intensities of real lesions were not used.",
        ]
    if "backbone" in training:
        other = training["backbone"]
        lines.append(f"- Weights at the start: {other['bundle']} (SHA-256 {other['sha256'][:12]})")
    return "".join(f"{line}\n" for line in lines)


def _failures(calibration: dict[str, Any]) -> str:
    """List the known limits of a model, from its validation and in general."""
    default = calibration["default_threshold"]
    poor = [
        f"- Low sensitivity to {kind}: mean Dice {found['mean_dice'][default]:.3f} in {found['n']} scans."
        for kind, found in calibration["validation"]["by_kind"].items()
        if found["mean_dice"][default] < POOR_DICE
    ]
    always = [
        "- Children, contrast agents, post-mortem scans and other sequences are not in the training data.",
        "- Rare benign findings (large perivascular spaces, cysts, remnants of skull) also have high scores.",
    ]
    return "\n".join([*poor, *always])


def _rule(calibration: dict[str, Any], maps: str) -> str:
    """Describe the decision rule for one kind of maps, if there is one."""
    if "rule" not in calibration:
        return ""
    rule, figures = calibration["rule"], calibration["validation"]["rule"]
    threshold = calibration["thresholds"][calibration["default_threshold"]]
    holes = {
        "none": "holes are not filled",
        "3d": "cavities are filled",
        "axial": "holes of each axial slice are filled",
    }[rule["holes"]]
    volume = f"at least {rule['min_volume_mm3']:g} mm3 and " if rule["min_volume_mm3"] else ""
    text = (
        f"Decision rule for {maps}: components of voxels above {rule['low_threshold']:.4g} that have {volume}"
        f"a voxel above {threshold:.4g}; {holes}. "
        f"On these scans {_rule_figures(figures)}. Estimate for other scans (each subject with the rule "
        f"that is chosen without it): {_rule_figures(figures['left_out'])}."
    )
    return f"\n{fill(text, 80)}\n{_classes(figures)}"


def _rule_figures(figures: dict[str, Any]) -> str:
    f1 = "" if figures["lesion_f1"] is None else f", lesion-wise F1 {figures['lesion_f1']:.3f}"
    healthy = ""
    if figures["healthy_median"] is not None:
        healthy = (
            f", {100 * figures['healthy_median']:.2f} % of a healthy brain marked (median; 95th percentile "
            f"{100 * figures['healthy_p95']:.2f} %)"
        )
    return f"mean Dice {figures['dice']:.3f}{f1}{healthy}"


def _kinds(calibration: dict[str, Any]) -> str:
    """Return the table of mean Dice by type of lesion, at the default threshold."""
    default = calibration["default_threshold"]
    rows = [
        f"| {kind} | {found['n']} | {found['mean_dice'][default]:.3f} |"
        for kind, found in calibration["validation"]["by_kind"].items()
    ]
    return _table("| lesions | scans | mean Dice |", rows)


def _classes(figures: dict[str, Any]) -> str:
    """Return the tables of results by volume of the lesions and by age of healthy controls."""
    volumes = [
        f"| {_interval(row, 'mL')} | {row['n']} | {row['mean_dice']:.3f} | {row['median_dice']:.3f} "
        f"| {_number(row['mean_lesion_f1'])} |"
        for row in figures["by_volume"]
    ]
    ages = [
        f"| {_interval(row, 'years')} | {row['n']} | {100 * row['median_marked']:.2f} % "
        f"| {100 * row['mean_marked']:.2f} % |"
        for row in figures["by_age"]
    ]
    return _table(
        "| lesions of a scan | scans | mean Dice | median Dice | mean lesion-wise F1 |", volumes
    ) + _table("| age of healthy controls | scans | marked, median | marked, mean |", ages)


def _interval(row: dict[str, Any], unit: str) -> str:
    if row["to"] is None:
        return f"at least {row['from']} {unit}"
    return f"below {row['to']} {unit}" if not row["from"] else f"{row['from']} to {row['to']} {unit}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(header: str, rows: list[str]) -> str:
    """Return a table with an empty line before it; nothing if it has no rows."""
    if not rows:
        return ""
    return "\n".join(["", header, "|---" * (header.count("|") - 1) + "|", *rows, ""])


def _deviations(calibration: dict[str, Any]) -> str:
    """Describe the normative reference, if there is one."""
    if "normative" not in calibration:
        return ""
    normative = calibration["normative"]
    ages = normative["reference"]["covariates"]["age_range"]
    default = normative["default_threshold"]
    rate = normative["validation"]["healthy_fpr"][default]
    others = ""
    if "cohort" in normative:
        cohort = normative["cohort"]
        others = f" {cohort['n_subjects']} of them are used for the reference only ({cohort['source']})."
    text = (
        f"A normative reference of {normative['n_healthy_subjects']} controls (age {_years(ages)}) "
        f"converts scores to deviations (`--deviation normative`).{others} The threshold `{default}` of "
        f"deviations is {normative['thresholds'][default]:.4g}; {100 * rate:.2f} % of healthy voxels are "
        "above it (leave-one-out)."
    )
    rule = _kinds(normative) + _rule(normative, "deviations")
    if "default_deviation" in calibration:
        default = "deviations" if calibration["default_deviation"] == "normative" else "scores"
        rule += f"\nMasks are computed from {default} by default.\n"
    return f"\n{fill(text, 80)}\n{rule}"


def _years(ages: list[float] | None) -> str:
    return f"{ages[0]:.0f} to {ages[1]:.0f} years" if ages else "not given"


def add_validation(card: str, calibration: dict[str, Any]) -> str:
    """Append the results of a calibration to a card, in place of earlier ones.

    Parameters
    ----------
    card : str
        Text of ``MODEL_CARD.md``.
    calibration : dict
        Contents of ``calibration.json``.

    Returns
    -------
    str
        Text with the sections Validation and Known failures.
    """
    figures = calibration["validation"]

    def percent(name: str) -> str:
        return f"{100 * figures['healthy_fpr'][name]:.2f} %" if name in figures["healthy_fpr"] else "unknown"

    def dice(name: str) -> str:
        return f"{figures['mean_dice'][name]:.3f}" if name in figures["mean_dice"] else "unknown"

    empty = ""
    if figures.get("n_empty_mask"):
        empty = f"\nScans of patients with an empty lesion mask, not used: {figures['n_empty_mask']}."
    rows = "\n".join(
        f"| {name}{' (default)' if name == calibration['default_threshold'] else ''} | {value:.4g} "
        f"| {percent(name)} | {dice(name)} |"
        for name, value in calibration["thresholds"].items()
    )
    return f"""{card.split(VALIDATION)[0]}{VALIDATION}
Source: {calibration["cohort"]["source"]}; {figures["n_healthy"]} scans of healthy controls,
{figures["n_lesion"]} with lesions. The thresholds were determined on the same scans.{empty}

| threshold | value | healthy voxels above it | mean Dice |
|---|---|---|---|
{rows}
{_kinds(calibration)}{_rule(calibration, "scores")}{_deviations(calibration)}
## Known failures

{_failures(calibration)}
"""
