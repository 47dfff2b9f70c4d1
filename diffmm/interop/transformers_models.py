"""diffmm's decoders as models of Hugging Face transformers (`pip install diffmm[transformers]`).

Importing this module registers them:

    import diffmm.interop.transformers_models
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)

where `folder` is one that `save_pretrained` or `push_to_hub` of a diffmm model has written, or a
name on the hub. It has the same tensors under the same names: what transformers' `save_pretrained`
writes is read by `diffmm.load`, and the reverse. For LoRA, `q_proj`, `k_proj`, `v_proj`,
`out_proj`, `gate_proj`, `up_proj` and `down_proj` are the names of the linear layers in the blocks,
and `lambda_proj` that of the lambdas of `diff_v2` and `diff_grouped`.
"""

import copy
import functools
import inspect
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from diffmm.interop.transformers_cache import TransformersCache, real_tokens
from diffmm.models import Backbone, BackboneConfig, TextModel
from diffmm.models.contents import MODEL_TYPE
from diffmm.models.description import build, configured
from diffmm.ops import AttentionMask
from diffmm.ops.softmax_attention.reference import capped

TEXT_MODEL = f"diffmm.models.{TextModel.__name__}"
"""The `class_path` of decoders in descriptions."""

SIZES = (
    "max_position_embeddings",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
"""The names of settings that only the description determines."""

CHANGEABLE = ("vocab_size", "tie_word_embeddings")
"""The names of settings that are changed in the description by assignment, as transformers does
when it resizes or unties embeddings."""


class DiffmmConfig(PreTrainedConfig):
    """The settings of a decoder: those in the `config.json` of its folder.

    The names that transformers' tools read, such as `hidden_size`, are properties of the
    description. `num_key_value_heads` and `head_dim` are those of a cache: the key groups, and the
    width of their keys, both components together.

    Attributes:
        description: The description of the model (see `diffmm.models.description.describe`), which
            is copied.
        job: The plain values of its job, or None.
        use_cache: Whether a call returns a key-value cache by default.

    Raises:
        ValueError: If a setting that the description determines is given with another value.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    has_no_defaults_at_init: ClassVar[bool] = True

    description: dict[str, Any] | None = None
    job: dict[str, Any] | None = None
    use_cache: bool = True

    @property
    def checked_description(self) -> dict[str, Any]:
        """The description.

        Raises:
            ValueError: If there is none.
        """
        if self.description is None:
            raise ValueError(
                "a DiffmmConfig needs the description of its model: load one from a folder that "
                "save_pretrained has written"
            )
        return self.description

    @property
    def text(self) -> dict[str, Any]:
        """The values of the model's `diffmm.models.TextConfig`."""
        return self.checked_description["config"]

    @property
    def vocab_size(self) -> int:
        return self.text["vocab_size"]

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.text["vocab_size"] = value

    @property
    def tie_word_embeddings(self) -> bool:
        return self.text.get("tie_embeddings", True)

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        self.text["tie_embeddings"] = value

    @property
    def max_position_embeddings(self) -> int:
        return self.text["max_length"]

    @property
    def hidden_size(self) -> int:
        return self.text["backbone"]["dim"]

    @property
    def num_hidden_layers(self) -> int:
        return self.text["backbone"]["depth"]

    @property
    def num_attention_heads(self) -> int:
        return self.text["backbone"]["num_heads"]

    @property
    def num_key_value_heads(self) -> int:
        return self._key_shape()[0]

    @property
    def head_dim(self) -> int:
        return math.prod(self._key_shape()[1:])

    def _key_shape(self) -> tuple[int, ...]:
        with torch.device("meta"):
            return configured(BackboneConfig, self.text["backbone"]).make_attention(0).k_shape

    def __post_init__(self, **others: Any) -> None:
        self.description = copy.deepcopy(self.description)
        for name in (*SIZES, *CHANGEABLE):
            if name in others:
                self._refuse_other(name, others.pop(name))
        super().__post_init__(**others)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SIZES:
            self._refuse_other(name, value)
        else:
            super().__setattr__(name, value)

    def _refuse_other(self, name: str, value: Any) -> None:
        """Raise if a setting that the description determines is to have another value."""
        self.checked_description  # noqa: B018
        own = getattr(self, name)
        if value != own:
            raise ValueError(
                f"{name}={value!r} is not that of the model's description, {own!r}: leave it out, "
                f"or create another model with diffmm.create_model"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, with the names that transformers' tools read."""
        values = super().to_dict()
        if (self.description or {}).get("class_path") == TEXT_MODEL:
            values |= {name: getattr(self, name) for name in (*SIZES, *CHANGEABLE)}
        return values


class DiffmmForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder of diffmm as a model of transformers.

    Its logits are those of `diffmm.models.TextModel` with the same weights. Prompts of different
    lengths are padded on the left. The attention is chosen by the description, not by
    `attn_implementation`; attention maps are computed by `diffmm.analysis.attention_maps`.

    Args:
        config: The settings.

    Raises:
        ValueError: If they do not describe a decoder.
    """

    config_class = DiffmmConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _can_compile_fullgraph = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012

    embedding: nn.Module
    head: nn.Module
    backbone: Backbone

    def __init__(self, config: DiffmmConfig) -> None:
        super().__init__(config)
        model = build(config.checked_description)
        if not isinstance(model, TextModel) or not model.config.causal:
            kind = "encoder" if isinstance(model, TextModel) else type(model).__name__
            raise ValueError(
                f"the settings describe a model of kind {kind}, but only decoders (TextModel with "
                f"causal=True) are models of transformers: load it with diffmm.load"
            )
        self.text_config = model.config
        self.embedding, self.backbone, self.head = model.embedding, model.backbone, model.head
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and with `labels` the loss of the next tokens.

        Args:
            input_ids: Token ids, `[B, N]`.
            attention_mask: `[B, M]`, 0 where a token is padding; for all tokens, those in the cache
                included.
            position_ids: `[B, N]`; by default 0, 1, 2, ..., continuing after the cached tokens.
                Without an `attention_mask` and earlier tokens, positions that start again separate
                the documents of a packed row.
            past_key_values: A cache of transformers, dynamic or static.
            inputs_embeds: Embedded tokens, `[B, N, dim]`, instead of `input_ids`.
            labels: `[B, N]` ids, -100 where there is none; they are shifted here.
            use_cache: Whether to return a cache; by default as in the config, but not in training
                mode, not of rows of several documents and, while torch compiles, not with
                `position_ids` alone, which may be such rows.
            output_hidden_states: Whether to return the input of every block and the final features.
            output_attentions: Must not be true.
            logits_to_keep: Number of last tokens to compute logits of, or their indices; 0 for all.
            num_items_in_batch: Number of labels by which the sum of the losses is divided; by
                default their number in this call.

        Raises:
            ValueError: If the sequence is longer than the model's `max_length`, an argument has
                another shape, `output_attentions` is true, or a cache is asked for with gradient
                checkpointing or rows of several documents.
        """
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError(
                "output_attentions=True is not supported, because attention maps are never in "
                "memory: use diffmm.analysis.attention_maps"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embedding(input_ids)
        documents = None
        if attention_mask is None and position_ids is not None and past_key_values is None:
            position_ids = position_ids.expand(inputs_embeds.shape[0], -1)
            documents = documents_of(position_ids, must_know=bool(use_cache))
        recomputes = self.training and self.gradient_checkpointing
        if (use_cache or past_key_values is not None) and (recomputes or documents is not None):
            reason = (
                "gradient checkpointing excludes"
                if recomputes
                else "rows of several documents exclude"
            )
            raise ValueError(f"{reason} a cache: set use_cache=False")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and documents is None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        scale = self.text_config.embedding_scale
        x = inputs_embeds if scale == 1.0 else inputs_embeds * scale
        num_tokens = x.shape[1]
        cache = None
        if past_key_values is None:
            real = real_tokens(attention_mask, num_tokens)
            mask = AttentionMask(causal=True, document_ids=documents, key_padding=real)
        else:
            cache = TransformersCache(past_key_values, num_tokens)
            mask = cache.mask(attention_mask)
        end = num_tokens if cache is None else cache.end
        if end is not None and end > self.text_config.max_length:
            raise ValueError(
                f"a sequence of {end} tokens is longer than the model's max_length="
                f"{self.text_config.max_length}: shorten it or generate fewer tokens"
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = None
        if output_hidden_states:
            blocks = range(len(self.backbone.blocks))
            features, outputs = self.backbone(
                x, mask=mask, positions=position_ids, cache=cache, indices=blocks
            )
            hidden_states = (x, *outputs[:-1], features)
        else:
            features = self.backbone(x, mask=mask, positions=position_ids, cache=cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits: Any = capped(self.head(features[:, kept]), self.text_config.logit_softcap)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=hidden_states,
        )

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(  # type: ignore[override]
        self, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """The arguments of `forward` for a step of `generate`, without those for other parts of
        it, such as the tokenizer that looks for `stop_strings`."""
        whole: Any = super()
        inputs = whole.prepare_inputs_for_generation(*args, **kwargs)
        return {name: value for name, value in inputs.items() if name in FORWARD}

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor, past_key_values: Any, **_: Any) -> Tensor:
        """The mask of padding for all places of a static cache, `[B, max_length]`, which
        transformers' `generate` asks for; by its shape, all steps are the same computation."""
        size = past_key_values.get_max_length()
        return nn.functional.pad(attention_mask, (0, size - attention_mask.shape[1]))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings

    @property
    def gradient_checkpointing(self) -> bool:  # type: ignore[override]
        """Whether blocks are recomputed in the backward pass."""
        return self.backbone.activation_checkpointing

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Any = None,
        every_n_layers: int = 1,
    ) -> None:
        """Recompute blocks, as transformers' `gradient_checkpointing_enable` asks.

        Raises:
            ValueError: If it asks for what diffmm's checkpointing does not do.
        """
        options = dict(getattr(gradient_checkpointing_func, "keywords", {}))
        if every_n_layers != 1:
            raise ValueError(f"every_n_layers must be 1, got {every_n_layers}")
        if options not in ({}, {"use_reentrant": False}):
            raise ValueError(
                f"gradient_checkpointing_kwargs must be {{'use_reentrant': False}}, got {options}"
            )
        self.backbone.activation_checkpointing = enable

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize a module that the file has no weights of."""
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()


def documents_of(position_ids: Tensor, *, must_know: bool = False) -> Tensor | None:
    """The number of the document of each token in a packed row, `[B, N]`: a new one starts where
    the position is not the next one. None if no row has several, except while torch compiles,
    unless `must_know`: the graph is then divided here."""
    starts = position_ids.diff(dim=-1) != 1
    if (must_know or not torch.compiler.is_compiling()) and not bool(starts.any()):
        return None
    return nn.functional.pad(starts.cumsum(dim=-1), (1, 0))


FORWARD = frozenset(inspect.signature(DiffmmForCausalLM.forward).parameters)
"""The names of the arguments of a call."""

AutoConfig.register(MODEL_TYPE, DiffmmConfig)
AutoModelForCausalLM.register(DiffmmConfig, DiffmmForCausalLM)
