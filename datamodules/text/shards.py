"""The files (shards) of a streamed dataset, read one at a time.

The datasets library opens and parses them; this module and `datamodules.text.stream` decide which
process reads which file and in which order, so that a run can resume within a file.
"""

from collections.abc import Iterator
from contextlib import suppress

from datamodules.shared.bad_samples import BadSampleError, Triage
from datamodules.text.datasets import HuggingFaceText, text_of


class Shards:
    """A streamed dataset as a numbered list of files of text rows.

    Args:
        source: The dataset.
        triage: How to handle first files that cannot be opened.

    Raises:
        ValueError: If the library cannot open the dataset, or it has no such column.
    """

    def __init__(self, source: HuggingFaceText, triage: Triage) -> None:
        self.column = source.text_column
        self._tolerant = triage.tolerates
        self.names = source.files()
        files = self.names if source.data_files is not None else []
        # The library opens the first file; if that is damaged, start with the next one.
        self._first = 0
        while not self._opens(source, files, triage):
            self._first += 1
        if len(self.names) != self._first + self._rows.num_shards:
            self.names = [f"shard {n}" for n in range(self._first + self._rows.num_shards)]

    def _opens(self, source: HuggingFaceText, files: list[str], triage: Triage) -> bool:
        try:
            self._rows = source.open(files[self._first :] or source.data_files)
            return True
        except BadSampleError as error:
            if not triage.tolerates or self._first + 1 >= len(files):
                raise
            if not triage.is_quarantined(files[self._first]):
                triage.num_read += 1
                named = f"shard {self._first} ({files[self._first]}) cannot be opened: {error}"
                triage.note(
                    BadSampleError(named, files[self._first]),
                    instead="starting with the next one",
                )
            return False

    def __len__(self) -> int:
        return len(self.names)

    def texts(self, shard: int, row: int = 0) -> Iterator[str]:
        """The texts of a shard, starting at row `row`.

        Raises:
            BadSampleError: If a row cannot be read; the message names the shard, file and row.
        """
        name = self.names[shard]
        if shard < self._first:
            raise BadSampleError(f"shard {shard} ({name}) cannot be opened", name)
        rows = self._rows.shard(self._rows.num_shards, shard - self._first)
        if row:
            rows = rows.skip(row)
        try:
            # `iter(rows)` would split the rows among the loader's workers, but each worker has its
            # own shards.
            for batch in rows.iter(batch_size=1):
                yield text_of(batch[self.column][0], self.column)
                row += 1
        except Exception as error:  # of a parser
            if isinstance(error, OSError) and "://" in name:  # possibly a network error
                raise
            if self._tolerant and name.endswith(".parquet"):
                for text in _readable(name, self.column, row):
                    yield text
                    row += 1
            raise BadSampleError(
                f"shard {shard} ({name}) cannot be read from row {row} onward: "
                f"{type(error).__name__}: {error}",
                name,
            ) from error


def _readable(name: str, column: str, row: int) -> Iterator[str]:
    """The texts of a damaged Parquet file from `row` up to the first one that cannot be read.

    Arrow's threads read ahead, so the row at which they report damage varies. A single thread that
    reads row by row always stops at the same row.
    """
    import fsspec
    from pyarrow.parquet import ParquetFile

    with suppress(Exception), fsspec.open(name) as opened:
        file = ParquetFile(opened)
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            if row >= num_rows:
                row -= num_rows
                continue
            arguments = {"row_groups": [group], "columns": [column], "use_threads": False}
            for batch in file.iter_batches(batch_size=1, **arguments):
                if row == 0:
                    yield text_of(batch[column][0].as_py(), column)
                else:
                    row -= 1
