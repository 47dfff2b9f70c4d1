"""Answers of a model that was trained on conversations."""

import json
from pathlib import Path

import pytest
import torch

import diffmm
from datamodules.text.chat import DEFAULT_TEMPLATE
from diffmm.models import BackboneConfig, TextConfig, TextModel
from diffmm.models.job import Job, text_reader
from diffmm.models.weights import save_model


def text_model(chat_template):
    torch.manual_seed(0)
    backbone = BackboneConfig(dim=32, depth=1, num_heads=2, rope="1d", attention="diff_v2")
    model = TextModel(TextConfig(vocab_size=259, max_length=64, backbone=backbone))
    reader = text_reader("bytes")
    reader["init_args"]["chat_template"] = chat_template
    model.job = Job(reader=reader)
    return model


def test_a_question_is_continued_as_its_conversation(tmp_path):
    trained = diffmm.load(save_model(text_model(DEFAULT_TEMPLATE), tmp_path))
    prompt = "### User:\nWho?\n\n### Assistant:\n"
    wanted = trained.generate(prompt, seed=3, max_new_tokens=9)
    assert trained.chat("Who?", seed=3, max_new_tokens=9) == wanted
    messages = [{"role": "user", "content": "Who?"}]
    assert trained.chat(messages, seed=3, max_new_tokens=9) == wanted
    assert "".join(trained.write("Who?", chat=True, seed=3, max_new_tokens=9)) == wanted
    assert trained.generate("Who?", seed=3, max_new_tokens=9) != wanted


def test_the_template_s_token_ends_an_answer(tmp_path):
    model = text_model("{{ messages[0].content }}{{ eos_token }}")
    with torch.no_grad():
        model.head.weight.zero_()  # every token is as likely
    trained = diffmm.load(save_model(model, tmp_path))
    answers = [trained.chat("a", temperature=1.0, seed=seed) for seed in range(40)]
    # One token in 259 ends an answer, which has at most 62.
    assert 0 < sum(len(answer.encode()) < 30 for answer in answers) < 30


def test_what_is_no_conversation(tmp_path):
    plain = diffmm.load(save_model(text_model(None), tmp_path / "plain"))
    with pytest.raises(ValueError, match="the model was not trained on conversations"):
        plain.chat("Who?")
    for texts in (["def a", "x"], ("def a",)):
        with pytest.raises(ValueError, match="the prompt is a list with texts: give one text per"):
            plain.generate(texts)
    trained = diffmm.load(save_model(text_model(DEFAULT_TEMPLATE), tmp_path / "chat"))
    with pytest.raises(ValueError, match="the conversation has message 0 with the role None"):
        trained.chat([{"content": "Who?"}])
    for nothing in ([], None):
        with pytest.raises(ValueError, match="the conversation must be a list of messages with at"):
            trained.chat(nothing)
    bad = diffmm.load(save_model(text_model(3), tmp_path / "bad"))
    with pytest.raises(ValueError, match="chat_template must be a string, got 3"):
        bad.chat("Who?")


def test_instruction_tuning_on_the_command_line(run, recipe):
    save_model(text_model(None), "base")
    rows = [
        {
            "messages": [
                {"role": "user", "content": str(n)},
                {"role": "assistant", "content": str(n + 1)},
            ]
        }
        for n in range(60)
    ]
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {"vars.sequence_length": 64, "vars.vocab_size": 259, "data.batch_size": 2}
    path = recipe("text/instruct", **changes)
    command = ("--config", path, "--data", "chats.jsonl")
    result = run("finetune", *command, "--weights", "base", "--run_dir", "tuned")
    assert result.code == 0, result.err
    assert "data: chats.jsonl has 1 file(s)" in result.out
    result = run("generate", "tuned", "7", "--chat", "--max-new-tokens", "3", "--device", "cpu")
    assert result.code == 0, result.err
    assert run("generate", "base", "7", "--chat").mistakes == [
        "the model was not trained on conversations: continue a prompt instead, or "
        "instruction-tune it (recipe text/instruct)"
    ]
    Path("texts").mkdir()
    refused = run("fit", "--config", path, "--data", "texts", "--run_dir", "refused")
    assert refused.code == 2
    assert "must be a file of conversations (.jsonl, .json, .parquet)" in refused.mistakes[0]


def test_transformers_has_the_same_prompt(tmp_path):
    from transformers import AutoTokenizer

    trained = diffmm.load(save_model(text_model(DEFAULT_TEMPLATE), tmp_path / "chat"))
    tokenizer = AutoTokenizer.from_pretrained(trained.save_pretrained(tmp_path / "folder"))
    messages = [{"role": "user", "content": "Who?"}]
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert found == trained.reader.chat.prompt(messages)
