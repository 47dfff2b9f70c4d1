"""The tokenizer of a text model as the files that Hugging Face's `AutoTokenizer` reads."""

import json
from typing import Any, NamedTuple

from diffmm.tokenizers import EOS_NAMES, MASK_NAMES, PAD_NAMES, HuggingFaceTokenizer

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
CHAT_TEMPLATE_NAME = "chat_template.jinja"
GENERATION_NAME = "generation_config.json"


class TokenizerFiles(NamedTuple):
    """A tokenizer in files.

    Attributes:
        files: The text of each file by its name; none if the model's job has no tokenizer, or only
            the name of one on the hub.
        ids: The ids that start, end and pad a text, `bos_token_id`, `eos_token_id` and
            `pad_token_id`, as far as the tokenizer has them. If several tokens end a text or an
            answer, `eos_token_id` is the list of them.
    """

    files: dict[str, str]
    ids: dict[str, int | list[int]]


def tokenizer_files(job: dict[str, Any] | None, max_length: int) -> TokenizerFiles:
    """The files of the tokenizer in a job.

    The tokenizer of the files places before a text what the job's reader does, whatever its own
    definition says.

    Args:
        job: The plain values of a `diffmm.models.job.Job`, or None.
        max_length: Maximum sequence length of the model, in tokens.

    Raises:
        ValueError: If the job's tokenizer is invalid.
    """
    reader = ((job or {}).get("reader") or {}).get("init_args", {})
    definition = reader.get("definition")
    if definition is None and reader.get("tokenizer") == "bytes":
        definition = byte_definition()
    if definition is None:
        return TokenizerFiles({}, {})
    definition = starting_with(definition, tuple(reader.get("start_ids", ())))
    tokenizer = HuggingFaceTokenizer.of_definition("its own", definition)
    names = tokenizer.special_names
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        **names,
    }
    own_names = {"eos_token": "eos_id", "pad_token": "pad_id"}
    ids: dict[str, int | list[int]] = {
        f"{name}_id": getattr(tokenizer, own) for name, own in own_names.items() if name in names
    }
    if tokenizer.start_ids:
        ids["bos_token_id"] = tokenizer.start_ids[0]
    if reader.get("stop_ids"):
        ids["eos_token_id"] = list(reader["stop_ids"])
    template = reader.get("chat_template")
    return TokenizerFiles(
        {
            TOKENIZER_NAME: definition,
            TOKENIZER_CONFIG_NAME: json.dumps(settings, indent=2) + "\n",
            **({} if template is None else {CHAT_TEMPLATE_NAME: template}),
        },
        ids,
    )


def byte_definition() -> str:
    """The `tokenizer.json` of a tokenizer with the ids of `diffmm.tokenizers.ByteTokenizer`: bytes
    in the alphabet of byte-level BPE (GPT-2), without merges.

    A text that contains the name of a special token, such as `<|endoftext|>`, becomes that token,
    as in all tokenizers of transformers; diffmm's own encodes its bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # GPT-2 writes bytes that are no printable characters of Latin-1 as those from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    vocab = {character: byte for byte, character in characters.items()}
    inner = Tokenizer(models.BPE(vocab, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([EOS_NAMES[0], MASK_NAMES[0], PAD_NAMES[0]])
    return inner.to_str()


def starting_with(definition: str, start_ids: tuple[int, ...]) -> str:
    """A `tokenizer.json` that places `start_ids` before every text and nothing after it.

    Raises:
        ValueError: If the definition is invalid.
    """
    tokenizer = HuggingFaceTokenizer.of_definition("its own", definition)
    if tokenizer.added_ids == (start_ids, ()):
        return definition
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    inner = Tokenizer.from_str(definition)
    names = [(inner.id_to_token(id) or "", id) for id in start_ids]
    text = json.loads(definition)
    text["post_processor"] = None
    if names:
        inner.post_processor = TemplateProcessing(
            single=[*(name for name, _ in names), "$A"], special_tokens=names
        )
        text["post_processor"] = json.loads(inner.to_str())["post_processor"]
    return json.dumps(text, ensure_ascii=False)
