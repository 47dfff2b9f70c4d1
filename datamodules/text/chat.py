"""Conversations as tokens: templates of messages, and which tokens are answers."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from diffmm.chat_templates import TEMPLATE_FILES, template_in
from diffmm.checks import DataError, article
from diffmm.tokenizers import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
ANSWER_ROLE = "assistant"

DEFAULT = "default"
"""Name of `DEFAULT_TEMPLATE`."""

DEFAULT_TEMPLATE = """\
{%- for message in messages -%}
{{ "\\n\\n" if not loop.first }}### {{ message.role | capitalize }}:
{{ message.content or "" }}{{ eos_token if message.role == "assistant" }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ "\\n\\n" if messages }}### Assistant:{{ "\\n" }}
{%- endif -%}
"""
"""Messages under their roles, in plain text for any tokenizer; answers end with its end-of-text
token."""

_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""Marks of answers in a template, which are found without them."""

Message = Mapping[str, Any]


class EncodedChat(NamedTuple):
    """A conversation as tokens.

    Attributes:
        ids: Token ids.
        is_answer: Whether each of them belongs to an answer, and is to be learned.
    """

    ids: list[int]
    is_answer: list[bool]


class ChatTemplate:
    """A template of Hugging Face's tokenizers (Jinja) that turns messages into text.

    Args:
        text: The template. It runs in Jinja's sandbox, so that a template in a file of weights
            cannot call anything else.
        tokenizer: The tokenizer of the text; the names of its special tokens in the text stand for
            these tokens.

    Raises:
        ValueError: If the template is not valid.
    """

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.text = text
        self.tokenizer = tokenizer
        # What Hugging Face's templates may use.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = _as_json
        text = _GENERATION.sub("", text)
        try:
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise ValueError(f"the chat template is not valid: {error}") from error

    def render(self, messages: Sequence[Message], *, opens_answer: bool = False) -> str:
        """The text of messages.

        Args:
            messages: Dicts with `role` and `content`: a text, or a list of texts as `{"type":
                "text", "text": "..."}`, which are joined by line ends.
            opens_answer: Whether to append what precedes an answer.

        Raises:
            DataError: If the template does not accept the messages; the message continues a
                sentence about the conversation.
        """
        if messages or not opens_answer:  # none precede an answer that comes first
            messages = checked(messages)
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=opens_answer,
                eos_token=self.tokenizer.eos_name,
                bos_token=self.tokenizer.bos_name,
            )
        except Exception as error:  # a template may raise any
            reason = str(error) or type(error).__name__
            raise DataError(f"does not fit the chat template: {reason}") from error

    def encode(self, messages: Sequence[Message]) -> EncodedChat:
        """The tokens of a conversation. Answers are what the assistant's messages add to the text
        that precedes them.

        Raises:
            DataError: As `render`; or if the template changes earlier messages when others follow,
                so that it is unknown which tokens are answers; or if it does not show the call of a
                tool, so that an empty answer would be learned.
        """
        text = self.render(messages)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != ANSWER_ROLE:
                continue
            before = self.render(messages[:number], opens_answer=True)
            after = self.render(messages[: number + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise DataError(
                    "is changed by the chat template when messages follow, so that it is unknown "
                    "which tokens are answers: use another template"
                )
            if message.get("tool_calls") and not self._shows_calls(messages[: number + 1], after):
                raise DataError(
                    f"has message {number} ({ANSWER_ROLE}) that calls a tool, which the chat "
                    f"template does not show: use a template that does, or leave it out"
                )
            spans.append((len(before), len(after)))
        ids, places = self.tokenizer.encode_marked(text)
        starts = [start for start, _ in places]
        is_answer = [any(low <= start < high for low, high in spans) for start in starts]
        return EncodedChat(ids, is_answer)

    def _shows_calls(self, messages: Sequence[Message], text: str) -> bool:
        """Whether the text of messages would be another one if the last did not call tools."""
        last = {name: value for name, value in messages[-1].items() if name != "tool_calls"}
        try:
            return text != self.render(
                [*messages[:-1], last | {"content": last.get("content") or ""}]
            )
        except DataError:  # a template may need the calls
            return True

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of messages that an answer follows.

        Raises:
            DataError: As `render`.
        """
        checked(messages)
        return self.tokenizer.encode_marked(self.render(messages, opens_answer=True))[0]

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: end of text, and the special token with which the template
        ends a message."""
        mark = "answered"
        messages = [{"role": "user", "content": "a"}, {"role": ANSWER_ROLE, "content": mark}]
        rest = self.render(messages).rpartition(mark)[2]
        ids = self.tokenizer.encode_marked(rest)[0][:1]
        found = [id for id in ids if id in self.tokenizer.special_ids]
        return tuple(dict.fromkeys([*found, self.tokenizer.eos_id]))


def checked(messages: Any) -> list[Message]:
    """Messages whose contents are texts: those of a list of parts are joined by line ends.

    Raises:
        DataError: If they are not dicts with a role and a text; the message continues a sentence
            about the conversation.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"must be a list of messages with at least one, got {messages!r:.60}")
    found: list[Message] = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, Mapping) else message
            raise DataError(
                f"has message {number} with the role {role!r:.40}, which must be one of "
                f"{', '.join(ROLES)}"
            )
        content = message.get("content")
        where = f"has message {number} ({message['role']})"
        if isinstance(content, Sequence) and not isinstance(content, str):
            content = "\n".join(_text(part, where) for part in content)
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            kind = "missing" if content is None else f"{article(type(content).__name__)}, not text"
            raise DataError(f"{where} whose content is {kind}")
        found.append({**message, "content": content})
    return found


def _text(part: Any, where: str) -> str:
    """The text of a part of a message."""
    kind = part.get("type") if isinstance(part, Mapping) else article(type(part).__name__)
    if kind != "text" or not isinstance(part.get("text"), str):
        raise DataError(
            f"{where} with a part that is not a text ({kind!r:.40}): the model reads texts only"
        )
    return str(part["text"])


def find_template(given: str | None, tokenizer: str) -> str:
    """The text of a template.

    Args:
        given: The template itself, the path of a file, or `"default"`; None means the template in
            the tokenizer's folder.
        tokenizer: Name of the tokenizer, which may be the path of a `tokenizer.json`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If no template is given, and there is none in the tokenizer's folder, or several
            without a `default`.
    """
    if given == DEFAULT:
        return DEFAULT_TEMPLATE
    if given is not None and "{" in given:
        return given
    if given is not None:
        if not Path(given).is_file():
            raise FileNotFoundError(
                f"chat_template {given!r} is neither {DEFAULT!r}, nor a template, nor a file"
            )
        return Path(given).read_text(encoding="utf-8")
    folder = Path(tokenizer)
    folder = folder.parent if folder.suffix == ".json" else folder
    found = template_in(folder)
    if found is not None:
        return found
    raise ValueError(
        f"tokenizer {tokenizer!r} has no chat template ({' or '.join(TEMPLATE_FILES)} in its "
        f"folder): give one as chat_template, or {DEFAULT!r}"
    )


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _as_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
