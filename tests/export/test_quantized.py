"""Weights of 8 and 4 bits: their values, their files, and the command."""

import re
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.testing._internal.two_tensor import TwoTensor

import diffmm
from diffmm import renamed
from diffmm.analysis.batches import evaluate
from diffmm.cli import main
from diffmm.cli.compare_maps import validation_data
from diffmm.export.formats import export
from diffmm.export.quantized import BITS, group_size, load_quantized, quantize, save_quantized
from diffmm.models import BackboneConfig, TextConfig, TextModel, hub_files
from diffmm.models.job import Job
from diffmm.models.quantized_file import pack, unpack
from diffmm.models.weights import save_model
from diffmm.recipes.catalog import find_recipe
from diffmm.recipes.settings import load_file


def text_model(depth=1, **options):
    backbone = BackboneConfig(dim=32, depth=depth, num_heads=4, rope="1d", attention="diff_v2")
    return TextModel(TextConfig(vocab_size=40, max_length=16, backbone=backbone, **options)).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(12).view(2, 6))


@pytest.mark.parametrize("kind", BITS)
def test_weights_are_rounded_to_multiples_of_a_scale(kind):
    model = text_model()
    quantized = quantize(model, kind)
    for name, size in (("q_proj", 32), ("out_proj", 32)):
        weight = getattr(model.backbone.blocks[0].attention, name).weight.detach()
        found = getattr(quantized.backbone.blocks[0].attention, name).weight.dequantize()
        groups = weight.unflatten(1, (-1, size))
        scale = groups.abs().amax(dim=2, keepdim=True) / (2 ** (BITS[kind] - 1) - 0.5)
        steps = found.unflatten(1, (-1, size)) / scale
        torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
        # The largest may be clipped by half a step more.
        assert ((found.unflatten(1, (-1, size)) - groups).abs() <= 0.501 * scale).all()
    projection = quantized.backbone.blocks[0].attention.lambda_proj.weight
    assert projection is not model.backbone.blocks[0].attention.lambda_proj.weight
    torch.testing.assert_close(projection, model.backbone.blocks[0].attention.lambda_proj.weight)
    assert not hasattr(model.head.weight.data, "qdata")  # the model itself is as before


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("tied", [True, False])
def test_files_have_the_results_of_the_quantized_model(kind, tied, tmp_path):
    model = text_model(tie_embeddings=tied)
    quantized = quantize(model, kind)
    assert (quantized.head.weight is quantized.embedding.weight) == tied
    wanted = logits(quantized)
    assert 0 < (wanted - logits(model)).abs().max() < (0.01 if kind == "int8" else 0.2)
    file = save_quantized(quantized, tmp_path)
    as_floats, as_integers = diffmm.load(tmp_path).model, load_quantized(tmp_path)
    for read in (as_floats, as_integers):
        torch.testing.assert_close(logits(read), wanted, atol=1e-6, rtol=1e-6)
        assert (read.head.weight is read.embedding.weight) == tied
    assert as_floats.head.weight.dtype == torch.float32
    assert as_integers.head.weight.qdata.dtype == torch.int8
    assert hasattr(as_integers.embedding.weight.data, "qdata") == tied
    with safe_open(file, framework="pt") as opened:
        assert ("head.weight" in opened.keys()) == (not tied)  # noqa: SIM118
        stored = opened.get_tensor("embedding.weight" if tied else "head.weight")
    assert stored.numel() * stored.element_size() == 40 * 32 * BITS[kind] // 8


def test_packing_of_four_bits():
    values = torch.randint(-8, 8, (3, 7), dtype=torch.int8)
    packed = pack(values, 4)
    assert packed.shape == (3, 4)
    assert torch.equal(unpack(packed, 4, 7), values)
    assert packed[0, 0] == (int(values[0, 0]) & 15) + 16 * (int(values[0, 1]) & 15)


def test_sizes_of_groups():
    assert [group_size(width, 4) for width in (64, 96, 148, 170, 6, 71)] == [32, 32, 37, 34, 6, 71]
    assert group_size(148, 8) == 148


def test_damaged_files(tmp_path):
    file = save_quantized(quantize(text_model(), "int4"), tmp_path / "a.safetensors")
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    name = "backbone.blocks.0.attention.q_proj.weight"
    for changes, message in (
        ({f"{name}_scale": None}, "incomplete .*q_proj.weight_scale"),
        ({name: weights[name][:, :9].contiguous()}, "q_proj.weight of width 32 does not fit"),
        ({f"{name}_scale": torch.ones(1, 1)}, r"does not fit its tensor .* scales \(1, 1\)"),
        ({f"{name}_scale": torch.ones(64, 0)}, r"does not fit its tensor .* scales \(64, 0\)"),
    ):
        changed = {n: t for n, t in (weights | changes).items() if t is not None}
        save_file(changed, file, metadata=metadata)
        with pytest.raises(ValueError, match=message):
            diffmm.load(file)
    with pytest.raises(ValueError, match="has no quantized weights: use diffmm.load"):
        load_quantized(save_model(text_model(), tmp_path / "plain.safetensors"))


def test_names_of_the_hub_and_old_names_of_weights(tmp_path, monkeypatch):
    quantized = quantize(text_model(), "int4")
    file = save_quantized(quantized, tmp_path)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    # As if `q_proj` had been called `to_q` when the file was written.
    old = {name.replace("q_proj", "to_q"): tensor for name, tensor in weights.items()}
    metadata["quantization"] = metadata["quantization"].replace("q_proj", "to_q")
    save_file(old, file, metadata=metadata)
    monkeypatch.setattr(
        renamed, "weight_name", lambda name: name.replace("to_q", "q_proj"), raising=True
    )
    fetched = []
    monkeypatch.setattr(hub_files, "fetch", lambda name, **_: fetched.append(name) or tmp_path)
    found = load_quantized("user/name")
    assert fetched == ["user/name"]
    torch.testing.assert_close(logits(found), logits(quantized), atol=1e-6, rtol=1e-6)
    assert hasattr(found.backbone.blocks[0].attention.q_proj.weight.data, "qdata")


def quantized_by(num_bits, **options):
    """A model that torchao quantized with other settings than `quantize`: for each number of bits,
    the linear layers of one block."""
    import torchao.quantization as tools

    model = text_model(depth=len(num_bits))
    for number, bits in enumerate(num_bits):
        config = tools.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"), granularity=tools.PerAxis(0), **options
        )
        part = model.backbone.blocks[number]
        tools.quantize_(part, config, lambda module, name: name.endswith(("q_proj", "out_proj")))
    return model


def test_other_quantized_models_are_refused(tmp_path):
    from torchao.quantization.quant_primitives import MappingType

    asymmetric = quantized_by([8], mapping_type=MappingType.ASYMMETRIC)
    other = text_model()
    other.head.weight = torch.nn.Parameter(TwoTensor(*[other.head.weight.data] * 2))
    for model, message in (
        (asymmetric, "q_proj.weight has a zero point other than 0: only models that .*quantize re"),
        (quantized_by([8, 4]), "the same number of bits, got torch.int4 and torch.int8"),
        (quantized_by([2]), "q_proj.weight has integers of type torch.int2"),
        (other, "head.weight is a tensor of class TwoTensor"),
    ):
        with pytest.raises(ValueError, match=message):
            export(model, tmp_path / "new", "safetensors")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="the same number of bits, got none"):
        save_quantized(text_model(), tmp_path / "new")


def test_what_is_refused(tmp_path, monkeypatch):
    quantized = quantize(text_model(), "int8")
    with pytest.raises(ValueError, match="the format onnx cannot hold quantized weights: use safe"):
        export(quantized, tmp_path / "a.onnx", "onnx")
    with pytest.raises(ValueError, match="kind must be one of 'int8', 'int4', got 'int2'"):
        quantize(text_model(), "int2")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"need torchao .*: install diffmm\[torchao\]"):
        quantize(text_model(), "int8")


def test_the_command_prints_the_loss_before_and_after(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = diffmm.create_model("image/digits_tiny", depth=1).eval()
    model.job = Job(recipe="image/digits_tiny")
    save_model(model, "plain")
    arguments = ["export", "plain", "small", "--to", "safetensors", "--quantize", "int4"]
    assert main([*arguments, "--limit", "2"]) == 0
    found = re.fullmatch(
        r"on 2 batches of the validation data: "
        r"loss (\S+) -> (\S+), accuracy (\S+) -> (\S+)\n"
        r"small/model.safetensors: safetensors, [\d,]+ parameters, [\d,]+ bytes, .*\n",
        capsys.readouterr().out,
    )
    recipe = find_recipe("image/digits_tiny")
    loader = validation_data(load_file(recipe), recipe.parent).val_dataloader()
    batches = [batch for batch, _ in zip(loader, range(2), strict=False)]
    before, after = (evaluate(diffmm.load(path).model, batches) for path in ("plain", "small"))
    wanted = [part[name] for name in ("loss", "accuracy") for part in (before, after)]
    assert list(map(float, found.groups())) == pytest.approx(wanted, abs=2e-4)
    assert before["loss"] != after["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "onyx"), "--to must be one of .*, got 'onyx'; did you mean 'onnx'?"),
        (("--to", "onnx", "--quantize", "int8"), "--to onnx cannot hold quantized weights"),
        (("--to", "safetensors", "--quantize", "int3"), "--quantize must be one of"),
        (("--to", "hf", "--no-cache"), "--no-cache is for programs, and --to hf has weights only"),
        (("--to", "safetensors", "--limit", "3"), "--limit 3 is for --quantize: leave it out"),
        (("--to", "onnx", "--device", "cuda"), "--device cuda is for --to pt2, --to aoti and --q"),
        (("--to", "safetensors", "--quantize", "int8", "--limit", "-1"), "at least 0, got -1"),
        (("--to", "safetensors", "--quantize", "int8"), "give the run, or --limit 0"),
    ],
)
def test_options_that_are_refused(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(text_model(), "plain.safetensors")
    assert main(["export", "plain.safetensors", "new", *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["plain.safetensors"]


@pytest.mark.parametrize("recipe", ["my/own", "mine.yaml"])
def test_recipes_that_are_not_shipped_are_not_opened(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(find_recipe("image/digits_tiny").read_text())
    model = diffmm.create_model("image/digits_tiny", depth=1).eval()
    model.job = Job(recipe=recipe)
    save_model(model, "plain")
    assert main(["export", "plain", "new", "--to", "safetensors", "--quantize", "int8"]) == 2
    assert re.search("does not name the shipped .* or --limit 0", capsys.readouterr().err)
    # Only a decoder has a cache to do without.
    assert main(["export", "plain", "new", "--to", "onnx", "--no-cache"]) == 2
    assert re.search("--no-cache is for text decoders", capsys.readouterr().err)
    assert not (tmp_path / "new").exists()
