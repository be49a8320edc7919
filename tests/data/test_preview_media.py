"""Previews of videos and sounds: the frames and clips that the model gets, and the places of their tokens."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_vlm import NemotronVLProcessor
from lightning_vlm.data.preview import Previews
from lightning_vlm.data.preview_image import TOKEN_LINE, draw_grid
from lightning_vlm.data.preview_page import data_uri
from lightning_vlm.data.preview_sample import Preview, media_runs, preview_sample
from lightning_vlm.data.preview_sound import MOST_CLIPS, draw_spectrogram
from lightning_vlm.data.preview_video import LARGEST_SIDE, MOST_FRAMES
from lightning_vlm.schema import IMAGE, SOUND, VIDEO, Sample
from tests.fixtures.media_samples import conversation, frames, media_processor, picture, sample, sound, varied_samples
from tests.fixtures.media_samples import video as random_video
from tests.fixtures.pages import parsed

PROCESSORS = {
    "whole": media_processor(),
    "pruned": media_processor(0.5),
    "nearly all pruned": media_processor(0.9),
    "frame by frame": media_processor(video={"temporal_patch_size": 1}),
    "three frames a tubelet": media_processor(0.3, video={"temporal_patch_size": 3}),
    "sounds in one piece": media_processor(sound={"clip_s": None}),
    "normalised": media_processor(do_normalize=True),
}


def shown(one: Sample, processor: NemotronVLProcessor) -> Preview:
    return preview_sample(one, 0, processor)


def markers(preview: Preview) -> list[str]:
    return [piece.marker for piece in preview.pieces if piece.marker]


# Text


@pytest.mark.parametrize("name", PROCESSORS)
def test_every_token_is_counted_once_and_stands_behind_a_marker(name: str) -> None:
    processor = PROCESSORS[name]
    for one in varied_samples(processor):
        preview = shown(one, processor)
        ids = one.input_ids.tolist()
        assert preview.text == processor.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        types = one.mm_token_type_ids
        if types is None:
            types = (one.input_ids == processor.image_token_id).long()
        found = [int((types == kind).sum()) for kind in (IMAGE, VIDEO, SOUND)]
        assert [preview.num_image_tokens, preview.num_video_tokens, preview.num_sound_tokens] == found
        for media, number in zip((preview.images, preview.videos, preview.sounds), found, strict=True):
            assert sum(medium.num_tokens for medium in media) == number
        for piece in preview.pieces:
            assert bool(re.fullmatch("(<image>)+|(<so_embedding>)+", piece.text)) == bool(piece.marker)


def test_text_without_colours() -> None:
    processor = PROCESSORS["whole"]
    film, hum = random_video(processor, 5), sound(9000)
    one = sample(processor, picture(), film, "see", hum, random_video(processor, 1, fps=None))
    assert Previews([shown(one, processor)], "", ()).text(color=False).splitlines()[3:] == [
        "sample 1 of 1 (index 0)  file:1",
        "  250 tokens: 4 image, 16 video (12 + 4), 9 sound, 4 trained",
        "  image 1: 32 x 32 pixels, 4 x 4 patches, 4 tokens",
        "  video 1: 5 frames of 32 x 32 pixels, 3 tubelets of 4 x 4 patches, 12 tokens",
        "  video 2: 1 frame of 32 x 32 pixels, 1 tubelet of 4 x 4 patches, 4 tokens",
        "  sound 1: 0.60 s in 2 clips, 9 tokens",
        "  | <|im_start|>user",
        "  | <img><image 1: 4 x 4 patches, 4 tokens></img>Frame 1 sampled at 0.00 seconds and frame 2 sampled at 0.10 "
        "seconds: <img><video 1, frames 1-2: 4 tokens></img>",
        "  | Frame 3 sampled at 0.20 seconds and frame 4 sampled at 0.30 seconds: <img><video 1, frames 3-4: 4 tokens>"
        "</img>",
        "  | Frame 5 sampled at 0.40 seconds: <img><video 1, frame 5: 4 tokens></img>see<so_start><sound 1: 0.60 s in "
        "2 clips, 9 tokens><so_end>Frame 1: <img><video 2, frame 1: 4 tokens></img><|im_end|>",
        "  | <|im_start|>assistant",
        "  + [[yes<|im_end|>]]",
    ]


def test_a_pruned_video_stands_in_its_first_tubelet_and_that_is_said() -> None:
    processor = PROCESSORS["pruned"]
    preview = shown(sample(processor, random_video(processor, 6), "?"), processor)
    assert markers(preview) == ["<video 1, frames 1-6: 6 tokens (12 before pruning)>"]
    assert preview.videos[0].caption == (
        "6 frames of 32 x 32 pixels, 3 tubelets of 4 x 4 patches, 6 tokens (12 before pruning)"
    )
    assert "frame 4 sampled at 0.30 seconds: <img></img>\nFrame 5" in preview.text
    (note,) = preview.notes
    assert note == "the tokens of a pruned video stand in its first tubelet; the model moves them to where they belong"
    whole = PROCESSORS["whole"]
    assert shown(sample(whole, random_video(whole, 6), "?"), whole).notes == ()


def test_frame_by_frame_and_in_threes() -> None:
    processor = PROCESSORS["frame by frame"]
    preview = shown(sample(processor, random_video(processor, 2, fps=None)), processor)
    assert markers(preview) == ["<video 1, frame 1: 4 tokens>", "<video 1, frame 2: 4 tokens>"]
    processor = media_processor(video={"temporal_patch_size": 3})
    preview = shown(sample(processor, random_video(processor, 8)), processor)
    assert [marker.split(":")[0] for marker in markers(preview)] == [
        "<video 1, frames 1-3",
        "<video 1, frames 4-6",
        "<video 1, frames 7-8",
    ]
    assert [name for name, _ in preview.videos[0].parts()] == [
        "frames 1-3",
        "frames 4-6",
        "frames 7-8, frame 8 repeated",
    ]


@pytest.mark.parametrize("name", ["whole", "pruned", "frame by frame", "three frames a tubelet"])
@pytest.mark.parametrize("fps", [None, 0.5, 10.0])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 16])
def test_frames_that_fill_a_tubelet_up_are_not_the_videos(name: str, fps: float | None, count: int) -> None:
    processor = PROCESSORS[name]
    film = random_video(processor, count, fps=fps)
    assert len(film.frames) == count
    said = "image 1\nFrame 4 and frame 9: "  # text that could be taken for labels
    preview = shown(sample(processor, said, film, said, film, said), processor)
    assert [video.num_frames for video in preview.videos] == [count, count]


def test_no_token_of_a_long_video_is_decoded_often(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = media_processor(video={"num_frames": 64})
    one = sample(processor, random_video(processor, 64), "and", random_video(processor, 64, seed=1))
    decoded, decode = [0], processor.tokenizer.decode

    def counting(ids: list[int], **options: Any) -> str:
        decoded[0] += len(ids)
        return decode(ids, **options)

    monkeypatch.setattr(processor.tokenizer, "decode", counting)
    assert len(markers(shown(one, processor))) == 64
    assert decoded[0] < 8 * len(one), "not once for each of the 64 tubelets"


def test_in_an_answer_the_text_around_a_video_is_shown_as_trained_and_its_features_are_not() -> None:
    processor = PROCESSORS["whole"]
    asked, media = conversation(["draw"], [random_video(processor, 2), "done"])
    preview = shown(processor.encode(asked, media), processor)
    (piece,) = [piece for piece in preview.pieces if piece.marker]
    assert not piece.trained
    assert preview.trained_text.endswith("<img></img>done<|im_end|>")
    assert "<b class=trained>&lt;video 1, frames 1-2: 4 tokens&gt;</b>" not in Previews([preview], "", ()).html()


def test_runs_of_media() -> None:
    types = [0, 1, 1, 0, 2, 0, 2, 2, 1, 3, 3]
    assert media_runs(types) == {IMAGE: [(1, 2), (8, 1)], VIDEO: [(4, 1), (6, 2)], SOUND: [(9, 2)]}
    assert media_runs([]) == {IMAGE: [], VIDEO: [], SOUND: []}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pixel_values": None, "image_grid_hw": None}, "the text has 4 image tokens, but there is no image"),
        ({"pixel_values_videos": None}, "the text has 8 video tokens, but there is no video"),
        ({"num_video_tokens": torch.tensor([6])}, r"runs of \[4\] tokens for video 1, expected \[6\]"),
        ({"input_features": None}, r"sounds of \[7\] tokens for clips of \[\]"),
    ],
)
def test_text_and_media_that_do_not_belong_together_are_an_error(change: dict[str, Any], sentence: str) -> None:
    processor = PROCESSORS["whole"]
    one = sample(processor, picture(), random_video(processor, 4), sound(8000))
    shown(one, processor)
    for name, value in change.items():
        setattr(one, name, value)
    with pytest.raises(ValueError, match=sentence):
        shown(one, processor)


def test_media_without_text_are_an_error() -> None:
    processor = PROCESSORS["whole"]
    film, hum = sample(processor, random_video(processor, 4)), sample(processor, sound(8000))
    assert film.mm_token_type_ids is not None
    film.mm_token_type_ids = torch.zeros_like(film.mm_token_type_ids)
    with pytest.raises(ValueError, match=r"runs of \[\] tokens for video 1, expected \[4, 4\]"):
        shown(film, processor)
    assert hum.mm_token_type_ids is not None
    hum.mm_token_type_ids = torch.zeros_like(hum.mm_token_type_ids)
    with pytest.raises(ValueError, match=r"sounds of \[\] tokens for clips of \[7\]"):
        shown(hum, processor)
    two = sample(processor, sound(8000), "then", sound(2000, 1))
    assert two.input_features_mask is not None
    two.input_features_mask = two.input_features_mask.flip(0)  # as many tokens, but in another order
    with pytest.raises(ValueError, match=r"sounds of \[7, 2\] tokens for clips of \[2, 7\]"):
        shown(two, processor)
    more = sample(processor, random_video(processor, 4), random_video(processor, 2))
    assert more.pixel_values_videos is not None
    assert more.video_grid_thw is not None
    assert more.num_video_tokens is not None
    more.pixel_values_videos = more.pixel_values_videos[: 2 * 16]
    more.video_grid_thw, more.num_video_tokens = more.video_grid_thw[:1], more.num_video_tokens[:1]
    with pytest.raises(ValueError, match="the text has 4 more video tokens than its videos"):
        shown(more, processor)


# Frames


@pytest.mark.parametrize("name", PROCESSORS)
def test_frames_are_those_of_the_video_with_the_grid_between(name: str) -> None:
    processor = PROCESSORS[name]
    given = [frames(5, seed=1), frames(4, 16, 64, seed=2)]  # of the grid's own size: not resized
    films = [random_video(processor, 5, seed=1), random_video(processor, 4, 16, 64, seed=2)]
    preview = shown(sample(processor, picture(), films[0], "and", films[1]), processor)
    for video, images in zip(preview.videos, given, strict=True):
        found = [picture for _, pictures in video.parts() for picture in pictures]
        scale = 128 // max(images[0].size)
        for number, picture_of in enumerate(found):
            pixels = np.asarray(images[min(number, len(images) - 1)])  # the last one repeated
            expected = draw_grid(pixels, 16, pixels.shape[:2], scale)
            assert np.array_equal(np.asarray(picture_of), np.asarray(expected))
        size = video.tubelets.shape[1]
        assert len(found) == -(-len(images) // size) * size


def test_of_a_long_video_some_frames_are_shown() -> None:
    processor = media_processor(video={"num_frames": 200})
    preview = shown(sample(processor, random_video(processor, 131)), processor)
    (video,) = preview.videos
    assert len(markers(preview)) == 66
    assert video.shown == (0, 9, 19, 28, 37, 46, 56, 65)
    *parts, (told, nothing) = video.parts()
    assert [name for name, _ in parts][-2:] == ["frames 113-114", "frame 131, frame 131 repeated"]
    assert sum(len(pictures) for _, pictures in parts) == MOST_FRAMES
    assert (told, nothing) == ("15 of 131 frames are shown", [])
    images = frames(131)
    for number, frame in enumerate(video.tubelets.reshape(-1, 32, 32, 3)):
        tubelet, place = divmod(number, 2)
        assert np.array_equal(frame, np.asarray(images[min(2 * video.shown[tubelet] + place, 130)]))
    assert "15 of 131 frames are shown" in Previews([preview], "", ()).html()


def test_large_frames_are_reduced_and_lines_stand_where_they_did() -> None:
    processor = media_processor(video={"target_num_patches": 64 * 128})
    film = random_video(processor, 2, 512, 1024)
    preview = shown(sample(processor, film), processor)
    (video,) = preview.videos
    assert video.size == "2 frames of 512 x 1024 pixels"
    first, second = video.parts()[0][1]
    factor = 4
    assert 1024 / 2 > LARGEST_SIDE >= 1024 / factor
    reduced = film.frames[0].reduce(factor)
    assert np.array_equal(np.asarray(first), np.asarray(draw_grid(np.asarray(reduced), 16 // factor, (128, 256))))
    assert np.array_equal(np.asarray(first)[0], np.full((256 + 65, 3), TOKEN_LINE))
    assert not np.array_equal(np.asarray(first), np.asarray(second))


def test_a_page_of_long_media_stays_small() -> None:
    processor = media_processor(video={"num_frames": 64, "target_num_patches": 32 * 56}, sound={"clip_s": 30.0})
    smooth = np.add.outer(np.arange(256), np.arange(448))[..., None] * [0.36, 0.2, 0.3]
    images = [Image.fromarray((smooth + number).clip(0, 255).astype(np.uint8)) for number in range(64)]
    film = random_video(processor, 64, 256, 448)
    film = type(film)(tuple(images), film.indices, film.timestamps_s, film.info)
    preview = shown(sample(processor, film, sound(16_000 * 400)), processor)
    page = Previews([preview], "", ()).html()
    assert len(page) < 1_200_000
    assert page.count("<img tabindex") == MOST_FRAMES + MOST_CLIPS
    assert f"the first {MOST_CLIPS} of 14 clips are shown" in page


# Sounds


def test_clips_are_those_of_their_sound_and_masked_frames_are_left_out() -> None:
    processor = PROCESSORS["whole"]
    one = sample(processor, sound(17_000), "then", sound(2000, 1), "then", sound(8000, 2))
    preview = shown(one, processor)
    assert [str(heard) for heard in preview.sounds] == [
        "1.10 s in 3 clips, 16 tokens",  # half a second twice, the rest filled up to the shortest clip
        "0.12 s, 2 tokens",
        "0.50 s, 7 tokens",
    ]
    assert [name for name, _ in preview.sounds[0].parts()] == [
        "clip 1: 0.50 s, 7 tokens",
        "clip 2: 0.50 s, 7 tokens",
        "clip 3: 0.10 s, 2 tokens",
    ]
    clips = [clip for heard in preview.sounds for clip in heard.clips]
    assert one.input_features is not None
    assert one.input_features_mask is not None
    assert [len(clip.features) for clip in clips] == one.input_features_mask.sum(1).tolist() == [50, 50, 10, 12, 50]
    for clip, features in zip(clips, one.input_features):
        assert np.array_equal(clip.features, features[: len(clip.features)].numpy())


def test_a_spectrogram_has_time_to_the_right_and_pitch_upwards() -> None:
    features = np.zeros((100, 32), dtype=np.float32)
    features[75:80, 4] = 1.0  # late and low
    drawn = draw_spectrogram(features)
    assert drawn.mode == "P"
    assert drawn.size == (500, 96)
    bright = np.asarray(drawn.convert("L")) > 128
    rows, columns = bright.nonzero()
    assert (columns.min(), columns.max() + 1) == (75 * 5, 80 * 5)
    assert (rows.min(), rows.max() + 1) == ((31 - 4) * 3, (32 - 4) * 3)


def test_lines_stand_between_the_frames_of_tokens() -> None:
    pixels = np.asarray(draw_spectrogram(np.random.default_rng(0).normal(size=(50, 32)), 8).convert("RGB"))
    is_line = (pixels == TOKEN_LINE).all(axis=(0, 2))
    assert is_line.nonzero()[0].tolist() == [80, 161, 242, 323, 404, 485]
    bare = np.asarray(draw_spectrogram(np.random.default_rng(0).normal(size=(50, 32))).convert("RGB"))
    assert np.array_equal(pixels[:, ~is_line], bare)


@pytest.mark.parametrize("num_frames", [1, 7, 481, 960, 961, 3000, 10_000])
def test_spectrograms_of_any_length_are_of_about_one_size(num_frames: int) -> None:
    drawn = draw_spectrogram(np.random.default_rng(0).normal(size=(num_frames, 128)), 8)
    assert 480 <= drawn.width <= 960 + 960 // 8
    assert drawn.height == 128
    assert len(set(np.asarray(drawn).ravel().tolist())) > 50


def test_silence_is_drawn() -> None:
    assert len(np.unique(np.asarray(draw_spectrogram(np.zeros((20, 32)))))) == 1


# On the page


@pytest.mark.parametrize("name", PROCESSORS)
def test_page_shows_text_and_media(name: str) -> None:
    processor = PROCESSORS[name]
    previews = Previews([shown(one, processor) for one in varied_samples(processor)], "a title", ())
    found = parsed(previews.html())
    assert found.texts == ["".join(piece.shown for piece in preview.pieces) for preview in previews]
    assert all(re.match("data:image/(png|jpeg);base64,", url) for url in found.urls)
    expected = [
        picture
        for preview in previews
        for medium in (*preview.images, *preview.videos, *preview.sounds)
        for _, pictures in medium.parts()
        for picture in pictures
    ]
    assert len(found.urls) == found.tags.count("img") == len(expected)
    for url, drawn in zip(found.urls, expected):
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
            assert image.size == drawn.size
            if image.format == "PNG":
                assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(drawn.convert("RGB")))
    captions = re.findall("<figcaption>(.*?)</figcaption>", previews.html())
    assert [caption.split(":")[0] for caption in captions] == [
        *("image 1", "image 2", "video 1", "video 2", "sound 1", "sound 2"),
        *("video 1", "image 1", "sound 1"),
    ]


def test_the_bar_holds_the_tokens_of_all_media() -> None:
    processor = PROCESSORS["whole"]
    preview = shown(sample(processor, random_video(processor, 16), sound(8000)), processor)
    share = 100 * (preview.num_video_tokens + preview.num_sound_tokens) / preview.num_tokens
    assert f'<i class=media style="width:{share:.2f}%">' in Previews([preview], "", ()).html()


def test_photographs_are_smaller_as_jpeg_and_drawings_as_png() -> None:
    noise, flat = picture(256, 256), Image.new("RGB", (256, 256), "white")
    assert data_uri(noise).startswith("data:image/png")
    assert data_uri(noise, lossless=False).startswith("data:image/jpeg")
    assert len(data_uri(noise, lossless=False)) < len(data_uri(noise)) / 2
    assert data_uri(flat, lossless=False).startswith("data:image/png")
