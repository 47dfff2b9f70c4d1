"""The import time and the names of `import diffmm`, and the examples of its functions."""

import doctest
import subprocess
import sys

import pytest
import torch

import diffmm
from diffmm.hub.predictions import Prediction

EXAMPLES = [name for name in diffmm.__all__ if name != "__version__"]


def test_importing_is_light_and_quick():
    code = (
        "import sys, time; before = time.perf_counter(); import diffmm; "
        "seconds = time.perf_counter() - before; dir(diffmm); "
        "heavy = {'torch', 'lightning', 'timm', 'numpy', 'omegaconf', 'yaml'} & set(sys.modules); "
        "print(seconds); sys.exit(', '.join(heavy) or 0)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        for _ in range(3)
    ]
    assert [run.returncode for run in runs] == [0, 0, 0], runs[0].stderr
    # The minimum of three, because other tests may run at the same time.
    assert min(float(run.stdout) for run in runs) < 0.2


def test_making_a_model_needs_no_lightning():
    code = (
        "import sys, diffmm; diffmm.create_model('image/digits_tiny'); "
        "heavy = {'lightning', 'jsonargparse', 'timm', 'datamodules'} & set(sys.modules); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_name_is_there_and_listed():
    assert len(diffmm.__all__) == len(set(diffmm.__all__)) <= 20
    for name in diffmm.__all__:
        assert getattr(diffmm, name) is not None
        assert name in dir(diffmm)
    with pytest.raises(AttributeError, match="module 'diffmm' has no attribute 'lode'"):
        diffmm.lode  # noqa: B018


def test_help_shows_the_way():
    for line in ("diffmm.create_model(", "diffmm.load(", ".predict(", ".generate(", "list_models"):
        assert line in diffmm.__doc__


def test_help_is_a_page_and_imports_nothing():
    code = (
        "import pydoc, sys, diffmm; text = pydoc.render_doc(diffmm, renderer=pydoc.plaintext); "
        "assert 'Backbone' in dir(diffmm); print(text); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) < 100
    for name in EXAMPLES:
        assert name in done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_every_public_name(name, there):
    import numpy as np

    thing = getattr(diffmm, name)
    examples = doctest.DocTestParser().get_doctest(
        thing.__doc__ or "", {"diffmm": diffmm, "torch": torch, "np": np}, name, None, 0
    )
    assert examples.examples, f"{name} has no example"
    told: list[str] = []
    doctest.DocTestRunner(verbose=False).run(examples, out=told.append)
    assert not told, "".join(told)


def test_a_printed_prediction_separates_its_classes():
    prediction = Prediction(("cat, big", "dog"), (0.75, 0.25), "a.png")
    assert str(prediction) == 'a.png: "cat, big" 0.750, dog 0.250'
    assert prediction.label == "cat, big"
