"""Text: the datamodule, and where text comes from."""

from datamodules.text.data import TextData
from datamodules.text.datasets import HuggingFaceText
from datamodules.text.sources import Corpus, StandardLibrary, TextFolder, TextSource, TokenFiles
from datamodules.text.token_files import write_token_file

__all__ = [
    "Corpus",
    "HuggingFaceText",
    "StandardLibrary",
    "TextData",
    "TextFolder",
    "TextSource",
    "TokenFiles",
    "write_token_file",
]
