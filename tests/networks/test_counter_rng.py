"""Counter-based random numbers against SplitMix64 in Python integers, and their distribution."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from scipy.stats import kstest

from bids_uad.networks.counter_rng import SliceGenerator, mix

CPU = torch.device("cpu")
WORD = 2**64


def splitmix(state: int) -> int:
    """Finaliser of SplitMix64 in Python integers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % WORD
    return state ^ (state >> 31)


def test_mix_equals_splitmix64():
    # The first outputs of the published generator for the seed 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    counters = [(1234567 + k * 0x9E3779B97F4A7C15) % WORD for k in (1, 2, 3)]
    assert [splitmix(counter) for counter in counters] == published
    signed = torch.tensor([c - WORD if c >= WORD // 2 else c for c in counters])
    assert [bits % WORD for bits in mix(signed).tolist()] == published


def test_draws_are_hashes_of_seed_step_and_counter():
    """The complete computation from image name to number in Python integers."""
    generator = SliceGenerator.of_slices("sub-01_T1w", 3, [70], CPU)
    digest = hashlib.sha256(b"3/sub-01_T1w/70").digest()
    seed = int.from_bytes(digest[:8], "big")
    for step in (0, 125):
        start = splitmix((seed + splitmix(step + 1)) % WORD)
        words = [splitmix((start + k * 0x9E3779B97F4A7C15) % WORD) for k in range(1, 8)]
        unit = np.array([((word >> 40) + 0.5) / 2**24 for word in words])
        np.testing.assert_allclose(generator.uniform(step, 7)[0], unit, rtol=1e-6)
        # Halfway between multiples of 2^-24: neither 0 nor 1 is drawn, and no logarithm is infinite.
        small = generator.uniform(step, 1000).double()
        small = small[small < 0.5] * 2**24
        assert (small % 1 == 0.5).all()
        # Box and Muller, with the radius from the upper and the angle from the lower bits.
        radius, angle = np.sqrt(-2 * np.log(unit)), [2 * np.pi * ((w >> 8) % 2**24) / 2**24 for w in words]
        pairs = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        np.testing.assert_allclose(generator.normal(step, 14)[0], pairs, atol=2e-6)


def test_draws_are_uniform_and_normal():
    generator = SliceGenerator.of_slices("sub-01_T1w", 0, [3, 70], CPU)
    for step in (0, 125):
        for values, law in (
            (generator.uniform(step, 300, 301), "uniform"),
            (generator.normal(step, 300, 301), "norm"),
        ):
            assert values.shape == (2, 300, 301)
            for stream in values:
                assert kstest(stream.flatten().numpy(), law).pvalue > 1e-3


def test_slices_steps_and_positions_are_independent():
    generator = SliceGenerator.of_slices("a", 0, [0, 1], CPU)
    first, second = (generator.normal(step, 200, 200) for step in (0, 1))
    pairs = [
        (first[0], first[1]),
        (first[0], second[0]),
        (first[0, 1:], first[0, :-1]),
        (first[0, :, 1:], first[0, :, :-1]),
        (first[0, :100], first[0, 100:]),
        (first[0] ** 2, second[1] ** 2),
    ]
    for a, b in pairs:
        assert abs(np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1]) < 0.03


def test_draws_of_a_slice_do_not_depend_on_the_batch():
    together = SliceGenerator.of_slices("a", 0, [5, 6, 7], CPU)
    alone = SliceGenerator.of_slices("a", 0, [6], CPU)
    assert torch.equal(together.normal(4, 1, 9, 9)[1:2], alone.normal(4, 1, 9, 9))
    assert torch.equal(together[[2, 1]].uniform(4, 9)[1:], alone.uniform(4, 9))
    others = (("b", 0, 6), ("a", 1, 6), ("a", 0, 5))
    for key, seed, index in others:
        other = SliceGenerator.of_slices(key, seed, [index], CPU)
        assert not torch.equal(other.uniform(4, 9), alone.uniform(4, 9))
