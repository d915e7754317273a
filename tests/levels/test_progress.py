"""What a run says while it goes on."""

from __future__ import annotations

import logging
from types import SimpleNamespace

from bids_uad.levels.participant.summary import ProgressLog


def node(name: str, image: str = "sub_01_T1w") -> SimpleNamespace:
    full = f"bids_uad_wf.sub_01_wf.{image}_derivatives_wf.{name}"
    return SimpleNamespace(name=name, fullname=full)


def test_each_image_is_told_once_when_it_ends(caplog):
    progress = ProgressLog(3)
    with caplog.at_level(logging.INFO, logger="bids_uad"):
        for name in ("detect", "complete"):
            progress(node(name), "start")
            progress(node(name), "end")
        progress(node("detect", "sub_01_T2w"), "exception")
        progress(node("post_disyre", "sub_01_T2w"), "exception")
    assert caplog.messages == ["sub_01_T1w done, 1 of 3 images", "sub_01_T2w failed, 2 of 3 images"]
