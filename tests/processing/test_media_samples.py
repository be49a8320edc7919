"""Samples with videos and sounds: measured as they are encoded, saved settings, and texts that name placeholders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_vlm import NemotronVLProcessor
from lightning_vlm.media.audio import AudioInfo
from lightning_vlm.media.video import Video, VideoInfo
from lightning_vlm.processing.media_layout import Medium, MediumSize
from lightning_vlm.processing.sizes import SampleLimit
from lightning_vlm.processing.tiny import TINY_SOUND, TINY_VIDEO, tiny_processor
from lightning_vlm.schema import (
    IGNORE_INDEX,
    MEDIA_FIELDS,
    Conversation,
    DataError,
    Text,
    Turn,
    VideoRef,
)
from tests.fixtures.media_samples import conversation, media_processor, picture, sample, sound, video

PROCESSORS = {
    "whole videos": media_processor(),
    "pruned videos": media_processor(0.7),
    "single frames": media_processor(0.5, video={"temporal_patch_size": 1, "keep_aspect": False}),
    "by the second": media_processor(0.3, video={"fps": 2.0, "num_frames": 5}, sound={"clip_s": None}),
    "tiles": media_processor(0.5, mode="static", tile_size=16, max_tiles=4),
    "short context": media_processor(0.5, max_model_len=150, max_num_patches=0),
}
SHAPES = st.tuples(st.integers(1, 60), st.integers(1, 60))
MEDIA = st.one_of(
    st.tuples(st.just("image"), SHAPES),
    st.tuples(st.just("video"), st.tuples(st.integers(1, 20), SHAPES, st.sampled_from([None, 1.0, 10.0, 24.0, 29.97]))),
    st.tuples(st.just("sound"), st.tuples(st.integers(1, 20_000), st.sampled_from([8000, 16_000, 44_100]))),
)
WORDS = st.text(st.sampled_from(list("ab \n<>é🙂")), max_size=6)
TURNS = st.lists(st.lists(st.one_of(WORDS, MEDIA), min_size=1, max_size=4), min_size=1, max_size=4)


def made(processor: NemotronVLProcessor, medium: tuple[str, Any]) -> tuple[Medium, MediumSize]:
    """A medium, and what its header says."""
    kind, size = medium
    if kind == "image":
        return picture(*size), size
    if kind == "video":
        count, (height, width), fps = size
        return video(processor, count, height, width, fps), VideoInfo(count, height, width, fps)
    info = AudioInfo(size[0], size[1], 1)
    return sound(info.num_samples_at(16_000)), info


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turns=TURNS,
    share=st.floats(0.1, 1.2),
    patch_share=st.floats(0.1, 1.2),
    policy=st.sampled_from(["none", "images", "text"]),
)
def test_what_is_measured_is_what_is_encoded(
    processor: NemotronVLProcessor, turns: list[list[Any]], share: float, patch_share: float, policy: str
) -> None:
    sizes: list[MediumSize] = []
    said: list[list[Any]] = []
    for turn in turns:
        said.append([])
        for part in turn:
            if isinstance(part, tuple):
                medium, size = made(processor, part)
                sizes.append(size)
                said[-1].append(medium)
            else:
                said[-1].append(part)
    asked, media = conversation(*said)
    answer = len(turns) % 2 == 1
    num_images = sum(isinstance(medium, Image.Image) for medium in media)
    options: dict[str, Any] = {"answer": answer}
    whole = processor.encode(asked, media, **options)
    if policy == "images":
        options["limit"] = SampleLimit(max(1, int(share * len(whole))), max(1, int(patch_share * whole.num_patches)))
    if policy == "text":
        options["max_text"] = max(1, int(share * len(whole)))
    encoded = processor.encode(asked, media, **options)
    size = processor.measure(asked, sizes, **options)
    assert (size.tokens, size.patches, size.images) == (len(encoded), encoded.num_patches, num_images)

    types = torch.zeros_like(encoded.input_ids) if encoded.mm_token_type_ids is None else encoded.mm_token_type_ids
    assert types.shape == encoded.labels.shape == encoded.input_ids.shape
    assert (encoded.mm_token_type_ids is None) == (num_images == len(media))
    trained = encoded.labels != IGNORE_INDEX
    assert torch.equal(encoded.labels[trained], encoded.input_ids[trained])
    if encoded.num_video_tokens is not None:
        assert encoded.num_video_tokens.tolist() == runs(types, encoded, processor)
        assert int((types == 2).sum()) == int(encoded.num_video_tokens.sum())
    if encoded.input_features_mask is not None:
        frames = encoded.input_features_mask.sum(-1)
        assert int((types == 3).sum()) == int((-(-frames // 8)).sum())
    if encoded.image_grid_hw is not None:
        images = (encoded.input_ids == processor.image_token_id) & (types != 2)
        assert int(images.sum()) == int(encoded.image_grid_hw.prod(-1).sum()) // 4


def runs(types: torch.Tensor, encoded: Any, processor: NemotronVLProcessor) -> list[int]:
    """Placeholders of each video: a pruned one has one run, a whole one a run per tubelet."""
    lengths, previous = [], 0
    for kind in [*types.tolist(), 0]:
        if kind == 2 and previous == 2:
            lengths[-1] += 1
        elif kind == 2:
            lengths.append(1)
        previous = kind
    found = []
    for (tubelets, rows, columns), kept in zip(encoded.video_grid_thw.tolist(), encoded.num_video_tokens.tolist()):
        count = tubelets if kept == tubelets * rows * columns // 4 else 1
        found.append(sum(lengths[:count]))
        lengths = lengths[count:]
    assert not lengths
    return found


def test_media_of_a_known_sample() -> None:
    processor = media_processor(0.5)
    encoded = sample(processor, video(processor, 7, 24, 48), sound(20_000), "?", picture(16, 16))
    shapes = {name: None if (value := getattr(encoded, name)) is None else tuple(value.shape) for name in MEDIA_FIELDS}
    assert shapes == {
        "pixel_values": (4, 192),
        "image_grid_hw": (1, 2),
        "pixel_values_videos": (4 * 12, 384),
        "video_grid_thw": (1, 3),
        "num_video_tokens": (1,),
        "input_features": (3, 51, 32),
        "input_features_mask": (3, 51),
    }
    assert encoded.video_grid_thw.tolist() == [[4, 2, 6]]
    assert encoded.num_video_tokens.tolist() == [6]
    assert encoded.input_features_mask.sum(-1).tolist() == [50, 50, 25]
    assert encoded.num_patches == 4 + 48


@pytest.mark.parametrize("do_normalize", [False, True])
def test_pixels_of_frames_are_those_of_images(do_normalize: bool) -> None:
    processor = media_processor(do_normalize=do_normalize, min_num_patches=16, max_num_patches=16)
    film = video(processor, 2)
    of_video = sample(processor, film).pixel_values_videos
    of_images = [sample(processor, frame).pixel_values for frame in film.frames]
    assert torch.equal(of_video, torch.cat(of_images, -1))
    assert of_video.is_floating_point() is do_normalize


class TestWords:
    def test_video_is_a_word_where_there_is_none(self) -> None:
        for processor in (media_processor(), tiny_processor()):
            asked, _ = conversation(["use the <video> tag"], ["<video> it is"])
            encoded = processor.encode(asked, [])
            text = "<|im_start|>user\nuse the <video> tag<|im_end|>\n<|im_start|>assistant\n<video> it is<|im_end|>\n"
            assert processor.tokenizer.decode(encoded.input_ids) == text
            assert processor.measure(asked, []).tokens == len(encoded)
            with_image, media = conversation(["the <video> tag", picture()], ["yes"])
            assert processor.measure(with_image, [(24, 32)]).tokens == len(processor.encode(with_image, media))

    def test_video_is_refused_beside_one(self) -> None:
        processor = media_processor()
        asked, media = conversation(["use the <video> tag", video(processor, 2)], ["yes"])
        for call in (lambda: processor.encode(asked, media), lambda: processor.measure(asked, [media[0].info])):
            with pytest.raises(DataError, match=r"turn 1 \(user\) contains '<video>', which stands for a video"):
                call()

    @pytest.mark.parametrize("word", ["<so_embedding>", "<so_start>", "<so_end>", "<image>", "<img>", "</img>"])
    def test_control_tokens_are_refused(self, word: str) -> None:
        asked, _ = conversation([f"a {word} b"], ["yes"])
        with pytest.raises(DataError, match=f"turn 1 \\(user\\) contains '{word}'"):
            media_processor().encode(asked, [])


class TestRefused:
    @pytest.mark.parametrize("kind", ["video", "sound"])
    def test_media_without_settings(self, kind: str) -> None:
        processor = media_processor()
        asked, media = conversation([video(processor, 2) if kind == "video" else sound()], ["yes"])
        sizes = [VideoInfo(2, 32, 32, None) if kind == "video" else AudioInfo(4000, 16_000, 1)]
        for call in (lambda: tiny_processor().encode(asked, media), lambda: tiny_processor().measure(asked, sizes)):
            with pytest.raises(
                DataError,
                match=f"file:1: the row holds a {kind}, .* no {kind} settings; set data.processor_options.{kind} ",
            ):
                call()

    def test_other_media_than_the_turns_name(self) -> None:
        processor = media_processor()
        asked = Conversation((Turn("user", (VideoRef("a"), Text("?"))), Turn("assistant", (Text("b"),))), "file:1")
        for wrong, words in (
            ([], r"rendered 1 video placeholder\(s\) for 0 video"),
            ([sound()], r"rendered 1 video placeholder\(s\) for 0 video"),
            ([video(processor, 2)] * 2, r"rendered 1 video placeholder\(s\) for 2 video"),
        ):
            with pytest.raises(DataError, match=words):
                processor.encode(asked, wrong)

    def test_a_tokenizer_without_the_tokens_of_sounds(self) -> None:
        with pytest.raises(ValueError, match="no token '<so_embedding>'"):
            NemotronVLProcessor(tiny_processor().image_processor, tiny_processor().tokenizer, sound={})

    @pytest.mark.parametrize("options", [{"video": {"fps": -1}}, {"sound": {"subsampling_factor": 3}}])
    def test_wrong_settings_at_once(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="expected"):
            media_processor(**options)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"video": {"nun_frames": 3}}, "video has no option 'nun_frames'; expected some of temporal_patch_size, "),
            ({"video": {"patch_size": 4}}, "video has no option 'patch_size'; expected some of "),
            ({"video": {"num_frames": 2.5}}, "video.num_frames is 2.5; expected a whole number"),
            ({"video": {"num_frames": True}}, "video.num_frames is True; expected a whole number"),
            ({"video": {"fps": "two"}}, "video.fps is 'two'; expected a number, or null"),
            ({"video": {"keep_aspect": 1}}, "video.keep_aspect is 1; expected true or false"),
            ({"sound": {"clip": 3.0}}, "sound has no option 'clip'; expected some of sampling_rate, "),
            ({"sound": {"min_clip_s": None}}, "sound.min_clip_s is None; expected a number"),
            ({"sound": {"num_mel_bins": "64"}}, "sound.num_mel_bins is '64'; expected a whole number"),
        ],
        ids=str,
    )
    def test_unknown_settings_and_other_types(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=re.escape(words)):
            media_processor(**options)

    @pytest.mark.parametrize("kind", ["video", "sound"])
    def test_settings_without_names(self, kind: str) -> None:
        options: dict[str, Any] = {kind: 3}
        with pytest.raises(ValueError, match=f"the {kind} settings are 3; expected options by name"):
            tiny_processor(**options)

    def test_choosing_frames_without_settings(self) -> None:
        with pytest.raises(ValueError, match="no video settings"):
            tiny_processor().choose_frames(3, None)


class TestSaved:
    @pytest.mark.parametrize(
        "options",
        [
            {"video": {**TINY_VIDEO, "pruning_rate": 0.3}, "sound": {**TINY_SOUND, "clip_s": None}},
            {"video": TINY_VIDEO},
            {"sound": TINY_SOUND},
            {"video": {}},
            {},
        ],
        ids=str,
    )
    def test_settings_are_kept(self, tmp_path: Path, options: dict[str, Any]) -> None:
        processor = tiny_processor(**options)
        processor.save_pretrained(tmp_path)
        loaded = NemotronVLProcessor.from_pretrained(tmp_path)
        assert (loaded.video, loaded.sound) == (options.get("video"), options.get("sound"))
        assert loaded.video_geometry == processor.video_geometry
        assert loaded.sound_geometry == processor.sound_geometry
        assert loaded.audio_token_id == processor.audio_token_id
        assert loaded.num_mel_bins == processor.num_mel_bins
        assert loaded.model_input_names == processor.model_input_names

    def test_settings_can_be_replaced_when_loading(self, tmp_path: Path) -> None:
        media_processor(0.3).save_pretrained(tmp_path)
        loaded = NemotronVLProcessor.from_pretrained(tmp_path, video=None, sound={"num_mel_bins": 64})
        assert loaded.video_geometry is None
        assert loaded.num_mel_bins == 64

    def test_samples_are_the_same(self, tmp_path: Path) -> None:
        processor = media_processor(0.3)
        processor.save_pretrained(tmp_path)
        loaded = NemotronVLProcessor.from_pretrained(tmp_path)
        said = ["a", video(processor, 5), sound(), picture()]
        expected, found = sample(processor, *said), sample(loaded, *said)
        for name in ("input_ids", "labels", "mm_token_type_ids", *MEDIA_FIELDS):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_frames_chosen_and_measured_are_alike() -> None:
    processor = media_processor(video={"num_frames": 6, "fps": 3.0})
    for total, fps in ((1, None), (7, None), (30, 10.0), (2, 30.0), (100, 29.97)):
        chosen = processor.choose_frames(total, fps)
        film = video(processor, total, 16, 16, fps)
        assert isinstance(film, Video)
        assert list(film.indices) == chosen
        asked, media = conversation([film], ["a"])
        measured = processor.measure(asked, [film.info])
        assert measured.tokens == len(processor.encode(asked, media))


def test_images_leave_a_video_its_patches() -> None:
    processor = media_processor(0.5)
    asked, media = conversation([video(processor, 8), picture(120, 120), "?"], ["yes"])
    sizes = [media[0].info, (120, 120)]
    whole = processor.measure(asked, sizes)
    limit = SampleLimit(10_000, whole.patches - 50)
    smaller = processor.measure(asked, sizes, limit=limit)
    encoded = processor.encode(asked, media, limit=limit)
    assert smaller.scaled
    assert 64 < smaller.patches == encoded.num_patches <= limit.patches
    assert encoded.video_grid_thw.tolist() == [[4, 4, 4]]


def test_text_behind_media_can_be_cut_but_media_cannot() -> None:
    processor = media_processor(0.5)
    asked, media = conversation([video(processor, 4), sound()], ["yes" * 20])
    sizes = [media[0].info, AudioInfo(4000, 16_000, 1)]
    whole = processor.encode(asked, media)
    for max_text in (len(whole) - 5, len(whole) - 30):
        cut = processor.encode(asked, media, max_text=max_text)
        assert len(cut) == len(cut.mm_token_type_ids) == processor.measure(asked, sizes, max_text=max_text).tokens
        assert len(cut) == max_text
        assert torch.equal(cut.mm_token_type_ids, whole.mm_token_type_ids[:max_text])
    inside = int((whole.mm_token_type_ids == 2).nonzero()[-1]) + 3  # between two tubelets
    for max_text in (inside, int((whole.mm_token_type_ids == 3).nonzero()[-1])):
        assert len(processor.encode(asked, media, max_text=max_text)) == len(whole)
        assert processor.measure(asked, sizes, max_text=max_text).tokens == len(whole)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_placeholders_in_an_answer_are_no_labels_and_do_not_divide_it(rate: float) -> None:
    processor = media_processor(rate)
    said = [["what?"], ["one"], ["and?"], ["a", picture(), "b", video(processor, 5), sound(), "c"]]
    encoded = processor.encode(*conversation(*said))
    prompt = processor.encode(*conversation(*said[:-1]), answer=True)
    assert encoded.prompt_length == len(prompt)
    assert torch.equal(encoded.input_ids[: encoded.prompt_length], prompt.input_ids)
    types, labels = (values[encoded.prompt_length :] for values in (encoded.mm_token_type_ids, encoded.labels))
    assert set(types.tolist()) == {0, 1, 2, 3}
    answer = encoded.input_ids[encoded.prompt_length :].where(types == 0, IGNORE_INDEX)
    assert torch.equal(labels[:-1], answer[:-1])  # the line break behind it is not the model's to say
