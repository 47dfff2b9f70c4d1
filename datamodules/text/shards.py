"""The files of a streamed dataset, read one at a time.

`datasets` opens and parses them; which process reads which file, in which order, is decided here
and in `datamodules.text.stream`, so that a run can go on in the middle of one.
"""

from collections.abc import Iterator
from contextlib import suppress

from datamodules.shared.bad_samples import BadSampleError, Triage
from datamodules.text.datasets import HuggingFaceText, text_of


class Shards:
    """A streamed dataset as numbered files of rows of text.

    Args:
        source: the dataset.
        triage: what to do about a file at the beginning that cannot be opened.

    Raises:
        ValueError: if the library cannot open the dataset, or it has no such column.
    """

    def __init__(self, source: HuggingFaceText, triage: Triage) -> None:
        self.column = source.text_column
        self._tolerant = triage.tolerates
        self.names = source.files()
        files = self.names if source.data_files is not None else []
        # The library looks into the first file: where that is broken, begin with the next.
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
                    instead="the dataset begins with the next",
                )
            return False

    def __len__(self) -> int:
        return len(self.names)

    def texts(self, shard: int, row: int = 0) -> Iterator[str]:
        """The texts of a shard from row `row` on.

        Raises:
            BadSampleError: naming the shard, its file and the row, where it cannot be read on.
        """
        name = self.names[shard]
        if shard < self._first:
            raise BadSampleError(f"shard {shard} ({name}) cannot be opened", name)
        rows = self._rows.shard(self._rows.num_shards, shard - self._first)
        if row:
            rows = rows.skip(row)
        try:
            # `iter(rows)` would be shared among a loader's workers, but each has its own shards.
            for batch in rows.iter(batch_size=1):
                yield text_of(batch[self.column][0], self.column)
                row += 1
        except Exception as error:  # of many types: the parsers'
            if isinstance(error, OSError) and "://" in name:  # it may be the network
                raise
            if self._tolerant and name.endswith(".parquet"):
                for text in _readable(name, self.column, row):
                    yield text
                    row += 1
            raise BadSampleError(
                f"shard {shard} ({name}) cannot be read from row {row} on: "
                f"{type(error).__name__}: {error}",
                name,
            ) from error


def _readable(name: str, column: str, row: int) -> Iterator[str]:
    """The texts of a broken Parquet file from `row` on, up to the first that cannot be read.

    Arrow's threads tell of damage ahead, sooner or later as they happen to run. Read by one thread,
    a row at a time where need be, it always ends at the same row.
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
