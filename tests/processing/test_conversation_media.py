"""Media inside conversations of dicts: found, decoded into copies, counted, and their time kept."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from lightning_vlm.media.policy import MediaError
from lightning_vlm.processing.conversation_media import (
    _count_media_per_sample,
    _ensure_rgb,
    _extract_media_from_conversations,
    flatten_messages,
    kind_of,
    media_of,
    prepare_conversation,
    to_waveform,
    video_metadata_of,
)

Dict = dict[str, Any]


def user(*parts: Any) -> list[Dict]:
    return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "a"}]


def image(mode: str = "RGB") -> Dict:
    return {"type": "image", "image": Image.new(mode, (8, 6))}


def test_a_part_is_told_by_type_or_by_key() -> None:
    assert kind_of({"type": "image", "image": 1}) == "image"
    assert kind_of({"video": 1}) == "video"
    assert kind_of({"type": "audio"}) == "audio"
    assert kind_of({"type": "text", "text": "t", "image": None}) is None
    assert kind_of("image") is None


def test_media_are_found_and_counted_in_reading_order() -> None:
    first, second = image(), image()
    conversations = [user(first, "text", {"type": "video", "video": [1]}, second), user("hi"), user({"image": 5})]
    assert _extract_media_from_conversations(conversations) == ([first["image"], second["image"], 5], [[1]])
    assert _count_media_per_sample(conversations) == ([2, 0, 1], [1, 0, 0])
    assert _extract_media_from_conversations([user("hi")]) == (None, None)
    assert _count_media_per_sample([]) == ([], [])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_images_become_rgb_in_a_copy(mode: str) -> None:
    """Defect 2D: the peer writes into the dataset's own dicts."""
    part = image(mode)
    conversation = user(part, "hi")
    found = _ensure_rgb([conversation])[0]
    assert media_of(found).images[0].mode == "RGB"
    assert conversation == [{"role": "user", "content": [part, "hi"]}, {"role": "assistant", "content": "a"}]
    assert part["image"].mode == mode


def test_what_needs_nothing_is_shared() -> None:
    part = image()
    assert prepare_conversation(user(part))[0]["content"][0] is part


def test_arrays_are_images_and_frames() -> None:
    pixels = np.zeros((6, 8, 3), np.uint8)
    found = media_of(prepare_conversation(user({"type": "image", "image": pixels}, {"video": [pixels, pixels]})))
    assert found.images[0].size == (8, 6)
    assert [frame.size for frame in found.videos[0]] == [(8, 6)] * 2


def test_what_is_in_memory_has_passed_the_limits_of_whoever_read_it() -> None:
    frames = [image()["image"]] * 600
    assert len(media_of(prepare_conversation(user({"video": frames}))).videos[0]) == 600
    assert to_waveform((np.zeros(3601 * 100, np.int16), 100), 100).shape == (360_100,)


def test_the_time_of_frames_is_kept_where_all_of_it_is_known() -> None:
    known = {"type": "video", "video": [image()["image"]] * 3, "fps": 2.0}
    unknown = {"type": "video", "video": [image()["image"]] * 3}
    expected = {"fps": 2.0, "total_num_frames": 3, "frames_indices": [0, 1, 2]}
    assert video_metadata_of(prepare_conversation(user(known))) == [expected]
    assert video_metadata_of(prepare_conversation(user(known, unknown))) is None
    assert video_metadata_of(prepare_conversation(user("hi"))) is None


def test_files_are_read_below_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("L", (8, 6)).save(folder / "a.png")
    Image.new("L", (8, 6)).save(tmp_path / "secret.png")
    monkeypatch.chdir(folder)
    found = media_of(prepare_conversation(user({"type": "image", "image": "a.png"}, {"image": Path("a.png")})))
    assert [item.mode for item in found.images] == ["RGB", "RGB"]
    with pytest.raises(MediaError, match="outside"):
        prepare_conversation(user({"type": "image", "image": "../secret.png"}))
    for kind in ("image", "video", "audio"):
        with pytest.raises(MediaError, match="nowhere"):
            prepare_conversation(user({"type": kind, kind: "nowhere.bin"}), 16_000)


def test_a_part_without_its_medium_is_an_error() -> None:
    with pytest.raises(ValueError, match="a part of the type video holds no 'video'; expected a list of images"):
        prepare_conversation(user({"type": "video"}))


def test_a_conversation_is_written_as_strings_for_templates_that_take_no_parts() -> None:
    conversation = user(image(), "and ", {"type": "text", "text": "this"}, {"audio": 1})
    marks = {"image": "<i>", "audio": "<a>"}
    assert [message["content"] for message in flatten_messages(conversation, marks)] == ["<i>and this<a>", "a"]
    with pytest.raises(ValueError, match="the processor takes no audio; it takes image"):
        flatten_messages(conversation, {"image": "<i>"})


@pytest.mark.parametrize(
    "audio",
    [
        np.ones(80, np.float32),
        torch.ones(80),
        [1.0] * 80,
        (np.ones(80), 16_000),
        [np.ones(80), 16_000],
        {"array": np.ones(80), "sampling_rate": 16_000},
        {"array": np.ones(80)},
        (np.ones((2, 80)), 16_000),
    ],
    ids=["array", "tensor", "list", "pair", "list of two", "dict", "dict without a rate", "two channels"],
)
def test_a_sound_is_one_channel_of_floats(audio: Any) -> None:
    found = to_waveform(audio, 16_000)
    assert found.dtype == np.float32
    assert found.shape == (80,)
    assert np.allclose(found, 1)


def test_a_sound_is_resampled_without_aliasing() -> None:
    """Defect 2B.14: linear interpolation folds 7 kHz of a 16 kHz sound to 1 kHz of an 8 kHz one, at full strength."""
    high = np.sin(np.arange(16_000) * 2 * np.pi * 7_000 / 16_000)
    found = to_waveform((high, 16_000), 8_000)
    linear = np.interp(np.arange(8_000) * 2.0, np.arange(16_000), high)
    assert len(found) == 8_000
    assert found.std() < 0.02 < 0.5 < linear.std()
    low = np.sin(np.arange(16_000) * 2 * np.pi * 300 / 16_000)
    assert np.allclose(to_waveform((low, 16_000), 8_000)[100:-100], low[::2][100:-100], atol=5e-3)


def test_a_sound_that_datasets_has_not_decoded_is_decoded() -> None:
    content = io.BytesIO()
    samples = np.linspace(-0.5, 0.5, 80, dtype=np.float32)
    soundfile.write(content, samples, 16_000, format="WAV", subtype="FLOAT")
    found = to_waveform({"bytes": content.getvalue(), "path": None}, 16_000)
    assert np.array_equal(found, samples)


@pytest.mark.parametrize("nothing", [{}, {"array": None, "sampling_rate": 16_000}, {"bytes": b"", "path": None}])
def test_a_sound_that_is_nothing_is_refused(nothing: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="an object without array, bytes and path; expected an array of samples"):
        to_waveform(nothing, 16_000)
