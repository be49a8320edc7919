"""The processor: texts and images together, for inference by a call and for training by ``encode``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing

from lightning_vlm import NemotronVLProcessor
from lightning_vlm.processing.image_processor import NemotronVLImageProcessor
from lightning_vlm.processing.labels import last_answer_start
from lightning_vlm.processing.tiny import CHATML_TEMPLATE, tiny_processor, tiny_tokenizer
from lightning_vlm.schema import IGNORE_INDEX, Conversation, DataError, ImageRef, Part, Text, Turn

SOURCE = "file.jsonl:12"


def picture(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def conversation(*turns: tuple[str, str | list[Part]], references: tuple[str, ...] = ()) -> Conversation:
    """Turns as (role, text or parts)."""
    return Conversation(
        tuple(Turn(role, (Text(parts),) if isinstance(parts, str) else tuple(parts)) for role, parts in turns),
        SOURCE,
        references,
    )


ABOUT_AN_IMAGE = conversation(("user", [ImageRef("a.png"), Text("what?")]), ("assistant", "a cat"))


def labelled(processor: NemotronVLProcessor, labels: torch.Tensor) -> str:
    return processor.tokenizer.decode(labels[labels != IGNORE_INDEX])


class TestCall:
    def test_expands_an_image_between_its_markers(self, processor: NemotronVLProcessor) -> None:
        encoded = processor(text="a<image>b", images=picture(), return_tensors="pt")
        a, b = processor.tokenizer("ab", add_special_tokens=False)["input_ids"]
        image, start, end = (
            processor.image_token_id,
            processor.image_start_token_id,
            processor.image_end_token_id,
        )
        assert encoded["input_ids"].tolist() == [[a, start, image, image, image, image, end, b]]
        assert encoded["attention_mask"].tolist() == [[1] * 8]
        assert encoded["image_grid_hw"].tolist() == [[4, 4]]
        assert encoded["pixel_values"].shape == (16, 192)

    def test_gives_images_to_placeholders_in_reading_order(self, processor: NemotronVLProcessor) -> None:
        images = [picture(32, 32, seed=1), picture(64, 32, seed=2), picture(32, 64, seed=3)]
        flat = processor(text=["<image>a<image>", "<image>"], images=images, padding=True, return_tensors="pt")
        nested = processor(
            text=["<image>a<image>", "<image>"],
            images=[images[:2], images[2:]],
            padding=True,
            return_tensors="pt",
        )
        assert flat["image_grid_hw"].tolist() == [[4, 4], [4, 8], [8, 4]]
        counts = (flat["input_ids"] == processor.image_token_id).sum(-1)
        assert counts.tolist() == [4 + 8, 8]
        for name, value in flat.items():
            assert torch.equal(value, nested[name])

    def test_takes_text_alone(self, processor: NemotronVLProcessor) -> None:
        assert set(processor(text="hi")) == {"input_ids", "attention_mask"}
        assert processor(text="hi", images=[])["input_ids"] == processor(text=["hi"])["input_ids"]

    def test_adds_no_special_tokens_unless_asked(self) -> None:
        processor = tiny_processor()
        bos = processor.tokenizer.bos_token_id
        processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", bos)]
        )
        hi = processor(text="hi")["input_ids"][0]
        assert processor.tokenizer.decode(hi) == "hi"
        assert processor(text="hi", add_special_tokens=True)["input_ids"][0] == [bos, *hi]

    def test_pads_on_the_left_for_generation(self, processor: NemotronVLProcessor) -> None:
        encoded = processor(
            text=["<image>abc", "d"], images=picture(), padding=True, padding_side="left", return_tensors="pt"
        )
        assert encoded["attention_mask"].tolist() == [[1] * 9, [0] * 8 + [1]]
        assert encoded["input_ids"][1, :8].tolist() == [processor.tokenizer.pad_token_id] * 8
        right = processor(text=["<image>abc", "d"], images=picture(), padding=True, return_tensors="pt")
        assert right["attention_mask"].tolist() == [[1] * 9, [1] + [0] * 8]

    @pytest.mark.parametrize(
        ("text", "images", "numbers"),
        [
            ("<image><image>", 1, "2 <image> placeholder(s) for 1 image(s)"),
            ("no image", 1, "0 <image> placeholder(s) for 1 image(s)"),
            ("<image>", 0, "1 <image> placeholder(s) for 0 image(s)"),
            (["<image>", "<image>"], 3, "2 <image> placeholder(s) for 3 image(s)"),
        ],
        ids=["too few", "none wanted", "none given", "batch"],
    )
    def test_refuses_unequal_counts_with_both_numbers(
        self, processor: NemotronVLProcessor, text: Any, images: int, numbers: str
    ) -> None:
        with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is checked below
            processor(text=text, images=[picture()] * images)
        assert numbers in str(caught.value)

    def test_refuses_lists_per_text_that_only_agree_in_sum(self, processor: NemotronVLProcessor) -> None:
        with pytest.raises(ValueError, match=r"2 <image> placeholder\(s\) for 1 image\(s\)"):
            processor(text=["<image><image>", "text"], images=[[picture()], [picture()]], padding=True)

    def test_refuses_images_without_text(self, processor: NemotronVLProcessor) -> None:
        with pytest.raises(ValueError, match="text is missing"):
            processor(images=picture())

    @pytest.mark.parametrize(
        "options",
        [
            {"downsample_ratio": 1.0},
            {"max_num_patches": 4},
            {"mode": "static", "tile_size": 16},
            {"patch_size": 4},
        ],
        ids=str,
    )
    def test_expands_by_the_options_of_the_call(self, processor: NemotronVLProcessor, options: dict) -> None:
        encoded = processor(text="<image>", images=picture(48, 32), return_tensors="pt", **options)
        geometry = processor.image_processor.geometry_with(**options)
        placeholders = int((encoded["input_ids"] == processor.image_token_id).sum())
        assert placeholders == geometry.num_image_tokens(32, 48) != processor.geometry.num_image_tokens(32, 48)
        assert placeholders == geometry.num_tokens(encoded["image_grid_hw"].tolist())

    def test_normalises_when_asked(self, processor: NemotronVLProcessor) -> None:
        encoded = processor(text="<image>", images=picture(50, 70), do_normalize=True)
        alone = processor.image_processor(picture(50, 70), do_normalize=True)
        assert encoded["pixel_values"].dtype == torch.float32
        assert torch.equal(encoded["pixel_values"], alone["pixel_values"])

    @pytest.mark.parametrize(
        "convert",
        [np.array, lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1)],
        ids=["numpy", "tensor"],
    )
    def test_takes_arrays_and_tensors(self, processor: NemotronVLProcessor, convert: Any) -> None:
        expected = processor(text="<image>", images=picture(50, 70))
        encoded = processor(text="<image>", images=convert(picture(50, 70)))
        assert torch.equal(encoded["pixel_values"], expected["pixel_values"])

    def test_refuses_arrays_in_another_range(self, processor: NemotronVLProcessor) -> None:
        with pytest.raises(ValueError, match=r"expected pixels in 0\.\.255"):
            processor(text="<image>", images=np.array(picture()) / 255)

    def test_gives_what_the_model_takes(self, processor: NemotronVLProcessor) -> None:
        assert set(processor(text="<image>", images=picture())) == set(processor.model_input_names)


class TestStaticMode:
    def test_has_one_pair_of_markers_around_all_tiles(self) -> None:
        processor = tiny_processor(mode="static", max_tiles=6)
        encoded = processor(text="a<image>b", images=picture(96, 64))  # 2 x 3 tiles and the thumbnail, 4 tokens each
        image, start, end = (
            processor.image_token_id,
            processor.image_start_token_id,
            processor.image_end_token_id,
        )
        assert encoded["input_ids"][0][1:-1] == [start, *[image] * 28, end]
        assert encoded["image_grid_hw"].tolist() == [[4, 4]] * 7

    def test_encodes_two_images_as_two_runs(self) -> None:
        processor = tiny_processor(mode="static", max_tiles=6)
        parts: list[Part] = [ImageRef("a"), Text("and"), ImageRef("b")]
        images = [picture(96, 64), picture(32, 32)]
        sample = processor.encode(conversation(("user", parts), ("assistant", "x")), images)
        text = processor.tokenizer.decode(sample.input_ids)
        assert "<img>" + "<image>" * 28 + "</img>and<img>" + "<image>" * 4 + "</img>" in text
        assert sample.image_grid_hw is not None
        assert sample.image_grid_hw.tolist() == [[4, 4]] * 8


class TestEncode:
    def test_makes_a_sample(self, processor: NemotronVLProcessor) -> None:
        sample = processor.encode(ABOUT_AN_IMAGE, [picture()])
        run = "<img>" + "<image>" * 4 + "</img>"
        prompt = f"<|im_start|>user\n{run}what?<|im_end|>\n<|im_start|>assistant\n"
        assert processor.tokenizer.decode(sample.input_ids) == prompt + "a cat<|im_end|>\n"
        assert labelled(processor, sample.labels) == "a cat<|im_end|>"
        assert processor.tokenizer.decode(sample.input_ids[: sample.prompt_length]) == prompt
        assert sample.prompt == prompt.replace(run, "<image>")
        assert sample.references == ("a cat",)
        assert sample.source == SOURCE
        assert sample.num_label_tokens == len("a cat") + 1
        assert sample.pixel_values is not None
        assert sample.image_grid_hw is not None
        assert sample.pixel_values.shape == (16, 192)
        assert sample.image_grid_hw.tolist() == [[4, 4]]

    def test_trains_what_is_served(self, processor: NemotronVLProcessor) -> None:
        sample = processor.encode(ABOUT_AN_IMAGE, [picture(50, 70)])
        served = processor(text=sample.prompt, images=picture(50, 70), return_tensors="pt")
        assert sample.input_ids[: sample.prompt_length].tolist() == served["input_ids"][0].tolist()
        assert sample.pixel_values is not None
        assert torch.equal(sample.pixel_values, served["pixel_values"])

    def test_to_answer_ends_with_the_prompt_and_trains_on_nothing(self, processor: NemotronVLProcessor) -> None:
        question = conversation(("user", [ImageRef("a.png"), Text("what?")]), references=("a cat", "cat"))
        sample = processor.encode(question, [picture()], answer=True)
        trained = processor.encode(ABOUT_AN_IMAGE, [picture()])
        assert sample.input_ids.tolist() == trained.input_ids[: trained.prompt_length].tolist()
        assert sample.prompt == trained.prompt
        assert sample.prompt_length == len(sample)
        assert (sample.labels == IGNORE_INDEX).all()
        assert sample.num_label_tokens == 0
        assert sample.references == ("a cat", "cat")

    def test_question_is_never_its_own_reference(self, processor: NemotronVLProcessor) -> None:
        asked = conversation(("user", "q"), ("assistant", "a"), ("user", "r"))
        assert processor.encode(asked, [], answer=True).references == ()
        assert processor.encode(asked, []).references == ("a",)
        assert processor.encode(conversation(("user", "q")), [], answer=True).references == ()

    def test_prompt_of_a_dialogue_ends_before_its_last_answer(self, processor: NemotronVLProcessor) -> None:
        dialogue = conversation(("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "two"))
        sample = processor.encode(dialogue, [])
        assert labelled(processor, sample.labels) == "one<|im_end|>two<|im_end|>"
        assert processor.tokenizer.decode(sample.input_ids[sample.prompt_length :]) == "two<|im_end|>\n"
        assert sample.prompt.endswith("one<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n")
        assert sample.references == ("two",)

    def test_named_references_win_over_the_trained_answer(self, processor: NemotronVLProcessor) -> None:
        row = conversation(("user", "q"), ("assistant", "a"), references=("b", "c"))
        assert processor.encode(row, []).references == ("b", "c")

    def test_text_alone_has_no_pixels(self, processor: NemotronVLProcessor) -> None:
        sample = processor.encode(conversation(("user", "q"), ("assistant", "a")), [])
        assert sample.pixel_values is None
        assert sample.image_grid_hw is None

    @pytest.mark.parametrize("given", [0, 2])
    def test_refuses_more_or_fewer_images_naming_the_place(self, processor: NemotronVLProcessor, given: int) -> None:
        with pytest.raises(DataError) as caught:
            processor.encode(ABOUT_AN_IMAGE, [picture()] * given)
        assert str(caught.value).startswith(f"{SOURCE}: the chat template rendered 1 image placeholder(s) for {given}")

    def test_refuses_a_text_that_holds_the_placeholder(self, processor: NemotronVLProcessor) -> None:
        with pytest.raises(DataError, match=r"file\.jsonl:12: the text of turn 1 \(user\) contains '<image>'"):
            processor.encode(conversation(("user", "an <image>"), ("assistant", "a")), [])

    def test_refuses_a_tokenizer_that_splits_the_placeholder(self) -> None:
        tokenizer = tiny_tokenizer()
        processor = NemotronVLProcessor(tiny_processor().image_processor, tokenizer)
        tokenizer.split_special_tokens = True  # special tokens are read as ordinary text
        with pytest.raises(DataError, match=r"file\.jsonl:12: 0 image placeholders were tokenised, expected 4"):
            processor.encode(ABOUT_AN_IMAGE, [picture()])

    def test_uses_the_processors_chat_template(self) -> None:
        template = CHATML_TEMPLATE.replace("assistant\\n", "assistant\\n> ")
        processor = NemotronVLProcessor(tiny_processor().image_processor, tiny_tokenizer(), chat_template=template)
        sample = processor.encode(conversation(("user", "q")), [], answer=True)
        assert processor.tokenizer.decode(sample.input_ids).endswith("<|im_start|>assistant\n> ")
        assert processor.apply_chat_template([{"role": "user", "content": "q"}], add_generation_prompt=True).endswith(
            "<|im_start|>assistant\n> "
        )

    def test_passes_template_variables_on(self) -> None:
        template = "{{ style }}" + CHATML_TEMPLATE
        processor = NemotronVLProcessor(tiny_processor().image_processor, tiny_tokenizer(), chat_template=template)
        row = conversation(("user", "q"), ("assistant", "a"))
        assert processor.encode(row, [], template_kwargs={"style": "terse"}).prompt.startswith("terse<|im_start|>")
        assert labelled(processor, processor.encode(row, [], template_kwargs={"style": "terse"}).labels) == (
            "a<|im_end|>"
        )

    def test_leaves_its_images_alone(self, processor: NemotronVLProcessor) -> None:
        image = picture(50, 70)
        before = image.tobytes()
        sample = processor.encode(ABOUT_AN_IMAGE, [image])
        assert sample.pixel_values is not None
        sample.pixel_values.zero_()
        assert image.tobytes() == before


@pytest.mark.parametrize(
    ("labels", "types", "start"),
    [
        ([-100, 5, 6, -100], [0, 0, 0, 0], 1),
        ([-100, 5, -100, 6, 7], [0, 0, 0, 0, 0], 3),
        ([-100, 5, -100, -100, 6, 7], [0, 0, 1, 2, 0, 0], 1),
        ([5, -100, -100, -100, 6], [0, 0, 3, 3, 0], 4),
        ([-100, -100, 5, -100], [1, 1, 0, 2], 2),
        ([5, 6, -100], [0, 0, 0], 0),
        ([-100, -100], [0, 0], 2),
        ([], [], 0),
    ],
    ids=str,
)
def test_last_answer_starts_at_the_last_trained_run(labels: list[int], types: list[int], start: int) -> None:
    given = (torch.tensor(values, dtype=torch.int64) for values in (labels, types))
    assert last_answer_start(*given) == start


class TestFiles:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"mode": "static", "tile_size": 16, "max_tiles": 3, "use_thumbnail": False},
            {
                "downsample_ratio": 0.25,
                "do_normalize": True,
                "image_mean": [0.5] * 3,
                "image_std": [0.1, 0.2, 0.3],
            },
        ],
        ids=["dynamic", "static", "normalised"],
    )
    def test_survive_the_round_trip(self, tmp_path: Path, options: dict) -> None:
        processor = tiny_processor(**options)
        processor.save_pretrained(tmp_path)
        loaded = NemotronVLProcessor.from_pretrained(tmp_path)
        assert loaded.geometry == processor.geometry
        assert loaded.chat_template == processor.chat_template
        before = processor.encode(ABOUT_AN_IMAGE, [picture(50, 70)])
        after = loaded.encode(ABOUT_AN_IMAGE, [picture(50, 70)])
        for name in ("input_ids", "labels", "pixel_values", "image_grid_hw"):
            assert torch.equal(getattr(before, name), getattr(after, name)), name

    def test_keep_other_token_names_and_a_replaced_template(self, tmp_path: Path) -> None:
        names = {"image_token": "<IMG_CONTEXT>", "image_start_token": "<b>", "image_end_token": "<e>"}
        template = "{{ '<s>' }}" + CHATML_TEMPLATE
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": list(names.values())})
        image_processor = NemotronVLImageProcessor(patch_size=8, min_num_patches=4, max_num_patches=64)
        processor = NemotronVLProcessor(image_processor, tokenizer, chat_template=template, **names)
        processor.save_pretrained(tmp_path)
        loaded = NemotronVLProcessor.from_pretrained(tmp_path)
        assert {name: getattr(loaded, name) for name in names} == names
        assert loaded.image_token_id == processor.image_token_id != tiny_processor().image_token_id
        sample = loaded.encode(ABOUT_AN_IMAGE, [picture()])
        assert loaded.tokenizer.decode(sample.input_ids).startswith(
            "<s><|im_start|>user\n<b>" + "<IMG_CONTEXT>" * 4 + "<e>what?"
        )

    def test_of_a_release_are_read(self, tmp_path: Path) -> None:
        tiny_tokenizer().save_pretrained(tmp_path)  # no processor_config.json: released folders may have none
        released = {
            "norm_mean": [0.1, 0.2, 0.3],
            "norm_std": [0.4, 0.5, 0.6],
            "patch_size": 8,
            "min_num_patches": 4,
        }
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(released))
        loaded = NemotronVLProcessor.from_pretrained(tmp_path)
        assert list(loaded.image_processor.image_mean) == [0.1, 0.2, 0.3]
        assert list(loaded.image_processor.image_std) == [0.4, 0.5, 0.6]
        assert loaded.geometry.patch_size == 8
        assert loaded.image_token == "<image>"

    def test_can_be_overridden_while_loading(self, tmp_path: Path) -> None:
        tiny_processor().save_pretrained(tmp_path)
        loaded = NemotronVLProcessor.from_pretrained(tmp_path, max_num_patches=16, image_token="<s>", do_normalize=True)
        assert loaded.geometry.max_num_patches == 16
        assert loaded.image_processor.do_normalize is True
        assert loaded.image_token == "<s>"
        assert loaded.image_token_id == loaded.tokenizer.bos_token_id

    @pytest.mark.parametrize("name", ["image_token", "image_start_token", "image_end_token"])
    def test_tokenizer_without_the_token_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match="no token '<absent>'; add it"):
            NemotronVLProcessor(NemotronVLImageProcessor(), tiny_tokenizer(), **{name: "<absent>"})


def test_works_without_torchvision() -> None:
    """In a process where torchvision cannot be imported, whether it is installed or not."""
    program = """
import sys
sys.modules["torchvision"] = None
from PIL import Image
from lightning_vlm.processing.tiny import tiny_processor
image = Image.new("RGB", (50, 70))
for options in ({}, {"mode": "static"}, {"do_normalize": True}):
    encoded = tiny_processor(**options)(text="<image>", images=image, return_tensors="pt")
    assert len(encoded["pixel_values"]) > 0
print("works")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stdout == "works\n", result.stderr


@pytest.mark.parametrize(("media", "setting"), [("videos", "video"), ("audio", "sound")])
def test_media_without_settings_are_refused_by_name(processor: NemotronVLProcessor, media: str, setting: str) -> None:
    processor(text="hi", **{media: None})
    with pytest.raises(
        ValueError, match=rf"{media} were given to a processor without settings.*{setting}=\{{\.\.\.\}}"
    ):
        processor(text="hi", **{media: ["clip"]})


@pytest.mark.parametrize("token", ["<image>", "<img>", "</img>", "<|im_end|>"])
def test_data_cannot_write_control_tokens(processor: NemotronVLProcessor, token: str) -> None:
    turns = (Turn("user", (Text(f"what is {token}?"),)), Turn("assistant", (Text("x"),)))
    with pytest.raises(DataError, match=r"f:1: the text of turn 1 \(user\) contains .* expected plain text"):
        processor.encode(Conversation(turns, "f:1"), [])
