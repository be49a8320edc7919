"""NemotronVL: transformers' RADIO, Parakeet and NemotronH, joined as Nemotron-VL joins them.

    images, videos -> RADIO -> pixel shuffle -> projector (-> EVS) --+
    sounds ---------> Parakeet ---------------> projector -----------+
                                                                     v
    input_ids ------> embedding ----------------------------------> fusion -> hybrid LM -> logits or loss

The networks are transformers' own; here is only what joins them. The attribute names are those of
transformers' `NemotronH_Omni_Reasoning_V3`, so its state dict loads as it is, and the checkpoint key names
are the released ones.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    GenerationMixin,
    NemotronHForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import CausalLMOutputWithPast

from lightning_vlm.models.architecture import print_architecture
from lightning_vlm.models.audio import encode_sounds, make_audio_projector, make_audio_tower
from lightning_vlm.models.config import NemotronVLConfig
from lightning_vlm.models.evs import prune_videos
from lightning_vlm.models.fusion import FusionError
from lightning_vlm.models.language import make_language_model, packed_inputs
from lightning_vlm.models.media import MediaInputs, embed_with_media
from lightning_vlm.models.projector import MultiModalProjector, shuffle_images
from lightning_vlm.models.row_media import repeat_media
from lightning_vlm.models.vision import make_vision_model
from lightning_vlm.ops.cross_entropy import linear_cross_entropy, naive_cross_entropy, shift_labels
from lightning_vlm.segments import documents_from_cu_seqlens

register_checkpoint_conversion_mapping(
    "NemotronVL",
    [
        WeightRenaming(r"^mlp1\.0\.", r"multi_modal_projector\.layer_norm\."),
        WeightRenaming(r"^mlp1\.1\.", r"multi_modal_projector\.linear_1\."),
        WeightRenaming(r"^mlp1\.3\.", r"multi_modal_projector\.linear_2\."),
        WeightRenaming(r"^sound_encoder\.encoder\.", r"audio_tower\."),
        WeightRenaming(r"^sound_projection\.norm\.", r"embed_audio\.layer_norm\."),
        WeightRenaming(r"^sound_projection\.linear1\.", r"embed_audio\.linear_1\."),
        WeightRenaming(r"^sound_projection\.linear2\.", r"embed_audio\.linear_2\."),
    ],
    overwrite=True,
)


class NemotronVL(PreTrainedModel, GenerationMixin):
    """A Nemotron-style vision-language model.

    Args:
        config: The configuration.
    """

    config_class = NemotronVLConfig
    config: NemotronVLConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "video", "audio", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _is_stateful = True
    _no_split_modules: ClassVar[list[str]] = ["RadioLayer", "ParakeetEncoderBlock", "NemotronHBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    # The released files carry the tower's own normaliser and the sound tower's filter bank; ours reads the same numbers
    # from the config, and the processor makes spectrograms.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        r"input_conditioner\.",
        r"audio_tower\.feature_extractor\.",
    ]
    # A buffer that the released files leave out (so they do the tower's layer scales, which transformers knows).
    _keys_to_ignore_on_load_missing: ClassVar[list[str]] = [r"summary_idxs"]

    def __init__(self, config: NemotronVLConfig) -> None:
        super().__init__(config)
        self.language_model = make_language_model(config.text_config)
        self.vision_model = make_vision_model(config.vision_config, config.norm_mean, config.norm_std)
        self.multi_modal_projector = MultiModalProjector(
            config.vision_hidden_size * config.merge_size**2,
            config.projector_hidden_size,
            config.text_config.hidden_size,
        )
        self.audio_tower = None if config.audio_config is None else make_audio_tower(config.audio_config)
        self.embed_audio = (
            None
            if config.audio_config is None
            else make_audio_projector(config.audio_config, config.text_config.hidden_size)
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language-model head."""
        return self.language_model.lm_head

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Saves as transformers does, without what released files leave out: layer scales of 1, which RADIO has not."""
        tower = self.vision_model.state_dict()
        self._keys_to_ignore_on_save = {
            f"vision_model.{name}"
            for name, value in tower.items()
            if name == "summary_idxs" or ("layer_scale" in name and not value.is_meta and bool((value == 1).all()))
        }
        super().save_pretrained(*args, **kwargs)

    def print_architecture(self, detailed: bool = False, save_to_file: str | os.PathLike[str] | None = None) -> None:
        """Prints parameters, memory and share of each component, trainable or frozen.

        Args:
            detailed: Also the layers inside the parts, and what one token meets of a mixture of experts.
            save_to_file: Where to write the same text, besides.
        """
        print_architecture(self, detailed, save_to_file)

    def get_image_features(self, pixel_values: Tensor, image_grid_hw: Tensor) -> tuple[Tensor, list[int]]:
        """Images as language-model tokens.

        Args:
            pixel_values: ``(num_patches, 3 * patch_size**2)``, all images concatenated; uint8 pixels or
                normalised floats.
            image_grid_hw: ``(num_images, 2)`` patch grid of each image.

        Returns:
            ``(num_tokens, hidden_size)`` features and the number of them per image.

        Raises:
            FusionError: If the grids do not describe the patches, or are not multiples of ``merge_size``.
        """
        grids: list[tuple[int, int]] = [(rows, columns) for rows, columns in image_grid_hw.tolist()]
        features = self._encode_patches(pixel_values, grids, 1, "pixel_values", "image_grid_hw")
        return features, [rows * columns // self.config.merge_size**2 for rows, columns in grids]

    def get_video_features(
        self, pixel_values_videos: Tensor, video_grid_thw: Tensor, num_video_tokens: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Videos as language-model tokens, those left out that efficient video sampling (EVS) prunes.

        Args:
            pixel_values_videos: ``(num_patches, frames * 3 * patch_size**2)``, the tubelets of all videos one after
                another (frame after frame inside a patch); uint8 pixels or normalised floats.
            video_grid_thw: ``(num_videos, 3)`` tubelets, rows and columns of patches of each video.
            num_video_tokens: ``(num_videos,)`` tokens that each video keeps; all when ``None``.

        Returns:
            ``(num_tokens, hidden_size)`` features; and per video ``(num_tubelets,)`` int64 tokens kept of each tubelet.

        Raises:
            FusionError: If the grids do not describe the patches, or a video is to keep more tokens than it has.
        """
        videos = [tuple(video) for video in video_grid_thw.tolist()]
        grids = [(rows, columns) for tubelets, rows, columns in videos for _ in range(tubelets)]
        frames = self.config.frames_per_tubelet
        features = self._encode_patches(pixel_values_videos, grids, frames, "pixel_values_videos", "video_grid_thw")
        sizes = [(tubelets, rows * columns // self.config.merge_size**2) for tubelets, rows, columns in videos]
        return prune_videos(features, sizes, None if num_video_tokens is None else num_video_tokens.tolist())

    def get_audio_features(
        self, input_features: Tensor, input_features_mask: Tensor | None = None
    ) -> tuple[Tensor, list[int]]:
        """Clips of sound as language-model tokens.

        Args:
            input_features: ``(num_clips, num_frames, num_mel_bins)`` spectrograms.
            input_features_mask: ``(num_clips, num_frames)``, true for frames that count; all when ``None``.

        Returns:
            ``(num_tokens, hidden_size)`` features and the number of them per clip.

        Raises:
            FusionError: If the model has no sound tower.
        """
        if self.audio_tower is None or self.embed_audio is None:
            raise FusionError("input_features were given to a model without audio_config; leave sounds out, or add one")
        return encode_sounds(self.audio_tower, self.embed_audio, input_features, input_features_mask)

    def _encode_patches(
        self, patches: Tensor, grids: list[tuple[int, int]], frames: int, name: str, beside: str
    ) -> Tensor:
        """``(num_tokens, hidden_size)`` of images or tubelets of so many frames."""
        merge = self.config.merge_size
        described = sum(rows * columns for rows, columns in grids)
        if described != patches.shape[0]:
            raise FusionError(
                f"{name} has {patches.shape[0]} patches but {beside} describes {described}; take both from one call of "
                "the processor"
            )
        if odd := [grid for grid in grids if grid[0] % merge or grid[1] % merge]:
            raise FusionError(
                f"{beside}: grid {odd[0]} is not a multiple of {merge} patches per side; use the processor that "
                "belongs to the model"
            )
        if (found := self.vision_model.frames_of(patches)) != frames:  # another embedder would take them in silence
            raise FusionError(
                f"{name} has patches of {found} frame(s) each; this model expects {frames}: use the processor that "
                "belongs to it"
            )

        def project(features: Tensor, own: list[tuple[int, int]]) -> Tensor:
            return self.multi_modal_projector(shuffle_images(features, own, merge, self.config.ps_version))

        if any(isinstance(module, FSDPModule) for module in self.multi_modal_projector.modules()):
            # A unit of its own is gathered each time it is called: once, however many passes this rank's tower makes.
            return project(self.vision_model(patches, grids).features, grids)
        return self.vision_model(patches, grids, project).features

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_hw: Tensor | None = None,
        num_images: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        num_video_tokens: Tensor | None = None,
        num_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        num_clips: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Runs the model on a padded batch, or on a packed row of documents that do not see each other.

        Args:
            input_ids: ``(B, T)``; placeholders of images and videos are ``config.image_token_id``, those of sounds
                ``config.audio_token_id``.
            attention_mask: ``(B, T)``, 1 for tokens and 0 for padding; not with ``cu_seqlens``.
            cu_seqlens: ``(num_documents + 1,)`` int32 boundaries of a packed row ``(1, T)``.
            pixel_values: ``(num_patches, 3 * patch_size**2)``, images in reading order over the rows.
            image_grid_hw: ``(num_images, 2)``.
            num_images: ``(B,)`` images of each row (of each document with ``cu_seqlens``), if known: a mismatch is
                then found and named row by row.
            pixel_values_videos: ``(num_patches, frames * 3 * patch_size**2)``, see `get_video_features`.
            video_grid_thw: ``(num_videos, 3)``.
            num_video_tokens: ``(num_videos,)`` tokens that each video keeps; all when ``None``. A pruned video's
                placeholders may stand anywhere after its start tokens: they are laid out again.
            num_videos: ``(B,)``, as ``num_images``.
            input_features: ``(num_clips, num_frames, num_mel_bins)``, clips in reading order over the rows.
            input_features_mask: ``(num_clips, num_frames)``, true for frames that count.
            num_clips: ``(B,)``, as ``num_images``.
            mm_token_type_ids: ``(B, T)``: 0 text, 1 image, 2 video, 3 sound; needed where images and videos meet.
            position_ids: ``(B, T)``; the language model has no positional encoding, they only shape masks.
            past_key_values: Cache of a generation in progress.
            inputs_embeds: ``(B, T, D)`` instead of ``input_ids`` (text only).
            labels: ``(B, T)`` aligned with ``input_ids``, -100 where not trained on; shifted inside.
            use_cache: Whether to return a cache; off while training and with ``cu_seqlens``.
            logits_to_keep: Compute logits of the last so many positions only (0: all), or of those with these numbers;
                not with ``labels``.
            num_items_in_batch: Divide the summed loss by this instead of by the batch's own label tokens.
            skip_logits: With ``labels``: compute the loss without materialising logits and return none.
            **kwargs: Passed to the language model.

        Returns:
            ``loss`` (float32 scalar, if ``labels``), ``logits`` ``(B, T, V)`` float32 (unless skipped),
            cache.

        Raises:
            FusionError: If placeholders and features of media differ in number.
            ValueError: If ``cu_seqlens`` does not describe one row, or comes with a mask or a cache; if ``labels`` come
                with ``logits_to_keep``.
        """
        if labels is not None and (isinstance(logits_to_keep, Tensor) or logits_to_keep):
            raise ValueError(
                f"labels are given and logits_to_keep is {logits_to_keep}; expected 0, for a loss is over all "
                "positions: leave logits_to_keep out, or set skip_logits to have a loss without logits"
            )
        media = MediaInputs(
            pixel_values,
            image_grid_hw,
            num_images,
            pixel_values_videos,
            video_grid_thw,
            num_video_tokens,
            num_videos,
            input_features,
            input_features_mask,
            num_clips,
        )
        documents = None
        if cu_seqlens is not None:
            rows: Any = input_ids if inputs_embeds is None else inputs_embeds
            _refuse_with_cu_seqlens(rows, attention_mask, past_key_values, use_cache)
            documents = documents_from_cu_seqlens(cu_seqlens, rows.shape[1])
        inputs_embeds, labels = embed_with_media(
            self, media, input_ids, inputs_embeds, labels, mm_token_type_ids, documents, past_key_values
        )
        if documents is None:
            inputs = {"attention_mask": attention_mask, "use_cache": False if self.training else use_cache}
        else:
            inputs = packed_inputs(self.config.text_config, documents, inputs_embeds.dtype)
        outputs = self.language_model.model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **inputs,
            **kwargs,
        )
        hidden, head = outputs.last_hidden_state, self.language_model.lm_head
        if labels is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            return self._output(outputs, logits=head(hidden[:, kept, :]).float())

        targets = shift_labels(labels, cu_seqlens)
        if skip_logits:
            logits, total = None, linear_cross_entropy(hidden, head, targets)
        else:
            logits = head(hidden).float()
            total = naive_cross_entropy(logits, targets)
        if num_items_in_batch is None:
            num_items_in_batch = (targets >= 0).sum().clamp(min=1)
        return self._output(outputs, loss=total / num_items_in_batch, logits=logits)

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[GenerationConfig, dict[str, Any]]:
        # No medium stands behind a placeholder that the model says itself.
        options, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        placeholders = [self.config.image_token_id, self.config.audio_token_id]
        options.suppress_tokens = [*(options.suppress_tokens or []), *(t for t in placeholders if t is not None)]
        return options, model_kwargs

    @staticmethod
    def create_masks_for_generate(config: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Both masks of the hybrid language model."""
        return NemotronHForCausalLM.create_masks_for_generate(config.text_config, *args, **kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        # Beams, or several answers per prompt: transformers' own would repeat patches, not a row's media.
        media = {name: model_kwargs.pop(name, None) for name in MediaInputs.__slots__}
        if expand_size > 1 and input_ids is not None:
            media = repeat_media(self.config, input_ids, model_kwargs.get("mm_token_type_ids"), media, expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | {name: value for name, value in media.items() if value is not None}

    @staticmethod
    def _output(outputs: Any, loss: Tensor | None = None, logits: Tensor | None = None) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _refuse_with_cu_seqlens(rows: Tensor, mask: Tensor | None, cache: Cache | None, use_cache: bool | None) -> None:
    """Refuses what would let documents see each other, or means something else than boundaries."""
    if rows.shape[0] != 1:
        raise ValueError(f"cu_seqlens describes one packed row, got a batch of {rows.shape[0]} rows; expected (1, T)")
    if mask is not None:
        raise ValueError("a packed row has no padding: pass cu_seqlens or attention_mask, not both")
    if cache is not None or use_cache:
        raise ValueError("a packed row cannot use a cache, which would carry state across documents; generate unpacked")


AutoModelForImageTextToText.register(NemotronVLConfig, NemotronVL, exist_ok=True)
