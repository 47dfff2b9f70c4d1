"""The Triton kernels on the CPU: runs `interpreted_triton.py` under Triton's interpreter.

Triton decides between compiling and interpreting when it is imported, so a new process is needed.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffmm.ops import AttentionMask, diff_attention


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="needs the package triton")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted_triton.py"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert "passed" in result.stdout
    assert "skipped" not in result.stdout


def test_without_a_gpu_it_says_so():
    pytest.importorskip("triton", reason="needs the package triton")
    q, k, v = torch.randn(1, 4, 2, 2, 16), torch.randn(1, 4, 2, 1, 16), torch.randn(1, 4, 2, 16)
    with pytest.raises(ValueError, match="'triton' needs a CUDA device, but q is on cpu"):
        diff_attention(q, k, v, 0.5, mask=AttentionMask(), backend="triton")
