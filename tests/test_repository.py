"""What the repository holds."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_no_file_is_larger_than_a_mebibyte():
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository")
    found = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    files = [ROOT / name for name in found.split("\0") if name]
    assert len(files) > 100
    large = [file for file in files if file.is_file() and file.stat().st_size > 2**20]
    assert large == []
