"""Previews show what the model gets and nothing else: every pixel, every character, and which tokens are trained."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from lightning_vlm import NemotronVLProcessor
from lightning_vlm.data.dataset import SampleDataset
from lightning_vlm.data.plan import BatchOptions, DataPlan, plan_data
from lightning_vlm.data.preview import Previews, make_previews
from lightning_vlm.data.preview_image import TILE_LINE, TOKEN_LINE, arrange_tiles, draw_grid, join_tiles
from lightning_vlm.data.preview_page import render_text, visible
from lightning_vlm.data.preview_sample import Piece, Preview, cut_pieces, preview_sample
from lightning_vlm.data.samplers import EpochPlan, Position
from lightning_vlm.data.screening import BadSamplePolicy
from lightning_vlm.media.image import patches_to_pixels
from lightning_vlm.media.load import MediaPolicy
from lightning_vlm.processing.tiny import tiny_processor, tiny_tokenizer
from lightning_vlm.schema import DataError, Sample
from lightning_vlm.sources.formats import RowFormat
from lightning_vlm.sources.rows import ListSource
from tests.fixtures.pages import parsed

SMILE = "\U0001f600"
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
TOKENIZER = tiny_tokenizer()


def row(question: str, answer: str, *images: Image.Image | bytes, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"images": list(images), "messages": [*turns, *more.get("turns", ())]}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def scene(width: int, height: int) -> Image.Image:
    """Smooth, and different in each part."""
    rows, columns = np.mgrid[0:height, 0:width]
    values = [columns * 255 // width, rows * 255 // height, (rows + columns) * 255 // (height + width)]
    return Image.fromarray(np.stack(values, -1).astype(np.uint8))


def plan_of(
    rows: list[Any], processor: NemotronVLProcessor, dataset_options: dict[str, Any] | None = None, **options: Any
) -> DataPlan:
    given = dataset_options or {}
    source = ListSource(rows, RowFormat(needs_answer=not given.get("answer", False)))
    dataset = SampleDataset([source], processor, MediaPolicy(Path()), **given)
    policy = BadSamplePolicy(max_fraction=1.0)
    return plan_data(dataset, BatchOptions(**{"sampler": "sequential", **options}), show_progress=False, policy=policy)


def previews_of(rows: list[Any], processor: NemotronVLProcessor, **options: Any) -> Previews:
    plan = plan_of(rows, processor)
    return make_previews(plan, EpochPlan(plan.batcher), **options)


def preview_of(one: dict[str, Any], processor: NemotronVLProcessor) -> tuple[Preview, Sample]:
    sample = plan_of([one], processor).dataset[0]
    return preview_sample(sample, 0, processor), sample


def decoded(processor: NemotronVLProcessor, sample: Sample) -> str:
    return processor.tokenizer.decode(
        sample.input_ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


# Text


@pytest.mark.parametrize(
    "answer",
    [
        "yes",
        f"{SMILE} at first",
        f"at last {SMILE}",
        FAMILY,
        "\u3053\u3093\u306b\u3061\u306f",
        " spaces ",
        "a\n\nb\n",
        "e\u0301",
    ],
)
def test_trained_text_is_the_answer_with_its_end(answer: str, processor: NemotronVLProcessor) -> None:
    preview, sample = preview_of(row(f"yes <image> {SMILE}?", answer, noise(32, 32)), processor)
    assert preview.trained_text == f"{answer}<|im_end|>"
    assert preview.text == decoded(processor, sample)
    assert preview.notes == ()


def test_every_answer_of_a_conversation_is_a_piece(processor: NemotronVLProcessor) -> None:
    turns = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]
    preview, _ = preview_of(row("one?", "one", turns=turns), processor)
    assert [piece.text for piece in preview.pieces if piece.trained] == ["one<|im_end|>", "two<|im_end|>"]
    assert [piece.trained for piece in preview.pieces] == [False, True, False, True, False]


def test_images_are_markers_and_counts_are_those_of_the_sample(processor: NemotronVLProcessor) -> None:
    preview, sample = preview_of(row("<image>, <image>?", "a", noise(64, 48), noise(16, 16, 1)), processor)
    markers = [piece.marker for piece in preview.pieces if piece.marker]
    assert markers == ["<image 1: 6 x 8 patches, 12 tokens>", "<image 2: 2 x 2 patches, 1 token>"]
    assert "".join(piece.shown for piece in preview.pieces).startswith(
        f"<|im_start|>user\n<img>{markers[0]}</img>, <img>{markers[1]}</img>?"
    )
    assert (preview.num_tokens, preview.num_image_tokens) == (len(sample), 13)
    assert preview.num_image_tokens == int((sample.input_ids == processor.image_token_id).sum())
    assert preview.num_label_tokens == sample.num_label_tokens == len("a") + 1
    assert [image.num_tokens for image in preview.images] == [12, 1]


def test_a_prompt_alone_is_not_trained_on(processor: NemotronVLProcessor) -> None:
    plan = plan_of([{"messages": [{"role": "user", "content": "?"}]}], processor, {"answer": True})
    preview = preview_sample(plan.dataset[0], 0, processor)
    assert preview.text.endswith("<|im_start|>assistant\n")
    assert preview.trained_text == ""
    assert preview.notes == ("nothing of this sample is trained on",)


def test_the_first_token_is_not_trained_on(processor: NemotronVLProcessor) -> None:
    ids = torch.tensor(processor.tokenizer("abc", add_special_tokens=False)["input_ids"])
    preview = preview_sample(Sample(ids, ids.clone(), None, None, 0, "", (), "rows:1"), 0, processor)
    assert (preview.trained_text, preview.num_label_tokens) == ("bc", 2)


def whole(ids: list[int], tokenizer: Any = TOKENIZER) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.text(max_size=6), st.booleans()), max_size=6))
def test_pieces_of_whole_characters_are_the_texts(spans: list[tuple[str, bool]]) -> None:
    spans = [(re.sub("[\ud800-\udfff]", "", text), trained) for text, trained in spans]
    ids, keys = [], []
    for text, trained in spans:
        own = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        ids += own
        keys += [(trained, 0)] * len(own)
    pieces, num_cut = cut_pieces(TOKENIZER, ids, keys)
    assert num_cut == 0
    assert "".join(text for text, _ in pieces) == whole(ids)
    for wanted in (True, False):
        expected = "".join(text for text, trained in spans if trained == wanted)
        assert "".join(text for text, (trained, _) in pieces if trained == wanted) == expected


@settings(deadline=None, max_examples=150)
@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=8),
    st.lists(st.booleans(), min_size=40, max_size=40),
)
def test_no_piece_holds_a_part_of_a_character(text: str, trained: list[bool]) -> None:
    """Any labels, also such as no template makes: a character is trained if a byte of it is."""
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assume(len(ids) == len(text.encode()))  # a token of its own, such as </img>, is not cut at all
    keys = [(flag, 0) for flag in trained[: len(ids)]]
    pieces, num_cut = cut_pieces(TOKENIZER, ids, keys)
    assert "".join(piece for piece, _ in pieces) == text
    flags = iter(trained)
    bytes_of = [[next(flags) for _ in character.encode()] for character in text]
    assert [flag for piece, (flag, _) in pieces for _ in piece] == [any(flags) for flags in bytes_of]
    assert num_cut == sum(len(set(flags)) == 2 for flags in bytes_of)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 262), st.booleans()), max_size=30))
def test_pieces_of_any_tokens_are_the_decoding(tokens: list[tuple[int, bool]]) -> None:
    ids = [token for token, _ in tokens]
    pieces, _ = cut_pieces(TOKENIZER, ids, [(trained, 0) for _, trained in tokens])
    assert "".join(text for text, _ in pieces) == whole(ids)
    assert all(text for text, _ in pieces)


def test_pieces_of_a_decoder_that_drops_the_first_space() -> None:
    vocabulary = {"<unk>": 0, "\u2581the": 1, "\u2581cat": 2, "s": 3}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    pieces, num_cut = cut_pieces(tokenizer, [1, 2, 3, 1], [(False, 0), (True, 0), (True, 0), (False, 0)])
    assert pieces == [("the", (False, 0)), (" cats", (True, 0)), (" the", (False, 0))]
    assert num_cut == 0


def test_a_cut_character_is_told(processor: NemotronVLProcessor) -> None:
    ids = torch.tensor(TOKENIZER(f"ab{SMILE}c", add_special_tokens=False)["input_ids"])
    labels = torch.full_like(ids, -100)
    labels[4:6] = ids[4:6]  # its last two bytes
    preview = preview_sample(Sample(ids, labels, None, None, 0, "", (), "rows:1"), 0, processor)
    assert [(piece.text, piece.trained) for piece in preview.pieces] == [("ab", False), (SMILE, True), ("c", False)]
    assert preview.notes == ("1 character(s) are cut by a border of trained tokens and shown as trained in whole",)


def test_bytes_that_are_no_character_are_told(processor: NemotronVLProcessor) -> None:
    ids = torch.tensor(TOKENIZER(f"ab{SMILE}", add_special_tokens=False)["input_ids"])[:-1]  # as a cut text ends
    preview = preview_sample(Sample(ids, ids, None, None, 0, "", (), "rows:1"), 0, processor)
    assert preview.text == "ab\ufffd"
    assert preview.notes == ("U+FFFD stands for bytes that form no character: one was cut off, or the data has it so",)


# Images


def model_pixels(sample: Sample, processor: NemotronVLProcessor) -> list[np.ndarray]:
    """Each tile of a sample as the model gets it."""
    assert sample.pixel_values is not None
    assert sample.image_grid_hw is not None
    found, start = [], 0
    for rows, columns in sample.image_grid_hw.tolist():
        patches = sample.pixel_values[start : start + rows * columns]
        pixels = patches_to_pixels(patches, (rows, columns), processor.geometry.patch_size)
        found.append(pixels.permute(1, 2, 0).numpy())
        start += rows * columns
    return found


def without_lines(picture: Image.Image, height: int, width: int, cell: int, tile: int) -> np.ndarray:
    """The pixels of a picture, read where they have to be; that all else is lines is checked on the way."""
    pixels = np.asarray(picture)
    thin = 1 if max(picture.size) < 1200 else 2
    tile_lines = (height - 1) // tile
    lines = (height // cell + 1 - tile_lines) * thin + tile_lines * 3 * thin
    scale = (len(pixels) - lines) // height

    def places(length: int) -> tuple[np.ndarray, dict[int, bool]]:
        """Where each pixel starts, and whether a line is one of a tile, by its place."""
        starts: list[int] = []
        is_tile: dict[int, bool] = {}
        position = 0
        for start in range(0, length + 1, cell):
            between_tiles = 0 < start < length and start % tile == 0
            for _ in range(3 * thin if between_tiles else thin):
                is_tile[position] = between_tiles
                position += 1
            if start < length:
                starts += range(position, position + scale * cell, scale)
                position += scale * cell
        return np.array(starts), is_tile

    (rows, row_lines), (columns, column_lines) = places(height), places(width)
    assert pixels.shape == (height * scale + len(row_lines), width * scale + len(column_lines), 3)
    shown = pixels[rows][:, columns]
    for down in range(scale):  # each pixel is a square
        for right in range(scale):
            assert np.array_equal(pixels[rows + down][:, columns + right], shown)
    for place, is_tile in row_lines.items():
        others = [column for column in range(pixels.shape[1]) if is_tile or not column_lines.get(column)]
        assert (pixels[place, others] == (TILE_LINE if is_tile else TOKEN_LINE)).all()
    for place, is_tile in column_lines.items():
        others = [row for row in range(pixels.shape[0]) if is_tile or not row_lines.get(row)]
        assert (pixels[others, place] == (TILE_LINE if is_tile else TOKEN_LINE)).all()
    return shown


@pytest.mark.parametrize("size", [(16, 16), (64, 48), (3, 200), (500, 20), (1500, 1100)])
def test_pixels_between_the_lines_are_those_of_the_model(size: tuple[int, int]) -> None:
    processor = tiny_processor(max_num_patches=30_000, max_model_len=16_384)
    preview, sample = preview_of(row("<image>?", "a", noise(*size)), processor)
    (pixels,) = model_pixels(sample, processor)
    (image,) = preview.images
    assert np.array_equal(image.pixels, pixels)
    (picture,) = image.pictures()
    height, width, _ = pixels.shape
    assert np.array_equal(without_lines(picture, height, width, 16, max(pixels.shape)), pixels)


def test_small_images_are_enlarged_by_a_whole_number(processor: NemotronVLProcessor) -> None:
    preview, _ = preview_of(row("<image><image>", "a", noise(64, 48), noise(16, 16)), processor)
    assert [image.pictures()[0].size for image in preview.images] == [(64 * 5 + 5, 48 * 5 + 4), (16 * 20 + 2,) * 2]


def test_lines_stand_where_tokens_end() -> None:
    black = np.zeros((4, 8, 3), dtype=np.uint8)
    picture = np.asarray(draw_grid(black, cell=2, tile=(4, 4), scale=3))
    assert picture.shape == (1 + 6 + 1 + 6 + 1, 1 + 6 + 1 + 6 + 3 + 6 + 1 + 6 + 1, 3)
    middle = [tuple(pixel) for pixel in picture[3].tolist()]
    thin, thick, cell = [TOKEN_LINE], [TILE_LINE] * 3, [(0, 0, 0)] * 6
    assert middle == [*thin, *cell, *thin, *cell, *thick, *cell, *thin, *cell, *thin]
    assert (picture[[0, 7, 14]][:, :14] == TOKEN_LINE).all()


@pytest.mark.parametrize("make", [scene, noise])
@pytest.mark.parametrize("size", [(64, 64), (96, 32), (32, 96), (150, 100), (100, 150), (200, 40)])
def test_static_tiles_are_put_together(make: Callable[[int, int], Image.Image], size: tuple[int, int]) -> None:
    processor = tiny_processor(mode="static", max_tiles=6)
    preview, sample = preview_of(row("<image>?", "a", make(*size)), processor)
    *tiles, thumbnail = model_pixels(sample, processor)
    (image,) = preview.images
    assert image.arranged
    rows, columns = image.tiles
    assert rows * columns == len(tiles)
    assert (columns > rows) == (size[0] > size[1])
    for number, tile in enumerate(tiles):
        top, left = 32 * (number // columns), 32 * (number % columns)
        assert np.array_equal(image.pixels[top : top + 32, left : left + 32], tile)
    assert np.array_equal(image.thumbnail, thumbnail)
    picture, small = image.pictures()
    assert np.array_equal(without_lines(picture, *image.pixels.shape[:2], 16, 32), image.pixels)
    assert np.array_equal(without_lines(small, 32, 32, 16, 32), thumbnail)
    tokens = (len(tiles) + 1) * 4
    assert str(image) == f"{rows} x {columns} tiles and a thumbnail of 4 x 4 patches, {tokens} tokens"
    assert image.num_tokens == tokens == preview.num_image_tokens


def test_tiles_without_a_thumbnail_are_put_together_by_their_borders() -> None:
    processor = tiny_processor(mode="static", max_tiles=6, use_thumbnail=False)
    preview, _ = preview_of(row("<image>?", "a", scene(150, 100)), processor)
    assert preview.images[0].thumbnail is None
    assert str(preview.images[0]) == "2 x 3 tiles of 4 x 4 patches, 24 tokens"


def test_tiles_that_do_not_tell_stand_in_one_row() -> None:
    processor = tiny_processor(mode="static", max_tiles=6)
    preview, _ = preview_of(row("<image>?", "a", Image.new("RGB", (150, 100), "white")), processor)
    (image,) = preview.images
    assert not image.arranged
    assert image.pixels.shape == (32, 6 * 32, 3)
    assert str(image) == "6 tiles and a thumbnail of 4 x 4 patches, 28 tokens"


def test_a_single_tile_has_no_thumbnail() -> None:
    preview, _ = preview_of(row("<image>?", "a", noise(32, 32)), tiny_processor(mode="static"))
    assert str(preview.images[0]) == "4 x 4 patches, 4 tokens"
    assert len(preview.images[0].pictures()) == 1


def test_arranging_is_the_inverse_of_cutting() -> None:
    image = np.asarray(scene(64, 96))
    tiles = np.stack([image[top : top + 32, left : left + 32] for top in (0, 32, 64) for left in (0, 32)])
    assert np.array_equal(join_tiles(tiles, (3, 2)), image)
    assert arrange_tiles(tiles, None) == (3, 2)


def test_several_images_of_several_tiles_keep_to_themselves() -> None:
    processor = tiny_processor(mode="static", max_tiles=4)
    images = [scene(64, 64), noise(32, 32), scene(96, 32)]
    preview, sample = preview_of(row("<image><image>then<image>", "a", *images), processor)
    tiles = model_pixels(sample, processor)
    assert [image.num_tokens for image in preview.images] == [20, 4, 16]
    assert np.array_equal(preview.images[0].thumbnail, tiles[4])
    assert np.array_equal(preview.images[1].pixels, tiles[5])
    assert np.array_equal(preview.images[2].thumbnail, tiles[9])


def test_normalised_floats_are_shown_as_pixels() -> None:
    given = noise(64, 48)  # not resized, so floats and uint8 are of the same pixels
    shown = [
        preview_of(row("<image>?", "a", given), tiny_processor(do_normalize=flag))[0].images[0].pixels
        for flag in (False, True)
    ]
    assert shown[1].dtype == np.uint8
    assert np.array_equal(shown[0], shown[1])
    assert np.array_equal(shown[0], np.asarray(given))


def test_text_and_images_that_do_not_belong_together_are_an_error(processor: NemotronVLProcessor) -> None:
    _, sample = preview_of(row("<image>?", "a", noise(32, 32)), processor)
    sample.input_ids = sample.input_ids[sample.input_ids != processor.image_token_id]
    sample.labels = sample.labels[-len(sample.input_ids) :]
    with pytest.raises(ValueError, match="the text has 0 image tokens for tiles of 4"):
        preview_sample(sample, 0, processor)


# Which samples


def test_the_first_ones_are_those_of_training(processor: NemotronVLProcessor) -> None:
    rows = [row(f"{index}?", "word " * (1 + index % 5)) for index in range(1, 23)]
    for options in ({"sampler": "shuffle"}, {"sampler": "shuffle", "packing": True}, {"sampler": "sequential"}):
        plan = plan_of(rows, processor, batch_size=4, **options)
        order = EpochPlan(plan.batcher)
        taken = [index for batch in order.batches(Position()) for index in batch.indices]
        assert [preview.index for preview in make_previews(plan, order, 7)] == taken[:7]
        assert len(make_previews(plan, order, 100)) == 22


def test_named_samples_keep_their_order(processor: NemotronVLProcessor) -> None:
    rows = [row(f"{index}?", "a") for index in range(12)]
    assert [preview.index for preview in previews_of(rows, processor, indices=[7, 0, 7])] == [7, 0, 7]
    assert [preview.source for preview in previews_of(rows, processor, source="rows:2")] == ["rows:2"]
    assert [preview.index for preview in previews_of(rows, processor, source="rows", count=3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"count": 0}, "data.train: 0 samples were asked for, expected at least 1; ask for more."),
        ({"indices": [3, 12]}, "data.train: there is no sample 12, expected 0 to 11; name another."),
        ({"indices": [-1]}, "data.train: there is no sample -1, expected 0 to 11; name another."),
        ({"source": "ows:2"}, "data.train: no sample is at 'ows:2'; name file:line or a file, as errors do."),
    ],
)
def test_samples_that_are_not_there_are_an_error(
    options: dict[str, Any], sentence: str, processor: NemotronVLProcessor
) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(sentence)}$"):
        previews_of([row("?", "a") for _ in range(12)], processor, **options)


def test_bad_samples_stand_in_their_places(processor: NemotronVLProcessor) -> None:
    rows = [row("1?", "a"), row("<image>?", "b", b"no image"), row("3?", "c"), {"messages": "?"}]
    previews = previews_of(rows, processor)
    assert [preview.source for preview in previews] == ["rows:1", "rows:2", "rows:3"]
    assert [preview.error is None for preview in previews] == [True, False, True]
    sentence = str(previews[1].error)
    assert sentence.startswith("rows:2: ")
    assert f"\n  ! {sentence}\n" in previews.text(color=False)
    assert visible(sentence).replace("'", "&#x27;") in previews.html()
    assert "1 of 4 samples (25 %) cannot be used" in previews.notes[0]
    assert "note: 1 of 4 samples (25 %) cannot be used" in previews.text(color=False)
    named = previews_of(rows, processor, indices=[3])
    assert str(named[0].error).startswith("rows:4: ")
    assert len(parsed(named.html()).texts) == 0


def test_a_sample_that_stops_training_is_shown_too(processor: NemotronVLProcessor) -> None:
    plan = plan_of([row("?", "a" * 100)], processor, {"max_tokens": 50})
    (preview,) = make_previews(plan, EpochPlan(plan.batcher))
    assert preview.error is not None
    assert preview.error.kind == "too long"


def test_samples_of_other_families_cannot_be_shown(processor: NemotronVLProcessor) -> None:
    class Examples(SampleDataset):
        def __getitem__(self, index: int) -> Any:
            return {"conversation": []}

    plan = plan_of([row("?", "a")], processor)
    plan = replace(plan, dataset=Examples(plan.dataset.sources, processor, MediaPolicy(Path())))
    with pytest.raises(DataError, match="made by another family's collate function, expected those of a Nemotron"):
        make_previews(plan, EpochPlan(plan.batcher))


def test_previews_are_a_sequence(processor: NemotronVLProcessor) -> None:
    previews = previews_of([row(f"{index}?", "a") for index in range(4)], processor)
    assert [preview.index for preview in previews] == [0, 1, 2, 3]
    assert previews[-1].index == 3
    assert [preview.index for preview in previews[1:3]] == [1, 2]
    assert repr(previews) == "Previews('train: 4 of 4 samples, as the model gets them', 4 samples)"


# In the terminal


def test_text_without_colours(processor: NemotronVLProcessor) -> None:
    rows = [row("<image><image>see\x1b[2J", "Two\nlines", noise(64, 48), noise(16, 16)), row("?", "[[x]]")]
    assert previews_of(rows, processor).text(color=False) == "\n".join(
        [
            "train: 2 of 2 samples, as the model gets them",
            "Trained text is on lines marked + and stands in [[ ]].",
            "",
            "sample 1 of 2 (index 0)  rows:1",
            "  54 tokens: 13 image (12 + 1), 10 trained",
            "  image 1: 48 x 64 pixels, 6 x 8 patches, 12 tokens",
            "  image 2: 16 x 16 pixels, 2 x 2 patches, 1 token",
            "  | <|im_start|>user",
            r"  | <img><image 1: 6 x 8 patches, 12 tokens></img><img><image 2: 2 x 2 patches, 1 token></img>see\x1b[2J"
            "<|im_end|>",
            "  | <|im_start|>assistant",
            "  + [[Two",
            "  + lines<|im_end|>]]",
            "",
            "sample 2 of 2 (index 1)  rows:2",
            "  27 tokens: 0 image, 6 trained",
            "  | <|im_start|>user",
            "  | ?<|im_end|>",
            "  | <|im_start|>assistant",
            "  + [[[[x]]<|im_end|>]]",
        ]
    )


def test_colours_say_the_same(processor: NemotronVLProcessor) -> None:
    previews = previews_of([row("<image>see", "Two\nlines", noise(64, 48))], processor)
    colored = previews.text(color=True)
    assert "\n  + \x1b[1;32mTwo\x1b[0m\n  + \x1b[1;32mlines<|im_end|>\x1b[0m" in colored
    assert "\x1b[36m<image 1: 6 x 8 patches, 12 tokens>\x1b[0m" in colored
    plain = re.sub(r"\x1b\[[\d;]*m", "", colored)
    assert plain == previews.text(color=False).replace("[[", "").replace("]]", "").replace(" and stands in  .", ".")


def test_a_line_that_only_follows_trained_text_is_not_marked() -> None:
    previews = [Preview(0, "rows:1", (Piece("a\n", trained=True), Piece("b", trained=False)))]
    assert render_text(previews, "", (), color=True).endswith("\n  + \x1b[1;32ma\x1b[0m\n  | \x1b[2mb\x1b[0m")


@pytest.mark.parametrize(
    ("is_terminal", "environment", "colored"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colours_are_for_terminals(
    is_terminal: bool,
    environment: dict[str, str],
    colored: bool,
    processor: NemotronVLProcessor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    if "NO_COLOR" not in environment:
        monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    previews = previews_of([row("?", "a")], processor)
    assert str(previews) == previews.text() == previews.text(color=colored)


def test_hidden_characters_are_written_out() -> None:
    hidden = "a\x1b[31m\x00\r\n\t\u202eb\u200b\x9b\ufeff"
    assert visible(hidden) == r"a\x1b[31m\x00\r" + "\n\t" + r"\u202eb\u200b\x9b\ufeff"
    assert visible(FAMILY) == FAMILY


# On the page


def test_page_shows_the_text_and_runs_nothing(processor: NemotronVLProcessor) -> None:
    attack = '<script>alert("1")</script>&lt;</pre><img src=x onerror=alert(1)>\x1b[31m'
    rows = [row(f"<image>{attack}", attack, noise(64, 48)), row("\n\nfirst", "\nanswer\n")]
    previews = previews_of(rows, processor)
    page = previews.html()
    assert page.startswith("<!doctype html>")
    for shown in (page, previews._repr_html_()):
        found = parsed(shown)
        assert found.texts == [visible("".join(piece.shown for piece in preview.pieces)) for preview in previews]
        assert found.trained == [visible(preview.trained_text) for preview in previews]
        assert not {"script", "link", "iframe", "object"} & set(found.tags)
        assert found.tags.count("img") == 1
        assert all(url.startswith("data:image/png;base64,") for url in found.urls)
        assert "url(" not in shown
        assert "@import" not in shown
        assert "\x1b" not in shown
    assert "color-scheme: light dark" in page


def test_page_holds_the_pictures(processor: NemotronVLProcessor) -> None:
    previews = previews_of([row("<image><image>", "a", noise(64, 48), noise(32, 16))], processor)
    encoded = re.findall(r'src="data:image/png;base64,([\w+/=]+)" width=(\d+) height=(\d+)', previews.html())
    assert len(encoded) == 2
    for (data, width, height), image in zip(encoded, previews[0].images, strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert picture.size == (int(width), int(height))
        assert np.array_equal(np.asarray(picture), np.asarray(image.pictures()[0]))


def test_notebook_shows_a_part_of_a_page(processor: NemotronVLProcessor) -> None:
    previews = previews_of([row("?", "a")], processor)
    fragment = previews._repr_html_()
    assert fragment in previews.html()
    assert "<html" not in fragment
    style = re.search(r"<style>(.*?)</style>", fragment, re.S)
    assert style is not None
    selectors = [selector.strip() for rule in re.findall(r"([^{}]+)\{", style[1]) for selector in rule.split(",")]
    assert all(selector.startswith(".vlm-preview") for selector in selectors), "it styles nothing else of a notebook"


def test_save_is_all_or_nothing(
    processor: NemotronVLProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    previews = previews_of([row("?", f"{SMILE}")], processor)
    path = tmp_path / "new" / "page.html"
    assert previews.save(str(path)) == path
    assert path.read_text(encoding="utf-8") == previews.html()

    def full(self: Path, text: str, **options: Any) -> None:
        self.write_bytes(b"<!doc")
        raise OSError("no space left on device")

    def stopped(*paths: Path) -> None:
        raise KeyboardInterrupt

    others = previews_of([row("?", "another")], processor)
    for target, name, fault, error in (
        (Path, "write_text", full, OSError),
        (os, "replace", stopped, KeyboardInterrupt),
    ):
        with monkeypatch.context() as broken:
            broken.setattr(target, name, fault)
            with pytest.raises(error):
                others.save(path)
        assert path.read_bytes() == previews.html().encode()
    assert list(path.parent.iterdir()) == [path], "nothing is left beside it"
