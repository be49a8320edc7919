"""Processors of every family, small and offline: transformers' classes where they exist, stand-ins where they do not.

The tokenizers are byte-level with the family's special tokens; image processors are transformers' Pillow backends.
Video processors need torchvision, so a stand-in takes their place where videos are tested, and none elsewhere: that is
all that `real` changes of transformers' classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.video_utils import make_batched_metadata, make_batched_videos

from lightning_vlm.processing.image_processor import NemotronVLImageProcessor

Dict = dict[str, Any]

MEDIA = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
    "audio": "<|audio_start|><|audio_pad|><|audio_end|>",
}
QWEN_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
    "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>",
)  # fmt: skip


def chat_template(
    opening: str = "<|im_start|>", ending: str = "<|im_end|>\\n", role: str = "m.role", **media: str
) -> str:
    """A template that takes strings and parts, each medium being its placeholder."""
    kinds = "".join(
        f"{{% {'elif' if number else 'if'} c.type == '{kind}' %}}{text}"
        for number, (kind, text) in enumerate({**MEDIA, **media}.items())
    )
    return (
        "{% for m in messages %}{{ '" + opening + "' + " + role + " + '\\n' }}"
        "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}" + kinds + "{% else %}"
        "{{ c.text }}{% endif %}{% endfor %}{% endif %}{{ '" + ending + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + opening + "assistant\\n' }}{% endif %}"
    )


def tokenizer_with(tokens: tuple[str, ...], template: str | None, **names: str) -> PreTrainedTokenizerFast:
    """Byte-level, one token per byte; special tokens by name."""
    special = ["<|endoftext|>", *tokens]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    more = {"extra_special_tokens": names} if names else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|endoftext|>", chat_template=template, padding_side="right", **more
    )


def real(cls: type) -> type:
    """A transformers processor that may lack a part which needs torchvision here."""

    class WithoutTorchvision(cls):  # type: ignore[misc,valid-type]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            if argument is None or name == "video_processor":
                return None
            return super().check_argument_for_proper_class(name, argument)

    return WithoutTorchvision


class StandInVideoProcessor:
    """What a Qwen video processor returns, by shape: grids of patches, rows that tell their video."""

    merge_size, temporal_patch_size, patch_size, fps = 2, 2, 14, 2.0
    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __init__(self) -> None:
        self.calls: list[Dict] = []

    def __call__(self, videos: Any, **options: Any) -> Dict:
        self.calls.append({"videos": videos, **options})
        grids, rows = [], []
        videos = make_batched_videos(videos)
        for frames in videos:
            first = frames[0]
            height, width = np.asarray(first).shape[:2]
            grid = (-(-len(frames) // 2), 2 * (height // 28), 2 * (width // 28))
            grids.append(grid)
            rows.append(torch.full((int(np.prod(grid)), 1176), float(len(frames))))
        metadata = make_batched_metadata(videos, video_metadata=options.get("video_metadata"))
        for item in metadata:
            item.fps = item.fps or 24
        return {
            "pixel_values_videos": torch.cat(rows),
            "video_grid_thw": torch.tensor(grids),
            "video_metadata": metadata,
        }


@pytest.fixture(scope="session")
def qwen2_5() -> Any:
    image_processor = transformers.Qwen2VLImageProcessorPil(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 16)
    tokenizer = tokenizer_with(QWEN_TOKENS, chat_template())
    return real(transformers.Qwen2_5_VLProcessor)(image_processor, tokenizer, None, chat_template=chat_template())


@pytest.fixture
def qwen2_5_with_videos() -> Any:
    image_processor = transformers.Qwen2VLImageProcessorPil(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 16)
    tokenizer = tokenizer_with(QWEN_TOKENS, chat_template())
    cls = real(transformers.Qwen2_5_VLProcessor)
    return cls(image_processor, tokenizer, StandInVideoProcessor(), chat_template=chat_template())


@pytest.fixture(scope="session")
def qwen3_vl() -> Any:
    sizes = {"min_pixels": 32 * 32 * 4, "max_pixels": 32 * 32 * 16}
    image_processor = transformers.Qwen2VLImageProcessorPil(patch_size=16, **sizes)
    tokenizer = tokenizer_with(QWEN_TOKENS, chat_template())
    return real(transformers.Qwen3VLProcessor)(image_processor, tokenizer, None, chat_template=chat_template())


def _omni(video_processor: Any) -> Any:
    tokenizer = tokenizer_with(
        QWEN_TOKENS,
        chat_template(),
        image_token="<|image_pad|>", audio_token="<|audio_pad|>", video_token="<|video_pad|>",
        vision_bos_token="<|vision_start|>", vision_eos_token="<|vision_end|>",
        audio_bos_token="<|audio_start|>", audio_eos_token="<|audio_end|>",
    )  # fmt: skip
    image_processor = transformers.Qwen2VLImageProcessorPil(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 16)
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)
    cls = real(transformers.Qwen3OmniMoeProcessor)
    return cls(image_processor, video_processor, extractor, tokenizer, chat_template=chat_template())


@pytest.fixture(scope="session")
def qwen3_omni() -> Any:
    return _omni(None)


@pytest.fixture
def qwen3_omni_with_videos() -> Any:
    return _omni(StandInVideoProcessor())


@pytest.fixture(scope="session")
def llava_onevision() -> Any:
    template = chat_template(image="<image>", video="<video>")
    image_processor = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 16], [16, 32], [32, 16], [32, 32]]
    )
    return real(transformers.LlavaOnevisionProcessor)(
        image_processor,
        tokenizer_with((*QWEN_TOKENS, "<image>", "<video>"), template),
        None,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=template,
    )


@pytest.fixture(scope="session")
def gemma3() -> Any:
    template = chat_template("<start_of_turn>", "<end_of_turn>\\n", image="<start_of_image>")
    tokenizer = tokenizer_with(
        ("<start_of_turn>", "<end_of_turn>", "<image_soft_token>", "<start_of_image>", "<end_of_image>"),
        template,
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>",
    )  # fmt: skip
    image_processor = transformers.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    return transformers.Gemma3Processor(image_processor, tokenizer, chat_template=template, image_seq_length=4)


@pytest.fixture(scope="session")
def gemma4() -> Any:
    role = "('model' if m.role == 'assistant' else m.role)"
    template = chat_template("<|turn>", "<turn|>\\n", role, image="<|image|>").replace("assistant\\n", "model\\n")
    tokenizer = tokenizer_with(
        ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|image|>", "<|image>", "<image|>", "<|audio|>", "<|audio>",
         "<audio|>", "<|video|>"),
        template,
        image_token="<|image|>", boi_token="<|image>", eoi_token="<image|>", audio_token="<|audio|>",
        boa_token="<|audio>", eoa_token="<audio|>", video_token="<|video|>",
    )  # fmt: skip
    return real(transformers.Gemma4Processor)(
        transformers.Gemma4AudioFeatureExtractor(),
        transformers.Gemma4ImageProcessorPil(max_soft_tokens=70),
        tokenizer,
        None,
        chat_template=template,
    )


PHI4_TEMPLATE = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
PHI4_TOKENS = ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext10|>", "<|endoftext11|>")


@pytest.fixture(scope="session")
def phi4() -> Any:
    """transformers' own, without its image processor, which needs torchvision."""
    tokenizer = tokenizer_with(PHI4_TOKENS, PHI4_TEMPLATE, image_token="<|endoftext10|>", audio_token="<|endoftext11|>")
    extractor = transformers.Phi4MultimodalFeatureExtractor()
    return real(transformers.Phi4MultimodalProcessor)(None, extractor, tokenizer)


@pytest.fixture(scope="session")
def nemotron_omni() -> Any:
    """transformers' own, with our image processor: theirs needs torchvision, and both return packed patches."""
    tokens = ("<|im_start|>", "<|im_end|>", "<image>", "<img>", "</img>", "<so_embedding>", "<so_start>", "<so_end>")
    image_processor = NemotronVLImageProcessor(patch_size=8, min_num_patches=4, max_num_patches=64, max_model_len=2048)
    cls = real(transformers.NemotronH_Omni_Reasoning_V3Processor)
    tokenizer = tokenizer_with((*tokens, "<video>"), chat_template())
    return cls(image_processor, None, tokenizer, transformers.ParakeetFeatureExtractor())


class StandIn:
    """Base of the stand-ins: a tokenizer, a template, images as one placeholder each."""

    image_token = "<|media_pad|>"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.chat_template, self.calls = tokenizer, tokenizer.chat_template, []

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(conversation, **options)

    def rows(self, text: list[str]) -> Dict:
        return dict(self.tokenizer(text, return_tensors="pt", add_special_tokens=False))


class KimiVLProcessor(StandIn):
    """Kimi-VL's remote code by what it takes and returns: 14-pixel patches, merged 2 x 2, in ``image_grid_hws``."""

    def __call__(self, text: list[str], images: Any = None, **options: Any) -> BatchFeature:
        self.calls.append(options)
        grids, pixels = [], []
        for image in images or []:
            height, width = 2 * (image.height // 28), 2 * (image.width // 28)
            grids.append((height, width))
            pixels.append(torch.full((height * width, 3, 14, 14), float(image.getpixel((0, 0))[0])))
            text = [text[0].replace("<|media_pad|>", "\x00" * (height * width // 4), 1)]
        data = {"image_grid_hws": torch.tensor(grids), "pixel_values": torch.cat(pixels)} if grids else {}
        return BatchFeature({**self.rows([text[0].replace("\x00", "<|media_pad|>")]), **data})


class KimiK25Processor(StandIn):
    """Kimi-K2.5's remote code by what it takes and returns: ``medias``, one placeholder left in the ids."""

    media_placeholder_token_id: int

    def __call__(self, text: str, medias: Any = None, **options: Any) -> Dict:
        data = self.rows([text])
        if medias:
            grids = [(1, 2 * (item["image"].height // 28), 2 * (item["image"].width // 28)) for item in medias]
            data["grid_thws"] = torch.tensor(grids)
            data["pixel_values"] = torch.ones(sum(h * w for _, h, w in grids), 3, 14, 14)
        return data


class NemotronParseProcessor(StandIn):
    """Nemotron-Parse's remote code by what it takes and returns: no template, one image of a fixed size per text."""

    def __call__(self, images: list[Any], text: list[str], **options: Any) -> Dict:
        return {**self.rows(text), "pixel_values": torch.zeros(len(images), 3, 64, 48)}


class Phi4MMProcessor(StandIn):
    """Phi-4-MM's remote code by what it takes and returns: ``audios`` with rates, numbered marks, empty images."""

    def __call__(self, text: list[str], images: Any = None, audios: Any = None, **options: Any) -> Dict:
        sizes = [len(wave) // 1280 for wave, rate in audios or [] if rate == 16_000]
        for number, size in enumerate(sizes, start=1):
            text = [text[0].replace(f"<|audio_{number}|>", "<|endoftext11|>" * size)]
        longest = max(sizes, default=0)
        more = {
            "input_audio_embeds": torch.ones(len(sizes), longest * 8, 80),
            "audio_embed_sizes": torch.tensor(sizes),
            "input_mode": torch.tensor([2 if sizes else 0]),
            "input_image_embeds": torch.tensor([]),
            "image_sizes": torch.tensor([]),
            "image_attention_mask": torch.tensor([]),
        }
        return {**self.rows(text), **more}


class NemotronH_Nano_Omni_Reasoning_V3Processor(StandIn):
    """The remote Omni code by what it takes and returns: an image tensor per image, placeholders expanded by area."""

    image_token, video_token, audio_token = "<image>", "<video>", "<so_embedding>"
    audio_sampling_rate = 16_000

    def __call__(
        self, text: list[str], images: Any = None, videos: Any = None, audio: Any = None, **options: Any
    ) -> Dict:
        self.calls.append(options)
        data: Dict = {}
        for kind, key, media in (("<image>", "pixel_values", images), ("<video>", "pixel_values_videos", videos)):
            tensors = []
            for item in media or []:
                frame = item[0] if isinstance(item, list) else item
                tensors += [torch.zeros(3, frame.height, frame.width)] * (len(item) if isinstance(item, list) else 1)
                text = [text[0].replace(kind, "\x00" * (frame.height * frame.width // 256), 1)]
            if tensors:
                same = len({tensor.shape for tensor in tensors}) == 1
                data[key] = torch.stack(tensors) if same else tensors
        text = [text[0].replace("\x00", "<image>")]
        for wave in audio or []:
            text = [text[0].replace("<so_embedding>", "\x01" * (len(wave) // 1280), 1)]
        return {**self.rows([text[0].replace("\x01", "<so_embedding>")]), **data}


@pytest.fixture
def kimi_vl() -> Any:
    tokens = ("<|im_start|>", "<|im_end|>", "<|media_pad|>")
    return KimiVLProcessor(tokenizer_with(tokens, chat_template(image="<|media_pad|>")))


@pytest.fixture
def kimi_k25() -> Any:
    tokens = ("<|im_start|>", "<|im_end|>", "<|media_pad|>")
    processor = KimiK25Processor(tokenizer_with(tokens, chat_template(image="<|media_pad|>")))
    processor.media_placeholder_token_id = processor.tokenizer.convert_tokens_to_ids("<|media_pad|>")
    return processor


@pytest.fixture
def nemotron_parse() -> Any:
    tokens = ("</s>", "<s>", "<predict_bbox>", "<predict_classes>", "<output_markdown>")
    tokenizer = tokenizer_with(tokens, None)
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return NemotronParseProcessor(tokenizer)


@pytest.fixture
def phi4_remote() -> Any:
    return Phi4MMProcessor(tokenizer_with(PHI4_TOKENS, PHI4_TEMPLATE))


@pytest.fixture
def nemotron_omni_remote() -> Any:
    tokens = ("<|im_start|>", "<|im_end|>", "<image>", "<video>", "<so_embedding>")
    return NemotronH_Nano_Omni_Reasoning_V3Processor(tokenizer_with(tokens, chat_template()))


@pytest.fixture
def example() -> Callable[..., Dict]:
    """One question and its answer, with media before the question."""

    def make(question: str = "what is it?", answer: str = "a cat", *media: Any, **more: Any) -> Dict:
        parts = [part if isinstance(part, dict) else {"type": "image", "image": part} for part in media]
        return {
            "conversation": [
                {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
            **more,
        }

    return make


def picture(width: int = 56, height: int = 56, color: str = "red", mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), color)


@pytest.fixture
def labelled() -> Callable[..., list[str]]:
    """The text that each row of a shifted batch is trained on."""

    def read(batch: Dict, processor: Any) -> list[str]:
        tokenizer = getattr(processor, "tokenizer", processor)
        return [tokenizer.decode(row[row != -100]) for row in batch["labels"]]

    return read
