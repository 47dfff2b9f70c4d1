"""Chat templates in the files of Hugging Face's tokenizers."""

import json
from pathlib import Path

TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json")
"""Files beside a `tokenizer.json` that may contain a template."""


def template_in(folder: Path) -> str | None:
    """The chat template in a folder of a tokenizer; None if there is none.

    Raises:
        ValueError: If a file is damaged, or has several templates without one called `default`.
    """
    for name in TEMPLATE_FILES:
        file = folder / name
        if not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}") from error
        found = text if file.suffix != ".json" else _template_of(text, file)
        if found is not None:
            return found
    return None


def _template_of(text: str, file: Path) -> str | None:
    """The template in a `tokenizer_config.json`; of several, the one named `default`."""
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not a JSON file: {error}") from error
    found = settings.get("chat_template") if isinstance(settings, dict) else None
    if not isinstance(found, list):
        return found if isinstance(found, str) else None
    named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
    if not isinstance(named.get("default"), str):
        raise ValueError(
            f"{file} has the chat templates {', '.join(map(str, named))}, but none called default: "
            f"give one as chat_template"
        )
    return named["default"]
