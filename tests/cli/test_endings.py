"""Commands ended from outside: signals in every phase, closed pipes, full disks."""

import errno
import os
import pkgutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import run_diffmm
from PIL import Image

from diffmm.cli import main
from diffmm.models.weights import save_model
from diffmm.recipes.errors import InputError
from diffmm.recipes.settings import load
from diffmm.recipes.trainer import RecipeCLI
from diffmm.runs.claims import claimed

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}

PHASES = {
    "import": ("validate", "diffmm.cli.importlib.import_module"),
    "building": ("fit", "diffmm.recipes.trainer.RecipeCLI.instantiate_trainer"),
    "data": ("fit", "datamodules.image.Digits.splits"),
    "training": ("fit", "diffmm.training.Classification.training_step"),
    "validation": ("fit", "diffmm.training.Classification.validation_step"),
    "evaluation": ("validate", "diffmm.training.Classification.validation_step"),
    "prediction": ("predict", "diffmm.training.Classification.predict_step"),
    "writing": ("predict", "torch.save"),
    "check": ("check", "diffmm.recipes.summary.report"),
}


@pytest.fixture
def command(recipe, tmp_path):
    """`command(verb)` returns a command, with the weights of an untrained model."""

    def arguments(verb):
        path = recipe()
        if verb == "check":
            return [verb, str(path)]
        if verb == "fit":
            return [verb, "--config", str(path), "--run_dir", "there/run"]
        values = load([path], ["--trainer.logger", "false", "--trainer.callbacks", "[]"])
        task = RecipeCLI({**values, "run_dir": "runs"}).model
        weights = save_model(task.model, tmp_path / "model.safetensors")
        return [verb, "--config", str(path), "--weights", str(weights)]

    return arguments


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_every_phase(run, command, monkeypatch, phase, number):
    verb, target = PHASES[phase]
    arguments = command(verb)
    # A shell starts background jobs with this signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Reset the state that earlier commands in this process may have left.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    handlers = {each: signal.getsignal(each) for each in CODES}
    original = pkgutil.resolve_name(target)
    sent = []

    def with_signal(*args, **kwargs):
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(target, with_signal)
    result = run(*arguments)
    assert sent
    assert result.code == CODES[number], result.err
    assert "Traceback" not in result.err
    # A run that has begun is kept.
    assert os.listdir(".") == (["there"] if phase in ("training", "validation") else [])
    assert {each: signal.getsignal(each) for each in CODES} == handlers


def shell(line, tmp_path):
    """Run a line of bash, and return its stderr and exit code."""
    command = f"{sys.executable} -m diffmm.cli"
    environment = {**os.environ, "DIFFMM": command, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tmp_path, capture_output=True, text=True, timeout=100,
    )  # fmt: skip


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", ["recipes", "--help"])
def test_a_closed_pipe(tmp_path, arguments, unbuffered):
    result = shell(f"PYTHONUNBUFFERED={unbuffered} $DIFFMM {arguments} | true", tmp_path)
    assert result.returncode in (0, 141)
    assert result.stderr == ""


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """A run of images and one of texts, with two images to predict."""
    folder = tmp_path_factory.mktemp("runs")
    quick = (
        *("--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"),
        *("--trainer.num_sanity_val_steps", "0", "--run_dir"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "image/digits_tiny", *quick, "digits"]) == 0
        Path("a.txt").write_text("Once upon a time. " * 400)
        text = ("--config", "text/stdlib_tiny", "--data", "a.txt", "--vars.sequence_length", "32")
        assert main(["fit", *text, *quick, "text"]) == 0
        for number in range(200):
            Image.new("L", (8, 8), number).save(f"{number}.png")
    return folder


@pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*does not have many workers")
@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [
        ("predict digits .", False),
        ("predict digits . --num-workers 1", True),
        ("generate text Once", False),
        ("validate digits", False),
        ("compare digits text", True),
        ("fit --resume digits --trainer.max_steps 30", False),
    ],
)
def test_every_verb_ends_quietly_if_its_output_is_not_read(
    two_runs, tmp_path, arguments, unbuffered
):
    (ended,) = run_diffmm(
        arguments.split(), two_runs, tmp_path, is_read=False, unbuffered=unbuffered
    )
    assert ended.code == 141, ended.err
    assert "rror" not in ended.err
    assert "Broken pipe" not in ended.err


@pytest.mark.parametrize("arguments", ["predict digits .", "compare --help"])
def test_python_ends_quietly_too(two_runs, arguments):
    """It flushes the output once more when it ends."""
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "diffmm.cli", *arguments.split()],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "",
        },
        cwd=two_runs, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=100,
    )  # fmt: skip
    os.close(writer)
    assert result.returncode == 141, result.stderr
    assert "rror" not in result.stderr
    assert "Broken pipe" not in result.stderr


@needs_full
def test_a_full_output(tmp_path):
    result = shell("$DIFFMM recipes > /dev/full", tmp_path)
    assert result.returncode == 2
    assert result.stderr == "diffmm: error: [Errno 28] No space left on device\n"


@needs_full
def test_predictions_that_do_not_fit(run, command, monkeypatch):
    """A file that is written under a temporary name until it is complete."""
    arguments = command("predict")
    save = torch.save

    def onto_full_disk(content, file):
        with FULL.open("wb", buffering=0) as full:
            save(content, full)

    monkeypatch.setattr("torch.save", onto_full_disk)
    result = run(*arguments, "--output", "there.pt")
    assert (result.code, result.mistakes) == (
        1,
        ["the predictions could not be written to there.pt: [Errno 28] No space left on device"],
    )
    assert os.listdir(".") == []


LONG = "a" * 300


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["check", f"{LONG}.yaml"], "File name too long"),
        (["fit", "--resume", LONG], "File name too long"),
        (["fit", "--config", "image/digits_tiny", "--run_dir", "file/run"], "Not a directory"),
        (["fit", "--config", "image/digits_tiny", "--name", LONG], "File name too long"),
        (["replay", LONG], "File name too long"),
        (["generate", LONG, "a prompt"], "File name too long"),
        (["generate", "file/run", "a prompt"], "there is no file of weights"),
        (["recipes", "copy", "text/stdlib_tiny", "/proc/a.yaml"], "cannot be written"),
        (["recipes", "copy", "text/stdlib_tiny", f"{LONG}.yaml"], "File name too long"),
        (["demo", "--output", "file/demo"], "file: File exists"),
        (
            ["predict", "--config", "image/digits_tiny", "--weights", "x", "--output", "no/x.pt"],
            "there is no folder no to write x.pt to",
        ),
    ],
)
def test_paths_that_cannot_be(run, arguments, told):
    Path("file").touch()
    result = run(*arguments)
    assert result.code == 2
    (line,) = result.mistakes
    assert told in line
    assert "Traceback" not in result.err
    assert os.listdir(".") == ["file"]


def test_data_that_may_not_be_read(run, recipe, monkeypatch, tmp_path):
    """The error message of the system, before and during training."""
    folder = tmp_path / "images"
    for name in "ab":
        (folder / name).mkdir(parents=True)
    source = {
        "class_path": "datamodules.image.ImageFolder",
        "init_args": {"train": str(folder), "val": str(folder)},
    }
    path = recipe(**{"data.source": source})

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr("datamodules.shared.sources.list_files", refuse)
    result = run("fit", "--config", path)
    assert (result.code, result.mistakes) == (2, [f"{folder}: Permission denied"])
    assert os.listdir(".") == []
    monkeypatch.setattr("diffmm.training.Classification.training_step", refuse)
    result = run("fit", "--config", recipe())
    assert (result.code, result.mistakes) == (1, [f"{folder}: Permission denied"])


def tree(folder):
    return {path: path.is_file() and path.read_bytes() for path in Path(folder).rglob("*")}


def refuse_late(recipe):
    """A recipe that is refused only after loggers and folders are created."""
    return recipe(**{"data.batch_size": 100_000})


def test_a_refusal_leaves_a_folder_as_it_was(run, recipe):
    Path("there/csv").mkdir(parents=True)
    Path("there/csv/mine").write_text("of the user")
    Path("there/log.txt").write_text("of the user")
    before = tree("there")
    result = run("fit", "--config", refuse_late(recipe), "--run_dir", "there")
    assert result.code == 2
    assert "do not fill one batch" in result.mistakes[0]
    after = tree("there")
    assert {path: after.get(path) for path in before} == before
    assert set(after) - set(before) <= {Path("there/csv/version_0")}


def test_a_refusal_leaves_a_run_as_it_was(run, recipe):
    assert run("fit", "--config", recipe(), "--run_dir", "there").code == 0
    config = Path("there/config.yaml")
    config.write_text(config.read_text().replace("batch_size: 64", "batch_size: 100000"))
    assert "100000" in config.read_text()
    before = tree("there")
    result = run("fit", "--resume", "there", "--trainer.max_steps", "4")
    assert result.code == 2
    assert tree("there") == before


def test_what_comes_beside_a_refused_run_is_kept(tmp_path):
    """A file that a shell writes in the same directory, for example."""
    run = tmp_path / "run"
    run.mkdir()

    def fill():
        (run / "tee.txt").touch()
        (run / "tensorboard").mkdir()
        (run / "config.yaml").touch()
        raise InputError("no")

    with pytest.raises(InputError, match="no"), claimed(run):
        fill()
    assert os.listdir(run) == ["tee.txt"]


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("text/stdlib_tiny", {"data.batch_size": 10**15}, "larger than any memory"),
        ("image/digits_tiny", {"data.batch_size": 10**15}, "larger than any memory"),
        ("audio/sound_events_tiny", {"data.batch_size": 10**15}, "larger than any memory"),
        ("text/stdlib_tiny", {"vars.sequence_length": 10**12}, "larger than any memory"),
        ("image/digits_tiny", {"model.model.config.backbone.depth": 10**9}, "depth must be at"),
    ],
)
def test_numbers_beyond_any_memory(run, recipe, name, changes, told):
    result = run("check", recipe(name, **changes))
    assert result.code == 2
    (line,) = result.mistakes
    assert told in line


def test_signals_of_another_owner_are_left_alone(monkeypatch):
    """A caller of `main` keeps its own signal handler."""
    got = []
    before = signal.signal(signal.SIGTERM, lambda *args: got.append(args[0]))
    try:
        monkeypatch.setattr(
            "diffmm.cli.usage", lambda: os.kill(os.getpid(), signal.SIGTERM) or "usage"
        )
        assert main(["--help"]) == 0
        assert got == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
