"""Features of a ViT in heads for segmentation and detection.

`features_only=True` of timm returns maps of features `[B, dim, H, W]` of chosen blocks. Here the
last two are joined; one head classifies every pixel, the other predicts at every patch whether an
object is there, and its box (as distances from the patch's center, Tian et al. 2019, FCOS). The
images have one square or ring on a noisy background.

    python docs/examples/dense.py       # trains for a minute, prints both overlaps
"""

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, softplus
from torchvision.ops import box_iou, generalized_box_iou_loss

import diffmm.hub.timm_models  # noqa: F401 (registers the models)

SIZE, PATCH = 32, 4
CLASSES = ("background", "square", "ring")
CLASS_WEIGHTS = torch.tensor([0.3, 1.0, 1.0])  # most pixels are background


class Dense(nn.Module):
    """Images to scores of pixels, scores of patches, and boxes.

    Args:
        features: A model of timm with `features_only=True` and a patch size of 4.
        dim: Width of the heads.
    """

    def __init__(self, features: nn.Module, dim: int = 64) -> None:
        super().__init__()
        self.features = features
        channels = features.feature_info.channels()
        self.joined = nn.Sequential(nn.Conv2d(sum(channels), dim, 1), nn.GELU())
        self.pixels = nn.ConvTranspose2d(dim, len(CLASSES), PATCH, stride=PATCH)
        self.objects = nn.Conv2d(dim, 1 + 4, 1)
        places = (torch.arange(SIZE // PATCH) + 0.5) * PATCH
        y, x = torch.meshgrid(places, places, indexing="ij")
        self.register_buffer("centers", torch.stack([x, y]))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the classes `[B, 3, H, W]`, logits of objects `[B, h, w]`, and boxes
        `[B, h, w, 4]` as left, top, right, bottom in pixels."""
        joined = self.joined(torch.cat(self.features(images), dim=1))
        scores, left_top, right_bottom = self.objects(joined).split([1, 2, 2], dim=1)
        corners = [
            self.centers - PATCH * softplus(left_top),
            self.centers + PATCH * softplus(right_bottom),
        ]
        return self.pixels(joined), scores[:, 0], torch.cat(corners, dim=1).permute(0, 2, 3, 1)


def draw(count: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images `[B, 3, H, W]`, the class of every pixel `[B, H, W]`, and the objects' boxes
    `[B, 4]`."""
    radii = torch.randint(4, 9, (count,), generator=random)
    centers = torch.stack([torch.randint(8, SIZE - 8, (count,), generator=random) for _ in "xy"], 1)
    kinds = torch.randint(1, 3, (count,), generator=random)
    offsets = torch.arange(SIZE)[:, None] - centers[:, None]  # [B, SIZE, (x, y)]
    x, y = offsets[:, None, :, 0], offsets[:, :, None, 1]
    is_square = (x.abs() <= radii[:, None, None]) & (y.abs() <= radii[:, None, None])
    squares, outer = x.square() + y.square(), radii[:, None, None].square()
    is_ring = (squares <= outer) & (squares >= outer / 4)
    inside = torch.where(kinds[:, None, None] == 1, is_square, is_ring)
    colors = torch.rand(count, 3, 1, 1, generator=random) + 0.3
    noise = 0.3 * torch.randn(count, 3, SIZE, SIZE, generator=random)
    boxes = torch.cat([centers - radii[:, None], centers + radii[:, None] + 1], dim=1).float()
    return inside[:, None] * colors + noise, inside * kinds[:, None, None], boxes


def loss_of(model: Dense, images: Tensor, classes: Tensor, boxes: Tensor) -> Tensor:
    """The sum of the losses of pixels, of objects and of boxes."""
    pixels, scores, found = model(images)
    x, y = model.centers
    left, top, right, bottom = boxes[:, :, None, None].unbind(1)
    inside = (left < x) & (x < right) & (top < y) & (y < bottom)
    wanted = boxes[:, None, None].expand_as(found)
    return (
        2 * cross_entropy(pixels, classes, weight=CLASS_WEIGHTS)
        + binary_cross_entropy_with_logits(scores, inside.float())
        + generalized_box_iou_loss(found[inside], wanted[inside], reduction="mean")
    )


def train(steps: int = 150, attention: str = "diff_v2") -> tuple[float, float]:
    """Train on new images in every step; return the mean overlap (intersection over union) of
    segmented shapes and of boxes, on others."""
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    sizes = {"img_size": SIZE, "dim": 64, "depth": 4, "num_heads": 4, "attention": attention}
    name = f"diffmm_vit_small_patch{PATCH}_{SIZE}"
    features = timm.create_model(name, features_only=True, out_indices=(2, 3), **sizes)
    model = Dense(features)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        loss = loss_of(model, *draw(32, random))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    images, classes, boxes = draw(128, random)
    with torch.inference_mode():
        pixels, scores, found = model.eval()(images)
    shapes = pixels.argmax(dim=1)
    both = ((shapes == classes) & (classes > 0)).sum((1, 2))
    either = ((shapes > 0) | (classes > 0)).sum((1, 2))
    best = found.flatten(1, 2)[torch.arange(len(boxes)), scores.flatten(1).argmax(dim=1)]
    return float((both / either).mean()), float(box_iou(best, boxes).diagonal().mean())


if __name__ == "__main__":
    print("overlap of shapes {:.3f}, of boxes {:.3f}".format(*train()))
