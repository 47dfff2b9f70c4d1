"""The task of a trained model as plain data, saved with its weights."""

from dataclasses import dataclass
from typing import Any

from diffmm.checks import did_you_mean

READER_KEYS = ("class_path", "init_args")


@dataclass(frozen=True)
class Job:
    """How a model's inputs are prepared and what its outputs mean.

    Attributes:
        reader: The class that turns files into inputs, as
            `{"class_path": ..., "init_args": {...}}` in plain values; a class of `datamodules`
            (see `diffmm.hub.readers`).
        class_names: The names of the model's outputs, in order.
        multi_label: Whether an input may have any number of classes. Each class then has an
            independent score, and the scores do not sum to 1.
        recipe: The name of the recipe that trained the model.

    Raises:
        ValueError: If a field has the wrong type; the message names the field and the value.

    >>> Job(class_names=("cat", "dog"), recipe="image/pets").plain()["class_names"]
    ['cat', 'dog']
    """

    reader: dict[str, Any] | None = None
    class_names: tuple[str, ...] | None = None
    multi_label: bool = False
    recipe: str | None = None

    def __post_init__(self) -> None:
        if self.reader is not None and (
            not isinstance(self.reader, dict)
            or set(self.reader) != set(READER_KEYS)
            or not isinstance(self.reader["class_path"], str)
            or not isinstance(self.reader["init_args"], dict)
        ):
            raise ValueError(
                f"reader must have a class_path and init_args, got {self.reader!r:.200}"
            )
        if self.class_names is not None:
            names = self.class_names
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"class_names must be a list of strings, got {names!r:.200}")
            object.__setattr__(self, "class_names", tuple(names))
        if not isinstance(self.multi_label, bool):
            raise ValueError(f"multi_label must be true or false, got {self.multi_label!r}")
        if self.recipe is not None and not isinstance(self.recipe, str):
            raise ValueError(f"recipe must be a string, got {self.recipe!r}")

    @classmethod
    def of(cls, values: Any) -> "Job":
        """Create a job from the values that `plain` returned.

        Raises:
            ValueError: If the values are not those of a job; the message names them.
        """
        if not isinstance(values, dict):
            raise ValueError(f"a job needs its fields by name, got {values!r:.200}")
        fields = cls.__dataclass_fields__
        for name in values:
            if name not in fields:
                raise ValueError(f"a job has no field {name!r}{did_you_mean(name, fields)}")
        return cls(**values)

    def plain(self) -> dict[str, Any]:
        """Convert the job to dicts, lists, strings and booleans."""
        names = None if self.class_names is None else list(self.class_names)
        return {
            "reader": self.reader,
            "class_names": names,
            "multi_label": self.multi_label,
            "recipe": self.recipe,
        }

    def check_fit(self, model: Any) -> None:
        """Check that the number of class names matches the model.

        Raises:
            ValueError: If it does not; the message gives both numbers.
        """
        num_classes = getattr(model, "num_classes", None)
        if self.class_names is None or num_classes in (None, len(self.class_names)):
            return
        raise ValueError(
            f"the model has {num_classes} classes, but its job names {len(self.class_names)}: set "
            f"model.job to one with the right class_names (dataclasses.replace), or to None"
        )


def text_reader(tokenizer: str) -> dict[str, Any]:
    """The reader of a text model whose tokenizer is given by its name."""
    return {"class_path": "datamodules.text.TextReader", "init_args": {"tokenizer": tokenizer}}
