"""Image towers of open_clip and DiffCLIP: the same embeddings and gradients."""

import json

import pytest
import torch
from encoders import compare_gradients, randomize
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import Mlp
from timm.models import VisionTransformer
from torch import nn

from diffmm.hub.readers import make_reader
from diffmm.interop import FAMILIES, read_model, write_model
from diffmm.models import ContrastiveConfig, ContrastiveModel
from diffmm.models.weights import load_model, own_weights, save_model
from diffmm.training import Contrastive, FineTuneConfig, OptimizerConfig, ScheduleConfig

open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch")

TEXT = {"context_length": 7, "vocab_size": 30, "width": 16, "heads": 2, "layers": 1}
VISION = {"image_size": [24, 36], "patch_size": 12, "width": 24, "head_width": 12, "layers": 2}
CASES = {
    "clip": {},
    "quick gelu": {"quick_gelu": True},
    "mean, norm after the pool, layer scale": {
        "vision_cfg": {"pool_type": "avg", "final_ln_after_pool": True, "ls_init_value": 0.5}
    },
    "no norm before, eps, width": {
        "vision_cfg": {"no_ln_pre": True, "norm_kwargs": {"eps": 1e-3}, "mlp_ratio": 2.6}
    },
    "positions that are not learned": {
        "vision_cfg": {"pos_embed_type": "sin_cos_2d", "image_size": 24}
    },
}
PREPROCESSING = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "resize_mode": "squash"}


def saved(folder, changes):
    """A model of open_clip, and its folder as on the hub."""
    settings = {"embed_dim": 10, "quick_gelu": changes.get("quick_gelu", False)}
    settings["vision_cfg"] = VISION | changes.get("vision_cfg", {})
    settings["text_cfg"] = TEXT | changes.get("text_cfg", {})
    custom = "custom_text" in changes
    classes = {False: open_clip.model.CLIP, True: open_clip.model.CustomTextCLIP}
    model = randomize(classes[custom](**settings))
    settings["custom_text"] = custom
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    values = {"model_cfg": settings, "preprocess_cfg": PREPROCESSING}
    (folder / "open_clip_config.json").write_text(json.dumps(values))
    return model


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_embeddings_and_all_gradients_of_open_clip(changes, tmp_path):
    theirs, folder = saved(tmp_path / "clip", changes), tmp_path / "clip"
    ours = read_model(folder)
    tower = theirs.visual.requires_grad_(True)
    x = torch.randn(2, 3, *tower.image_size)
    renamed = {name: f"visual.{name}" for name, _ in tower.named_parameters()}
    compare_gradients(tower, ours, lambda m, dtype: m(x.to(dtype)), "open_clip", renamed)
    truth = load_file(folder / "open_clip_model.safetensors")
    back = FAMILIES["open_clip"].table(ours.config).to_theirs(own_weights(read_model(folder)))
    assert back.keys() == {name for name in truth if name.startswith("visual.")}
    assert all(torch.equal(tensor, truth[name]) for name, tensor in back.items())
    with pytest.raises(ValueError, match="open_clip has no model of an image tower alone"):
        write_model(ours, tmp_path / "never", "open_clip")


def test_preprocessing_of_open_clip(tmp_path):
    saved(tmp_path / "clip", {"vision_cfg": {"image_size": 24}})
    reader = make_reader(read_model(tmp_path / "clip").job, "a test")
    pixels = (torch.rand(40, 30, 3) * 255).byte().numpy()
    transform = open_clip.transform.image_transform(24, is_train=False, **PREPROCESSING)
    assert torch.equal(reader.read(pixels)["images"], transform(Image.fromarray(pixels)))


def test_a_whole_clip_of_two_converted_towers(tmp_path):
    """Both towers load into a contrastive model, which then has open_clip's similarities."""
    theirs, folder = saved(tmp_path / "clip", {}), tmp_path / "clip"
    for name in ("image", "text"):
        tower = read_model(folder, "open_clip" if name == "image" else "open_clip_text")
        save_model(tower, tmp_path / name)
    configs = {name: load_model(tmp_path / name).config for name in ("image", "text")}
    model = ContrastiveModel(ContrastiveConfig(**configs, embed_dim=10))
    start = {name: FineTuneConfig(str(tmp_path / name), new_head=False) for name in configs}
    task = Contrastive(model, OptimizerConfig(1e-3), ScheduleConfig(10), **start)
    task.load_first_weights()
    images, tokens = torch.randn(3, 3, 24, 36), torch.randint(0, 29, (2, 7))
    tokens[:, 4] = 29
    ours = model.eval()(tokens.repeat(2, 1)[:3], None, images)
    with torch.no_grad():
        x, y, _ = theirs.eval()(images, tokens.repeat(2, 1)[:3])
    torch.testing.assert_close(ours.media, x)
    torch.testing.assert_close(ours.texts, y)


TEXT_CASES = {
    "clip": {},
    "quick gelu, end of text by its id": {
        "quick_gelu": True,
        "text_cfg": {"pool_type": "eos", "eos_id": 3},
    },
    "siglip": {
        "custom_text": True,
        "text_cfg": {
            "no_causal_mask": True,
            "pool_type": "last",
            "proj_bias": True,
            "act_kwargs": {"approximate": "tanh"},
            "norm_kwargs": {"eps": 1e-6},
        },
    },
    "first token, no projection, layer scale": {
        "custom_text": True,
        "text_cfg": {
            "pool_type": "first",
            "proj_type": "none",
            "ls_init_value": 0.3,
            "no_causal_mask": True,
        },
    },
}


@pytest.mark.parametrize("changes", TEXT_CASES.values(), ids=TEXT_CASES)
def test_embeddings_and_all_gradients_of_open_clips_text_tower(changes, tmp_path):
    theirs, folder = saved(tmp_path / "clip", changes), tmp_path / "clip"
    ours = read_model(folder, "open_clip_text")
    tokens = torch.randint(0, 30, (3, 7))
    tokens[:, 4] = 3
    custom = "custom_text" in changes
    tower = theirs.text if custom else theirs

    def run(model, dtype):
        if model is ours or custom:
            return model(tokens)
        return model.encode_text(tokens)

    if not custom:  # the towers are one module
        del theirs.visual, theirs.logit_scale
    compare_gradients(tower, ours, run, "open_clip_text")
    shorter = torch.randint(0, 30, (2, 5))
    found = ours.float()(shorter)
    expected = tower.float()(shorter) if custom else None
    if expected is not None:
        torch.testing.assert_close(found, expected)
    truth = load_file(folder / "open_clip_model.safetensors")
    weights = own_weights(read_model(folder, "open_clip_text"))
    for name, tensor in FAMILIES["open_clip_text"].table(ours.config).to_theirs(weights).items():
        assert torch.equal(tensor, truth[f"text.{name}" if custom else name])
    with pytest.raises(ValueError, match="open_clip has no model of a text tower alone"):
        write_model(ours, tmp_path / "never", "open_clip_text")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hf_model_name": "bert"}, "hf_model_name='bert', but diffmm can hold only None"),
        ({"embed_cls": True}, "embed_cls=True, but diffmm can hold only False"),
        ({"no_causal_mask": True, "use_pad_mask": True}, "use_pad_mask=True, but diffmm can hold"),
        ({"pool_type": "none"}, "pool_type='none', but diffmm can hold only argmax, eos, first"),
        ({"proj_type": "mlp"}, "proj_type='mlp', but diffmm can hold only 'linear' and 'none'"),
        ({"act_kwargs": {"approximate": "x"}}, "act_kwargs={'approximate': 'x'}, but diffmm can"),
        ({"glow": 1}, "model_cfg: text_cfg has settings that diffmm does not know.*: glow=1"),
    ],
)
def test_what_diffmm_cannot_hold_of_a_text_tower_is_refused(changes, message, tmp_path):
    saved(tmp_path / "clip", {})
    file = tmp_path / "clip" / "open_clip_config.json"
    settings = json.loads(file.read_text())
    settings["model_cfg"]["text_cfg"] |= changes
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        read_model(tmp_path / "clip", "open_clip_text")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timm_model_name": "vit_base"}, "timm_model_name='vit_base', but diffmm can hold only"),
        ({"head_width": 0}, "has settings out of range: integer division or modulo by zero"),
        ({"image_size": 7.5}, "has settings out of range: cannot unpack non-iterable float"),
        ({"attentional_pool": True}, "attentional_pool=True, but diffmm can hold only False"),
        ({"block_type": "custom"}, "block_type='custom', but diffmm can hold only 'default'"),
        ({"layers": [3, 4, 6, 3]}, r"vision_cfg: layers must be an integer, got \[3, 4, 6, 3\]"),
        ({"pool_type": "none"}, "pool_type='none', but diffmm can hold only tok, avg"),
        ({"glow": 1}, "model_cfg: vision_cfg has settings that diffmm does not know.*: glow=1"),
    ],
)
def test_what_diffmm_cannot_hold_of_open_clip_is_refused(changes, message, tmp_path):
    saved(tmp_path / "clip", {})
    file = tmp_path / "clip" / "open_clip_config.json"
    settings = json.loads(file.read_text())
    settings["model_cfg"]["vision_cfg"] |= changes
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        read_model(tmp_path / "clip")


def test_the_same_model_for_transformers_may_be_beside(tmp_path):
    saved(tmp_path / "clip", {})
    others = tmp_path / "clip" / "config.json"
    others.write_text(json.dumps({"model_type": "clip"}))
    assert read_model(tmp_path / "clip").num_classes == 10
    others.write_text(json.dumps({"architecture": "vit_base_patch16_224", "num_classes": 0}))
    with pytest.raises(ValueError, match="has no model.safetensors"):
        read_model(tmp_path / "clip")


class DiffCLIPAttention(nn.Module):
    """The equations of DiffCLIP's attention, with its names."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_pairs, self.head_dim = num_heads // 2, dim // num_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(dim, dim))
        self.diff_norm = nn.RMSNorm(2 * self.head_dim, eps=1e-5)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            setattr(self, name, nn.Parameter(torch.zeros(self.head_dim)))

    def forward(self, x, mask=0.0, **_):
        q, k = (p(x).unflatten(-1, (self.num_pairs, 2, -1)) for p in (self.q_proj, self.k_proj))
        v = self.v_proj(x).unflatten(-1, (self.num_pairs, -1))
        scores = torch.einsum("bnhcd,bmhcd->bhcnm", q, k) * self.head_dim**-0.5
        maps = (scores + mask).softmax(-1)
        first, second = (
            (getattr(self, f"lambda_q{i}") * getattr(self, f"lambda_k{i}")).sum().exp()
            for i in (1, 2)
        )
        difference = maps[:, :, 0] - (first - second + 0.8) * maps[:, :, 1]
        heads = torch.einsum("bhnm,bmhe->bnhe", difference, v)
        return self.out_proj((self.diff_norm(heads) * (1 - 0.8)).flatten(2))


class DiffCLIPBlock(nn.Module):
    """A block of DiffCLIP's text tower, with its names."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.attn = DiffCLIPAttention(dim, num_heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(dim, 40), "c_proj": nn.Linear(40, dim)})

    def forward(self, x, mask):
        x = x + self.attn(self.ln_1(x), mask)
        hidden = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](hidden * (1.702 * hidden).sigmoid())


class DiffCLIPText(nn.Module):
    """DiffCLIP's text tower, with its names."""

    def __init__(self):
        super().__init__()
        blocks = nn.ModuleList(DiffCLIPBlock(24, 4) for _ in range(2))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.token_embedding = nn.Embedding(30, 24)
        self.positional_embedding = nn.Parameter(torch.empty(7, 24))
        self.ln_final = nn.LayerNorm(24)
        self.text_projection = nn.Parameter(torch.empty(24, 10))

    def forward(self, tokens):
        x = self.token_embedding(tokens) + self.positional_embedding
        mask = torch.full((7, 7), -torch.inf, dtype=x.dtype).triu(1)
        for block in self.transformer["resblocks"]:
            x = block(x, mask)
        x = self.ln_final(x)
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection


class DiffCLIPTower(nn.Module):
    """DiffCLIP's image tower: timm's ViT with this attention and torch's LayerNorm."""

    def __init__(self):
        super().__init__()
        self.visual = VisionTransformer(
            img_size=24, patch_size=8, embed_dim=24, depth=2, num_heads=4, num_classes=0,
            norm_layer=nn.LayerNorm, mlp_layer=Mlp,
        )  # fmt: skip
        for block in self.visual.blocks:
            block.attn = DiffCLIPAttention(24, 4)
        self.image_projection = nn.Parameter(torch.empty(24, 10))

    def forward(self, images):
        return self.visual(images) @ self.image_projection


@pytest.fixture
def diffclip(tmp_path):
    """DiffCLIP's image tower and a folder of the whole model."""
    theirs = randomize(DiffCLIPTower())
    theirs.text = [randomize(DiffCLIPText())]
    tensors = theirs.state_dict() | theirs.text[0].state_dict() | {"logit_scale": torch.ones(())}
    tensors = {f"module.{name}": x for name, x in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "diffclip"}))
    return theirs, tmp_path


def test_embeddings_and_all_gradients_of_diffclip(diffclip, tmp_path):
    theirs, folder = diffclip
    ours = read_model(folder)
    assert ours.backbone.attentions[1].lambda_init == 0.8
    x = torch.randn(2, 3, 24, 24)
    compare_gradients(theirs, ours, lambda m, dtype: m(x.to(dtype)), "diffclip")
    assert make_reader(ours.job, "a test").crop_mode == "squash"
    with pytest.raises(ValueError, match="diffclip has no model of an image tower alone"):
        write_model(ours, tmp_path / "never", "diffclip")


def test_embeddings_and_all_gradients_of_diffclips_text_tower(diffclip, tmp_path):
    theirs, folder = diffclip[0].text[0], diffclip[1]
    ours = read_model(folder, "diffclip_text")
    tokens = torch.randint(0, 30, (3, 7))
    compare_gradients(theirs, ours, lambda m, dtype: m(tokens), "diffclip_text")
    with pytest.raises(ValueError, match="diffclip has no model of a text tower alone"):
        write_model(ours, tmp_path / "never", "diffclip_text")


def test_images_of_a_diffclip_are_square(diffclip):
    _, folder = diffclip
    tensors = load_file(folder / "model.safetensors")
    tensors["module.visual.pos_embed"] = torch.ones(1, 7, 24)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="num_patches=6, but diffmm can hold only square images"):
        read_model(folder)


def test_another_model_is_not_taken_for_a_diffclip(diffclip):
    _, folder = diffclip
    tensors = load_file(folder / "model.safetensors")
    extra = {"module.visual.blocks.1.attn.extra": torch.ones(2)}
    save_file(tensors | extra, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 not expected \(visual.blocks.1.attn.extra\)"):
        read_model(folder)
    del tensors["module.visual.blocks.0.attn.lambda_q1"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"is not a DiffCLIP: visual.blocks.0.attn.lambda_q1 must"):
        read_model(folder)
