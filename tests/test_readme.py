"""The examples of the README run as printed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


FIRST, *OWN_CODE = BLOCKS
"""The first example needs trained runs, and is tested in `tests/test_docs.py`."""


def test_there_is_an_example_for_the_op_and_each_modality():
    assert len(OWN_CODE) == 4


@pytest.mark.parametrize("block", OWN_CODE, ids=["op", "text", "image", "audio"])
def test_examples_run(block):
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    outputs = [names[name] for name in ("out", "ids", "logits") if name in names]
    assert outputs
    assert all(output.isfinite().all() for output in outputs)


def test_linked_files_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing
