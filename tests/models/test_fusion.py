"""Which image feature lands on which token, and every way in which text and images can disagree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_vlm.models.fusion import FusionError, fuse, images_per_row, placeholders_per_row


def placeholders(*rows: str) -> torch.Tensor:
    """Rows like ``.II.``: I for a placeholder."""
    return torch.tensor([[token == "I" for token in row] for row in rows])


@given(
    rows=st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=4),
    data=st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=50)
def test_each_placeholder_gets_its_feature_in_reading_order(rows, data):
    tokens_per_image = [count for row in rows for count in row]
    width = 1 + max(2 * sum(row) for row in rows)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        mask[index, sorted(data.sample(range(width), sum(row)))] = True
    embeds = torch.randn(len(rows), width, 3)
    features = torch.randn(sum(tokens_per_image), 3)

    fused = fuse(embeds, features, mask, tokens_per_image)

    expected, taken = embeds.clone(), 0
    for row in range(len(rows)):
        for column in range(width):
            if mask[row, column]:
                expected[row, column] = features[taken]
                taken += 1
    assert torch.equal(fused, expected)
    assert images_per_row(placeholders_per_row(mask), tokens_per_image) == [len(row) for row in rows]


def test_inputs_are_not_changed():
    embeds, features = torch.randn(1, 4, 2), torch.randn(2, 2)
    before = embeds.clone(), features.clone()
    fused = fuse(embeds, features, placeholders(".II."), [2])
    fused += 1
    assert torch.equal(embeds, before[0])
    assert torch.equal(features, before[1])


def test_gradients_flow_to_text_and_to_features_only_where_they_are_seen():
    embeds = torch.randn(1, 4, 2, requires_grad=True)
    features = torch.randn(2, 2, requires_grad=True)
    weight = torch.randn(1, 4, 2)
    (fuse(embeds, features, placeholders(".II."), [2]) * weight).sum().backward()
    assert torch.equal(features.grad, weight[0, 1:3])
    assert torch.equal(embeds.grad, weight * torch.tensor([1.0, 0.0, 0.0, 1.0])[None, :, None])


def test_features_take_the_dtype_of_the_text():
    fused = fuse(torch.zeros(1, 2, 2, dtype=torch.bfloat16), torch.ones(1, 2), placeholders(".I"), [1])
    assert fused.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("rows", "tokens_per_image", "row", "numbers"),
    [
        (["III."], [4], 0, ["3 image placeholder", "4 features"]),
        (["IIIII"], [4], 0, ["5 image placeholder", "4 features"]),
        (
            ["IIII.", "III.."],
            [4, 4],
            1,
            ["row 1 has 3 ", "7 placeholders", "8 features of 2 image(s) (4, 4)"],
        ),
        (["IIII.", "IIII."], [4], 1, ["row 1 has 4 ", "8 placeholders", "4 features"]),
        (["....", "IIII"], [2, 6], 1, ["row 1 has 4 ", "8 features"]),
        (["IIII", "...."], [4, 4], None, ["the batch has 4 ", "8 features of 2"]),
        (["...."], [4], None, ["the batch has 0 ", "4 features"]),
        (["III..", "IIIII"], [4, 4], 0, ["row 0 has 3 ", "8 placeholders and 8 features"]),
        (["IIIII", "III.."], [4, 4], 0, ["row 0 has 5 ", "8 placeholders and 8 features"]),
    ],
    ids=[
        "one_too_few",
        "one_too_many",
        "too_few_in_a_later_row",
        "image_of_a_later_row_missing",
        "cut_image",
        "row_without_placeholders_for_its_image",
        "no_placeholder_at_all",
        "equal_totals_but_shifted_left",
        "equal_totals_but_shifted_right",
    ],
)
def test_a_mismatch_names_the_row_and_both_numbers(rows, tokens_per_image, row, numbers):
    mask = placeholders(*rows)
    features = torch.zeros(sum(tokens_per_image), 2)
    with pytest.raises(FusionError) as raised:
        fuse(torch.zeros(*mask.shape, 2), features, mask, tokens_per_image)
    assert raised.value.row == row
    for number in numbers:
        assert number in str(raised.value)


def test_a_long_list_of_images_is_shortened_in_the_message():
    with pytest.raises(FusionError, match=r"20 image\(s\) \(1, 1, 1, 1, 1, 1, 1, 1, \.\.\.\)"):
        images_per_row([0], [1] * 20)


def test_known_rows_are_checked_each_by_itself() -> None:
    """Equal totals, and every row ends with an image: only the rows' own images tell that one has moved."""
    is_placeholder = torch.tensor([[True, True, True, True], [False, False, True, True]])
    embeds, features = torch.zeros(2, 4, 3), torch.ones(6, 3)
    fuse(embeds, features, is_placeholder, [2, 2, 2])  # without that knowledge: two images, then one
    fuse(embeds, features, is_placeholder, [2, 2, 2], num_images=[2, 1])
    with pytest.raises(
        FusionError, match=r"row 0 has 4 image placeholder tokens for 2 features of its 1 image"
    ) as error:
        fuse(embeds, features, is_placeholder, [2, 2, 2], num_images=[1, 2])
    assert error.value.row == 0


@pytest.mark.parametrize(
    ("num_images", "told"), [([1, 1], "2 in 2"), ([1, 3], "4 in 2"), ([1, 1, 1], "3 in 3"), ([3], "3 in 1")]
)
def test_numbers_of_other_rows_or_images_are_refused(num_images: list[int], told: str) -> None:
    """With ``[1, 1]`` every row has its own image's placeholders; the third image would be dropped in silence."""
    is_placeholder = torch.tensor([[True, True, False], [True, True, False]])
    with pytest.raises(FusionError, match=rf"2 row\(s\) and 3 image\(s\), but their numbers per row tell of {told}"):
        fuse(torch.zeros(2, 3, 2), torch.ones(6, 2), is_placeholder, [2, 2, 2], num_images=num_images)
