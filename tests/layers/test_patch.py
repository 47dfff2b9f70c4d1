"""Patches, stems and positions on a grid."""

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from diffmm.layers.patch import PatchEmbedding, patchify, unpatchify
from diffmm.layers.positions import LearnedPositions, coordinates, resample
from diffmm.layers.stem import FrameStem, PatchStem


def test_patchify_and_back() -> None:
    images = torch.randn(2, 3, 8, 12)
    patches = patchify(images, (4, 3))
    assert patches.shape == (2, 8, 36)
    # The second patch of the first row: pixels row by row, with channels varying fastest.
    torch.testing.assert_close(
        patches[1, 1], images[1, :, :4, 3:6].permute(1, 2, 0).reshape(-1), rtol=0, atol=0
    )
    torch.testing.assert_close(unpatchify(patches, (4, 3), (2, 4)), images, rtol=0, atol=0)


def test_embedding_is_a_linear_map_of_patchify() -> None:
    images = torch.randn(2, 3, 8, 12)
    embedding = PatchEmbedding(3, 5, (4, 3))
    weight = embedding.proj.weight.permute(0, 2, 3, 1).flatten(1)
    expected = nn.functional.linear(patchify(images, (4, 3)), weight, embedding.proj.bias)
    torch.testing.assert_close(embedding(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("num_frames", "patch", "stride", "steps"),
    [(1, 16, 16, 1), (16, 16, 16, 1), (17, 16, 16, 2), (1024, 16, 16, 64), (16, 16, 10, 1),
     (17, 16, 10, 2), (26, 16, 10, 2), (27, 16, 10, 3), (3, 16, 5, 1)],
)  # fmt: skip
def test_patches_cover_every_frame(num_frames: int, patch: int, stride: int, steps: int) -> None:
    stem = PatchStem(32, 8, (patch, 16), (stride, 16))
    assert stem.grid(num_frames) == (steps, 2)
    assert stem.num_steps(torch.tensor([num_frames])).clamp(min=1).tolist() == [steps]
    spectrogram = torch.randn(1, 32, num_frames)
    assert stem(spectrogram).shape == (1, steps * 2, 8)
    spectrogram.requires_grad_()
    stem(spectrogram).square().sum().backward()
    assert (spectrogram.grad != 0).any(dim=1).all()


def test_tokens_go_by_time_then_frequency() -> None:
    stem = PatchStem(num_mels=32, dim=8, patch_size=(4, 8))
    spectrogram = torch.zeros(1, 32, 12)
    silence = stem(spectrogram)
    spectrogram[0, 8:16, 4:8] = 1.0  # second band of four, second step of three
    changed = (stem(spectrogram) != silence).any(dim=-1)[0]
    assert changed.nonzero().flatten().tolist() == [1 * 4 + 1]


@pytest.mark.parametrize("strides", [(1, 2), (2, 2), (3, 1)])
@pytest.mark.parametrize("num_frames", [1, 2, 7, 8])
def test_frame_stem_counts_its_tokens(strides: tuple[int, int], num_frames: int) -> None:
    stem = FrameStem(6, 8, strides)
    (steps,) = stem.grid(num_frames)
    assert stem(torch.randn(2, 6, num_frames)).shape == (2, steps, 8)
    assert stem.num_steps(torch.tensor([num_frames])).tolist() == [steps]


def test_stems_refuse() -> None:
    with pytest.raises(ValueError, match=r"patch of 64 mel bands does not fit num_mels=32"):
        PatchStem(32, 8, (16, 64))
    with pytest.raises(ValueError, match=r"patch_stride must be between 1 and patch_size.*20"):
        PatchStem(32, 8, (16, 16), (20, 16))
    with pytest.raises(ValueError, match=r"frame_strides must be between 1 and 3, got \(1, 4\)"):
        FrameStem(32, 8, (1, 4))


def test_resampling_positions() -> None:
    positions = torch.randn(4, 6, 8)
    assert resample(positions, (4, 6)) is positions
    # Equal to timm's for the same sizes.
    theirs = resample_abs_pos_embed(
        positions.reshape(1, 24, 8), new_size=[7, 5], old_size=[4, 6], num_prefix_tokens=0
    )
    torch.testing.assert_close(resample(positions, (7, 5)).reshape(1, 35, 8), theirs)
    # Along one axis, or in a grid one token wide, a line stays a line (except at the borders).
    line = torch.linspace(0, 1, 8)[:, None].expand(8, 3)
    for longer in (resample(line, (16,)), resample(line[:, None], (16, 1)).squeeze(1)):
        torch.testing.assert_close(longer[4:-4].diff(dim=0), torch.full((7, 3), 0.5 / 7))
    assert resample(positions.bfloat16(), (2, 2)).dtype == torch.bfloat16


def test_learned_positions_go_row_by_row() -> None:
    positions = LearnedPositions((2, 3), 4, num_prefix=1)
    nn.init.normal_(positions.grid)
    torch.testing.assert_close(positions(6)[4], positions.grid[1, 1])
    torch.testing.assert_close(positions(3), positions.grid[0])
    assert positions.prefix is not None
    assert LearnedPositions((2,), 4, num_prefix=0).prefix is None


def test_coordinates_count_from_one() -> None:
    assert coordinates((2, 2)).tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert coordinates((3,)).tolist() == [1, 2, 3]


def test_coordinates_of_another_size_keep_their_place() -> None:
    assert coordinates((2, 4), (2, 4)).equal(coordinates((2, 4)))
    coarse, fine = coordinates((4, 4)).reshape(4, 4, 2), coordinates((8, 8), (4, 4))
    # The center of four fine patches is the center of the coarse one.
    fine = fine.reshape(4, 2, 4, 2, 2).mean(dim=(1, 3))
    torch.testing.assert_close(fine, coarse)
