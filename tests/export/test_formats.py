"""Files of exported models: what is in them, and what is refused."""

import errno
import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._inductor import aoti_load_package
from torch._inductor import config as inductor

import diffmm
from diffmm.export import formats
from diffmm.export.formats import FORMATS, export
from diffmm.export.metadata import metadata_of
from diffmm.export.signature import signature_of
from diffmm.interop.conversion import read_model
from diffmm.models import (
    BackboneConfig,
    ImageConfig,
    ImageModel,
    MaskedAutoencoder,
    MaskedAutoencoderConfig,
    TextConfig,
    TextModel,
)
from diffmm.models.job import Job
from diffmm.models.tokenizer_files import byte_definition


def backbone(rope="2d", **options):
    return BackboneConfig(dim=16, depth=1, num_heads=2, rope=rope, **options)


def image_model(**options):
    config = ImageConfig(backbone=backbone(**options), image_size=8, patch_size=4, num_classes=2)
    model = ImageModel(config).eval()
    model.job = Job(class_names=("cat", "dog"), recipe="image/pets")
    return model


def text_model(**options):
    config = TextConfig(vocab_size=20, max_length=8, backbone=backbone("1d", **options))
    return TextModel(config).eval()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_program_of_torch_export(here):
    model = image_model()
    path, line = export(model, "cats", "pt2")
    assert path == Path("cats/model.pt2")
    assert line.startswith("inputs images; largest difference of the outputs on random inputs: 0")
    extra = {"diffmm": ""}
    program = torch.export.load(path, extra_files=extra).module()
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(program(images), model(images))
    about = json.loads(extra["diffmm"])
    assert about["inputs"] == [{"name": "images", "dtype": "float32", "shape": ["batch", 3, 8, 8]}]
    assert about["outputs"] == [{"name": "logits", "dtype": "float32", "shape": ["batch", 2]}]
    assert about["class_names"] == ["cat", "dog"]
    assert (about["diffmm"], about["recipe"]) == (diffmm.__version__, "image/pets")
    # The program needs no code of diffmm, and says nothing about the machine that wrote it.
    with zipfile.ZipFile(path) as files:
        contents = b"".join(files.read(name) for name in files.namelist() if "extra/" not in name)
    assert b"diffmm" not in contents
    assert str(Path(diffmm.__file__).parent).encode() not in path.read_bytes()
    assert names(here) == ["cats", "cats/model.pt2"]


def test_weights_that_diffmm_loads(here):
    model = image_model()
    path, line = export(model, "cats.safetensors", "safetensors")
    assert line.startswith(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    images = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(diffmm.load(path).model(images), model(images))


def test_a_folder_for_transformers(here):
    """tests/interop loads such folders with transformers."""
    model = text_model(attention="softmax", num_kv_heads=1)
    path, line = export(model, "theirs", "hf")
    assert line == "a model of type llama, read by transformers"
    about = json.loads((path / "config.json").read_text())
    assert (about["model_type"], about["architectures"]) == ("llama", ["LlamaForCausalLM"])
    tokens = torch.randint(20, (2, 5))
    torch.testing.assert_close(read_model(path)(tokens), model(tokens))


def test_what_no_class_of_transformers_holds(here):
    with pytest.raises(ValueError, match="llama cannot hold .*diff_v2.*; .*gemma2 cannot hold"):
        export(text_model(attention="diff_v2"), "theirs", "hf")
    with pytest.raises(ValueError, match="no class for an ImageModel"):
        export(image_model(), "theirs", "hf")
    assert names(here) == []


@pytest.mark.parametrize(
    ("target", "to", "message"),
    [
        (
            "a.pt2",
            "onnx",
            "a.pt2 ends in .pt2, but the format onnx writes a name that ends in .on",
        ),
        ("a.onnx", "hf", "a.onnx ends in .onnx, but the format hf writes a folder"),
        ("there.onnx", "onnx", "there.onnx exists already: give another target, or remove it"),
        ("full", "hf", "full exists already"),
        ("file", "pt2", "file is a file, not a folder: give another target"),
        ("full", "safetensors", "full/model.safetensors exists already"),
    ],
)
def test_targets_that_are_refused(here, target, to, message):
    (here / "there.onnx").write_text("mine")
    (here / "file").write_text("mine")
    (here / "full").mkdir()
    (here / "full/model.safetensors").write_text("mine")
    before = names(here)
    with pytest.raises(ValueError, match=message):
        export(text_model(attention="softmax"), target, to)
    assert names(here) == before
    assert (here / "there.onnx").read_text() == "mine"


def test_models_and_options_that_are_refused(here):
    encoder = replace(image_model().config, num_classes=0)
    config = MaskedAutoencoderConfig(encoder=encoder, decoder=backbone())
    with pytest.raises(ValueError, match="a MaskedAutoencoder cannot be exported as a program"):
        export(MaskedAutoencoder(config).eval(), "a.pt2", "pt2")
    with pytest.raises(ValueError, match="cache=False is for programs, and safetensors has weight"):
        export(text_model(), "a", "safetensors", cache=False)
    encoder = TextModel(replace(text_model().config, causal=False)).eval()
    for model in (image_model(), encoder):
        with pytest.raises(ValueError, match="cache=False is for text decoders, and the model is"):
            export(model, "a.pt2", "pt2", cache=False)
    with pytest.raises(ValueError, match="is in training mode: call model.eval"):
        export(image_model().train(), "a.pt2", "pt2")
    with pytest.raises(ValueError, match="to must be one of 'onnx', .*, got 'tflite'"):
        export(image_model(), "a", "tflite")
    assert names(here) == []


def test_a_missing_package(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"need more packages .*onnxscript.*install diffmm\[onnx"):
        export(image_model(), "new/folder/a.onnx", "onnx")
    assert names(here) == []


def nan_in_keys(logits, keys, values):
    keys[0, 0, 0] = torch.nan
    return logits, keys, values


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (image_model, lambda logits: logits * 1.001, "by 1.0e-03 of the largest one"),
        (text_model, nan_in_keys, "by nan of the largest one"),
        (image_model, lambda logits: logits[:1], r"output logits .* has shape \(1, 2\), .* \(3, 2"),
    ],
)
def test_a_program_with_other_results_is_not_written(here, monkeypatch, model, change, message):
    def write(signature, file, metadata):
        def program(*inputs):
            results = signature.module(*inputs)
            return change(*results) if isinstance(results, tuple) else change(results)

        file.write_text("half")
        return program

    monkeypatch.setitem(
        FORMATS, "pt2", formats.Format("model.pt2", formats.writer_of_programs(write))
    )
    with pytest.raises(ValueError, match=message):
        export(model(), "new/a.pt2", "pt2")
    assert names(here) == []


@pytest.mark.parametrize("to", ["pt2", "aoti"])
def test_a_full_disk_is_an_error_that_names_the_file(here, monkeypatch, to):
    """If torch cannot write the file itself, it ends the process."""

    def compile_nothing(program, *, package_path, inductor_configs):
        package_path.write(b"program")

    def onto_full_disk(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", onto_full_disk)
    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", compile_nothing)
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "c++")
    with pytest.raises(OSError, match="No space left on device: 'new/a.pt2'"):
        export(image_model(), "new/a.pt2", to)
    assert names(here) == []


def test_no_file_beside_it_is_overwritten(here, monkeypatch):
    def write(signature, file, metadata):
        file.write_text("whole")
        file.with_name(f"{file.name}.data").write_text("weights")
        return signature.module

    form = formats.Format("model.pt2", formats.writer_of_programs(write))
    monkeypatch.setitem(FORMATS, "pt2", form)
    (here / "a.pt2.data").write_text("mine")
    with pytest.raises(ValueError, match="a.pt2.data exists already"):
        export(image_model(), "a.pt2", "pt2")
    assert names(here) == ["a.pt2.data"]
    assert (here / "a.pt2.data").read_text() == "mine"
    export(image_model(), "b.pt2", "pt2")
    assert names(here) == ["a.pt2.data", "b.pt2", "b.pt2.data"]


def text_metadata(**arguments):
    """The metadata of a text model with these arguments of its reader."""
    model = text_model()
    reader = {"class_path": "datamodules.text.TextReader", "init_args": arguments}
    return metadata_of(model, signature_of(model), Job(reader))


def test_metadata_of_texts(here):
    about = text_metadata(tokenizer="bytes", definition=None)
    assert (about["eos_id"], about["stop_ids"]) == (256, [256])
    about = text_metadata(tokenizer="bytes", stop_ids=(260, 256))
    assert (about["eos_id"], about["stop_ids"]) == (256, [260, 256])
    assert about["axes"]["past + tokens"] == [1, 8]
    axes = {axis for port in about["outputs"] for axis in port["shape"] if isinstance(axis, str)}
    assert axes == {"batch", "tokens", "past + tokens"} < set(about["axes"])

    # The file contains the tokenizer, although the job has only its name.
    (here / "tokenizer.json").write_text(byte_definition())
    about = text_metadata(tokenizer="tokenizer.json")
    assert (about["eos_id"], about["stop_ids"]) == (256, [256])
    definition = about["reader"]["init_args"]["definition"]
    assert json.loads(definition) == json.loads(byte_definition())
    about = text_metadata(
        tokenizer="its own", definition=byte_definition().replace("<|endoftext|>", "<|other|>")
    )
    assert (about["eos_id"], about["stop_ids"]) == (None, [])
    with pytest.raises(ValueError, match=r"tokenizer 'gone.json', which cannot be loaded .*gone.j"):
        text_metadata(tokenizer="gone.json")
    model = text_model()
    about = metadata_of(model, signature_of(model), Job())
    assert (about["eos_id"], about["stop_ids"]) == (None, [])


def test_machine_code(here):
    # Little code compiles sooner, and so does code that is not optimized.
    model = image_model(attention="softmax")
    settings = {
        "aot_inductor.compile_wrapper_opt_level": "O0",
        "cpp.vec_isa_ok": False,
        "cpp_cache_precompile_headers": False,
        "pattern_matcher": False,
    }
    with inductor.patch(settings):
        path, line = export(model, "cats.pt2", "aoti")
    assert line.startswith("inputs images; largest difference")
    program = aoti_load_package(str(path))
    for batch in (1, 5):
        images = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(program(images), model(images))
    assert json.loads(program.get_metadata()["diffmm"])["class_names"] == ["cat", "dog"]


def test_machine_code_without_a_compiler(here):
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ValueError, match="needs a C\\+\\+ compiler, .*no-such.* use the format pt2"),
    ):
        export(image_model(), "new/cats.pt2", "aoti")
    assert names(here) == []
