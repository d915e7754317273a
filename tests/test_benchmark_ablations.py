"""The ablations of the default detector: variants, evaluation and differences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score

from benchmarks import ablations
from bids_uad.dataset.sri24_scans import PreprocessedScan
from bids_uad.methods.pls.detector import PLS


def test_each_variant_differs_from_the_reference_in_one_respect():
    reference, *others = ablations.variants(PLS.presets["lite"]).values()
    assert reference == PLS.presets["lite"]
    assert len({str(other) for other in others} | {str(reference)}) == len(others) + 1
    for other in others:
        painting = replace(other.painting, lesion=reference.painting.lesion)
        changed = [name for name in vars(reference) if getattr(other, name) != getattr(reference, name)]
        assert len(changed) == 1
        assert changed != ["painting"] or painting != other.painting or other.painting != reference.painting


def test_evaluation_equals_scikit_learn():
    rng = np.random.default_rng(0)
    lesions = {
        "sub-1": rng.random(3000) < 0.1,
        "sub-2": rng.random(3000) < 0.05,
        "sub-3": np.zeros(3000, bool),
    }
    scores = {
        name: np.clip(rng.random(3000) * 0.6 + 0.3 * lesion, 0, 1).astype(np.float32)
        for name, lesion in lesions.items()
    }
    scans = [PreprocessedScan(name, None, None, None, None) for name in lesions]
    table = ablations.evaluate(
        PLS(PLS.presets["lite"]),
        scans,
        scorer=lambda detector, scan: (scores[scan.subject], lesions[scan.subject]),
    ).set_index("participant_id")
    for name in ("sub-1", "sub-2"):
        assert table.loc[name, "ap"] == pytest.approx(average_precision_score(lesions[name], scores[name]))
    levels = np.arange(ablations.N_BINS) / ablations.N_BINS
    dice = [
        np.mean(
            [
                2
                * (lesions[name] & (scores[name] >= level)).sum()
                / (lesions[name].sum() + (scores[name] >= level).sum())
                for name in ("sub-1", "sub-2")
            ]
        )
        for level in levels
    ]
    expected = np.mean(scores["sub-3"] >= levels[int(np.argmax(dice))])
    assert table.loc["sub-3", "marked"] == pytest.approx(expected, abs=2e-3)
    assert table["marked"].notna().sum() == 1


def test_differences_are_paired_by_participant():
    names = [f"sub-{k}" for k in range(8)]
    tables = {
        "reference": pd.DataFrame({"participant_id": names, "ap": np.linspace(0, 0.7, 8), "marked": 0.01}),
        "other": pd.DataFrame({"participant_id": names, "ap": np.linspace(0.1, 0.8, 8), "marked": 0.02}),
    }
    first, second = ablations.summarise(tables)
    assert [first["ap difference"], first["ap low"], first["ap high"]] == pytest.approx([0, 0, 0])
    # A constant difference has an interval without width, though the values vary between participants.
    assert [second["ap difference"], second["ap low"], second["ap high"]] == pytest.approx([0.1] * 3)
    assert second["marked difference"] == pytest.approx(0.01)


def test_scores_are_those_of_every_third_slice(tmp_path):
    from bids_uad.space import SHAPE, to_image

    rng = np.random.default_rng(0)
    brain = np.zeros(SHAPE, np.float32)
    brain[100:140, 100:140, 60:66] = 1
    lesion = brain * (rng.random(SHAPE) < 0.1)
    files = {"image": brain * rng.random(SHAPE), "brain": brain, "lesion": lesion}
    for name, volume in files.items():
        to_image(volume.astype(np.float32)).to_filename(tmp_path / f"{name}.nii.gz")
    scan = PreprocessedScan("sub-1", *(tmp_path / f"{name}.nii.gz" for name in files), None)
    torch.manual_seed(0)
    detector = PLS(PLS.presets["lite"]).eval()
    scores, labels = ablations.score_slices(detector, scan)
    assert len(scores) == len(labels) == 2 * 40 * 40  # slices 60 and 63
    assert labels.sum() == lesion[:, :, [60, 63]].sum()
    # Coordinates and tissue priors are 0 as in the training slices from which they are left out.
    seen = []
    detector.score = lambda inputs, mask, generator: seen.append(inputs) or inputs[:, :1]
    for place in (True, False):
        ablations.score_slices(detector, scan, place=place)
    count = detector.hyper.intensity_channels
    whole, no_place = seen
    assert whole[:, count:].any()
    assert not no_place[:, count:].any()
    assert torch.equal(no_place[:, :count], whole[:, :count])


def test_trained_models_are_compared_with_the_first(tmp_path, monkeypatch):
    """The first one is evaluated without its place as well; average precisions are made up."""
    precisions = {("a", True): 0.5, ("a", False): 0.4, ("b", True): 0.7}

    def evaluate(detector, scans, *, scorer=None):
        names = [f"sub-{k}" for k in range(3)]
        place = scorer is None or scorer.keywords["place"]
        return pd.DataFrame({"participant_id": names, "ap": precisions[detector, place], "marked": np.nan})

    monkeypatch.setattr(ablations, "find_preprocessed", lambda folder, modality: [])
    monkeypatch.setattr(ablations, "load_bundle", lambda path: path.name)
    monkeypatch.setattr(ablations, "load_detector", lambda bundle: bundle)
    monkeypatch.setattr(ablations.Execution, "prepare", lambda self, detector: detector)
    monkeypatch.setattr(ablations, "evaluate", evaluate)
    table = tmp_path / "trained.tsv"
    ablations.main([str(tmp_path), "--trained", "models/a", "models/b", "--output", str(table)])
    found = pd.read_csv(table, sep="\t").set_index("variant")
    assert list(found.index) == ["models/a", "models/a, no coordinates and priors", "models/b"]
    assert found["ap difference"].tolist() == pytest.approx([0, -0.1, 0.2])
