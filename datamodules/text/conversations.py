"""The datamodule of conversations, for instruction tuning."""

import json
import logging
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from glob import glob
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.shared.bad_samples import BadSampleError, BadSamples
from datamodules.shared.examination import Examined
from datamodules.shared.fingerprints import Fingerprint, digest
from datamodules.shared.loading import SeededDataModule
from datamodules.shared.own_data import OwnData, absolute, looked_at_numbers, named_splits
from datamodules.shared.sampling import SeededDataset
from datamodules.text.chat import ChatTemplate, find_template
from datamodules.text.reader import TextReader, within
from datamodules.text.token_documents import in_split, key_number
from diffmm.batch import IGNORE_INDEX
from diffmm.checks import DataError
from diffmm.tokenizers import Tokenizer

_logger = logging.getLogger(__name__)

ENDINGS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""Extensions of files of conversations, and their formats in the datasets library."""


class Conversations:
    """Conversations in local files or, by the datasets library, on the Hugging Face hub: rows with
    a list of messages, `{"role": "user", "content": "..."}`.

    Args:
        name: Name of a dataset on the hub; or `json`, for files with a row per line or a list of
            rows; or `parquet`.
        config: Configuration of the dataset, if it has several.
        split: Split of the dataset, in the library's notation (`train`, `train[:1%]`).
        messages_column: Name of the column of messages.
        data_files: One local file, several files, or a pattern; required for `json` and `parquet`.

    Raises:
        ValueError: If `json` or `parquet` has no `data_files`.
    """

    def __init__(
        self,
        name: str = "json",
        config: str | None = None,
        split: str = "train",
        messages_column: str = "messages",
        data_files: str | list[str] | None = None,
    ) -> None:
        if name in ENDINGS.values() and not data_files:
            raise ValueError(f"name={name!r} needs data_files, the files to read")
        self.name = name
        self.config = config
        self.split = split
        self.messages_column = messages_column
        self.data_files = data_files

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"

    def load(self) -> list[tuple[str, Any]]:
        """Read all conversations, which are not checked yet.

        Returns:
            The place of each in its file or dataset, for messages, and its list of messages.

        Raises:
            FileNotFoundError: If a file does not exist.
            BadSampleError: If a file or the dataset cannot be read; the message names it.
            ValueError: If a row has no such column.
        """
        if self.name == "json":
            return [row for file in self._files() for row in self._rows(file)]
        import datasets

        where = f"dataset {self.name!r}" if self.data_files is None else str(self.data_files)
        try:
            rows = datasets.load_dataset(
                self.name, self.config, split=self.split, data_files=self.data_files
            )
        except Exception as error:  # of the hub, the network or a parser
            cause = error.__cause__ or error  # the library wraps errors of parsers
            raise BadSampleError(
                f"the datasets library cannot read {where}: {type(cause).__name__}: {cause}"
            ) from error
        if self.messages_column not in rows.column_names:
            raise ValueError(self._without_column(where, rows.column_names))
        column = rows[self.messages_column]
        return [
            (f"row {number} of {where}", _without_missing(row)) for number, row in enumerate(column)
        ]

    def _files(self) -> list[Path]:
        """The local files of rows in JSON."""
        given = [self.data_files] if isinstance(self.data_files, str) else self.data_files or []
        found = []
        for name in given:
            files = [Path(name)] if Path(name).is_file() else sorted(map(Path, glob(name)))
            if not files:
                raise FileNotFoundError(f"there is no file of conversations at {name}")
            found += files
        return found

    def _rows(self, file: Path) -> Iterator[tuple[str, Any]]:
        """The rows of a file: one per line, or a list of them."""
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSampleError(f"{file} is not UTF-8: {error}", file) from error
        if text.lstrip().startswith("["):
            rows = [(f"row {n} of {file}", row) for n, row in enumerate(_parsed(text, str(file)))]
        else:
            rows = [
                (f"line {number} of {file}", _parsed(line, f"line {number} of {file}"))
                for number, line in enumerate(text.splitlines(), 1)
                if line.strip()
            ]
        if not rows:
            raise BadSampleError(f"{file} is empty", file)
        for where, row in rows:
            if not isinstance(row, dict) or self.messages_column not in row:
                columns = list(row) if isinstance(row, dict) else [type(row).__name__]
                raise ValueError(self._without_column(where, columns))
            yield where, row[self.messages_column]

    def _without_column(self, where: str, columns: Sequence[str]) -> str:
        return (
            f"{where} has no column {self.messages_column!r}, its columns are "
            f"{', '.join(columns)}: set --data.source.messages_column"
        )


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadSampleError(f"{where} is not JSON: {error}") from error


def _without_missing(messages: Any) -> Any:
    """The library gives every message the keys of all of them."""
    if not isinstance(messages, list):
        return messages
    return [
        {key: value for key, value in message.items() if value is not None}
        if isinstance(message, dict)
        else message
        for message in messages
    ]


class Turn(NamedTuple):
    """A conversation as tokens, `[N]` each; see `datamodules.text.chat.EncodedChat`."""

    ids: np.ndarray[Any, Any]
    is_answer: np.ndarray[Any, Any]


class ConversationWindows(SeededDataset[dict[str, Tensor]]):
    """Whole conversations, several per sample.

    Args:
        conversations: The conversations, each with at least two tokens.
        sequence_length: Number of tokens per sample; longer conversations are cut at the end.
        tokenizer: Tokenizer of the tokens.
    """

    def __init__(
        self, conversations: Sequence[Turn], *, sequence_length: int, tokenizer: Tokenizer
    ) -> None:
        self.conversations = conversations
        self.sequence_length = sequence_length
        self.tokenizer = tokenizer
        lengths = [min(len(each.ids) - 1, sequence_length) for each in conversations]
        self.groups = packed(lengths, sequence_length)

    def __len__(self) -> int:
        return len(self.groups)

    def sample(self, epoch: int, index: int) -> dict[str, Tensor]:
        length, eos = self.sequence_length, self.tokenizer.eos_id
        tokens = np.full(length, eos, np.int64)
        targets = np.full(length, IGNORE_INDEX, np.int64)
        # The rest of a sample is a document of its own.
        documents = np.full(length, len(self.groups[index]), np.int64)
        start = 0
        for number, group in enumerate(self.groups[index]):
            ids, is_answer = self.conversations[group]
            stop = min(len(ids) - 1, length)
            place = slice(start, start + stop)
            tokens[place] = ids[:stop]
            targets[place] = np.where(is_answer[1 : stop + 1], ids[1 : stop + 1], IGNORE_INDEX)
            documents[place] = number
            start += stop
        num_bytes = self.tokenizer.byte_lengths[targets[targets != IGNORE_INDEX]].sum()
        return {
            "tokens": torch.from_numpy(tokens),
            "targets": torch.from_numpy(targets),
            "num_bytes": torch.tensor(num_bytes),
            "document_ids": torch.from_numpy(documents),
            "index": torch.tensor(index),
        }


def packed(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute items over groups of a capacity by best-fit decreasing: the longest item first,
    each into the fullest group that it fits into.

    Returns:
        The items of each group in ascending order; the groups in the order of their first items.
    """
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of every group: how much fits, and its number
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        place = bisect_left(room, (lengths[item], -1))
        if place == len(room):
            groups.append([])
            left, number = capacity, len(groups) - 1
        else:
            left, number = room.pop(place)
        groups[number].append(item)
        insort(room, (left - lengths[item], number))
    return sorted(map(sorted, groups))


class ConversationData(SeededDataModule):
    """Conversations as `TextBatch`es for instruction tuning: the targets are the answers alone, and
    several whole conversations share a sample, each a document of its own.

    Args:
        source: Source of the conversations.
        validation_source: A separate source of validation conversations.
        tokenizer: `bytes`, the path of a `tokenizer.json`, or a name on the Hugging Face hub.
        chat_template: Template of the messages (Jinja, as in Hugging Face's tokenizers): the
            template itself, the path of a file, or `default`, plain text for any tokenizer. By
            default that in the tokenizer's folder (`chat_template.jinja` or
            `tokenizer_config.json`).
        vocab_size: The model's vocabulary size; if given, the tokenizer must not exceed it.
        sequence_length: Number of tokens per sample. Longer conversations are cut at the end, and
            those without an answer before it are left out.
        validation_fraction: Fraction of the conversations for validation without a
            `validation_source`, in [0, 1); chosen by a hash of their text, the same in every run.
        batch_size: Number of samples per batch and process.
        num_workers: Number of data loader workers per process; 0 loads in the training process.
        seed: Seed of the order.
        bad_samples: How to handle conversations that do not fit the template; by default, raise an
            error.

    Raises:
        ValueError: If an argument is out of range; during setup, if there is no template, the
            tokenizer exceeds `vocab_size`, or a split has no answers.
    """

    objective = "causal"

    def __init__(
        self,
        source: Conversations,
        *,
        validation_source: Conversations | None = None,
        tokenizer: str = "bytes",
        chat_template: str | None = None,
        vocab_size: int | None = None,
        sequence_length: int = 512,
        validation_fraction: float = 0.05,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        bad_samples: BadSamples | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size, num_workers=num_workers, seed=seed, bad_samples=bad_samples
        )
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1, got {sequence_length}")
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1), got {validation_fraction}")
        self.source = source
        self.validation_source = validation_source
        self.tokenizer_name = tokenizer
        self.chat_template = chat_template
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.validation_fraction = validation_fraction
        self._turns: dict[str, list[Turn]] = {}

    @classmethod
    def own_data(cls, path: str, given: Mapping[str, Any], *, inputs_may_change: bool) -> OwnData:
        """Settings for a file of conversations, or a folder of `train` and `val` files.

        Args:
            path: Path of the file or folder.
            given: Arguments of the recipe for this class.
            inputs_may_change: Has no effect; the recipe's tokenizer is used.

        Raises:
            FileNotFoundError: If the path does not exist.
            ValueError: If it has no conversations.
        """
        whole = absolute(path)
        files = [whole] if whole.is_file() else sorted(whole.iterdir())
        files = [file for file in files if file.suffix.lower() in ENDINGS]
        splits = named_splits(path, files) if whole.is_dir() else {}
        if not files or (whole.is_dir() and "train" not in splits):
            raise ValueError(
                f"--data {path} must be a file of conversations ({', '.join(ENDINGS)}), or a "
                f"folder with such a file called train and perhaps one called val"
            )
        settings: dict[str, Any] = {"source": _node(splits.get("train", str(files[0])))}
        if "val" in splits:
            settings["validation_source"] = _node(splits["val"])
        count = sum(file.stat().st_size for file in files)
        return OwnData(settings, {}, f"{path} has {len(splits) or 1} file(s), {count:,} bytes")

    @cached_property
    def template(self) -> ChatTemplate:
        """The template of the messages."""
        text = find_template(self.chat_template, self.tokenizer_name)
        return ChatTemplate(text, self.tokenizer)  # which must not exceed the vocabulary

    @cached_property
    def evaluation_reader(self) -> TextReader:
        return TextReader(
            tokenizer=self.tokenizer_name,
            chat_template=find_template(self.chat_template, self.tokenizer_name),
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the text."""
        return within(self.evaluation_reader.encoder, self.vocab_size)

    def setup(self, stage: str | None = None) -> None:
        """Read and encode the conversations."""
        if self._turns:
            return
        triage = self.triage()
        keys, turns = self._encoded(self.source, triage)
        if self.validation_source is None:
            is_val = in_split(np.array(keys, np.uint64), 0.0, self.validation_fraction)
            val = [turn for turn, held_out in zip(turns, is_val, strict=True) if held_out]
            turns = [turn for turn, held_out in zip(turns, is_val, strict=True) if not held_out]
        else:
            val = self._encoded(self.validation_source, triage)[1]
        holds_out = self.validation_fraction > 0 or self.validation_source is not None
        for name, found in (("training", turns), ("validation", val)):
            if not found and (name == "training" or holds_out):
                raise ValueError(
                    f"the {name} split has no conversation with an answer in its first "
                    f"{self.sequence_length} tokens: use more conversations, a longer "
                    f"sequence_length, or another validation_fraction or validation_source"
                )
        self._turns = {"training": turns, "validation": val}

    def _encoded(self, source: Conversations, triage: Any) -> tuple[list[int], list[Turn]]:
        """The conversations of a source that have an answer, with the hashes of their text."""
        keys, turns = [], []
        num_cut = num_empty = 0
        conversations = source.load()
        for where, messages in conversations:
            triage.num_read += 1
            try:
                ids, is_answer = self.template.encode(messages)
            except DataError as error:
                bad = BadSampleError(f"the conversation in {where} {error}")
                triage.note(bad, instead="skipping it")
                continue
            stop = self.sequence_length + 1
            num_cut += len(ids) > stop
            if not any(is_answer[1:stop]):
                num_empty += 1
                continue
            keys.append(key_number(json.dumps(messages, sort_keys=True)))
            turns.append(Turn(np.array(ids[:stop], np.int64), np.array(is_answer[:stop])))
        if num_cut or num_empty:
            _logger.warning(
                "of %d conversations, %d are longer than sequence_length=%d and are cut, and %d "
                "are left out, because they have no answer in the rest",
                len(conversations),
                num_cut,
                self.sequence_length,
                num_empty,
            )
        return keys, turns

    def windows(self, split: str) -> ConversationWindows:
        """The samples of a split, `"training"` or `"validation"`; available after `setup`."""
        return ConversationWindows(
            self._turns[split], sequence_length=self.sequence_length, tokenizer=self.tokenizer
        )

    def fingerprint(self) -> Fingerprint:
        turns = self._turns["training"]
        ends = list(accumulate(len(turn.ids) for turn in turns))
        return {
            "tokenizer": self.tokenizer.fingerprint,
            "chat template": digest([self.template.text]),
            "sequence_length": self.sequence_length,
            "conversations": len(turns),
            "contents of conversations": digest(
                [*(turn.ids.tobytes() for turn in turns), str(ends)]
            ),
        }

    def examine(self, limit: int) -> Examined:
        """Count the conversations and samples of each split, and read `limit` samples per split.

        Raises:
            FileNotFoundError, ValueError: As `setup`.
        """
        self.setup()
        lines = {}
        for split, turns in self._turns.items():
            if not turns:
                continue
            windows = self.windows(split)
            for index in looked_at_numbers(len(windows), limit):
                windows.sample(0, index)
            total = sum(len(turn.ids) for turn in turns)
            answers = sum(int(turn.is_answer.sum()) for turn in turns)
            lines[split] = (
                f"{len(turns):,} conversations, {total:,} tokens, {answers:,} of them in answers, "
                f"{len(windows):,} samples of {self.sequence_length} tokens"
            )
        return Examined(lines, [], [])

    def train_dataloader(self) -> DataLoader[Any]:
        """Samples of the training conversations, shuffled."""
        return self.training_loader(self.windows("training"))

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Samples of the validation conversations in order; no loader if there are none."""
        if not self._turns["validation"]:
            return []
        return self.evaluation_loader(self.windows("validation"))

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The validation samples."""
        return self.val_dataloader()


def _node(file: str) -> dict[str, Any]:
    name = ENDINGS[Path(file).suffix.lower()]
    arguments = {"name": name, "data_files": [file]}
    return {"class_path": "datamodules.text.Conversations", "init_args": arguments}
