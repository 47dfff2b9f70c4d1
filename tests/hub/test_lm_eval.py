"""The LM Evaluation Harness with a decoder of diffmm, offline."""

import json
import sys
from functools import partial

import pytest
import torch

from diffmm.models import BackboneConfig, TextConfig, TextModel
from diffmm.models.job import Job
from diffmm.models.weights import save_model

pytest.importorskip("lm_eval", reason="needs the package lm-eval")

TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "words": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "x",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
DOCUMENTS = [
    {"text": "one, two,", "choices": [" three", " cat"], "label": 0},
    {"text": "a longer text, which exceeds the 32 tokens", "choices": ["x", "yz"], "label": 1},
    {"text": "def f(x):", "choices": ["\n", " return"], "label": 0},
]
HARNESS_WARNINGS = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
pytestmark = HARNESS_WARNINGS


@pytest.fixture
def run(tmp_path):
    backbone = BackboneConfig(dim=32, depth=2, num_heads=2, attention="diff_v2", rope="1d")
    model = TextModel(TextConfig(320, 32, backbone))
    torch.nn.init.normal_(model.embedding.weight, std=0.3)
    reader = {
        "class_path": "datamodules.text.TextReader",
        "init_args": {"tokenizer": "bytes"},
    }
    model.job = Job(reader=reader)
    save_model(model, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", model.eval()


def log_likelihood(model, context, target):
    tokens = torch.tensor([*context, *target])[None]
    with torch.no_grad():
        found = model(tokens[:, :-1])[0].log_softmax(-1)[-len(target) :]
    return found.gather(-1, tokens[0, -len(target) :, None]).sum().item()


def test_scores_are_those_of_the_model(run):
    from lm_eval.api.instance import Instance

    from diffmm.hub.lm_eval import DiffmmLM

    file, model = run
    lm = DiffmmLM.create_from_arg_string(f"run={file}", {"batch_size": 2, "device": "cpu"})

    def ask(kind, *arguments):
        return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    pairs = [(d["text"][:20], choice) for d in DOCUMENTS for choice in d["choices"]]
    found = lm.loglikelihood([ask("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (context, target), (score, is_greedy) in zip(pairs, found, strict=True):
        wanted = log_likelihood(model, context.encode(), target.encode())
        assert score == pytest.approx(wanted, rel=1e-4)
        assert not is_greedy
    # In windows of 32 tokens, each token once, after the end-of-text token.
    text = DOCUMENTS[1]["text"].encode()
    eot = [lm.eot_token_id]
    (rolled,) = lm.loglikelihood_rolling([ask("loglikelihood_rolling", text.decode())])
    wanted = log_likelihood(model, eot, text[:32]) + log_likelihood(model, text[31:32], text[32:])
    assert rolled == pytest.approx(wanted, rel=1e-4)

    settings = {"until": ["zzz"], "max_gen_toks": 6, "do_sample": False}
    asked = [ask("generate_until", d["text"], settings) for d in DOCUMENTS]
    together = lm.generate_until(asked)
    lm.batch_size = 1
    assert together == lm.generate_until(asked)
    first = together[0][:1]
    settings = {**settings, "until": [first]}
    assert lm.generate_until([ask("generate_until", DOCUMENTS[0]["text"], settings)]) == [""]
    with pytest.raises(ValueError, match="generation_kwargs has num_beams, which diffmm's models"):
        lm.generate_until([ask("generate_until", "a", {"num_beams": 2})])


def test_greedy_continuations_are_known(run):
    from diffmm.hub.lm_eval import DiffmmLM

    file, model = run
    context = list(b"abc")
    with torch.no_grad():
        best = int(model(torch.tensor([context]))[0, -1, :256].argmax())
        greedy = int(model(torch.tensor([context]))[0, -1].argmax())
    ((score, is_greedy),) = DiffmmLM(str(file), device="cpu")._scores([(context, [best])])
    assert score < 0
    assert is_greedy == (best == greedy)


def test_the_command_runs_offline_tasks(run, tmp_path, monkeypatch, capsys):
    import lm_eval.tasks

    from diffmm.hub.lm_eval import main

    file, _ = run
    # Without the harness's own tasks, 14,000 files that it would read at every start.
    manager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    lines = "\n".join(map(json.dumps, DOCUMENTS))
    (tmp_path / "documents.jsonl").write_text(lines)
    for name, task in TASKS.items():
        source = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "documents.jsonl")}},
            "test_split": "test",
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**source, **task}))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    arguments = ["--model", "diffmm", "--model_args", f"run={file}", "--tasks", ",".join(TASKS)]
    arguments += ["--include_path", str(tmp_path), "--batch_size", "2"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    main()
    shown = capsys.readouterr().out
    for name in TASKS:
        assert name in shown
    assert "bits_per_byte" in shown
    arguments[3] = "run=nowhere"
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    with pytest.raises(SystemExit, match="error: --model_args: .*nowhere"):
        main()


@pytest.mark.parametrize(
    ("arguments", "more"),
    [
        ("--model diffmm --tasks a", "--device auto"),
        ("run --tasks a", "--device auto"),
        ("run --tasks a --device=cuda:1", ""),
        ("--tasks a --device cuda:1", ""),
        ("--config a.yaml --tasks a", ""),
        ("-C a.yaml --tasks a", ""),
        ("ls tasks", ""),
        ("--help", ""),
        ("", ""),
    ],
)
def test_the_device_is_the_accelerator_if_there_is_one(arguments, more):
    from diffmm.hub.lm_eval import with_device

    assert with_device(arguments.split()) == [*arguments.split(), *more.split()]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"batch_size": "auto"}, "batch_size must be a positive integer, got 'auto'")],
)
def test_bad_arguments(run, change, message):
    from diffmm.hub.lm_eval import DiffmmLM

    with pytest.raises(ValueError, match=message):
        DiffmmLM(str(run[0]), **change)
