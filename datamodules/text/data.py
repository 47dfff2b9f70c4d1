"""Text for language models."""

from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import DataLoader

from datamodules.shared.bad_samples import BadSamples
from datamodules.shared.examination import Examined
from datamodules.shared.fingerprints import Fingerprint, of_files
from datamodules.shared.loading import SeededDataModule
from datamodules.shared.own_data import OwnData, looked_at_numbers
from datamodules.text.datasets import HuggingFaceText
from datamodules.text.own_data import own_texts
from datamodules.text.reader import TextReader
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
    check_turns,
    collate_windows,
    collate_with_places,
    continued,
)
from datamodules.text.token_documents import TokenDocuments
from datamodules.text.token_files import is_finished, read_token_files, write_token_file
from datamodules.text.windows import Objective, Packing, TextWindows, WindowTask
from diffmm.checks import check_choice
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
    """Documents as windows of tokens, for causal or masked language models (`TextBatch`).

    Validation and test documents are held out of `source`. A split that has its own source takes
    all of it, and nothing is held out for it.

    Args:
        source: what to train on; by default `StandardLibrary()`, which needs no network.
        validation_source, test_source: sources of their own for these splits.
        tokenizer: `bytes`, the path of a `tokenizer.json`, or a name on the Hugging Face hub.
        vocab_size: the model's, if the tokenizer is to be checked against it.
        sequence_length: tokens a sample.
        packing: `packed` fills samples with one document after another; `padded` gives every
            document (or part of one, where it is longer) a sample of its own, with `key_padding`.
        document_mask: in packed samples, give `document_ids` and predict no token from another
            document's.
        objective: `causal` (the next token) or `masked` (BERT's).
        mask_probability: the share of tokens to predict in masked training, in (0, 1).
        validation_fraction, test_fraction: of the documents, in [0, 1); 0 makes no such split.
        split_by: `key` holds documents out by their keys (a file's name, a row's text): the same
            ones for every seed, order and tokenizer. `position` is for a single document, or few:
            all tokens in order are cut in three, for training, validation and test, and so is a
            document that lies across; the fractions are of tokens.
        batch_size: samples a batch of one process.
        num_workers: processes that load beside the training one.
        seed: of the order and the masks.
        cache_dir: keep the tokenized source in a file there and map it, for one that is slow to
            tokenize or too large for memory; by default it is held in memory.
        stream_shares: into how many shares a streamed source is cut. In training by default one a
            worker of all processes; a run can go on with other numbers of processes and workers
            where their product divides it, and with the same number its batches are the same. A
            share holds `shuffle_buffer` rows in memory. In evaluation, which packs each share for
            itself, by default one a file: the result is the same for every number of processes.
        bad_samples: what to do about files that are not text: by default to stop, otherwise to
            leave out the file, or what follows in it where it is streamed.

    Raises:
        ValueError: for an argument out of its range; (when set up) for a tokenizer that is larger
            than `vocab_size` or lacks a special token, a split without a document, or a stream
            that would never end.
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
            raise ValueError(f"mask_probability must lie in (0, 1), got {mask_probability}")
        if min(validation_fraction, test_fraction) < 0 or validation_fraction + test_fraction >= 1:
            raise ValueError(
                f"validation_fraction and test_fraction must not be negative, nor add up to 1 or "
                f"more, got {validation_fraction} and {test_fraction}"
            )
        if split_by == "position" and _streams(source):
            raise ValueError(f"split_by position needs all tokens, but {source!r} is streamed")
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
            if cache_dir is not None and _streams(corpus):
                raise ValueError(f"cache_dir keeps tokenized text, but {corpus!r} is streamed")

    @classmethod
    def own_data(cls, path: str, given: Mapping[str, Any], *, inputs_may_change: bool) -> OwnData:
        """A folder of texts, or a file, as settings: plain text, or rows in JSON, Parquet or CSV.

        Args:
            path: of the folder or the file.
            given: the arguments that the recipe has for this class.
            inputs_may_change: changes nothing: the tokenizer stays that of the recipe.

        Raises:
            FileNotFoundError, ValueError: naming what is missing or wrong.
        """
        return own_texts(path, given)

    @cached_property
    def evaluation_reader(self) -> TextReader:
        return TextReader(tokenizer=self.tokenizer_name)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What the text is encoded with."""
        tokenizer = self.evaluation_reader.encoder
        if self.vocab_size is not None and tokenizer.vocab_size > self.vocab_size:
            raise ValueError(
                f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens, more than the "
                f"model's vocab_size of {self.vocab_size}"
            )
        return tokenizer

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
        """Tokenize into `cache_dir`, in one process."""
        for corpus in (self.source, *self.own_sources.values()):
            if self.cache_dir is not None and isinstance(corpus, TextSource):
                corpus.triage = self.triage()
                self._cached(corpus, self.cache_dir)

    def setup(self, stage: str | None = None) -> None:
        """Load the documents of the stage's splits, or refuse them."""
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
        """Count the documents and the windows of each split, and read `limit` windows of each.

        Raises:
            FileNotFoundError, ValueError: as when a run begins.
        """
        lines = {}
        for split in ("training", "validation", "test"):
            corpus, low, high = self._share(split)
            dataset = self._dataset(split)
            if isinstance(dataset, TextWindows):
                documents = self._part(corpus, low, high)
                for index in looked_at_numbers(len(dataset), limit):
                    dataset.sample(0, index)
                lines[split] = (
                    f"{len(documents):,} documents, {int(documents.lengths.sum()):,} tokens, "
                    f"{len(dataset):,} windows"
                )
            elif dataset is not None:
                windows = list(islice(iter(dataset), limit))
                lines[split] = f"streamed: the first {len(windows)} windows can be read"
        return Examined(lines, [], [])

    def train_dataloader(self) -> DataLoader[Any]:
        """Packed or padded windows of the training documents, shuffled."""
        if isinstance(self.source, HuggingFaceText) and self.source.streaming:
            self._check_horizon()
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
        # A trainer fetches ahead, but what it moves to its device it takes.
        if self._stream is not None and self.trainer is not None and self.trainer.training:
            self._stream.take()
        return batch

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Windows of the validation documents, in order; no loader where there is no such split."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Windows of the test documents, in order; no loader where there is no such split."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Windows of the test documents, in order; no loader where there is no such split."""
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
            way_out = "split_by: position, " if self.split_by == "key" else ""
            raise ValueError(
                f"{corpus!r} has {len(documents)} documents with text, none of which falls in the "
                f"{split} split: give more documents (a separator splits files into several), "
                f"{way_out}other fractions, or a validation_source and a test_source"
            )
        return windows

    def _part(self, corpus: Corpus, low: float, high: float) -> TokenDocuments:
        """The documents of a split, or what of them is in it."""
        documents = self._load(corpus)
        by_position = self.split_by == "position"
        return documents.stretch(low, high) if by_position else documents.held_out(low, high)

    def _streamed(
        self, source: HuggingFaceText, low: float, high: float, state: StreamState | None = None
    ) -> StreamedWindows:
        """Windows of a streamed source, endless with a `state` to begin at."""
        trainer: Any = self.trainer
        if trainer is not None and trainer.overfit_batches and trainer.state.fn == "fit":
            raise ValueError(
                f"overfit_batches learns the first batches by heart, and a stream does not come "
                f"back to them: {source!r} needs streaming=False for it"
            )
        shards = self._shards(source)
        # Evaluation does not depend on how many processes and workers share it.
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
        """The training stream, from its beginning or where a checkpoint left it."""
        _, low, high = self._share("training")
        state = StreamState(
            turn=0,
            turn_size=self.batch_size,
            global_batch_size=self.batch_size * self.world_size,
            num_shares=self.stream_shares or self._num_loaders,
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

    @property
    def _num_loaders(self) -> int:
        """How many processes load, of all processes that train."""
        return self.world_size * max(1, self.num_workers)

    def _share(self, split: Split) -> tuple[Corpus, float, float]:
        """A split's source, and which part of it: of its keys or its tokens, as fractions."""
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
                path = self._cached(corpus, self.cache_dir)
                self._documents[corpus] = read_token_files([path], self.tokenizer)
            else:
                self._documents[corpus] = corpus.load(self.tokenizer)
        return self._documents[corpus]

    def _cached(self, source: TextSource, cache_dir: str) -> Path:
        """The token file of a source, made now if it is not there."""
        name = f"{type(source).__name__}-{source.fingerprint()}-{self.tokenizer.fingerprint}.bin"
        path = Path(cache_dir, name)
        if not is_finished(path):
            with suppress(FileExistsError):  # another process may be faster
                write_token_file(path, source.documents(), self.tokenizer)
        return path

    def _check_horizon(self) -> None:
        """A stream is endless: a run on it needs to know when to stop, and when to validate."""
        if self.trainer is None:
            return
        if self.trainer.max_steps < 0 and self.trainer.limit_train_batches == 1.0:
            raise ValueError(
                "a streamed source has no end: set trainer.max_steps, or "
                "trainer.limit_train_batches for the length of an epoch"
            )


def _streams(corpus: Corpus | None) -> bool:
    return isinstance(corpus, HuggingFaceText) and corpus.streaming
