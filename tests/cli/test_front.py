"""The `diffmm` command itself: which verb is called, and its startup time."""

import subprocess
import sys
import time

import pytest

from diffmm import __version__
from diffmm.cli import VERBS, main


def test_help_lists_every_verb_and_imports_nothing_heavy():
    code = (
        "import sys; from diffmm.cli import main; main(['--help']); "
        "heavy = {'torch', 'lightning', 'jsonargparse', 'numpy', 'yaml', 'omegaconf'}; "
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert f"  {verb} " in done.stdout


def test_help_answers_at_once():
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "diffmm", "--help"], check=True, stdout=-3)
        return time.perf_counter() - start

    # The minimum of three, because other tests may run at the same time.
    assert min(seconds() for _ in range(3)) < 1.5


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_prints_its_help_without_torch(verb):
    code = (
        "import sys; from diffmm.cli import main\n"
        f"try: main([{verb!r}, '--help'])\n"
        "except SystemExit as done: assert not done.code\n"
        "sys.exit('torch' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: diffmm {verb}" in done.stdout


def test_generation_is_imported_without_a_compiler():
    code = (
        "import sys, diffmm.models.generation; "
        "sys.exit('torch._inductor' if 'torch._inductor' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_verb_has_a_module_that_runs_it():
    import importlib

    for verb in VERBS.values():
        assert callable(importlib.import_module(f"diffmm.cli.{verb.module}").run)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"diffmm {__version__}\n"


def test_an_unknown_verb_is_told_with_the_nearest(capsys):
    assert main(["fti"]) == 2
    assert capsys.readouterr().err == (
        "diffmm: error: there is no command 'fti'; did you mean 'fit'? (diffmm --help)\n"
    )


@pytest.mark.parametrize(
    ("verb", "option"), [("fit", "--resume"), ("finetune", "--weights"), ("predict", "--output")]
)
def test_help_of_training_is_short_and_shows_all_settings_on_demand(run, verb, option):
    result = run(verb, "--help")
    assert result.code == 0
    assert result.out.startswith(f"usage: diffmm {verb} ")
    assert option in result.out
    assert "--trainer.limit_val_batches" not in result.out
    assert len(result.out.splitlines()) < 60
    result = run(verb, "--help-all")
    assert result.code == 0
    assert result.out.count(f"usage: diffmm {verb} ") == 2
    for text in (option, "--trainer.max_steps", "--vars", "--imports"):
        assert text in result.out


def test_help_of_a_class_shows_its_arguments(run):
    result = run("fit", "--model.help", "diffmm.training.CausalLM")
    assert result.code == 0
    assert "--model.optimizer.learning_rate" in result.out


def test_verbs_import_large_packages_without_garbage_collections():
    """See `diffmm.recipes.importing`. `compare` does so where it summarizes runs, and `doctor`
    imports packages in a process of its own."""
    import importlib

    modules = {verb.module for verb in VERBS.values()}
    others = {
        name
        for name in modules
        if not hasattr(importlib.import_module(f"diffmm.cli.{name}"), "importing")
    }
    assert others == {"compare", "doctor", "recipes"}
