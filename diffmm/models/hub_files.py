"""Folders on the Hugging Face hub: their names, and how they are fetched."""

import re
from pathlib import Path

from diffmm.checks import reason_of

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""A repository of the hub, `user/name`."""

FILE_ENDINGS = (
    ".safetensors",
    ".ckpt",
    ".pt",
    ".pth",
    ".bin",
    ".onnx",
    ".pt2",
    ".json",
    ".yaml",
    ".yml",
)
"""Endings of files, with which no name of a repository ends."""

HUB_FILES = (
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "open_clip_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
)
"""The files of a repository that are fetched: weights and what describes them, of diffmm's models
and of others; no pickles and no code."""


CARD_NAME = "README.md"
"""The model card."""


def is_hub_name(source: str | Path) -> bool:
    """Whether a source can only be a repository of the hub: it has the form `user/name` without
    the ending of a file, and neither this path nor `user` exists."""
    name = str(source)
    path = Path(name)
    has_form = HUB_NAME.fullmatch(name) is not None and path.suffix.lower() not in FILE_ENDINGS
    return has_form and not path.exists() and not path.parent.exists()


def resolve(
    source: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """The path of a source: itself, or the folder of a repository of the hub, which is fetched.

    Args:
        source: A path, which need not exist, or the name of a repository, `user/name`.
        revision: As in `fetch`.
        token: As in `fetch`; not used for paths.

    Raises:
        ValueError: As `fetch`, or if there is a revision of a path.
    """
    if is_hub_name(source):
        return fetch(str(source), revision=revision, token=token)
    if revision is not None:
        raise ValueError(f"revision={revision!r} is for names on the hub, but got {source}")
    return Path(source)


def fetch(name: str, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """Download a repository of the hub, or find it in the cache, and return its folder.

    Args:
        name: Name of the repository, `user/name`.
        revision: A branch, a tag or a commit; by default the newest commit of the main branch.
        token: Token of a login; by default the stored one, if there is one.

    Raises:
        ValueError: If it cannot be fetched; the message says why, and how to go on without a
            network.
    """
    import huggingface_hub

    expected: tuple[type[Exception], ...] = (*hub_errors(), ValueError)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, token=token, allow_patterns=list(HUB_FILES)
            )
        )
    except expected as error:
        raise ValueError(
            f"there is no file or folder {name}, and it cannot be fetched from the Hugging Face "
            f"hub ({reason_of(error)}): without a network, give a folder that has its "
            f"config.json and safetensors"
        ) from error


def hub_errors() -> tuple[type[Exception], ...]:
    """The errors of the network, of the hub and of the transfer of files."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The base class of the errors of its HTTP library, which some of its versions do not wrap.
    http_errors = tuple(each for each in HfHubHTTPError.__mro__ if each.__name__ == "HTTPError")
    return (*http_errors, OSError, RuntimeError, HFValidationError)
