"""Anomaly maps: batches, fields of view, smoothing and median, against SciPy and literal values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d, generic_filter, median_filter
from torch import Tensor

from bids_uad import space
from bids_uad.engine import inference
from bids_uad.engine.bundle import CORRECTED, PUBLISHED
from bids_uad.engine.execution import Execution
from bids_uad.engine.inference import (
    anomaly_map,
    covering_fields,
    default_field,
    masked_median,
    published_median,
    smooth_across_slices,
)
from bids_uad.errors import ModelError
from bids_uad.methods.base import Detector
from bids_uad.networks.counter_rng import SliceGenerator


@dataclass(frozen=True)
class Nothing:
    """No hyper-parameters."""


class Noisy(Detector):
    """Scores are intensities plus random numbers; records the batch sizes."""

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


def test_maps_are_neither_mirrored_nor_shifted(scan):

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


def test_a_detector_with_a_small_field_of_view_gets_a_field_around_the_brain(scan):
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


def test_a_brain_larger_than_the_field_of_view_is_covered_by_several_fields():
    class Narrow(Noisy):
        field_of_view = (96, 128)

        def score(self, slices, brain, generator):
            return slices

    brain = np.zeros(space.SHAPE, dtype=bool)
    brain[40:200, 60:180, 70:74] = True
    volume = np.where(brain, 0.3, 0).astype(np.float32)
    result = anomaly_map(Narrow(), volume, brain, key="x")
    np.testing.assert_allclose(result[brain], 0.3)


def test_published_protocol_scales_by_minimum_and_maximum_and_uses_scipys_median(scan):
    class Echo(Noisy):
        def score(self, slices, brain, generator):
            return slices

    volume, brain = scan
    volume = volume + brain * 0.5  # 0.5 to 1.5: nothing is clipped before scaling
    result = anomaly_map(Echo(), volume, brain, key="x", protocol=PUBLISHED)
    expected = median_filter(volume / volume.max(), size=4)
    np.testing.assert_allclose(result, np.where(brain, expected, 0), rtol=1e-6)


def test_slice_smoothing_is_applied_before_the_median(scan):
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


def test_out_of_memory_errors_halve_the_batch(scan):
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
    """Gives one value that is not finite in some slices of a brain that begins in slice 40."""

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
def test_scores_that_are_not_finite_raise_an_error_with_detector_image_and_slice(
    scan, value, protocol, sigma
):
    with pytest.raises(ModelError, match=r"broken gave NaN .* for sub-01_T1w in axial slice 47 of the SRI24"):
        anomaly_map(Broken(value, 47, sigma), *scan, key="sub-01_T1w", protocol=protocol)


def test_the_error_names_the_first_five_slices(scan):
    with pytest.raises(ModelError, match="in axial slices 41, 42, 43, 44, 45 and 2 more of"):
        anomaly_map(Broken(np.nan, tuple(range(41, 48))), *scan, key="x")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_that_is_not_finite_is_refused(scan, value):
    volume = scan[0].copy()
    volume[90, 100, 50] = value
    with pytest.raises(ValueError, match="preprocessed image of sub-01_T1w holds NaN or infinite"):
        anomaly_map(Noisy(), volume, scan[1], key="sub-01_T1w")


SIZE = (160, 192)


def mask(rows: tuple[int, int], columns: tuple[int, int]) -> torch.Tensor:
    inside = torch.zeros(3, 224, 224, dtype=torch.bool)
    inside[1, rows[0] : rows[1], columns[0] : columns[1]] = True
    return inside


def test_default_field_is_centred_on_the_brain():
    field = default_field(SIZE)
    assert (field.rows, field.columns) == (slice(32, 192), slice(26, 218))
    assert default_field((224, 224)).cut(torch.zeros(2, 224, 224)).shape == (2, 224, 224)


def test_default_field_is_shifted_up_to_the_border():
    assert default_field(SIZE, (5, -3)).rows == slice(37, 197)
    assert default_field(SIZE, (0, 100)).columns == slice(32, 224)
    assert default_field((224, 224), (8, -8)) == default_field((224, 224))


def test_covering_fields_of_a_typical_brain_is_the_default_field():
    assert covering_fields(mask((45, 178), (36, 207)), SIZE) == [default_field(SIZE)]
    assert covering_fields(mask((0, 0), (0, 0)), SIZE) == [default_field(SIZE)]


@pytest.mark.parametrize(
    ("rows", "start"), [((20, 150), 20), ((50, 200), 40), ((60, 220), 60), ((64, 224), 64), ((0, 160), 0)]
)
def test_covering_fields_shifts_the_field_as_little_as_necessary(rows, start):
    (field,) = covering_fields(mask(rows, (36, 207)), SIZE)
    assert field.rows == slice(start, start + 160)
    assert field.columns == default_field(SIZE).columns


@pytest.mark.parametrize(
    ("rows", "columns"), [((10, 180), (36, 207)), ((0, 224), (10, 220)), ((0, 161), (0, 193))]
)
def test_covering_fields_cover_a_large_brain(rows, columns):
    fields = covering_fields(mask(rows, columns), SIZE)
    covered = torch.zeros(224, 224, dtype=torch.bool)
    for field in fields:
        part = field.cut(covered)
        assert part.shape == SIZE
        part |= True
    assert covered[rows[0] : rows[1], columns[0] : columns[1]].all()
    wide, long = (axis[1] - axis[0] > size for axis, size in zip((rows, columns), SIZE, strict=True))
    assert len(fields) == 2 ** (wide + long)


@pytest.mark.parametrize("sigma", [0.7, 2.0, 4.0])
def test_smooth_across_slices_equals_scipys_gaussian_normalised_over_the_brain(sigma):
    rng = np.random.default_rng(0)
    brain = rng.random((30, 7, 9)) < 0.8
    scores = rng.random(brain.shape) * brain
    reach = {"sigma": sigma, "axis": 0, "mode": "constant", "radius": int(np.ceil(3 * sigma))}
    expected = gaussian_filter1d(scores, **reach) / gaussian_filter1d(brain.astype(float), **reach)
    found = smooth_across_slices(torch.from_numpy(scores), torch.from_numpy(brain), sigma)
    np.testing.assert_allclose(found.numpy(), np.where(brain, expected, 0), rtol=1e-9)


def test_smooth_across_slices_keeps_a_constant_map_and_spreads_a_single_slice():
    brain = torch.zeros(20, 4, 4, dtype=torch.bool)
    brain[3:17] = True
    torch.testing.assert_close(smooth_across_slices(0.3 * brain, brain, 3.0), 0.3 * brain)
    single = torch.zeros(20, 4, 4)
    single[10] = 1
    # The weight of the centre is about 1 / (sigma sqrt(2 pi)).
    assert smooth_across_slices(single, brain, 2.0)[10, 0, 0] == pytest.approx(0.2, abs=0.003)


def test_masked_median_in_a_full_mask_equals_scipys_median():
    volume = np.random.default_rng(0).random((12, 13, 14)).astype(np.float32)
    ours = masked_median(torch.from_numpy(volume), torch.ones(volume.shape, dtype=torch.bool)).numpy()
    theirs = median_filter(volume, size=3)
    np.testing.assert_array_equal(ours[1:-1, 1:-1, 1:-1], theirs[1:-1, 1:-1, 1:-1])


def test_masked_median_ignores_voxels_outside_the_mask():
    rng = np.random.default_rng(1)
    volume = rng.random((10, 11, 12)).astype(np.float32)
    brain = rng.random(volume.shape) < 0.6
    ours = masked_median(torch.from_numpy(volume), torch.from_numpy(brain)).numpy()

    def lower_median(values):
        values = np.sort(values[~np.isnan(values)])
        return values[(len(values) - 1) // 2] if len(values) else 0

    masked = np.where(brain, volume, np.nan)
    theirs = generic_filter(masked, lower_median, size=3, mode="constant", cval=np.nan)
    np.testing.assert_array_equal(ours, np.where(brain, theirs, 0).astype(np.float32))


def test_published_median_equals_scipys_median_of_side_4():
    rng = np.random.default_rng(2)
    volume = (rng.random((13, 11, 17)) * (rng.random((13, 11, 17)) < 0.5)).astype(np.float32)
    volume[6:, :, 4:9] = 0
    ours = published_median(torch.from_numpy(volume)).numpy()
    np.testing.assert_array_equal(ours, median_filter(volume, size=4))


def test_published_median_shifts_a_cube_by_half_a_voxel():
    cube = torch.zeros(20, 20, 20)
    cube[8:12, 8:12, 8:12] = 1
    reached = torch.nonzero(published_median(cube))
    assert reached.max() == 12


def test_masked_median_of_an_empty_mask_is_zero():
    empty = torch.zeros(4, 4, 4, dtype=torch.bool)
    assert masked_median(torch.rand(4, 4, 4), empty).abs().max() == 0


def test_masked_median_does_not_depend_on_the_chunk_size(monkeypatch):
    volume = torch.rand(20, 21, 22, generator=torch.Generator().manual_seed(0))
    brain = volume > 0.2
    whole = masked_median(volume, brain)
    monkeypatch.setattr(inference, "MEDIAN_CHUNK", 1_000)
    assert torch.equal(whole, masked_median(volume, brain))
