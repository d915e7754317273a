"""The normative reference against ordinary least squares of statsmodels, voxel by voxel."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import statsmodels.api as sm
from scipy.ndimage import gaussian_filter

from bids_uad.calibration import normative
from bids_uad.calibration.deviation import DeviationCalibrator
from bids_uad.calibration.normative import (
    BLOCK,
    GRID,
    HealthyCohort,
    NormativeEstimator,
    NormativeReference,
)
from bids_uad.errors import ModelError
from bids_uad.space import SHAPE
from tests.header_contract import header_faults

PLACE = (slice(96, 128), slice(96, 128), slice(64, 96))
"""Whole blocks in the middle of the grid."""
MALE, FEMALE = 0.5, -0.5


def brain_of(number):
    """A brain within PLACE, its volume different from person to person."""
    brain = np.zeros(SHAPE, dtype=bool)
    brain[PLACE] = True
    brain[96 : 96 + number % 5, 96:128, 64:96] = False
    return brain


def people_of(n, seed=0):
    rng = np.random.default_rng(seed)
    return [{"age": float(rng.uniform(20, 80)), "sex": rng.choice([MALE, FEMALE])} for _ in range(n)]


def scores_of(person, brain, seed, slope=0.01):
    """Scores that rise with age, and more in the front than in the back."""
    level = 1 + slope * (person["age"] - 50) + 0.2 * person["sex"]
    scores = np.zeros(SHAPE, np.float32)
    scores[PLACE] = level + np.random.default_rng(seed).normal(0, 0.1, (32, 32, 32))
    scores[:, 112:] += 0.5
    return scores * brain


def gathered(people, cohort=None):
    estimator = NormativeEstimator(cohort or HealthyCohort.of(people))
    for number, person in enumerate(people):
        brain = brain_of(number)
        estimator.add(scores_of(person, brain, number), brain, **person)
    return estimator


@pytest.fixture(autouse=True)
def small_brains(monkeypatch):
    """Volumes are told from that of the brains here, so that single precision keeps all digits."""
    monkeypatch.setattr(normative, "TYPICAL_VOLUME", 31.0)


@pytest.fixture
def unsmoothed(monkeypatch):
    """Blocks on their own, so that each is one regression."""
    monkeypatch.setattr(normative, "_SIGMA", 0.0)


def regression(people, block, leave_out=()):
    """Least squares over all voxels of a block, by statsmodels."""
    cohort = HealthyCohort.of(people)
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
    reference = gathered(people).fit()
    expected = regression(people, block)
    np.testing.assert_allclose(reference.coefficients[(slice(None), *block)], expected.params, atol=2e-5)
    age = expected.model.exog[:, 1]
    squares = sm.OLS(expected.resid**2, sm.add_constant(age)).fit().params
    assert reference.spread[block] == pytest.approx(np.sqrt(squares[0]), rel=1e-4)
    assert reference.growth[block] == pytest.approx(squares[1] / squares[0], abs=1e-4)


def test_taking_a_person_out_leaves_what_the_others_alone_give(unsmoothed):
    people = people_of(12)
    cohort = HealthyCohort.of(people)
    estimator = gathered(people)
    brain = brain_of(3)
    scores = scores_of(people[3], brain, 3)
    estimator.remove(scores, brain, **people[3])
    block = (13, 14, 9)
    expected = regression(people, block, leave_out=(3,))
    found = estimator.fit().coefficients[(slice(None), *block)]
    np.testing.assert_allclose(found, expected.params, atol=2e-5)
    # And the hat matrix says the same about the residual: it sums to what influence gives in closed form.
    row = cohort.row(people[3]["age"], people[3]["sex"], brain)
    cut = tuple(slice(BLOCK * k, BLOCK * (k + 1)) for k in block)
    own = scores[cut][brain[cut]].astype(float)
    whole = regression(people, block)
    leverage = row @ np.linalg.inv(whole.model.exog.T @ whole.model.exog) @ row
    closed = (own.mean() - row @ whole.params) / (1 - len(own) * leverage)
    assert own.mean() - row @ found == pytest.approx(closed, rel=1e-3)


def test_memory_does_not_grow_and_order_does_not_matter():
    people = people_of(6)
    forward = gathered(people)
    backward = NormativeEstimator(forward.cohort)
    sizes = set()
    for number in reversed(range(6)):
        brain = brain_of(number)
        backward.add(scores_of(people[number], brain, number), brain, **people[number])
        sizes.add(sum(value.nbytes for value in vars(backward).values() if isinstance(value, np.ndarray)))
    assert len(sizes) == 1
    np.testing.assert_allclose(forward.fit().coefficients, backward.fit().coefficients, rtol=1e-4, atol=1e-5)


def test_smoothing_is_weighted_least_squares():
    """The kernel's weights, by SciPy on the blocks' own sums, put into statsmodels' weighted fit."""
    people = people_of(12)
    cohort, block = HealthyCohort.of(people), (13, 13, 9)
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
    found = gathered(people).fit().coefficients[(slice(None), *block)]
    np.testing.assert_allclose(found, expected.params, atol=5e-5)


def test_the_location_is_interpolated_between_the_centres_of_blocks():
    """Along a ramp, linear interpolation gives every voxel the value at its own place."""
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
    ("growth", "age", "variance"),
    # Growth in ten years as a share of the variance at 50; between a fifth and three times as much.
    [(0.25, 30.0, 0.5), (0.25, 50.0, 1.0), (0.25, 80.0, 1.75), (0.3, 10.0, 0.2), (0.9, 80.0, 3.0)],
)
def test_the_variance_is_linear_in_age_within_limits(growth, age, variance):
    flat = np.ones(GRID, np.float32)
    cohort = HealthyCohort(50.0, (10.0, 90.0), None)
    reference = NormativeReference(cohort, np.zeros((4, *GRID), np.float32), 0.1 * flat, growth * flat)
    brain = brain_of(0)
    found = reference.deviations(np.ones(SHAPE), brain, age=age, sex=None)
    np.testing.assert_allclose(found[brain], 1 / (0.1 * np.sqrt(variance)), rtol=1e-5)


def test_growth_of_the_variance_is_limited_and_the_spread_has_a_floor(unsmoothed):
    """A quarter of the brain has no noise at all; elsewhere the variance is nil until 40."""
    rng = np.random.default_rng(0)
    people = [{"age": float(age), "sex": None} for age in rng.uniform(20, 80, 15)]
    estimator = NormativeEstimator(HealthyCohort.of(people))
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
    assert reference.growth[14, 13, 9] == np.float32(0.3)
    # Squared residuals at the mean age, by a line through those of all voxels.
    age = np.repeat([person["age"] for person in people], noise.size)
    square = np.square(np.concatenate([part.ravel() for part in residuals]))
    slope, intercept = np.polyfit(age - reference.cohort.age_mean, square, 1)
    assert slope > 0
    assert reference.spread[12, 13, 9] == pytest.approx(0.3 * np.sqrt(intercept), rel=0.01)


def test_where_no_brain_reaches_the_whole_brain_stands():
    people = people_of(12)
    cohort = HealthyCohort.of(people)
    reference = gathered(people, cohort).fit()
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
    reference = gathered(people).fit()
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
    estimator = NormativeEstimator(HealthyCohort.of(people))
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
    reference = gathered(people).fit()
    brain = brain_of(0)
    scores = scores_of(people[0], brain, 0)
    lower = reference.deviations(scores, brain, **people[0])
    higher = reference.deviations(scores + 0.05 * brain, brain, **people[0])
    assert (higher >= lower).all()
    assert (higher > lower)[lower > 0].all()


def test_missing_and_strange_ages_are_placed_and_told():
    cohort = HealthyCohort.of([{"age": 20.0, "sex": MALE}, {"age": 60.0, "sex": FEMALE}])
    assert cohort.place(30.0, MALE) == ({"age": 30.0, "sex": MALE}, [])
    used, remarks = cohort.place(None, None)
    assert used == {"age": 40.0, "sex": 0.0}
    assert len(remarks) == 2
    assert "40 years" in remarks[0]
    used, remarks = cohort.place(91.0, FEMALE)
    assert used["age"] == 60
    assert "20 to 60 years" in remarks[0]
    brain = brain_of(0)
    np.testing.assert_array_equal(cohort.row(None, None, brain)[:3], [1, 0, 0])
    np.testing.assert_array_equal(cohort.row(91.0, MALE, brain), cohort.row(60.0, MALE, brain))


def test_a_cohort_whose_ages_nobody_knows_has_no_age_slope():
    people = [{"age": None, "sex": sex} for sex in (MALE, FEMALE, MALE, FEMALE)]
    cohort = HealthyCohort.of(people)
    assert cohort.place(50.0, MALE) == ({"age": None, "sex": MALE}, [])
    estimator = NormativeEstimator(cohort)
    for number, person in enumerate(people):
        brain = brain_of(number)
        estimator.add(scores_of({"age": 50, "sex": person["sex"]}, brain, number), brain, **person)
    reference = estimator.fit()
    np.testing.assert_array_equal(reference.coefficients[1], 0)
    np.testing.assert_array_equal(reference.growth, 0)
    assert np.isfinite(reference.coefficients).all()
    assert reference.coefficients[2][13, 13, 9] == pytest.approx(0.2, abs=0.05)


def test_on_disk_and_back(tmp_path):
    reference = gathered(people_of(6)).fit()
    path = tmp_path / "normative.nii.gz"
    reference.write(path)
    assert header_faults(path) == []
    found = NormativeReference.read(path, reference.describe())
    assert found.cohort == reference.cohort
    np.testing.assert_allclose(found.coefficients, reference.coefficients, rtol=2**-11)
    np.testing.assert_allclose(found.spread, reference.spread, rtol=2**-11)
    np.testing.assert_allclose(found.growth, reference.growth, rtol=2**-11)
    image = nib.load(path)
    # The centre of the first block is that of its eight voxels a side.
    np.testing.assert_allclose(image.affine @ [0, 0, 0, 1], [-3.5, 239 - 3.5, 3.5, 1])
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2, 6), np.float32), np.eye(4)), path)
    with pytest.raises(ModelError, match="run `calibrate` again"):
        NormativeReference.read(path, reference.describe())


def test_healthy_people_are_judged_by_the_others(tmp_path):
    """A person unlike all others must not be excused by having been in the reference."""
    people = people_of(8)
    calibrator = DeviationCalibrator(HealthyCohort.of(people), tmp_path)
    for number, person in enumerate(people):
        brain = brain_of(number)
        scores = scores_of(person, brain, number) + (3 if number == 5 else 0) * brain
        calibrator.add(scores, brain, None, subject=f"sub-{number}", person=person, kind="healthy")
    reference, thresholds = calibrator.finish()
    assert thresholds.n_healthy == 8
    odd = scores_of(people[5], brain_of(5), 5) + 3 * brain_of(5)
    within = reference.deviations(odd, brain_of(5), **people[5])[brain_of(5)]
    highest = thresholds.bin_edges()[1:-1].max() / 2  # bins reach to twice the highest score
    assert highest > 2 * within.max()


def test_a_lesion_is_judged_by_the_whole_reference(tmp_path):
    people = people_of(8)
    calibrator = DeviationCalibrator(HealthyCohort.of(people), tmp_path)
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
    estimator = NormativeEstimator(HealthyCohort.of(people))
    for number, person in enumerate(people):
        brain = brain_of(number)
        estimator.add(np.full(brain.shape, value, np.float32), brain, **person)
    with pytest.raises(ModelError, match="scores of the healthy scans do not vary"):
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
