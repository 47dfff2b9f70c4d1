"""The datamodule of text for language models."""

from collections.abc import Mapping
from functools import cached_property, partial
from itertools import islice
from typing import Any, Literal

from torch.utils.data import DataLoader

from datamodules.shared.bad_samples import BadSamples
from datamodules.shared.examination import Examined
from datamodules.shared.fingerprints import Fingerprint, of_files
from datamodules.shared.loading import SeededDataModule
from datamodules.shared.own_data import OwnData, looked_at_numbers
from datamodules.shared.reader import Reader
from datamodules.text.datasets import HuggingFaceText, streams
from datamodules.text.own_data import made_of, own_texts
from datamodules.text.reader import TextReader, within
from datamodules.text.shards import Shards
from datamodules.text.sources import (
    Corpus,
    StandardLibrary,
    TextFolder,
    TextSource,
    TokenFiles,
)
from datamodules.text.stream import StreamShare
from datamodules.text.stream_loader import (
    StreamedWindows,
    StreamLoader,
    StreamState,
    check_horizon,
    check_turns,
    collate_windows,
    collate_with_places,
    continued,
)
from datamodules.text.token_documents import TokenDocuments
from datamodules.text.token_files import read_token_files, write_token_file
from datamodules.text.windows import Objective, Packing, TextWindows, WindowTask
from diffmm.checks import check_choice, counted
from diffmm.tokenizers import Tokenizer

__all__ = [
    "HuggingFaceText",
    "StandardLibrary",
    "TextData",
    "TextFolder",
    "TokenFiles",
    "write_token_file",
]

Split = Literal["training", "validation", "test"]
_SPLITS_OF_STAGE: dict[str | None, tuple[Split, ...]] = {
    "fit": ("training", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("test",),
    None: ("training", "validation", "test"),
}


class TextData(SeededDataModule):
    """Windows of tokens of text documents, for causal or masked language models (`TextBatch`).

    Validation and test documents are held out from `source`. A split with a separate source uses
    all of it, and nothing is held out for that split.

    Args:
        source: Source of the training text; by default `StandardLibrary()`, which needs no
            network.
        validation_source: A separate source of validation text.
        test_source: A separate source of test text.
        tokenizer: `bytes`, the path of a `tokenizer.json`, or a name on the Hugging Face hub.
        vocab_size: The model's vocabulary size; if given, the tokenizer must not exceed it.
        sequence_length: Number of tokens per sample.
        packing: `packed` fills samples with one document after another; `padded` gives every
            document (or part of a longer one) a sample of its own, with `key_padding`.
        document_mask: Whether packed samples have `document_ids`, so that no token is predicted
            from another document.
        objective: `causal` predicts the next token; `masked` predicts masked tokens, as in BERT.
        mask_probability: Fraction of tokens to predict with the masked objective, in (0, 1).
        validation_fraction: Fraction of the documents for validation, in [0, 1); 0 means no
            validation split.
        test_fraction: Fraction of the documents for testing, in [0, 1); 0 means no test split.
        split_by: `key` splits documents by a hash of their keys (the name of a file or the text of
            a row), independent of seed, order and tokenizer. `position` is for one or few
            documents: it cuts the sequence of all tokens in three parts, for training, validation
            and test, and the fractions are fractions of tokens.
        batch_size: Number of samples per batch and process.
        num_workers: Number of data loader workers per process; 0 loads in the training process.
        seed: Seed of the order and the masks.
        cache_dir: Folder for the tokenized source, which is then memory-mapped. Useful if the
            source is slow to tokenize or too large for memory; by default it is held in memory.
        stream_shares: Number of shares into which a streamed source is divided. In training the
            default is one per worker of all processes. A run can resume with any number of
            processes and workers whose product divides the number of shares, and has the same
            batches. Each share holds `shuffle_buffer` rows in memory. In evaluation, where each
            share is packed separately, the default is one per file, so that the result does not
            depend on the number of processes.
        bad_samples: How to handle files that are not text: by default, raise an error; otherwise
            skip the file or, in a stream, the rest of it.

    Raises:
        ValueError: If an argument is out of range; during setup, if the tokenizer exceeds
            `vocab_size` or lacks a special token, a split has no documents, or a stream would
            never end.
    """

    def __init__(
        self,
        source: Corpus | None = None,
        *,
        validation_source: Corpus | None = None,
        test_source: Corpus | None = None,
        tokenizer: str = "bytes",
        vocab_size: int | None = None,
        sequence_length: int = 512,
        packing: Packing = "packed",
        document_mask: bool = True,
        objective: Objective = "causal",
        mask_probability: float = 0.15,
        validation_fraction: float = 0.05,
        test_fraction: float = 0.05,
        split_by: Literal["key", "position"] = "key",
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
        stream_shares: int | None = None,
        bad_samples: BadSamples | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size, num_workers=num_workers, seed=seed, bad_samples=bad_samples
        )
        check_choice("packing", packing, ("packed", "padded"))
        check_choice("objective", objective, ("causal", "masked"))
        check_choice("split_by", split_by, ("key", "position"))
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1, got {sequence_length}")
        if stream_shares is not None and stream_shares < 1:
            raise ValueError(f"stream_shares must be at least 1, got {stream_shares}")
        if not 0 < mask_probability < 1:
            raise ValueError(f"mask_probability must be in (0, 1), got {mask_probability}")
        if min(validation_fraction, test_fraction) < 0 or validation_fraction + test_fraction >= 1:
            raise ValueError(
                f"validation_fraction and test_fraction must be at least 0 and their sum below 1, "
                f"got {validation_fraction} and {test_fraction}"
            )
        if split_by == "position" and source is not None and streams(source):
            raise ValueError(
                f"split_by position needs all tokens, but {source.place()} is streamed"
            )
        self.source: Corpus = source or StandardLibrary()
        self.own_sources = {"validation": validation_source, "test": test_source}
        self.tokenizer_name = tokenizer
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.packing: Packing = packing
        self.document_mask = document_mask
        self.objective: Objective = objective
        self.mask_probability = mask_probability
        self.validation_fraction = 0.0 if validation_source else validation_fraction
        self.test_fraction = 0.0 if test_source else test_fraction
        self.split_by = split_by
        self.cache_dir = cache_dir
        self.stream_shares = stream_shares
        self._documents: dict[Corpus, TokenDocuments] = {}
        self._opened: dict[Corpus, Shards] = {}
        self._stream: StreamLoader | None = None
        for corpus in (self.source, validation_source, test_source):
            if cache_dir is not None and corpus is not None and streams(corpus):
                raise ValueError(
                    f"cache_dir stores tokenized text, but {corpus.place()} is streamed: leave it "
                    f"out"
                )

    @classmethod
    def own_data(cls, path: str, given: Mapping[str, Any], *, inputs_may_change: bool) -> OwnData:
        """Settings for a folder or file of plain text, or of JSON, Parquet or CSV rows.

        Args:
            path: Path of the folder or file.
            given: Arguments of the recipe for this class.
            inputs_may_change: Has no effect; the recipe's tokenizer is used.

        Raises:
            FileNotFoundError: If the path does not exist.
            ValueError: If it has no text.
        """
        return own_texts(path, given, cls._num_training_samples)

    @classmethod
    def _num_training_samples(cls, arguments: Mapping[str, Any]) -> int:
        """The number of training samples with these arguments, in which sources are nodes of a
        recipe."""
        classes = {"TextFolder": TextFolder, "HuggingFaceText": HuggingFaceText}
        dataset = made_of(cls, arguments, classes)._dataset("training")
        assert isinstance(dataset, TextWindows)
        return len(dataset)

    @cached_property
    def evaluation_reader(self) -> TextReader:
        return TextReader(tokenizer=self.tokenizer_name)

    def read_with(self, reader: Reader) -> None:
        if type(reader) is not TextReader:
            super().read_with(reader)
            return
        # The vocabulary of these weights may be another than that of the recipe.
        self.evaluation_reader, self.vocab_size = reader, None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the text."""
        return within(self.evaluation_reader.encoder, self.vocab_size)

    @cached_property
    def _task(self) -> WindowTask:
        return WindowTask(
            self.tokenizer,
            sequence_length=self.sequence_length,
            objective=self.objective,
            packing=self.packing,
            document_mask=self.document_mask,
            mask_probability=self.mask_probability,
            seed=self.seed,
        )

    def prepare_data(self) -> None:
        """Tokenize the sources into `cache_dir`, in one process."""
        for corpus in (self.source, *self.own_sources.values()):
            if self.cache_dir is not None and isinstance(corpus, TextSource):
                corpus.triage = self.triage()
                corpus.token_file(self.cache_dir, self.tokenizer)

    def setup(self, stage: str | None = None) -> None:
        """Load and check the documents of the stage's splits."""
        for split in _SPLITS_OF_STAGE[stage]:
            self._dataset(split)

    def fingerprint(self) -> Fingerprint:
        corpus, low, high = self._share("training")
        settings = {
            "tokenizer": self.tokenizer.fingerprint,
            "sequence_length": self.sequence_length,
            "packing": self.packing,
            "document_mask": self.document_mask,
            "objective": self.objective,
            "mask_probability": self.mask_probability,
        }
        if isinstance(corpus, HuggingFaceText) and corpus.streaming:
            return {**settings, **of_files(self._shards(corpus).names)}
        return {**settings, **self._part(corpus, low, high).fingerprint()}

    def examine(self, limit: int) -> Examined:
        """Count the documents and windows of each split, and read `limit` windows per split.

        Raises:
            FileNotFoundError, ValueError: As `setup`.
        """
        lines = {}
        faults = []
        for split in ("training", "validation", "test"):
            corpus, low, high = self._share(split)
            dataset = self._dataset(split)
            if isinstance(dataset, TextWindows):
                documents = self._part(corpus, low, high)
                for index in looked_at_numbers(len(dataset), limit):
                    dataset.sample(0, index)
                lines[split] = (
                    f"{counted(len(documents), 'document')}, "
                    f"{counted(int(documents.lengths.sum()), 'token')}, "
                    f"{counted(len(dataset), 'window')}"
                )
                if split == "training":
                    faults += self.why_no_batch(len(dataset))
            elif dataset is not None:
                windows = list(islice(iter(dataset), limit))
                lines[split] = f"streamed: the first {len(windows)} windows can be read"
        return Examined(lines, faults, [])

    def train_dataloader(self) -> DataLoader[Any]:
        """Packed or padded windows of the training documents, shuffled."""
        if isinstance(self.source, HuggingFaceText) and self.source.streaming:
            check_horizon(self.trainer)
            self._stream = self._training_stream(self.source)
            return self._stream
        dataset = self._dataset("training")
        assert dataset is not None
        return self.training_loader(dataset, self._task.collate)

    def state_dict(self) -> dict[str, Any]:
        if self._stream is None:
            return super().state_dict()
        return {**self._stream.state_dict(), "data": self._fingerprint}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        # The trainer prefetches, but trains on every batch that it moves to its device.
        if self._stream is not None and self.trainer is not None and self.trainer.training:
            self._stream.take()
        return batch

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Windows of the validation documents in order; no loader without a validation split."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Windows of the test documents in order; no loader without a test split."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Windows of the test documents in order; no loader without a test split."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: Split) -> DataLoader[Any] | list[DataLoader[Any]]:
        dataset = self._dataset(split)
        if dataset is None:
            return []
        if isinstance(dataset, StreamedWindows):
            return self.evaluation_loader(dataset, partial(collate_windows, self._task.collate))
        return self.evaluation_loader(dataset, self._task.collate)

    def _dataset(self, split: Split) -> TextWindows | StreamedWindows | None:
        corpus, low, high = self._share(split)
        if low == high:
            return None
        if isinstance(corpus, HuggingFaceText) and corpus.streaming:
            return self._streamed(corpus, low, high)
        documents = self._load(corpus)
        windows = TextWindows(self._part(corpus, low, high), self._task)
        if not len(windows):
            by_key = self.split_by == "key"
            way_out = "split_by: position, " if by_key else ""
            count = documents.in_words(with_keys=by_key)
            raise ValueError(
                f"the {split} split is empty: {corpus.place()} has {count}; "
                f"use more documents (a separator splits files into several), {way_out}"
                f"other fractions, or a validation_source and a test_source"
            )
        return windows

    def _part(self, corpus: Corpus, low: float, high: float) -> TokenDocuments:
        """The documents of a split, or the parts of documents in it."""
        documents = self._load(corpus)
        by_position = self.split_by == "position"
        return documents.stretch(low, high) if by_position else documents.held_out(low, high)

    def _streamed(
        self, source: HuggingFaceText, low: float, high: float, state: StreamState | None = None
    ) -> StreamedWindows:
        """Windows of a streamed source; endless if a `state` to start at is given."""
        trainer: Any = self.trainer
        if trainer is not None and trainer.overfit_batches and trainer.state.fn == "fit":
            raise ValueError(
                "overfit_batches repeats the first batches, which a stream cannot do: set "
                "--data.source.streaming false"
            )
        shards = self._shards(source)
        # Evaluation does not depend on the number of processes and workers.
        num_shares = state["num_shares"] if state else self.stream_shares or len(shards)
        triage = self.triage()
        if state is not None:
            triage.quarantined = frozenset(state["quarantined"])
        shares = partial(
            StreamShare,
            shards,
            self._task,
            low=low,
            high=high,
            shuffle_buffer=None if state is None else source.shuffle_buffer,
            triage=triage,
        )
        return StreamedWindows(
            shares,
            self._task,
            num_shares=num_shares,
            turn_size=state["turn_size"] if state else None,
            turns_a_batch=self.batch_size // state["turn_size"] if state else 1,
            rank=self.rank,
            world_size=self.world_size,
        )

    def _shards(self, source: HuggingFaceText) -> Shards:
        if source not in self._opened:
            self._opened[source] = Shards(source, self.triage())
        return self._opened[source]

    def _training_stream(self, source: HuggingFaceText) -> StreamLoader:
        """The training stream, from its beginning or from the position of a checkpoint."""
        _, low, high = self._share("training")
        state = StreamState(
            turn=0,
            turn_size=self.batch_size,
            global_batch_size=self.batch_size * self.world_size,
            num_shares=self.stream_shares or self.world_size * max(1, self.num_workers),
            places={},
            stream={
                "source": repr(source),
                "tokenizer": self.tokenizer.fingerprint,
                "sequence_length": self.sequence_length,
                "packing": self.packing,
                "keys": [low, high],
                "seed": self.seed,
            },
            quarantined=sorted(self.triage().quarantined),
        )
        self._fingerprint = self.fingerprint()
        if self._restored:
            restored = dict(self._restored)
            self._check_data(restored.pop("data", {}))
            state = continued(state, restored, any_stream=self.allow_changed_data)
            self._check_batch_size(state["global_batch_size"])
            self._restored = None
        check_turns(
            state,
            batch_size=self.batch_size,
            world_size=self.world_size,
            num_workers=self.num_workers,
        )
        return StreamLoader(
            self._streamed(source, low, high, state),
            state,
            counts_itself=self.trainer is None,
            loading=self._loading(partial(collate_with_places, self._task.collate)),
        )

    def _share(self, split: Split) -> tuple[Corpus, float, float]:
        """The source of a split and the range of its keys or tokens, as fractions."""
        if own := self.own_sources.get(split):
            return own, 0.0, 1.0
        order: tuple[Split, ...] = ("validation", "test", "training")
        if self.split_by == "position":
            order = ("training", "validation", "test")
        sizes = {"validation": self.validation_fraction, "test": self.test_fraction}
        sizes["training"] = 1 - sum(sizes.values())
        before = sum(sizes[other] for other in order[: order.index(split)])
        return self.source, before, 1.0 if split == order[-1] else before + sizes[split]

    def _load(self, corpus: Corpus) -> TokenDocuments:
        if corpus not in self._documents:
            corpus.triage = self.triage()
            if self.cache_dir is not None and isinstance(corpus, TextSource):
                path = corpus.token_file(self.cache_dir, self.tokenizer)
                self._documents[corpus] = read_token_files([path], self.tokenizer)
            else:
                self._documents[corpus] = corpus.load(self.tokenizer)
        return self._documents[corpus]
