"""Bundles on disk: round trip, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bids_uad.calibration.thresholds import DecisionRule, HealthyMarked
from bids_uad.config import MODALITIES
from bids_uad.engine.bundle import (
    DEFAULT_MODELS,
    NORMATIVE,
    PACKAGED,
    Bundle,
    bundle_hyper,
    load_bundle,
    load_detector,
    not_finite,
    packaged_bundles,
    resolve_bundles,
    save_bundle,
)
from bids_uad.errors import ModelError
from bids_uad.files import file_sha256, write_json
from bids_uad.methods.patchcore import PatchCore
from bids_uad.methods.registry import DETECTORS
from bids_uad.networks.backbones import BackboneConfig

TINY = replace(PatchCore.presets["lite"], backbone=BackboneConfig(widths=(4, 8, 8, 16)), bank_size=16)
CALIBRATION = {
    "thresholds": {"max_dice": 0.5, "fpr_1pct": 0.7},
    "default_threshold": "max_dice",
    "bin_edges": [0.0, 0.5, 0.7],
}
RULE = {"low_threshold": 0.25, "min_volume_mm3": 10.0, "holes": "axial"}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    detector = PatchCore(TINY)
    detector.bank.normal_()
    path = tmp_path / "patchcore-T1w-tiny"
    save_bundle(path, detector, preset="tiny", modality="T1w", training={"n_scans": 1}, card="# Card\n")
    write_json(path / "calibration.json", CALIBRATION)
    return path


def edit(path, **changes):
    """Change some keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_rule_of_a_bundle_is_a_plain_threshold_unless_it_has_another(folder):
    assert load_bundle(folder).rule == DecisionRule(0.5)
    assert load_bundle(folder).default_deviation == "none"
    edit(folder / "calibration.json", rule=RULE)
    bundle = load_bundle(folder)
    assert bundle.rule == DecisionRule(0.5, 0.25, 10.0, "axial")
    assert replace(bundle, min_component_volume=0.0).rule == DecisionRule(0.5, 0.25, 0.0, "axial")


def test_marked_fraction_of_healthy_scans_is_that_of_the_default_threshold_or_rule(folder):
    assert load_bundle(folder).healthy_marked == HealthyMarked()
    validation = {
        "healthy_fpr": {"max_dice": 0.01, "fpr_1pct": 0.009},
        "healthy_p95": {"max_dice": 0.03, "fpr_1pct": 0.02},
    }
    edit(folder / "calibration.json", validation=validation)
    assert load_bundle(folder).healthy_marked == HealthyMarked(0.01, 0.03)
    edit(folder / "calibration.json", validation=validation | {"rule": {"healthy_p95": 0.008}}, rule=RULE)
    assert load_bundle(folder).healthy_marked == HealthyMarked(0.01, 0.008)


def test_deviation_by_default_is_that_of_the_calibration(folder):
    """Without one, it is that of the detector; without a normative reference, there are only scores."""
    info, calibration = load_bundle(folder).info, {**CALIBRATION, "default_deviation": "normative"}
    assert Bundle(folder, info, calibration).default_deviation == "none"
    calibration[NORMATIVE] = CALIBRATION
    assert Bundle(folder, info, calibration).default_deviation == "normative"
    pls = info | {"detector": "pls"}
    assert Bundle(folder, pls, {**CALIBRATION, NORMATIVE: CALIBRATION}).default_deviation == "normative"
    assert Bundle(folder, pls, calibration | {"default_deviation": "none"}).default_deviation == "none"


def test_a_detector_survives_the_round_trip(folder):
    found = load_bundle(folder)
    detector = load_detector(found)
    assert detector.hyper == TINY
    assert not detector.training
    torch.manual_seed(0)
    expected = PatchCore(TINY)
    for name, value in expected.backbone.state_dict().items():
        assert torch.equal(value.half().to(value.dtype), detector.backbone.state_dict()[name])
    assert detector.bank.dtype == torch.float16
    assert found.default_threshold == ("max_dice", 0.5)
    assert found.bin_edges.tolist() == [0.0, 0.5, 0.7, float("inf")]
    assert len(found.sha256) == 64
    assert (folder / "weights.safetensors").stat().st_mode & 0o777 == 0o644


def test_weights_are_stored_as_float16_except_those_of_preset_paper(tmp_path):
    torch.manual_seed(0)
    detector = PatchCore(TINY)
    bundles = {
        preset: save_bundle(tmp_path / preset, detector, preset=preset, modality="T1w", training={}, card="")
        for preset in ("lite", "default", "paper")
    }
    assert bundles["lite"].sha256 == bundles["default"].sha256
    exact = load_detector(bundles["paper"]).state_dict()
    for name, value in detector.state_dict().items():
        assert torch.equal(exact[name], value)
    stored = load_detector(bundles["lite"]).state_dict()
    for name, value in detector.state_dict().items():
        assert stored[name].dtype == value.dtype
        torch.testing.assert_close(stored[name], value, rtol=2**-11, atol=2**-24)
    detector.spread.fill_(1e5)
    with pytest.raises(ModelError, match="spread has values outside the range of float16"):
        save_bundle(tmp_path / "lite", detector, preset="lite", modality="T1w", training={}, card="")
    load_bundle(tmp_path / "lite")  # the bundle that was there is unchanged


def test_save_bundle_removes_earlier_thresholds(folder):
    save_bundle(folder, PatchCore(TINY), preset="tiny", modality="T1w", training={}, card="")
    with pytest.raises(ModelError, match="is not calibrated"):
        load_bundle(folder).default_threshold  # noqa: B018


def test_weights_that_differ_from_their_checksum_are_refused(folder):
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match=r"weights\.safetensors differs"):
        load_bundle(folder)


@pytest.mark.parametrize("name", ["bundle.json", "weights.safetensors"])
def test_missing_files_are_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelError, match=name):
        load_bundle(folder)


def test_a_bundle_for_other_input_is_refused(folder):
    edit(folder / "bundle.json", input={"space": "MNI152"})
    with pytest.raises(ModelError, match="other input than"):
        load_bundle(folder)


def test_a_bundle_of_preset_paper_states_min_max_scaling(folder, tmp_path):
    path = tmp_path / "paper"
    found = save_bundle(path, PatchCore(TINY), preset="paper", modality="T1w", training={}, card="")
    assert found.protocol.published
    assert found.info["input"]["scaling"] == {"method": "minmax", "region": "volume"}
    edit(path / "bundle.json", input=load_bundle(folder).info["input"])
    with pytest.raises(ModelError, match="other input than"):
        load_bundle(path)


def test_weights_of_another_shape_are_refused(folder):
    values = json.loads((folder / "bundle.json").read_text())["hyper"]
    edit(folder / "bundle.json", hyper={**values, "backbone": {**values["backbone"], "widths": [4, 8, 8, 8]}})
    with pytest.raises(ModelError, match="size mismatch"):
        load_detector(load_bundle(folder))


def test_unknown_hyper_parameters_are_refused(folder):
    values = json.loads((folder / "bundle.json").read_text())["hyper"]
    edit(folder / "bundle.json", hyper={**values, "slice_smoothing": 3})
    with pytest.raises(ModelError, match="slice_smoothing"):
        load_detector(load_bundle(folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"neighbourhood": 4},
            "'neighbourhood' parameter of PatchCoreHyper must be an odd int .* Got 4 instead",
        ),
        ({"descriptor": "poold"}, "'descriptor' parameter of PatchCoreHyper must be one of .* Got 'poold'"),
        ({"bank_size": 100_000}, "'bank_size' parameter of PatchCoreHyper must be at most 'candidates'"),
        ({"backbone": {"name": "vgg"}}, "'name' parameter of BackboneConfig must be one of .* Got 'vgg'"),
        ({"backbone": 3}, "'backbone' parameter of PatchCoreHyper must be an instance of .* Got 3"),
    ],
)
def test_hyper_parameters_that_are_not_allowed_are_refused_before_anything_is_done(folder, changes, words):
    values = json.loads((folder / "bundle.json").read_text())["hyper"]
    edit(folder / "bundle.json", hyper={**values, **changes})
    with pytest.raises(ModelError, match=words) as refused:
        resolve_bundles([str(folder)], ["T1w"])
    assert str(refused.value).startswith(f"model bundle {folder}: ")
    assert "\n" not in str(refused.value)
    with pytest.raises(ModelError, match=words):
        load_detector(load_bundle(folder))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("bundle.json", {"modality": "PDw"}, r"'modality' entry of bundle.json .* Got 'PDw'"),
        ("bundle.json", {"detector": 3}, "'detector' entry of bundle.json must be a str. Got 3"),
        ("bundle.json", {"hyper": []}, r"'hyper' entry of bundle.json must be a dict .* Got \[\]"),
        ("bundle.json", {"sha256": {}}, r"bundle.json lacks weights.safetensors in 'sha256'"),
        ("calibration.json", {"thresholds": {"x": "high"}}, "'thresholds' entry .* must be a dict"),
        ("calibration.json", {"default_threshold": "y"}, "'default_threshold' entry .* one of .* Got 'y'"),
        ("calibration.json", {"bin_edges": [0.0, 2.0, 1.0]}, "'bin_edges' entry .* strictly ascending"),
        ("calibration.json", {"normative": {}}, "calibration.json lacks .* in 'normative'"),
        ("calibration.json", {"rule": {"holes": "3d"}}, "calibration.json lacks .* in 'rule'"),
        ("calibration.json", {"rule": RULE | {"holes": "all"}}, "'holes' entry .* 'axial'"),
        ("calibration.json", {"rule": RULE | {"low_threshold": 0.6}}, "'low_threshold' .* at most 0.5"),
        ("calibration.json", {"rule": RULE | {"min_volume_mm3": -1.0}}, "'min_volume_mm3' entry"),
        ("calibration.json", {"default_deviation": "z"}, "'default_deviation' entry .* Got 'z'"),
    ],
)  # fmt: skip
def test_entries_that_are_not_allowed_are_refused_by_name(folder, name, changes, words):
    edit(folder / name, **changes)
    with pytest.raises(ModelError, match=words) as refused:
        load_bundle(folder)
    assert str(refused.value).startswith(f"model bundle {folder}: ")


@pytest.mark.parametrize("name", ["bundle.json", "calibration.json"])
def test_json_that_is_no_object_is_refused(folder, name):
    (folder / name).write_text("[1]")
    with pytest.raises(ModelError, match=f"{name} is not a JSON object"):
        load_bundle(folder)


def test_broken_json_is_refused(folder):
    (folder / "bundle.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_bundle(folder)


def test_a_pickled_checkpoint_is_refused(folder):
    """A file of torch.save under the name of the weights raises an error and is not unpickled."""
    torch.save({"bank": torch.zeros(1)}, folder / "weights.safetensors")
    info = json.loads((folder / "bundle.json").read_text())
    digest = file_sha256(folder / "weights.safetensors")
    edit(folder / "bundle.json", sha256={**info["sha256"], "weights.safetensors": digest})
    with pytest.raises(ModelError, match="weights"):
        load_detector(load_bundle(folder))


def test_resolve_bundles_takes_paths_and_names(folder, tmp_path, monkeypatch):
    assert [bundle.name for bundle in resolve_bundles([str(folder)], ["T1w"])] == [folder.name]
    monkeypatch.chdir(tmp_path)
    assert [bundle.folder for bundle in resolve_bundles([folder.name], ["T1w"])] == [folder]
    with pytest.raises(ModelError, match="no model bundle for T2w"):
        resolve_bundles([str(folder)], ["T1w", "T2w"])
    with pytest.raises(ModelError, match="no model bundle for T2w"):
        resolve_bundles([str(folder)], ["T2w"], skip_missing=True)
    with pytest.raises(ModelError, match="no model bundle 'nonesuch'"):
        resolve_bundles(["nonesuch"], ["T1w"])
    twin = tmp_path / "twin"
    shutil.copytree(folder, twin)
    with pytest.raises(ModelError, match="name only one of them"):
        resolve_bundles([str(folder), str(twin)], ["T1w"])


def test_resolve_bundles_skips_a_modality_without_bundle_with_a_warning(folder, caplog):
    (found,) = resolve_bundles([str(folder)], ["T1w", "FLAIR"], skip_missing=True)
    assert found.modality == "T1w"
    assert [record.getMessage() for record in caplog.records] == [
        "no model bundle for FLAIR among those of this run; FLAIR images are not scored"
    ]


ALL_PACKAGED = [
    f"{detector}-{modality}-{'default' if detector == 'pls' else 'lite'}"
    for detector in DETECTORS
    for modality in ("T1w", "T2w")
] + ["intensity-FLAIR-lite", "pls-FLAIR-default"]


def test_every_registered_detector_is_packaged():
    """At most 90 MB in all, and 16 MB per file."""
    found = resolve_bundles(["all"], MODALITIES)
    assert sorted(bundle.name for bundle in found) == sorted(packaged_bundles()) == sorted(ALL_PACKAGED)
    sizes = [path.stat().st_size for bundle in found for path in bundle.folder.iterdir()]
    assert sum(sizes) < 90e6
    assert max(sizes) < 16e6


def test_without_models_one_default_bundle_per_modality_is_used():
    for modality in MODALITIES:
        (found,) = resolve_bundles(None, [modality])
        assert found.modality == modality
    found = resolve_bundles(None, MODALITIES)
    assert sorted(bundle.name for bundle in found) == sorted(DEFAULT_MODELS)


def test_only_pls_uses_deviations_by_default():
    models = ["pls", "disyre", "uniad"]  # all three have a normative reference for T2w
    defaults = {bundle.detector: bundle.deviation for bundle in resolve_bundles(models, ["T2w"], ())}
    assert defaults == {"pls": "normative", "disyre": "none", "uniad": "none"}
    asked = resolve_bundles(models, ["T2w"], ["normative", "none"])
    assert [(bundle.detector, bundle.deviation) for bundle in asked] == [
        (detector, deviation) for detector in sorted(models) for deviation in ("normative", "none")
    ]


def test_pls_without_a_normative_reference_uses_scores(tmp_path):
    folder = tmp_path / "pls-T2w-default"
    shutil.copytree(PACKAGED / folder.name, folder)
    calibration = json.loads((folder / "calibration.json").read_text())
    del calibration[NORMATIVE]
    (folder / "calibration.json").write_text(json.dumps(calibration))
    (found,) = resolve_bundles([str(folder)], ["T2w"], ())
    assert found.deviation == "none"


@pytest.mark.parametrize("name", ALL_PACKAGED)
def test_a_packaged_bundle_loads_and_is_calibrated_on_other_subjects(name):
    (found,) = resolve_bundles([name], [name.split("-")[1]])
    load_detector(found)
    chosen = set() if found.rule.is_plain else {"max_dice_f1"}
    assert set(found.thresholds) == {"max_dice", "fpr_1pct", "fpr_5pct"} | chosen
    assert set(found.thresholds.values()) <= set(found.bin_edges.tolist())
    assert found.calibration["weights_sha256"] == found.sha256
    training, validation = (
        set(part["subjects"]) for part in (found.info["training"], found.calibration["cohort"])
    )
    assert training
    assert validation
    assert not training & validation
    card = (found.folder / "MODEL_CARD.md").read_text()
    for section in (
        "not for clinical use",
        "licence of the scans",
        "## Training",
        "## Reproduce",
        "## Known failures",
    ):
        assert section in card


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_loaded_nor_saved(folder, tmp_path, value):
    weights = folder / "weights.safetensors"
    tensors = load_file(weights)
    tensors["bank"][3, 1] = value
    save_file(tensors, weights)
    info = json.loads((folder / "bundle.json").read_text())
    edit(folder / "bundle.json", sha256={**info["sha256"], weights.name: file_sha256(weights)})
    with pytest.raises(
        ModelError, match=r"weights\.safetensors contains NaN or infinite values in bank; train"
    ):
        load_detector(load_bundle(folder))
    detector = PatchCore(TINY)
    detector.bank.fill_(value)
    with pytest.raises(ModelError, match="bank: NaN or infinite after training"):
        save_bundle(tmp_path / "new", detector, preset="default", modality="T1w", training={}, card="")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", packaged_bundles())
def test_packaged_weights_are_finite(name):
    assert not_finite(load_file(PACKAGED / name / "weights.safetensors")) == []


@pytest.mark.parametrize("name", packaged_bundles())
def test_hyper_parameters_of_packaged_bundles_are_valid(name):
    """A run does not check them."""
    assert bundle_hyper(load_bundle(PACKAGED / name)) is not None
