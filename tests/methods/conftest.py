"""Fixtures that tests of detectors share with those of networks."""

from tests.networks.conftest import slices  # noqa: F401
