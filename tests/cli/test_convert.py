"""`diffmm convert`."""

import json
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffmm
from diffmm.interop import write_model
from diffmm.interop.conversion import read_contents
from diffmm.models import BackboneConfig, TextConfig, TextModel
from diffmm.models.job import Job, text_reader
from diffmm.models.weights import load_model, save_contents, save_model
from diffmm.tokenizers import load_tokenizer


def tokenizer_json():
    """The text of a tokenizer that starts every text with a token, as Llama's does."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<s>": 0, "</s>": 1, "<unk>": 2} | {chr(97 + n): 3 + n for n in range(26)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.add_special_tokens(["<s>", "</s>", "<unk>"])
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return inner.to_str()


BYTES = torch.ones(32, dtype=torch.int8)


def make_model(**changes):
    torch.manual_seed(0)
    backbone = {"dim": 32, "depth": 2, "num_heads": 4, "rope": "1d", "attention": "softmax"}
    config = TextConfig(vocab_size=40, max_length=24, backbone=BackboneConfig(**backbone | changes))
    return TextModel(config).eval()


@pytest.fixture
def llama(run):  # in the directory of the run
    """A folder with a Llama and its tokenizer, as others publish them."""
    model = make_model(num_kv_heads=2)
    reader = text_reader("mine")
    reader["init_args"] |= {"definition": tokenizer_json(), "start_ids": [0]}
    model.job = Job(reader=reader)
    return write_model(model, "llama", "llama")


def convert(source, target):
    return save_contents(read_contents(source), target)


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_there_and_back_gives_the_same_files(run, llama):
    result = run("convert", llama, "ours.safetensors")
    assert result.code == 0, result.err
    assert result.out == "ours.safetensors: diffmm, 23,904 parameters\n"
    result = run("convert", "ours.safetensors", "back", "--to", "llama")
    assert result.code == 0, result.err
    assert files("back") == files(llama)
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(files("back")) == names
    assert json.loads(files("back")["config.json"])["eos_token_id"] == 1


def test_the_tokenizer_serves_transformers(llama):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    assert tokenizer("abc")["input_ids"] == [0, 3, 4, 5]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_a_converted_model_writes_with_its_tokenizer(run, llama):
    assert run("convert", llama, "ours").code == 0
    shutil.rmtree(llama)
    result = run("generate", "ours", "abc", "--max-new-tokens", "8", "--temperature", "0")
    assert result.code == 0, result.err
    model = diffmm.load("ours")
    assert model.reader.read("abc")["tokens"].tolist() == [0, 3, 4, 5]
    ids = torch.tensor([[0, 3, 4, 5]])
    for _ in range(8):
        ids = torch.cat([ids, model.model(ids)[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == 1:
            break
    assert result.out == load_tokenizer("mine", tokenizer_json()).decode(ids[0, 4:].tolist()) + "\n"


TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{{ message.content }}<unk>{% endfor %}"""


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_what_ends_a_text_and_the_chat_template_are_kept(run, llama, place):
    settings = json.loads((llama / "config.json").read_text()) | {"eos_token_id": 1}
    (llama / "config.json").write_text(json.dumps(settings))
    # As published: the file for generation has the tokens that end an answer, too.
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    (llama / place).write_text(
        TEMPLATE if place.endswith("jinja") else json.dumps({"chat_template": TEMPLATE})
    )
    assert run("convert", llama, "ours").code == 0
    model = diffmm.load("ours")
    assert model.reader.end_ids == (1, 2)
    assert model.reader.chat.prompt([{"role": "user", "content": "ab"}]) == [0, 3, 4, 2]
    assert run("convert", "ours", "back", "--to", "llama").code == 0
    back = files("back")
    assert back["chat_template.jinja"].decode() == TEMPLATE
    assert json.loads(back["generation_config.json"])["eos_token_id"] == [1, 2]
    assert json.loads(back["config.json"])["bos_token_id"] == 0
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("back")
    assert theirs.generation_config.eos_token_id == [1, 2]
    tokenizer = transformers.AutoTokenizer.from_pretrained("back")
    messages = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(messages, return_dict=False) == [0, 3, 4, 2]


def test_generation_stops_at_every_token_that_ends_a_text(run, llama):
    reference = diffmm.load(convert(str(llama), "plain")).generate("abc", temperature=0)
    first = json.loads(tokenizer_json())["model"]["vocab"][reference[0]]
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, first]}))
    stopped = diffmm.load(convert(str(llama), "ours")).generate("abc", temperature=0)
    assert stopped == reference[0]
    assert len(reference) > 1


@pytest.mark.parametrize("value", [40, -1, [1, 40], "1", [True]])
def test_an_end_of_text_that_is_no_token_is_named(run, llama, value):
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    mistake = run("convert", llama, "ours").mistakes[0]
    assert mistake == f"llama has eos_token_id={value!r}, which must be ids in [0, 40)"


def test_weights_keep_their_dtype(run, llama):
    file = llama / "model.safetensors"
    save_file({name: x.bfloat16() for name, x in load_file(file).items()}, file)
    before = files(llama)["model.safetensors"]
    assert run("convert", file, "ours.safetensors").code == 0
    assert {x.dtype for x in load_file("ours.safetensors").values()} == {torch.bfloat16}
    assert run("convert", "ours.safetensors", "back", "--to", "llama").code == 0
    assert {n: x.tolist() for n, x in load_file("back/model.safetensors").items()} == {
        n: x.tolist() for n, x in load_file(file).items()
    }
    assert json.loads(files("back")["config.json"])["torch_dtype"] == "bfloat16"
    assert files(llama)["model.safetensors"] == before
    assert load_model("ours.safetensors").embedding.weight.dtype == torch.float32


def test_a_run_can_be_exported(run, recipe, text_changes):
    changes = text_changes | {
        "vars.attention": "softmax",
        "model.model.config.backbone.qk_norm": False,
    }
    result = run("fit", "--config", recipe("text/stdlib_tiny", **changes), "--name", "first")
    assert result.code == 0, result.err
    result = run("convert", "runs/recipe/first", "out", "--to", "llama")
    assert result.code == 0, result.err
    assert run("convert", "out", "back.safetensors").code == 0
    tokens = torch.arange(5)[None]
    expected = diffmm.load("runs/recipe/first").model(tokens)
    assert torch.equal(load_model("back.safetensors")(tokens), expected)


def test_shards_with_an_index_are_one_model(run, llama):
    tensors = load_file(llama / "model.safetensors")
    names = sorted(tensors)
    places = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(names)}
    for file in set(places.values()):
        save_file({n: tensors[n] for n in names if places[n] == file}, llama / file)
    assert run("convert", llama, "whole.safetensors").code == 0
    (llama / "model.safetensors").unlink()
    index = llama / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert run("convert", llama, "shards.safetensors").code == 0
    assert run("convert", index, "index.safetensors").code == 0
    first, second, third = (load_file(f"{n}.safetensors") for n in ("whole", "shards", "index"))
    assert first.keys() == second.keys() == third.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], third[name]) for name in first)
    assert "convert it first" in run("generate", llama, "a").mistakes[0]
    first = llama / places[names[0]]
    first.rename(llama / "elsewhere")
    (mistake,) = run("convert", llama, "never").mistakes
    assert mistake == f"{llama} has no file {first.name}, which its {index.name} names"
    save_file({names[0]: tensors[names[0]]}, first)
    (mistake,) = run("convert", llama, "never").mistakes
    assert mistake.startswith(f"{first} does not contain {names[2]}, {names[4]}, ")
    assert not Path("never").exists()


def rewrite(folder, **changes):
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(values))


def retensor(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda f: rewrite(f, model_type="lama"),
            "llama is a model of type 'lama', which diffmm cannot read; did you mean 'llama'?",
        ),
        (
            lambda f: rewrite(f, architectures=["LlamaForSequenceClassification"]),
            "llama contains a LlamaForSequenceClassification, but of llama diffmm reads only",
        ),
        (lambda f: rewrite(f, hidden_act="gelu"), "llama has hidden_act='gelu', but diffmm can "),
        (
            lambda f: rewrite(f, quantization_config={"bits": 4}, alibi=True),
            "llama has settings that diffmm does not know, and which may change the model's "
            "outputs: alibi=True, quantization_config={'bits': 4}",
        ),
        (lambda f: rewrite(f, hidden_size="32"), "llama: hidden_size must be an integer, got '32'"),
        (lambda f: rewrite(f, hidden_size=None), "llama has no setting 'hidden_size'"),
        (lambda f: rewrite(f, rms_norm_eps=-1), "norm_eps must be positive, got -1.0"),
        (
            lambda f: rewrite(f, vocab_size=41),
            "llama does not have the weights that its settings need: 1 of another shape "
            "(model.embed_tokens.weight (40, 32), needed (41, 32))",
        ),
        (
            lambda f: rewrite(f, vocab_size=10),
            "llama does not have the weights that its settings need: 1 of another shape",
        ),
        (
            lambda f: rewrite(f, num_hidden_layers=3),
            "llama does not have the weights that its settings need: 9 missing "
            "(model.layers.2.self_attn.q_proj.weight, ",
        ),
        (
            lambda f: rewrite(f, num_hidden_layers=1, attention_bias=True),
            "llama does not have the weights that its settings need: 4 missing "
            "(model.layers.0.self_attn.q_proj.bias, model.layers.0.self_attn.k_proj.bias, "
            "model.layers.0.self_attn.v_proj.bias, model.layers.0.self_attn.o_proj.bias); "
            "9 not expected (model.layers.1.",
        ),
        (
            lambda f: retensor(f, lambda t: t.update({"lm_head.weight": -t["model.norm.weight"]})),
            "llama has different lm_head.weight and model.embed_tokens.weight, but its settings ",
        ),
        (
            lambda f: retensor(f, lambda t: t.update({"model.norm.weight": BYTES})),
            "llama does not have the weights that its settings need: 1 of a dtype that cannot be "
            "converted (model.norm.weight int8)",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(files(f)["model.safetensors"][:-100]),
            "llama/model.safetensors is not a complete safetensors file: ",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"<html>not found</html>"),
            "llama/model.safetensors is not a complete safetensors file: ",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "llama has no model.safetensors and no model.safetensors.index.json, only "
            "pytorch_model.bin: save its weights as safetensors",
        ),
        (lambda f: (f / "config.json").write_text("{"), "llama/config.json is not JSON: "),
        (lambda f: (f / "config.json").write_text("[]"), "llama/config.json must contain an "),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "the definition of tokenizer 'llama'"),
    ],
)
def test_what_cannot_be_read_is_named_and_nothing_is_written(run, llama, break_it, message):
    break_it(llama)
    result = run("convert", llama, "target")
    assert result.code == 2
    assert len(result.mistakes) == 1
    assert result.mistakes[0].startswith(message), result.mistakes
    assert sorted(path.name for path in Path().iterdir()) == ["llama"]


def test_without_its_settings_a_file_of_weights_names_them(run, llama):
    (llama / "config.json").unlink()
    mistake = run("convert", llama, "target").mistakes[0]
    assert "there is no config.json beside it" in mistake


@pytest.fixture
def full_disk():
    """Files of at most 16 KiB: enough for settings, not for weights."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("target", ["new/folder", "new/file.safetensors"])
@pytest.mark.parametrize("to", ["diffmm", "llama"])
def test_a_full_disk_leaves_nothing_behind(run, llama, full_disk, target, to):
    result = run("convert", llama, target, "--to", to)
    assert result.code == 2
    is_whole = to == "llama" or target.endswith(".safetensors")  # or a folder that appears
    written = target if is_whole else f"{target}/model.safetensors"
    assert result.mistakes == [f"{written}: File too large"]
    assert sorted(path.name for path in Path().iterdir()) == ["llama"]


def test_old_files_with_derived_tensors_are_read(run, llama):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    retensor(llama, lambda t: t.update({name: torch.ones(4)}))
    retensor(llama, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert run("convert", llama, "target").code == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "diff_v2"}, "llama cannot hold attention='diff_v2'"),
        (
            {"norm": "layernorm", "output_gate": "head", "layer_scale": 0.1},
            "llama cannot hold norm='layernorm', layer_scale=0.1, output_gate='head'",
        ),
        ({"qkv_bias": True}, "llama cannot hold out_bias=False"),
    ],
)
def test_what_the_other_side_cannot_hold_is_named_and_nothing_is_written(run, changes, message):
    save_model(make_model(**changes), "ours.safetensors")
    result = run("convert", "ours.safetensors", "target", "--to", "llama")
    assert result.code == 2
    assert result.mistakes == [message]
    assert sorted(path.name for path in Path().iterdir()) == ["ours.safetensors"]


def test_training_settings_do_not_matter(run):
    model = make_model(dropout=0.1, drop_path=0.1, backend="reference", init_std=0.1)
    save_model(model, "ours.safetensors")
    assert run("convert", "ours.safetensors", "target", "--to", "llama").code == 0


def test_mistakes_of_arguments(run, llama, monkeypatch):
    save_model(make_model(), "ours.safetensors")
    Path("empty").mkdir()
    for arguments, message in (
        (("nowhere", "t"), "there is no file of weights at nowhere"),
        (("empty", "t"), "there is no file of weights at empty/model.safetensors"),
        ((llama, "t", "--to", "lama"), "--to must be one of 'diffmm', 'llama'"),
        ((llama, "t.bin"), "t.bin ends in .bin, but weights are saved as safetensors"),
        ((llama, "ours.safetensors"), "ours.safetensors exists already: give another target"),
        (("ours.safetensors", llama, "--to", "llama"), "llama exists already: give another target"),
    ):
        result = run("convert", *arguments)
        assert result.code == 2
        assert len(result.mistakes) == 1
        assert result.mistakes[0].startswith(message), result.mistakes
    assert run("convert", "ours.safetensors", "empty", "--to", "llama").code == 0


def test_a_hub_name_without_a_network_says_so(run, monkeypatch):
    import huggingface_hub

    def unreachable(name, **options):
        raise OSError(f"cannot reach the host of {name}\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    (mistake,) = run("convert", "someone/model", "target").mistakes
    assert mistake == (
        "there is no file or folder someone/model, and it cannot be fetched from the Hugging Face "
        "hub (cannot reach the host of someone/model): without a network, give a folder that has "
        "its config.json and safetensors"
    )


def test_a_hub_name_is_downloaded(run, llama, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, *, allow_patterns, **options):
        asked.append((name, allow_patterns))
        return str(llama.resolve())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert run("convert", "someone/model", "hub.safetensors").code == 0
    assert run("convert", llama, "local.safetensors").code == 0
    assert asked[0][0] == "someone/model"
    assert not any("bin" in pattern for pattern in asked[0][1])
    first, second = (load_file(f"{name}.safetensors") for name in ("hub", "local"))
    assert all(torch.equal(first[name], second[name]) for name in first)
