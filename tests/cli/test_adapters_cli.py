"""Fine-tuning with low-rank adapters on the command line."""

import torch

import diffmm
from diffmm.models.weights import load_model, save_model

LORA = ("--model.finetune.lora.rank", "2", "--model.finetune.new_head", "false")


def test_a_run_with_adapters_resumes_validates_and_loads(run, recipe):
    torch.manual_seed(0)
    source = diffmm.create_model("image/digits_tiny", attention="softmax")
    save_model(source, "source")
    path = recipe("image/digits_tiny", **{"trainer.max_steps": 4, "trainer.val_check_interval": 2})
    command = ("finetune", "--config", path, "--weights", "source", *LORA)
    whole = run(*command, "--run_dir", "whole")
    assert whole.code == 0, whole.err
    part = run(*command, "--run_dir", "part", "--trainer.max_steps", "2")
    assert part.code == 0, part.err
    resumed = run("fit", "--resume", "part", "--trainer.max_steps", "4")
    assert resumed.code == 0, resumed.err

    one, other = load_model("whole").state_dict(), load_model("part").state_dict()
    assert set(one) == set(source.state_dict())
    assert all(torch.equal(one[name], other[name]) for name in one)
    changed = {n for n, tensor in source.state_dict().items() if not torch.equal(one[n], tensor)}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "k_proj", "v_proj", "out_proj"}

    result = run("validate", "whole")
    assert result.code == 0, result.err
    again = run("finetune", "--config", path, "--weights", "whole", "--run_dir", "again")
    assert again.code == 0, again.err
