"""Low-rank adapters by PEFT: training, checkpoints, and files with merged weights."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

import diffmm
from diffmm.models.adapters import merged
from diffmm.models.weights import load_model, load_weights, save_model
from diffmm.training import (
    Classification,
    FineTuneConfig,
    LoRAConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from diffmm.training.finetuning import add_adapters


def digits_model(**settings):
    torch.manual_seed(0)
    return diffmm.create_model("image/digits_tiny", attention="diff_v2", **settings)


def task_of(model, **finetune):
    return Classification(
        model,
        OptimizerConfig(learning_rate=1e-2),
        ScheduleConfig(total_steps=6),
        finetune=FineTuneConfig(**finetune),
    )


def randomized(model):
    """Give the adapters of a model an effect."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


IMAGES = torch.linspace(-1, 1, 2 * 64).view(2, 1, 8, 8)


@pytest.mark.parametrize("new_head", [False, True])
def test_only_adapters_and_a_new_head_are_trained(new_head):
    model = digits_model()
    before = model(IMAGES)
    lora = LoRAConfig(rank=2, targets=("q_proj", "down_proj"))
    task = task_of(model, lora=lora, new_head=new_head)
    assert torch.allclose(task.model(IMAGES), before, atol=1e-6)
    trained = {n for n, p in task.model.named_parameters() if p.requires_grad}
    adapters = {
        f"backbone.blocks.{i}.{layer}.lora_{side}.default.weight"
        for i in range(len(model.backbone.blocks))
        for layer in ("attention.q_proj", "feed_forward.down_proj")
        for side in "AB"
    }
    assert trained == adapters | ({"head.weight", "head.bias"} if new_head else set())


def test_files_have_the_merged_weights(tmp_path):
    model = digits_model()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    task = task_of(model, lora=LoRAConfig(rank=2, alpha=3.0))
    wanted = randomized(task.model.eval())(IMAGES)
    saved = load_model(save_model(task.model, tmp_path / "merged"))
    assert set(saved.state_dict()) == set(plain)
    assert torch.allclose(saved(IMAGES), wanted, atol=1e-5)
    assert not torch.allclose(digits_model().eval()(IMAGES), wanted, atol=1e-2)
    changed = {n for n, tensor in saved.state_dict().items() if not torch.equal(tensor, plain[n])}
    layers = {name.split(".")[-2] for name in changed}
    assert layers == {"q_proj", "k_proj", "v_proj", "out_proj"}
    # Saving leaves the adapters as they are.
    assert torch.equal(task.model(IMAGES), wanted)


def test_weights_are_loaded_under_adapters(tmp_path):
    source = digits_model()
    torch.nn.init.normal_(source.backbone.blocks[0].attention.q_proj.weight)
    file = save_model(source, tmp_path / "source")
    task = task_of(digits_model(), lora=LoRAConfig())
    assert load_weights(task.model, file) == []
    assert torch.allclose(task.model.eval()(IMAGES), source.eval()(IMAGES), atol=1e-4)
    with pytest.raises(
        ValueError, match=r"does not fit ImageModel: .*head.weight \(7, 64\), needed"
    ):
        load_weights(task.model, save_model(digits_model(num_classes=7), tmp_path / "other"))


@pytest.mark.parametrize("wrapped", [False, True])
def test_adapters_that_the_user_put_in_are_merged(wrapped, tmp_path):
    model, adapters = digits_model(), LoraConfig(r=2, lora_alpha=8, target_modules=["v_proj"])
    whole = (get_peft_model if wrapped else _injected)(model, adapters)
    wanted = randomized(whole.eval())(IMAGES)
    saved = load_model(save_model(whole, tmp_path / "merged"))
    assert torch.allclose(saved(IMAGES), wanted, atol=1e-5)


def _injected(model, adapters):
    return inject_adapter_in_model(adapters, model)


def test_layers_that_peft_trains_as_a_whole_are_saved(tmp_path):
    adapters = LoraConfig(r=2, lora_alpha=8, target_modules=["v_proj"], modules_to_save=["head"])
    whole = randomized(get_peft_model(digits_model(), adapters).eval())
    for name, parameter in whole.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    wanted = whole(IMAGES)
    saved = load_model(save_model(whole, tmp_path / "merged"))
    assert torch.allclose(saved(IMAGES), wanted, atol=1e-4)


def test_damaged_adapters_are_told():
    weights = {
        "a.base_layer.weight": torch.zeros(4, 6),
        "a.lora_A.default.weight": torch.zeros(2, 6),
        "a.lora_B.default.weight": torch.zeros(4, 2),
    }
    assert set(merged(weights, 1.0)) == {"a.weight"}
    with pytest.raises(ValueError, match="a has no lora_A or no lora_B"):
        merged({n: w for n, w in weights.items() if "lora_A" not in n}, 1.0)
    weights["a.lora_A.default.weight"] = torch.zeros(3, 6)
    with pytest.raises(ValueError, match=r"has the shapes \(3, 6\) and \(4, 2\), its weight"):
        merged(weights, 1.0)
    with pytest.raises(ValueError, match="is not a weight of LoRA's default adapter"):
        merged({"a.lora_A.mine.weight": torch.zeros(2, 6)}, 1.0)


def test_adapters_that_cannot_be_merged_are_refused(tmp_path):
    with_dora = LoraConfig(r=2, target_modules=["v_proj"], use_dora=True)
    named = LoraConfig(r=2, target_modules=["v_proj"])
    patterns = LoraConfig(r=2, target_modules=["v_proj", "q_proj"], rank_pattern={"q_proj": 4})
    for adapters, name, message in (
        (with_dora, "default", "other than LoRA under the name 'default'"),
        (named, "mine", "other than LoRA under the name 'default'"),
        (patterns, "default", "the scales 2.0 and 4.0"),
    ):
        model = inject_adapter_in_model(adapters, digits_model(), adapter_name=name)
        with pytest.raises(ValueError, match=message):
            save_model(model, tmp_path / "merged")
    model = inject_adapter_in_model(named, digits_model())
    for layer in model.modules():
        if hasattr(layer, "base_layer"):
            layer.merge()
    with pytest.raises(ValueError, match="already merged"):
        save_model(model, tmp_path / "merged")
    model = inject_adapter_in_model(named, digits_model())
    for layer in model.modules():
        if hasattr(layer, "base_layer"):
            layer.enable_adapters(False)
    with pytest.raises(ValueError, match="is disabled: enable it"):
        save_model(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be above 0, got 0.0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"targets": ()}, "targets must name at least one kind of linear layer"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**settings)


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="drop one of them"):
        FineTuneConfig(lora=LoRAConfig(), freeze=1)
    tied = diffmm.create_model("text/stdlib_tiny", tie_embeddings=True)
    with pytest.raises(ValueError, match="would train the embedding, to which TextModel ties"):
        add_adapters(tied, FineTuneConfig(lora=LoRAConfig()))
    add_adapters(tied, FineTuneConfig(lora=LoRAConfig(), new_head=False))
    with pytest.raises(ValueError, match=r"'qkv', but the linear layers .* are q_proj, k_proj"):
        task_of(digits_model(), lora=LoRAConfig(targets=("qkv",)))
