"""Comparison with models of Hugging Face transformers, at random weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffmm.interop.conversion import FAMILIES
from diffmm.models.generation import generate

LENGTH = 12


def random_model(model_class: Any, config: Any) -> nn.Module:
    """A model whose every parameter is random, so that none is at a special value."""
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 1:
                parameter.normal_(std=0.2)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def saved(model: nn.Module, folder: Path) -> Path:
    """The folder of a model as transformers saves it."""
    model.save_pretrained(folder)
    return folder


def assert_same(actual: Tensor, truth: Tensor, name: str = "", tolerance: float = 1e-5) -> None:
    """Check equality to 1e-5 of the largest number in `truth`, the precision of float32 sums."""
    assert actual.shape == truth.shape, name
    error = ((actual - truth).abs().max() / truth.abs().max()).item()
    assert error < tolerance, f"{name} is off by {error:.1e} of its largest number"


def compare(theirs: nn.Module, ours: nn.Module, family: str, length: int = LENGTH) -> float:
    """Compare logits and the gradient of every parameter; returns the largest magnitude of a
    gradient."""
    tokens = torch.randint(0, ours.config.vocab_size, (2, length))
    logits = [theirs(tokens).logits, ours(tokens)]
    assert_same(logits[1], logits[0], "logits")
    weights = torch.randn_like(logits[0])
    for each in logits:
        (each * weights).sum().backward()
    table = FAMILIES[family].table(ours.config)
    found = {name: p.grad for name, p in ours.named_parameters()}
    # The headwise norm that DiffLlama does not have is a factor of the output projection, 1.
    found |= {name: torch.ones_like(g) for name, g in found.items() if "attention.norm" in name}
    gradients = table.to_theirs(found)
    parameters = dict(theirs.named_parameters())
    assert parameters.keys() == gradients.keys()
    for name, parameter in parameters.items():
        assert_same(gradients[name], parameter.grad, name)
    return max(float(parameter.grad.abs().max()) for parameter in parameters.values())


def compare_generation(theirs: nn.Module, ours: nn.Module, new: int = 12) -> Tensor:
    """Compare greedy generation with a cache, token by token, and return the tokens, `[2, new]`."""
    tokens = torch.randint(0, ours.config.vocab_size, (2, 7))
    settings = {"do_sample": False, "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
    truth = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
    found = generate(ours, tokens, max_new_tokens=new, temperature=0)
    assert torch.equal(found, truth[:, 7:])
    return found
