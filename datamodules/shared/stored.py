"""Files inside other files, such as the members of archives."""

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO


class StoredFile(ABC):
    """A file inside another one, with those methods of `pathlib.Path` that reading needs.

    Its path (`os.fspath`) names it in messages, lists of bad samples and fingerprints; nothing is
    there on disk.
    """

    @abstractmethod
    def __fspath__(self) -> str: ...

    def __str__(self) -> str:
        return os.fspath(self)

    @property
    @abstractmethod
    def container(self) -> Path | None:
        """The file on disk, if there is one."""

    @abstractmethod
    def open(self, mode: str = "rb") -> BinaryIO:
        """Open the content for reading; `mode` must be `"rb"`."""


AnyFile = Path | StoredFile


@dataclass(frozen=True)
class Member(StoredFile):
    """A member of an uncompressed archive.

    Attributes:
        archive: The archive.
        member: The name of the member.
        offset: The position of its content, in bytes.
        size: The length of its content, in bytes.
    """

    archive: Path
    member: str
    offset: int
    size: int

    def __fspath__(self) -> str:
        return os.path.join(self.archive, self.member)

    @property
    def container(self) -> Path:
        return self.archive

    def open(self, mode: str = "rb") -> BinaryIO:
        assert mode == "rb"
        return BytesIO(self.read())

    def read(self) -> bytes:
        """Read the content."""
        with self.archive.open("rb", buffering=0) as file:
            file.seek(self.offset)
            return file.read(self.size)
