"""Hyper-parameters that a user changes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import pytest

from bids_uad.methods.andi import ANDi
from bids_uad.methods.disyre import Disyre
from bids_uad.methods.hyper import change_hyper, hyper_from_values


@dataclass(frozen=True)
class Needy:
    """Hyper-parameters of which one has no default."""

    depth: int
    width: int = 3


LITE = ANDi.presets["lite"]


def test_values_take_the_type_they_replace():
    changed = change_hyper(LITE, ["stride=4", "residual_floor=0", "published_noise=true"])
    assert (changed.stride, changed.residual_floor, changed.published_noise) == (4, 0.0, True)
    assert type(changed.residual_floor) is float
    assert changed.network == LITE.network
    assert change_hyper(Disyre.presets["lite"], ["labels=[74, 24]"]).labels == (74, 24)
    assert change_hyper(LITE, []) == LITE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("strides=4", "no hyper-parameter 'strides'; there are .*stride"),
        ("network=4", "no hyper-parameter 'network'"),
        ("stride=many", "stride is 10, so 'many' is of another type"),
        ("stride=2.5", "of another type"),
        ("stride=true", "of another type"),
        ("stride", "of another type"),
    ],
)
def test_what_cannot_be_is_said(change, words):
    with pytest.raises(ValueError, match=words):
        change_hyper(LITE, [change])


def test_options_that_came_after_a_model_have_their_default():
    values = asdict(Disyre.presets["lite"])
    del values["anomalies"]
    assert hyper_from_values(type(Disyre.presets["lite"]), values) == Disyre.presets["lite"]
    with pytest.raises(ValueError, match="depth"):
        hyper_from_values(Needy, {"width": 4})
    with pytest.raises(ValueError, match="height"):
        hyper_from_values(Needy, {"depth": 1, "height": 4})
