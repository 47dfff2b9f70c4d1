"""Random changes of recipes and checkpoints, drawn by hypothesis. Each must be accepted, or refused
with a line that gives the reason; a traceback, no message or a hang counts as lost."""

import io
import json
import random
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.faults.runs import Run
from benchmarks.faults.tally import Fault
from diffmm import checkpoint_folders
from diffmm.checkpoint_folders import STATE_NAME
from diffmm.cli import main
from diffmm.cli.demo_runs import quiet
from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.references import walk

SECONDS_PER_COMMAND = 60

DEEPEST = 6

JUNK: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.floats(-2.0, 2.0),
    st.sampled_from(
        [float("nan"), float("inf"), "", "diff_v3", "${vars.nothing}", "${", "1e", "é"]
    ),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(st.sampled_from(["class_path", "init_args", "x"]), st.integers(), max_size=2),
)
"""Values that a recipe may contain by mistake."""


class HangError(BaseException):
    """A command took too long."""


def mutate_recipes(name: str, count: int, folder: Path, rng: random.Random) -> Iterator[Fault]:
    """Run `diffmm check` on copies of a shipped recipe with one or two changed values.

    Args:
        name: Name of the recipe.
        count: Number of changed copies.
        folder: Folder for the copies.
        rng: Random generator for the seed of hypothesis.
    """
    values = yaml.safe_load(find_recipe(name).read_text())
    places = [path for path, _ in walk(values) if path]
    path = folder / "mutated.yaml"

    def look(data: st.DataObject) -> Fault:
        changed, changes = deepcopy(values), []
        for _ in range(data.draw(st.integers(1, 2))):
            changes.append(_change(changed, data.draw(st.sampled_from(places)), data))
        path.write_text(yaml.safe_dump(changed, sort_keys=False))
        lost = outcome("check", str(path))
        return Fault("recipes: values changed", f"{name}: {', '.join(changes)}").and_lost(lost)

    yield from _examples(look, count, rng)


def mutate_text(name: str, count: int, folder: Path, rng: random.Random) -> Iterator[Fault]:
    """Run `diffmm check` on `count` copies of a shipped recipe with changed bytes."""
    content = find_recipe(name).read_bytes()
    path = folder / "mutated.yaml"

    def look(data: st.DataObject) -> Fault:
        place = data.draw(st.integers(0, len(content) - 1))
        end = place + data.draw(st.integers(0, 8))
        piece = data.draw(st.binary(max_size=6))
        path.write_bytes(content[:place] + piece + content[end:])
        lost = outcome("check", str(path))
        return Fault("recipes: bytes changed", f"{name}: {place} to {end}: {piece!r}").and_lost(
            lost
        )

    yield from _examples(look, count, rng)


def mutate_states(run: Run, count: int, rng: random.Random) -> Iterator[Fault]:
    """Resume a run from checkpoints with one changed value and a valid manifest.

    Args:
        run: A finished run, whose last but one checkpoint is replaced.
        count: Number of changed checkpoints.
        rng: Random generator for the seed of hypothesis.
    """
    *_, before_last, _ = run.whole()
    state = torch.load(before_last.path / STATE_NAME, weights_only=True)
    # The depth limit excludes the many numbers of a random state.
    places = [path for path, _ in walk(state) if 0 < len(path) <= DEEPEST]

    def look(data: st.DataObject) -> Fault:
        changed = deepcopy(state)
        change = _change(changed, data.draw(st.sampled_from(places)), data)
        facts = {"step": state["global_step"], "epoch": 0, "metrics": {}}
        unfinished = checkpoint_folders.start(run.checkpoints, state["global_step"])
        torch.save(changed, unfinished / STATE_NAME)
        checkpoint_folders.finish(unfinished, facts)
        lost = outcome("fit", "--resume", str(run.directory), "--trust")
        return Fault("checkpoints: values changed", f"{run.name}: {change}").and_lost(lost)

    yield from _examples(look, count, rng)


def outcome(*arguments: str, may: bool = True) -> list[str]:
    """Run a command; return no faults if it succeeds or reports why it fails.

    Args:
        arguments: Arguments of `diffmm`.
        may: Whether the command may succeed.
    """
    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, _hang)
    signal.alarm(SECONDS_PER_COMMAND)
    try:
        with quiet(), redirect_stdout(out), redirect_stderr(err):
            code = main(arguments)
    except HangError:
        return [f"it hung for {SECONDS_PER_COMMAND} s"]
    except BaseException as error:
        if any("was resumed from" in note for note in getattr(error, "__notes__", ())):
            return []
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        return [f"{type(error).__name__} at {place}: {' '.join(str(error).split())[:300]}"]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    lines = [line for line in err.getvalue().splitlines() if line.startswith("diffmm: error: ")]
    if (code == 0 and may) or (code in (1, 2) and lines and all(len(line) > 25 for line in lines)):
        return []
    return [f"exit code {code}, and it prints {lines}"]


def _hang(number: int, frame: FrameType | None) -> None:
    raise HangError


def _examples(
    look: Callable[[st.DataObject], Fault], count: int, rng: random.Random
) -> Iterator[Fault]:
    """Run `look` on `count` examples of hypothesis."""
    found: list[Fault] = []

    @seed(rng.randrange(2**32))
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def collect(data: st.DataObject) -> None:
        found.append(look(data))

    collect()
    yield from found


def _change(tree: Any, path: tuple[Any, ...], data: st.DataObject) -> str:
    """Change a node of a tree; do nothing if an earlier change has removed it."""
    *parents, last = path
    name = ".".join(map(str, path))
    node = tree
    try:
        for part in parents:
            node = node[part]
        value = node[last]
    except (KeyError, IndexError, TypeError):
        return f"{name} was gone"
    how = data.draw(st.sampled_from(["remove", "rename", "replace", "replace", "wrap"]))
    if how == "remove":
        del node[last]
        return f"{name} removed"
    if how == "rename" and isinstance(last, str):
        node[f"{last[1:]}{last[:1]}"] = node.pop(last)
        return f"{name} renamed"
    if how == "wrap":
        node[last] = [value]
        return f"{name} wrapped in a list"
    node[last] = data.draw(JUNK)
    return f"{name} = {json.dumps(node[last])}"
