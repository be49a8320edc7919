"""Numbers that others computed, written out: a change of any is a change of what a served model sees.

Sources in short: VL is vllm-project/vllm (nano_nemotron_vl.py, parakeet.py, evs.py), TF transformers 5.23, DYN NVIDIA
Dynamo (its golden token counts of vLLM 0.28); "spec" is the project's spec/nemotron-vl.md, which cites them.
"""

from __future__ import annotations

import pytest
import torch

from lightning_vlm.geometry.images import ImageGeometry, fit_dynamic_grids, num_tiles, tile_ratio
from lightning_vlm.geometry.sounds import SoundGeometry
from lightning_vlm.geometry.videos import VideoGeometry, frame_labels, retained_tokens, timestamps_s
from lightning_vlm.models.evs import retention_mask
from lightning_vlm.models.projector import pixel_shuffle

OMNI = ImageGeometry()
NANO_12B = ImageGeometry(mode="static")


# Spec D2 (VL = TF = DYN), width x height. The side is halved after rounding half to even: 64 x 32 gives 276, not 256.
@pytest.mark.parametrize(
    ("width", "height", "tokens"),
    [
        (224, 224, 256),
        (64, 32, 276),
        (512, 512, 256),
        (1000, 500, 512),
        (1024, 1024, 1024),
        (1536, 1536, 2304),
        (1920, 1080, 2040),
        (4000, 3000, 3300),
    ],
)
def test_dynamic_images(width: int, height: int, tokens: int) -> None:
    assert OMNI.num_image_tokens(height, width) == tokens


def test_dynamic_grid_of_a_full_hd_image() -> None:
    assert OMNI.image_grids(1080, 1920) == [(68, 120)]  # spec D2


def test_three_images_share_a_context() -> None:
    grids = fit_dynamic_grids([(1080, 1920)] * 3, OMNI, max_tokens=4096, text_tokens=14)
    assert [OMNI.num_tokens([grid]) for grid in grids] == [1344] * 3  # spec D2 (VL; TF does not scale across images)


# Spec D1 (VL): nearest ratio of 1..12 tiles; on a tie the later one only above half its area, 0.5 * 512**2 * i * j;
# a thumbnail last where there is more than one tile; 256 tokens each.
@pytest.mark.parametrize(
    ("width", "height", "columns_rows", "tiles"),
    [
        (512, 512, (1, 1), 1),
        (724, 724, (1, 1), 1),  # 724**2 = 524,176 <= 524,288: a tie, and too small for 2 x 2
        (725, 725, (2, 2), 5),
        (800, 600, (4, 3), 13),  # no tie: 4 / 3 is met by 4 x 3 alone
        (1000, 500, (2, 1), 3),
        (724, 362, (2, 1), 3),
        (1449, 724, (4, 2), 9),  # not quite 2: 4 x 2 ties with 2 x 1 and the image has more than half its area
        (2048, 2048, (3, 3), 10),
    ],
)
def test_static_images(width: int, height: int, columns_rows: tuple[int, int], tiles: int) -> None:
    assert tile_ratio(height, width, NANO_12B) == columns_rows[::-1]
    assert num_tiles(height, width, NANO_12B) == tiles
    assert NANO_12B.num_image_tokens(height, width) == 256 * tiles


# Spec D3 (VL, TF). For 12B every frame is one 512 x 512 tile.
@pytest.mark.parametrize(
    ("width", "height", "columns_rows", "tokens"),
    [(512, 512, (32, 32), 256), (1280, 720, (42, 24), 252), (640, 480, (36, 28), 252)],
)
def test_video_frames(width: int, height: int, columns_rows: tuple[int, int], tokens: int) -> None:
    geometry = VideoGeometry()
    grid = geometry.grid(height, width)
    assert grid == columns_rows[::-1]
    assert geometry.tokens_per_tubelet(grid) == tokens
    square = VideoGeometry(temporal_patch_size=1, keep_aspect=False)
    assert square.grid(height, width) == (32, 32)
    assert square.tokens_per_tubelet((32, 32)) == 256


# Spec D4 (VL = TF = arXiv 2510.14624): max(tokens of a frame, int(T * tokens * (1 - q))), T in tubelets for Omni.
@pytest.mark.parametrize(
    ("tokens", "tubelets", "rate", "kept"),
    [
        (256, 64, 0.0, 16384),
        (256, 64, 0.5, 8192),
        (256, 64, 0.7, 4915),  # 4915.2
        (252, 64, 0.7, 4838),  # 4838.4
        (252, 5, 0.7, 378),
        (252, 3, 0.7, 252),  # 226.8 would be less than the first tubelet
        (252, 1, 0.7, 252),
        (10, 10, 0.9, 10),  # 1 - 0.9 is a little less than 0.1 in binary: 9.999..., but never less than a tubelet
        (10, 20, 0.9, 19),  # and here it shows: serving rounds down the same product
    ],
)
def test_retained_tokens(tokens: int, tubelets: int, rate: float, kept: int) -> None:
    assert retained_tokens(tokens, tubelets, rate) == kept


def test_retention_mask_by_hand() -> None:
    # Three tubelets of three tokens; 1 - cosine to the same place one tubelet before, by hand:
    #   tubelet 1: (1, 0) -> (1, 0) 0;      (0, 2) -> (0, -1) 2;   (3, 4) -> (4, 3) 1 - 24/25 = 0.04
    #   tubelet 2: (1, 0) -> (0, 5) 1;      (0, -1) -> (0, -7) 0;  (4, 3) -> (-3, 4) 1
    features = torch.tensor(
        [
            [[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]],
            [[1.0, 0.0], [0.0, -1.0], [4.0, 3.0]],
            [[0.0, 5.0], [0.0, -7.0], [-3.0, 4.0]],
        ]
    )
    expected = {
        3: [[1, 1, 1], [0, 0, 0], [0, 0, 0]],
        4: [[1, 1, 1], [0, 1, 0], [0, 0, 0]],
        5: [[1, 1, 1], [0, 1, 0], [1, 0, 0]],  # the two ones tie: the earlier stays
        6: [[1, 1, 1], [0, 1, 0], [1, 0, 1]],
        7: [[1, 1, 1], [0, 1, 1], [1, 0, 1]],
        8: [[1, 1, 1], [1, 1, 1], [1, 0, 1]],  # two zeros tie
        9: [[1, 1, 1], [1, 1, 1], [1, 1, 1]],
    }
    for kept, mask in expected.items():
        assert retention_mask(features, kept).int().tolist() == mask, kept


# Spec D5 (VL, Megatron-Bridge): frames = samples // 160, halved three times, rounded up; clips of 30 s, an end of at
# least 0.1 s. TF counts one more frame and does not cut.
@pytest.mark.parametrize(
    ("samples", "clips", "tokens", "tokens_of_transformers"),
    [
        (480_000, [480_000], 375, 376),  # 30 s
        (16_000, [16_000], 13, 13),  # 1 s
        (480_800, [480_000, 1600], 375 + 2, 376),  # 30.05 s: 0.05 s are filled up to 0.1 s, 10 frames
        (960_000, [480_000, 480_000], 750, 751),
        (976_000, [480_000, 480_000, 16_000], 750 + 13, 763),
        (1, [1600], 2, 1),
        (20_480, [20_480], 16, 17),  # 128 frames, a multiple of eight
        (20_479, [20_479], 16, 16),
    ],
)
def test_sounds(samples: int, clips: list[int], tokens: int, tokens_of_transformers: int) -> None:
    geometry = SoundGeometry()
    assert geometry.clip_lengths(samples) == clips
    assert geometry.num_tokens(samples) == tokens
    assert -(-(1 + samples // 160) // 8) == tokens_of_transformers


# Spec C (VL): frame number times int(1000 / fps) milliseconds. 23.976 is 24000 / 1001.
@pytest.mark.parametrize(
    ("fps", "milliseconds"),
    [
        (30.0, 33),
        (29.97, 33),
        (30000 / 1001, 33),
        (25.0, 40),
        (24.0, 41),
        (23.976, 41),
        (60.0, 16),
        (2.0, 500),
        (0.5, 2000),
    ],
)
def test_milliseconds_per_frame(fps: float, milliseconds: int) -> None:
    assert timestamps_s([0, 1, 100], fps) == [0.0, milliseconds / 1000, milliseconds * 100 / 1000]


def test_separators_of_tubelets() -> None:
    # Spec C, Omni: an odd number of frames, of a video of 29.97 frames per second.
    labels = frame_labels(5, timestamps_s([0, 15, 30, 45, 60], 29.97), 2)
    assert labels == [
        "Frame 1 sampled at 0.00 seconds and frame 2 sampled at 0.49 seconds: ",
        "\nFrame 3 sampled at 0.99 seconds and frame 4 sampled at 1.49 seconds: ",
        "\nFrame 5 sampled at 1.98 seconds: ",
    ]


def test_separators_of_single_frames() -> None:
    # Spec C, 12B, with the line breaks of current vLLM ("to match training").
    assert frame_labels(3, timestamps_s([0, 12, 24], 24.0), 1) == [
        "Frame 1 sampled at 0.00 seconds: ",
        "\nFrame 2 sampled at 0.49 seconds: ",
        "\nFrame 3 sampled at 0.98 seconds: ",
    ]


def test_separators_without_times() -> None:
    assert frame_labels(3, None, 2) == ["Frame 1 and frame 2: ", "\nFrame 3: "]  # TF's processor


def test_pixel_shuffle_order() -> None:
    # Spec D2: token (Y, X) is row-major; it holds patches (2Y, 2X), (2Y, 2X+1), (2Y+1, 2X), (2Y+1, 2X+1).
    patches = torch.arange(4 * 6).view(4, 6, 1)
    assert pixel_shuffle(patches, 2).tolist() == [
        [0, 1, 6, 7],
        [2, 3, 8, 9],
        [4, 5, 10, 11],
        [12, 13, 18, 19],
        [14, 15, 20, 21],
        [16, 17, 22, 23],
    ]
    # v1 leaves out the last transpose: the same tokens, column by column.
    assert pixel_shuffle(patches, 2, "v1")[:, 0].tolist() == [0, 12, 2, 14, 4, 16]
