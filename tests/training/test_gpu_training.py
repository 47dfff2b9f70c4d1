"""On a GPU: the fused optimizer, float16 and compiled bfloat16."""

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("precision", "fused"), [("32-true", True), ("bf16-mixed", True), ("16-mixed", False)]
)
@pytest.mark.parametrize("name", ["causal_lm", "image", "audio", "image_mae"])
def test_the_optimizer_is_fused_where_it_can_be(name, precision, fused, make, fit):
    """A gradient scaler could not clip gradients that the fused kernel unscales itself."""
    batch = make.batch(name)
    trainer = fit(
        make.task(name),
        [batch],
        [batch],
        accelerator="gpu",
        precision=precision,
        max_steps=3,
        limit_train_batches=3,
        gradient_clip_val=1.0,
    )
    assert all(bool(group["fused"]) == fused for group in trainer.optimizers[0].param_groups)
    metrics = trainer.callback_metrics
    assert all(torch.isfinite(value) for value in metrics.values()), metrics
    assert metrics["train/grad_norm"] < 1e3


@pytest.mark.parametrize("attention", ["softmax", "diff_v1", "diff_v2"])
def test_compiled_bfloat16_follows_eager_float32(attention, make, fit):
    batch, losses = make.batch("causal_lm"), []
    for settings in ({"precision": "32-true"}, {"precision": "bf16-mixed", "compile": True}):
        torch.manual_seed(0)
        task = make.task("causal_lm", attention, compile=settings.pop("compile", False))
        trainer = fit(task, [batch], accelerator="gpu", max_steps=20, logger=False, **settings)
        losses.append(trainer.callback_metrics["train/loss"].item())
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
