"""From volume to map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d, median_filter
from torch import Tensor

from bids_uad import space
from bids_uad.engine.execution import Execution
from bids_uad.engine.inference import anomaly_map
from bids_uad.engine.protocol import CORRECTED, PUBLISHED
from bids_uad.errors import ModelError
from bids_uad.methods.base import Detector
from bids_uad.networks.counter_rng import SliceGenerator


@dataclass(frozen=True)
class Nothing:
    """No hyper-parameters."""


class Noisy(Detector):
    """The slice plus keyed noise: stochastic, and told batch sizes apart if they mattered."""

    name = "noisy"

    def __init__(self) -> None:
        super().__init__(Nothing())
        self.register_buffer("anchor", torch.zeros(()))
        self.seen: list[int] = []

    def stages(self) -> list:
        return []

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        self.seen.append(len(slices))
        return (slices + generator.uniform(0, *slices.shape[1:])) * brain


@pytest.fixture
def scan():
    brain = np.zeros(space.SHAPE, dtype=bool)
    brain[80:110, 90:130, 40:60] = True
    return np.random.default_rng(0).random(space.SHAPE).astype(np.float32) * brain, brain


def test_the_map_does_not_depend_on_the_batch(scan):
    maps = [
        anomaly_map(Noisy(), *scan, key="sub-01_T1w", execution=Execution(batch_size=size))
        for size in (1, 7, 155)
    ]
    np.testing.assert_array_equal(maps[0], maps[1])
    np.testing.assert_array_equal(maps[0], maps[2])


def test_subject_and_seed_change_the_noise(scan):
    first = anomaly_map(Noisy(), *scan, key="sub-01_T1w")
    assert not np.array_equal(first, anomaly_map(Noisy(), *scan, key="sub-02_T1w"))
    assert not np.array_equal(first, anomaly_map(Noisy(), *scan, key="sub-01_T1w", seed=1))


def test_only_slices_with_brain_are_scored(scan):
    detector = Noisy()
    result = anomaly_map(detector, *scan, key="x", execution=Execution(batch_size=8))
    assert detector.seen == [8, 8, 4]
    assert result.shape == space.SHAPE
    assert result.dtype == np.float32
    assert result[~scan[1]].max() == 0
    assert result[scan[1]].min() > 0


def test_voxels_stay_where_they_are(scan):
    """A constant blob comes back at its own place, not mirrored or shifted."""

    class Echo(Noisy):
        def score(self, slices, brain, generator):
            return slices

    volume, brain = scan
    volume = np.where(brain, 0.1, 0).astype(np.float32)
    volume[85:92, 95:99, 50:55] = 0.9
    result = anomaly_map(Echo(), volume, brain, key="x")
    assert result[88, 97, 52] == pytest.approx(0.9)
    assert np.argwhere(result > 0.5).min(0).tolist() >= [85, 95, 50]
    assert np.argwhere(result > 0.5).max(0).tolist() <= [91, 98, 54]


def test_a_narrow_detector_sees_a_field_about_the_brain(scan):
    class Narrow(Noisy):
        field_of_view = (96, 128)
        shapes: ClassVar[set] = set()

        def score(self, slices, brain, generator):
            self.shapes.add(tuple(slices.shape[1:]))
            return slices

    volume, brain = scan
    result = anomaly_map(Narrow(), volume, brain, key="x")
    whole = anomaly_map(type("Echo", (Narrow,), {"field_of_view": (224, 224)})(), volume, brain, key="x")
    np.testing.assert_array_equal(result, whole)
    assert Narrow.shapes == {(1, 96, 128), (1, 224, 224)}


def test_a_brain_larger_than_the_field_is_covered_by_several():
    class Narrow(Noisy):
        field_of_view = (96, 128)

        def score(self, slices, brain, generator):
            return slices

    brain = np.zeros(space.SHAPE, dtype=bool)
    brain[40:200, 60:180, 70:74] = True
    volume = np.where(brain, 0.3, 0).astype(np.float32)
    result = anomaly_map(Narrow(), volume, brain, key="x")
    np.testing.assert_allclose(result[brain], 0.3)


def test_the_published_protocol_scales_by_the_extremes_and_filters_with_scipys_median(scan):
    class Echo(Noisy):
        def score(self, slices, brain, generator):
            return slices

    volume, brain = scan
    volume = volume + brain * 0.5  # 0.5 to 1.5: nothing is cut before the scaling
    result = anomaly_map(Echo(), volume, brain, key="x", protocol=PUBLISHED)
    expected = median_filter(volume / volume.max(), size=4)
    np.testing.assert_allclose(result, np.where(brain, expected, 0), rtol=1e-6)


def test_a_detector_may_have_its_map_smoothed_across_slices_before_the_median(scan):
    class Echo(Noisy):
        slice_smoothing = 2.0

        def score(self, slices, brain, generator):
            return slices

    volume, brain = scan
    result = anomaly_map(Echo(), volume, brain, key="x")
    box = volume[80:110, 90:130, 40:60].clip(0, 1)
    reach = {"sigma": 2.0, "axis": 2, "mode": "constant", "radius": 6}
    smooth = gaussian_filter1d(box, **reach) / gaussian_filter1d(np.ones_like(box), **reach)
    expected = median_filter(smooth, size=3)
    inner = (slice(1, -1),) * 3  # at the border the median has fewer neighbours
    np.testing.assert_allclose(result[80:110, 90:130, 40:60][inner], expected[inner], rtol=1e-5)


def test_memory_shortage_halves_the_batch(scan):
    class Hungry(Noisy):
        def score(self, slices, brain, generator):
            if len(slices) > 3:
                raise torch.OutOfMemoryError("too much")
            return super().score(slices, brain, generator)

    detector = Hungry()
    result = anomaly_map(detector, *scan, key="sub-01_T1w", execution=Execution(batch_size=8))
    assert detector.seen == [2] * 10
    np.testing.assert_array_equal(result, anomaly_map(Noisy(), *scan, key="sub-01_T1w"))


def test_a_brain_outside_the_field_of_view_is_refused():
    brain = np.zeros(space.SHAPE, dtype=bool)
    brain[2, 100, 70] = True
    with pytest.raises(ValueError, match="central 224"):
        anomaly_map(Noisy(), np.zeros(space.SHAPE, dtype=np.float32), brain, key="x")


def test_slices_and_volumes_are_inverse(scan):
    volume = scan[0]
    np.testing.assert_array_equal(space.from_slices(space.to_slices(volume)), volume)
    with pytest.raises(ValueError, match="expected a volume"):
        space.to_slices(np.zeros((3, 3, 3)))


class Broken(Noisy):
    """Gives one value that is no number, in some slices of a brain that begins in slice 40."""

    name = "broken"

    def __init__(self, value: float, where: int | tuple[int, ...], sigma: float = 0.0) -> None:
        super().__init__()
        self.value, self.where, self.sigma = value, where if isinstance(where, tuple) else (where,), sigma

    @property
    def slice_smoothing(self) -> float:
        return self.sigma

    def score(self, slices: Tensor, brain: Tensor, generator: SliceGenerator) -> Tensor:
        scores, first = slices.clone(), 40 + sum(self.seen)
        self.seen.append(len(slices))
        for row in range(len(slices)):
            if first + row in self.where:
                scores[row, 0, 100, 100] = self.value
        return scores


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("protocol", [CORRECTED, PUBLISHED])
@pytest.mark.parametrize("sigma", [0.0, 2.0])
def test_a_score_that_is_no_number_is_an_error_that_names_detector_scan_and_slice(
    scan, value, protocol, sigma
):
    with pytest.raises(ModelError, match=r"broken gave NaN .* for sub-01_T1w in axial slice 47 of the SRI24"):
        anomaly_map(Broken(value, 47, sigma), *scan, key="sub-01_T1w", protocol=protocol)


def test_the_first_slices_with_nan_are_named(scan):
    with pytest.raises(ModelError, match="in axial slices 41, 42, 43, 44, 45 and 2 more of"):
        anomaly_map(Broken(np.nan, tuple(range(41, 48))), *scan, key="x")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_that_is_not_finite_is_not_blamed_on_the_detector(scan, value):
    volume = scan[0].copy()
    volume[90, 100, 50] = value
    with pytest.raises(ValueError, match="preprocessed image of sub-01_T1w holds NaN or infinite"):
        anomaly_map(Noisy(), volume, scan[1], key="sub-01_T1w")
