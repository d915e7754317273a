"""The U-Net against the published fingerprints."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bids_uad.networks.ddpmpp import Attention, DDPMpp, DDPMppConfig, sinusoidal_embedding

SHARED = {
    "size": 224,
    "width": 32,
    "multipliers": (1, 1, 1, 2, 3, 4),
    "attention": (14, 7),
    "head_width": 32,
    "dropout_at": 14,
}
ITERMASK = DDPMppConfig(
    blocks=(1, 1, 1, 2, 4, 2), norm="batch", time_embedding=False, rescale=False, **SHARED
)
PUBLISHED = {
    # name: (configuration, parameters, GFLOP of one call)
    "andi": (DDPMppConfig(blocks=(1, 1, 1, 2, 4, 2), **SHARED), 7_537_025, 15.196),
    "riad": (
        DDPMppConfig(blocks=(1, 1, 1, 2, 3, 2), time_embedding=False, rescale=False, **SHARED),
        6_267_425,
        14.992,
    ),
    "disyre": (DDPMppConfig(), 39_252_353, 46.585),
    "itermask first": (ITERMASK, 6_748_481, 15.194),
    "itermask autoencoder": (ITERMASK, 6_748_769, 15.223),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_fingerprint(name):
    config, parameters, gflop = PUBLISHED[name]
    with torch.device("meta"):
        inputs = 2 if name == "itermask autoencoder" else 1
        network = DDPMpp(config, inputs).eval()
        assert sum(p.numel() for p in network.parameters()) == parameters
        time = torch.zeros(1) if config.time_embedding else None
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            network(torch.zeros(1, inputs, config.size, config.size), time)
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, rel=0.01)


def test_published_block_sizes():
    with torch.device("meta"):
        network = DDPMpp(PUBLISHED["andi"][0])

    def size(module):
        return sum(p.numel() for p in module.parameters())

    assert size(network.time) == 4_224 + 16_512
    assert size(network.enter) == 320
    assert [size(block) for block in list(network.encoder)[:2]] == [26_880, 27_936]
    assert {size(m) for m in network.modules() if isinstance(m, Attention)} == {46_464, 82_432}


def test_untrained_network_returns_zero():
    """The last convolution starts at zero, so that training starts from no change at all."""
    config = DDPMppConfig(size=16, width=16, multipliers=(1, 2), blocks=(1, 1), attention=(8,), head_width=16)
    network = DDPMpp(config).eval()
    assert network(torch.rand(2, 1, 16, 16), torch.tensor([3, 9])).abs().max() == 0


def test_causal_attention_only_looks_back():
    config = DDPMppConfig(width=16, head_width=16, causal=True)
    attention = Attention(16, config).eval()
    torch.nn.init.normal_(attention.out.weight)
    x = torch.rand(1, 16, 4, 4, requires_grad=True)
    # Group normalisation mixes all pixels, so the order is tested behind it.
    attention.norm = torch.nn.Identity()
    attention(x)[0, :, 1, 2].sum().backward()
    touched = x.grad[0].abs().sum(0).flatten() > 0
    assert touched.tolist() == [True] * 7 + [False] * 9


def test_fold_only_moves_pixels():
    config = DDPMppConfig(
        size=32, width=16, multipliers=(1, 2), blocks=(1, 1), attention=(), middle_attention=False, fold=2
    )
    network = DDPMpp(config).eval()
    assert network.enter.in_channels == 4
    assert network(torch.rand(1, 1, 32, 32), torch.zeros(1)).shape == (1, 1, 32, 32)


def test_sinusoidal_embedding_by_hand():
    embedding = sinusoidal_embedding(torch.tensor([2.0]), 4)[0]
    expected = torch.tensor([2.0, 2e-4]).sin().tolist() + torch.tensor([2.0, 2e-4]).cos().tolist()
    torch.testing.assert_close(embedding, torch.tensor(expected))
