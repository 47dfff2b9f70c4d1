"""The files and folders that the data of a recipe name."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from diffmm.recipes.references import REFERENCE, resolve, walk

PATHS = ("train", "val", "test", "root", "data_files")
"""Arguments of a source that are paths."""

FORMATS = ("json", "parquet", "text", "csv")
"""Names of a `HuggingFaceText` whose `data_files` are local."""

PATTERN = re.compile(r"[*?\[{]")


class DataPath(NamedTuple):
    """A path of a recipe's data.

    Attributes:
        setting: The setting that gives it, as on the command line: `vars.imagenet`.
        path: The path.
    """

    setting: str
    path: str

    @property
    def exists(self) -> bool:
        """Whether there is such a file or folder; of a pattern, the folder that it is in."""
        pattern = PATTERN.search(self.path)
        return (
            Path(self.path[: pattern.start()] + "_").parent if pattern else Path(self.path)
        ).exists()


def data_paths(values: dict[str, Any]) -> list[DataPath]:
    """The local paths that the sources of a recipe's data name. Generated, installed and downloaded
    data have none.

    Args:
        values: Values of the recipe.
    """
    data = values.get("data")
    arguments = data.get("init_args") if isinstance(data, dict) else None
    resolved = resolve({**values, "run_dir": "runs"})[0]
    found = []
    for name, source in (arguments if isinstance(arguments, dict) else {}).items():
        given = source.get("init_args") if isinstance(source, dict) else None
        if "source" not in name or not isinstance(given, dict) or given.get("download"):
            continue
        is_local = given.get("name", FORMATS[0]) in FORMATS
        theirs = resolved["data"]["init_args"][name]["init_args"]
        for (key, *_), path in walk(theirs):
            if key in PATHS and isinstance(path, str) and (key != "data_files" or is_local):
                written = given[key]
                reference = REFERENCE.search(written) if isinstance(written, str) else None
                setting = reference[1] if reference else f"data.{name}.{key}"
                found.append(DataPath(setting, path))
    return found
