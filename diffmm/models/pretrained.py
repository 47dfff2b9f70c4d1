"""The interface by which models are saved to folders and shared on the Hugging Face hub."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from diffmm.checks import reason_of
from diffmm.models.hub_files import CARD_NAME, hub_errors, resolve

COMMIT_MESSAGE = "Upload a model of diffmm"


class Pretrained:
    """Mixin of all models: `from_pretrained`, `save_pretrained` and `push_to_hub`."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Self:
        """Load a model, in float32 on the CPU and in evaluation mode.

        Args:
            source: A folder written by `save_pretrained`, any other file of weights that
                `diffmm.models.weights.load_model` takes, or the name of a repository on the
                Hugging Face hub, `user/name`.
            revision: A branch, a tag or a commit on the hub.
            token: Token of a login to the hub; by default the stored one, if there is one.

        Raises:
            FileNotFoundError: If there is no such file or folder, and `source` is no name on the
                hub.
            ValueError: If the hub cannot be reached, the file does not describe its model, or it
                contains a model of another class; the message names it.
        """
        # Imported here, because a model's weights are described by all classes of models.
        from diffmm.models.weights import load_model

        model = load_model(resolve(source, revision=revision, token=token))
        if not isinstance(model, cls):
            raise ValueError(
                f"{source} contains a model of class {type(model).__name__}, not {cls.__name__}: "
                f"use {type(model).__name__}.from_pretrained"
            )
        return model

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        metrics: Mapping[str, float] | None = None,
        max_shard_size: int | str | None = None,
    ) -> Path:
        """Write a folder for the hub: weights, settings, tokenizer or preprocessing, model card.

        See `diffmm.models.folders` for the files. A new folder appears whole or not at all; in an
        existing one, files are replaced, except a model card, and files of an earlier model that
        this one does not have, such as its tokenizer, are removed.

        Args:
            folder: The folder.
            metrics: Values for the model card by the names of metrics.
            max_shard_size: Maximum size of a file of weights: a number of bytes, or text such as
                `"5GB"`. Larger models are written as several files with an index. By default there
                is one file.

        Returns:
            The folder.

        Raises:
            ValueError: If the model cannot be described, `folder` is a file, a metric is not a
                number, or `max_shard_size` is not a size.
        """
        from diffmm.models.folders import write_folder

        model: Any = self
        return write_folder(model, folder, metrics=metrics, max_shard_size=max_shard_size)

    def push_to_hub(
        self,
        name: str,
        *,
        metrics: Mapping[str, float] | None = None,
        max_shard_size: int | str | None = None,
        private: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = COMMIT_MESSAGE,
    ) -> str:
        """Upload the folder of `save_pretrained` to the hub, and return its address.

        The repository is created if it does not exist. A model card that it has already is kept;
        files of an earlier model that this one does not have are removed.

        Args:
            name: Name of the repository, `user/name`.
            metrics: As in `save_pretrained`.
            max_shard_size: As in `save_pretrained`.
            private: Whether a new repository is private.
            token: Token of a login with write access; by default the stored one.
            revision: The branch; by default the main one.
            commit_message: Message of the commit.

        Raises:
            ValueError: As `save_pretrained`, or if the hub cannot be reached or refuses the upload;
                the message says why.
        """
        from huggingface_hub import HfApi

        from diffmm.models.folders import OWN_FILES, write_folder

        model: Any = self
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as temporary:
            folder = write_folder(
                model,
                Path(temporary, "model"),
                name=name,
                metrics=metrics,
                max_shard_size=max_shard_size,
            )
            try:
                api.create_repo(name, private=private, exist_ok=True)
                has_card = api.file_exists(name, CARD_NAME, revision=revision)
                api.upload_folder(
                    repo_id=name,
                    folder_path=folder,
                    revision=revision,
                    commit_message=commit_message,
                    ignore_patterns=[CARD_NAME] if has_card else None,
                    delete_patterns=list(OWN_FILES),  # except those that are uploaded
                )
            except hub_errors() as error:
                raise ValueError(
                    f"{name} cannot be uploaded to the Hugging Face hub ({reason_of(error)}): "
                    f"save_pretrained writes the same folder"
                ) from error
        return f"{api.endpoint}/{name}"
