"""Text models of Hugging Face transformers: the same logits, gradients and generated tokens as the
library itself, and weights that come back bit by bit."""

import pytest
import torch
from hugging_face import assert_same, compare, compare_generation, random_model, saved
from safetensors.torch import load_file

from diffmm.interop import read_model, write_model
from diffmm.models import BackboneConfig, TextConfig, TextModel

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
    "pad_token_id": None,
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
    "llama, linear rope": (
        "Llama",
        {"rope_parameters": {"rope_theta": 50.0, "rope_type": "linear", "factor": 3.0}},
    ),
    "llama, llama3 rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_theta": 50.0,
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.5,
                "high_freq_factor": 3.0,
                "original_max_position_embeddings": 20,
            }
        },
    ),
    "llama, yarn rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_theta": 50.0,
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 3.0,
                "beta_slow": 0.5,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama, yarn rope with mscale": (
        "Llama",
        {
            "head_dim": 20,
            "rope_parameters": {
                "rope_theta": 30.0,
                "rope_type": "yarn",
                "factor": 2.0,
                "mscale": 1.3,
                "mscale_all_dim": 0.4,
                "truncate": False,
                "original_max_position_embeddings": 30,
            },
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral, window as long as the sequence": ("Mistral", {"sliding_window": 12}),
    "mistral, no window": ("Mistral", {"sliding_window": None, "head_dim": 18}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, windows from the second layer": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 14}),
    "qwen3, biases, windows": (
        "Qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma2": (
        "Gemma2",
        {
            "num_hidden_layers": 3,
            "head_dim": 10,
            "sliding_window": 4,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma2, no softcaps, untied": (
        "Gemma2",
        {
            "head_dim": 12,
            "sliding_window": 64,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            "attention_bias": True,
        },
    ),
    "diffllama": ("DiffLlama", {"num_key_value_heads": 4}),
    "diffllama, grouped, biases, tied": (
        "DiffLlama",
        {"attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    ),
    "diffllama, odd head size": ("DiffLlama", {"num_attention_heads": 8, "head_dim": 10}),
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
    assert compare(theirs, ours, theirs.config.model_type) > 1e-3


def test_greedy_generation_with_a_cache_writes_the_same(pair):
    assert compare_generation(*pair[:2]).shape == (2, 12)


def test_weights_come_back_bit_by_bit_and_their_library_reads_them(pair, tmp_path):
    theirs, ours, folder = pair
    kind = theirs.config.model_type
    back = write_model(ours, tmp_path / "back", kind)
    first, second = (load_file(each / "model.safetensors") for each in (folder, back))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    again = transformers.AutoModelForCausalLM.from_pretrained(back, attn_implementation="eager")
    tokens = torch.randint(0, 61, (2, 9))
    torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits)


def test_a_trained_headwise_norm_is_folded_into_the_projection_of_diffllama(tmp_path):
    torch.manual_seed(0)
    backbone = BackboneConfig(
        dim=32, depth=2, num_heads=8, num_kv_heads=4, rope="1d", attention="diff_v1", init_std=0.2
    )
    ours = TextModel(TextConfig(vocab_size=61, max_length=20, backbone=backbone)).eval()
    for attention in ours.backbone.attentions:
        torch.nn.init.uniform_(attention.norm.weight, 0.3, 1.7)
    folder = write_model(ours, tmp_path / "theirs", "diffllama")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(0, 61, (2, 9))
    assert_same(theirs(tokens).logits, ours(tokens))
    assert_same(read_model(folder)(tokens), ours(tokens))
