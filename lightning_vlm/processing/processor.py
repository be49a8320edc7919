"""NemotronVLProcessor: the tokenizer and the media processing of the family as one transformers processor.

Two doors. ``processor(text=..., images=..., videos=..., audio=...)`` is what any transformers user calls for inference;
``processor.encode`` turns a Conversation into a training Sample, and ``processor.measure`` tells its size without
making it. All expand media by the same functions, so what is planned is what is trained is what is served.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Self

from transformers import AutoTokenizer, PretrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from lightning_vlm.geometry.images import ImageGeometry
from lightning_vlm.geometry.sounds import SoundGeometry
from lightning_vlm.geometry.videos import VideoGeometry, uniform_frames
from lightning_vlm.processing.calls import call_processor, pop_image_options
from lightning_vlm.processing.chat import Message, Span, render_prompt, render_text, render_turns
from lightning_vlm.processing.image_processor import NemotronVLImageProcessor
from lightning_vlm.processing.labels import before_last_answer, cut_text, last_answer_start
from lightning_vlm.processing.media_layout import MediaSizes, Medium, MediumSize, checked_settings, media_sizes
from lightning_vlm.processing.media_tensors import by_kind, image_tensors, sound_tensors, video_tensors
from lightning_vlm.processing.messages import last_answer, to_messages
from lightning_vlm.processing.pieces import MediaTokens, tokenize_pieces
from lightning_vlm.processing.released import read_config, released_options
from lightning_vlm.processing.sample_layout import SampleLayouter, bounded_layout, check_placeholders
from lightning_vlm.processing.sizes import SampleLimit, SampleSize
from lightning_vlm.schema import IMAGE, MEDIA_FIELDS, Conversation, DataError, ImageRef, Sample, VideoRef


class NemotronVLProcessor(ProcessorMixin):
    """Processor of Nemotron-VL models.

    Args:
        image_processor: Resizes and cuts images, and the frames of videos as it does those.
        tokenizer: A fast tokenizer with a chat template and the tokens below, those of sounds only with ``sound``.
        chat_template: Replaces the tokenizer's own template.
        image_token: Placeholder; one per projected feature after expansion. Always resolved by its text,
            because released revisions give it different ids.
        image_start_token: Opens each image's run of placeholders.
        image_end_token: Closes it.
        audio_token: Placeholder of sounds.
        audio_start_token: Opens each sound's run of placeholders.
        audio_end_token: Closes it.
        video: Options of `VideoGeometry` but ``patch_size`` and ``merge_size``, which are the images'; without them
            videos are refused.
        sound: Options of `SoundGeometry` and ``num_mel_bins`` (128 by default); without them sounds are refused.

    Raises:
        ValueError: If one of the tokens is not a single token of the tokenizer, or a setting is unknown or wrong.
    """

    def __init__(
        self,
        image_processor: NemotronVLImageProcessor,
        tokenizer: Any,
        chat_template: str | None = None,
        image_token: str = "<image>",
        image_start_token: str = "<img>",
        image_end_token: str = "</img>",
        audio_token: str = "<so_embedding>",
        audio_start_token: str = "<so_start>",
        audio_end_token: str = "<so_end>",
        video: dict[str, Any] | None = None,
        sound: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.image_token, self.image_start_token, self.image_end_token = image_token, image_start_token, image_end_token
        self.audio_token, self.audio_start_token, self.audio_end_token = audio_token, audio_start_token, audio_end_token
        self.image_token_id = token_id(tokenizer, image_token)
        self.image_start_token_id = token_id(tokenizer, image_start_token)
        self.image_end_token_id = token_id(tokenizer, image_end_token)
        self.audio_token_id = None if sound is None else token_id(tokenizer, audio_token)
        if sound is not None:
            for token in (audio_start_token, audio_end_token):
                token_id(tokenizer, token)
        self.video, self.sound = checked_settings("video", video), checked_settings("sound", sound)
        self._known_roles: dict[str, set[tuple[str, ...]]] = {}  # by template and variables, see `render_text`
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)
        _ = self.video_geometry, self.sound_geometry  # wrong options are told now

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Loads tokenizer and image processor from a folder or, if the hub may be reached, a repository.

        A folder as released says in its ``config.json`` how media are processed, see `released_options`.

        Args:
            pretrained_model_name_or_path: Folder or repository name.
            **kwargs: Options of this class, of the image processor, or of the hub download.
        """
        image_options = pop_image_options(kwargs)
        given = {name: kwargs.pop(name) for name in OWN_OPTIONS if name in kwargs}
        saved, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        own = {name: saved[name] for name in OWN_OPTIONS if name in saved}
        if saved.get("processor_class") != cls.__name__:
            released, video, sound = released_options(read_config(pretrained_model_name_or_path, **kwargs))
            image_options, own = {**released, **image_options}, {"video": video, "sound": sound, **own}
        image_processor = NemotronVLImageProcessor.from_pretrained(
            pretrained_model_name_or_path, **image_options, **kwargs
        )
        # With a config of its own it does not look at the model's, whose type it may not know yet: it would say so.
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, config=PretrainedConfig(), **kwargs)
        for name in ("video", "sound"):  # settings that are not given stay what they were
            if isinstance(given.get(name), dict):
                given[name] = {**(own.get(name) or {}), **given[name]}
        return cls(image_processor=image_processor, tokenizer=tokenizer, **{**own, **given})

    @property
    def geometry(self) -> ImageGeometry:
        """Sizes of images to grids to token counts."""
        return self.image_processor.geometry

    @property
    def video_geometry(self) -> VideoGeometry | None:
        """Sizes of videos to frames to token counts; ``None`` where videos are refused."""
        images = self.geometry
        sizes = {"patch_size": images.patch_size, "merge_size": images.merge_size}
        return None if self.video is None else VideoGeometry(**{**self.video, **sizes})

    @property
    def sound_geometry(self) -> SoundGeometry | None:
        """Lengths of sounds to clips to token counts; ``None`` where sounds are refused."""
        if self.sound is None:
            return None
        return SoundGeometry(**{name: value for name, value in self.sound.items() if name != "num_mel_bins"})

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepares model inputs; the media of a batch are given flat, in reading order, or as one list per text.

        Args:
            images: Images.
            text: One text or several, with one ``<image>``, ``<video>`` or ``<so_embedding>`` per medium.
            videos: Videos: each a `lightning_vlm.media.video.Video`, or frames as a list of images or an array
                ``(T, H, W, 3)``.
            audio: Sounds: each ``(num_samples,)`` samples at the processor's rate, or a pair (samples, rate in Hz).
            **kwargs: ``video_fps`` and ``sampling_rate``, the rates of frames and samples that are given as such;
                tokenizer options (``padding``, ``return_tensors``...) and image options.

        Returns:
            ``input_ids`` and ``attention_mask``, and what `encode` makes of each kind of media that is there.

        Raises:
            ValueError: If texts and media do not match, with both counts; if an option is unknown.
        """
        return call_processor(self, text, images, videos, audio, kwargs)

    def encode(
        self,
        conversation: Conversation,
        media: Sequence[Medium],
        *,
        answer: bool = False,
        template_kwargs: dict[str, Any] | None = None,
        limit: SampleLimit | None = None,
        max_text: int | None = None,
    ) -> Sample:
        """Makes a training or evaluation Sample.

        Args:
            conversation: The conversation.
            media: Its decoded media, in reading order: RGB images, `Video` with the frames that `choose_frames` names,
                and ``(num_samples,)`` samples of sounds at the rate of `sound_geometry`.
            answer: The model is to answer: the conversation ends with a generation prompt and nothing is
                trained on.
            template_kwargs: Extra chat-template variables.
            limit: Make the images smaller where the sample would exceed it. A sample that exceeds it with the
                smallest images, or without any, is returned all the same.
            max_text: Cut the text's end off beyond so many tokens, media included; a sample whose medium or whole
                answer stands there is returned whole.

        Returns:
            The sample. Its references are the conversation's, or else the answer that it was trained on.

        Raises:
            DataError: If the conversation cannot be rendered, or holds other media than given or than the processor has
                settings for.
        """
        source = conversation.source
        messages, template_kwargs = self._template_inputs(conversation, template_kwargs)
        if answer:
            spans = [Span(render_prompt(self.tokenizer, messages, source, template_kwargs), trained=False)]
        else:
            spans = render_turns(self.tokenizer, messages, source, template_kwargs)

        sizes = media_sizes(media, self.video_geometry, self.sound_geometry)
        self._check_rendered("".join(span.text for span in spans), sizes, conversation)
        layout, pieces = self.layouter.lay_out(spans, sizes, self.geometry, source, limit)
        input_ids, labels, types = tokenize_pieces(self.tokenizer, pieces, self.image_token_id, self.audio_token_id)
        check_placeholders(int((types == IMAGE).sum()), sum(layout.num_tokens), source)
        if max_text is not None:
            input_ids, labels = cut_text(input_ids, labels, max_text, self._media_token_ids)
        images, videos, sounds = by_kind(media)
        return Sample(
            input_ids=input_ids,
            labels=labels,
            mm_token_type_ids=types[: len(input_ids)] if videos or sounds else None,
            prompt_length=last_answer_start(labels, types[: len(labels)]),
            prompt="".join(span.text for span in before_last_answer(spans)),
            references=conversation.references or (() if answer else last_answer(conversation)),
            source=source,
            **image_tensors(images, layout, self.image_processor),
            **video_tensors(videos, sizes.videos, self.video_geometry, self.image_processor),
            **sound_tensors(sounds, sizes.sounds, self.sound_geometry, self.num_mel_bins),
        )

    def measure(
        self,
        conversation: Conversation,
        sizes: Sequence[MediumSize],
        *,
        answer: bool = False,
        template_kwargs: dict[str, Any] | None = None,
        limit: SampleLimit | None = None,
        max_text: int | None = None,
    ) -> SampleSize:
        """The size of the Sample that `encode` would make: exact, from headers of media, with nothing decoded.

        Args:
            conversation: The conversation.
            sizes: Of its media, in reading order: upright (height, width) in pixels of images, what headers say of
                videos and sounds.
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
        asked = [video.sampling_fps for video in conversation.videos]
        by_kind = media_sizes(sizes, self.video_geometry, self.sound_geometry, asked)
        self._check_rendered(text, by_kind, conversation)
        other_tokens = self.layouter.num_other_tokens([Span(text, trained=False)], by_kind, self.geometry, source)
        layout = bounded_layout(by_kind, self.geometry, other_tokens, limit)
        tokens, repaired = other_tokens + sum(layout.num_tokens), bool(conversation.notes)
        patches = layout.num_patches + by_kind.video_patches
        num_media = len(by_kind.images), len(by_kind.videos), len(by_kind.sounds)
        if max_text is None or tokens <= max_text or answer:
            return SampleSize(tokens, patches, *num_media, layout.scaled, repaired)
        spans = render_turns(self.tokenizer, messages, source, template_kwargs)  # rare: where it is cut has to be known
        pieces = self.layouter.expander.expand(spans, layout.num_tokens, by_kind.videos, by_kind.sounds)
        whole, labels, _ = tokenize_pieces(self.tokenizer, pieces, self.image_token_id, self.audio_token_id)
        kept, _ = cut_text(whole, labels, max_text, self._media_token_ids)
        return SampleSize(len(kept), patches, *num_media, len(kept) < tokens, repaired)

    def check_media(self, conversation: Conversation) -> None:
        """Refuses media that the processor has no settings for.

        Args:
            conversation: The conversation.

        Raises:
            DataError: If it holds any.
        """
        for medium in conversation.media:
            kind, settings = ("video", self.video) if isinstance(medium, VideoRef) else ("sound", self.sound)
            if not isinstance(medium, ImageRef) and settings is None:
                raise DataError(
                    conversation.source,
                    f"the row holds a {kind}, expected text and images: the processor has no {kind} settings",
                    f"set data.processor_options.{kind} (NemotronVLProcessor {kind}={{...}}), or remove the row",
                    "unsupported media",
                )

    def choose_frames(self, total: int, source_fps: float | None, fps: float | None = None) -> list[int]:
        """The frames of a video that are shown to the model, see `uniform_frames`.

        Args:
            total: Frames of the video.
            source_fps: Its frames per second, where they are known.
            fps: Frames per second to take, in place of the settings'.

        Raises:
            ValueError: If the processor has no settings for videos.
        """
        if (geometry := self.video_geometry) is None:
            raise ValueError("the processor has no video settings; give NemotronVLProcessor video={...}")
        return uniform_frames(total, source_fps, geometry.at(fps))

    @property
    def num_mel_bins(self) -> int:
        """Height of the spectrogram of a sound."""
        return (self.sound or {}).get("num_mel_bins", 128)

    @cached_property
    def media_tokens(self) -> MediaTokens:
        """The tokens around and in place of media."""
        return MediaTokens(
            image=self.image_token,
            image_start=self.image_start_token,
            image_end=self.image_end_token,
            sound=self.audio_token,
            sound_start=self.audio_start_token,
            sound_end=self.audio_end_token,
        )

    @cached_property
    def layouter(self) -> SampleLayouter:
        """Writes media out in rendered texts."""
        return SampleLayouter(self.tokenizer, self.media_tokens, self.image_token_id)

    @property
    def _media_token_ids(self) -> list[int]:
        tokens = self.media_tokens
        own = [tokens.image_start, tokens.image, tokens.image_end]
        if self.sound is not None:
            own += [tokens.sound_start, tokens.sound, tokens.sound_end]
        return [token_id(self.tokenizer, token) for token in own]

    def _template_inputs(
        self, conversation: Conversation, template_kwargs: dict[str, Any] | None
    ) -> tuple[list[Message], dict[str, Any] | None]:
        self.check_media(conversation)
        reserved = [self.image_start_token, self.image_end_token, self.tokenizer.eos_token]
        if self.sound is not None:
            reserved += [self.audio_start_token, self.audio_end_token]
        messages = to_messages(conversation, self.media_tokens, [token for token in reserved if token])
        if isinstance(self.chat_template, str):  # it may not be the tokenizer's; a dict of named ones is
            template_kwargs = {"chat_template": self.chat_template, **(template_kwargs or {})}
        return messages, template_kwargs

    def _check_rendered(self, text: str, sizes: MediaSizes, conversation: Conversation) -> None:
        tokens = self.media_tokens
        given = {"image": (tokens.image, len(sizes.images))}
        if sizes.videos or conversation.videos:  # else it is a word
            given["video"] = (tokens.video, len(sizes.videos))
        if self.sound is not None:
            given["sound"] = (tokens.sound, len(sizes.sounds))
        for kind, (token, count) in given.items():
            if (found := text.count(token)) != count:
                raise DataError(
                    conversation.source,
                    f"the chat template rendered {found} {kind} placeholder(s) for {count} {kind}(s)",
                    "use a chat_template that prints every turn's content",
                )

    @property
    def pad_token_id(self) -> int:
        """What fills batches: the padding token, or the end token where a tokenizer has none (it is masked anyway)."""
        tokenizer = self.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @property
    def model_input_names(self) -> list[str]:
        """What `NemotronVL.forward` takes from a call."""
        images, videos, sounds = MEDIA_FIELDS[:2], MEDIA_FIELDS[2:5], MEDIA_FIELDS[5:]
        told_apart = () if self.video is None and self.sound is None else ("mm_token_type_ids",)
        media = images + (() if self.video is None else videos) + (() if self.sound is None else sounds)
        return ["input_ids", "attention_mask", *told_apart, *media]


OWN_OPTIONS = (
    "image_token",
    "image_start_token",
    "image_end_token",
    "audio_token",
    "audio_start_token",
    "audio_end_token",
    "video",
    "sound",
)


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
