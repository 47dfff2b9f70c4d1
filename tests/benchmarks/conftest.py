"""What the tests of benchmarks share."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest

from diffmm.layers.attention import ATTENTIONS


@pytest.fixture(autouse=True)
def registered_attentions() -> Iterator[None]:
    """Attentions that a test registers are removed after it."""
    with patch.dict(ATTENTIONS):
        yield
