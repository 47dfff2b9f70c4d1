"""Models exported by `torch.export` accept batches of any size."""

from copy import deepcopy

import pytest
import torch
from torch.export import Dim, export
from torch.utils import _pytree

from diffmm.models import (
    AudioConfig,
    AudioModel,
    BackboneConfig,
    ImageConfig,
    ImageModel,
    TextConfig,
    TextModel,
    TextTower,
    TextTowerConfig,
)
from diffmm.ops import AttentionMask

ATTENTIONS = ("softmax", "diff_v1", "diff_v2")
BATCH, LENGTH = {0: Dim("batch")}, 9


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def backbone(rope="2d", attention="diff_v1"):
    return BackboneConfig(dim=32, depth=2, num_heads=4, rope=rope, attention=attention)


def text(attention="diff_v1"):
    config = TextConfig(vocab_size=50, max_length=20, backbone=backbone("1d", attention))
    return TextModel(config).eval()


def ids(batch, length=LENGTH):
    return torch.randint(50, (batch, length))


def mask_of(kind, batch, length=LENGTH):
    """A mask and its dynamic dimensions, in the order in which it is flattened."""
    documents = torch.arange(length).expand(batch, -1) // 4
    real = torch.arange(length) >= torch.arange(batch)[:, None] % 4
    prefix = torch.arange(batch) % 3
    fields = {
        "causal": {},
        "window": {"window": 3},
        "prefix": {"prefix_lengths": prefix},
        "all": {"prefix_lengths": prefix, "document_ids": documents, "key_padding": real},
    }[kind]
    mask = AttentionMask(causal=True, **fields)
    tensors = (mask.prefix_lengths, mask.document_ids, mask.key_padding)
    return mask, [None if tensor is None else BATCH for tensor in tensors]


@pytest.mark.parametrize(
    ("attention", "kind"),
    [
        ("diff_v1", "causal"),
        ("diff_v1", "window"),
        ("diff_v1", "prefix"),
        *((attention, "all") for attention in ATTENTIONS),
    ],
)
def test_text_with_a_mask(attention, kind):
    model = text(attention)
    mask, dims = mask_of(kind, 2)
    shapes = {"tokens": BATCH, "mask": dims}
    program = export(model, (ids(2),), {"mask": mask}, dynamic_shapes=shapes).module()
    for batch in (3, 5):
        tokens, mask = ids(batch), mask_of(kind, batch)[0]
        torch.testing.assert_close(program(tokens, mask=mask), model(tokens, mask=mask))
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        program(tokens, mask=AttentionMask())


@pytest.mark.parametrize(
    ("attention", "strict"), [*((name, False) for name in ATTENTIONS), ("diff_v1", True)]
)
def test_text_with_a_cache_and_a_mask(attention, strict):
    """One program generates every token of every batch; its caller counts them."""
    model = text(attention)

    def started(batch):
        cache = model.new_cache(batch)
        real = mask_of("all", batch, 20)[0].key_padding
        model(ids(batch, 4), mask=AttentionMask(causal=True, key_padding=real[:, :4]), cache=cache)
        return cache, real

    def mask(length):
        return AttentionMask(causal=True, key_padding=real[:, :length])

    cache, real = started(2)
    shapes = {
        "tokens": BATCH,
        "mask": [None, None, {**BATCH, 1: Dim.DYNAMIC}],
        "cache": [[BATCH] * 2, [BATCH] * 2, Dim.DYNAMIC],
    }
    arguments = {"mask": mask(5), "cache": cache}
    program = export(model, (ids(2, 1),), arguments, dynamic_shapes=shapes, strict=strict).module()
    assert cache.length == 4
    cache, real = started(5)
    twin = deepcopy(cache)
    for length in range(5, 12):
        token = ids(5, 1)
        found = program(token, mask=mask(length), cache=cache)
        cache.advance(1)
        torch.testing.assert_close(found, model(token, mask=mask(length), cache=twin))
    for ours, theirs in zip(_pytree.tree_leaves(cache), _pytree.tree_leaves(twin), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_images(attention):
    config = ImageConfig(
        backbone=backbone(attention=attention), image_size=16, patch_size=4, num_classes=3
    )
    model = ImageModel(config).eval()
    program = export(model, (torch.randn(2, 3, 16, 16),), dynamic_shapes=(BATCH,)).module()
    images = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(program(images), model(images))


@pytest.mark.parametrize(
    "options",
    [
        {"pool": "map", "pool_prefix_tokens": False, "pool_norm": True, "pre_norm": True},
        {"dist_token": True, "pool": "cls_dist", "head": "distilled"},
    ],
)
def test_images_with_options_of_other_models(options):
    normalized = {"rope_coordinates": "normalized", "ignore_remainder": True}
    config = ImageConfig(
        backbone=backbone(), image_size=18, patch_size=4, num_classes=3, **normalized, **options
    )
    model = ImageModel(config).eval()
    program = export(model, (torch.randn(2, 3, 18, 18),), dynamic_shapes=(BATCH,)).module()
    images = torch.randn(5, 3, 18, 18)
    torch.testing.assert_close(program(images), model(images))


@pytest.mark.parametrize("spectrogram", ["kaldi", "whisper"])
def test_sounds_that_are_padded_to_one_length(spectrogram):
    config = AudioConfig(
        backbone=backbone(),
        sample_rate_hz=16000,
        num_mels=32,
        num_classes=3,
        spectrogram=spectrogram,
        clip_seconds=0.5,
    )
    model = AudioModel(config).eval()

    def clips(batch, length):
        return torch.randn(batch, length), torch.randint(1, length + 1, (batch,))

    shapes = ({**BATCH, 1: Dim("length", min=2, max=8000)}, BATCH)
    exported = export(model, clips(2, 4000), dynamic_shapes=shapes)
    assert not any("diffmm" in str(node.target) for node in exported.graph.nodes)
    inputs = clips(5, 6000)
    torch.testing.assert_close(exported.module()(*inputs), model(*inputs))


def test_text_towers():
    config = TextTowerConfig(vocab_size=50, max_length=20, backbone=backbone("none"), num_outputs=4)
    model = TextTower(config).eval()
    shapes = ({**BATCH, 1: Dim("length", min=2, max=20)},)
    program = export(model, (ids(2),), dynamic_shapes=shapes).module()
    tokens = ids(5, 20)
    torch.testing.assert_close(program(tokens), model(tokens))


@pytest.mark.parametrize(("stem", "attention"), [("patch", "diff_v1"), ("frame", "diff_v2")])
def test_sounds_of_several_lengths(stem, attention):
    rope = "2d" if stem == "patch" else "1d"
    model = AudioModel(
        AudioConfig(
            backbone=backbone(rope, attention),
            sample_rate_hz=8000,
            num_mels=32,
            num_classes=3,
            stem=stem,
        )
    ).eval()

    def clips(batch):
        return torch.randn(batch, 4000), torch.randint(1, 4001, (batch,))

    exported = export(model, clips(2), dynamic_shapes=(BATCH, BATCH))
    assert not any("diffmm" in str(node.target) for node in exported.graph.nodes)
    inputs = clips(5)
    torch.testing.assert_close(exported.module()(*inputs), model(*inputs))


def test_trees_of_masks_and_caches():
    for mask in (mask_of("all", 2)[0], AttentionMask(window=3), AttentionMask(causal=True)):
        leaves, spec = _pytree.tree_flatten(mask)
        assert _pytree.tree_unflatten(leaves, spec) == mask
        assert _pytree.treespec_loads(_pytree.treespec_dumps(spec)) == spec
        # This holds for any leaves.
        shapes = _pytree.tree_map(lambda leaf: type(leaf).__name__, mask)
        assert (shapes.causal, shapes.window) == (mask.causal, mask.window)
    cache = text().new_cache(2, 6)
    cache.advance(3)
    moved = _pytree.tree_map(lambda leaf: leaf.double() if torch.is_tensor(leaf) else leaf, cache)
    assert moved.length == 3
    assert {buffer.dtype for buffer in (*moved.keys, *moved.values)} == {torch.float64}
    spec = _pytree.tree_structure(cache)
    assert _pytree.treespec_loads(_pytree.treespec_dumps(spec)) == spec
