"""Tell how far a run has come."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from bids_uad.levels.participant.workflow import place_of_node

LOGGER = logging.getLogger("bids_uad")


@dataclass
class Progress:
    """A nipype status callback that logs each image as it ends, well or not.

    Parameters
    ----------
    total : int
        Images to process.
    """

    total: int
    _ended: set[tuple[str, str]] = field(default_factory=set)

    def __call__(self, node: Any, status: str) -> None:
        """Take note of an image's last node, and of the first that fails."""
        place = place_of_node(node.fullname)
        # The record is written last, when all else is.
        good = status == "end" and node.name == "complete"
        if place in self._ended or not (good or status == "exception"):
            return
        self._ended.add(place)
        LOGGER.info(
            "%s %s, %d of %d images", place[1], "done" if good else "failed", len(self._ended), self.total
        )
