"""A recipe on a user's own data: `diffmm fit --config RECIPE --data PATH`.

The class method `own_data` of the recipe's data class inspects the path. Its findings become
settings of the data, and the number of classes, the channels and the sample rate of the model.
Overrides on the command line take precedence.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffmm.recipes.errors import InputError, refusing
from diffmm.recipes.imports import import_modules
from diffmm.recipes.mistakes import import_class
from diffmm.recipes.references import REFERENCE, resolve, used_variables, walk
from diffmm.recipes.settings import load, override, parse_overrides
from diffmm.recipes.trust import why_untrusted

Place = tuple[str | int, ...]

LOCATIONS = (
    *("train", "val", "test", "root", "data_files"),
    *("pattern", "separator", "encoding", "document_start", "streaming"),
)
"""Arguments of the recipe's own source that locate its data and say how its texts are read; they do
not apply to the user's."""

INPUT_SIZE = ("image_size",)
"""Settings of image models; their number of channels is a setting of the same node."""


class OnOwnData(NamedTuple):
    """A recipe with the user's data.

    Attributes:
        values: Values of the recipe, complete and unresolved.
        lines: Summary of the data, and of the settings derived from them.
    """

    values: dict[str, Any]
    lines: list[str]


def on_own_data(
    recipes: Sequence[Path],
    overrides: Sequence[str],
    path: str,
    *,
    inputs_may_change: bool,
    trust: bool = True,
) -> OnOwnData:
    """Return a recipe with the data at `path`.

    Args:
        recipes, overrides: See `diffmm.recipes.settings.load`.
        path: Path of a file or a folder.
        inputs_may_change: Whether the channels and the sample rate of the model may be changed to
            those of the data. Must be False if the model starts from other weights.
        trust: Whether to import a data class from outside `diffmm.recipes.trust.KNOWN`.

    Raises:
        InputError: If the recipe's data take no path, or the data at `path` are invalid.
    """
    looked = {**load(recipes), "run_dir": "runs"}
    for where in [where for where, _ in walk(looked) if where[-1] in LOCATIONS]:
        if where[:-1] == ("data", "init_args", "source", "init_args"):
            del looked["data"]["init_args"]["source"]["init_args"][where[-1]]
    # Overrides may change how the data are read, such as --data.source.val_fraction.
    for key, value in parse_overrides(overrides):
        override(looked, key, value)
    resolved = resolve(looked)[0]
    if mistakes := import_modules(resolved, trust=trust):
        raise InputError(*mistakes)
    node = resolved.get("data")
    node = node if isinstance(node, dict) else {}
    class_path = node.get("class_path")
    if not trust and (why := why_untrusted(class_path)):
        raise InputError(f"data.class_path: {why}")
    try:
        data_class = import_class(class_path)
    except ImportError as error:
        raise InputError(f"data.class_path: {error}") from error
    if not hasattr(data_class, "own_data"):
        raise InputError(
            f"--data {path}: the data class {class_path} does not support --data: set --data.source"
        )
    with refusing():
        found = data_class.own_data(
            path, node.get("init_args") or {}, inputs_may_change=inputs_may_change
        )
    values = load(recipes)
    used = used_variables(values)
    names: dict[str, tuple[Place, Any]] = {}
    for name, value in found.settings.items():
        place: Place = ("data", "init_args", name)
        if value is None or isinstance(value, dict):
            values["data"].setdefault("init_args", {})[name] = value
        else:
            names[name] = (set_through(values, place, value), value)
    for name, value in found.facts.items():
        for place in list(_places(values, name)):
            names[name] = (set_through(values, place, value), value)
    for key, value in parse_overrides(overrides):
        override(values, key, value)
    # Remove variables that only located the recipe's own data.
    left = set(used) - set(used_variables(values))
    if isinstance(values.get("vars"), dict):
        values["vars"] = {name: v for name, v in values["vars"].items() if name not in left}
    lines = [found.summary]
    final = resolve({**values, "run_dir": "runs"})[0]
    if "num_classes" in names:
        _check_labels(final, found.summary)
    if names:
        changes = [
            _change_text(name, place, value, final) for name, (place, value) in names.items()
        ]
        lines.append(f"set: {', '.join(changes)}")
    if found.facts.get("num_classes") == 1 and "num_classes" in names:
        raise InputError(
            f"{found.summary}. A classifier needs at least two classes: if their folders are one "
            f"level down, give that folder"
        )
    return OnOwnData(values, lines)


def _check_labels(final: dict[str, Any], summary: str) -> None:
    """Raise if only one of the data and the model has several labels per sample."""
    source = final["data"]["init_args"]["source"].get("init_args") or {}
    theirs = bool(source.get("multi_label", False))
    ours = bool((final["model"].get("init_args") or {}).get("multi_label", False))
    if theirs != ours:
        raise InputError(
            f"{summary}. The data have multi_label={theirs}, but the recipe's model has {ours}: a "
            f"CSV file may give several labels per sample (--data.source.multi_label true), a "
            f"folder gives one (--model.multi_label false, and another metric to monitor)"
        )


def _places(values: dict[str, Any], name: str) -> Iterator[Place]:
    """Yield the paths of the settings of a recipe's model and data that give the fact `name`."""
    model = [(("model", *place), value) for place, value in walk(values.get("model"))]
    if name == "num_classes":
        yield from (place for place, _ in model if place[-1] == "num_classes")
    elif name == "sample_rate_hz":
        yield from (place for place, _ in model if place[-1] == "sample_rate_hz")
        yield ("data", "init_args", "sample_rate_hz")
    elif name == "channels":
        sees = [place[:-1] for place, _ in model if place[-1] in INPUT_SIZE]
        yield from ((*place, "in_channels") for place in sees)
        if sees:
            yield ("data", "init_args", "channels")


def set_through(values: dict[str, Any], place: Place, value: Any) -> Place:
    """Set a value in place; if the current value is a reference, set its target instead.

    Returns:
        The path at which the value was set.
    """
    node: Any = values
    for part in place[:-1]:
        node = node.setdefault(part, {}) if isinstance(node, dict) else node[part]
    there = node.get(place[-1]) if isinstance(node, dict) else node[place[-1]]
    if isinstance(there, str) and (match := REFERENCE.fullmatch(there)):
        target = tuple(match[1].split("."))
        if target[0] in values and target != place:
            return set_through(values, target, value)
    node[place[-1]] = value
    return place


def _change_text(name: str, place: Place, value: Any, final: dict[str, Any]) -> str:
    """Describe a setting and its value, and the data's value if the command line overrides it."""
    now: Any = final
    for part in place:
        now = now.get(part) if isinstance(now, dict) else now[part]
    key = ".".join(str(part) for part in place if part != "init_args")
    if now != value:
        return f"{key} {now} (as given; the data have {value})"
    return f"{name} {value} ({key})" if place[-1] != name else f"{key} {value}"
