"""FAE, RD and UniAD against published sizes and their formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from skimage.metrics import structural_similarity
from torch.utils.flop_counter import FlopCounterMode

from bids_uad.methods.base import Batch
from bids_uad.methods.fae import FAE, FeatureAutoencoder
from bids_uad.methods.rd import ReverseDistillation
from bids_uad.methods.uniad import UniAD, jitter_tokens, neighbourhoods
from bids_uad.networks.backbones import BackboneConfig, ImageNetFeatures, build_backbone, find_published


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def gflop(module, *inputs):
    counter = FlopCounterMode(display=False)
    with counter:
        module.requires_grad_(False)(*inputs)
    return counter.get_total_flops() / 1e9


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    brain = torch.zeros(2, 1, 224, 224, dtype=torch.bool)
    brain[:, :, 50:150, 60:180] = True
    return Batch(torch.rand(2, 1, 224, 224, generator=generator) * brain, brain, brain[:, 0].long())


def test_fae_has_the_published_size():
    with torch.device("meta"):
        autoencoder = FeatureAutoencoder(256, (100, 150, 200, 300), 0.1).eval()
        assert count(autoencoder) == 12_501_648
        features = torch.zeros(1, 256, 56, 56)
        assert autoencoder(features).shape == features.shape
        assert gflop(autoencoder, features) == pytest.approx(4.069, rel=0.01)


def test_rd_starts_from_hes_normal_distribution():
    """The variance of the weights of convolutions is 2 / (outputs * kernel area)."""
    torch.manual_seed(0)
    backbone = BackboneConfig(taps=(0, 1, 2))
    hyper = replace(ReverseDistillation.presets["lite"], backbone=backbone, published_initialisation=True)
    detector = ReverseDistillation(hyper)
    layers = [*detector.embedding.modules(), *detector.student.modules()]
    convolutions = [layer.weight for layer in layers if isinstance(layer, torch.nn.Conv2d)]
    transposed = [layer.weight for layer in layers if isinstance(layer, torch.nn.ConvTranspose2d)]
    assert len(convolutions) == 3 + 2 * 3 + 1 + 3 * (2 * 3 - 1)
    assert len(transposed) == 2 * 3
    for weight in convolutions:
        expected = np.sqrt(2 / (weight.shape[0] * weight.shape[2] ** 2))
        assert weight.std().item() == pytest.approx(expected, rel=0.05)
        assert weight.abs().max() > 2.5 * expected  # that of a uniform distribution is 1.7
    for weight in transposed:  # PyTorch's default: uniform, with a bound of 1 / sqrt(fan-in)
        assert weight.abs().max().item() == pytest.approx(1 / np.sqrt(weight[0].numel()), rel=0.01)


def test_uniad_starts_from_glorots_uniform_distribution():
    torch.manual_seed(0)
    transformer = UniAD(replace(UniAD.presets["lite"], published_initialisation=True)).transformer
    linear = [layer for layer in transformer.modules() if isinstance(layer, torch.nn.Linear)]
    assert len(linear) == 2 + 2 * (2 + 1) + 2 * (2 + 2)
    for layer in linear:
        bound = np.sqrt(6 / sum(layer.weight.shape))
        assert layer.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert layer.weight.std().item() == pytest.approx(bound / np.sqrt(3), rel=0.05)
        assert not layer.bias.any()
    # Copies of a layer share what is not drawn anew.
    first, second = transformer.decoder
    for one, other in zip(first.attentions, second.attentions, strict=True):
        assert torch.equal(one.in_proj_weight, other.in_proj_weight)
        assert not torch.equal(one.out_proj.weight, other.out_proj.weight)
    assert torch.equal(transformer.queries[0], transformer.queries[1])
    assert transformer.queries[0].std().item() == pytest.approx(1, rel=0.05)


def test_rd_has_the_published_size():
    with torch.device("meta"):
        detector = ReverseDistillation(ReverseDistillation.presets["paper"]).eval()
        # The published embedding also holds 8,392,704 numbers that nothing uses.
        assert count(detector.embedding) == 67_277_824 - 8_392_704
        assert count(detector.student) == 24_917_504
        maps = [torch.zeros(1, 256 * 2**k, 56 // 2**k, 56 // 2**k) for k in range(3)]
        assert gflop(detector.embedding, maps) == pytest.approx(11.201, rel=0.01)
        embedding = detector.embedding(maps)
        assert embedding.shape == (1, 2048, 7, 7)
        assert gflop(detector.student, embedding) == pytest.approx(17.058, rel=0.01)
        student_maps = detector.student(embedding)
        assert [part.shape for part in student_maps] == [part.shape for part in maps]


def test_uniad_has_the_published_size():
    with torch.device("meta"):
        detector = UniAD(UniAD.presets["paper"]).eval()
        assert count(detector.transformer) == 7_692_768
        tokens = torch.zeros(1, 196, 224)
        assert gflop(detector.transformer, tokens) == pytest.approx(3.394, rel=0.01)


def test_neighbourhoods_are_the_pairs_within_the_side():
    hidden = neighbourhoods(14, 7)
    assert hidden.sum(1).min() == 16
    assert hidden.sum(1).max() == 49
    for first, second in ((0, 0), (0, 3), (0, 4), (0, 3 * 14), (0, 4 * 14), (30, 30 + 3 * 14 + 3)):
        rows, columns = np.abs(np.subtract(divmod(first, 14), divmod(second, 14)))
        assert bool(hidden[first, second]) == (max(rows, columns) <= 3)


def test_restored_tokens_do_not_depend_on_themselves():
    torch.manual_seed(0)
    hyper = replace(UniAD.presets["lite"], grid=14, layers=1, dropout=0.0)
    detector = UniAD(hyper).eval()
    tokens = torch.randn(1, 196, 144)
    altered = tokens.clone()
    altered[0, 100] += 5
    with torch.no_grad():
        # One encoder layer adds the token to itself, so that only the decoder's blindness is looked at.
        memory = detector.transformer.enter(tokens)
        others = detector.transformer.enter(altered)
        position = torch.zeros(196, 96)
        layer = detector.transformer.decoder[0]
        start = torch.zeros(1, 196, 96)
        hidden = detector.transformer.mask
        change = layer(start, [memory, memory], position, hidden) - layer(
            start, [others, others], position, hidden
        )
    seen = change.abs().amax(2)[0] > 1e-6
    assert not seen[100]
    assert torch.equal(seen, ~hidden[:, 100])


def test_jitter_is_proportional_to_the_norm_of_a_token():
    tokens = torch.randn(4, 5000, 16)
    tokens[:, :2500] *= 10
    noise = jitter_tokens(tokens, 5.0, torch.Generator().manual_seed(0)) - tokens
    expected = tokens.norm(dim=2).mean(1) / 16 * 5
    assert float(noise.std()) == pytest.approx(
        float((tokens.norm(dim=2) ** 2).mean().sqrt() / 16 * 5), rel=0.02
    )
    assert float(noise[:, 2500:].std()) < 0.2 * float(expected.mean())


def test_fae_score_is_one_minus_ssim(batch):
    torch.manual_seed(0)
    detector = FAE(FAE.presets["lite"]).eval()
    with torch.no_grad():
        ours = detector.score(batch.slices, batch.brain, [])
        features = detector.feature_stack(batch.slices)
        restored = detector.autoencoder(features)
    unlike = np.zeros((56, 56))
    for a, b in zip(features[0].double().numpy(), restored[0].double().numpy(), strict=True):
        _, full = structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, full=True
        )
        unlike += (1 - full) / len(features[0])
    fine = F.interpolate(
        torch.from_numpy(unlike)[None, None], size=(224, 224), mode="bilinear", align_corners=True
    )[0, 0]
    inner = slice(90, 120)  # far from the border, where SciPy's and our padding differ
    torch.testing.assert_close(ours[0, 0, inner, inner].double(), fine[inner, inner], atol=1e-3, rtol=1e-3)
    assert ours[~batch.brain].abs().max() == 0


def enlarged(part, size):
    """Resize a map linearly, with its outermost values at the outermost pixels."""
    rows, columns = (
        np.stack([np.interp(np.linspace(0, n - 1, m), np.arange(n), unit) for unit in np.eye(n)], axis=1)
        for n, m in zip(part.shape[-2:], size, strict=True)
    )
    return torch.from_numpy(rows @ part.double().numpy() @ columns.T).float()


def test_rd_score_is_the_cosine_distance(batch):
    torch.manual_seed(0)
    detector = ReverseDistillation(ReverseDistillation.presets["lite"]).eval()
    with torch.no_grad():
        ours = detector.score(batch.slices, batch.brain, [])
        teacher_maps = detector.features(batch.slices)
        student_maps = detector.student(detector.embedding(teacher_maps))
        total = 0
        for a, b in zip(teacher_maps, student_maps, strict=True):
            cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-8)
            total = total + enlarged(1 - cosine[:, None], (224, 224))
    torch.testing.assert_close(ours, total * batch.brain, atol=1e-4, rtol=1e-4)


def test_uniad_score_is_the_distance_of_tokens(batch):
    torch.manual_seed(0)
    detector = UniAD(UniAD.presets["lite"]).eval()
    with torch.no_grad():
        ours = detector.score(batch.slices, batch.brain, [])
        maps = detector.features(batch.slices)
        tokens = torch.cat([enlarged(part, (14, 14)) for part in maps], 1).flatten(2).transpose(1, 2)
        distance = ((detector.transformer(tokens) - tokens) ** 2).sum(2).sqrt().view(2, 1, 14, 14)
    torch.testing.assert_close(ours, enlarged(distance, (224, 224)) * batch.brain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mri", "pls"])
@pytest.mark.parametrize("kind", [FAE, ReverseDistillation, UniAD])
def test_training_does_not_change_the_backbone(batch, kind, name):
    torch.manual_seed(0)
    lite = kind.presets["lite"]
    detector = kind(replace(lite, backbone=replace(lite.backbone, name=name)))
    *first, stage = detector.stages()
    assert [backbone.needs_tissue for backbone in first] == [True] * (name == "mri")
    detector.backbone.eval()
    before = {name: value.clone() for name, value in detector.backbone.state_dict().items()}
    optimiser = torch.optim.Adam(stage.module.parameters(), lr=2e-3)
    stage.module.train()
    losses = []
    for _ in range(6):
        loss = stage.loss(batch, torch.Generator().manual_seed(0))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = detector.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


class TestImageNetFeatures:
    def test_published_weights_of_torchvision_are_loaded(self, tmp_path):
        torch.manual_seed(0)
        source = ImageNetFeatures("resnet18", normalise=True)
        state = {**source.network.state_dict(), "fc.weight": torch.zeros(2)}
        torch.save(state, tmp_path / "weights.pth")
        save_file(state, tmp_path / "weights.safetensors")
        slices = torch.rand(1, 1, 64, 64)
        for name in ("weights.pth", "weights.safetensors"):
            torch.manual_seed(1)
            ours = build_backbone(BackboneConfig(name="resnet18", taps=(0, 1, 2)))
            ours.load_published(tmp_path / name)
            torch.testing.assert_close(ours(slices), source.eval()(slices))

    def test_find_published_searches_the_cache_of_pytorch(self, tmp_path):
        cache = tmp_path / "hub" / "checkpoints"
        cache.mkdir(parents=True)
        for name in (
            "resnet18-f37072fd.pth",
            "wide_resnet50_2-95faca4d.pth",
            "efficientnet_b4_rwightman-1.pth",
        ):
            (cache / name).touch()
            network = name.split("-")[0].removesuffix("_rwightman")
            for place in (tmp_path, tmp_path / "hub", cache, cache / name):
                assert find_published(place, network) == cache / name
        (cache / "resnet18.safetensors").touch()
        with pytest.raises(ValueError, match="several weights of resnet18: resnet18-f37072fd"):
            find_published(cache, "resnet18")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="no weights of resnet18"):
            find_published(tmp_path / "empty", "resnet18")

    def test_other_files_are_refused(self, tmp_path):
        backbone = ImageNetFeatures("resnet18", normalise=True)
        save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match="not the weights of resnet18: conv1"):
            backbone.load_published(tmp_path / "other.safetensors")
        (tmp_path / "broken.safetensors").write_bytes(b"no")
        with pytest.raises(ValueError, match="cannot be read"):
            backbone.load_published(tmp_path / "broken.safetensors")
        torch.save({"conv1.weight": tmp_path}, tmp_path / "object.pth")
        with pytest.raises(ValueError, match=r"other objects than tensors|cannot be read"):
            backbone.load_published(tmp_path / "object.pth")
        torch.save({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "stem.pth")
        with pytest.raises(ValueError, match=r"not the weights of efficientnet_lite0: '_bn0\.weight'"):
            ImageNetFeatures("efficientnet_lite0", normalise=True).load_published(tmp_path / "stem.pth")

    def test_backbones_are_frozen_and_inputs_are_normalised(self):
        backbone = ImageNetFeatures("resnet18", normalise=True).train()
        assert not backbone.training
        assert not any(parameter.requires_grad for parameter in backbone.parameters())
        seen = []
        backbone.network.features = lambda images: seen.append(images) or []
        backbone(torch.full((1, 1, 4, 4), 0.5))
        expected = [(0.5 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (0.5 - 0.406) / 0.225]
        assert seen[0][0, :, 0, 0].tolist() == pytest.approx(expected, abs=1e-5)
