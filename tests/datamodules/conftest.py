"""Fixtures for tests of data."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def within_a_minute() -> Iterator[None]:
    """Make a test fail instead of hanging if a file blocks its reader."""

    def stop(signum: int, frame: Any) -> None:
        pytest.fail("the test took more than a minute")  # which is not handled as a bad file

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
