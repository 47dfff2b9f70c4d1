"""Folders on the Hugging Face hub: their names, and how they are fetched."""

import re
from pathlib import Path

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""A repository of the hub, `user/name`."""

HUB_FILES = (
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "open_clip_config.json",
    "tokenizer.json",
    "preprocessor_config.json",
)
"""The files of a repository that are fetched: weights and what describes them, of diffmm's models
and of others; no pickles and no code."""


CARD_NAME = "README.md"
"""The model card."""


def is_hub_name(source: str | Path) -> bool:
    """Whether a source can only be a repository of the hub: it has the form `user/name`, and there
    is no file of this name and no folder `user`."""
    name = str(source)
    path = Path(name)
    return HUB_NAME.fullmatch(name) is not None and not path.exists() and not path.parent.is_dir()


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
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, token=token, allow_patterns=list(HUB_FILES)
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"there is no file or folder {name}, and it cannot be fetched from the Hugging Face "
            f"hub ({reason}): without a network, give a folder that has its config.json and "
            f"safetensors"
        ) from error
