"""Normal findings and artefacts: place, sign in each contrast, frequency, and dependence on age."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from bids_uad.simulation import variants
from bids_uad.simulation.anatomy import CLASSES
from bids_uad.simulation.contrast import CONTRASTS
from bids_uad.simulation.deformation import MIDLINE
from bids_uad.simulation.spatial import BOX_SHAPE, box_points
from bids_uad.simulation.subject import STREAMS, Population, draw_subject_info, make_anatomy, make_signal
from bids_uad.simulation.variants import AGES, PREVALENCE, SIGNALS, Finding, prevalence, stamp_tube

from .conftest import INDEX, SEED


@pytest.fixture(scope="module")
def where(healthy) -> variants._Brain:
    return variants._Brain(healthy.fractions, healthy.brain, box_points()[..., 0] - MIDLINE)


@pytest.fixture(scope="module", autouse=True)
def every_finding_present():
    """Draw every finding, unless a test is about frequency."""
    kept = dict(PREVALENCE)
    PREVALENCE.update(dict.fromkeys(PREVALENCE, (1.0, 1.0, 1.0)))
    yield kept
    PREVALENCE.update(kept)


@pytest.fixture(scope="module")
def found(healthy) -> variants.Findings:
    side = box_points()[..., 0] - MIDLINE
    with torch.no_grad():
        return variants.draw_findings(
            healthy.fractions, healthy.change, healthy.brain, side, 70.0, np.random.default_rng(1)
        )


def fraction(anatomy, *names: str) -> np.ndarray:
    return sum(anatomy.fractions[CLASSES.index(name)] for name in names).numpy()


def weight_of(found: variants.Findings, kind: str) -> np.ndarray:
    return next(finding.weight.numpy() for finding in found.findings if finding.kind == kind)


@pytest.mark.parametrize(("radius", "tolerance"), [(0.4, 0.25), (1.0, 0.15), (3.0, 0.1)])
def test_stamp_tube_has_the_volume_of_a_capsule(radius, tolerance):
    volume = np.zeros((40, 40, 40), np.float32)
    start, end = np.array([10.2, 20.0, 19.7]), np.array([29.8, 20.3, 20.1])
    stamp_tube(volume, start, end, radius)
    length = np.linalg.norm(end - start)
    expected = np.pi * radius**2 * length + 4 / 3 * np.pi * radius**3
    assert volume.sum() == pytest.approx(expected, rel=tolerance)
    spread = np.argwhere(volume > 0.2).std(0)
    assert spread[0] > 3 * spread[1:].max()


def test_stamp_tube_is_cut_at_the_edge_of_the_volume():
    volume = np.zeros((10, 10, 10), np.float32)
    stamp_tube(volume, np.array([-4.0, 5, 5]), np.array([2.0, 5, 5]), 1.5)
    stamp_tube(volume, np.array([-9.0, 5, 5]), np.array([-5.0, 5, 5]), 1.5)
    assert volume[:2, 5, 5].min() == 1
    assert not volume[5:].any()


@pytest.mark.parametrize(
    ("kind", "classes"),
    [
        ("perivascular", ("white", "striatum", "pallidum")),
        ("iron", ("pallidum", "striatum", "brainstem", "cerebellar_white")),
        ("calcified", ("pallidum", "white")),
        ("choroid", ("ventricle", "choroid")),
        ("artery", ("csf",)),
    ],
)
def test_findings_lie_in_their_tissue(kind, classes, healthy, found):
    weight = weight_of(found, kind)
    assert weight.min() >= 0
    assert weight.max() <= 1
    assert weight.sum() > 20
    inside = (weight * fraction(healthy, *classes)).sum() / weight.sum()
    # Tissue fractions of the template are blurred, so that they are below 1 within a tissue.
    assert inside > 0.6


def test_choroid_plexus_lies_behind_the_thalami_on_both_sides(where, found):
    places = np.argwhere(weight_of(found, "choroid") > 0.3)
    behind = places[:, 1] - where.centre[1]
    assert 5 < behind.mean() < 40
    lateral = places[:, 0] - where.middle
    assert (lateral > 8).any()
    assert (lateral < -8).any()
    assert np.abs(lateral).min() > 4


def test_perivascular_spaces_are_thin_tubes_in_white_matter_and_basal_ganglia(healthy, where, found):
    weight = weight_of(found, "perivascular")
    drawn = found.drawn
    assert drawn["perivascular_white"] > 0
    assert drawn["perivascular_basal"] > 0
    labels, count = ndimage.label(weight > 0.1, np.ones((3, 3, 3)))
    assert count > 5
    # At most 3 mm wide, so that nothing is left after the removal of a voxel on each side, twice.
    assert not ndimage.binary_erosion(weight > 0.5, iterations=2).any()
    longest = [max(part.stop - part.start for part in box) for box in ndimage.find_objects(labels)]
    assert 3 <= np.median(longest) <= 14


def test_remnants_and_sinuses_extend_the_brain_mask_at_its_edge(healthy, found):
    before, after = healthy.brain.numpy(), found.brain.numpy()
    assert (after | ~before).all()
    assert ndimage.label(after)[1] == 1
    added = after & ~before
    outside = ndimage.distance_transform_edt(~before)
    assert added.sum() > 200
    assert outside[added].max() <= 5.5
    shown = sum(weight_of(found, kind) for kind in ("sinus", "dura", "fat"))
    assert (shown[added] > 0.3).mean() > 0.95


def test_sinus_lies_at_the_midline_or_at_the_tentorium(where, found):
    places = np.argwhere(weight_of(found, "sinus") > 0.5)
    height, behind = places[:, 2] - where.centre[2], places[:, 1] - where.centre[1]
    at_midline = np.abs(places[:, 0] - where.middle) < 7
    assert at_midline.mean() > 0.2
    assert (behind[~at_midline] > 20).all()
    assert height[at_midline].max() > 40


def test_white_matter_findings_only_add_change_in_white_matter(healthy, found):
    added = (found.change - healthy.change).numpy()
    assert added.min() >= 0
    assert found.change.max() <= 1
    assert added.sum() > 50
    assert (added * fraction(healthy, "white")).sum() / added.sum() > 0.6


def test_cavum_is_fluid_between_two_leaves_of_tissue(healthy, where, found):
    assert found.drawn["cavum_mm"] > 2
    difference = (found.fractions - healthy.fractions).numpy()
    np.testing.assert_allclose(difference.sum(0), 0, atol=1e-4)
    fluid, white = difference[CLASSES.index("ventricle")], difference[CLASSES.index("white")]
    places = np.argwhere(np.abs(difference).sum(0) > 0.1)
    assert np.abs(places[:, 0] - where.middle).max() <= found.drawn["cavum_mm"] / 2 + 3
    assert (places[:, 1] < where.centre[1] + 10).all()
    across = np.abs(np.arange(BOX_SHAPE[0]) - where.middle)
    middle = found.fractions[CLASSES.index("ventricle")].numpy()[where.middle]
    assert middle[places[:, 1], places[:, 2]].mean() > 0.5
    assert (fluid * (across < 1.5)[:, None, None]).sum() > 0
    assert (white * (across > 1.5)[:, None, None]).sum() > 0


SIGNS = {
    "perivascular": {"T1w": -1, "T2w": 1, "FLAIR": -1},
    "iron": {"T2w": -1, "FLAIR": -1},
    "calcified": {"T2w": -1, "FLAIR": -1},
    "choroid": {"T1w": 1, "T2w": -1, "FLAIR": 1},
    "artery": {"T2w": -1},
    "dura": {"T1w": 1, "FLAIR": 1},
    "fat": {"T1w": 1},
}
"""Sign of the change against the tissue or fluid of the place, where it is the same in all scans."""


@pytest.mark.parametrize("modality", CONTRASTS)
def test_findings_have_their_sign_in_each_contrast(modality, subject, healthy, found):
    means = subject.scanner.means[modality]
    values = torch.tensor([means[name] for name in CLASSES])
    image = torch.tensordot(values, healthy.fractions, dims=1).clamp_min(0.05)
    for finding in found.findings:
        sign = SIGNS.get(finding.kind, {}).get(modality)
        if sign is None:
            continue
        core = finding.weight > 0.8 * finding.weight.max()
        for seed in range(2):
            after, drawn = variants.add_findings(
                modality, image, [finding], means, np.random.default_rng(seed)
            )
            assert set(drawn) == {finding.kind}
            assert not (after != image)[finding.weight == 0].any()
            change = float((after - image)[core].mean())
            assert change * sign > 0, (finding.kind, change)


def test_calcification_is_brighter_or_darker_in_t1w_scans():
    image, weight = torch.full(BOX_SHAPE, 0.5), torch.ones(BOX_SHAPE)
    means = dict.fromkeys(CLASSES, 0.5)
    values = [
        float(
            variants.add_findings(
                "T1w", image, [Finding("calcified", weight)], means, np.random.default_rng(seed)
            )[0].mean()
        )
        for seed in range(8)
    ]
    assert min(values) < 0.45
    assert max(values) > 0.54


def test_signals_cover_every_contrast_with_probabilities_that_sum_to_one():
    for kind, by_contrast in SIGNALS.items():
        assert set(by_contrast) == set(CONTRASTS), kind
        for options in by_contrast.values():
            assert sum(option[0] for option in options) == pytest.approx(1)
            assert all(low < high for _, _, low, high in options)


def test_prevalence_is_linear_between_the_listed_ages(every_finding_present):
    kept = every_finding_present
    for name, values in kept.items():
        PREVALENCE[name] = values
        assert [prevalence(name, age) for age in AGES] == pytest.approx(values)
        assert prevalence(name, 35.0) == pytest.approx((values[0] + values[1]) / 2)
        assert list(values) == sorted(values)
        PREVALENCE[name] = (1.0, 1.0, 1.0)
    assert kept["white_matter_foci"][2] > 3 * kept["white_matter_foci"][0]


def test_findings_have_the_stated_frequency(every_finding_present):
    PREVALENCE["ventricle_asymmetry"] = every_finding_present["ventricle_asymmetry"]
    maps = torch.ones(2, 2, 2), torch.ones(2, 2, 2)
    found = [
        variants.asymmetric_ventricles(*maps, np.random.default_rng(seed), 50.0) is not None
        for seed in range(400)
    ]
    PREVALENCE["ventricle_asymmetry"] = (1.0, 1.0, 1.0)
    assert stats.binomtest(sum(found), 400, 0.12).pvalue > 0.01


def test_asymmetric_ventricles_selects_one_side():
    side = torch.linspace(-40, 40, 81)[:, None, None].expand(81, 3, 3)
    region, shift = variants.asymmetric_ventricles(torch.ones(81, 3, 3), side, np.random.default_rng(0), 50.0)
    halves = sorted([float(region[:35].mean()), float(region[46:].mean())])
    assert halves[0] < 0.01
    assert halves[1] > 0.9
    assert 0.8 <= abs(shift) <= 2.2


def test_number_of_perivascular_spaces_and_foci_and_iron_grow_with_age(where):
    def mean(age: float) -> np.ndarray:
        values = []
        for seed in range(5):
            drawn: dict = {}
            variants._perivascular(where, age, np.random.default_rng(seed), drawn)
            variants._white_matter(where, age, np.random.default_rng(seed), drawn)
            iron = variants._iron(where, age, np.random.default_rng(seed), {})
            counts = ("perivascular_white", "perivascular_basal", "white_matter_foci", "caps_mm")
            values.append([*(drawn[name] for name in counts), iron.sum()])
        return np.mean(values, 0)

    assert (mean(85.0) > 1.25 * mean(25.0)).all()


def test_ghosts_lie_at_the_period_of_the_modulation():
    image = torch.zeros(8, 200, 8)
    image[:, 50] = 1.0
    artefacts = {"ghost": 0.04, "ghosts_per_field": 4.0, "motion_mm": [0.0, 0.0, 0.0], "truncated": 0.0}
    profile = variants.add_ghosts(image, artefacts)[4, :, 4].numpy()
    expected = np.zeros(200)
    # A cosine of amplitude 2 a splits into two ghosts of amplitude a, a quarter of the field away.
    expected[[50, 100, 0]] = 1 - 2 * 0.04, 0.04, 0.04
    np.testing.assert_allclose(profile, expected, atol=1e-5)


def test_ringing_is_that_of_a_truncated_fourier_series():
    image = torch.zeros(4, 200, 4)
    image[:, 60:140] = 1.0
    artefacts = {"ghost": 1e-9, "ghosts_per_field": 4.0, "motion_mm": [0.0, 0.0, 0.0], "truncated": 0.5}
    after = variants.add_ghosts(image, artefacts)[1, :, 1].numpy()
    lines = np.fft.fft(image[1, :, 1].numpy())
    lines[51:150] = 0  # frequencies above a quarter of the sampling rate
    np.testing.assert_allclose(after, abs(np.fft.ifft(lines)), atol=1e-5)
    # The overshoot is at most that of Gibbs, 9 % of the step; samples do not hit its maximum.
    assert 1.05 < after.max() < 1.09


def none_drawn() -> dict:
    drawn = variants.draw_artefacts(np.random.default_rng(0))
    zero = {"ghost": 0.0, "truncated": 0.0, "frontal_loss": 0.0, "temporal_loss": [0.0, 0.0]}
    return drawn | zero | dict.fromkeys(("coil_vertex", "coil_base", "coil_front"), 0.0)


def test_add_artefacts_darkens_base_and_vertex_only(healthy, where):
    image = torch.ones(BOX_SHAPE)

    def after(**drawn) -> np.ndarray:
        with torch.no_grad():
            return variants.add_artefacts(
                image, healthy.fractions, healthy.brain, none_drawn() | drawn
            ).numpy()

    np.testing.assert_array_equal(after(), 1)
    frontal = after(frontal_loss=0.5, loss_mm=10.0)
    darkest = np.array(np.unravel_index(frontal.argmin(), BOX_SHAPE))
    assert frontal.min() == pytest.approx(0.5, abs=0.01)
    assert np.linalg.norm(darkest - where.index(0, 38, -36)) < 4
    assert (frontal[:, :, 100:] > 0.999).all()
    vertex = after(coil_vertex=0.3)
    top = np.flatnonzero(healthy.brain.numpy().any((0, 1))).max()
    np.testing.assert_allclose(vertex[:, :, top], 0.7, atol=1e-5)
    assert (vertex[:, :, : top // 2] == 1).all()


def test_artefacts_have_the_stated_frequency_and_slices_of_3_to_6_mm():
    drawn = [variants.draw_artefacts(np.random.default_rng(seed)) for seed in range(400)]
    thick = [each["thickness"] for each in drawn if each["thickness"] is not None]
    assert 3 <= min(thick) < 3.3
    assert 5.7 < max(thick) <= 6
    for name, found in {
        "thick_slices": len(thick),
        "ghosts": sum(each["ghost"] > 0 for each in drawn),
        "signal_loss": sum(each["frontal_loss"] > 0 for each in drawn),
        "coil": sum(each["coil_vertex"] > 0 for each in drawn),
    }.items():
        assert stats.binomtest(found, 400, variants.ARTEFACTS[name]).pvalue > 0.005, name


def test_purposes_of_random_numbers_keep_their_positions():
    """The datasets of a seed depend on them."""
    assert STREAMS[:15] == (
        *("subject", "shape", "mask", "age", "lesion", "pose", "T1w", "T1w-scan", "T1w-lesion"),
        *("T2w", "T2w-scan", "T2w-lesion", "scanner", "lesion-volume", "lesion-shape"),
    )


@pytest.fixture(scope="module")
def varied():
    """A subject with variants and plaques."""
    population = Population(SEED, normal_variants=True)
    subject = draw_subject_info(population, INDEX)
    with torch.no_grad():
        return population, subject, make_anatomy(population, INDEX, subject, "ms")


def test_ages_reach_90_years_and_keep_their_order():
    pairs = [
        (
            draw_subject_info(Population(1), index),
            draw_subject_info(Population(1, normal_variants=True), index),
        )
        for index in range(200)
    ]
    assert max(b.age for _, b in pairs) > 85
    assert all(b.age == pytest.approx(20 + (a.age - 20) * 70 / 65, abs=0.11) for a, b in pairs)
    assert all(replace(b, age=a.age) == a for a, b in pairs)


def test_variants_are_the_same_with_a_lesion(varied):
    population, subject, patient = varied
    with torch.no_grad():
        before, settings, drawn = make_signal(
            population, INDEX, subject, replace(patient, lesion=None), "FLAIR"
        )
        after, again, same = make_signal(population, INDEX, subject, patient, "FLAIR")
    assert settings == again
    assert drawn == same
    assert set(drawn["findings"]) == {finding.kind for finding in patient.findings}
    assert not torch.equal(before, after)
    if not drawn["artefacts"]["ghost"]:
        far = torch.from_numpy(~ndimage.binary_dilation(patient.lesion.fraction.numpy() > 0, iterations=2))
        assert torch.equal(before[far], after[far])


def test_parameters_of_variants_are_recorded(varied):
    drawn = varied[2].drawn["variants"]
    assert {"perivascular_white", "iron", "caps_mm", "cavum_mm", "asymmetry_mm", "arteries"} <= set(drawn)
