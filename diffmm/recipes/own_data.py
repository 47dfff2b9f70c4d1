"""A recipe on a user's own data: `diffmm fit --config RECIPE --data PATH`.

The recipe's class of data looks at the path (its class method `own_data`); what it finds becomes
settings of the data, and the number of classes, the channels and the sample rate of the model. The
overrides of the command line come after these and win.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffmm.recipes.errors import InputError, refusing
from diffmm.recipes.mistakes import import_class
from diffmm.recipes.references import REFERENCE, resolve, used_variables, walk
from diffmm.recipes.settings import load, override, parse_overrides
from diffmm.recipes.trust import stranger

Place = tuple[str | int, ...]

LOCATIONS = ("train", "val", "test", "root")
"""Arguments of the recipe's own source that say where its data are, and nothing of the user's."""

INPUT_SIZE = ("image_size",)
"""A setting of models that see images: beside it stands how many channels they have."""


class OnOwnData(NamedTuple):
    """A recipe whose data are the user's.

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
    # Overrides may say how to look at the data (--data.source.val_fraction) and where else.
    for key, value in parse_overrides(overrides):
        override(looked, key, value)
    node = resolve(looked)[0].get("data")
    node = node if isinstance(node, dict) else {}
    class_path = node.get("class_path")
    if not trust and (why := stranger(class_path)):
        raise InputError(f"data.class_path: {why}")
    try:
        data_class = import_class(class_path)
    except ImportError as error:
        raise InputError(f"data.class_path: {error}") from error
    if not hasattr(data_class, "own_data"):
        raise InputError(
            f"--data {path}: data of class {class_path} cannot be found by --data: set "
            f"--data.source"
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
    lines = [found.told]
    final = resolve({**values, "run_dir": "runs"})[0]
    if "num_classes" in names:
        _check_labels(final, found.told)
    if names:
        told = [_told(name, place, value, final) for name, (place, value) in names.items()]
        lines.append(f"set: {', '.join(told)}")
    if found.facts.get("num_classes") == 1 and "num_classes" in names:
        raise InputError(
            f"{found.told}. A classifier needs at least two classes: if their folders are one "
            f"level down, give that folder"
        )
    return OnOwnData(values, lines)


def _check_labels(final: dict[str, Any], told: str) -> None:
    """Refuse data of one label per sample for a model of several, and the other way around."""
    source = final["data"]["init_args"]["source"].get("init_args") or {}
    theirs = bool(source.get("multi_label", False))
    ours = bool((final["model"].get("init_args") or {}).get("multi_label", False))
    if theirs != ours:
        raise InputError(
            f"{told}. The data have multi_label={theirs}, but the recipe's model has {ours}: a CSV "
            f"file may give several labels per sample (--data.source.multi_label true), a folder "
            f"gives one (--model.multi_label false, and another metric to monitor)"
        )


def _places(values: dict[str, Any], name: str) -> Iterator[Place]:
    """Where a recipe's model and data say what `name` is, in their own words."""
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
    """Set a value, or the one that stands elsewhere if there is a reference to it in its place.

    Returns:
        Where it was set.
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


def _told(name: str, place: Place, value: Any, final: dict[str, Any]) -> str:
    """A setting and its value; also what the data have, where the command line says otherwise."""
    now: Any = final
    for part in place:
        now = now.get(part) if isinstance(now, dict) else now[part]
    key = ".".join(str(part) for part in place if part != "init_args")
    if now != value:
        return f"{key} {now} (as given; the data have {value})"
    return f"{name} {value} ({key})" if place[-1] != name else f"{key} {value}"
