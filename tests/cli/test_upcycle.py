"""`diffmm upcycle`, and `diffmm finetune` with the architecture of the weights."""

from pathlib import Path

import torch

import diffmm
from diffmm.cli.upcycle import largest_difference
from diffmm.interop.upcycle import upcycle
from diffmm.models.weights import load_model, save_model
from diffmm.recipes.settings import load_file


def softmax_weights(folder="softmax", **settings):
    model = diffmm.create_model("image/digits_tiny", attention="softmax", **settings)
    return save_model(model, folder)


def test_an_upcycled_model_is_fine_tuned_under_its_own_architecture(run, recipe):
    softmax_weights()
    result = run("upcycle", "softmax", "v1", "--to", "diff_v1")
    assert result.code == 0, result.err
    first, second = result.out.splitlines()
    assert first.startswith("v1/model.safetensors: diff_v1, ")
    assert second.startswith("largest difference of the outputs on random inputs: ")
    images = torch.rand(2, 1, 8, 8)
    softmax, twin = (load_model(path) for path in ("softmax", "v1"))
    assert torch.allclose(softmax(images), twin(images), atol=1e-4)

    path = recipe("image/digits_tiny")  # of diff_v2
    result = run("finetune", "--config", path, "--weights", "v1", "--run_dir", "tuned")
    assert result.code == 0, result.err
    lines = [line for line in result.out.splitlines() if line.startswith("architecture")]
    assert lines == [
        "architecture of the weights: num_heads 8, num_kv_heads 8, head_dim 16, attention diff_v1, "
        "feed_forward_width 170, lambda_init 0.5 and 1 more"
    ]
    saved = load_file(Path("tuned/config.yaml"))
    assert saved["vars"]["attention"] == "diff_v1"
    backbone = saved["model"]["init_args"]["model"]["init_args"]["config"]["backbone"]
    assert backbone["attention"] == "${vars.attention}"
    assert (backbone["num_heads"], backbone["headwise_norm"]) == (8, False)
    tuned = diffmm.load("tuned").model
    assert tuned.config.backbone.lambda_init == 0.5


def test_dex_and_back(run, recipe):
    softmax_weights()
    assert run("upcycle", "softmax", "dex", "--to", "dex").code == 0
    path = recipe("image/digits_tiny")
    result = run("finetune", "--config", path, "--weights", "dex", "--run_dir", "tuned")
    assert result.code == 0, result.err
    assert "architecture of the weights: " in result.out
    assert ", dex True" in result.out
    result = run("upcycle", "tuned", "plain", "--to", "softmax")
    assert result.code == 0, result.err
    images = torch.rand(2, 1, 8, 8)
    plain, tuned = load_model("plain"), diffmm.load("tuned").model
    assert not plain.config.backbone.dex
    assert torch.allclose(plain(images), tuned(images), atol=1e-5)


def test_what_the_recipe_already_has_is_not_mentioned(run, recipe):
    softmax_weights()
    path = recipe("image/digits_tiny", **{"vars.attention": "softmax"})
    result = run("finetune", "--config", path, "--weights", "softmax", "--print_config")
    assert result.code == 0, result.err
    assert "architecture" not in result.out + result.err


def test_gray_weights_with_small_patches_in_the_recipe_for_one_s_own_images(run):
    softmax_weights()
    command = ("finetune", "--config", "image/finetune", "--weights", "softmax", "--print_config")
    result = run(*command, "--vars.image_size", "8")  # no multiple of the recipe's patches of 16
    assert result.code == 0, result.err
    for setting in ("channels: 1", "patch_size: 2", "image_size: 8"):
        assert f" {setting}" in result.out
    assert "images have" not in result.err
    result = run(*command)
    assert "images have 224 x 224 pixels, those of the weights had 8 x 8: --vars" in result.err


def test_settings_of_the_command_line_are_kept(run, recipe):
    softmax_weights()
    path = recipe("image/digits_tiny")
    command = ("finetune", "--config", path, "--weights", "softmax", "--print_config")
    base = ("--model.model.config.backbone.rope_base", "50", "--vars.image_size", "16")
    result = run(*command, *base)
    assert result.code == 0, result.err
    assert (
        "architecture of the weights: attention softmax; images have 16 x 16 pixels, those of the "
        "weights had 8 x 8: --vars.image_size sets their size\n"
    ) in result.err
    assert "rope_base: 50" in result.out
    (mistake,) = run(*command, "--vars.attention", "diff_v1").mistakes
    assert mistake == (
        "softmax has the attention 'softmax', not 'diff_v1': leave out "
        "--vars.attention, or convert softmax weights first (diffmm upcycle)"
    )


def test_what_cannot_be_upcycled(run):
    softmax_weights()
    run("upcycle", "softmax", "v2", "--to", "diff_v2")
    before = sorted(Path().rglob("*"))
    for arguments, message in (
        (("softmax", "v2", "--to", "diff_v1"), "v2/model.safetensors exists"),
        (("v2", "w", "--to", "diff_v1"), "is DiffAttentionV2: only models with softmax"),
        (("softmax", "w", "--to", "diff_grouped"), "signal_per_noise must divide the 1 query"),
        (("softmax", "w", "--to", "softmax"), "has no dex that its output projection could"),
        (("softmax", "w.pt", "--to", "diff_v2"), "w.pt ends in .pt"),
        (("nowhere", "w", "--to", "diff_v2"), "there is no file of weights at nowhere"),
    ):
        result = run("upcycle", *arguments)
        assert result.code == 2
        (mistake,) = result.mistakes
        assert message in mistake
    assert sorted(Path().rglob("*")) == before


def test_nothing_is_written_if_outputs_differ(run, monkeypatch):
    softmax_weights()
    monkeypatch.setattr("diffmm.interop.upcycle.LAMBDA", 0.4)
    (mistake,) = run("upcycle", "softmax", "v1", "--to", "diff_v1").mistakes
    assert "twin differ by" in mistake
    assert not Path("v1").exists()


def test_all_towers_are_upcycled():
    """Also blocks that two of them share."""
    for shared_blocks in (0, 2):
        model = diffmm.create_model(
            "image_text/shapes_tiny", attention="softmax", shared_blocks=shared_blocks
        ).eval()
        twin = upcycle(model, "diff_v2")
        assert {tower.backbone.attention for tower in twin.config.towers.values()} == {"diff_v2"}
        assert largest_difference(model, twin) < 1e-5
        with torch.no_grad():
            twin.text.embedding.weight.mul_(torch.randn(64))
        assert largest_difference(model, twin) > 1e-2
