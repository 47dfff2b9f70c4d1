"""How one input becomes what a model sees in evaluation: a file, or the same in memory.

A reader is plain data: a datamodule's evaluation goes through it, a checkpoint carries its
arguments, and prediction makes it again from them. So the two are the same code.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

from datamodules.shared.files import walk_files


class Reader(ABC):
    """The evaluation preprocessing of one modality; a dataclass of plain values.

    Attributes:
        class_path: where the class is found, as a checkpoint names it.
        extensions: of the files that are looked for in a folder, in lower case. A file that is
            given by itself may have any name.
        kind: what an input is called in messages: `"image"`.
    """

    class_path: ClassVar[str]
    extensions: ClassVar[tuple[str, ...]]
    kind: ClassVar[str]

    @abstractmethod
    def read(self, item: Any) -> dict[str, Any]:
        """One input as the model sees it: a path, or what the subclass says besides.

        Raises:
            BadSampleError: naming the file, if it cannot be read.
            ValueError: for something in memory that is no such input.
        """

    @abstractmethod
    def collate(self, samples: list[dict[str, Any]]) -> Any:
        """The batch of some inputs, without labels and without an index."""

    def files(self, folder: str | Path) -> Iterator[Path]:
        """The files of `extensions` below a folder, found as they are asked for (see
        `walk_files`)."""
        return walk_files(folder, self.extensions)

    def describe(self) -> dict[str, Any]:
        """The class path and the arguments that make this reader again, as plain values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
        return {"class_path": self.class_path, "init_args": plain}
