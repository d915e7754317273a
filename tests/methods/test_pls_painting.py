"""Training scans of PLS: variation of healthy scans, and synthetic lesions, in a small part of the atlas."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.stats import chisquare, kstest

from bids_uad.methods.base import Scan
from bids_uad.methods.pls.painting import (
    FLUID,
    GREY,
    MAX_EMPHASIS,
    VENTRICLE_PRIOR,
    WHITE,
    HealthyConfig,
    LesionConfig,
    Levels,
    PaintingConfig,
    _acquire,
    _add_flow_effects,
    _add_perivascular_spaces,
    _add_rim_artifacts,
    _add_strip_remnant,
    _change_nuclei,
    _change_ventricle_rim,
    _cut_edge,
    _LargeLesion,
    _Lesions,
    _Plan,
    _scaled,
    _thick_slices,
    _vary_regions,
    estimate_tissue,
    paint_scan,
    prior_slices,
)
from bids_uad.methods.pls.volumes import erode_in_plane, gaussian_smooth, normal_field, warp
from bids_uad.space import TISSUES
from tests.networks.conftest import seeded

REGION = np.s_[62:94, 70:154, 66:168]
"""Slices, rows and columns of the central part of the brain, with most of the ventricles."""
LEVELS = {
    "T1w": Levels(fluid=0.2, grey=0.6, white=0.9, pure_fluid=0.17),
    "T2w": Levels(fluid=0.95, grey=0.6, white=0.4, pure_fluid=0.98),
    "FLAIR": Levels(fluid=0.15, grey=0.8, white=0.6, pure_fluid=0.12),
}
CONTRASTS = list(LEVELS)
# As of many turbo-spin-echo scans.
LEVELS["faint T2w"] = Levels(fluid=0.9, grey=0.36, white=0.27, pure_fluid=0.93)
SIMULATED = torch.tensor([1, 1, 2, 3, 4, 5], dtype=torch.uint8)
"""Label of a simulated scan by tissue of the atlas."""
CLASSES = torch.tensor([0, FLUID, GREY, WHITE, GREY, WHITE], dtype=torch.uint8)
NOTHING = LesionConfig(healthy_prob=1.0)
STILL = HealthyConfig(0, *[0.0] * 12)


def coloured(tissue, contrast, noise=0.02, seed=0):
    """Return a scan with the levels of a contrast, without partial volume."""
    level = LEVELS[contrast]
    values = torch.tensor([0, level.fluid, level.grey, level.white])
    noise = noise * torch.randn(tissue.shape, generator=seeded(seed))
    return (values[tissue.long()] + noise).clamp(0, 1) * (tissue > 0)


@pytest.fixture(scope="module")
def labels():
    """Labels of the region as those of a simulated scan, in whole slices."""
    priors = prior_slices()[(slice(None), *REGION)].float()
    inside = torch.where(priors.sum(0) > 0.5, SIMULATED[priors.argmax(0)], 0)
    whole = torch.zeros(prior_slices().shape[1:], dtype=torch.uint8)
    whole[REGION] = inside
    return whole


@pytest.fixture(scope="module")
def tissue(labels):
    """Tissue classes of the region only."""
    return CLASSES[labels[REGION].long()]


@pytest.fixture(scope="module")
def ventricles(tissue):
    return (tissue == FLUID) & (prior_slices()[TISSUES.index("ventricle")][REGION] > VENTRICLE_PRIOR)


@pytest.fixture(params=CONTRASTS)
def contrast(request):
    return request.param


def healthy(labels, contrast):
    return Scan(coloured(CLASSES[labels.long()], contrast), labels > 0, labels)


def lesions_in(tissue, ventricles, contrast, seed=0, image=None):
    image = coloured(tissue, contrast) if image is None else image
    return _Lesions(image.clone(), tissue > 0, tissue, ventricles, LEVELS[contrast], seeded(seed))


def typical(lesions):
    """Let a lesion have the most frequent contrast: towards fluid, or brighter than the tissue in FLAIR."""
    lesions._chance = lambda probability: probability == 0.8
    return lesions


class TestPaintScan:
    def test_without_lesions_the_target_is_empty(self, labels, contrast):
        config = PaintingConfig(lesion=NOTHING)
        painted = paint_scan(healthy(labels, contrast), config, seeded(3))
        assert not painted.target.any()
        assert torch.equal(painted.weight, painted.brain.half())
        inside = painted.slices[painted.brain].float()
        assert 0 <= inside.min() < inside.max() == 1
        # As in preprocessing, 1 is the 99.5th percentile of the brain.
        assert float((inside == 1).float().mean()) == pytest.approx(0.005, abs=0.003)

    def test_all_of_a_painted_scan_lies_in_its_brain(self, labels, contrast):
        painted = paint_scan(healthy(labels, contrast), PaintingConfig(), seeded(2))
        for part in (painted.slices, painted.target, painted.weight):
            assert part.shape == painted.brain.shape == labels.shape
            assert not part[~painted.brain].any()
        assert painted.target.max() <= 1
        assert (painted.weight[painted.brain & (painted.target == 0)] == 1).all()
        assert painted.weight.min() >= 0
        excess = PaintingConfig().small_lesion_weight - 1
        assert painted.weight.max() <= 1 + MAX_EMPHASIS * excess

    def test_repeats_for_a_seed_and_does_not_change_the_scan(self, labels):
        scan = healthy(labels, "T2w")
        before = scan.slices.clone()
        first, again, other = (paint_scan(scan, PaintingConfig(), seeded(seed)) for seed in (3, 3, 4))
        for name in ("slices", "brain", "target", "weight"):
            assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(first.slices, other.slices)
        assert torch.equal(scan.slices, before)

    def test_paints_a_lesion_of_the_requested_volume_that_is_darker_in_t1w(self, labels):
        lesion = LesionConfig(
            healthy_prob=0, large_counts=(1.0,), mass_prob=1, mass_volume=(20.0, 20.1), small_prob=0,
            periventricular_prob=0,
        )  # fmt: skip
        config = PaintingConfig(lesion, STILL)
        volumes, brains = [], []
        for seed in range(4):
            painted = paint_scan(healthy(labels, "T1w"), config, seeded(seed))
            inside = painted.target > 0.5
            assert (
                0.6 < painted.weight[inside].min() <= painted.weight[inside].max() <= 1
            )  # not a small lesion
            volumes.append(int(inside.sum()))
            brains.append(int(painted.brain.sum()))
        # A part of the mass may lie outside the region.
        assert 6_000 < min(volumes) < max(volumes) < 32_000
        assert all(volume < brain / 2 for volume, brain in zip(volumes, brains, strict=True))

    @pytest.mark.parametrize(("diameter", "relative"), [(6.0, 1.0), (12.0, 0.25), (3.0, 4.0)])
    def test_small_lesions_have_about_the_same_weight_in_a_slice(self, labels, diameter, relative):
        lesion = LesionConfig(
            healthy_prob=0, large_counts=(1.0,), mass_prob=0, small_prob=1, max_small=2,
            small_size=(diameter, 1.001 * diameter), periventricular_prob=0,
        )  # fmt: skip
        heavy, plain = (
            paint_scan(
                healthy(labels, "T2w"), PaintingConfig(lesion, STILL, small_lesion_weight=w), seeded(3)
            )
            for w in (5.0, 1.0)
        )
        # Without emphasis, the weight is that of the visibility, which is measured for all lesions together.
        core = plain.target > 0.9 * plain.target.max()
        ratio = (heavy.weight[core] / plain.weight[core] - 1) / plain.target[core]
        assert float(ratio.median()) == pytest.approx(4 * relative, rel=0.15)
        assert not (heavy.weight > 1)[heavy.target == 0].any()


class TestPlan:
    def plans(self, config, number=600):
        brain, generator = torch.ones(20, 30, 25, dtype=torch.bool), seeded()
        return [_Plan.draw(brain, config, generator) for _ in range(number)]

    def test_has_the_configured_frequencies(self):
        config = LesionConfig()
        plans = self.plans(replace(config, healthy_prob=0.0))
        kinds = [[large_lesion.kind for large_lesion in plan.large_lesions] for plan in plans]
        numbers = [sum(kind != "mass" for kind in kind_list) for kind_list in kinds]
        assert (
            chisquare(np.bincount(numbers, minlength=4), np.array(config.large_counts) * len(plans)).pvalue
            > 1e-3
        )
        masses = np.mean(["mass" in kind_list for kind_list in kinds])
        assert masses == pytest.approx(config.mass_prob, abs=0.06)
        assert np.mean([plan.small > 0 for plan in plans]) == pytest.approx(config.small_prob, abs=0.06)
        assert np.mean([plan.band for plan in plans]) == pytest.approx(config.periventricular_prob, abs=0.07)
        counts = np.bincount([plan.small for plan in plans if plan.small], minlength=config.max_small + 1)[1:]
        assert chisquare(counts).pvalue > 1e-3

    def test_healthy_scans_have_no_lesion(self):
        empty = [plan == _Plan((), 0, band=False) for plan in self.plans(LesionConfig(healthy_prob=0.3))]
        assert np.mean(empty) == pytest.approx(0.3, abs=0.07)  # others without a lesion are rare

    def test_sizes_are_log_uniform(self):
        config = LesionConfig(healthy_prob=0, large_size=(10.0, 90.0), mass_volume=(15.0, 220.0))
        large_lesions = [large_lesion for plan in self.plans(config) for large_lesion in plan.large_lesions]
        diameters = [
            math.log(2 * large_lesion.radius)
            for large_lesion in large_lesions
            if large_lesion.kind in ("oedema", "cavity")
        ]
        volumes = [
            math.log(4 / 3e3 * math.pi * large_lesion.radius**3)
            for large_lesion in large_lesions
            if large_lesion.kind == "mass"
        ]
        for values, (low, high) in ((diameters, config.large_size), (volumes, config.mass_volume)):
            span = math.log(high / low)
            assert kstest(values, "uniform", args=(math.log(low), span)).pvalue > 1e-3
        smallest = min(large_lesion.radius for large_lesion in large_lesions if large_lesion.kind == "tumour")
        assert 2 * smallest == pytest.approx(10 * 9 ** (1 / 3), rel=0.1)
        # Masses and tumours displace the tissue.
        for large_lesion in large_lesions:
            ratio = large_lesion.displacement / large_lesion.radius
            low, high = {"mass": (0.1, 0.5), "tumour": (0, 0.3)}.get(large_lesion.kind, (0, 0))
            assert low <= ratio <= high


class TestLesions:
    CENTRE = torch.tensor([16.0, 58.0, 40.0])

    def large_lesion(self, kind="oedema", radius=9.0, centre=None):
        return _LargeLesion(kind, self.CENTRE if centre is None else centre, radius, 0.0)

    def painted(self, lesions, large_lesion, shapes=()):
        before = lesions.image.clone()
        lesions.paint(_Plan((large_lesion,), 0, band=False), LesionConfig(real_shape_prob=1.0), shapes)
        return before, lesions.image

    @pytest.mark.parametrize("label", [GREY, WHITE])
    def test_contrast_has_the_sign_of_the_scan(self, tissue, ventricles, contrast, label):
        """Against the tissue under the lesion: dark in T1w, bright in T2w and FLAIR."""
        sign = -1 if contrast == "T1w" else 1
        for seed in range(4):
            lesions = typical(lesions_in(tissue, ventricles, contrast, seed))
            before, after = self.painted(lesions, self.large_lesion(radius=12.0))
            inside = (lesions.target > 0.7 * lesions.target.max()) & (tissue == label)
            assert inside.sum() > 100
            change = sign * (after - before)[inside]
            assert change.mean() > 0.005
            assert (change > 0).float().mean() > 0.9

    def test_most_lesions_have_the_typical_contrast(self, contrast):
        """The others have any intensity, foreign texture, or are dark in FLAIR."""
        tissue = torch.full((6, 6, 6), WHITE, dtype=torch.uint8)
        tissue[:3] = GREY
        before = coloured(tissue, contrast, noise=0.0)
        changes = []
        for seed in range(300):
            lesions = lesions_in(tissue, torch.zeros(tissue.shape), contrast, seed, before)
            changes.append(lesions._lesion_level(before) - before)
        changes = torch.stack(changes)
        lower, higher = ((sign * changes > 0).flatten(1).all(1).float().mean() for sign in (-1, 1))
        more, less = (lower, higher) if contrast == "T1w" else (higher, lower)
        expected = 0.85**2 * (0.8 if contrast == "FLAIR" else 1.0)
        assert expected - 0.08 < more < expected + 0.85 * 0.15 + 0.05
        assert less < 0.32

    @pytest.mark.parametrize(("contrast", "pure_fluid"), [("T2w", 0.9), ("T1w", 0.1)])
    def test_lesions_differ_from_tissue_as_much_as_pure_fluid(self, contrast, pure_fluid):
        """Voxels of fluid are mostly mixed with tissue, and cysts and oedema may differ more from it."""
        grey, white = (0.35, 0.3) if contrast == "T2w" else (0.7, 0.8)
        levels = Levels(fluid=0.5, grey=grey, white=white, pure_fluid=pure_fluid)
        before = torch.full((2, 2, 2), levels.white)
        found = []
        for seed in range(400):
            empty = torch.zeros(before.shape)
            lesions = typical(_Lesions(before, empty > 0, empty, empty > 0, levels, seeded(seed)))
            found.append(float(lesions._lesion_level(before)[0, 0, 0]))
        other = levels.white if contrast == "T2w" else levels.grey
        share = (np.array(found) - other) / (pure_fluid - other)
        # From 55 % of the way to the median of fluid (10 % in T1w scans), up to pure fluid.
        least = 0.55 if contrast == "T2w" else 0.1
        assert share.min() == pytest.approx(least * (levels.fluid - other) / (pure_fluid - other), abs=0.05)
        assert share.max() == pytest.approx(1, abs=0.08)
        assert 0.03 < (share > 0.8).mean() < 0.4

    def test_target_is_the_whole_shape_where_intensities_meet(self, tissue, ventricles):
        """A lesion that is as bright as fluid is visible in other tissue only, and its target is closed."""
        places = ((tissue == FLUID) & (ventricles > 0.5)).nonzero().float()
        lesions = typical(lesions_in(tissue, ventricles, "T2w"))
        lesions._lesion_level = lambda before: torch.full_like(before, LEVELS["T2w"].fluid)
        before, after = self.painted(lesions, self.large_lesion(radius=8.0, centre=places[len(places) // 2]))
        core = lesions.target > 0.9 * lesions.target.max()
        hidden = core & ((after - before).abs() < 0.05)
        assert 0.05 * core.sum() < hidden.sum() < 0.95 * core.sum()
        shape = (lesions.target > 0.5 * lesions.target.max()).numpy()
        assert shape.sum() > 0.5 * 4 / 3 * math.pi * 8**3
        assert (ndimage.binary_fill_holes(shape) & ~shape & (tissue > 0).numpy()).sum() < 5

    def test_weight_increases_with_the_visibility(self, tissue, ventricles):
        mask = torch.zeros(tissue.shape)
        mask[10:20, 40:50, 40:50] = 1
        before, found = torch.full_like(mask, 0.5), []
        for change in (0.0, 0.02, 0.04, 0.2):
            lesions = lesions_in(tissue, ventricles, "T2w", image=before)
            lesions._keep(np.s_[:, :, :], mask, before + change * mask)
            assert torch.equal(lesions.target, mask)
            weight = lesions.weight(8.0)
            assert (weight[mask == 0] == 1).all()
            found.append(float(weight[mask == 1].unique()))
        # The brightest tissue has 0.95, and a change of 8 % of it is fully visible.
        assert found == pytest.approx([0, 0.02 / 0.076, 0.04 / 0.076, 1], abs=1e-4)

    def test_weight_of_lesions_that_overlap_is_that_of_the_most_visible(self, tissue, ventricles):
        mask = torch.zeros(tissue.shape)
        mask[10:20, 40:50, 40:50] = 1
        for order in (1, -1):
            lesions = lesions_in(tissue, ventricles, "T2w", image=torch.full_like(mask, 0.5))
            for visibility in (0.3, 0.8)[::order]:
                emphasis = mask if visibility == 0.3 else None
                lesions._keep(np.s_[:, :, :], mask, lesions.image, visibility, emphasis=emphasis)
            assert lesions.weight(5.0)[mask == 1].unique().item() == pytest.approx(0.8 * 5)

    @pytest.mark.parametrize("kind", ["oedema", "tumour", "cavity", "mass"])
    def test_lesions_continue_across_slices(self, tissue, ventricles, kind):
        lesions = lesions_in(tissue, ventricles, "T1w", seed=2)
        self.painted(lesions, self.large_lesion(kind, radius=12.0))
        masks = (lesions.target > 0.5 * lesions.target.max()).numpy()
        dices = [
            2 * (one & other).sum() / (one.sum() + other.sum())
            for one, other in itertools.pairwise(masks)
            if one.sum() > 60
        ]
        assert len(dices) > 10
        assert np.quantile(dices, 0.05) > 0.6  # an irregular tip may start with a large slice
        assert np.median(dices) > 0.85

    @pytest.mark.parametrize("is_real", [True, False])
    def test_lesions_have_real_shapes_if_there_are_any(self, tissue, ventricles, is_real):
        bar = torch.ones(6, 40, 6, dtype=torch.bool)
        elongations = []
        for seed in range(3):
            lesions = lesions_in(tissue, ventricles, "T1w", seed)
            self.painted(lesions, self.large_lesion(radius=7.0), [bar] if is_real else [])
            places = (lesions.target > 0.5 * lesions.target.max()).nonzero().float()
            moments = torch.linalg.eigvalsh(places.T.cov())
            elongations.append(float((moments[-1] / moments[0]).sqrt()))
        assert bool(np.median(elongations) > 3) is is_real

    @pytest.mark.parametrize("spares_grey", [True, False])
    def test_oedema_may_spare_grey_matter(self, tissue, ventricles, spares_grey):
        lesions = lesions_in(tissue, ventricles, "T2w", seed=1)
        lesions._chance = lambda probability: spares_grey and probability == LesionConfig().along_white_prob
        self.painted(lesions, self.large_lesion(radius=13.0))
        shape = gaussian_smooth((lesions.target > 0.1 * lesions.target.max()).float(), 3.0) > 0.7
        grey, white = (lesions.target[shape & (tissue == label)].mean() for label in (GREY, WHITE))
        assert bool(grey < 0.6 * white) is spares_grey

    def test_small_lesions_are_small_and_mostly_in_white_matter(self, tissue, ventricles, contrast):
        config = LesionConfig(small_size=(3.0, 6.0), white_matter_prob=1.0)
        lesions = typical(lesions_in(tissue, ventricles, contrast, seed=1))
        lesions.paint(_Plan((), 12, band=False), config, [])
        masks = lesions.target > 0.5
        numbers, count = ndimage.label(masks.numpy(), np.ones((3, 3, 3)))
        assert 6 < count <= 13  # some overlap, and a rough one may have two parts
        sizes = np.bincount(numbers.ravel())[1:]
        largest = 4 / 3 * math.pi * 3**3
        assert np.median(sizes) < largest
        assert masks.sum() < 12 * 1.5 * largest
        assert (tissue[masks] == WHITE).float().mean() > 0.7
        # Those of 3 to 6 mm have one to four times the weight of one of 6 mm.
        emphasis = (lesions.emphasis / lesions.target)[lesions.target > 0.01]
        assert 0.99 < emphasis.min() < 1.5
        assert 2 < emphasis.max() < 4.01

    def test_periventricular_band_lies_in_white_matter_along_ventricles(self, tissue, ventricles, contrast):
        lesions = typical(lesions_in(tissue, ventricles, contrast, seed=3))
        lesions.paint(_Plan((), 0, band=True), LesionConfig(), [])
        band = (lesions.target > 0.5 * lesions.target.max()).numpy()
        distance = ndimage.distance_transform_edt(~ventricles.numpy())[band]
        assert band.sum() > 200
        assert (tissue.numpy()[band] == WHITE).mean() > 0.8
        # The edge lies where a Gaussian of at most 5 mm has fallen to 0.16 times a factor.
        assert np.median(distance) < 6
        assert distance.max() < 3 * 5 + 2
        assert torch.equal(lesions.emphasis > 0, lesions.target > 0)

    def test_cavity_has_a_core_of_fluid(self, tissue, ventricles):
        lesions = typical(lesions_in(tissue, ventricles, "FLAIR", seed=5))
        large_lesion = self.large_lesion("cavity", radius=11.0, centre=torch.tensor([16.0, 25.0, 60.0]))
        before, after = self.painted(lesions, large_lesion)
        inside = lesions.target > 0.9 * lesions.target.max()
        darkest = after[inside].sort().values[: int(0.03 * inside.sum())]
        assert darkest.mean() < 0.35  # fluid has 0.15
        rim = (lesions.target > 0) & (after > before + 0.02)
        assert rim.sum() > 200  # around it, the lesion is brighter than the tissue


class TestMass:
    CENTRE = torch.tensor([16.0, 25.0, 60.0])

    def mass(self, lesions):
        before = lesions.image.clone()
        large_lesion = _LargeLesion("mass", self.CENTRE, 13.0, 0.0)
        lesions.paint(_Plan((large_lesion,), 0, band=False), LesionConfig(), [])
        return before, lesions.image, lesions.target > 0.9 * lesions.target.max()

    def test_differs_from_uniform_tissue_by_3_to_15_percent(self, contrast):
        tissue = torch.full((32, 50, 90), WHITE, dtype=torch.uint8)
        flat = torch.full(tissue.shape, 0.5)
        changes = []
        for seed in range(20):
            lesions = lesions_in(tissue, torch.zeros(tissue.shape), contrast, seed, flat)
            before, after, inside = self.mass(lesions)
            changes.append(float((after / before - 1)[inside].mean()))
        changes = np.array(changes) * (-1 if contrast == "T1w" else 1)
        assert 0.5 < (changes > 0).mean() < 1  # 80 % have the usual sign
        # The texture adds up to 6 %, the mean of which is small.
        assert np.abs(changes).max() < 0.15 + 0.06
        assert 0.06 < np.abs(changes).mean() < 0.12

    def test_loses_the_border_of_grey_and_white_matter(self, tissue, ventricles, contrast):
        steps, details = [], []
        for seed in range(4):
            lesions = lesions_in(tissue, ventricles, contrast, seed)
            before, after, inside = self.mass(lesions)
            step, detail = [], []
            for image in (before, after):
                grey, white = (image[inside & (tissue == label)].mean() for label in (GREY, WHITE))
                step.append(float((grey - white).abs()))
                detail.append(float((image - gaussian_smooth(image, 1.5))[inside].var()))
            steps.append(step[1] / step[0])
            details.append(detail[1] / detail[0])
        assert np.mean(steps) < 0.85
        assert np.mean(details) < 0.7

    def test_has_a_closed_and_clear_target(self, tissue, ventricles):
        lesions = lesions_in(tissue, ventricles, "T1w", seed=1)
        self.mass(lesions)
        visible = (lesions.target > 0.5 * lesions.target.max()).numpy()
        sizes = np.bincount(ndimage.label(visible, np.ones((3, 3, 3)))[0].ravel())[1:]
        assert sizes.max() > 0.95 * sizes.sum()
        assert (ndimage.binary_fill_holes(visible) & ~visible & (tissue > 0).numpy()).sum() < 5
        assert float(lesions.target.max()) > 0.6


class TestHealthyVariation:
    @pytest.fixture
    def padded(self, tissue):
        """Tissue classes with background around them."""
        return torch.nn.functional.pad(tissue, (8,) * 6)

    @pytest.fixture
    def head(self, padded, contrast):
        return coloured(padded, contrast), padded > 0, LEVELS[contrast]

    def test_rim_artifacts_change_the_outermost_two_pixels_only(self, head):
        image, brain, levels = head
        rim = brain & ~erode_in_plane(brain, 2)
        shares = []
        for seed in range(5):
            changed = _add_rim_artifacts(image, rim, levels, seeded(seed)) != image
            assert not (changed & ~rim).any()
            shares.append(float(changed[rim].float().mean()))
        assert min(shares) < 0.6
        assert max(shares) > 0.05

    def test_cut_edge_removes_a_cap(self, padded):
        brain = padded > 0
        shares = []
        for seed in range(8):
            left = _cut_edge(brain, seeded(seed))
            assert not (left & ~brain).any()
            shares.append(float(1 - left.sum() / brain.sum()))
            if shares[-1] < 0.01:
                continue
            # The direction of the cut, and the distance along it.
            direction = torch.nn.functional.normalize(torch.randn(3, generator=seeded(seed)), dim=0)
            kept, gone = (part.nonzero().float() @ direction for part in (left, brain & ~left))
            middle = (brain.nonzero()[::17].float().mean(0) @ direction).item()
            assert kept.max() <= gone.min() + 1e-3
            assert (kept.max() - middle) / (gone.max() - middle) > 2 / 3 - 0.05
        assert 0.02 < max(shares) < 0.4

    def test_strip_remnants_touch_the_brain_from_outside(self, head):
        image, brain, levels = head
        rim = brain & ~erode_in_plane(brain, 2)
        grown = ndimage.binary_dilation(brain.numpy(), np.ones((3, 3, 3)))
        sizes = []
        for seed in range(6):
            changed, whole = _add_strip_remnant(image, brain, rim, levels, seeded(seed))
            piece = whole & ~brain
            sizes.append(int(piece.sum()))
            assert torch.equal(whole & brain, brain)
            assert torch.equal(changed[~piece], image[~piece])
            if sizes[-1] > 500:
                assert 0 <= changed[piece].min() <= changed[piece].max() <= 1.1 * levels.brightest + 1e-6
                assert (piece.numpy() & grown).any()
        assert max(sizes) > 500

    def test_nuclei_change_in_pairs_beside_the_midline(self, head, contrast):
        image, brain, levels = head
        middle = float(brain.nonzero()[::101].float().mean(0)[1])
        factors, pairs = [], 0
        for seed in range(12):
            generator = seeded(seed)
            torch.rand((), generator=generator)
            if 12 * torch.randn(2, generator=generator).abs().max() > 12:  # outside this part of the brain
                continue
            ratio = _change_nuclei(image, brain, levels, seeded(seed)) / image.clamp_min(1e-6)
            changed = (ratio != 1) & (image > 0)
            factors += [float(ratio[changed].min()), float(ratio[changed].max())]
            rows = changed.nonzero()[:, 1].float() - middle
            if rows.abs().min() > 2:  # the spots do not meet
                pairs += 1
                assert (rows > 0).any()
                assert (rows < 0).any()
        assert pairs > 1
        assert 0.4**2 < min(factors) < 0.9
        assert (max(factors) > 1.01) is (contrast == "T1w")
        assert max(factors) < 1.31

    def test_flow_changes_spots_at_the_edge_and_patches_of_fluid(self, head, padded):
        image, brain, levels = head
        rim = brain & ~erode_in_plane(brain, 2)
        away = ndimage.distance_transform_edt(~rim.numpy())
        for seed in range(3):
            changed = (
                _add_flow_effects(image, brain, rim, padded, levels, seeded(seed)) - image
            ).abs() > 1e-6
            assert changed.any()
            assert not (changed & ~brain).any()
            assert away[(changed & (padded != FLUID)).numpy()].max(initial=0) < 10 * 1.6 * 1.5

    def test_perivascular_spaces_are_small_spots_of_fluid_in_white_matter(self, head, padded, contrast):
        image, _, levels = head
        change = _add_perivascular_spaces(image, padded, levels, seeded()) - image
        assert not change[padded != WHITE].any()
        change = change * (1 if contrast == "T2w" else -1)
        strong = change > 0.3 * float(change.max())
        assert -float(change.min()) < 0.2 * float(change.max())
        sizes = np.bincount(ndimage.label(strong.numpy(), np.ones((3, 3, 3)))[0].ravel())[1:]
        assert len(sizes) > 2
        assert np.median(sizes) < 80

    def test_grey_and_white_matter_vary_between_regions(self, padded, contrast):
        """Smoothly, and by a standard deviation that is uniform up to a fifth of their difference."""
        flat, levels = coloured(padded, contrast, noise=0), LEVELS[contrast]
        deep = ndimage.binary_erosion(padded.numpy() == WHITE, iterations=3)
        elsewhere = ndimage.distance_transform_edt(padded.numpy() < GREY) > 4
        assert elsewhere.any()
        deviations = []
        for seed in range(60):
            change = (_vary_regions(flat, padded, levels, seeded(seed)) - flat).numpy()
            steps = np.abs(np.diff(change, axis=1))[deep[:, 1:] & deep[:, :-1]]
            assert steps.max() < 0.25 * np.abs(change[deep]).max()
            assert np.abs(change[elsewhere]).max() < 1e-3
            deviations.append(np.sqrt(np.square(change[deep]).mean()) / abs(levels.white - levels.grey))
        assert np.mean(deviations) == pytest.approx(0.1, abs=0.035)
        assert max(deviations) < 0.5

    def test_ventricle_rim_is_between_white_and_grey_matter(self, padded, ventricles, contrast):
        flat, levels = coloured(padded, contrast, noise=0), LEVELS[contrast]
        around = torch.nn.functional.pad(ventricles, (8,) * 6)
        away = ndimage.distance_transform_edt(~around.numpy())
        white = padded.numpy() == WHITE
        amounts = []
        for seed in range(40):
            rim = _change_ventricle_rim(flat, padded, around, levels, seeded(seed)) - flat
            share = (rim / (levels.grey - levels.white)).numpy()
            assert share.min() > -1e-6
            assert share[white].max() > 10 * share[white & (away > 12)].max(initial=0)
            amounts.append(share[white & (away < 2)].max())
        most = 2 if contrast == "FLAIR" else 0.7
        assert max(amounts) <= most
        assert np.mean(amounts) == pytest.approx(most / 2, abs=0.15 * most)


class TestAcquisition:
    def test_thick_slices_are_means_that_are_interpolated(self):
        depth, thickness, offset = 40, 3.7, 1.3
        matrix = _thick_slices(depth, thickness, offset).double().numpy()
        np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-5)
        values = np.random.default_rng(0).normal(size=depth)
        fine = np.repeat(values, 1000)  # at 1 micrometre
        at = (np.arange(len(fine)) + 0.5) / 1000
        starts = offset + thickness * np.arange(-1, 11)
        means = [fine[(at >= start) & (at < start + thickness)].mean() for start in starts]
        expected = np.interp(np.arange(depth) + 0.5, starts + thickness / 2, means)
        np.testing.assert_allclose((matrix @ values)[3:-3], expected[3:-3], atol=5e-3)

    def test_slices_of_the_same_thickness_do_not_change(self):
        matrix = _thick_slices(30, 1.0, 0.0)
        torch.testing.assert_close(matrix, torch.eye(30), atol=1e-5, rtol=0)

    def test_shading_varies_by_slice_and_motion_adds_a_ghost(self, tissue):
        image = coloured(tissue, "T1w", noise=0.0)
        ratio = _acquire(image, "T1w", replace(STILL, shading=1.0), seeded(1)) / image.clamp_min(1e-6)
        for one, inside in zip(ratio, tissue > 0, strict=True):
            assert float(one[inside].std()) < 1e-5
        assert float(ratio[0][tissue[0] > 0].mean()) != pytest.approx(1, abs=1e-3)
        ghost = _acquire(image, "T1w", replace(STILL, motion=1.0), seeded(1)) - image
        shifts = [
            n
            for n in range(10, 81)
            if torch.allclose(ghost / ghost.max() * image.max(), image.roll(n, 2), atol=1e-4)
        ]
        assert len(shifts) == 1
        assert 0.02 <= float(ghost.max() / image.max()) <= 0.1
        assert _acquire(image, "T1w", STILL, seeded(1)) is image


def test_scaled_divides_by_the_percentile_of_the_brain(tissue):
    image = coloured(tissue, "T2w") * 0.7
    scaled = _scaled(image, tissue > 0).numpy()
    top = np.percentile(image[tissue > 0].numpy(), 99.5)
    np.testing.assert_allclose(scaled, (image / top).clamp(0, 1).numpy() * (tissue > 0).numpy(), atol=0.02)


def test_levels_are_medians_and_determine_the_contrast(tissue, contrast):
    image = coloured(tissue, contrast)
    measured = Levels.measure(image, tissue)
    for name, label in (("fluid", FLUID), ("grey", GREY), ("white", WHITE)):
        assert getattr(measured, name) == pytest.approx(float(image[tissue == label].median()))
    assert measured.contrast == contrast
    percentile = 95 if contrast == "T2w" else 5
    expected = np.percentile(image[tissue == FLUID].numpy(), percentile, method="nearest")
    assert measured.pure_fluid == pytest.approx(expected, abs=1e-3)
    assert Levels(0.5, 0.4, 0.6, 0.5).contrast == "other"
    grey = torch.where(tissue == WHITE, GREY, tissue)
    assert Levels.measure(image, grey).white == pytest.approx(float(image[tissue > 0].median()))


@pytest.mark.parametrize("contrast", LEVELS)
def test_estimate_tissue_agrees_with_the_truth(labels, contrast):
    """Of a brain that is deformed, shaded and noisy, with partial volume."""
    truth = CLASSES[labels.long()]
    image = coloured(truth, contrast, noise=0.0)
    image, truth = warp(
        image, truth, (0.08, -0.06, 0.05), (1.05, 0.95, 1.03), (2.0, -3.0, 2.0), [], 2.5,
        flip=True, generator=seeded(),
    )  # fmt: skip
    image = gaussian_smooth(image[REGION], 0.6)
    image = image * (0.08 * normal_field(tuple(image.shape), 40.0, seeded())).exp()
    noise = 0.02 * torch.randn(image.shape, generator=seeded())
    whole = torch.zeros(truth.shape)
    whole[REGION] = (image + noise).clamp(0, 1)
    inside = torch.zeros(truth.shape, dtype=torch.bool)
    inside[REGION] = truth[REGION] > 0
    estimated = estimate_tissue(Scan(whole * inside, inside))
    assert not estimated[~inside].any()
    assert (estimated == truth)[inside].float().mean() > 0.8
    for label in (FLUID, GREY, WHITE):
        both = ((estimated == label) & (truth == label) & inside).sum()
        dice = 2 * both / ((estimated == label).sum() + ((truth == label) & inside).sum())
        assert dice > 0.7, (label, dice)
