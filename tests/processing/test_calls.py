"""`processor(text=..., images=..., videos=..., audio=...)`: the same tokens and tensors as in training, or an error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_vlm import NemotronVLProcessor
from lightning_vlm.data.collate import PaddedCollate
from lightning_vlm.media.audio import load_audio
from lightning_vlm.media.policy import MediaPolicy
from lightning_vlm.processing.tiny import tiny_processor
from lightning_vlm.schema import MEDIA_FIELDS, Sample
from tests.fixtures.media_samples import conversation, frames, media_processor, picture, sound, varied_samples, video

TYPES = "mm_token_type_ids"


def prompts(processor: NemotronVLProcessor) -> tuple[list[Sample], dict[str, list[Any]]]:
    """Samples that end with their prompts, and their media by kind."""
    film, wide = video(processor, 5, seed=1), video(processor, 8, 16, 48, None, 2)
    said = [
        ["a", picture(seed=3), film, " b ", sound(9000, 4), wide, sound(seed=5), picture(40, 24, 6), "?"],
        ["only text"],
        [video(processor, 6, seed=7), "what?"],
        [picture(seed=8), "and this?"],
        [sound(2000, 9)],
    ]
    samples = []
    for asked in said:
        turns, media = conversation(asked)
        samples.append(processor.encode(turns, media, answer=True))
    flat = [part for asked in said for part in asked]
    media = {
        "images": [part for part in flat if type(part).__name__ == "Image"],
        "videos": [part for part in flat if type(part).__name__ == "Video"],
        "audio": [part for part in flat if isinstance(part, Tensor)],
    }
    return samples, media


@pytest.mark.parametrize("rate", [0.0, 0.6])
@pytest.mark.parametrize("options", [{}, {"mode": "static", "tile_size": 16, "max_tiles": 3}, {"do_normalize": True}])
def test_one_text_is_its_sample(rate: float, options: dict[str, Any]) -> None:
    processor = media_processor(rate, **options)
    samples, media = prompts(processor)
    remaining = {name: iter(given) for name, given in media.items()}
    tokens = {"images": "<image>", "videos": "<video>", "audio": "<so_embedding>"}
    for sample in samples:
        own = {
            name: [next(remaining[name]) for _ in range(sample.prompt.count(token))] for name, token in tokens.items()
        }
        found = processor(text=sample.prompt, return_tensors="pt", **own)
        expected = {"input_ids": sample.input_ids[None], "attention_mask": torch.ones(1, len(sample), dtype=torch.long)}
        if sample.mm_token_type_ids is not None:
            expected[TYPES] = sample.mm_token_type_ids[None]
        expected |= {name: value for name in MEDIA_FIELDS if (value := getattr(sample, name)) is not None}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype, name
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_is_that_of_its_samples(side: str, nested: bool) -> None:
    processor = media_processor(0.5)
    samples, media = prompts(processor)
    if nested:
        owned = {"images": [2, 0, 0, 1, 0], "videos": [2, 0, 1, 0, 0], "audio": [2, 0, 0, 0, 1]}
        for name, counts in owned.items():
            remaining = iter(media[name])
            media[name] = [[next(remaining) for _ in range(count)] for count in counts]
    found = processor(
        text=[sample.prompt for sample in samples], padding=True, padding_side=side, return_tensors="pt", **media
    )
    batch = PaddedCollate(0)(samples)
    for row, sample in enumerate(samples):
        real = found["attention_mask"][row].bool()
        assert real[0 if side == "right" else -1]
        assert torch.equal(found["input_ids"][row][real], sample.input_ids)
        types = sample.mm_token_type_ids
        if types is None:  # here images are told too
            types = (sample.input_ids == processor.image_token_id).long()
        assert torch.equal(found[TYPES][row][real], types)
        assert not found[TYPES][row][~real].any()
    for name in MEDIA_FIELDS:
        if name == "input_features":
            # Spectrograms of one call are made side by side. Worst measured: 4.8e-7, at values up to 5.
            torch.testing.assert_close(found[name], batch.input_features, rtol=0, atol=1e-5)
        else:
            assert torch.equal(found[name], getattr(batch, name)), name


def test_sounds_alone_and_texts_alone() -> None:
    processor = media_processor()
    found = processor(text=["<so_embedding>a", "b"], audio=sound(), padding=True, return_tensors="pt")
    assert set(found) == {"input_ids", "attention_mask", TYPES, "input_features", "input_features_mask"}
    assert found[TYPES].tolist() == [[0, 3, 3, 3, 3, 0, 0], [0] * 7]
    assert set(processor(text="a")) == {"input_ids", "attention_mask"}


def test_gives_what_the_model_takes() -> None:
    processor = media_processor()
    found = processor(
        text="<image><video><so_embedding>", images=picture(), videos=[video(processor, 2)], audio=sound()
    )
    assert set(found) == set(processor.model_input_names)


class TestWhatAVideoIs:
    def test_frames_arrays_and_videos_are_alike(self) -> None:
        processor = media_processor()
        shown = frames(5)
        array = np.stack([np.array(frame) for frame in shown])
        expected = processor(text="<video>", videos=[video(processor, 5, fps=None)], return_tensors="pt")
        forms = [shown, [shown], tuple(shown), array, [array], torch.from_numpy(array), [[shown]], [[array]]]
        forms += [list(array), [list(array)], list(torch.from_numpy(array).movedim(-1, 1))]
        for form in forms:
            found = processor(text="<video>", videos=form, return_tensors="pt")
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], value) for name, value in expected.items())

    @pytest.mark.parametrize("nested", [False, True])
    def test_lists_of_frames_go_to_their_texts(self, nested: bool) -> None:
        # As many videos as texts: a list of frames is one video, not the videos of a text.
        processor = media_processor()
        shown = [frames(3, seed=1), frames(2, seed=2)]
        found = processor(
            text=["<video>a", "<video>"], videos=[[own] for own in shown] if nested else shown, padding=True
        )
        assert found["video_grid_thw"].tolist() == [[2, 4, 4], [1, 4, 4]]

    def test_of_one_frame_is_one_tubelet(self) -> None:
        processor = media_processor()
        found = processor(text="<video>", videos=frames(1))
        assert found["video_grid_thw"].tolist() == [[1, 4, 4]]

    def test_as_many_frames_as_the_settings_say_can_be_given(self) -> None:
        processor = media_processor(video={"num_frames": 600, "fps": None})
        found = processor(text="<video>", videos=[[picture(8, 8)] * 600])
        assert found["video_grid_thw"].tolist()[0][0] == 300

    def test_frames_are_chosen_by_the_settings(self) -> None:
        processor = media_processor(video={"num_frames": 4, "fps": 1.0})
        many = frames(12)
        found = processor(text="<video>", videos=[many], video_fps=4.0)
        text = processor.tokenizer.decode(found["input_ids"][0])
        assert "Frame 1 sampled at 0.00 seconds and frame 2 sampled at 1.25 seconds" in text
        assert "Frame 3 sampled at 2.75 seconds: " in text  # three seconds, a frame each; the tubelet is filled up
        untimed = processor(text="<video>", videos=[many])
        assert "Frame 3 and frame 4: " in processor.tokenizer.decode(untimed["input_ids"][0])


class TestWhatASoundIs:
    def test_pairs_are_resampled(self) -> None:
        processor, slow = media_processor(), sound(3000).numpy()
        found = processor(text="<so_embedding>", audio=(slow, 8000), return_tensors="pt")
        resampled, _ = load_audio((slow, 8000), MediaPolicy(""), "test", 16_000)
        assert len(resampled) == 6000
        expected = processor(text="<so_embedding>", audio=resampled, return_tensors="pt")
        assert all(torch.equal(found[name], value) for name, value in expected.items())

    def test_forms_are_alike(self) -> None:
        processor, one = media_processor(), sound()
        expected = processor(text=["<so_embedding>", "b"], audio=one, padding=True)
        forms: list[Any] = [[one], one.numpy(), (one, 16_000), [(one, 16_000)], [[one], []], (one, np.int64(16_000))]
        for form in [*forms, [[(one, 16_000)], []]]:
            found = processor(text=["<so_embedding>", "b"], audio=form, padding=True)
            assert torch.equal(found["input_features"], expected["input_features"])
            assert found["input_ids"] == expected["input_ids"]

    def test_two_pairs_go_to_two_texts(self) -> None:
        processor = media_processor()
        found = processor(
            text=["<so_embedding>"] * 2, audio=[(sound(2000), 16_000), (sound(2000, 1), 8000)], padding=True
        )
        assert found["input_features_mask"].sum(-1).tolist() == [12, 25]

    def test_long_ones_are_several_clips(self) -> None:
        processor, long = media_processor(), sound(8000 * 2 + 500)
        found = processor(text="<so_embedding>", audio=long)
        assert found["input_features_mask"].sum(-1).tolist() == [50, 50, 10]
        assert found["input_ids"][0].count(processor.audio_token_id) == 7 + 7 + 2
        silent = torch.nn.functional.pad(long[16_000:], (0, 1100))
        for clip, own in zip((long[:8000], long[8000:16_000], silent), found["input_features"]):
            alone = processor(text="<so_embedding>", audio=clip)["input_features"][0]
            torch.testing.assert_close(own[: len(alone)], alone, rtol=0, atol=1e-5)  # worst measured: 3.6e-7
            assert not own[len(alone) :].any()

    def test_what_does_not_count_is_zero(self) -> None:
        found = media_processor()(text="<so_embedding>" * 3, audio=[sound(5000), sound(1600), sound(100)])
        assert not found["input_features"][~found["input_features_mask"]].any()
        assert found["input_features_mask"].sum(-1).tolist() == [31, 10, 10]

    def test_silence_is_finite(self) -> None:
        found = media_processor()(text="<so_embedding>", audio=torch.zeros(4000))
        assert found["input_features"].isfinite().all()


# Errors


@pytest.mark.parametrize(
    ("text", "given", "words"),
    [
        ("<video><video>", {"videos": 1}, "text has 2 <video> placeholder(s) for 1 video(s)"),
        ("none", {"videos": 1}, "text has 0 <video> placeholder(s) for 1 video(s)"),
        ("<video>", {}, "text has 1 <video> placeholder(s) for 0 video(s)"),
        ("<video>", {"videos": 0}, "text has 1 <video> placeholder(s) for 0 video(s)"),
        ("<so_embedding>", {"audio": 2}, "text has 1 <so_embedding> placeholder(s) for 2 sound(s)"),
        ("<so_embedding>", {}, "text has 1 <so_embedding> placeholder(s) for 0 sound(s)"),
        ("<image>", {"videos": 1}, "text has 1 <image> placeholder(s) for 0 image(s)"),
        (["<video><video>", "a"], {"videos": [1, 1]}, "text has 2 <video> placeholder(s) for 1 video(s)"),
        (["<so_embedding>", "a"], {"audio": [0, 1]}, "text has 1 <so_embedding> placeholder(s) for 0 sound(s)"),
    ],
    ids=str,
)
def test_unequal_counts_are_refused_with_both(text: Any, given: dict[str, Any], words: str) -> None:
    processor = media_processor()
    make = {"videos": lambda: video(processor, 2), "audio": sound}
    media = {
        name: [make[name]() for _ in range(count)]
        if isinstance(count, int)
        else [[make[name]() for _ in range(own)] for own in count]
        for name, count in given.items()
    }
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is checked below
        processor(text=text, padding=True, **media)
    assert words in str(caught.value)


@pytest.mark.parametrize(("name", "setting"), [("videos", "video"), ("audio", "sound")])
def test_media_without_settings_are_refused(name: str, setting: str) -> None:
    media = {"videos": [frames(2)], "audio": sound()}[name]
    with pytest.raises(ValueError, match=rf"{name} were given .* make it with {setting}="):
        tiny_processor()(text="<video>", **{name: media})


def test_no_media_need_no_settings() -> None:
    for nothing in (None, [], [[]]):
        found = tiny_processor()(text=["a"], videos=nothing, audio=nothing)
        assert set(found) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("options", [{"truncation": True, "max_length": 5}, {"add_special_tokens": True}])
def test_tokenizer_options_that_would_cut_or_move_a_video_are_refused(options: dict[str, Any]) -> None:
    processor = media_processor()
    with pytest.raises(ValueError, match=f"{next(iter(options))} cannot be used with videos"):
        processor(text="<video>", videos=[video(processor, 2)], **options)
    found = processor(text="<video>", videos=[video(processor, 2)], **{**dict.fromkeys(options, False)})
    assert found["input_ids"][0]


def test_padding_options_are_the_tokenizers() -> None:
    processor = media_processor()
    given = {"text": ["<video>", "b"], "videos": [video(processor, 2)]}
    found = processor(**given, padding="max_length", max_length=100, return_tensors="pt")
    assert {found[name].shape for name in ("input_ids", "attention_mask", TYPES)} == {(2, 100)}
    found = processor(**given, padding=True, pad_to_multiple_of=16, return_tensors="pt")
    assert found["input_ids"].shape[1] % 16 == 0


def test_an_empty_text_beside_a_video_is_empty() -> None:
    processor = media_processor()
    found = processor(text=["", "<video>"], videos=[video(processor, 2)])
    assert found["input_ids"][0] == []
    assert found[TYPES][0] == []


@pytest.mark.parametrize("wrong", [[1, 2], "a.mp4", [b"bytes"]])
def test_what_is_no_medium_is_refused_with_the_way_to_make_one(wrong: Any) -> None:
    processor = media_processor()
    for name, token, words in (
        ("videos", "<video>", r"is no video; expected a list of images, .* load_video\(path"),
        ("audio", "<so_embedding>", r"is no sound; expected an array \(num_samples,\) .* load_audio\(path"),
    ):
        with pytest.raises(ValueError, match=words):
            processor(text=token, **{name: wrong})


class TestOptions:
    @pytest.mark.parametrize(
        "option", ["fps", "num_frames", "max_num_patch", "do_resize", "size", "audio_kwargs", "paddding"]
    )
    def test_unknown_ones_are_refused_whatever_is_given(self, option: str) -> None:
        processor = media_processor()
        for given in (
            {"text": "a"},
            {"text": "<image>", "images": picture()},
            {"text": "<video>", "videos": frames(2)},
        ):
            with pytest.raises(ValueError, match=f"a call has no option '{option}'; expected video_fps, sampling_rate"):
                processor(**given, **{option: 1})

    def test_the_rate_of_samples_counts(self) -> None:
        # transformers' apply_chat_template and feature extractors say it so.
        processor, slow = media_processor(), sound(3000)
        found = processor(text="<so_embedding>", audio=slow, sampling_rate=8000, return_tensors="pt")
        expected = processor(text="<so_embedding>", audio=(slow, 8000), return_tensors="pt")
        assert all(torch.equal(found[name], value) for name, value in expected.items())

    @pytest.mark.parametrize("rate", [0, -1.0, float("nan"), float("inf"), "2", [2.0]])
    def test_a_rate_of_frames_is_a_number_above_zero(self, rate: Any) -> None:
        with pytest.raises(ValueError, match=r"video_fps is .*; expected frames per second above 0"):
            media_processor()(text="<video>", videos=frames(2), video_fps=rate)


def test_the_word_video_is_a_word_where_videos_are_unknown() -> None:
    processor = tiny_processor()
    found = processor(text="the tag <video>")
    assert processor.tokenizer.decode(found["input_ids"][0]) == "the tag <video>"


def test_samples_do_not_depend_on_their_batch() -> None:
    # The budget of images, labels of videos and clips of sounds are each text's own.
    processor = media_processor(0.5, max_model_len=300)
    samples, media = prompts(processor)
    together = processor(text=[sample.prompt for sample in samples], **media)
    assert [len(ids) for ids in together["input_ids"]] == [len(sample) for sample in samples]
    assert varied_samples(processor)[1].prompt.count("<image>") == 0
