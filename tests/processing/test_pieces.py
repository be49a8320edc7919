"""Media written out in text: what stands for them, one by one, and what is left to the tokenizer as a whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_vlm import NemotronVLProcessor
from lightning_vlm.geometry.videos import VideoGeometry
from lightning_vlm.processing.chat import Span
from lightning_vlm.processing.media_layout import SoundLayout, VideoLayout, lay_out_video
from lightning_vlm.processing.pieces import (
    MediaTokens,
    PieceExpander,
    VideoPiece,
    piece_ids,
    tokenize_pieces,
)
from lightning_vlm.processing.tiny import CHATML_TEMPLATE, SOUND_TOKENS, SPECIAL_TOKENS, tiny_processor, tiny_tokenizer
from lightning_vlm.schema import IGNORE_INDEX
from tests.fixtures.media_samples import conversation, media_processor, video

IMAGE, START, END, SOUND = 4, 5, 6, 263
TWO = VideoLayout((4, 4), ("Frame 1: ", "\nFrame 2: "), (3, 1))


def expander() -> PieceExpander:
    return PieceExpander(tiny_tokenizer(sound=True), MediaTokens())


def text_of(ids: torch.Tensor | list[int]) -> str:
    return tiny_tokenizer(sound=True).decode(ids)


class TestExpand:
    def test_writes_each_medium_in_its_place(self) -> None:
        spans = [Span("a<image>b<video>c<so_embedding>", False), Span("<video><image>d", True)]
        pieces = expander().expand(
            spans, [2, 1], [TWO, replace(TWO, tokens_per_tubelet=(4, 0))], [SoundLayout((1600,), 2)]
        )
        assert [type(piece).__name__ for piece in pieces] == ["Span", "VideoPiece", "Span", "VideoPiece", "Span"]
        ids, labels, types = tokenize_pieces(tiny_tokenizer(sound=True), pieces, IMAGE, SOUND)
        first = "Frame 1: <img><image><image><image></img>\nFrame 2: <img><image></img>"
        second = "Frame 1: <img><image><image><image><image></img>\nFrame 2: <img></img>"
        sound = "<so_start><so_embedding><so_embedding><so_end>"
        before = f"a<img><image><image></img>b{first}c{sound}"
        assert text_of(ids) == f"{before}{second}<img><image></img>d"
        trained = labels != IGNORE_INDEX
        assert text_of(ids[trained]) == f"{second}<img><image></img>d".replace("<image>", "")  # no model is to say it
        assert torch.equal(labels[trained], ids[trained])
        assert types[types > 0].tolist() == [1, 1, 2, 2, 2, 2, 3, 3, 2, 2, 2, 2, 1]
        assert torch.equal(types > 0, (ids == IMAGE) | (ids == SOUND))

    def test_counts_alike_without_labels(self) -> None:
        pieces = expander().expand([Span("a<image><video>b", True)], [5], [TWO], [])
        ids, _, types = tokenize_pieces(tiny_tokenizer(), pieces, IMAGE, None)
        counted = piece_ids(tiny_tokenizer(), pieces)
        assert len(counted) == len(ids)
        assert counted.count(IMAGE) == int((types == 1).sum()) == 5
        assert sum(token < 0 for token in counted) == int((types == 2).sum()) == 4

    def test_without_a_video_its_placeholder_is_a_word(self) -> None:
        (piece,) = expander().expand([Span("a <video> b<image>", False)], [1], [], [])
        assert piece == Span("a <video> b<img><image></img>", False)

    def test_of_nothing_is_nothing(self) -> None:
        assert expander().expand([Span("", False)], [], [], []) == []
        assert [len(found) for found in tokenize_pieces(tiny_tokenizer(), [], IMAGE, None)] == [0, 0, 0]
        assert piece_ids(tiny_tokenizer(), []) == []

    def test_neighbouring_videos_are_two(self) -> None:
        pieces = expander().expand([Span("<video><video>", False)], [], [TWO, TWO], [])
        assert [isinstance(piece, VideoPiece) for piece in pieces] == [True, True]
        ids, _, types = tokenize_pieces(tiny_tokenizer(), pieces, IMAGE, None)
        assert ids[: len(ids) // 2].tolist() == ids[len(ids) // 2 :].tolist()
        assert int((types == 2).sum()) == 8


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Joins a colon with a space, spaces, and line breaks: across labels, if it saw them side by side."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL_TOKENS, *alphabet, *SOUND_TOKENS, ":Ġ", "ĠĠ", "ĊĊ", "xF", "Ġy"]
    merges = [(":", "Ġ"), ("Ġ", "Ġ"), ("Ċ", "Ċ"), ("x", "F"), ("Ġ", "y")]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens([*SPECIAL_TOKENS, *SOUND_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>", chat_template=CHATML_TEMPLATE
    )


@pytest.mark.parametrize("before", ["", "x", "x ", "\n", "a\n\n"])
@pytest.mark.parametrize("after", ["", " y", "\n", "F"])
def test_labels_are_tokenised_alone(before: str, after: str) -> None:
    tokenizer = merging_tokenizer()
    alone = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in TWO.labels]
    found = PieceExpander(tokenizer, MediaTokens()).expand([Span(f"{before}<video>{after}", False)], [], [TWO], [])
    ids = tokenize_pieces(tokenizer, found, IMAGE, None)[0].tolist()
    own = [*alone[0], START, *[IMAGE] * 3, END, *alone[1], START, IMAGE, END]
    around = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after)]
    assert ids == [*around[0], *own, *around[1]]
    assert tokenizer.convert_ids_to_tokens(alone[0])[-1] == ":Ġ"  # the label itself is tokenised as any text


def test_a_videos_tokens_do_not_depend_on_the_text_around() -> None:
    processor = NemotronVLProcessor(
        tiny_processor().image_processor, merging_tokenizer(), video={"target_num_patches": 16, "fps": None}
    )
    film = video(processor, 3)
    videos = set()
    for said in (["x", film], ["x\n", film, "F"], [film, "\n\n"]):
        asked, media = conversation(said, ["yes"])
        sample = processor.encode(asked, media)
        places = (sample.mm_token_type_ids == 2).nonzero().flatten()
        label = len(
            processor.tokenizer("Frame 1 sampled at 0.00 seconds and frame 2 sampled at 0.10 seconds: ")["input_ids"]
        )
        videos.add(tuple(sample.input_ids[int(places[0]) - 1 - label : int(places[-1]) + 2].tolist()))
    assert len(videos) == 1


class TestLayout:
    def test_all_tokens_of_a_pruned_video_stand_in_its_first_tubelet(self) -> None:
        geometry = VideoGeometry(patch_size=8, target_num_patches=16, pruning_rate=0.5)
        layout = lay_out_video(7, 32, 32, None, geometry)
        assert layout.tokens_per_tubelet == (8, 0, 0, 0)
        assert layout.num_tokens == 8
        assert layout.num_patches == 4 * 16
        assert len(layout.labels) == 4

    @pytest.mark.parametrize(("frames", "rate"), [(7, 0.0), (2, 0.9), (1, 0.5)])
    def test_a_whole_video_is_laid_out_at_once(self, frames: int, rate: float) -> None:
        geometry = VideoGeometry(patch_size=8, target_num_patches=16, pruning_rate=rate)
        assert lay_out_video(frames, 32, 32, None, geometry).tokens_per_tubelet == (4,) * ((frames + 1) // 2)

    def test_text_of_a_sample(self) -> None:
        processor = media_processor(0.5)
        asked, media = conversation(["look ", video(processor, 5), "!"], ["yes"])
        sample = processor.encode(asked, media)
        assert processor.tokenizer.decode(sample.input_ids) == (
            "<|im_start|>user\nlook Frame 1 sampled at 0.00 seconds and frame 2 sampled at 0.10 seconds: "
            "<img><image><image><image><image><image><image></img>\n"
            "Frame 3 sampled at 0.20 seconds and frame 4 sampled at 0.30 seconds: <img></img>\n"
            "Frame 5 sampled at 0.40 seconds: <img></img>!<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        )
        assert sample.prompt == "<|im_start|>user\nlook <video>!<|im_end|>\n<|im_start|>assistant\n"
