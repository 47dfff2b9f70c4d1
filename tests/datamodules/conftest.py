"""What the tests of data can lean on."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def within_a_minute() -> Iterator[None]:
    """The test fails, rather than hangs, where a file keeps its reader waiting."""

    def stop(signum: int, frame: Any) -> None:
        pytest.fail("the test took more than a minute")  # which nothing takes for a bad file

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
