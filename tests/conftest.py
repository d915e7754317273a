"""Order of the test files."""

from __future__ import annotations

import pytest

LONG = ("integration", "training")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the folders of long files: one at the end would leave the other processes idle."""
    items.sort(key=lambda item: item.path.parent.name not in LONG)
