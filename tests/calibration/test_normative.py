"""The normative reference against ordinary least squares of statsmodels, voxel by voxel."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import statsmodels.api as sm
from scipy.ndimage import gaussian_filter

from bids_uad.calibration import normative
from bids_uad.calibration.deviation import DeviationCalibrator
from bids_uad.calibration.normative import BLOCK, GRID, HealthyCohort, NormativeEstimator, NormativeReference
from bids_uad.calibration.thresholds import FINE_EDGES, count_scores
from bids_uad.errors import ModelError
from bids_uad.space import SHAPE
from tests.header_contract import header_faults

PLACE = (slice(96, 128), slice(96, 128), slice(64, 96))
"""Whole blocks in the middle of the grid."""
MALE, FEMALE = 0.5, -0.5


def brain_of(number):
    """Return a brain within PLACE; its volume varies between people."""
    brain = np.zeros(SHAPE, dtype=bool)
    brain[PLACE] = True
    brain[96 : 96 + number % 5, 96:128, 64:96] = False
    return brain


def people_of(n, seed=0):
    rng = np.random.default_rng(seed)
    return [{"age": float(rng.uniform(20, 80)), "sex": rng.choice([MALE, FEMALE])} for _ in range(n)]


def scores_of(person, brain, seed, slope=0.01):
    """Return scores that increase with age, and from back to front."""
    level = 1 + slope * (person["age"] - 50) + 0.2 * person["sex"]
    scores = np.zeros(SHAPE, np.float32)
    scores[PLACE] = level + np.random.default_rng(seed).normal(0, 0.1, (32, 32, 32))
    scores[:, 112:] += 0.5
    return scores * brain


def estimator_of(people, cohort=None):
    estimator = NormativeEstimator(cohort or HealthyCohort.from_participants(people))
    for number, person in enumerate(people):
        brain = brain_of(number)
        estimator.add(scores_of(person, brain, number), brain, **person)
    return estimator


@pytest.fixture(autouse=True)
def small_brains(monkeypatch):
    """Centre the brain volume on that of these brains, to keep digits in single precision."""
    monkeypatch.setattr(normative, "TYPICAL_VOLUME", 31.0)


@pytest.fixture
def unsmoothed(monkeypatch):
    """No smoothing, so that each block is one regression."""
    monkeypatch.setattr(normative, "_SIGMA", 0.0)


def regression(people, block, leave_out=()):
    """Least squares over all voxels of a block, by statsmodels."""
    cohort = HealthyCohort.from_participants(people)
    cut = tuple(slice(BLOCK * k, BLOCK * (k + 1)) for k in block)
    rows, values = [], []
    for number, person in enumerate(people):
        if number not in leave_out:
            brain = brain_of(number)
            inside = scores_of(person, brain, number)[cut][brain[cut]].astype(float)
            values.append(inside)
            rows.append(np.tile(cohort.row(person["age"], person["sex"], brain), (len(inside), 1)))
    return sm.OLS(np.concatenate(values), np.concatenate(rows)).fit()


@pytest.mark.parametrize("block", [(12, 12, 8), (15, 15, 11)])
def test_coefficients_and_spread_are_those_of_least_squares(unsmoothed, block):
    people = people_of(12)
    reference = estimator_of(people).fit()
    expected = regression(people, block)
    np.testing.assert_allclose(reference.coefficients[(slice(None), *block)], expected.params, atol=2e-5)
    age = expected.model.exog[:, 1]
    squares = sm.OLS(expected.resid**2, sm.add_constant(age)).fit().params
    assert reference.sd[block] == pytest.approx(np.sqrt(squares[0]), rel=1e-4)
    assert reference.variance_slope[block] == pytest.approx(squares[1] / squares[0], abs=1e-4)


def test_remove_gives_the_reference_of_the_others(unsmoothed):
    people = people_of(12)
    cohort = HealthyCohort.from_participants(people)
    estimator = estimator_of(people)
    brain = brain_of(3)
    scores = scores_of(people[3], brain, 3)
    estimator.remove(scores, brain, **people[3])
    block = (13, 14, 9)
    expected = regression(people, block, leave_out=(3,))
    found = estimator.fit().coefficients[(slice(None), *block)]
    np.testing.assert_allclose(found, expected.params, atol=2e-5)
    # The mean residual agrees with the closed form from the leverage.
    row = cohort.row(people[3]["age"], people[3]["sex"], brain)
    cut = tuple(slice(BLOCK * k, BLOCK * (k + 1)) for k in block)
    own = scores[cut][brain[cut]].astype(float)
    whole = regression(people, block)
    leverage = row @ np.linalg.inv(whole.model.exog.T @ whole.model.exog) @ row
    closed = (own.mean() - row @ whole.params) / (1 - len(own) * leverage)
    assert own.mean() - row @ found == pytest.approx(closed, rel=1e-3)


def test_memory_does_not_grow_and_order_does_not_matter():
    people = people_of(6)
    forward = estimator_of(people)
    backward = NormativeEstimator(forward.cohort)
    sizes = set()
    for number in reversed(range(6)):
        brain = brain_of(number)
        backward.add(scores_of(people[number], brain, number), brain, **people[number])
        sizes.add(sum(value.nbytes for value in vars(backward).values() if isinstance(value, np.ndarray)))
    assert len(sizes) == 1
    np.testing.assert_allclose(forward.fit().coefficients, backward.fit().coefficients, rtol=1e-4, atol=1e-5)


def test_smoothing_is_weighted_least_squares():
    """Weighted least squares of statsmodels, with the weights of the kernel from SciPy."""
    people = people_of(12)
    cohort, block = HealthyCohort.from_participants(people), (13, 13, 9)
    impulse = np.zeros(GRID)
    impulse[block] = 1
    # Full width at half maximum of 40 mm, in blocks of 8 mm.
    kernel = gaussian_filter(impulse, 40 / (2 * np.sqrt(2 * np.log(2))) / 8, mode="constant")
    weights = np.kron(kernel, np.ones((BLOCK,) * 3))[tuple(slice(0, size) for size in SHAPE)]
    rows, values, weight = [], [], []
    for number, person in enumerate(people):
        brain = brain_of(number)
        values.append(scores_of(person, brain, number)[brain].astype(float))
        rows.append(np.tile(cohort.row(person["age"], person["sex"], brain), (len(values[-1]), 1)))
        weight.append(weights[brain])
    expected = sm.WLS(np.concatenate(values), np.concatenate(rows), np.concatenate(weight)).fit()
    found = estimator_of(people).fit().coefficients[(slice(None), *block)]
    np.testing.assert_allclose(found, expected.params, atol=5e-5)


def test_the_mean_is_interpolated_between_the_centres_of_blocks():
    """Linear interpolation reproduces a ramp."""
    place = [BLOCK * np.arange(n) + (BLOCK - 1) / 2 for n in GRID]
    x, y, z = np.meshgrid(*place, indexing="ij")
    coefficients = np.zeros((4, *GRID), np.float32)
    coefficients[0] = 0.01 * x - 0.02 * y + 0.03 * z
    reference = NormativeReference(
        HealthyCohort(None, None, None),
        coefficients,
        np.full(GRID, 0.5, np.float32),
        np.zeros(GRID, np.float32),
    )
    brain = brain_of(0)
    i, j, k = (np.arange(n, dtype=float) for n in SHAPE)
    ramp = 0.01 * i[:, None, None] - 0.02 * j[None, :, None] + 0.03 * k[None, None]
    found = reference.deviations(ramp + 1.0, brain, age=None, sex=None)
    np.testing.assert_allclose(found[brain], 2.0, atol=1e-4)


@pytest.mark.parametrize(
    ("slope", "age", "variance"),
    # Slope in ten years as a fraction of the variance at 50 years; limits 0.2 and 3.
    [(0.25, 30.0, 0.5), (0.25, 50.0, 1.0), (0.25, 80.0, 1.75), (0.3, 10.0, 0.2), (0.9, 80.0, 3.0)],
)
def test_the_variance_is_linear_in_age_within_limits(slope, age, variance):
    flat = np.ones(GRID, np.float32)
    cohort = HealthyCohort(50.0, (10.0, 90.0), None)
    reference = NormativeReference(cohort, np.zeros((4, *GRID), np.float32), 0.1 * flat, slope * flat)
    brain = brain_of(0)
    found = reference.deviations(np.ones(SHAPE), brain, age=age, sex=None)
    np.testing.assert_allclose(found[brain], 1 / (0.1 * np.sqrt(variance)), rtol=1e-5)


def test_slope_of_the_variance_is_limited_and_sd_has_a_floor(unsmoothed):
    """A quarter of the brain has no noise; elsewhere the variance is 0 up to the age of 40 years."""
    rng = np.random.default_rng(0)
    people = [{"age": float(age), "sex": None} for age in rng.uniform(20, 80, 15)]
    estimator = NormativeEstimator(HealthyCohort.from_participants(people))
    brain = brain_of(0)
    residuals = []
    for number, person in enumerate(people):
        noise = np.random.default_rng(number).normal(0, 0.02 * max(0.0, person["age"] - 40), (32, 32, 32))
        noise[:8] = 0
        scores = np.zeros(SHAPE)
        scores[PLACE] = 1 + noise
        residuals.append(noise)
        estimator.add(scores, brain, **person)
    reference = estimator.fit()
    assert reference.variance_slope[14, 13, 9] == np.float32(0.3)
    # Squared residuals at the mean age, by a line through those of all voxels.
    age = np.repeat([person["age"] for person in people], noise.size)
    square = np.square(np.concatenate([part.ravel() for part in residuals]))
    slope, intercept = np.polyfit(age - reference.cohort.age_mean, square, 1)
    assert slope > 0
    assert reference.sd[12, 13, 9] == pytest.approx(0.3 * np.sqrt(intercept), rel=0.01)


def test_locations_without_brain_get_the_values_of_the_whole_brain():
    people = people_of(12)
    cohort = HealthyCohort.from_participants(people)
    reference = estimator_of(people, cohort).fit()
    rows, values = [], []
    for number, person in enumerate(people):
        brain = brain_of(number)
        values.append(scores_of(person, brain, number)[brain].astype(float))
        rows.append(np.tile(cohort.row(person["age"], person["sex"], brain), (len(values[-1]), 1)))
    whole = sm.OLS(np.concatenate(values), np.concatenate(rows)).fit()
    np.testing.assert_allclose(reference.coefficients[:, 0, 0, 0], whole.params, atol=5e-5)
    assert np.abs(reference.coefficients[0, 13, 13, 9] - whole.params[0]) > 0.01


def test_an_age_slope_goes_and_a_lesion_stays():
    people = people_of(30)
    reference = estimator_of(people).fit()
    young, old = ({"age": age, "sex": FEMALE} for age in (25.0, 75.0))
    brain = brain_of(0)
    means, raw = [], []
    for seed, person in enumerate((young, old)):
        scores = scores_of(person, brain, 1000 + seed)
        scores[104:108, 104:108, 72:76] += 2
        z = reference.deviations(scores, brain, **person)
        assert z.min() == 0
        assert not z[~brain].any()
        assert z[104:108, 104:108, 72:76].min() > 4 * z[brain].mean()
        means.append(z[brain].mean())
        raw.append(scores[brain].mean())
    assert raw[1] - raw[0] == pytest.approx(0.5, abs=0.01)
    assert means[0] == pytest.approx(means[1], rel=0.03)


def test_a_spread_that_grows_with_age_is_allowed_for():
    people = people_of(60)
    estimator = NormativeEstimator(HealthyCohort.from_participants(people))
    brain = brain_of(0)

    def noisy(age, seed):
        # The variance grows by a quarter of that at 50 in ten years.
        noise = np.random.default_rng(seed).normal(0, 0.1, (32, 32, 32))
        scores = np.zeros(SHAPE)
        scores[PLACE] = 1 + noise * np.sqrt(1 + (age - 50) / 40)
        return scores

    for number, person in enumerate(people):
        estimator.add(noisy(person["age"], number), brain, **person)
    reference = estimator.fit()
    shares = [
        (reference.deviations(noisy(age, seed), brain, age=age, sex=MALE)[brain] > 1.645).mean()
        for seed, age in ((1001, 35.0), (1002, 50.0), (1003, 75.0))
    ]
    assert shares == pytest.approx([0.05] * 3, abs=0.006)


def test_a_higher_score_never_deviates_less():
    people = people_of(8)
    reference = estimator_of(people).fit()
    brain = brain_of(0)
    scores = scores_of(people[0], brain, 0)
    lower = reference.deviations(scores, brain, **people[0])
    higher = reference.deviations(scores + 0.05 * brain, brain, **people[0])
    assert (higher >= lower).all()
    assert (higher > lower)[lower > 0].all()


def test_unknown_and_outlying_ages_are_replaced_with_a_warning():
    cohort = HealthyCohort.from_participants([{"age": 20.0, "sex": MALE}, {"age": 60.0, "sex": FEMALE}])
    assert cohort.impute_covariates(30.0, MALE) == ({"age": 30.0, "sex": MALE}, [])
    used, warnings = cohort.impute_covariates(None, None)
    assert used == {"age": 40.0, "sex": 0.0}
    assert len(warnings) == 2
    assert "40 years" in warnings[0]
    used, warnings = cohort.impute_covariates(91.0, FEMALE)
    assert used["age"] == 60
    assert "20 to 60 years" in warnings[0]
    brain = brain_of(0)
    np.testing.assert_array_equal(cohort.row(None, None, brain)[:3], [1, 0, 0])
    np.testing.assert_array_equal(cohort.row(91.0, MALE, brain), cohort.row(60.0, MALE, brain))


def test_a_cohort_without_known_ages_has_no_age_slope():
    people = [{"age": None, "sex": sex} for sex in (MALE, FEMALE, MALE, FEMALE)]
    cohort = HealthyCohort.from_participants(people)
    assert cohort.impute_covariates(50.0, MALE) == ({"age": None, "sex": MALE}, [])
    estimator = NormativeEstimator(cohort)
    for number, person in enumerate(people):
        brain = brain_of(number)
        estimator.add(scores_of({"age": 50, "sex": person["sex"]}, brain, number), brain, **person)
    reference = estimator.fit()
    np.testing.assert_array_equal(reference.coefficients[1], 0)
    np.testing.assert_array_equal(reference.variance_slope, 0)
    assert np.isfinite(reference.coefficients).all()
    assert reference.coefficients[2][13, 13, 9] == pytest.approx(0.2, abs=0.05)


def test_on_disk_and_back(tmp_path):
    reference = estimator_of(people_of(6)).fit()
    path = tmp_path / "normative.nii.gz"
    reference.write(path)
    assert header_faults(path) == []
    found = NormativeReference.read(path, reference.describe())
    assert found.cohort == reference.cohort
    np.testing.assert_allclose(found.coefficients, reference.coefficients, rtol=2**-11)
    np.testing.assert_allclose(found.sd, reference.sd, rtol=2**-11)
    np.testing.assert_allclose(found.variance_slope, reference.variance_slope, rtol=2**-11)
    image = nib.load(path)
    # The centre of the first block is that of its eight voxels a side.
    np.testing.assert_allclose(image.affine @ [0, 0, 0, 1], [-3.5, 239 - 3.5, 3.5, 1])
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2, 6), np.float32), np.eye(4)), path)
    with pytest.raises(ModelError, match="run `calibrate` again"):
        NormativeReference.read(path, reference.describe())


def test_healthy_controls_are_scored_by_the_reference_of_the_others(tmp_path):
    """The histogram equals that of references fitted without each control in turn."""
    people = people_of(6)
    cohort = HealthyCohort.from_participants(people)
    calibrator = DeviationCalibrator(cohort, tmp_path)
    maps = []
    for number, person in enumerate(people):
        brain = brain_of(number)
        scores = scores_of(person, brain, number) + (3 if number == 5 else 0) * brain
        calibrator.add(scores, brain, None, subject=f"sub-{number}", person=person, kind="healthy")
        maps.append((scores, brain, person))
    _, thresholds = calibrator.finish()
    assert thresholds.n_healthy == 6
    expected = np.zeros_like(thresholds.healthy)
    for left_out, (scores, brain, person) in enumerate(maps):
        others = NormativeEstimator(cohort)
        for number, (other_scores, other_brain, other) in enumerate(maps):
            if number != left_out:
                others.add(other_scores, other_brain, **other)
        expected += count_scores(others.fit().deviations(scores, brain, **person)[brain], FINE_EDGES)
    # Removing a map from the sums rounds differently from never adding it.
    assert np.abs(np.cumsum(thresholds.healthy - expected)).max() <= 1e-4 * expected.sum()


def test_scans_with_lesions_are_scored_by_the_whole_reference(tmp_path):
    people = people_of(8)
    calibrator = DeviationCalibrator(HealthyCohort.from_participants(people), tmp_path)
    for number, person in enumerate(people):
        brain = brain_of(number)
        calibrator.add(
            scores_of(person, brain, number), brain, None, subject=f"sub-{number}", person=person, kind="h"
        )
    brain = brain_of(0)
    lesion = np.zeros(SHAPE, dtype=bool)
    lesion[104:112, 104:112, 72:80] = True
    scores = scores_of(people[0], brain, 99) + 2 * lesion
    calibrator.add(scores, brain, lesion, subject="sub-x", person=people[0], kind="stroke")
    reference, thresholds = calibrator.finish()
    z = reference.deviations(scores, brain, **people[0])
    best = thresholds.thresholds()["max_dice"]
    assert ((z > best) == lesion)[brain].mean() > 0.9999
    assert thresholds.summary()["validation"]["by_kind"]["stroke"]["n"] == 1


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_scores_without_variation_give_no_reference(value):
    people = people_of(6)
    estimator = NormativeEstimator(HealthyCohort.from_participants(people))
    for number, person in enumerate(people):
        brain = brain_of(number)
        estimator.add(np.full(brain.shape, value, np.float32), brain, **person)
    with pytest.raises(ModelError, match="scores of the healthy scans are all equal"):
        estimator.fit()


@pytest.mark.parametrize(("volume", "value"), [(4, 0.0), (4, np.nan), (0, np.inf)])
def test_a_reference_without_standard_deviation_or_not_finite_is_refused(tmp_path, volume, value):
    flat = np.ones(GRID, np.float32)
    reference = NormativeReference(HealthyCohort(50.0, (30.0, 60.0), 0.0), np.stack([flat] * 4), flat, flat)
    path = tmp_path / "normative.nii.gz"
    reference.write(path)
    image = nib.load(path)
    data = np.asarray(image.dataobj).copy()
    data[3, 4, 5, volume] = value
    nib.save(nib.Nifti1Image(data, image.affine), path)
    with pytest.raises(ModelError, match="NaN or infinite values, or a standard deviation of 0"):
        NormativeReference.read(path, reference.describe())
