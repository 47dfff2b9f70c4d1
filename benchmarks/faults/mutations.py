"""Recipes and checkpoints changed at random, by hypothesis: each is taken, or refused with a line
that says why. What ends in a traceback, says nothing or hangs is lost."""

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

SECONDS_A_COMMAND = 60

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
"""What may stand in a recipe by mistake."""


class HangError(BaseException):
    """A command took too long."""


def mutate_recipes(name: str, count: int, folder: Path, rng: random.Random) -> Iterator[Fault]:
    """Change a shipped recipe in one or two places, so many times; `diffmm check` looks at it.

    Args:
        name: of the recipe.
        count: how many changed ones.
        folder: for them.
        rng: for hypothesis.
    """
    values = yaml.safe_load(find_recipe(name).read_text())
    places = [path for path, _ in walk(values) if path]
    path = folder / "mutated.yaml"

    def look(data: st.DataObject) -> Fault:
        changed, told = deepcopy(values), []
        for _ in range(data.draw(st.integers(1, 2))):
            told.append(_change(changed, data.draw(st.sampled_from(places)), data))
        path.write_text(yaml.safe_dump(changed, sort_keys=False))
        lost = outcome("check", str(path))
        return Fault("recipes: values changed", f"{name}: {', '.join(told)}").and_lost(lost)

    yield from _examples(look, count, rng)


def mutate_text(name: str, count: int, folder: Path, rng: random.Random) -> Iterator[Fault]:
    """Change some bytes of a recipe's file, so many times; `diffmm check` looks at it."""
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
    """Change a checkpoint in one place and give it a manifest that says it is whole, so many times;
    the run goes on with it.

    Args:
        run: that has ended; the checkpoint before its last is replaced.
        count: how many changed ones.
        rng: for hypothesis.
    """
    *_, before_last, _ = run.whole()
    state = torch.load(before_last.path / STATE_NAME, weights_only=True)
    # Not each of the many numbers of a random state.
    places = [path for path, _ in walk(state) if 0 < len(path) <= DEEPEST]

    def look(data: st.DataObject) -> Fault:
        changed = deepcopy(state)
        told = _change(changed, data.draw(st.sampled_from(places)), data)
        facts = {"step": state["global_step"], "epoch": 0, "metrics": {}}
        unfinished = checkpoint_folders.start(run.checkpoints, state["global_step"])
        torch.save(changed, unfinished / STATE_NAME)
        checkpoint_folders.finish(unfinished, facts)
        lost = outcome("fit", "--resume", str(run.directory), "--trust")
        return Fault("checkpoints: values changed", f"{run.name}: {told}").and_lost(lost)

    yield from _examples(look, count, rng)


def outcome(*arguments: str, may: bool = True) -> list[str]:
    """What is wrong with how a command ends: nothing, if it succeeds or says why it does not.

    Args:
        arguments: of `diffmm`.
        may: whether it may succeed.
    """
    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, _hang)
    signal.alarm(SECONDS_A_COMMAND)
    try:
        with quiet(), redirect_stdout(out), redirect_stderr(err):
            code = main(arguments)
    except HangError:
        return [f"it hung for {SECONDS_A_COMMAND} s"]
    except BaseException as error:
        if any("was resumed from" in note for note in getattr(error, "__notes__", ())):
            return []
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        return [f"{type(error).__name__} at {place}: {' '.join(str(error).split())[:300]}"]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    told = [line for line in err.getvalue().splitlines() if line.startswith("diffmm: error: ")]
    if (code == 0 and may) or (code in (1, 2) and told and all(len(line) > 25 for line in told)):
        return []
    return [f"exit code {code}, and it says {told}"]


def _hang(number: int, frame: FrameType | None) -> None:
    raise HangError


def _examples(
    look: Callable[[st.DataObject], Fault], count: int, rng: random.Random
) -> Iterator[Fault]:
    """What hypothesis finds in so many examples."""
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
    """Change a node of a tree; where it is gone by an earlier change, nothing."""
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
