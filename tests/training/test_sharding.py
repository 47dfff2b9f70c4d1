"""How models are split, and which models cannot be. The tests use a fake mesh of processes, because
nothing is computed."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from diffmm.models import (
    AudioConfig,
    AudioModel,
    BackboneConfig,
    ImageConfig,
    ImageModel,
    TextConfig,
    TextModel,
)
from diffmm.models.weights import save_model
from diffmm.training import FineTuneConfig, LoRAConfig, OptimizerConfig
from diffmm.training.sharding import gradient_norm, is_sharded, shard


@pytest.fixture(scope="module")
def mesh():
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (1, 4), mesh_dim_names=("data_parallel", "tensor_parallel"))
    torch.distributed.destroy_process_group()


def text(vocab_size=24, num_heads=16, **changes):
    settings = {"attention": "diff_v1", "feed_forward_width": 64, "rope": "1d"}
    backbone = BackboneConfig(64, 1, num_heads, **{**settings, **changes})
    return TextModel(TextConfig(vocab_size, 8, backbone))


def audio():
    backbone = BackboneConfig(64, 1, 4, rope="2d")
    return AudioModel(AudioConfig(backbone=backbone, sample_rate_hz=8000, num_mels=32))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: text(num_kv_heads=4), "DiffAttentionV1's number of key groups must be a multiple "
         "of tensor_parallel_size to be split, got 2 and 4"),
        (lambda: text(num_kv_heads=2, attention="diff_v2"), "DiffAttentionV2's number of key"),
        (lambda: text(num_kv_heads=2, attention="diff_grouped", signal_per_noise=8),
         "GroupedDiffAttention's number of noise heads must be .* 2 and 4"),
        (lambda: text(num_heads=6, head_dim=8, attention="softmax"), "SoftmaxAttention's number"),
        (lambda: text(feed_forward_width=66), "feed_forward_width must be a multiple .* 66 and 4"),
        (lambda: text(vocab_size=26), "vocab_size must be a multiple .* 26 and 4"),
        (lambda: torch.nn.Linear(2, 2), "splits the heads of blocks, but Linear has none"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_refused(model, message, mesh):
    with pytest.raises(ValueError, match=message):
        shard(model(), mesh)


def test_heads_are_split_and_names_are_kept(mesh):
    model = text(attention="diff_v2", num_kv_heads=8)
    before = {name: parameter.shape for name, parameter in model.named_parameters()}
    shard(model, mesh)
    assert is_sharded(model)
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == before
    local = {n: tuple(p.to_local().shape) for n, p in model.named_parameters()}
    attention = "backbone.blocks.0.attention"
    assert local[f"{attention}.q_proj.weight"] == (2 * 16 * 4 // 4, 64)
    assert local[f"{attention}.k_proj.weight"] == (8 * 4 // 4, 64)
    assert local[f"{attention}.lambda_proj.weight"] == (16 // 4, 64)
    assert local[f"{attention}.out_proj.weight"] == (64, 64 // 4)
    assert local["embedding.weight"] == (24 // 4, 64)
    assert model.head.weight is model.embedding.weight


@pytest.mark.filterwarnings("ignore:DTensor random operators may not have:UserWarning")
@pytest.mark.parametrize("kind", ["text", "audio"])
def test_a_model_sharded_on_the_meta_device_starts_there(kind, mesh, monkeypatch):
    """The steps of PyTorch's and Lightning's guides to FSDP2."""
    with torch.device("meta"):
        model = text() if kind == "text" else audio()
    for module in (*model.backbone.blocks, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (4,)))
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, **o: empty_like(x, **o).fill_(math.nan))
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, parameter in model.named_parameters():
        assert parameter.to_local().isfinite().all(), name
    for name, buffer in model.named_buffers():
        assert buffer.isfinite().all(), name
    if kind == "text":
        assert model.head.weight is model.embedding.weight
        assert len(list(model.parameters())) == len(list(text().parameters()))


def test_weights_of_two_types_are_refused(mesh):
    # Weights as under precision bf16-true, with lambda in float32.
    with pytest.raises(ValueError, match="FSDP2 needs weights of one dtype, got torch.bfloat16, "):
        shard(text().bfloat16(), mesh)


@pytest.fixture
def task(make, trainer, mesh):
    """Builds a task whose trainer is about to fit it on four devices."""

    def build(callbacks=(), **settings):
        task = make.task("causal_lm", **settings)
        task.trainer = trainer(callbacks=list(callbacks))
        task.trainer.state.fn = TrainerFn.FITTING
        names = ("data_parallel", "tensor_parallel")
        task._device_mesh = init_device_mesh("cpu", (4, 1), mesh_dim_names=names)
        return task

    return build


def test_weights_to_start_from_are_loaded_before_they_are_shared_out(task, make, tmp_path):
    torch.manual_seed(1)
    source = make.text()
    file = save_model(source, tmp_path)
    tuned = task(finetune=FineTuneConfig(str(file), new_head=False))
    assert not tuned.model.head.weight.equal(source.head.weight)
    tuned.configure_model()
    assert is_sharded(tuned.model)
    for name, parameter in tuned.model.named_parameters():
        share = source.get_parameter(name).chunk(4)[0]
        assert parameter.to_local().equal(share), name
    tuned.configure_model()  # Lightning calls it again for a second loop


def test_weight_averaging_is_refused(task):
    with pytest.raises(ValueError, match="weight averaging keeps a second model"):
        task(callbacks=[EMAWeightAveraging()]).configure_model()


def test_adapters_are_refused(task):
    sharded = task()
    sharded.finetune = FineTuneConfig(lora=LoRAConfig())
    with pytest.raises(ValueError, match="^lora is not supported with sharded weights"):
        sharded.configure_model()


def test_float8_is_refused(task):
    message = (
        "^fp8=True is not supported with sharded weights: train with strategy ddp, or drop fp8$"
    )
    with pytest.raises(ValueError, match=message):
        task(fp8=True).configure_model()


def test_muon_is_refused(task):
    sharded = task(optimizer=OptimizerConfig(1e-3, kind="muon"))
    sharded.configure_model()
    message = (
        "^kind='muon' orthogonalizes whole matrices, which fsdp2 and tensor parallelism shard: "
        "train with strategy ddp, or with kind='adamw'$"
    )
    with pytest.raises(ValueError, match=message):
        sharded.configure_optimizers()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_blocks_are_compiled_one_by_one(task):
    compiled = task(compile=True)
    compiled.setup("fit")
    compiled.configure_model()
    blocks = compiled.model.backbone.blocks
    assert all(block._compiled_call_impl is not None for block in blocks)
    assert compiled.model._compiled_call_impl is None
    checkpoint = {}
    compiled.on_save_checkpoint(checkpoint)
    assert checkpoint["model"]["class_path"] == "diffmm.models.TextModel"


def test_gradients_of_plain_and_of_sharded_weights_have_one_norm():
    weights = [torch.nn.Parameter(torch.zeros(n)) for n in (2, 3)]
    assert gradient_norm(weights) == 0.0
    weights[0].grad = torch.tensor([3.0, 4.0])
    assert gradient_norm(weights) == 5.0


def test_image_models_are_split_too(mesh):
    backbone = BackboneConfig(64, 1, 8, attention="diff_v1", rope="2d", feed_forward_width=64)
    model = ImageModel(ImageConfig(backbone=backbone, num_classes=3, image_size=8, patch_size=4))
    shard(model, mesh)
    lambda_q1 = model.backbone.blocks[0].attention.lambda_q1
    assert lambda_q1.to_local().shape == lambda_q1.shape
    assert lambda_q1.dtype == torch.float32
