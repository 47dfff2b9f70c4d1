"""Text models of Hugging Face transformers: the same logits, gradients and generated tokens as the
library itself, and weights that come back bit by bit."""

import pytest
import torch
from hugging_face import compare, compare_generation, random_model, saved
from safetensors.torch import load_file

from diffmm.interop import read_model, write_model

transformers = pytest.importorskip("transformers", reason="needs transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SIZE = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

CASES = {
    "llama": ("Llama", {}),
    "llama, tied, ungrouped": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama, one key, biases, odd head size": (
        "Llama",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "head_dim": 22},
    ),
    "llama, another eps and base": (
        "Llama",
        {"rms_norm_eps": 1e-2, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    ),
}


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    """Their model, ours and the folder of theirs."""
    name, changes = CASES[request.param]
    config = getattr(transformers, f"{name}Config")(**SIZE | changes)
    theirs = random_model(getattr(transformers, f"{name}ForCausalLM"), config)
    folder = saved(theirs, tmp_path / "theirs")
    return theirs, read_model(folder), folder


def test_logits_and_all_gradients_are_theirs(pair):
    theirs, ours, _ = pair
    compare(theirs, ours, theirs.config.model_type)


def test_greedy_generation_with_a_cache_writes_the_same(pair):
    compare_generation(*pair[:2])


def test_weights_come_back_bit_by_bit_and_their_library_reads_them(pair, tmp_path):
    theirs, ours, folder = pair
    kind = theirs.config.model_type
    back = write_model(ours, tmp_path / "back", kind)
    first, second = (load_file(each / "model.safetensors") for each in (folder, back))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    again = transformers.AutoModelForCausalLM.from_pretrained(back).eval()
    tokens = torch.randint(0, 61, (2, 9))
    torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits)
