"""Text models in the LM Evaluation Harness (`pip install diffmm[lm-eval]`).

    python -m diffmm.hub.lm_eval --model diffmm --model_args run=RUN --tasks TASK,...

takes the arguments of `lm_eval`, which itself finds only the models of its own package; without
`--device`, the accelerator is used if there is one. In Python, importing this module registers the
model `diffmm` for `lm_eval.simple_evaluate`.
"""

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Literal

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from diffmm.hub.loading import load
from diffmm.models import TextModel
from diffmm.models.generation import stream
from diffmm.ops import AttentionMask
from diffmm.tokenizers import StreamDecoder

Scored = tuple[float, bool]
"""The log-likelihood of a continuation, and whether it is the greedy one."""

SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


class ModelArgumentsError(ValueError):
    """The arguments of the model name no decoder."""


@register_model("diffmm")
class DiffmmLM(TemplateLM):
    """A trained decoder as a model of the harness.

    Documents start with the tokenizer's end-of-text token, as in training. Contexts that are too
    long lose their beginning.

    Args:
        run: Run or file that `diffmm.load` takes.
        checkpoint: `"newest"` or `"best"`, as in `diffmm.load`.
        tokenizer: Name of the tokenizer; by default that of the file.
        device: Device of the model; by default the accelerator, if there is one.
        batch_size: Number of sequences per forward pass.
        max_batch_size: Not used: `batch_size` is fixed. The harness always gives it.

    Raises:
        FileNotFoundError: If the run does not exist.
        ValueError: If the run is not one of a decoder, or `batch_size` is not a positive integer.
    """

    def __init__(
        self,
        run: str,
        *,
        checkpoint: Literal["newest", "best"] = "newest",
        tokenizer: str | None = None,
        device: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
        trained = load(run, checkpoint=checkpoint, tokenizer=tokenizer, device=device)
        self.encoder = trained.tokenizer
        assert isinstance(trained.model, TextModel)
        if not trained.model.config.causal:
            raise ValueError(f"{run} is an encoder (causal=False): the harness needs a decoder")
        self.model = trained.model.eval()
        self.batch_size = int(batch_size)
        self._device = self.model.embedding.weight.device

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "DiffmmLM":
        """Create the model from the harness's arguments.

        Raises:
            ModelArgumentsError: If they are wrong.
        """
        more = {k: v for k, v in (additional_config or {}).items() if v is not None}
        try:
            return cls(**arg_dict, **more)
        except (FileNotFoundError, TypeError, ValueError) as error:
            raise ModelArgumentsError(str(error)) from error

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of a sequence."""
        return self.model.config.max_length

    @property
    def eot_token_id(self) -> int:
        return self.encoder.eos_id

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for the harness's cache."""
        return self.encoder.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode a text; there are never special tokens."""
        return self.encoder.encode(string)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihoods of whole texts, in windows without overlap."""
        windows: list[tuple[int, list[int], list[int]]] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            rolled = get_rolling_token_windows(tokens, self.eot_token_id, self.max_length, 1)
            windows += [(number, *make_disjoint_window(window)) for window in rolled]
        scores = self._scores([(context, target) for _, context, target in windows])
        sums = [0.0] * len(requests)
        for (number, _, _), (score, _) in zip(windows, scores, strict=True):
            sums[number] += score
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the strings in `until`.

        Raises:
            ValueError: If a task has a setting of generation that is not supported.
        """
        texts: list[str] = []
        for settings, group in groupby(requests, key=lambda request: request.args[1]):
            contexts = [request.args[0] for request in group]
            for start in range(0, len(contexts), self.batch_size):
                batch = contexts[start : start + self.batch_size]
                texts += self._continue(batch, normalize_gen_kwargs(settings))
        return texts

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[Scored]:
        return self._scores([(context, target) for _, context, target in requests])

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
        """Score the targets after their contexts, the longest pairs first."""
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        scores: list[Scored] = [(0.0, True)] * len(pairs)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            for index, score in zip(chosen, self._score([pairs[i] for i in chosen]), strict=True):
                scores[index] = score
        return scores

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[Scored]:
        kept = [(context + target)[-self.max_length - 1 :] for context, target in pairs]
        inputs = [torch.tensor(tokens[:-1]) for tokens in kept]
        # Padding on the right changes nothing before it in a causal model.
        padded = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        logits = self.model(padded.to(self._device), mask=AttentionMask(causal=True))
        for row, tokens, (_, target) in zip(logits, kept, pairs, strict=True):
            count, end = min(len(target), len(tokens) - 1), len(tokens) - 1
            found = row[end - count : end].float().log_softmax(-1)
            wanted = torch.tensor(tokens[len(tokens) - count :], device=self._device)
            score = found.gather(-1, wanted[:, None]).sum()
            yield float(score), bool((found.argmax(-1) == wanted).all())

    def _continue(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        unknown = sorted(set(settings) - SETTINGS)
        if unknown:
            raise ValueError(
                f"generation_kwargs has {', '.join(unknown)}, which diffmm's models do not have: "
                f"they take {', '.join(sorted(SETTINGS))}"
            )
        until, most = settings["until"], min(settings["max_gen_toks"], self.max_length - 1)
        prompts = [
            (self.tok_encode(context) or [self.eot_token_id])[most - self.max_length :]
            for context in contexts
        ]
        tokens, is_real = padded_left(prompts, self.eot_token_id)
        steps = stream(
            self.model,
            tokens.to(self._device),
            key_padding=is_real.to(self._device),
            max_new_tokens=most,
            temperature=settings["temperature"] if settings["do_sample"] else 0.0,
            top_k=settings.get("top_k"),
            top_p=settings.get("top_p"),
            stop_ids=[self.eot_token_id],
        )
        decoders = [StreamDecoder(self.encoder) for _ in prompts]
        texts, ended = [""] * len(prompts), [False] * len(prompts)
        for new in steps:
            for row, token in enumerate(new.tolist()):
                ended[row] = ended[row] or token == self.eot_token_id
                if not ended[row]:
                    texts[row] += decoders[row].feed([token])
                    ended[row] = any(stop in texts[row] for stop in until)
            if all(ended):
                break
        texts = [text + decoder.flush() for text, decoder in zip(texts, decoders, strict=True)]
        return [before_any(text, until) for text in texts]


def padded_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts as `[B, N]` ids, padded on the left, and `[B, N]` booleans, true at real tokens."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts])
    starts = torch.tensor([[longest - len(p)] for p in prompts])
    return tokens, torch.arange(longest) >= starts


def before_any(text: str, stops: Sequence[str]) -> str:
    """The part of `text` before the first of `stops`."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def with_device(arguments: Sequence[str]) -> list[str]:
    """The arguments of an evaluation with a device: the harness would take `cuda:0` by default."""
    named = any(each.split("=")[0] in ("--device", "--config", "-C") for each in arguments)
    evaluates = len(arguments) > 1 and (arguments[0] == "run" or arguments[0].startswith("-"))
    return [*arguments, "--device", "auto"] if evaluates and not named else list(arguments)


def main() -> None:
    """Run the command line of the harness; bad `--model_args` end it with one line."""
    sys.argv[1:] = with_device(sys.argv[1:])
    try:
        cli_evaluate()
    except ModelArgumentsError as error:
        raise SystemExit(f"error: --model_args: {error}") from error


if __name__ == "__main__":
    main()
