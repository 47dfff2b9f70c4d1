"""Decoders as models of transformers: loaded from their folders, generating, trained, served."""

import functools
import json
import runpy
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    DataCollatorForLanguageModeling,
    StaticCache,
    Trainer,
    TrainingArguments,
)

import diffmm
from diffmm.interop.transformers_models import DiffmmConfig, DiffmmForCausalLM
from diffmm.layers.attention import ATTENTIONS
from diffmm.models import BackboneConfig, ImageConfig, ImageModel, TextConfig, TextModel
from diffmm.models.generation import generate
from diffmm.models.job import Job, text_reader
from diffmm.ops import AttentionMask

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 10}
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"


def decoder(attention="diff_v1", text=None, **settings):
    groups = 1 if attention == "diff_grouped" else 2
    backbone = BackboneConfig(
        **{"dim": 32, "depth": 2, "num_heads": 4, "num_kv_heads": groups, "init_std": 0.2},
        **{"rope": "1d", "attention": attention, **settings},
    )
    model = TextModel(TextConfig(vocab_size=260, max_length=48, backbone=backbone, **(text or {})))
    model.job = Job(reader=text_reader("bytes"))
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    """Saves a decoder and loads it with transformers."""

    def load(ours, **options):
        ours.save_pretrained(tmp_path / "saved")
        return AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **options)

    return load


def prompts(batch=2, length=9):
    return torch.randint(0, 256, (batch, length))


def continued(model, tokens, mask=None, **options):
    """The tokens after the prompts."""
    mask = torch.ones_like(tokens) if mask is None else mask
    whole = model.generate(tokens, attention_mask=mask, **GREEDY, **options)
    return whole[:, tokens.shape[1] :]


ODD = {
    "window": {"window": 4, "full_attention_layers": (1,)},
    "one key": {"share": "k", "qk_norm": True, "output_gate": "head"},
    "untied": {"text": {"tie_embeddings": False, "embedding_scale": 3.0, "logit_softcap": 2.0}},
}


@pytest.mark.parametrize("case", [*ATTENTIONS, *ODD])
def test_logits_and_generated_tokens_are_ours(case, saved):
    ours = decoder(**ODD[case]) if case in ODD else decoder(case)
    theirs = saved(ours)
    tokens = prompts()
    assert torch.equal(theirs(tokens).logits, ours(tokens))
    embedded = ours.embedding(tokens)
    assert torch.equal(theirs(inputs_embeds=embedded).logits, ours(tokens))
    last = theirs(tokens, logits_to_keep=1).logits
    torch.testing.assert_close(last, ours(tokens)[:, -1:], atol=1e-5, rtol=1e-5)
    expected = generate(ours, tokens, max_new_tokens=10, temperature=0)
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        assert torch.equal(continued(theirs, tokens, **options), expected), options


@pytest.mark.parametrize("settings", [{}, {"dual_lambda": True}, {"attention": "diff_v2"}])
def test_in_bfloat16_lambda_stays_in_float32(settings, saved):
    ours = decoder(**settings)
    theirs = saved(ours, dtype=torch.bfloat16)
    ours = ours.to(torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in theirs.named_parameters()}
    assert dtypes == {name: parameter.dtype for name, parameter in ours.named_parameters()}
    tokens = prompts()
    assert torch.equal(theirs(tokens).logits, ours(tokens))


def test_prompts_padded_on_the_left_are_continued_as_if_alone(saved):
    theirs = saved(decoder())
    tokens, mask = prompts(), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    alone = continued(theirs, tokens[:1, 4:])
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(continued(theirs, tokens, mask, **options)[:1], alone)


def test_beams_are_the_same_with_every_cache(saved):
    theirs, tokens = saved(decoder("diff_v2")), prompts()
    options = [{}, {"cache_implementation": "static"}, {"use_cache": False}]
    first, *others = (continued(theirs, tokens, num_beams=3, **each) for each in options)
    assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(first, continued(theirs, tokens))


@pytest.mark.parametrize("attention", ["diff_v1", "diff_grouped"])
def test_prompts_in_chunks_and_as_embeddings(attention, saved):
    theirs, tokens = saved(decoder(attention)), prompts()
    expected = continued(theirs, tokens)
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(continued(theirs, tokens, prefill_chunk_size=4, **options), expected)
    embedded = theirs.get_input_embeddings()(tokens)
    mask = torch.ones_like(tokens)
    found = theirs.generate(inputs_embeds=embedded, attention_mask=mask, **GREEDY)
    assert torch.equal(found, expected)


def test_tokens_are_guessed_from_the_prompt_and_verified(saved):
    theirs, tokens = saved(decoder()), prompts(1)
    assert torch.equal(
        continued(theirs, tokens, prompt_lookup_num_tokens=2), continued(theirs, tokens)
    )


def test_sampling_draws_from_the_logits(saved):
    ours = decoder()
    theirs, tokens = saved(ours), prompts(1).expand(2000, -1)
    options = {**GREEDY, "do_sample": True, "max_new_tokens": 1, "top_k": 3}
    drawn = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[:, -1]
    top = ours(tokens[:1])[0, -1].topk(3)
    found = torch.stack([(drawn == id).float().mean() for id in top.indices])
    assert found.sum() == 1.0
    assert (found - top.values.softmax(0)).abs().max() < 0.05


@pytest.mark.parametrize("settings", [{}, {"window": 4}], ids=["full", "window"])
def test_steps_with_a_static_cache_compile_to_one_graph(settings, saved):
    theirs, tokens = saved(decoder(**settings)), prompts()
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    torch._dynamo.utils.counters.clear()
    options = {"cache_implementation": "static", "compile_config": config}
    compiled = continued(theirs, tokens, mask, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(compiled, continued(theirs, tokens, mask))


def test_rows_of_several_documents(saved):
    ours = decoder()
    theirs, tokens = saved(ours), prompts()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)
    outputs = theirs(tokens, position_ids=positions)
    packed = outputs.logits
    assert outputs.past_key_values is None
    documents = torch.tensor([[0] * 4 + [1] * 5] * 2)
    mask = AttentionMask(causal=True, document_ids=documents)
    assert torch.equal(packed, ours(tokens, mask=mask, positions=positions))
    assert not torch.allclose(packed[:, 4:], theirs(tokens).logits[:, 4:])
    with pytest.raises(ValueError, match="rows of several documents exclude a cache: set"):
        theirs(tokens, position_ids=positions, use_cache=True)
    plain = theirs(tokens, position_ids=torch.arange(9)[None], use_cache=True)
    assert torch.equal(plain.logits, ours(tokens))
    assert plain.past_key_values.get_seq_length() == 9
    shared = theirs(tokens, position_ids=positions[:1])
    assert torch.equal(shared.logits, packed)
    compiled = torch.compile(theirs, backend="eager")
    with torch.no_grad():
        again = compiled(tokens, position_ids=torch.arange(9)[None], use_cache=True)
        assert torch.equal(again.logits, plain.logits)
        assert again.past_key_values.get_seq_length() == 9
        with pytest.raises(ValueError, match="rows of several documents exclude a cache: set"):
            compiled(tokens, position_ids=positions, use_cache=True)


def test_hidden_states_are_the_inputs_of_the_blocks_and_the_features(saved):
    ours = decoder()
    theirs, tokens = saved(ours), prompts()
    states = theirs(tokens, output_hidden_states=True).hidden_states
    assert len(states) == 3
    assert torch.equal(states[0], ours.embedding(tokens))
    assert torch.equal(states[-1], ours.forward_features(tokens))
    plain = AttentionMask(causal=True)
    expected = ours.backbone(states[0], mask=plain, indices=[0])[1][0]
    assert torch.equal(states[1], expected)


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_are_saved(tied, saved, tmp_path):
    ours = decoder(text={"tie_embeddings": tied})
    theirs, tokens = saved(ours), prompts()
    theirs.resize_token_embeddings(270, mean_resizing=False)
    assert (theirs.head.weight is theirs.embedding.weight) == tied
    theirs.save_pretrained(tmp_path / "resized", max_shard_size="20KB")
    assert len(list((tmp_path / "resized").glob("model-*.safetensors"))) > 1
    again = diffmm.load(tmp_path / "resized")
    assert again.model.config.vocab_size == 270
    assert again.job == ours.job
    logits = again.model(tokens)
    assert torch.equal(logits, theirs(tokens).logits)
    torch.testing.assert_close(logits[..., :260], ours(tokens), atol=1e-5, rtol=1e-5)


def test_weights_in_several_files_are_read(tmp_path):
    ours = decoder()
    ours.save_pretrained(tmp_path / "several", max_shard_size="20KB")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "several")
    tokens = prompts()
    assert torch.equal(theirs(tokens).logits, ours(tokens))


def test_gradient_checkpointing_changes_no_gradient(saved):
    theirs, tokens = saved(decoder()).train(), prompts()
    gradients, num_stored = [], [0, 0]
    for enabled in (False, True):
        if enabled:
            theirs.gradient_checkpointing_enable()

        def store(tensor, enabled=enabled):
            num_stored[enabled] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
            outputs = theirs(tokens, labels=tokens)
        assert outputs.past_key_values is None
        theirs.zero_grad()
        outputs.loss.backward()
        gradients.append([parameter.grad.clone() for parameter in theirs.parameters()])
    assert theirs.is_gradient_checkpointing
    assert num_stored[1] < num_stored[0] / 2
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    cache = StaticCache(theirs.config, max_cache_len=16)
    for given in ({"past_key_values": cache}, {"use_cache": True}):
        with pytest.raises(ValueError, match="gradient checkpointing excludes a cache"):
            theirs(tokens, **given)
    theirs.gradient_checkpointing_disable()
    assert not theirs.backbone.activation_checkpointing
    with pytest.raises(ValueError, match=r"must be \{'use_reentrant': False\}, got .*True"):
        theirs.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="every_n_layers must be 1, got 2"):
        theirs._set_gradient_checkpointing(
            True, functools.partial(checkpoint, use_reentrant=False), every_n_layers=2
        )


def test_the_loss_is_that_of_the_next_tokens(saved):
    theirs, tokens = saved(decoder()), prompts()
    labels = tokens.clone()
    labels[0, :5] = -100
    logits = theirs(tokens).logits[:, :-1].flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none")
    outputs = theirs(tokens, labels=labels)
    assert outputs.loss.item() == pytest.approx(losses.sum().item() / 12, rel=1e-5)
    outputs = theirs(tokens, labels=labels, num_items_in_batch=torch.tensor(6))
    assert outputs.loss.item() == pytest.approx(losses.sum().item() / 6, rel=1e-5)


LINEARS = ["q_proj", "k_proj", "v_proj", "out_proj", "gate_proj", "up_proj", "down_proj"]


def test_lora_is_trained_saved_loaded_and_merged(saved, tmp_path):
    ours = decoder("diff_v2")
    targets = [*LINEARS, "lambda_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)
    adapted, tokens = get_peft_model(saved(ours), config), prompts()
    assert set(adapted.targeted_module_names) == {
        name
        for name, module in ours.backbone.named_modules(prefix="backbone")
        if name.endswith(tuple(targets)) and isinstance(module, torch.nn.Linear)
    }
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1.0)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = adapted(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(saved(ours), tmp_path / "adapter").eval()
    logits = adapted(input_ids=tokens).logits
    assert torch.equal(again(input_ids=tokens).logits, logits)
    mask = torch.ones_like(tokens)
    generated = again.generate(input_ids=tokens, attention_mask=mask, **GREEDY)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = diffmm.load(tmp_path / "merged").model
    torch.testing.assert_close(merged(tokens), logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits, ours(tokens), atol=0.1)
    expected = generate(merged, tokens, max_new_tokens=10, temperature=0)
    assert torch.equal(generated[:, tokens.shape[1] :], expected)


def test_embeddings_that_peft_trains_separately_are_no_longer_tied(saved, tmp_path):
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["embedding", "head"]
    )
    adapted, tokens = get_peft_model(saved(decoder()), config), prompts()
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1.0)
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    logits = adapted.eval()(input_ids=tokens).logits
    with pytest.warns(UserWarning, match="no longer tied after merging"):
        merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    ours = diffmm.load(tmp_path / "merged").model
    assert not ours.config.tie_embeddings
    torch.testing.assert_close(ours(tokens), logits, atol=1e-4, rtol=1e-4)


def test_prompt_tuning_finds_the_sizes(saved):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned, tokens = get_peft_model(saved(decoder()), config), prompts()
    logits = tuned(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    assert logits.shape == (2, 12, 260)


def test_the_settings_have_the_names_of_transformers(saved, tmp_path):
    config = saved(decoder()).config
    config.save_pretrained(tmp_path / "settings")
    again = AutoConfig.from_pretrained(tmp_path / "settings")
    assert again.description == config.description
    assert again.job == config.job
    written = json.loads((tmp_path / "settings/config.json").read_text())
    for name, value in {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,  # one pair of keys
        "head_dim": 16,  # both components
        "max_position_embeddings": 48,
        "vocab_size": 260,
        "tie_word_embeddings": True,
    }.items():
        assert written[name] == getattr(again, name) == value


def test_settings_that_the_description_determines_are_not_given_another_value(saved, tmp_path):
    description = saved(decoder()).config.description
    config = DiffmmConfig(description=description, vocab_size=260, hidden_size=32)
    config.vocab_size = 99
    assert (config.vocab_size, description["config"]["vocab_size"]) == (99, 260)
    wrong = {"vocab_size": 99, "hidden_size": 999, "tie_word_embeddings": False}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name}={value} is not that of the model's desc"):
            DiffmmConfig(description=description, **{name: value})
    with pytest.raises(ValueError, match="num_hidden_layers=1 is not that of .* description, 2: l"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved", num_hidden_layers=1)
    with pytest.raises(ValueError, match="a DiffmmConfig needs the description of its model"):
        DiffmmConfig(hidden_size=32)


def test_two_steps_of_the_trainer(saved, tmp_path):
    ours = decoder()
    theirs = saved(ours)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    texts = ["hello", "a longer text", "xyz", "def main("]
    assert tokenizer(texts[3])["input_ids"] == list(b"def main(")
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        theirs,
        arguments,
        train_dataset=[tokenizer(text) for text in texts],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    assert trainer.train().training_loss > 0
    trained = diffmm.load(tmp_path / "run/checkpoint-2")
    assert trained.job == ours.job
    tokens = prompts()
    assert torch.equal(trained.model(tokens), theirs.eval()(tokens).logits)
    changed = {
        name
        for name, p in ours.state_dict().items()
        if not torch.equal(p, trained.model.state_dict()[name])
    }
    assert {"embedding.weight", "backbone.blocks.1.attention.lambda_q1"} <= changed


def test_the_server_of_transformers_answers_a_chat(saved, tmp_path, monkeypatch):
    from fastapi.testclient import TestClient
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState

    import diffmm.interop.transformers_cli

    ours = decoder()
    saved(ours)
    folder = tmp_path / "saved"
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    manager, state = ModelManager(device="cpu", model_timeout=-1), GenerationState()
    chat = ChatCompletionHandler(manager, state)
    app = build_server(manager, chat, None, None, None, state)
    request = {
        "model": str(folder),
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 5,
        "temperature": 0.0,
    }
    with TestClient(app) as client:
        answer = client.post("/v1/chat/completions", json=request)
        lines = client.post("/v1/chat/completions", json={**request, "stream": True}).text
    manager.shutdown()
    assert answer.status_code == 200, answer.text
    prompt = torch.tensor([list(b"user: hi")])
    expected = diffmm.load(folder).tokenizer.decode(
        generate(ours, prompt, max_new_tokens=5, temperature=0, stop_ids=[256])[0].tolist()
    )
    assert answer.json()["choices"][0]["message"]["content"] == expected
    chunks = [json.loads(line[5:]) for line in lines.splitlines() if line.startswith("data: {")]
    pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert "".join(pieces) == expected


def test_the_command_line_of_transformers_knows_the_models(monkeypatch):
    from transformers.cli import transformers as cli
    from transformers.cli.serving import model_manager

    called = []

    def main():
        called.append(model_manager.transformers.DiffmmForCausalLM)

    monkeypatch.setattr(cli, "main", main)
    monkeypatch.delattr(model_manager.transformers, "DiffmmForCausalLM", raising=False)
    monkeypatch.delitem(sys.modules, "diffmm.interop.transformers_cli", raising=False)
    runpy.run_module("diffmm.interop.transformers_cli", run_name="__main__")
    assert called == [DiffmmForCausalLM]


def test_what_is_not_supported_is_refused(saved):
    theirs, tokens = saved(decoder()), prompts()
    with pytest.raises(ValueError, match="output_attentions=True is not supported"):
        theirs(tokens, output_attentions=True)
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        theirs()
    with pytest.raises(ValueError, match=r"must be \[B, 9\], .* got shape \(2, 1, 9, 9\)"):
        theirs(tokens, attention_mask=torch.ones(2, 1, 9, 9), use_cache=False)
    cache = theirs(tokens).past_key_values
    with pytest.raises(ValueError, match=r"must be \[B, 10\], one entry per token so far"):
        theirs(tokens[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)
    with pytest.raises(ValueError, match=r"must be \[B, 10\], one entry per token so far"):
        theirs(tokens[:, :1], attention_mask=torch.ones(2, 11), past_key_values=cache)
    with pytest.raises(ValueError, match="50 tokens is longer than the model's max_length=48"):
        theirs(prompts(length=50))
    short = StaticCache(theirs.config, max_cache_len=8)
    with pytest.raises(ValueError, match="the cache holds 8 tokens, but 9 are needed"):
        theirs(tokens, past_key_values=short)


def test_only_decoders_are_models_of_transformers(tmp_path):
    backbone = BackboneConfig(dim=16, depth=1, num_heads=2, rope="1d")
    encoder = TextModel(TextConfig(vocab_size=9, max_length=4, causal=False, backbone=backbone))
    backbone = BackboneConfig(dim=16, depth=1, num_heads=2, rope="2d")
    image = ImageModel(ImageConfig(image_size=8, patch_size=4, backbone=backbone))
    for model, kind in ((encoder, "encoder"), (image, "ImageModel")):
        model.save_pretrained(tmp_path / kind)
        with pytest.raises(ValueError, match=f"a model of kind {kind}, but only decoders"):
            AutoModelForCausalLM.from_pretrained(tmp_path / kind)
    with pytest.raises(ValueError, match="needs the description of its model"):
        DiffmmForCausalLM(DiffmmConfig())


def test_a_new_model_has_the_initial_weights_of_ours(saved):
    new = AutoModelForCausalLM.from_config(saved(decoder()).config)
    ours = decoder()
    for name, parameter in new.named_parameters():
        if parameter.numel() < 32:  # too few to compare
            continue
        found, expected = (
            [each.mean().item(), each.std(correction=0).item()]
            for each in (parameter.detach(), ours.get_parameter(name).detach())
        )
        assert found == pytest.approx(expected, rel=0.3, abs=0.05), name
