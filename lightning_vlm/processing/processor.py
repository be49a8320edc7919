"""NemotronVLProcessor: the tokenizer and the image processor of the family as one transformers processor.

Two doors. ``processor(text=..., images=...)`` is what any transformers user calls for inference;
``processor.encode`` turns a Conversation into a training Sample, and ``processor.measure`` tells its size without
making it. All expand images by the same function, so what is planned is what is trained is what is served.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ProcessorMixin

from lightning_vlm.geometry import Grid, ImageGeometry, ImageLayout, lay_out_images
from lightning_vlm.media.image import to_rgb
from lightning_vlm.processing.chat import Message, Span, render_prompt, render_text, render_turns, to_messages
from lightning_vlm.processing.image_processor import NemotronVLImageKwargs, NemotronVLImageProcessor
from lightning_vlm.processing.labels import cut_text, tokenize_spans, tokenize_text
from lightning_vlm.processing.sizes import SampleLimit, SampleSize
from lightning_vlm.schema import IGNORE_INDEX, Conversation, DataError, ImageRef, Sample, VideoRef


class NemotronVLProcessor(ProcessorMixin):
    """Processor of Nemotron-VL models.

    Args:
        image_processor: Resizes and cuts images.
        tokenizer: A fast tokenizer with a chat template and the tokens below.
        chat_template: Replaces the tokenizer's own template.
        image_token: Placeholder; one per projected feature after expansion. Always resolved by its text,
            because released revisions give it different ids.
        image_start_token: Opens each image's run of placeholders.
        image_end_token: Closes it.

    Raises:
        ValueError: If one of the three tokens is not a single token of the tokenizer.
    """

    def __init__(
        self,
        image_processor: NemotronVLImageProcessor,
        tokenizer: Any,
        chat_template: str | None = None,
        image_token: str = "<image>",
        image_start_token: str = "<img>",
        image_end_token: str = "</img>",
        **kwargs: Any,
    ) -> None:
        self.image_token = image_token
        self.image_start_token = image_start_token
        self.image_end_token = image_end_token
        self.image_token_id = token_id(tokenizer, image_token)
        self.image_start_token_id = token_id(tokenizer, image_start_token)
        self.image_end_token_id = token_id(tokenizer, image_end_token)
        self._known_roles: dict[str, set[tuple[str, ...]]] = {}  # by template and variables, see `render_text`
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Loads tokenizer and image processor from a folder or, if the hub may be reached, a repository.

        Args:
            pretrained_model_name_or_path: Folder or repository name.
            **kwargs: Token names, options of the image processor, or of the hub download.
        """
        image_options = _pop_image_options(kwargs)
        given = {name: kwargs.pop(name) for name in _TOKEN_NAMES if name in kwargs}
        image_processor = NemotronVLImageProcessor.from_pretrained(
            pretrained_model_name_or_path, **image_options, **kwargs
        )
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        saved, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        names = {name: saved[name] for name in _TOKEN_NAMES if name in saved}
        return cls(image_processor=image_processor, tokenizer=tokenizer, **{**names, **given})

    @property
    def geometry(self) -> ImageGeometry:
        """Sizes to grids to token counts."""
        return self.image_processor.geometry

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepares model inputs.

        Args:
            images: An image, or all images of the batch in reading order; or one list of them per text.
            text: One text or several, with one ``<image>`` per image.
            **kwargs: Tokenizer options (``padding``, ``return_tensors``...) and image options.

        Returns:
            ``input_ids`` and ``attention_mask``, and with images ``image_grid_hw`` ``(num_images, 2)`` and
            ``pixel_values`` ``(num_patches, 3 * patch_size**2)``.

        Raises:
            ValueError: If texts and images do not match, with both counts.
            NotImplementedError: If ``videos`` or ``audio`` is given.
        """
        for media in ("videos", "audio"):
            if kwargs.pop(media, None) is not None:
                raise NotImplementedError(f"{media} is not supported yet; the processor takes text and images")
        if text is None:
            raise ValueError("text is missing; expected a text with one <image> per image")
        texts = [text] if isinstance(text, str) else list(text)
        return_tensors = kwargs.pop("return_tensors", None)
        image_options = _pop_image_options(kwargs)
        flat = [] if images is None else [to_rgb(image) for image in make_flat_list_of_images(images)]
        for found, given in _image_counts(texts, images, len(flat), self.image_token):
            if found != given:
                raise ValueError(f"text has {found} {self.image_token} placeholder(s) for {given} image(s)")
        data: dict[str, Any] = {}
        grids: list[list[Grid]] = []
        if flat:
            data["pixel_values"], grids = self.image_processor.patchify(flat, **image_options)
            data["image_grid_hw"] = torch.tensor([grid for tiles in grids for grid in tiles])
        geometry = self.image_processor.geometry_with(**image_options)
        counts = iter([geometry.num_tokens(tiles) for tiles in grids])
        kwargs.setdefault("add_special_tokens", False)
        encoded = self.tokenizer([self._expand(item, counts) for item in texts], **kwargs)
        return BatchFeature(data={**encoded, **data}, tensor_type=return_tensors)

    def encode(
        self,
        conversation: Conversation,
        images: Sequence[Image.Image],
        *,
        answer: bool = False,
        template_kwargs: dict[str, Any] | None = None,
        limit: SampleLimit | None = None,
        max_text: int | None = None,
    ) -> Sample:
        """Makes a training or evaluation Sample.

        Args:
            conversation: The conversation.
            images: Its decoded images, in reading order.
            answer: The model is to answer: the conversation ends with a generation prompt and nothing is
                trained on.
            template_kwargs: Extra chat-template variables.
            limit: Make the images smaller where the sample would exceed it. A sample that exceeds it with the
                smallest images, or without any, is returned all the same.
            max_text: Cut the text's end off beyond so many tokens, images included; a sample whose image or whole
                answer stands there is returned whole.

        Returns:
            The sample. Its references are the conversation's, or else the answer that it was trained on.

        Raises:
            DataError: If the conversation cannot be rendered or holds more or fewer images than given.
        """
        source = conversation.source
        messages, template_kwargs = self._template_inputs(conversation, template_kwargs)
        if answer:
            spans = [Span(render_prompt(self.tokenizer, messages, source, template_kwargs), trained=False)]
        else:
            spans = render_turns(self.tokenizer, messages, source, template_kwargs)

        text, sizes = "".join(span.text for span in spans), [(image.height, image.width) for image in images]
        self._check_rendered(text, len(sizes), source)
        text_tokens = self._num_text_tokens(text, sizes, source) if limit else 0
        layout = self._lay_out(sizes, text_tokens, limit)
        patches: Tensor | None = None
        rows: Tensor | None = None
        if images:
            patches, _ = self.image_processor.patchify(list(images), layout)
            rows = torch.tensor([grid for tiles in layout.grids for grid in tiles])
        remaining = iter(layout.num_tokens)
        expanded = [Span(self._expand(span.text, remaining), span.trained) for span in spans]
        input_ids, labels = tokenize_spans(self.tokenizer, expanded)
        self._check_tokenized(int((input_ids == self.image_token_id).sum()), sum(layout.num_tokens), source)
        if max_text is not None:
            input_ids, labels = cut_text(input_ids, labels, max_text, self._image_token_ids)
        return Sample(
            input_ids=input_ids,
            labels=labels,
            pixel_values=patches,
            image_grid_hw=rows,
            prompt_length=last_answer_start(labels),
            prompt="".join(span.text for span in _before_last_answer(spans)),
            references=conversation.references or (() if answer else _last_answer(conversation)),
            source=source,
        )

    def measure(
        self,
        conversation: Conversation,
        sizes: Sequence[tuple[int, int]],
        *,
        answer: bool = False,
        template_kwargs: dict[str, Any] | None = None,
        limit: SampleLimit | None = None,
        max_text: int | None = None,
    ) -> SampleSize:
        """The size of the Sample that `encode` would make: exact, from image headers, with nothing decoded.

        Args:
            conversation: The conversation.
            sizes: Upright (height, width) in pixels of its images, in reading order.
            answer: As for `encode`.
            template_kwargs: As for `encode`.
            limit: As for `encode`; both then make the images smaller by the same rule.
            max_text: As for `encode`.

        Raises:
            DataError: As for `encode`, except where `render_text` names.
        """
        source = conversation.source
        messages, template_kwargs = self._template_inputs(conversation, template_kwargs)
        if answer:
            text = render_prompt(self.tokenizer, messages, source, template_kwargs)
        else:
            known = self._known_roles.setdefault(repr(template_kwargs), set())
            text = render_text(self.tokenizer, messages, source, template_kwargs, known)
        self._check_rendered(text, len(sizes), source)
        text_tokens = self._num_text_tokens(text, sizes, source)
        layout = self._lay_out(sizes, text_tokens, limit)
        tokens, repaired = text_tokens + sum(layout.num_tokens), bool(conversation.notes)
        if max_text is None or tokens <= max_text or answer:
            return SampleSize(tokens, layout.num_patches, len(sizes), layout.scaled, repaired)
        spans = render_turns(self.tokenizer, messages, source, template_kwargs)  # rare: where it is cut has to be known
        counts = iter(layout.num_tokens)
        expanded = [Span(self._expand(span.text, counts), span.trained) for span in spans]
        kept, _ = cut_text(*tokenize_spans(self.tokenizer, expanded), max_text, self._image_token_ids)
        return SampleSize(len(kept), layout.num_patches, len(sizes), len(kept) < tokens, repaired)

    @property
    def _image_token_ids(self) -> tuple[int, int, int]:
        return self.image_start_token_id, self.image_token_id, self.image_end_token_id

    def _template_inputs(
        self, conversation: Conversation, template_kwargs: dict[str, Any] | None
    ) -> tuple[list[Message], dict[str, Any] | None]:
        for medium in conversation.media:
            if not isinstance(medium, ImageRef):
                name = "a video" if isinstance(medium, VideoRef) else "a sound"
                raise DataError(
                    conversation.source,
                    f"the row holds {name}, expected text and images: NemotronVLProcessor takes no others yet",
                    "remove the row",
                    "unsupported media",
                )
        reserved = (self.image_start_token, self.image_end_token, self.tokenizer.eos_token)
        messages = to_messages(conversation, self.image_token, [token for token in reserved if token])
        if isinstance(self.chat_template, str):  # it may not be the tokenizer's; a dict of named ones is
            template_kwargs = {"chat_template": self.chat_template, **(template_kwargs or {})}
        return messages, template_kwargs

    def _lay_out(self, sizes: Sequence[tuple[int, int]], text_tokens: int, limit: SampleLimit | None) -> ImageLayout:
        geometry = self.geometry
        bound = None if limit is None else limit.image_patches(text_tokens, geometry.merge_size)
        return lay_out_images(sizes, geometry, bound)

    def _num_text_tokens(self, text: str, sizes: Sequence[tuple[int, int]], source: str) -> int:
        """Tokens of a rendered text, the start and end of each image included, its placeholders not.

        A placeholder that the tokenizer cuts out before anything else sees the text leaves the same text on both
        sides of a run of any length: a run of one is tokenised in place of thousands.
        """
        counts = [1] * len(sizes) if self._cuts_out_placeholders else lay_out_images(sizes, self.geometry).num_tokens
        input_ids = tokenize_text(self.tokenizer, self._expand(text, iter(counts)))
        self._check_tokenized(input_ids.count(self.image_token_id), sum(counts), source)
        return len(input_ids) - sum(counts)

    @cached_property  # a released tokenizer has a thousand added tokens
    def _cuts_out_placeholders(self) -> bool:
        added = self.tokenizer.added_tokens_decoder
        token = added.get(self.image_token_id)
        longer = any(self.image_token in other.content and other != token for other in added.values())
        return token is not None and not token.normalized and not longer

    def _check_rendered(self, text: str, num_images: int, source: str) -> None:
        if (found := text.count(self.image_token)) != num_images:
            raise DataError(
                source,
                f"the chat template rendered {found} image placeholder(s) for {num_images} image(s)",
                "use a chat_template that prints every turn's content",
            )

    def _check_tokenized(self, found: int, expected: int, source: str) -> None:
        if found != expected:
            raise DataError(
                source,
                f"{found} image placeholders were tokenised, expected {expected}",
                "use the tokenizer that belongs to the model",
            )

    def _expand(self, text: str, counts: Iterator[int]) -> str:
        """Replaces each placeholder by its image's run: start, one per token of all its tiles, end."""
        first, *rest = text.split(self.image_token)
        runs = (self.image_start_token + self.image_token * next(counts) + self.image_end_token for _ in rest)
        return first + "".join(run + piece for run, piece in zip(runs, rest))

    @property
    def pad_token_id(self) -> int:
        """What fills batches: the padding token, or the end token where a tokenizer has none (it is masked anyway)."""
        tokenizer = self.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @property
    def model_input_names(self) -> list[str]:
        """What `NemotronVL.forward` takes from a call."""
        return ["input_ids", "attention_mask", "pixel_values", "image_grid_hw"]


_TOKEN_NAMES = ("image_token", "image_start_token", "image_end_token")


def _pop_image_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    names = {*NemotronVLImageKwargs.__annotations__, "do_normalize", "image_mean", "image_std"}
    return {name: kwargs.pop(name) for name in list(kwargs) if name in names}


def _image_counts(texts: list[str], images: Any, given: int, image_token: str) -> list[tuple[int, int]]:
    """(placeholders, images) that must agree: per text if images come as one list per text, else in all."""
    found = [text.count(image_token) for text in texts]
    per_text = isinstance(images, (list, tuple)) and all(isinstance(own, (list, tuple)) for own in images)
    if per_text and len(images) == len(texts):
        return list(zip(found, (len(own) for own in images)))
    return [(sum(found), given)]


def token_id(tokenizer: Any, token: str) -> int:
    """Id of a token by its text.

    Args:
        tokenizer: A transformers tokenizer.
        token: The token's text.

    Raises:
        ValueError: If the tokenizer does not hold it as one token.
    """
    index = tokenizer.convert_tokens_to_ids(token)
    if index is None or index == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no token {token!r}; add it as a special token or name the one it uses")
    return index


def last_answer_start(labels: Tensor) -> int:
    """Index of the first token of the last trained run of ``labels`` ``(L,)``; ``L`` if there is none."""
    trained = labels != IGNORE_INDEX
    starts = trained & ~torch.nn.functional.pad(trained[:-1], (1, 0))
    found = starts.nonzero().flatten()
    return int(found[-1]) if len(found) else len(labels)


def _last_answer(conversation: Conversation) -> tuple[str, ...]:
    return tuple(turn.text for turn in conversation.turns if turn.role == "assistant")[-1:]


def _before_last_answer(spans: list[Span]) -> list[Span]:
    trained = [index for index, span in enumerate(spans) if span.trained]
    return spans[: trained[-1]] if trained else spans
