"""Every collate function, on the family's real processor where transformers has it, on a named stand-in where not."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_vlm.automodel import collate_fns
from lightning_vlm.automodel.collate_fns import (
    COLLATE_FNS,
    default_collate_fn,
    gemma4_inject_thinking_prefix,
    gemma4_prefix_collate_fn,
    kimi_k25_vl_collate_fn,
    kimi_vl_collate_fn,
    llava_onevision_collate_fn,
    nemotron_omni_collate_fn,
    nemotron_parse_collate_fn,
    pad_collate_fn,
    phi4_mm_collate_fn,
    qwen2_5_collate_fn,
    qwen3_omni_collate_fn,
)
from lightning_vlm.automodel.fake_image import inject_fake_image
from lightning_vlm.processing.tiny import tiny_processor
from lightning_vlm.schema import DataError

Dict = dict[str, Any]
Make = Callable[..., Dict]


def picture(width: int = 56, height: int = 56, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), (200, 10, 10)[: len(Image.new(mode, (1, 1)).getbands())])


def sound(seconds: float = 0.5, rate: int = 16_000) -> Dict:
    wave = np.sin(np.arange(int(seconds * rate)) * 2 * np.pi * 440 / rate).astype(np.float32)
    return {"type": "audio", "audio": (wave, rate)}


def video(frames: int = 4, **more: Any) -> Dict:
    return {"type": "video", "video": [picture() for _ in range(frames)], **more}


def check_batch(batch: Dict, rows: int) -> None:
    """What holds for every batch: one shape, shifted labels that are the next token, padding hidden and unlabelled."""
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    assert ids.shape == labels.shape == mask.shape
    assert len(ids) == rows
    assert ids.dtype == labels.dtype == mask.dtype == torch.int64
    trained = labels[:, :-1] != -100
    assert (labels[:, :-1][trained] == ids[:, 1:][trained]).all()
    assert (labels[:, 1:][(mask[:, 1:] == 0) & (mask[:, :-1] == 0)] == -100).all()


def num_placeholders(batch: Dict, token: int) -> list[int]:
    return (batch["input_ids"] == token).sum(1).tolist()


# Qwen


def test_qwen2_5_vl(qwen2_5: Any, example: Make, labelled: Any) -> None:
    examples = [
        example("what is it?", "a cat", picture()),
        example("hi", "hello"),
        example("a", "b", picture(84), picture()),
    ]
    batch = qwen2_5_collate_fn(examples, qwen2_5)
    check_batch(batch, 3)
    assert labelled(batch, qwen2_5) == ["a cat<|im_end|>", "hello<|im_end|>", "b<|im_end|>"]
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 6], [1, 4, 4]]
    assert batch["pixel_values"].shape == (16 + 24 + 16, 1176)
    assert batch["pixel_values"].dtype == torch.float32, "not cast, as in NeMo AutoModel"
    assert batch["n_images_per_sample"].tolist() == [1, 0, 2]
    assert "n_videos_per_sample" not in batch
    assert num_placeholders(batch, qwen2_5.image_token_id) == [4, 0, 10]
    assert batch["mm_token_type_ids"].shape == batch["input_ids"].shape
    assert "position_ids" not in batch


def test_a_batch_of_qwen2_5_vl_is_what_its_processor_makes_of_all_at_once(qwen2_5: Any, example: Make) -> None:
    examples = [example("what is it?", "a cat", picture()), example("longer question", "b", picture(84), picture())]
    batch = qwen2_5_collate_fn(examples, qwen2_5)
    texts = [qwen2_5.apply_chat_template(item["conversation"], tokenize=False) for item in examples]
    together = qwen2_5(text=texts, images=[picture(), picture(84), picture()], padding=True, return_tensors="pt")
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        assert torch.equal(batch[key], together[key][:, :-1])
    for key in ("pixel_values", "image_grid_thw"):
        assert torch.equal(batch[key], together[key])


def test_qwen2_5_vl_with_a_stand_in_video_processor(qwen2_5_with_videos: Any, example: Make, labelled: Any) -> None:
    processor = qwen2_5_with_videos
    examples = [example("q", "a", picture(), video(4, fps=2.0)), example("q", "b", video(6, fps=4.0)), example()]
    batch = qwen2_5_collate_fn(examples, processor)
    check_batch(batch, 3)
    assert labelled(batch, processor) == ["a<|im_end|>", "b<|im_end|>", "a cat<|im_end|>"]
    assert batch["n_images_per_sample"].tolist() == [1, 0, 0]
    assert batch["n_videos_per_sample"].tolist() == [1, 1, 0]
    assert batch["video_grid_thw"].tolist() == [[2, 4, 4], [3, 4, 4]]
    assert len(batch["pixel_values_videos"]) == 32 + 48
    assert num_placeholders(batch, processor.video_token_id) == [8, 12, 0]
    assert batch["second_per_grid_ts"].tolist() == [1.0, 0.5], "from the frames per second that the parts say"
    assert all(call["do_sample_frames"] is False for call in processor.video_processor.calls)


def test_videos_need_a_video_processor(qwen2_5: Any, qwen3_vl: Any, qwen3_omni: Any, example: Make) -> None:
    for function, processor in (
        (qwen2_5_collate_fn, qwen2_5),
        (default_collate_fn, qwen3_vl),
        (qwen3_omni_collate_fn, qwen3_omni),
    ):
        with pytest.raises(ValueError, match="holds videos, but WithoutTorchvision has no video_processor"):
            function([example("q", "a", video())], processor)


def test_qwen3_vl(qwen3_vl: Any, example: Make, labelled: Any) -> None:
    batch = default_collate_fn([example("q", "a", picture(64, 64)), example("q", "longer")], qwen3_vl)
    check_batch(batch, 2)
    assert labelled(batch, qwen3_vl) == ["a<|im_end|>", "longer<|im_end|>"]
    assert batch["pixel_values"].dtype == torch.bfloat16
    assert num_placeholders(batch, qwen3_vl.image_token_id) == [4, 0]


def test_qwen3_omni(qwen3_omni: Any, example: Make, labelled: Any) -> None:
    examples = [example("q", "a", picture(), sound(0.5)), example("q", "b", sound(1.0, 8_000)), example("hi", "ho")]
    batch = qwen3_omni_collate_fn(examples, qwen3_omni)
    check_batch(batch, 3)
    assert labelled(batch, qwen3_omni) == ["a<|im_end|>", "b<|im_end|>", "ho<|im_end|>"]
    frames = batch["feature_attention_mask"].sum(1).tolist()
    assert frames == [50, 100]
    assert batch["input_features"].shape == (2, 128, 100)
    assert num_placeholders(batch, qwen3_omni.audio_token_id) == [7, 13, 0]
    assert batch["n_images_per_sample"].tolist() == [1, 0, 0]
    assert (batch["attention_mask"][:, 0] == 1).all(), "padded on the right, where the processor pads on the left"


def test_qwen3_omni_with_a_stand_in_video_processor_and_its_sound(qwen3_omni_with_videos: Any, example: Make) -> None:
    processor = qwen3_omni_with_videos
    with_sound = video(4, fps=2.0, audio=sound(0.5)["audio"])
    alone = qwen3_omni_collate_fn([example("q", "a", with_sound, sound(1.0))], processor)
    assert len(alone["input_features"]) == 1
    both = qwen3_omni_collate_fn([example("q", "a", with_sound, sound(1.0))], processor, use_audio_in_video=True)
    assert len(both["input_features"]) == 2
    assert both["feature_attention_mask"].sum(1).tolist() == [50, 100]
    assert num_placeholders(both, processor.audio_token_id) == [20]
    with pytest.raises(ValueError, match="a video part has no 'audio'"):
        qwen3_omni_collate_fn([example("q", "a", video())], processor, use_audio_in_video=True)


def test_files_are_read_with_a_stand_in_video_processor(
    qwen3_omni_with_videos: Any, example: Make, tmp_path: Any, monkeypatch: Any
) -> None:
    av, soundfile = pytest.importorskip("av"), pytest.importorskip("soundfile")
    monkeypatch.chdir(tmp_path)
    soundfile.write("a.wav", np.zeros(8_000), 8_000)
    with av.open("a.mp4", "w") as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 56
        for _ in range(16):
            file.mux(stream.encode(av.VideoFrame.from_image(picture())))
        file.mux(stream.encode())
    parts = [{"type": "video", "video": "a.mp4"}, {"type": "audio", "audio": "a.wav"}]
    batch = qwen3_omni_collate_fn([example("q", "a", *parts)], qwen3_omni_with_videos)
    assert batch["video_grid_thw"].tolist() == [[2, 4, 4]], "two seconds at the video processor's 2 frames per second"
    assert batch["feature_attention_mask"].sum().item() == 100
    call = qwen3_omni_with_videos.video_processor.calls[0]
    assert call["video_metadata"][0]["fps"] == 8
    with pytest.raises(DataError, match="outside"):
        qwen3_omni_collate_fn([example("q", "a", {"type": "video", "video": "/etc/passwd"})], qwen3_omni_with_videos)


# LLaVA-OneVision and Gemma


def test_llava_onevision(llava_onevision: Any, example: Make, labelled: Any) -> None:
    examples = [example("q", "a", picture(32, 32)), example("q", "b", picture(12, 12)), example("hi", "ho")]
    for function, dtype in ((llava_onevision_collate_fn, torch.float32), (default_collate_fn, torch.bfloat16)):
        batch = function(examples, llava_onevision)
        check_batch(batch, 3)
        assert labelled(batch, llava_onevision) == ["a<|im_end|>", "b<|im_end|>", "ho<|im_end|>"]
        assert batch["pixel_values"].dtype == dtype
        assert batch["pixel_values"].ndim == 5
        assert batch["n_images_per_sample"].tolist() == [1, 1, 0]
    tokens = num_placeholders(batch, llava_onevision.image_token_id)
    assert batch["num_patches"].tolist() == tokens
    assert tokens[0] > tokens[1] > tokens[2] == 0


def test_tiles_of_llava_onevision_are_filled_up_as_its_processor_does(llava_onevision: Any, example: Make) -> None:
    pictures = [picture(12, 12), picture(32, 32)]
    batch = default_collate_fn([example("q", "a", item) for item in pictures], llava_onevision)
    together = llava_onevision(
        text=["<image>", "<image>"], images=[[item] for item in pictures], padding=True, return_tensors="pt"
    )
    assert torch.equal(batch["pixel_values"], together["pixel_values"].to(torch.bfloat16))


def test_gemma3(gemma3: Any, example: Make, labelled: Any) -> None:
    batch = default_collate_fn([example("q", "a", picture(), picture(9, 9)), example("q", "b")], gemma3)
    check_batch(batch, 2)
    assert labelled(batch, gemma3) == ["a<end_of_turn>", "b<end_of_turn>"]
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    assert batch["n_images_per_sample"].tolist() == [2, 0]


def test_gemma4_has_its_thinking_prefix_and_is_not_trained_on_it(gemma4: Any, example: Make, labelled: Any) -> None:
    """Defect 2B.12: NeMo AutoModel says that the prefix is masked, and labels it."""
    examples = [example("q", "a", picture(96, 48)), example("longer question", "bcd")]
    plain = default_collate_fn(examples, gemma4)
    batch = gemma4_prefix_collate_fn(examples, gemma4)
    check_batch(batch, 2)
    for found in (plain, batch):
        assert labelled(found, gemma4) == ["a<turn|>", "bcd<turn|>"]
    prefix = gemma4.tokenizer.encode("<|turn>model\n<|channel>thought\n<channel|>", add_special_tokens=False)
    assert batch["input_ids"].shape[1] == plain["input_ids"].shape[1] + len(prefix) - len("<model\n")
    assert all(
        "<|turn>model\n<|channel>thought\n<channel|>" in text
        for text in gemma4.tokenizer.batch_decode(batch["input_ids"])
    )
    hooked = default_collate_fn(examples, gemma4, _post_tokenize_hook=gemma4_inject_thinking_prefix)
    assert all(
        torch.equal(hooked[key], batch[key]) for key in ("input_ids", "labels", "attention_mask", "mm_token_type_ids")
    )


def test_gemma4_prefix_counts_towards_the_length(gemma4: Any, example: Make) -> None:
    batch = gemma4_prefix_collate_fn([example("q", "answer " * 9)], gemma4, max_length=40)
    assert batch["input_ids"].shape == (1, 39)
    with pytest.raises(ValueError, match="max_length 20 would cut through its media"):
        gemma4_prefix_collate_fn([example("q", "a", picture())], gemma4, max_length=20)


# Nemotron


def test_nemotron_omni_of_transformers_with_our_image_processor(
    nemotron_omni: Any, example: Make, labelled: Any
) -> None:
    examples = [
        example("q", "a", picture(), sound(0.5)),
        example("q", "b", picture(80, 40), sound(1.0, 44_100)),
        example(),
    ]
    batch = nemotron_omni_collate_fn(examples, nemotron_omni)
    check_batch(batch, 3)
    assert labelled(batch, nemotron_omni) == ["a<|im_end|>", "b<|im_end|>", "a cat<|im_end|>"]
    areas = batch["image_grid_hw"].prod(1)
    assert len(batch["pixel_values"]) == areas.sum()
    assert num_placeholders(batch, nemotron_omni.image_token_id) == [*(areas // 4).tolist(), 0]
    assert batch["pixel_values"].dtype == torch.uint8, "not yet normalised, so not cast"
    assert len(batch["input_features"]) == len(batch["input_features_mask"]) == 2
    assert batch["input_features_mask"].sum(1).tolist() == [50, 100]
    assert num_placeholders(batch, nemotron_omni.audio_token_id)[2] == 0
    assert batch["n_images_per_sample"].tolist() == [1, 1, 0]


def test_our_own_processor(example: Make, labelled: Any) -> None:
    processor = tiny_processor()
    batch = nemotron_omni_collate_fn([example("q", "a", picture(40, 24)), example("q", "b")], processor)
    check_batch(batch, 2)
    assert labelled(batch, processor) == ["a<|im_end|>", "b<|im_end|>"]
    assert num_placeholders(batch, processor.image_token_id)[0] == int(batch["image_grid_hw"].prod()) // 4


def test_nemotron_omni_with_a_stand_in_for_its_remote_processor(
    nemotron_omni_remote: Any, example: Make, labelled: Any
) -> None:
    processor = nemotron_omni_remote
    examples = [
        example("q", "a", picture(), picture(32, 48)),
        example("<think>", "<think>why</think>b", video(11, fps=2.0)),
        example("listen", "c", audio=sound(1.0, 32_000)["audio"]),
    ]
    batch = nemotron_omni_collate_fn(examples, processor, max_length=300)
    check_batch(batch, 3)
    assert batch["input_ids"].shape == (3, 299)
    assert labelled(batch, processor) == ["a<|im_end|>", "<think>why</think>b<|im_end|>", "c<|im_end|>"]
    assert [(tuple(item.shape), item.dtype) for item in batch["pixel_values"]] == [
        ((3, 56, 56), torch.bfloat16),
        ((3, 48, 32), torch.bfloat16),
    ]
    assert batch["image_flags"].tolist() == [[1], [1]]
    assert batch["pixel_values_videos"].shape == (8, 3, 56, 56), "11 frames thinned out to 8"
    seen = nemotron_omni_remote.calls[1]["video_metadata"]
    assert (seen.fps, seen.frames_indices) == (2.0, [0, 1, 3, 4, 6, 7, 9, 10])
    assert batch["sound_features"].dtype == torch.float32
    assert batch["sound_features"].shape[:2] == batch["sound_attention_mask"].shape
    assert num_placeholders(batch, processor.tokenizer.convert_tokens_to_ids("<so_embedding>")) == [0, 0, 12]
    same = nemotron_omni_collate_fn([example("q", "a", picture()), example("q", "a", picture())], processor)
    assert same["pixel_values"].shape == (2, 3, 56, 56)


def test_nemotron_omni_with_a_stand_in_takes_one_video(nemotron_omni_remote: Any, example: Make) -> None:
    with pytest.raises(NotImplementedError, match="holds 2 videos; the processor takes one"):
        nemotron_omni_collate_fn([example("q", "a", video(), video())], nemotron_omni_remote)


def test_nemotron_parse_with_a_stand_in_processor(nemotron_parse: Any, example: Make, labelled: Any) -> None:
    examples = [example("ignored", "# Title", picture()), example("ignored", "<predict_bbox> x", picture())]
    batch = nemotron_parse_collate_fn(examples, nemotron_parse)
    check_batch(batch, 2)
    assert labelled(batch, nemotron_parse) == ["# Title", "<predict_bbox> x"]
    assert batch["pixel_values"].dtype == torch.bfloat16
    assert torch.equal(batch["decoder_input_ids"], batch["input_ids"])
    assert torch.equal(batch["decoder_attention_mask"], batch["attention_mask"])
    assert batch["n_images_per_sample"].tolist() == [1, 1]
    other = nemotron_parse_collate_fn(examples[:1], nemotron_parse, task_prompt="<s>read: ")
    assert labelled(other, nemotron_parse) == ["# Title"]
    with pytest.raises(ValueError, match="the conversation holds no image"):
        nemotron_parse_collate_fn([example()], nemotron_parse)


def test_nemotron_parse_with_a_stand_in_needs_tokens_to_pad_and_start(nemotron_parse: Any, example: Make) -> None:
    tokenizer = nemotron_parse.tokenizer
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has none of decoder_start_token_id, bos_token_id, eos_token_id"):
        nemotron_parse_collate_fn([example("q", "a", picture())], nemotron_parse)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="has no pad_token_id"):
        nemotron_parse_collate_fn([example("q", "a", picture())], nemotron_parse)


# Kimi


def test_kimi_vl_with_a_stand_in_processor(kimi_vl: Any, example: Make, labelled: Any, caplog: Any) -> None:
    examples = [example("q", "a", picture(), picture(84)), example("q", "b")]
    batch = kimi_vl_collate_fn(examples, kimi_vl)
    check_batch(batch, 2)
    assert labelled(batch, kimi_vl) == ["a<|im_end|>", "b<|im_end|>"]
    assert batch["n_images_per_sample"].tolist() == [2, 0]
    assert batch["image_grid_hws"].tolist() == [[4, 4], [4, 6]]
    assert kimi_vl.calls[0]["add_special_tokens"] is False
    with caplog.at_level(logging.WARNING):
        short = kimi_vl_collate_fn([*examples, example("q" * 99, "c")], kimi_vl, max_length=60)
    assert short["input_ids"].shape == (2, 59)
    assert "1 of 3 samples have more than max_length 60 tokens and are left out" in caplog.text
    with pytest.raises(ValueError, match="all 2 samples of the batch have more than max_length 5"):
        kimi_vl_collate_fn(examples, kimi_vl, max_length=5)


def test_kimi_k25_with_a_stand_in_processor(kimi_k25: Any, example: Make, labelled: Any) -> None:
    examples = [example("q", "a", picture(), picture(84)), example("q", "longer"), example("q", "c", picture())]
    batch = kimi_k25_vl_collate_fn(examples, kimi_k25)
    check_batch(batch, 3)
    assert labelled(batch, kimi_k25) == ["a<|im_end|>", "longer<|im_end|>", "c<|im_end|>"]
    assert num_placeholders(batch, kimi_k25.media_placeholder_token_id) == [4 + 6, 0, 4]
    assert batch["grid_thws"].tolist() == [[1, 4, 4], [1, 4, 6], [1, 4, 4]]
    assert batch["image_grid_hws"].tolist() == [[4, 4], [4, 6], [4, 4]]
    assert batch["n_images_per_sample"].tolist() == [2, 0, 1]
    assert kimi_k25_vl_collate_fn(examples, kimi_k25, max_length=90)["input_ids"].shape == (3, 89)
    assert "n_images_per_sample" not in kimi_k25_vl_collate_fn(examples[1:2], kimi_k25)


def test_kimi_k25_with_a_stand_in_never_loses_images_by_cutting(kimi_k25: Any, example: Make) -> None:
    """Defect 2A.12: all images of the sample vanish."""
    examples = [example("q", "a long answer", picture()), example("q", "b")]
    whole = len(kimi_k25_vl_collate_fn(examples[:1], kimi_k25)["input_ids"][0]) + 1
    cut = kimi_k25_vl_collate_fn(examples, kimi_k25, max_length=whole - 5)
    assert cut["n_images_per_sample"].tolist() == [1, 0]
    with pytest.raises(ValueError, match="would cut through its media"):
        kimi_k25_vl_collate_fn(examples, kimi_k25, max_length=8)
    kept = kimi_k25_vl_collate_fn(examples, kimi_k25, max_length=whole - 5, drop_overlong=True)
    assert len(kept["input_ids"]) == 1
    with pytest.raises(ValueError, match="all 2 samples"):
        kimi_k25_vl_collate_fn(examples, kimi_k25, max_length=10, drop_overlong=True)


# Phi-4


def test_phi4_multimodal_of_transformers(phi4: Any, example: Make, labelled: Any) -> None:
    examples = [example("q", "a", sound(1.0)), example("q", "b", sound(0.5, 8_000)), example("hi", "ho")]
    batch = phi4_mm_collate_fn(examples, phi4)
    check_batch(batch, 3)
    assert labelled(batch, phi4) == ["a<|end|>", "b<|end|>", "ho<|end|>"]
    assert num_placeholders(batch, phi4.audio_token_id) == [*batch["audio_embed_sizes"].tolist(), 0]
    assert batch["audio_input_features"].shape[0] == 2
    assert batch["input_mode"] == 2
    assert phi4_mm_collate_fn(examples[2:], phi4)["input_mode"] == 0


def test_phi4_mm_with_a_stand_in_for_its_remote_processor(phi4_remote: Any, example: Make, labelled: Any) -> None:
    examples = [
        {**example("<|audio_1|>q", "a"), "audio": {"array": sound(1.0, 8_000)["audio"][0], "sampling_rate": 8_000}},
        example("q", "b", sound(0.5), sound(1.0)),
    ]
    batch = phi4_mm_collate_fn(examples, phi4_remote)
    check_batch(batch, 2)
    assert labelled(batch, phi4_remote) == ["a<|end|>", "b<|end|>"]
    assert batch["audio_embed_sizes"].tolist() == [12, 6, 12]
    assert batch["input_audio_embeds"].shape == (3, 96, 80)
    assert batch["input_mode"] == 2
    assert not {"input_image_embeds", "image_sizes", "image_attention_mask"} & set(batch)


def test_phi4_mm_with_a_stand_in_is_cut_at_1024_but_not_through_a_sound(phi4_remote: Any, example: Make) -> None:
    assert phi4_mm_collate_fn([example("q", "a" * 3000)], phi4_remote)["input_ids"].shape == (1, 1023)
    with pytest.raises(ValueError, match="max_length 1024 would cut through its media"):
        phi4_mm_collate_fn([example("q", "a", sound(90.0))], phi4_remote)


# The default's options


def test_the_default_pads_or_cuts_to_max_length(qwen3_vl: Any, example: Make, labelled: Any) -> None:
    examples = [example("q", "a"), example("q", "a long answer")]
    assert default_collate_fn(examples, qwen3_vl, max_length=80)["input_ids"].shape == (2, 79)
    batch = default_collate_fn(examples, qwen3_vl, max_length=30)
    assert batch["input_ids"].shape == (2, 29)
    check_batch(batch, 2)
    assert labelled(batch, qwen3_vl) == ["a<|im_end|>", "a long answer"[: 30 - len("<user\nq>\n<assistant\n")]]


def test_cutting_through_an_image_is_an_error(qwen3_vl: Any, example: Make) -> None:
    with pytest.raises(ValueError, match=r"the sample has \d+ tokens and max_length 9 would cut through its media"):
        default_collate_fn([example("q", "a", picture())], qwen3_vl, max_length=9)


def test_the_default_leaves_out_what_is_too_long_by_exact_length(qwen3_vl: Any, example: Make, caplog: Any) -> None:
    examples = [example("q", "a"), example("q", "a", picture(128, 128)), example("q", "b" * 99)]
    lengths = [int(default_collate_fn([item], qwen3_vl)["attention_mask"].sum()) + 1 for item in examples]
    with caplog.at_level(logging.WARNING):
        batch = default_collate_fn(examples, qwen3_vl, max_length=lengths[1], drop_overlong=True)
    assert batch["input_ids"].shape == (2, lengths[1] - 1)
    assert batch["n_images_per_sample"].tolist() == [0, 1]
    assert "1 of 3 samples" in caplog.text


def test_a_hook_sees_the_tokens_before_labels_are_made(qwen3_vl: Any, example: Make, labelled: Any) -> None:
    def shout(batch: Any, processor: Any) -> Any:
        assert "labels" not in batch
        ids = batch["input_ids"]
        small, large = (processor.tokenizer.convert_tokens_to_ids(letter) for letter in "bB")
        return {**batch, "input_ids": ids.masked_fill(ids == small, large)}

    batch = default_collate_fn([example("q", "bob")], qwen3_vl, _post_tokenize_hook=shout)
    assert labelled(batch, qwen3_vl) == ["BoB<|im_end|>"]


# Any conversation

TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12) | st.sampled_from(
    ["", "red", "is it red or blue ?", "assistant\n", "\n\n", "\u4e2d\u6587", "\U0001f600"]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS, st.booleans()), min_size=1, max_size=4))
def test_the_answers_and_only_they_are_trained_on(qwen2_5: Any, turns: list[tuple[str, str, bool]]) -> None:
    conversation = []
    for question, answer, as_parts in turns:
        parts = [{"type": "image", "image": picture()}, {"type": "text", "text": question}]
        conversation.append({"role": "user", "content": parts if as_parts else question})
        conversation.append(
            {"role": "assistant", "content": [{"type": "text", "text": answer}] if as_parts else answer}
        )
    batch = qwen2_5_collate_fn([{"conversation": conversation}, {"conversation": conversation[:2]}], qwen2_5)
    check_batch(batch, 2)
    texts = [qwen2_5.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert texts == ["".join(answer + "<|im_end|>" for _, answer, _ in own) for own in (turns, turns[:1])]


# All of them

EVERY = {
    "qwen2_5": (qwen2_5_collate_fn, True),
    "qwen3_vl": (default_collate_fn, True),
    "qwen3_omni": (qwen3_omni_collate_fn, True),
    "llava_onevision": (default_collate_fn, True),
    "gemma3": (default_collate_fn, True),
    "gemma4": (gemma4_prefix_collate_fn, True),
    "nemotron_omni": (nemotron_omni_collate_fn, True),
    "nemotron_omni_remote": (nemotron_omni_collate_fn, True),
    "kimi_vl": (kimi_vl_collate_fn, True),
    "kimi_k25": (kimi_k25_vl_collate_fn, True),
    "nemotron_parse": (nemotron_parse_collate_fn, True),
    "phi4": (phi4_mm_collate_fn, False),
    "phi4_remote": (phi4_mm_collate_fn, False),
}

STAND_INS = {"kimi_vl", "kimi_k25", "nemotron_parse", "phi4_remote", "nemotron_omni_remote"}


def said(name: Any) -> str:
    """The name of a processor in a test's name, and whether it is a stand-in."""
    return f"{name} stand-in" if name in STAND_INS else str(name)


@pytest.mark.parametrize("name", EVERY, ids=said)
def test_examples_are_not_written_to(name: str, example: Make, request: pytest.FixtureRequest) -> None:
    """Defect 2D: pictures are made RGB in the dataset's own dicts, and stay there."""
    function, sees = EVERY[name]
    given = example("q", "a", *([picture(mode="RGBA")] if sees else [sound()]))
    parts = given["conversation"][0]["content"]
    before, kept = copy.copy(parts), copy.copy(parts[0])
    function([given], request.getfixturevalue(name))
    assert parts == before
    assert all(parts[0][key] is kept[key] for key in kept)
    assert set(given) == {"conversation"}


@pytest.mark.parametrize("name", EVERY, ids=said)
def test_what_a_sample_becomes_does_not_depend_on_its_neighbours(
    name: str, example: Make, request: pytest.FixtureRequest
) -> None:
    function, sees = EVERY[name]
    processor = request.getfixturevalue(name)
    media = [[picture()], [picture(84, 56)]] if sees else [[sound()], [sound(0.7)]]
    examples = [example("q", "a", *media[0]), example("a longer question", "and a longer answer", *media[1])]
    both = function(examples, processor)
    for number, item in enumerate(examples):
        alone = function([item], processor)
        length = int(both["attention_mask"][number].sum())
        width = alone["input_ids"].shape[1]
        assert length in (width, width + 1)
        assert torch.equal(both["input_ids"][number, :width], alone["input_ids"][0])
        assert torch.equal(both["labels"][number, :width], alone["labels"][0])


SEEING = [name for name, (_, sees) in EVERY.items() if sees and name != "nemotron_parse"]


@pytest.mark.parametrize("name", SEEING, ids=said)
def test_a_fake_image_is_hidden_from_attention(
    name: str, example: Make, labelled: Any, request: pytest.FixtureRequest
) -> None:
    function, processor = EVERY[name][0], request.getfixturevalue(name)
    batch = function([inject_fake_image(example("q", "a")), example("q", "b", picture())], processor)
    assert batch["n_images_per_sample"].tolist() == [1, 1]
    hidden = (batch["attention_mask"] == 0) & (batch["input_ids"] != processor.tokenizer.pad_token_id)
    assert hidden[0].any()
    assert not hidden[1].any()
    assert labelled(batch, processor)[0].startswith("a<")


def test_a_medium_that_is_not_there_is_an_error(qwen2_5: Any, example: Make) -> None:
    with pytest.raises(ValueError, match="a part of the type image holds no 'image'; expected a PIL image"):
        qwen2_5_collate_fn([example("q", "a", {"type": "image"})], qwen2_5)
    with pytest.raises(DataError, match="does not exist"):
        qwen2_5_collate_fn([example("q", "a", {"type": "image", "image": "nowhere.png"})], qwen2_5)


def test_no_examples_are_an_error(qwen2_5: Any) -> None:
    with pytest.raises(ValueError, match="there are no samples"):
        qwen2_5_collate_fn([], qwen2_5)


# Samples that are tokenised already


def tokenised(length: int, **more: Any) -> Dict:
    ids = torch.arange(10, 10 + length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), **more}


def test_tokenised_samples_are_padded_and_shifted(qwen2_5: Any) -> None:
    batch = pad_collate_fn([tokenised(3), tokenised(5)], qwen2_5)
    assert batch["input_ids"].tolist() == [[10, 11, 12, 0], [10, 11, 12, 13]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[11, 12, -100, -100], [11, 12, 13, 14]]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert pad_collate_fn([tokenised(3)], qwen2_5, max_length=8)["input_ids"].shape == (1, 7)
    assert pad_collate_fn([tokenised(9)], qwen2_5, max_length=4)["labels"].tolist() == [[11, 12, 13]]


def test_media_of_tokenised_samples_all_come_along(qwen2_5: Any) -> None:
    """Defect 2A.13: ``second_per_grid_ts`` is lost, and with it the timing of videos."""
    with_image = tokenised(
        4,
        pixel_values=torch.ones(4, 6),
        image_grid_thw=torch.tensor([[1, 2, 2]]),
        mm_token_type_ids=torch.tensor([[0, 1, 0, 0]]),
    )
    with_video = tokenised(
        3,
        pixel_values_videos=torch.ones(8, 6),
        video_grid_thw=torch.tensor([[2, 2, 2]]),
        second_per_grid_ts=[0.5],
        source="train.jsonl:3",
    )
    batch = pad_collate_fn([with_image, tokenised(2), with_video], qwen2_5)
    assert batch["mm_token_type_ids"].tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert batch["second_per_grid_ts"].tolist() == [0.5]
    assert batch["n_images_per_sample"].tolist() == [1, 0, 0]
    assert batch["n_videos_per_sample"].tolist() == [0, 0, 1]
    assert batch["pixel_values"].dtype == batch["pixel_values_videos"].dtype == torch.bfloat16
    assert "source" not in batch


def test_images_of_tokenised_samples_are_tensors_or_lists(qwen2_5: Any) -> None:
    """Defect 2B.15: both in one batch are a TypeError."""
    examples = [tokenised(3, pixel_values=torch.ones(2, 3, 4, 4)), tokenised(3, pixel_values=[torch.ones(3, 8, 8)])]
    shapes = [tuple(item.shape) for item in pad_collate_fn(examples, qwen2_5)["pixel_values"]]
    assert shapes == [(3, 4, 4), (3, 4, 4), (3, 8, 8)]
    with pytest.raises(TypeError, match="pixel_values of the samples do not go together"):
        pad_collate_fn([tokenised(3, pixel_values=torch.ones(2, 6)), examples[1]], qwen2_5)


# Names


def test_the_map_is_nemos() -> None:
    assert set(COLLATE_FNS) == {
        "Qwen2_5_VLProcessor",
        "Qwen3OmniMoeProcessor",
        "KimiVLProcessor",
        "KimiK25Processor",
        "NemotronParseProcessor",
        "NemotronH_Nano_Omni_Reasoning_V3Processor",
        "LlavaOneVisionProcessor",
        "default",
    }
    assert COLLATE_FNS["default"] is default_collate_fn


NEMOS_NAMES = """
_build_labels_from_markers _count_media_per_sample _decode_single_token _derive_turn_markers _drop_overlong_samples
_ensure_rgb _estimate_media_tokens _expand_image_tokens _extract_assistant_text _extract_image_config
_extract_media_from_conversations _find_pattern_indices _get_assistant_marker _get_stop_token_id
_inject_thinking_prefix_tokens build_labels build_labels_from_template default_collate_fn gemma4_inject_thinking_prefix
gemma4_prefix_collate_fn kimi_k25_vl_collate_fn kimi_vl_collate_fn llava_onevision_collate_fn make_robust_collate
neat_packed_vlm_collater nemotron_omni_collate_fn nemotron_parse_collate_fn pad_collate_fn phi4_mm_collate_fn
qwen2_5_collate_fn qwen3_omni_collate_fn COLLATE_FNS HAVE_QWEN_OMNI_UTILS HAVE_QWEN_VL_UTILS _DEFAULT_MERGE_KERNEL
_GEMMA4_MODEL_TURN _GEMMA4_THINKING_PREFIX _IMSTART_TEMPLATE_PROCESSORS logger
"""


@pytest.mark.parametrize("name", NEMOS_NAMES.split())
def test_every_name_of_nemos_module_is_here(name: str) -> None:
    assert hasattr(collate_fns, name)


def test_signatures_are_nemos() -> None:
    def parameters(function: Any) -> list[str]:
        return [name for name, item in signature(function).parameters.items() if item.kind is not item.KEYWORD_ONLY]

    assert parameters(default_collate_fn) == [
        "examples", "processor", "max_length", "drop_overlong", "_post_tokenize_hook"
    ]  # fmt: skip
    assert parameters(kimi_k25_vl_collate_fn) == ["examples", "processor", "max_length", "drop_overlong"]
    assert parameters(nemotron_omni_collate_fn) == ["examples", "processor", "max_length", "max_video_frames"]
    assert parameters(nemotron_parse_collate_fn) == ["examples", "processor", "task_prompt"]
    assert parameters(qwen3_omni_collate_fn) == ["examples", "processor", "use_audio_in_video"]
    for function in (kimi_vl_collate_fn, gemma4_prefix_collate_fn, pad_collate_fn):
        assert parameters(function) == ["examples", "processor", "max_length"]
    for function in (qwen2_5_collate_fn, llava_onevision_collate_fn, phi4_mm_collate_fn):
        assert parameters(function) == ["examples", "processor"]
    assert parameters(collate_fns.make_robust_collate) == ["dataset", "collate_fn", "max_retries"]
    assert parameters(collate_fns._build_labels_from_markers) == ["input_ids_batch", "assistant_marker", "stop_id"]
    assert parameters(collate_fns.build_labels) == ["input_ids_batch", "conversations", "processor"]
    assert parameters(collate_fns.build_labels_from_template) == ["input_ids_batch", "conversations", "processor"]
    assert parameters(collate_fns._expand_image_tokens) == [
        "input_ids", "attention_mask", "grid_thws", "media_token_id", "merge_kernel_size"
    ]  # fmt: skip
