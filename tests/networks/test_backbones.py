"""ImageNet networks against the published sizes, costs and tensor names."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bids_uad.networks.backbones import EfficientNetB4, resnet18, wide_resnet50_2


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
