"""A search for all mistakes in a recipe.

The values of a recipe are checked against the signatures of the classes that it names. Valid nodes
are created (models on the meta device), so that errors raised by the classes are found as well.
"""

import dataclasses
import importlib
import inspect
import re
import types
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from diffmm.checks import article, did_you_mean
from diffmm.recipes.agreement import disagreements
from diffmm.recipes.errors import message_of
from diffmm.recipes.imports import import_modules
from diffmm.recipes.numbers import wrong_numbers
from diffmm.recipes.references import UNKNOWN, resolve, unused_variables
from diffmm.recipes.settings import CLASS_KEYS
from diffmm.recipes.trust import PLAIN, is_code, why_untrusted


class Parameter(NamedTuple):
    """A parameter of a class: its type, and whether it has no default."""

    hint: Any
    required: bool


class Findings(NamedTuple):
    """What was found in a recipe's values."""

    mistakes: list[str]
    model: LightningModule | None
    """The model on the meta device; `None` if it could not be created."""
    data: LightningDataModule | None


def find_mistakes(values: dict[str, Any], *, trust: bool = True) -> Findings:
    """Find all mistakes in the values of a recipe (see `diffmm.recipes.settings.load`).

    Args:
        values: Values of the recipe.
        trust: Whether to import and call classes and modules outside `diffmm.recipes.trust.KNOWN`;
            otherwise, naming one is a mistake.
    """
    resolved, mistakes = resolve(values)
    mistakes += import_modules(resolved, trust=trust)
    mistakes += unused_variables(values)
    wrong, resolved = wrong_numbers(values, resolved)
    mistakes += wrong
    finder = _Finder(mistakes, trust=trust)
    finder.check_keys(resolved, TOP, "")
    finder.check(resolved.get("seed_everything", True), bool | int, "seed_everything")
    finder.check(resolved.get("vars", {}), dict, "vars")
    finder.arguments(resolved.get("trainer") or {}, Trainer, "trainer")
    model = finder.check(resolved.get("model", {}), LightningModule, "model")
    data = finder.check(resolved.get("data", {}), LightningDataModule, "data")
    is_whole = isinstance(model, LightningModule) and isinstance(data, LightningDataModule)
    # A misspelled key leaves a default in place, which may cause unrelated disagreements.
    if is_whole and not finder.has_unknown_keys:
        trainer = resolved.get("trainer")
        mistakes += disagreements(model, data, trainer if isinstance(trainer, dict) else {})
    return Findings(
        list(dict.fromkeys(mistakes)),
        model if isinstance(model, LightningModule) else None,
        data if isinstance(data, LightningDataModule) else None,
    )


def make_data(values: dict[str, Any], *, trust: bool = True) -> LightningDataModule:
    """Create only the data of a recipe without mistakes."""
    finder = _Finder([], trust=trust, device="cpu")
    data = finder.check(resolve(values)[0].get("data", {}), LightningDataModule, "data")
    assert isinstance(data, LightningDataModule), finder.mistakes
    return data


class _Finder:
    """Checks values against types, creates their objects and collects mistakes."""

    def __init__(self, mistakes: list[str], *, trust: bool, device: str = "meta") -> None:
        self.mistakes = mistakes
        self.trust = trust
        self.device = device
        self.has_unknown_keys = False
        self.replaced: set[str] = set()
        """Fields of configurations whose values were replaced to find further mistakes."""

    def check(self, value: Any, hint: Any, path: str) -> Any:
        """Convert `value` to the type `hint`; return `UNKNOWN` after a mistake."""
        if value is UNKNOWN:
            return UNKNOWN
        options = _options(hint)
        classes = [option for option in options if inspect.isclass(option)]
        configs = [option for option in classes if dataclasses.is_dataclass(option)]
        if isinstance(value, str) and any(map(is_code, options)) and self.is_untrusted(value, path):
            return UNKNOWN
        if isinstance(value, dict) and "class_path" in value:
            return self.instance(value, [c for c in classes if c not in PLAIN], path)
        if isinstance(value, dict) and configs and dict not in classes:
            return self.config(value, _nearest_config(value, configs), path)
        if isinstance(value, list):
            items = [item for option in options for item in _item_hints(option)]
            if items and _holds_nodes(value):
                hint = Union[tuple(items)]  # noqa: UP007
                return _whole([self.check(v, hint, f"{path}.{i}") for i, v in enumerate(value)])
        if isinstance(value, dict) and not value and _is_module(classes):
            self.mistakes.append(f"{path} is missing: it needs a class_path and init_args")
            return UNKNOWN
        if isinstance(value, dict) and any(issubclass(c, torch.nn.Module) for c in classes):
            self.mistakes.append(f"{path}.class_path is missing: it names the class to create")
            return UNKNOWN
        if _has_unknown(value):
            return UNKNOWN
        return self.leaf(value, hint, path)

    def leaf(self, value: Any, hint: Any, path: str) -> Any:
        """Convert a plain value in the same way as the recipe's parser."""
        for option in _options(hint):
            if get_origin(option) is Literal and len(_options(hint)) == 1:
                choices = get_args(option)
                if value not in choices:
                    listed = ", ".join(map(repr, choices))
                    self.mistakes.append(
                        f"{path} must be one of {listed}, got {value!r}"
                        f"{did_you_mean(value, choices)}"
                    )
                    return UNKNOWN
        parser = ArgumentParser(exit_on_error=False)
        try:
            parser.add_argument("--value", type=hint)
        except ValueError:
            # The parser does not check values of this type in a recipe either.
            return value
        try:
            return parser.parse_object({"value": value}).value
        except ArgumentError:
            self.mistakes.append(f"{path} must be {_name(hint)}, got {value!r}")
            return UNKNOWN

    def instance(self, node: dict[str, Any], bases: list[type], path: str) -> Any:
        """Create the object that a node with a `class_path` specifies."""
        self.check_keys(node, CLASS_KEYS, path)
        class_path = node["class_path"]
        if class_path is UNKNOWN or self.is_untrusted(class_path, f"{path}.class_path"):
            return UNKNOWN
        try:
            cls = import_class(class_path)
        except ImportError as error:
            self.mistakes.append(f"{path}.class_path: {error}")
            return UNKNOWN
        if cls is None:
            return UNKNOWN
        if not inspect.isclass(cls) or (bases and not issubclass(cls, tuple(bases))):
            expected = " or ".join(base.__name__ for base in bases) or "class"
            self.mistakes.append(
                f"{path}.class_path must name {article(expected)}, got {class_path!r}"
            )
            return UNKNOWN
        arguments = self.arguments(node.get("init_args") or {}, cls, f"{path}.init_args")
        # Parts of the trainer (loggers, strategies) may have side effects when they are created.
        if arguments is UNKNOWN or path.startswith("trainer"):
            return UNKNOWN
        return self.build(cls, {**arguments, **(node.get("dict_kwargs") or {})}, path)

    def is_untrusted(self, class_path: Any, path: str) -> bool:
        """Whether a class path must not be imported, which is reported as a mistake."""
        why = None if self.trust else why_untrusted(class_path)
        if why is not None:
            self.mistakes.append(f"{path}: {why}")
        return why is not None

    def config(self, node: dict[str, Any], cls: type, path: str) -> Any:
        """Create a configuration (a dataclass), which checks its own values.

        After a mistake, the values at fault are replaced by valid ones in order to find the other
        mistakes; the result is then only a stand-in.
        """
        arguments = self.arguments(node, cls, path, repair=True)
        while arguments is not UNKNOWN:
            try:
                return cls(**arguments)
            except ValueError as error:
                message = message_of(error)
            except Exception:
                return self.build(cls, arguments, path)
            # A replaced value may itself cause an error, which is none of the recipe's.
            if not _named(message, self.replaced):
                self.mistakes.append(f"{path}: {message}")
            arguments = self.repaired(cls, arguments, message)
        return UNKNOWN

    def repaired(self, cls: type, arguments: dict[str, Any], message: str) -> Any:
        """Replace a field that an error names so that the error no longer occurs: by its default
        or, for a required integer, by one with which the configuration is valid. Return `UNKNOWN`
        if there is none."""
        named = _named(message, arguments)
        for name in named:
            rest = {key: value for key, value in arguments.items() if key != name}
            try:
                cls(**rest)
            except TypeError:
                continue  # the field is required
            except ValueError as error:
                if _named(str(error), [name, *self.replaced]):
                    continue
            self.replaced.add(name)
            return rest
        for name in named:
            for value in STAND_INS if type(arguments[name]) is int else ():
                with suppress(TypeError, ValueError):
                    cls(**{**arguments, name: value})
                    self.replaced.add(name)
                    return {**arguments, name: value}
        return UNKNOWN

    def arguments(self, values: Any, cls: Any, path: str, *, repair: bool = False) -> Any:
        """Check the arguments of a class; return `UNKNOWN` after a mistake in any of them, or with
        `repair` leave out those at fault that have defaults."""
        if not isinstance(values, dict):
            self.mistakes.append(f"{path} must hold keys and values, got {values!r}")
            return UNKNOWN
        parameters = _parameters(cls)
        # The other keys are checked even if some are unknown.
        self.check_keys(values, parameters, path)
        before = len(self.mistakes)
        for name, parameter in parameters.items():
            if parameter.required and name not in values:
                self.mistakes.append(f"{path}.{name} is missing: {cls.__name__} needs it")
        checked = {
            name: self.check(value, parameters[name].hint, f"{path}.{name}")
            for name, value in values.items()
            if name in parameters
        }
        if repair:
            at_fault = {name for name, value in checked.items() if _has_unknown(value)}
            self.replaced |= at_fault
            needed = {name for name, parameter in parameters.items() if parameter.required}
            if needed - (checked.keys() - at_fault):
                return UNKNOWN
            return {name: value for name, value in checked.items() if name not in at_fault}
        return UNKNOWN if len(self.mistakes) > before else _whole(checked)

    def build(self, cls: type, arguments: dict[str, Any], path: str) -> Any:
        """Create an object of `cls`, usually on the meta device."""
        try:
            with torch.device(self.device):
                return cls(**arguments)
        except (ValueError, FileNotFoundError) as error:
            self.mistakes.append(f"{path}: {message_of(error)}")
        except Exception as error:
            # The class does not check these values itself.
            self.mistakes.append(
                f"{path}: {cls.__name__} cannot be created from these values "
                f"({type(error).__name__}: {message_of(error)})"
            )
        return UNKNOWN

    def check_keys(self, values: dict[str, Any], known: Iterable[str], path: str) -> None:
        """Report keys that are not in `known`, each with the nearest known one."""
        known = list(known)
        for key in values:
            if key not in known:
                place = f"{path}.{key}" if path else str(key)
                meant = SYNONYMS.get(str(key))
                hint = f"; did you mean {meant!r}?" if meant in known else did_you_mean(key, known)
                self.mistakes.append(f"unknown key {place}{hint}")
                self.has_unknown_keys = True


TOP = ("seed_everything", "imports", "vars", "run_dir", "trainer", "model", "data")
"""The keys of a recipe."""


SYNONYMS = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "warmup": "warmup_steps",
    "steps": "max_steps",
    "epochs": "max_epochs",
    "layers": "depth",
    "num_layers": "depth",
    "hidden_size": "dim",
    "embed_dim": "dim",
    "heads": "num_heads",
}
"""Names that other libraries use, with the ones used here."""

STAND_INS = (64, 3360)
"""Values that replace an invalid integer, the second one divisible by many numbers of heads."""


def _named(message: str, names: Iterable[str]) -> list[str]:
    """The names that occur in a message, in their order there."""
    places = {name: re.search(rf"\b{re.escape(name)}\b", message) for name in names}
    found = {name: place.start() for name, place in places.items() if place}
    return sorted(found, key=found.__getitem__)


def _options(hint: Any) -> list[Any]:
    """The members of a union; any other type alone."""
    if get_origin(hint) in (Union, types.UnionType):
        return [option for member in get_args(hint) for option in _options(member)]
    return [hint]


def _item_hints(hint: Any) -> tuple[Any, ...]:
    origin = get_origin(hint)
    is_sequence = inspect.isclass(origin) and issubclass(list, origin)
    return get_args(hint) if is_sequence else ()


def _holds_nodes(items: list[Any]) -> bool:
    return any(isinstance(item, dict) for item in items)


def _is_module(classes: list[type]) -> bool:
    return any(issubclass(c, LightningModule | LightningDataModule) for c in classes)


def _nearest_config(node: dict[str, Any], configs: list[type]) -> type:
    """The dataclass that shares the most keys with the node."""
    return max(configs, key=lambda c: len(set(node) & {f.name for f in dataclasses.fields(c)}))


def _whole(container: Any) -> Any:
    """The container, or `UNKNOWN` if any of its values is unknown."""
    return UNKNOWN if _has_unknown(container) else container


def _has_unknown(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_unknown, value.values()))
    if isinstance(value, list):
        return any(map(_has_unknown, value))
    return value is UNKNOWN


def _parameters(cls: Any) -> dict[str, Parameter]:
    """The arguments of a class with their types; `Any` for those that it passes to its parents."""
    function = cls.__init__ if inspect.isclass(cls) else cls
    try:
        hints = get_type_hints(function)
    except NameError:
        # The annotations use names that are imported for type checkers only.
        hints = {}
    signature = inspect.signature(function).parameters.values()
    found = {
        p.name: Parameter(hints.get(p.name, Any), p.default is p.empty)
        for p in signature
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"
    }
    if any(p.kind is p.VAR_KEYWORD for p in signature):
        # The recipe's parser resolves **kwargs from the source code.
        parser = ArgumentParser(exit_on_error=False)
        for name in parser.add_class_arguments(cls, fail_untyped=False, sub_configs=True):
            found.setdefault(name, Parameter(Any, required=False))
    return found


def import_class(class_path: Any) -> Any:
    """Import a class; return `None` for a short name, which only the recipe's parser resolves.

    Raises:
        ImportError: If the module or the class does not exist; the message gives the nearest name.
    """
    if not isinstance(class_path, str):
        raise ImportError(f"expected a class path, got {class_path!r}")
    module_name, _, name = class_path.rpartition(".")
    if not module_name:
        return None
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ImportError(f"there is no module {error.name!r} (for {class_path!r})") from error
    found = getattr(module, name, None)
    if found is None:
        public = [n for n in dir(module) if n[:1].isupper()]
        raise ImportError(f"{module_name} has no {name}{did_you_mean(name, public)}")
    return found


def _name(hint: Any) -> str:
    """A description of a type."""
    names = [
        "null"
        if option is type(None)
        else option.__name__
        if inspect.isclass(option) and get_origin(option) is None
        else " or ".join(map(repr, get_args(option)))
        if get_origin(option) is Literal
        else str(option).replace("typing.", "")
        for option in _options(hint)
    ]
    return " or ".join(names)
