"""Sizes without encoding: exactly those of the encoded Sample, with and without a limit that images shrink for."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_vlm import NemotronVLProcessor
from lightning_vlm.geometry.images import lay_out_images
from lightning_vlm.media.image import image_to_patches
from lightning_vlm.processing.image_processor import NemotronVLImageProcessor
from lightning_vlm.processing.sizes import SampleLimit, SampleSize
from lightning_vlm.processing.tiny import CHATML_TEMPLATE, SPECIAL_TOKENS, tiny_processor, tiny_tokenizer
from lightning_vlm.schema import IGNORE_INDEX, Conversation, DataError, ImageRef, Part, Sample, Text, Turn

SOURCE = "file.jsonl:12"
WORDS = [
    "a",
    " word",
    "\n\n",
    "\n",
    " ",
    "日本",
    "🙂",
    "e\u0301",
    "<think>",
    "</think>",
    "x" * 40,
    "<im",
    "age>",
    "\u00a0",
]

# Trims contents, opens answers with thinking unless told not to, and cuts it from earlier answers.
THINKING_TEMPLATE = """
{%- for message in messages -%}
{%- set content = message.content | trim -%}
{%- if message.role == 'assistant' and not loop.last -%}{%- set content = content.split('</think>')[-1] -%}{%- endif -%}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ '<|im_end|>\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' ~ ('<think>\\n' if thinking else '') -}}{%- endif -%}
"""


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def merging_tokenizer(**image_token: Any) -> PreTrainedTokenizerFast:
    """Byte-level with merges that reach across turns and up to images: newlines and spaces join."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, "ĊĊ", "ĠĠ", "Ċ<", ">Ċ", "ĊĠ", "wo", "wor"]
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ċ", "<"), (">", "Ċ"), ("Ċ", "Ġ"), ("w", "o"), ("wo", "r")]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *pieces])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special = [AddedToken(token, normalized=False) for token in SPECIAL_TOKENS if token != "<image>"]
    backend.add_special_tokens([*special, AddedToken("<image>", **{"normalized": False, **image_token})])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>", chat_template=CHATML_TEMPLATE
    )


def with_tokenizer(tokenizer: Any, template: str = CHATML_TEMPLATE, **options: Any) -> NemotronVLProcessor:
    image_processor = tiny_processor(**options).image_processor
    return NemotronVLProcessor(image_processor, tokenizer, chat_template=template)


PROCESSORS = {
    "dynamic": tiny_processor(),
    "dynamic, large minimum": tiny_processor(min_num_patches=64),
    "dynamic, short context": tiny_processor(max_model_len=40, max_num_patches=0),
    "dynamic, merging 4 x 4": tiny_processor(downsample_ratio=0.25, min_num_patches=16),
    "static": tiny_processor(mode="static", max_tiles=6),
    "static without thumbnail": tiny_processor(mode="static", use_thumbnail=False),
    "thinking template": with_tokenizer(tiny_tokenizer(), THINKING_TEMPLATE),
    "merging tokenizer": with_tokenizer(merging_tokenizer(), THINKING_TEMPLATE, mode="static"),
    "stripping tokenizer": with_tokenizer(merging_tokenizer(lstrip=True, rstrip=True)),
}


def random_conversation(generator: random.Random) -> tuple[Conversation, list[tuple[int, int]]]:
    """One to four exchanges with up to five images anywhere in the questions, and the images' sizes."""
    turns, sizes = [], []
    if generator.random() < 0.3:
        turns.append(Turn("system", (Text(text(generator)),)))
    for _ in range(generator.randint(1, 4)):
        parts: list[Part] = [Text(text(generator))]
        for _ in range(generator.choice([0, 0, 1, 1, 2, 5])):
            if len(sizes) < 5:
                sizes.append((int(200 ** generator.random()), int(200 ** generator.random())))
                parts.append(ImageRef(f"{len(sizes)}.png"))
                parts += [Text(text(generator))] * generator.randint(0, 1)
        turns.append(Turn("user", tuple(parts)))
        turns.append(Turn("assistant", (Text(text(generator)),)))
    return Conversation(tuple(turns), SOURCE), sizes


def text(generator: random.Random) -> str:
    return "".join(generator.choices([*WORDS, ""], k=generator.randint(0, 8))).replace("<image>", "")


def size_of(sample: Sample, num_images: int) -> tuple[int, int, int]:
    return len(sample), 0 if sample.pixel_values is None else len(sample.pixel_values), num_images


class TestMeasure:
    @pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
    def test_is_the_size_of_the_sample(self, processor: NemotronVLProcessor) -> None:
        generator = random.Random(1)
        scaled = within = 0
        for case in range(60):
            conversation, sizes = random_conversation(generator)
            options: dict[str, Any] = {"template_kwargs": generator.choice([None, {"thinking": True}])}
            if answer := case % 5 == 0:
                options["answer"] = True
                conversation = Conversation(conversation.turns[:-1], SOURCE)
            images = [picture(*size, seed=case) for size in sizes]
            own = processor.measure(conversation, sizes, **options)
            assert (own.tokens, own.patches, own.images) == size_of(
                processor.encode(conversation, images, **options), len(sizes)
            ), (case, answer)
            unbounded = [grid for tiles in lay_out_images(sizes, processor.geometry).grids for grid in tiles]
            for limit in (
                SampleLimit(max(1, int(own.tokens * generator.random()))),
                SampleLimit(10**6, max(1, int(own.patches * generator.random()))),
                SampleLimit(own.tokens, max(own.patches, 1)),
            ):
                sample = processor.encode(conversation, images, limit=limit, **options)
                size = processor.measure(conversation, sizes, limit=limit, **options)
                assert (size.tokens, size.patches, size.images) == size_of(sample, len(sizes))
                grids = [] if sample.image_grid_hw is None else [tuple(grid) for grid in sample.image_grid_hw.tolist()]
                assert size.scaled is (grids != unbounded)
                scaled += size.scaled
                within += size.scaled and limit.holds(size.tokens, size.patches)
        assert scaled > 30
        assert within > 10

    def test_of_known_samples(self, processor: NemotronVLProcessor) -> None:
        turns = (Turn("user", (ImageRef("a"), Text("what?"))), Turn("assistant", (Text("a cat"),)))
        # <|im_start|>user\n <img> 4 placeholders </img> what? <|im_end|>\n <|im_start|>assistant\n a cat <|im_end|>\n
        tokens = 1 + 5 + 1 + 4 + 1 + 5 + 2 + 1 + 10 + 5 + 2
        assert processor.measure(Conversation(turns, SOURCE), [(32, 32)]) == SampleSize(tokens, 16, 1)
        asked = Conversation((turns[0],), SOURCE)
        assert processor.measure(asked, [(32, 32)], answer=True) == SampleSize(tokens - 5 - 2, 16, 1)
        only_text = Conversation((Turn("user", (Text("日"),)), turns[1]), SOURCE)
        assert processor.measure(only_text, []) == SampleSize(1 + 5 + 3 + 2 + 1 + 10 + 5 + 2, 0, 0)

    def test_renders_the_order_of_roles_once_per_template(self) -> None:
        processor = with_tokenizer(tiny_tokenizer(), THINKING_TEMPLATE)
        rows = [Conversation((Turn("user", (Text(c),)), Turn("assistant", (Text(c),))), SOURCE) for c in "ab"]
        for template in (THINKING_TEMPLATE, "{{ '<s>' }}" + CHATML_TEMPLATE):
            processor.chat_template = template
            for row in rows:
                for kwargs in ({}, {"thinking": True}):
                    assert processor.measure(row, [], template_kwargs=kwargs).tokens == len(
                        processor.encode(row, [], template_kwargs=kwargs)
                    )
        # A template that is refused for these roles is refused after another one was accepted for them.
        processor.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        with pytest.raises(DataError, match="expected a special token to stop at"):
            processor.measure(rows[0], [])

    def test_is_not_kept_in_files(self, tmp_path: Any) -> None:
        processor = tiny_processor()
        processor.measure(Conversation((Turn("user", (Text("q"),)), Turn("assistant", (Text("a"),))), SOURCE), [])
        processor.save_pretrained(tmp_path)
        assert "known" not in (tmp_path / "processor_config.json").read_text()
        assert NemotronVLProcessor.from_pretrained(tmp_path).geometry == processor.geometry


def user_then_assistant(question: tuple[Part, ...], answer: str = "a") -> Conversation:
    return Conversation((Turn("user", question), Turn("assistant", (Text(answer),))), SOURCE)


class TestRefusals:
    @pytest.mark.parametrize(
        ("template", "question", "num_images"),
        [
            (CHATML_TEMPLATE, (Text("what is <image>?"),), 0),
            (CHATML_TEMPLATE, (Text("what is <img>?"),), 0),
            (CHATML_TEMPLATE, (Text("what is <|im_end|>?"),), 0),
            (CHATML_TEMPLATE, (Text("<im"), Text("age>")), 0),
            (CHATML_TEMPLATE, (ImageRef("a"),), 0),
            (CHATML_TEMPLATE, (ImageRef("a"),), 2),
            (CHATML_TEMPLATE, (Text("q"),), 1),
            ("{{ raise_exception('no') }}", (Text("q"),), 0),
            ("{{ messages[0].content }}<|im_end|>", (Text("q"),), 0),
            ("{% for m in messages %}{{ m.content }}{{ m.content }}<|im_end|>{% endfor %}", (Text("q"),), 0),
            ("{% for m in messages %}{{ m.content }}\n{% endfor %}", (Text("q"),), 0),
            ("{% for m in messages %}{{ m.content | replace('<', '') }}<|im_end|>{% endfor %}", (ImageRef("a"),), 1),
            ("{% for m in messages | reverse %}{{ m.content }}<|im_end|>{% endfor %}", (Text("q"),), 0),
        ],
        ids=[
            "placeholder in text",
            "marker in text",
            "end token in text",
            "placeholder in two texts",
            "image missing",
            "too many images",
            "image without placeholder",
            "template refuses",
            "template drops a turn",
            "template repeats a turn",
            "no end token",
            "template eats placeholders",
            "template reorders",
        ],
    )
    def test_are_those_of_encode(self, template: str, question: tuple[Part, ...], num_images: int) -> None:
        processor = with_tokenizer(tiny_tokenizer(), template)
        row = user_then_assistant(question)
        with pytest.raises(DataError) as by_encode:
            processor.encode(row, [picture(32, 32)] * num_images)
        with pytest.raises(DataError) as by_measure:
            processor.measure(row, [(32, 32)] * num_images)
        assert str(by_measure.value) == str(by_encode.value)

    @pytest.mark.parametrize(
        ("action", "problem"),
        [
            ("{{ raise_exception('twice') }}", r"refuses the turns \(user, assistant, assistant\): twice"),
            ("{% set ns.content = '' %}", "prints turn 3 0 times"),
        ],
        ids=["refuses", "drops"],
    )
    def test_of_what_changes_with_the_order_of_roles(self, action: str, problem: str) -> None:
        template = (
            "{% set ns = namespace(content='') %}{% for m in messages %}{% set ns.content = m.content %}"
            "{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}" + action + "{% endif %}"
            "{{ m.role ~ ns.content }}<|im_end|>{% endfor %}"
        )
        processor = with_tokenizer(tiny_tokenizer(), template)
        processor.measure(user_then_assistant((Text("q"),)), [])
        twice = Conversation((*user_then_assistant((Text("q"),)).turns, Turn("assistant", (Text("b"),))), SOURCE)
        for function in (processor.measure, processor.encode):
            with pytest.raises(DataError, match=problem):
                function(twice, [])


class TestTokenizers:
    @pytest.mark.parametrize("normalizer", [None, normalizers.Lowercase(), normalizers.Replace("> <", "><")])
    def test_that_normalise_placeholders(self, normalizer: Any) -> None:
        tokenizer = merging_tokenizer(normalized=True)
        if normalizer is not None:
            tokenizer.backend_tokenizer.normalizer = normalizer
        processor = with_tokenizer(tokenizer)
        row = user_then_assistant((Text("Q "), ImageRef("a"), Text("\n"), ImageRef("b")))
        sizes = [(50, 70), (30, 20)]
        size = processor.measure(row, sizes)
        assert size.tokens == len(processor.encode(row, [picture(*size) for size in sizes]))

    def test_with_a_token_for_two_placeholders_are_refused_as_by_encode(self) -> None:
        tokenizer = merging_tokenizer()
        tokenizer.add_tokens([AddedToken("<image><image>", normalized=False)], special_tokens=True)
        processor = with_tokenizer(tokenizer)
        row = user_then_assistant((ImageRef("a"),))
        with pytest.raises(DataError, match="0 image placeholders were tokenised, expected 4"):
            processor.encode(row, [picture(32, 32)])
        with pytest.raises(DataError, match="0 image placeholders were tokenised, expected 4"):
            processor.measure(row, [(32, 32)])


class TestLimit:
    ROW = user_then_assistant((ImageRef("a"), ImageRef("b"), ImageRef("c"), Text("which?")))
    SIZES = ((120, 90), (24, 200), (64, 64))

    @pytest.mark.parametrize("name", ["dynamic", "dynamic, large minimum", "static", "static without thumbnail"])
    def test_is_kept_wherever_the_smallest_images_keep_it(self, name: str) -> None:
        processor = PROCESSORS[name]
        own = processor.measure(self.ROW, self.SIZES)
        smallest = processor.measure(self.ROW, self.SIZES, limit=SampleLimit(1))
        assert smallest.tokens < own.tokens
        for tokens in range(1, own.tokens + 2):
            size = processor.measure(self.ROW, self.SIZES, limit=SampleLimit(tokens))
            assert size.tokens <= max(tokens, smallest.tokens)
            assert size.scaled == (tokens < own.tokens)
        for patches in range(1, own.patches + 2, 3):
            size = processor.measure(self.ROW, self.SIZES, limit=SampleLimit(10**6, patches))
            assert size.patches <= max(patches, smallest.patches)
            assert size.scaled == (patches < own.patches)
        assert processor.measure(self.ROW, self.SIZES, limit=SampleLimit(own.tokens, own.patches)) == own

    def test_of_both_the_tighter_one_counts(self) -> None:
        processor = PROCESSORS["dynamic"]
        tokens = processor.measure(self.ROW, self.SIZES, limit=SampleLimit(110))
        patches = processor.measure(self.ROW, self.SIZES, limit=SampleLimit(10**6, 150))
        assert tokens.tokens <= 110
        assert patches.patches <= 150 < tokens.patches
        assert processor.measure(self.ROW, self.SIZES, limit=SampleLimit(110, 150)) == patches
        assert processor.measure(self.ROW, self.SIZES, limit=SampleLimit(110, 10**6)) == tokens

    def test_leaves_text_alone(self) -> None:
        processor = PROCESSORS["dynamic"]
        row = user_then_assistant((Text("q" * 50),))
        own = processor.measure(row, [])
        assert processor.measure(row, [], limit=SampleLimit(1)) == own
        assert len(processor.encode(row, [], limit=SampleLimit(1))) == own.tokens

    @pytest.mark.parametrize("normalize", [False, True], ids=["uint8", "float"])
    def test_pixels_are_those_of_the_smaller_grids(self, normalize: bool) -> None:
        processor = tiny_processor(do_normalize=normalize)
        images = [picture(*size, seed=index) for index, size in enumerate(self.SIZES)]
        sample = processor.encode(self.ROW, images, limit=SampleLimit(100))
        assert sample.image_grid_hw is not None
        assert sample.pixel_values is not None
        placeholders = int((sample.input_ids == processor.image_token_id).sum())
        assert placeholders == int(sample.image_grid_hw.prod(-1).sum()) // 4 == len(sample.pixel_values) // 4
        if not normalize:
            grids = [(int(rows), int(columns)) for rows, columns in sample.image_grid_hw]
            alone = [
                image_to_patches(image, processor.geometry, grid)[0] for image, grid in zip(images, grids, strict=True)
            ]
            assert torch.equal(sample.pixel_values, torch.cat(alone))

    def test_pixels_of_fewer_tiles_are_those_of_a_processor_with_fewer_tiles(self) -> None:
        images = [picture(*size, seed=index) for index, size in enumerate(self.SIZES)]
        processor = tiny_processor(mode="static", max_tiles=12)
        own = processor.measure(self.ROW, self.SIZES)
        sample = processor.encode(self.ROW, images, limit=SampleLimit(own.tokens - 1))
        assert sample.pixel_values is not None
        fewer = [tiny_processor(mode="static", max_tiles=count).encode(self.ROW, images) for count in range(11, 0, -1)]
        first = next(other for other in fewer if len(other) < own.tokens)
        assert torch.equal(sample.pixel_values, first.pixel_values)  # type: ignore[arg-type]
        assert torch.equal(sample.input_ids, first.input_ids)

    @pytest.mark.parametrize("numbers", [(0, None), (-1, 5), (5, 0)], ids=str)
    def test_is_positive(self, numbers: tuple[int, int | None]) -> None:
        with pytest.raises(ValueError, match="expected at least 1"):
            SampleLimit(*numbers)

    def test_prints_what_it_bounds(self) -> None:
        assert str(SampleLimit(4096)) == "4,096 tokens"
        assert str(SampleLimit(4096, 13312)) == "4,096 tokens and 13,312 vision patches"


def test_layout_is_of_these_images() -> None:
    processor = NemotronVLImageProcessor(patch_size=8, min_num_patches=4, max_num_patches=64)
    layout = lay_out_images([(32, 32)], processor.geometry)
    with pytest.raises(ValueError, match="zip"):
        processor.patchify([picture(32, 32)] * 2, layout)


class TestCuttingText:
    """``max_text``: the end is cut off, never an image, never all that is learned; measured as encoded."""

    ROWS = (
        user_then_assistant((ImageRef("a"), Text("which?")), "an answer that goes on " * 6),
        user_then_assistant((Text("long " * 30),), "short"),
        user_then_assistant((Text("first "), ImageRef("a"), Text(" last")), "é" * 20),
    )
    SIZES = ((64, 48),)

    @pytest.mark.parametrize("name", ["dynamic", "static"])
    @pytest.mark.parametrize("row", range(3))
    def test_keeps_a_start_or_the_whole(self, name: str, row: int) -> None:
        processor, conversation = PROCESSORS[name], self.ROWS[row]
        sizes = self.SIZES[: len(conversation.images)]
        images = [Image.new("RGB", (width, height)) for height, width in sizes]
        whole = processor.encode(conversation, images)
        start = int((whole.labels != IGNORE_INDEX).nonzero()[0])
        ends = (whole.input_ids == processor.image_end_token_id).nonzero()
        least = max(start + 1, int(ends[-1]) + 1 if len(ends) else 0)
        for tokens in range(1, len(whole) + 2):
            size = processor.measure(conversation, sizes, max_text=tokens)
            cut = processor.encode(conversation, images, max_text=tokens)
            expected = tokens if least <= tokens < len(whole) else len(whole)
            assert len(cut) == size.tokens == expected
            assert size.scaled == (expected < len(whole))
            assert torch.equal(cut.input_ids, whole.input_ids[:expected])
            assert torch.equal(cut.labels, whole.labels[:expected])
            assert cut.prompt_length == whole.prompt_length
