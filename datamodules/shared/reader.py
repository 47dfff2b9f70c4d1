"""Readers: the evaluation preprocessing of one input, from a file or from memory.

A reader is plain data. A datamodule evaluates with it, a checkpoint stores its arguments, and
prediction recreates it from them, so evaluation and prediction use the same code.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

from datamodules.shared.files import extension_of, skipped_in_words, walk_files


class Reader(ABC):
    """The evaluation preprocessing of one modality, a dataclass of plain values.

    Attributes:
        class_path: Import path of the class, as stored in a checkpoint.
        extensions: Extensions of the files to find in a folder, in lower case. A single file may
            have any name.
        kind: The name of an input in messages, such as `"image"`.
        data_class: Import path of the datamodule for labeled files that it can prepare
            (`LabelledData.prepared_by`); None if there is none.
    """

    class_path: ClassVar[str]
    extensions: ClassVar[tuple[str, ...]]
    kind: ClassVar[str]
    data_class: ClassVar[str | None] = None

    @abstractmethod
    def read(self, item: Any) -> dict[str, Any]:
        """Read and preprocess one input: a path, or an in-memory type that the subclass documents.

        Raises:
            BadSampleError: If the file cannot be read; the message names it.
            ValueError: If an in-memory input has the wrong type or shape.
        """

    @abstractmethod
    def collate(self, samples: list[dict[str, Any]]) -> Any:
        """Collate inputs into a batch without labels and indices."""

    def files(self, folder: str | Path) -> Iterator[Path]:
        """Iterate lazily over the files in a folder that have one of `extensions` (see
        `walk_files`)."""
        return walk_files(folder, self.extensions)

    def skipped(self, folder: str | Path) -> str | None:
        """The number and the extensions of the files in a folder that `files` leaves out, in words;
        `None` if there are none."""
        others = Counter(
            extension_of(file)
            for file in walk_files(folder, ("",))
            if not file.name.lower().endswith(self.extensions)
        )
        return skipped_in_words(others) if others else None

    def describe(self) -> dict[str, Any]:
        """The class path and the arguments that recreate this reader, as plain values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
        return {"class_path": self.class_path, "init_args": plain}
