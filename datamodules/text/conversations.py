"""The datamodule of conversations, for instruction tuning."""

from collections.abc import Mapping
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from datamodules.shared.bad_samples import BadSamples
from datamodules.shared.examination import Examined
from datamodules.shared.fingerprints import Fingerprint, digest
from datamodules.shared.loading import SeededDataModule
from datamodules.shared.own_data import OwnData, looked_at_numbers
from datamodules.text.chat import ChatTemplate, find_template
from datamodules.text.conversation_source import Conversations
from datamodules.text.conversation_windows import (
    ConversationWindows,
    TokenizedConversation,
    tokenize,
)
from datamodules.text.own_data import made_of, own_conversations
from datamodules.text.reader import TextReader, within
from datamodules.text.token_documents import in_split
from diffmm.tokenizers import Tokenizer


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
        self._conversations: dict[str, list[TokenizedConversation]] = {}

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
        return own_conversations(path, given, cls._num_training_samples)

    @classmethod
    def _num_training_samples(cls, arguments: Mapping[str, Any]) -> int:
        """The number of training samples with these arguments, in which sources are nodes of a
        recipe."""
        data = made_of(cls, arguments, {"Conversations": Conversations})
        data.setup()
        return len(data.windows("training"))

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
        """Read and tokenize the conversations."""
        if self._conversations:
            return
        triage = self.triage()
        length = self.sequence_length
        train = tokenize(self.source.load(), self.template, length, triage)
        if self.validation_source is None:
            keys = np.array([each.key for each in train], np.uint64)
            is_val = in_split(keys, 0.0, self.validation_fraction)
            val = [each for each, held_out in zip(train, is_val, strict=True) if held_out]
            train = [each for each, held_out in zip(train, is_val, strict=True) if not held_out]
        else:
            val = tokenize(self.validation_source.load(), self.template, length, triage)
        holds_out = self.validation_fraction > 0 or self.validation_source is not None
        for name, found in (("training", train), ("validation", val)):
            if not found and (name == "training" or holds_out):
                raise ValueError(
                    f"the {name} split has no conversation with an answer in its first {length} "
                    f"tokens: use more conversations, a longer sequence_length, or another "
                    f"validation_fraction or validation_source"
                )
        self._conversations = {"training": train, "validation": val}

    @property
    def has_test_split(self) -> bool:
        return False

    def windows(self, split: str) -> ConversationWindows:
        """The samples of a split, `"training"` or `"validation"`; available after `setup`."""
        return ConversationWindows(
            self._conversations[split],
            sequence_length=self.sequence_length,
            tokenizer=self.tokenizer,
        )

    def fingerprint(self) -> Fingerprint:
        conversations = self._conversations["training"]
        ends = list(accumulate(len(each.ids) for each in conversations))
        return {
            "tokenizer": self.tokenizer.fingerprint,
            "chat template": digest([self.template.text]),
            "sequence_length": self.sequence_length,
            "conversations": len(conversations),
            "contents of conversations": digest(
                [*(each.ids.tobytes() for each in conversations), str(ends)]
            ),
        }

    def examine(self, limit: int) -> Examined:
        """Count the conversations and samples of each split, and read `limit` samples per split.

        Raises:
            FileNotFoundError, ValueError: As `setup`.
        """
        self.setup()
        lines = {}
        for split, conversations in self._conversations.items():
            if not conversations:
                continue
            windows = self.windows(split)
            for index in looked_at_numbers(len(windows), limit):
                windows.sample(0, index)
            total = sum(len(each.ids) for each in conversations)
            answers = sum(int(each.is_answer.sum()) for each in conversations)
            lines[split] = (
                f"{len(conversations):,} conversations, {total:,} tokens, {answers:,} of them in "
                f"answers, {len(windows):,} samples of {self.sequence_length} tokens"
            )
        return Examined(lines, self.why_no_batch(len(self.windows("training"))), [])

    def train_dataloader(self) -> DataLoader[Any]:
        """Samples of the training conversations, shuffled."""
        return self.training_loader(self.windows("training"))

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Samples of the validation conversations in order; no loader if there are none."""
        if not self._conversations["validation"]:
            return []
        return self.evaluation_loader(self.windows("validation"))

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The validation samples."""
        return self.val_dataloader()
