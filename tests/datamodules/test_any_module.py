"""Any Lightning module trains on a datamodule of this library with Lightning's defaults."""

import json
import runpy
from pathlib import Path

import pytest
from forked import run_as_torchrun

SCRIPT = Path(__file__).with_name("run_any_module.py")
FIELDS = ("images", "waveforms", "num_tokens", "tokens")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return tmp_path_factory.mktemp("one")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_as_torchrun(SCRIPT, 2, [str(folder)], folder)
    return json.loads((folder / "results.json").read_text())


def test_a_module_that_knows_only_a_field(one_process):
    found = runpy.run_path(str(SCRIPT))["run"](one_process, 1)
    assert found.keys() == set(FIELDS)
    for seen in found.values():
        for stage in ("validation", "test", "predict"):
            assert seen[stage] == list(range(len(seen[stage])))
            assert seen[stage]
        assert len(seen["training"]) == len(set(seen["training"])) > 0


@pytest.mark.slow
@pytest.mark.parametrize("field", FIELDS)
def test_processes_share_the_samples_under_lightnings_own_default(field, two_processes):
    seen = two_processes[field]
    assert len(seen["training"]) == len(set(seen["training"])) > 0
    for stage in ("validation", "test", "predict"):
        # Both processes may see one sample, so that they have equal numbers of batches.
        assert set(seen[stage]) == set(range(max(seen[stage]) + 1))
        assert len(seen[stage]) - len(set(seen[stage])) <= 2
