"""The video branch against transformers' own class: equal features; and where its forward with videos goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_vlm.geometry.videos import retained_tokens
from lightning_vlm.media.frames import frames_to_patches
from lightning_vlm.models.evs import retention_mask
from lightning_vlm.ops.pixels import normalize_patches
from tests.fixtures.gradients import assert_same_gradients, gradients
from tests.fixtures.media_samples import frames

IMAGE, START, END = 4, 5, 6
PATCH = 8


def dense_and_packed(model: Any, count: int, grid: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The same normalised frames as transformers takes them, and as patches of tubelets with their grid."""
    rows, columns = grid
    shown = frames(count, rows * PATCH, columns * PATCH, seed)
    packed = frames_to_patches(shown, grid, PATCH, 2)
    mean, std = torch.tensor(model.config.norm_mean), torch.tensor(model.config.norm_std)
    single = normalize_patches(frames_to_patches(shown, grid, PATCH, 1), mean, std)
    dense = single.view(count, rows, columns, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    dense = dense.reshape(count, 3, rows * PATCH, columns * PATCH)
    return dense, packed, torch.tensor([[(count + 1) // 2, rows, columns]])


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("grid", [(4, 4), (2, 6), (6, 2)])
def test_features_equal_transformers(make_twins: Callable[..., Any], count: int, grid: tuple[int, int]) -> None:
    ours, theirs = make_twins()
    dense, packed, thw = dense_and_packed(ours, count, grid)
    features, kept = ours.get_video_features(packed, thw)
    expected = theirs.get_video_features(dense).pooler_output
    assert expected.shape[:2] == ((count + 1) // 2, grid[0] * grid[1] // 4)
    assert [counts.tolist() for counts in kept] == [[expected.shape[1]] * len(expected)]
    # transformers attends in a batch of tubelets, ours one by one. Measured: 0.0, the same kernels; room for others.
    torch.testing.assert_close(features, expected.flatten(0, 1), rtol=0, atol=3e-5)
    weights = torch.randn_like(features)
    results = []
    for model, values in ((ours, features), (theirs, expected.flatten(0, 1))):
        (values * weights).sum().backward()
        results.append(gradients(model))
    assert_same_gradients(*results, 1e-5)  # worst measured: 4e-7
    assert "vision_model.embeddings.video_patch_projection.weight" in results[0]


def test_floats_and_pixels_are_alike(make_twins: Callable[..., Any]) -> None:
    ours, _ = make_twins()
    _, packed, thw = dense_and_packed(ours, 3, (4, 4))
    mean, std = torch.tensor(ours.config.norm_mean), torch.tensor(ours.config.norm_std)
    with torch.no_grad():
        expected, _ = ours.get_video_features(packed, thw)
        assert torch.equal(ours.get_video_features(normalize_patches(packed, mean, std, 2), thw)[0], expected)


def row_of(tokens: list[int]) -> Tensor:
    """Text and a video of so many placeholders per tubelet."""
    ids = [7, 8]
    for number, count in enumerate(tokens):
        ids += [20 + number, START, *[IMAGE] * count, END]
    return torch.tensor([[*ids, 9]])


def test_transformers_forward_refuses_its_own_videos(make_twins: Callable[..., Any]) -> None:
    # Spec D4: torch.cat is given a tensor in place of a list of them, so no video ever reaches the language model.
    ours, theirs = make_twins()
    dense, packed, thw = dense_and_packed(ours, 4, (4, 4))
    ids = row_of([4, 4])
    with pytest.raises(TypeError, match="cat"), torch.no_grad():
        theirs(ids, pixel_values_videos=dense)
    # Given the features as a list, which it takes for computed ones, it agrees with ours.
    with torch.no_grad():
        outputs = theirs.get_video_features(dense)
        outputs.pooler_output = list(outputs.pooler_output)
        expected = theirs(ids, mm_encoder_outputs={"video": outputs}).logits
        actual = ours(ids, pixel_values_videos=packed, video_grid_thw=thw).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)  # measured: 0.0; room for other kernels


def test_transformers_pruning_is_not_the_papers(make_twins: Callable[..., Any]) -> None:
    # Spec D4: it takes the tokens for frames and the width for their number, sqrt(hidden size) squared, and prunes
    # neither labels nor position ids. What it computes is not what was trained; ours follows the paper and vLLM.
    ours, theirs = make_twins(pruning_rate=0.5)
    dense, packed, thw = dense_and_packed(ours, 8, (4, 4))
    ids, labels = row_of([4] * 4), row_of([4] * 4)
    with torch.no_grad():
        outputs = theirs.get_video_features(dense)
        outputs.pooler_output = list(outputs.pooler_output)
        with pytest.raises(RuntimeError):
            theirs(ids, labels=labels, mm_encoder_outputs={"video": outputs})

        features, _ = ours.get_video_features(packed, thw)
        kept = retained_tokens(4, 4, 0.5)
        mask = retention_mask(features.view(4, 4, -1), kept)
        pruned = ours(
            row_of([kept, 0, 0, 0]),
            labels=row_of([kept, 0, 0, 0]),
            pixel_values_videos=packed,
            video_grid_thw=thw,
            num_video_tokens=torch.tensor([kept]),
        )
        moved = row_of(mask.sum(-1).tolist())
        embeds = ours.get_input_embeddings()(moved)
        embeds[moved == IMAGE] = features[mask.flatten()]
        expected = ours(inputs_embeds=embeds, labels=moved)
    assert torch.equal(pruned.logits, expected.logits)
    assert torch.equal(pruned.loss, expected.loss)


def test_state_dicts_have_the_same_names(make_twins: Callable[..., Any]) -> None:
    ours, theirs = make_twins("MEM*E", sound=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.config.frames_per_tubelet == theirs.config.video_temporal_patch_size == 2
