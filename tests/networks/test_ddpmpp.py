"""DDPM++ against published sizes, and against its formula in NumPy and SciPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.signal import correlate2d
from scipy.special import softmax
from torch.utils.flop_counter import FlopCounterMode

from bids_uad.networks.ddpmpp import Attention, DDPMpp, DDPMppConfig, _enlarging, sinusoidal_embedding

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
def test_network_has_the_published_size_and_cost(name):
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
    """The last convolution is initialised with zeros."""
    config = DDPMppConfig(size=16, width=16, multipliers=(1, 2), blocks=(1, 1), attention=(8,), head_width=16)
    network = DDPMpp(config).eval()
    assert network(torch.rand(2, 1, 16, 16), torch.tensor([3, 9])).abs().max() == 0


def test_causal_attention_ignores_later_pixels():
    config = DDPMppConfig(width=16, head_width=16, causal=True)
    attention = Attention(16, config).eval()
    torch.nn.init.normal_(attention.out.weight)
    x = torch.rand(1, 16, 4, 4, requires_grad=True)
    # Group normalisation mixes all pixels, so the order is tested behind it.
    attention.norm = torch.nn.Identity()
    attention(x)[0, :, 1, 2].sum().backward()
    touched = x.grad[0].abs().sum(0).flatten() > 0
    assert touched.tolist() == [True] * 7 + [False] * 9


class Literal:
    """Forward pass of one image, operation by operation in double precision.

    Parameters
    ----------
    config : DDPMppConfig
    state : dict
        Tensors of a network of that configuration.
    """

    def __init__(self, config: DDPMppConfig, state: dict) -> None:
        self.config = config
        self.state = {name: value.double().numpy() for name, value in state.items()}
        self.gain = 2**-0.5 if config.rescale else 1.0

    def conv(self, x, name, size=3):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        padded = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2))
        sums = [
            sum(correlate2d(part, kernel, "valid") for part, kernel in zip(padded, kernels, strict=True))
            for kernels in weight.reshape(len(weight), len(x), size, size)
        ]
        return np.stack(sums) + bias[:, None, None]

    def linear(self, x, name):
        return x @ self.state[f"{name}.weight"].T + self.state.get(f"{name}.bias", 0.0)

    def norm(self, x, name):
        if self.config.norm == "batch":
            mean, variance = (self.state[f"{name}.running_{key}"][:, None, None] for key in ("mean", "var"))
            x = (x - mean) / np.sqrt(variance + 1e-5)
        else:
            channels = len(x)
            groups = x.reshape(np.gcd(channels, min(channels // 4, 32)), -1)
            groups = (groups - groups.mean(1, keepdims=True)) / np.sqrt(groups.var(1, keepdims=True) + 1e-6)
            x = groups.reshape(x.shape)
        return x * self.state[f"{name}.weight"][:, None, None] + self.state[f"{name}.bias"][:, None, None]

    @staticmethod
    def silu(x):
        return x / (1 + np.exp(-x))

    def block(self, x, name, embedding, resample=None):
        def resized(y):
            if resample == "down":
                return (y[:, ::2, ::2] + y[:, 1::2, ::2] + y[:, ::2, 1::2] + y[:, 1::2, 1::2]) / 4
            return np.kron(y, np.ones((1, 2, 2))) if resample == "up" else y

        h = self.silu(self.norm(x, f"{name}.norm1"))
        h = (
            resized(self.conv(h, f"{name}.conv1"))
            if resample == "up"
            else self.conv(resized(h), f"{name}.conv1")
        )
        h = self.norm(h, f"{name}.norm2")
        if embedding is not None:
            scale, shift = np.split(self.linear(embedding, f"{name}.film"), 2)
            h = h * (1 + scale[:, None, None]) + shift[:, None, None]
        h = self.silu(h) if self.config.activate_second else h
        h = self.conv(h, f"{name}.conv2")
        shortcut = resized(x)
        if f"{name}.shortcut.weight" in self.state:
            shortcut = self.conv(shortcut, f"{name}.shortcut", size=1)
        return (shortcut + h) * self.gain

    def attention(self, x, name):
        if f"{name}.qkv.weight" not in self.state:
            return x
        tokens = self.linear(self.norm(x, f"{name}.norm").reshape(len(x), -1).T, f"{name}.inner")
        parts = np.split(self.linear(tokens, f"{name}.qkv"), 3, axis=1)
        mixed = []
        for head in range(len(x) // self.config.head_width):
            width = slice(head * self.config.head_width, (head + 1) * self.config.head_width)
            query, key, value = (part[:, width] for part in parts)
            likeness = query @ key.T / np.sqrt(self.config.head_width)
            if self.config.causal:
                likeness[np.triu_indices(len(likeness), 1)] = -np.inf
            mixed.append(softmax(likeness, axis=1) @ value)
        out = self.linear(np.concatenate(mixed, axis=1), f"{name}.out")
        return (x + out.T.reshape(x.shape)) * self.gain

    def __call__(self, image, time=None):
        config, fold = self.config, self.config.fold
        embedding = None
        if config.time_embedding:
            frequencies = 10_000.0 ** -(np.arange(config.width // 2) / (config.width // 2 - 1))
            waves = np.concatenate([np.sin(time * frequencies), np.cos(time * frequencies)])
            hidden = self.silu(self.linear(waves, "time.0"))
            embedding = self.silu(self.linear(hidden, "time.2"))
        folded = [image[:, row::fold, column::fold] for row in range(fold) for column in range(fold)]
        h = self.conv(np.concatenate(folded), "enter")
        skips, number = [h], 0
        for level, count in enumerate(config.blocks):
            down = [None] * count + (["down"] if level < len(config.blocks) - 1 else [])
            for resample in down:
                h = self.block(h, f"encoder.{number}", embedding, resample)
                h = self.attention(h, f"encoder_attention.{number}")
                skips.append(h)
                number += 1
        h = self.attention(self.block(h, "middle_in", embedding), "middle_attention")
        h = self.block(h, "middle_out", embedding)
        for stage, count in enumerate(reversed(config.blocks)):
            for k in range(count + 1):
                h = self.block(np.concatenate([h, skips.pop()]), f"decoder.{stage}.blocks.{k}", embedding)
            h = self.attention(h, f"decoder.{stage}.attention")
            if stage < len(config.blocks) - 1:
                h = self.block(h, f"decoder.{stage}.up", embedding, "up")
        assert skips == []
        out = self.conv(self.silu(self.norm(h, "leave_norm")), "leave")
        unfolded = np.zeros_like(image[:1])
        for place, channel in enumerate(out):
            unfolded[0, place // fold :: fold, place % fold :: fold] = channel
        return unfolded


SMALL = DDPMppConfig(
    size=16, width=16, multipliers=(1, 2), blocks=(1, 2), attention=(8,), head_width=16, dropout=0.0
)
VARIANTS = {
    "corrected": SMALL,
    "published": replace(SMALL, causal=True, activate_second=False),
    "two levels of attention": replace(SMALL, attention=(16, 8), head_width=8),
    "no attention": replace(SMALL, attention=(), middle_attention=False),
    "folded": replace(SMALL, size=32, fold=2),
    "without time and rescaling": replace(SMALL, time_embedding=False, rescale=False),
    "batch normalisation": replace(SMALL, time_embedding=False, rescale=False, norm="batch"),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_network_equals_its_formula(config):
    torch.manual_seed(0)
    inputs = 2 if config.norm == "batch" else 1
    network = DDPMpp(config, inputs).eval()
    state = network.state_dict()
    generator = torch.Generator().manual_seed(1)
    for name, value in state.items():
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator)
            state[name] = 1 + 0.2 * drawn.abs() if value.ndim == 1 else drawn / value[0].numel() ** 0.5
            if name.endswith(("bias", "running_mean")):
                state[name] = 0.2 * drawn
    network.load_state_dict(state)
    images = torch.randn(2, inputs, 32, 32 // (2 if config.fold == 1 else 1), generator=generator)
    times = torch.tensor([7.0, 300.0])
    with torch.no_grad():
        ours = network(images, times if config.time_embedding else None).numpy()
    literal = Literal(config, state)
    expected = [
        literal(image.double().numpy(), float(time)) for image, time in zip(images, times, strict=True)
    ]
    np.testing.assert_allclose(ours, expected, atol=2e-5 * np.abs(expected).max())
    assert np.std(expected) > 0.1


def test_sinusoidal_embedding_equals_its_formula():
    embedding = sinusoidal_embedding(torch.tensor([2.0]), 4)[0]
    expected = torch.tensor([2.0, 2e-4]).sin().tolist() + torch.tensor([2.0, 2e-4]).cos().tolist()
    torch.testing.assert_close(embedding, torch.tensor(expected))


def test_fused_enlarging_equals_scipys_correlation_of_the_enlarged_map():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(2, 3, 3, padding=1)
    image = torch.rand(1, 2, 5, 6)
    with torch.no_grad():
        found = _enlarging(conv)(image)[0]
    enlarged = image[0].double().numpy().repeat(2, axis=1).repeat(2, axis=2)
    for channel, weight, bias in zip(found, conv.weight.detach(), conv.bias.detach(), strict=True):
        expected = bias + sum(
            correlate2d(part, kernel, mode="same")
            for part, kernel in zip(enlarged, weight.numpy(), strict=True)
        )
        torch.testing.assert_close(channel.double(), torch.as_tensor(expected).double(), atol=1e-5, rtol=1e-5)
