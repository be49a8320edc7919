"""A processor and a model that do not belong together are told before the first batch, in their own terms.

Where the two name the id of a placeholder differently the tokenizer has the word, which knows it by its text: released
configs carried ids of other vocabularies.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_vlm.models.config import NemotronVLConfig
from lightning_vlm.schema import DataError

_PLACEHOLDERS = ("image_token_id", "audio_token_id")


def pair(config: NemotronVLConfig, processor: Any) -> None:
    """Checks that what a processor makes is what a model takes, and gives the model the processor's placeholder ids.

    Args:
        config: Of the model; its placeholder ids are set.
        processor: A `NemotronVLProcessor`; of any other nothing is known.

    Raises:
        DataError: If they differ in what cannot be set.
    """
    if not hasattr(processor, "video_geometry"):
        return
    images, video = processor.geometry, processor.video_geometry
    audio: Any = config.audio_config if processor.sound is not None else None
    facts: list[tuple[str, Any, Any]] = [
        ("pixels of a patch's side", images.patch_size, config.vision_config.patch_size),
        ("patches of a token's side", images.merge_size, config.merge_size),
    ]
    if video is not None:
        facts.append(("frames of a tubelet", video.temporal_patch_size, config.frames_per_tubelet))
    if audio is not None:
        facts.append(("mel bins of a spectrogram", processor.num_mel_bins, audio.num_mel_bins))
    for what, made, taken in facts:
        if made != taken:
            raise DataError(
                "data.processor",
                f"it makes {made} {what}, but the model takes {taken}",
                "use the processor of the model's own folder, or correct data.processor_options",
            )
    if processor.sound is not None and config.audio_config is None:
        raise DataError(
            "data.processor", "it prepares sounds, but the model hears none", "set data.processor_options.sound to null"
        )
    rows, size = config.text_config.vocab_size, len(processor.tokenizer)
    if size > rows:
        raise DataError(
            "data.processor",
            f"its tokenizer has {size:,} tokens, but the model's vocabulary has {rows:,} rows",
            "use the tokenizer of the model's own folder",
        )
    for name in _PLACEHOLDERS:
        found, set_to = getattr(processor, name), getattr(config, name)
        if found is not None and set_to is not None and found != set_to:
            rank_zero_warn(f"{name} is {set_to} in the model's config, but {found} to the tokenizer, whose word counts")
            setattr(config, name, found)
