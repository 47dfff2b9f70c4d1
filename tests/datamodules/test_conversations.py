"""Conversations: templates, which tokens are answers, and packing."""

import json

import datasets
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from datamodules.shared.bad_samples import BadSampleError, BadSamples
from datamodules.text import ConversationData, Conversations
from datamodules.text.chat import DEFAULT_TEMPLATE, ChatTemplate, find_template
from datamodules.text.conversation_windows import packed
from diffmm.batch import IGNORE_INDEX
from diffmm.checks import DataError
from diffmm.tokenizers import HuggingFaceTokenizer, load_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('no ' + message['role']) }}{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "2 <|im_end|> é"},
    {"role": "user", "content": "And 2 + 2?"},
    {"role": "assistant", "content": "4"},
]


def bpe():
    """A byte-level tokenizer with merges and special tokens."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["What is 1 + 1? user assistant " * 9], trainer)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return inner


@pytest.mark.parametrize("template", [CHATML, LLAMA2, DEFAULT_TEMPLATE])
def test_tokens_are_those_of_transformers(template):
    inner = bpe()
    ours = ChatTemplate(template, HuggingFaceTokenizer("t", bpe()))
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template=template
    )
    for messages, opens in ((CHAT, False), (CHAT[:3], True)):
        wanted = theirs.apply_chat_template(
            messages, add_generation_prompt=opens, tokenize=True, return_dict=False
        )
        found = ours.prompt(messages) if opens else ours.encode(messages).ids
        assert found == list(wanted)


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHATML, "2 <|im_end|> é<|im_end|>\n4<|im_end|>\n"),
        (LLAMA2, " 2 <|im_end|> é</s> 4</s>"),
        (DEFAULT_TEMPLATE, "2 <|im_end|> é</s>4</s>"),
    ],
)
def test_answers_and_what_ends_them_are_learned(template, answers):
    tokenizer = HuggingFaceTokenizer("t", bpe())
    ids, is_answer = ChatTemplate(template, tokenizer).encode(CHAT)
    learned = [id for id, own in zip(ids, is_answer, strict=True) if own]
    assert tokenizer._inner.decode(learned, skip_special_tokens=False) == answers


def test_an_answer_ends_with_the_template_s_token():
    tokenizer = HuggingFaceTokenizer("t", bpe())
    assert ChatTemplate(CHATML, tokenizer).stop_ids == (3, 1)
    assert ChatTemplate(LLAMA2, tokenizer).stop_ids == (1,)
    assert ChatTemplate(DEFAULT_TEMPLATE, load_tokenizer("bytes")).stop_ids == (256,)


def test_the_default_template_on_bytes():
    template = ChatTemplate(DEFAULT_TEMPLATE, load_tokenizer("bytes"))
    assert template.render(CHAT[:2]) == (
        "### User:\nWhat is 1 + 1?\n\n### Assistant:\n2 <|im_end|> é<|endoftext|>"
    )
    ids, is_answer = template.encode(CHAT)
    assert ids.count(256) == 2
    assert len(ids) == len(is_answer)
    text = template.render(CHAT).replace("<|endoftext|>", "")
    assert bytes(id for id in ids if id < 256).decode() == text
    learned = [id for id, own in zip(ids, is_answer, strict=True) if own]
    assert learned == [*"2 <|im_end|> é".encode(), 256, *b"4", 256]
    first = [{"role": "assistant", "content": "Hello"}, *CHAT]
    assert bytes(id for id in template.encode(first).ids if id < 256).startswith(b"### Assistant:")
    with pytest.raises(DataError, match="must be a list of messages with at least one, got"):
        template.prompt([])


def test_parts_of_a_message_are_joined():
    template = ChatTemplate(LLAMA2, HuggingFaceTokenizer("t", bpe()))
    parts = [{"type": "text", "text": text} for text in ("What is", "1 + 1?")]
    joined = [{**CHAT[0], "content": "What is\n1 + 1?"}, *CHAT[1:]]
    divided = [{**CHAT[0], "content": parts}, *CHAT[1:]]
    assert template.encode(divided) == template.encode(joined)
    assert template.prompt(divided[:1]) == template.prompt(joined[:1])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "must be a list of messages"),
        ("hello", "must be a list of messages"),
        (
            [{"role": "bot", "content": "a"}],
            "message 0 with the role 'bot', which must be one of system, user, assistant, tool",
        ),
        (["a"], "message 0 with the role 'a', which must be"),
        ([{"role": "user"}], r"message 0 \(user\) whose content is missing"),
        ([{"role": "user", "content": 1}], "whose content is an int, not text"),
        ([{"role": "user", "content": [1]}], r"message 0 \(user\) with a part .* \('an int'\)"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            r"with a part that is not a text \('image_url'\): the model reads texts only",
        ),
        ([{"role": "system", "content": "a"}], "does not fit the chat template: no system"),
    ],
)
def test_messages_that_are_none(messages, message):
    template = ChatTemplate(LLAMA2, HuggingFaceTokenizer("t", bpe()))
    with pytest.raises(DataError, match=message):
        template.encode(messages)


def test_a_template_that_changes_earlier_messages_is_refused():
    last_only = "{{ messages[-1].content }}{{ eos_token }}"
    with pytest.raises(DataError, match="is changed by the chat template when messages follow"):
        ChatTemplate(last_only, load_tokenizer("bytes")).encode(CHAT)


def test_templates_run_in_a_sandbox():
    tokenizer = load_tokenizer("bytes")
    with pytest.raises(ValueError, match="the chat template is not valid"):
        ChatTemplate("{% for %}", tokenizer)
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(DataError, match="is unsafe"):
        ChatTemplate(attack, tokenizer).render(CHAT)


def test_the_template_in_the_tokenizer_s_folder(tmp_path):
    with pytest.raises(ValueError, match="has no chat template .* or 'default'"):
        find_template(None, str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 1 }}"}))
    assert find_template(None, str(tmp_path / "tokenizer.json")) == "{{ 1 }}"
    (tmp_path / "chat_template.jinja").write_text("{{ 2 }}")
    assert find_template(None, str(tmp_path)) == "{{ 2 }}"
    assert find_template(str(tmp_path / "chat_template.jinja"), "bytes") == "{{ 2 }}"
    assert find_template("{{ 3 }}", "bytes") == "{{ 3 }}"
    assert find_template("default", "bytes") == DEFAULT_TEMPLATE
    with pytest.raises(FileNotFoundError, match="'Default' is neither 'default', nor a template"):
        find_template("Default", "bytes")


def test_several_templates_and_damaged_files(tmp_path):
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "tools", "template": "{{ 1 }}"}, {"name": "default", "template": "{{ 2 }}"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert find_template(None, str(tmp_path)) == "{{ 2 }}"
    config.write_text(json.dumps({"chat_template": named[:1]}))
    with pytest.raises(ValueError, match="has the chat templates tools, but none called default"):
        find_template(None, str(tmp_path))
    config.write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is not a JSON file"):
        find_template(None, str(tmp_path))
    config.write_text("[]")
    with pytest.raises(ValueError, match="has no chat template"):
        find_template(None, str(tmp_path))


def test_what_templates_of_hugging_face_use():
    text = (
        "{% for message in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% generation %}{{ message | tojson(ensure_ascii=false, sort_keys=true) }}"
        "{% endgeneration %}{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    found = ChatTemplate(text, load_tokenizer("bytes")).render(CHAT)
    first, second = (json.dumps(m, ensure_ascii=False, sort_keys=True) for m in CHAT[:2])
    assert found == f"{first}{second}4"


@pytest.mark.parametrize("text", ["{{ 1 / 0 }}", "{{ 'abc'.index('z') }}", "{{ range(200000) }}"])
def test_errors_of_templates_are_told(text):
    with pytest.raises(DataError, match="does not fit the chat template: "):
        ChatTemplate(text, load_tokenizer("bytes")).render(CHAT)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 50))
def test_packing_keeps_every_item_whole(lengths, capacity):
    groups = packed(lengths, capacity)
    assert sorted(item for group in groups for item in group) == list(range(len(lengths)))
    sums = [sum(lengths[item] for item in group) for group in groups]
    assert all(0 < each <= capacity for each in sums)
    # No two groups would fit into one.
    assert all(a + b > capacity for n, a in enumerate(sums) for b in sums[:n])


def write_rows(path, count=40):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Question {n}" + "?" * (n % 7)},
                {"role": "assistant", "content": f"Answer {n}"},
            ]
        }
        for n in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return rows


def data_of(path, **changes):
    source = Conversations(data_files=[str(path)])
    given = {"chat_template": "default", "sequence_length": 128, "batch_size": 2, **changes}
    return ConversationData(source, **given)


def test_samples_are_whole_conversations(tmp_path):
    rows = write_rows(tmp_path / "chats.jsonl")
    data = data_of(tmp_path / "chats.jsonl", validation_fraction=0.0)
    data.setup("fit")
    assert data.val_dataloader() == []
    assert not data.has_test_split
    decode, seen = load_tokenizer("bytes").decode, []
    windows = data.windows("training")
    for sample in (windows.sample(0, index) for index in range(len(windows))):
        tokens, targets, documents = (sample[k] for k in ("tokens", "targets", "document_ids"))
        assert tokens.shape == targets.shape == documents.shape == (128,)
        learned = targets != IGNORE_INDEX
        num_bytes = 0
        for number in documents.unique().tolist():
            own = documents == number
            text = decode(tokens[own].tolist())
            if not learned[own].any():
                assert set(tokens[own].tolist()) == {256}  # the padding
                continue
            answer = decode(targets[own & learned].tolist())
            assert targets[own & learned][-1] == 256
            assert text.endswith(f"### Assistant:\n{answer}")
            seen.append(answer)
            num_bytes += len(answer)
        assert int(sample["num_bytes"]) == num_bytes
    assert sorted(seen) == sorted(row["messages"][1]["content"] for row in rows)


def texts_of(data, split):
    """The bytes of the conversations of a split."""
    return {bytes(each.ids[each.ids < 256].tolist()) for each in data._conversations[split]}


def test_only_line_feeds_separate_rows(tmp_path):
    said = "two\u2028lines\x85and\x1cmore"
    rows = write_rows(tmp_path / "plain.jsonl")
    for row in rows:
        row["messages"][0]["content"] = said
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = list(Conversations(data_files=[str(tmp_path / "chats.jsonl")]).load())
    assert len(found) == len(rows)


def test_splits_do_not_depend_on_the_order(tmp_path):
    rows = write_rows(tmp_path / "chats.jsonl", 60)
    data = data_of(tmp_path / "chats.jsonl", validation_fraction=0.3)
    data.setup("fit")
    val = texts_of(data, "validation")
    (tmp_path / "again.jsonl").write_text("\n".join(map(json.dumps, reversed(rows))))
    again = data_of(tmp_path / "again.jsonl", validation_fraction=0.3)
    again.setup("fit")
    assert texts_of(again, "validation") == val
    assert 5 < len(val) < 30
    assert data.fingerprint() != again.fingerprint()
    batch = next(iter(data.train_dataloader()))
    assert batch["tokens"].shape == (2, 128)


def test_long_conversations_are_cut_and_counted(tmp_path, caplog):
    rows = [
        [("user", "a" * 10), ("assistant", "b" * 500)],
        [("user", "a" * 500), ("assistant", "b")],
        [("user", "a"), ("assistant", "b")],
    ]
    lines = [
        json.dumps({"messages": [{"role": role, "content": text} for role, text in row]})
        for row in rows
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    data = data_of(tmp_path / "chats.jsonl", validation_fraction=0.0)
    data.setup("fit")
    assert [len(each.ids) for each in data._conversations["training"]] == [129, 30]
    message = (
        "of 3 conversations, 2 are longer than sequence_length=128 and are cut, and 1 are left"
    )
    assert message in caplog.text


def test_conversations_without_an_answer_are_counted(tmp_path, caplog):
    rows = write_rows(tmp_path / "chats.jsonl", 20)
    rows += [{"messages": row["messages"][:1]} for row in rows[:5]]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = data_of(tmp_path / "chats.jsonl", validation_fraction=0.0)
    data.setup("fit")
    assert len(data._conversations["training"]) == 20
    assert "of 25 conversations, 0 are longer" in caplog.text
    assert "and 5 are left out" in caplog.text
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, rows[20:])))
    source = Conversations(data_files=[str(tmp_path / "val.jsonl")])
    with pytest.raises(ValueError, match="the validation split has no conversation with an answer"):
        data_of(tmp_path / "chats.jsonl", validation_source=source, validation_fraction=0.0).setup(
            "fit"
        )


def test_bad_rows_are_named_or_skipped(tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = write_rows(path, 30)
    rows[3]["messages"][0]["role"] = "bot"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        BadSampleError,
        match=r"the conversation in line 4 of .*chats.jsonl has message 0 with the role 'bot'",
    ):
        data_of(path).setup("fit")
    data = data_of(path, validation_fraction=0.0, bad_samples=BadSamples("substitute"))
    data.setup("fit")
    assert len(data._conversations["training"]) == 29


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ('{"text": "a"}', {}, "line 1 of .* has no column 'messages', its columns are text"),
        ('{"messages": []}\n{', {}, "line 2 of .* is not JSON"),
        ("[[]]", {}, "row 0 of .* has no column 'messages', its columns are list"),
        ("\n", {}, "chats.jsonl is empty"),
        (None, {"sequence_length": 8}, "the training split has no conversation with an answer"),
        (None, {"vocab_size": 100}, "has 259 tokens, which exceeds the model's vocab_size of 100"),
        (None, {"chat_template": None}, "tokenizer 'bytes' has no chat template"),
    ],
)
def test_data_that_cannot_be_used(text, changes, message, tmp_path):
    path = tmp_path / "chats.jsonl"
    write_rows(path)
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        data_of(path, **changes).setup("fit")


@pytest.mark.parametrize("settings", [{"sequence_length": 0}, {"validation_fraction": 1.0}])
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ConversationData(Conversations(data_files="chats.jsonl"), **settings)


def test_content_is_taken_as_it_is(tmp_path):
    """Rows are independent of each other, and text that looks like JSON stays text."""
    lines = ['{"messages": [{"role": "user", "content": "\\"1\\""}]}', '{"messages": 3}']
    (tmp_path / "1.jsonl").write_text("\n\n".join(lines), encoding="utf-8-sig")
    (tmp_path / "2.json").write_text(f"[{','.join(lines)}]")
    loaded = Conversations(data_files=str(tmp_path / "*.json*")).load()
    assert [messages for _, messages in loaded] == 2 * [[{"role": "user", "content": '"1"'}], 3]
    assert [where.split(" of ")[0] for where, _ in loaded] == ["line 1", "line 3", "row 0", "row 1"]
    (tmp_path / "3.jsonl").write_bytes(b'{"messages": "\xfc"}')
    with pytest.raises(BadSampleError, match="3.jsonl is not UTF-8"):
        Conversations(data_files=str(tmp_path / "3.jsonl")).load()
    with pytest.raises(FileNotFoundError, match="there is no file of conversations at .*4.jsonl"):
        Conversations(data_files=str(tmp_path / "4.jsonl")).load()


def test_rows_of_parquet(tmp_path):
    rows = write_rows(tmp_path / "chats.jsonl", 3)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "chats.parquet")
    source = Conversations("parquet", data_files=str(tmp_path / "chats.parquet"))
    assert [messages for _, messages in source.load()] == [row["messages"] for row in rows]
    (tmp_path / "chats.parquet").write_text("PAR1")
    with pytest.raises(BadSampleError, match="the datasets library cannot read .*chats.parquet"):
        source.load()


def test_an_answer_may_be_a_call_of_a_tool():
    template = ChatTemplate(DEFAULT_TEMPLATE, load_tokenizer("bytes"))
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    messages = [*CHAT[:1], call, {"role": "tool", "content": "3"}, CHAT[1]]
    assert "### Assistant:\n<|endoftext|>\n\n### Tool:\n3" in template.render(messages)
    with pytest.raises(
        DataError, match=r"message 1 \(assistant\) that calls a tool, which the chat"
    ):
        template.encode(messages)
    shows = "{% for m in messages %}{{ m.content or m.tool_calls[0].name + '()' }};{% endfor %}"
    encoded = ChatTemplate(shows, load_tokenizer("bytes")).encode(messages)
    answer = bytes(id for id, learned in zip(*encoded, strict=True) if learned)
    assert answer.startswith(b"f();")


def test_files_must_be_named():
    with pytest.raises(ValueError, match="name='json' needs data_files"):
        Conversations()
