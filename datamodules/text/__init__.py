"""Text: the datamodule, its sources and the reader of prompts, imported on first access."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.text.conversation_source import Conversations
    from datamodules.text.conversations import ConversationData
    from datamodules.text.data import TextData
    from datamodules.text.datasets import HuggingFaceText
    from datamodules.text.reader import TextReader
    from datamodules.text.retrieval.data import RetrievalData
    from datamodules.text.retrieval.sources import AssociativeRecall, ManyShot, Needles
    from datamodules.text.sources import Corpus, StandardLibrary, TextFolder, TextSource, TokenFiles
    from datamodules.text.token_files import write_token_file

__all__ = [
    "AssociativeRecall",
    "ConversationData",
    "Conversations",
    "Corpus",
    "HuggingFaceText",
    "ManyShot",
    "Needles",
    "RetrievalData",
    "StandardLibrary",
    "TextData",
    "TextFolder",
    "TextReader",
    "TextSource",
    "TokenFiles",
    "write_token_file",
]

_HOMES = {
    "AssociativeRecall": "datamodules.text.retrieval.sources",
    "ConversationData": "datamodules.text.conversations",
    "Conversations": "datamodules.text.conversation_source",
    "Corpus": "datamodules.text.sources",
    "HuggingFaceText": "datamodules.text.datasets",
    "ManyShot": "datamodules.text.retrieval.sources",
    "Needles": "datamodules.text.retrieval.sources",
    "RetrievalData": "datamodules.text.retrieval.data",
    "StandardLibrary": "datamodules.text.sources",
    "TextData": "datamodules.text.data",
    "TextFolder": "datamodules.text.sources",
    "TextReader": "datamodules.text.reader",
    "TextSource": "datamodules.text.sources",
    "TokenFiles": "datamodules.text.sources",
    "write_token_file": "datamodules.text.token_files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
