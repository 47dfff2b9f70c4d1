"""The fixture `start`: commands that hang report their stack traces, and no process outlives its
test."""

import os
import select
import sys
import textwrap

import pytest

HANGS = textwrap.dedent("""
    import os, time
    if os.fork() == 0:
        def child_waits():
            time.sleep(60)
        child_waits()
    print("begun", flush=True)
    os.wait()
""")


def test_a_command_that_hangs_tells_where(start):
    with (
        start([sys.executable, "-V"], {}) as ends,
        start([sys.executable, "-c", HANGS], {}) as hangs,
        pytest.raises(pytest.fail.Exception) as failure,
    ):
        start.finish_all([ends, hangs], 3)
    message = str(failure.value)
    assert "did not end within 3 seconds" in message
    assert "begun" in message
    assert "in child_waits" in message


def test_nothing_outlives_its_test(start):
    with start([sys.executable, "-c", HANGS], {}) as hangs:
        assert hangs.stdout.readline() == "begun\n"
        stdout = os.dup(hangs.stdout.fileno())
    # It ends when the last process that could write to it has ended.
    assert select.select([stdout], [], [], 10)[0]
    assert os.read(stdout, 1) == b""
    os.close(stdout)
