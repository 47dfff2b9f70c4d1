"""The settings of other implementations (`config.json`), read without losing one."""

from collections.abc import Collection, Mapping
from typing import Any

_WITHOUT_EFFECT = """
_name_or_path architectures dtype model_type name_or_path torch_dtype transformers_version
transformers.js_config is_llama_config
bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
tokenizer_class
cache_implementation max_length min_length do_sample early_stopping num_beams temperature top_k
top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids
encoder_no_repeat_ngram_size num_return_sequences exponential_decay_length_penalty prefix
forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens
remove_invalid_values num_beam_groups diversity_penalty task_specific_params
use_cache output_attentions output_hidden_states output_scores return_dict torchscript
return_dict_in_generate use_bfloat16 pruned_heads chunk_size_feed_forward
attn_implementation _attn_implementation pretraining_tp tf_legacy_loss
initializer_range id2label label2id problem_type finetuning_task num_labels
is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder
"""
WITHOUT_EFFECT = frozenset(_WITHOUT_EFFECT.split())
"""Settings of Hugging Face's configs that change no output of a model."""

REQUIRED = object()


class TheirSettings:
    """Reads the settings of another implementation and refuses those that nothing has read.

    Args:
        values: The settings, as in `config.json`.
        origin: Name of the file or folder, for messages.
    """

    def __init__(self, values: Mapping[str, Any], origin: str) -> None:
        self._values = values
        self._origin = origin
        self._read: set[str] = set()

    def take(self, name: str, kind: type, default: Any = REQUIRED) -> Any:
        """Return a setting; `default` if it is absent or null.

        Raises:
            ValueError: If it has another type, or is absent without a default.
        """
        self._read.add(name)
        value = self._values.get(name)
        if value is None:
            if default is REQUIRED:
                raise ValueError(f"{self._origin} has no setting {name!r}")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{self._origin}: {name} must be {NOUNS[kind]}, got {value!r:.100}")
        return value

    def peek(self, name: str) -> Any:
        """The value of a setting, None if it is absent, without marking it as read."""
        return self._values.get(name)

    def nullable(self, name: str, kind: type, default: Any) -> Any:
        """Return a setting whose null means none; `default` if it is absent.

        Raises:
            ValueError: If it has another type.
        """
        return self.take(name, kind, None if name in self._values else default)

    def only(self, name: str, value: Any, why: str) -> None:
        """Check that a setting has the one value that diffmm can hold, or is absent or null.

        Raises:
            ValueError: If it has another value; the message names both, and `why`.
        """
        self._read.add(name)
        given = self._values.get(name)
        if given is not None and given != value:
            self.refuse(name, given, f"only {value!r}: {why}")

    def section(self, name: str) -> "TheirSettings":
        """The settings within a setting that is an object; they need a `finish` of their own.

        Raises:
            ValueError: If it is absent or not an object.
        """
        return self.inside(name, self.take(name, dict))

    def inside(self, name: str, values: Mapping[str, Any]) -> "TheirSettings":
        """The settings within one that is an object; they need a `finish` of their own."""
        return TheirSettings(values, f"{self._origin}: {name}")

    def skip(self, *names: str) -> None:
        """Mark settings as read that have no effect in this family."""
        self._read.update(names)

    def refuse(self, name: str, value: Any, why: str) -> None:
        """Raise the error for a setting that cannot be held.

        Raises:
            ValueError: Always; the message names the setting, its value and `why`.
        """
        raise ValueError(f"{self._origin} has {name}={value!r}, but diffmm can hold {why}")

    def finish(self, ignored: Collection[str] = WITHOUT_EFFECT) -> None:
        """Check that every setting was read.

        Raises:
            ValueError: If one was not, since it may change the model's outputs.
        """
        unknown = {
            name: value
            for name, value in self._values.items()
            if name not in self._read and name not in ignored and value is not None
        }
        if unknown:
            listed = ", ".join(f"{name}={value!r:.100}" for name, value in sorted(unknown.items()))
            raise ValueError(
                f"{self._origin} has settings that diffmm does not know, and which may change the "
                f"model's outputs: {listed}. Remove those that do not from its config.json"
            )


NOUNS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    dict: "an object",
    list: "a list",
}
