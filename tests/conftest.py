"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def models() -> Callable[[str], object]:
    """`models(name)` is the test model of that name; the first use makes them all, in seconds."""
    from models import test_model  # imports torch: only for tests that want a model

    return test_model
