"""Feature networks: published sizes, costs and tensor names; maps around the brain and of whole slices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bids_uad.networks.backbones import EfficientNetB4, TissueNet, fold_batch_norm, resnet18, wide_resnet50_2


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
