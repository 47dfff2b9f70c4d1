"""`diffmm generate`."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch

import diffmm
from diffmm.checkpoint_folders import find_state
from diffmm.models import BackboneConfig, ImageConfig, ImageModel
from diffmm.models.generation import generate
from diffmm.models.weights import load_model, save_model
from diffmm.tokenizers import load_tokenizer


@pytest.fixture
def trained(run, recipe, text_changes):
    """The directory of a short run of a text model."""
    path = recipe("text/stdlib_tiny", **text_changes)
    result = run("fit", "--config", path, "--name", "first")
    assert result.code == 0, result.err
    return Path("runs/recipe/first")


def test_writes_what_the_model_generates(run, trained):
    checkpoint = trained / "checkpoints" / "step_00000002"
    result = run("generate", checkpoint, "Text ", "--max-new-tokens", "12", "--temperature", "0")
    assert result.code == 0, result.err
    tokenizer = load_tokenizer("bytes")
    ids = generate(
        load_model(checkpoint),
        torch.tensor([tokenizer.encode("Text ")]),
        max_new_tokens=12,
        temperature=0,
        stop_ids=[tokenizer.eos_id],
    )
    assert result.out == tokenizer.decode(ids[0].tolist()) + "\n"


def test_a_run_directory_and_exported_weights_serve_too(run, trained, tmp_path):
    arguments = ("Text ", "--max-new-tokens", "8", "--seed", "3", "--top-k", "5", "--top-p", "0.9")
    first = run("generate", trained, *arguments)
    assert first.code == 0, first.err
    assert run("generate", trained, *arguments).out == first.out
    saved = save_model(load_model(trained / "checkpoints" / "step_00000002"), tmp_path / "exported")
    # The model knows its tokenizer, and another name of the same one is accepted.
    assert run("generate", saved.parent, *arguments).out == first.out
    assert run("generate", saved.parent, *arguments, "--tokenizer", "bytes").out == first.out
    # Guesses change nothing.
    guessed = run("generate", trained, *arguments, "--prompt-lookup-num-tokens", "4")
    assert guessed.out == first.out
    wrong = run("generate", trained, "a", "--prompt-lookup-num-tokens", "0")
    assert wrong.mistakes == ["prompt_lookup_num_tokens must be an integer of at least 1, got 0"]
    others = {run("generate", trained, *arguments[:3], "--seed", str(s)).out for s in range(5)}
    assert len(others) > 1


def test_a_loaded_run_writes_the_same(run, trained):
    printed = run("generate", trained, "Text ", "--max-new-tokens", "9", "--seed", "2").out
    loaded = diffmm.load(trained)
    assert f"{loaded.generate('Text ', max_new_tokens=9, seed=2)}\n" == printed
    assert "".join(loaded.write("Text ", max_new_tokens=9, seed=2)) == printed[:-1]
    assert loaded.generate("Text ", max_new_tokens=9, seed=np.int64(2)) == printed[:-1]
    assert loaded.predict("Text ") == loaded.generate("Text ")
    assert loaded.predict(["Text ", "a"]) == [loaded.generate("Text "), loaded.generate("a")]
    maps = loaded.attention_maps("Text ")
    assert [part.combined.shape for part in maps] == [(1, 4, 5, 5)] * 2
    assert loaded.job.recipe == "recipe"
    with pytest.raises(ValueError, match="a prompt must be a string or a Path, got int"):
        loaded.predict(3)
    with pytest.raises(ValueError, match=r"has no classes; it generates text \(generate\)"):
        loaded.stream(["Text "])


def test_the_prompt_may_come_from_stdin(run, trained, monkeypatch):
    greedy = ("--max-new-tokens", "5", "--temperature", "0")
    monkeypatch.setattr("sys.stdin", io.StringIO("Text number"))
    assert (
        run("generate", trained, "-", *greedy).out
        == run("generate", trained, "Text number", *greedy).out
    )


def test_a_checkpoint_from_before_jobs_names_its_tokenizer(run, trained, tmp_path):
    state = torch.load(find_state(trained), weights_only=True)
    assert state.pop("job")["reader"]["init_args"]["tokenizer"] == "bytes"
    greedy = ("Text ", "--max-new-tokens", "5", "--temperature", "0")
    torch.save({**state, "tokenizer": "bytes"}, "old.ckpt")
    assert run("generate", "old.ckpt", *greedy).out == run("generate", trained, *greedy).out
    torch.save(state, "older.ckpt")
    (mistake,) = run("generate", "older.ckpt", *greedy).mistakes
    assert mistake == "older.ckpt names no tokenizer: give one (--tokenizer bytes)"


def test_mistakes(run, trained, tmp_path):
    backbone = BackboneConfig(dim=32, depth=1, num_heads=4, rope="2d")
    image = save_model(
        ImageModel(ImageConfig(backbone=backbone, image_size=16)), tmp_path / "image"
    )
    model = load_model(trained / "checkpoints" / "step_00000002")
    model.job = None
    text = save_model(model, tmp_path / "text")
    for arguments, message in (
        (("nowhere.ckpt", "a"), "there is no file of weights at nowhere.ckpt"),
        ((image, "a"), f"{image} contains an ImageModel: only text models generate text"),
        ((text, "a"), f"{text} names no tokenizer: give one (--tokenizer bytes)"),
        ((trained, ""), "the prompt is empty: it needs at least one character"),
        (
            (trained, "a\udcff"),
            "the prompt is not UTF-8 text, from character 1 on: convert it first (iconv -t UTF-8)",
        ),
        (
            (trained, "a", "--temperature", "-1"),
            "temperature must be finite and at least 0 (greedy)",
        ),
        (
            (trained, "a", "--temperature", "nan"),
            "temperature must be finite and at least 0 (greedy)",
        ),
        (
            (trained, "a", "--temperature", "inf"),
            "temperature must be finite and at least 0 (greedy)",
        ),
        ((trained, "a", "--top-p", "nan"), "top_p must be in (0, 1], got nan"),
        ((trained, "a", "--top-k", "-3"), "top_k must be an integer of at least 1, got -3"),
        ((trained, "a", "--max-new-tokens", "0"), "max_new_tokens must be an integer"),
        ((trained, "a", "--seed", str(2**64)), f"seed must be a 64-bit integer, got {2**64}"),
        ((trained, "a", "--device", "cuda:99"), "device 'cuda:99' is not available"),
        ((trained, "a", "--max-new-tokens", "999"), "a prompt of 1 token plus max_new_tokens=999"),
        ((trained, "a" * 999), "a prompt of 999 tokens leaves no room for new tokens in"),
    ):
        result = run("generate", *arguments)
        assert result.code == 2
        assert len(result.mistakes) == 1
        assert result.mistakes[0].startswith(message), result.mistakes
