"""NemotronVL: transformers' RADIO tower and NemotronH language model, joined as Nemotron-VL joins them.

    pixel_values -> RADIO -> pixel shuffle -> projector --+
                                                          v
    input_ids ----------> embedding ------------------> fusion -> hybrid LM -> logits or loss

Both networks are transformers' own; here is only what joins them. The attribute names are those of
transformers' `NemotronH_Omni_Reasoning_V3`, so its state dict loads as it is, and the checkpoint key names
are the released ones.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    GenerationMixin,
    NemotronHForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import CausalLMOutputWithPast

from lightning_vlm.models.config import NemotronVLConfig
from lightning_vlm.models.fusion import FusionError, fuse, images_per_row, placeholders_per_row, refuse_placeholders
from lightning_vlm.models.language import make_language_model, packed_inputs
from lightning_vlm.models.projector import MultiModalProjector, shuffle_images
from lightning_vlm.models.text_only import needs_absent_image, with_absent_image
from lightning_vlm.models.vision import make_vision_model
from lightning_vlm.ops.cross_entropy import linear_cross_entropy, naive_cross_entropy, shift_labels
from lightning_vlm.ops.pixels import normalize_patches
from lightning_vlm.segments import Documents, documents_from_cu_seqlens, documents_from_lengths

register_checkpoint_conversion_mapping(
    "NemotronVL",
    [
        WeightRenaming(r"^mlp1\.0\.", r"multi_modal_projector\.layer_norm\."),
        WeightRenaming(r"^mlp1\.1\.", r"multi_modal_projector\.linear_1\."),
        WeightRenaming(r"^mlp1\.3\.", r"multi_modal_projector\.linear_2\."),
    ],
    overwrite=True,
)


class PixelNorm(nn.Module):
    """Normalises uint8 patches on the device they are on; patches that are already floats pass through.

    The numbers stay Python's: buffers would be rounded with the model to bfloat16, a bias on every pixel.

    Args:
        mean: Per-channel mean.
        std: Per-channel standard deviation.
    """

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """``(num_patches, 3 * patch_size**2)`` uint8 pixels or normalised floats -> normalised floats."""
        if pixel_values.is_floating_point():
            return pixel_values
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float32, device=pixel_values.device)
        return normalize_patches(pixel_values, mean, std)


class NemotronVL(PreTrainedModel, GenerationMixin):
    """A Nemotron-style vision-language model.

    Args:
        config: The configuration.
    """

    config_class = NemotronVLConfig
    config: NemotronVLConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _is_stateful = True
    _no_split_modules: ClassVar[list[str]] = ["RadioLayer", "NemotronHBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    # The released files carry the tower's own normaliser; ours reads the same numbers from the config.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"input_conditioner\."]
    # A buffer that the released files leave out (so they do the tower's layer scales, which transformers knows).
    _keys_to_ignore_on_load_missing: ClassVar[list[str]] = [r"summary_idxs"]

    def __init__(self, config: NemotronVLConfig) -> None:
        super().__init__(config)
        self.language_model = make_language_model(config.text_config)
        self.vision_model = make_vision_model(config.vision_config)
        self.pixel_norm = PixelNorm(config.norm_mean, config.norm_std)
        self.multi_modal_projector = MultiModalProjector(
            config.vision_hidden_size * config.merge_size**2,
            config.projector_hidden_size,
            config.text_config.hidden_size,
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
        merge = self.config.merge_size
        described = sum(rows * columns for rows, columns in grids)
        if described != pixel_values.shape[0]:
            raise FusionError(
                f"pixel_values has {pixel_values.shape[0]} patches but image_grid_hw describes {described}; "
                "take both from one call of the processor"
            )
        if odd := [grid for grid in grids if grid[0] % merge or grid[1] % merge]:
            raise FusionError(f"image grid {odd[0]} is not a multiple of {merge} patches per side")
        pixels = self.pixel_norm(pixel_values).to(self.vision_model.dtype)
        prefix = self.config.vision_config.num_summary_tokens
        documents = documents_from_lengths([rows * columns + prefix for rows, columns in grids], pixels.device)
        features = self.vision_model(pixels, image_grid_hw=image_grid_hw, documents=documents).features
        features = shuffle_images(features, grids, merge, self.config.ps_version)
        return self.multi_modal_projector(features), [rows * columns // merge**2 for rows, columns in grids]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_hw: Tensor | None = None,
        num_images: Tensor | None = None,
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
            input_ids: ``(B, T)``; image placeholders are ``config.image_token_id``.
            attention_mask: ``(B, T)``, 1 for tokens and 0 for padding; not with ``cu_seqlens``.
            cu_seqlens: ``(num_documents + 1,)`` int32 boundaries of a packed row ``(1, T)``.
            pixel_values: ``(num_patches, 3 * patch_size**2)``, images in reading order over the rows.
            image_grid_hw: ``(num_images, 2)``.
            num_images: ``(B,)`` images of each row (of each document with ``cu_seqlens``), if known: a mismatch is
                then found and named row by row.
            position_ids: ``(B, T)``; the language model has no positional encoding, they only shape masks.
            past_key_values: Cache of a generation in progress.
            inputs_embeds: ``(B, T, D)`` instead of ``input_ids`` (text only).
            labels: ``(B, T)`` aligned with ``input_ids``, -100 where not trained on; shifted inside.
            use_cache: Whether to return a cache; off while training and with ``cu_seqlens``.
            logits_to_keep: Compute logits of the last so many positions only (0: all).
            num_items_in_batch: Divide the summed loss by this instead of by the batch's own label tokens.
            skip_logits: With ``labels``: compute the loss without materialising logits and return none.
            **kwargs: Passed to the language model; ``pixel_values_videos`` and ``input_features`` are not accepted yet.

        Returns:
            ``loss`` (float32 scalar, if ``labels``), ``logits`` ``(B, T, V)`` float32 (unless skipped),
            cache.

        Raises:
            FusionError: If placeholders and image features differ in number.
            ValueError: If ``cu_seqlens`` does not describe one row, or comes with a mask or a cache.
            NotImplementedError: If videos or audio are given.
        """
        for media in ("pixel_values_videos", "input_features"):
            if kwargs.pop(media, None) is not None:
                raise NotImplementedError(f"{media} is not supported yet; the model takes images and text")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        documents = None
        if cu_seqlens is not None:
            _refuse_with_cu_seqlens(inputs_embeds, attention_mask, past_key_values, use_cache)
            documents = documents_from_cu_seqlens(cu_seqlens, inputs_embeds.shape[1])
        inputs_embeds = self._with_images(
            inputs_embeds, input_ids, pixel_values, image_grid_hw, num_images, documents, past_key_values
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
        # Beams, or several answers per prompt: transformers' own would repeat patches, not a row's images.
        images = {name: model_kwargs.pop(name, None) for name in ("pixel_values", "image_grid_hw")}
        if expand_size > 1 and images["pixel_values"] is not None and input_ids is not None:
            patches, grids = images["pixel_values"], images["image_grid_hw"]
            tokens_per_image = (grids.prod(-1) // self.config.merge_size**2).tolist()
            is_placeholder = self._is_placeholder(input_ids)
            rows = torch.arange(len(grids)).split(
                images_per_row(placeholders_per_row(is_placeholder), tokens_per_image)
            )
            order = torch.cat([row.repeat(expand_size) for row in rows])
            split = patches.split(grids.prod(-1).tolist())
            images = {
                "pixel_values": torch.cat([split[image] for image in order]),
                "image_grid_hw": grids[order],
            }
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | images

    def _is_placeholder(self, input_ids: Tensor) -> Tensor:
        token = self.config.image_token_id
        return torch.zeros_like(input_ids, dtype=torch.bool) if token is None else torch.eq(input_ids, token)

    def _with_images(
        self,
        inputs_embeds: Tensor,
        input_ids: Tensor | None,
        pixel_values: Tensor | None,
        grids: Tensor | None,
        num_images: Tensor | None,
        documents: Documents | None,
        past_key_values: Cache | None,
    ) -> Tensor:
        is_placeholder = None if input_ids is None else self._is_placeholder(input_ids)
        if pixel_values is not None:
            if is_placeholder is None or grids is None:
                raise FusionError("pixel_values needs input_ids (placeholder positions) and image_grid_hw beside it")
            features, tokens_per_image = self.get_image_features(pixel_values, grids)
            known = None if num_images is None else num_images.tolist()
            return fuse(inputs_embeds, features, is_placeholder, tokens_per_image, known, documents)
        if is_placeholder is not None and input_ids is not None and input_ids.shape[1] > 1 and is_placeholder.any():
            found = placeholders_per_row(is_placeholder, documents)
            refuse_placeholders(found, "row" if documents is None else "document")
        parts = (self.vision_model, self.multi_modal_projector)
        if needs_absent_image(parts, self.training, past_key_values):
            return with_absent_image(inputs_embeds, parts, self.config, self.get_image_features)
        return inputs_embeds

    @staticmethod
    def _output(outputs: Any, loss: Tensor | None = None, logits: Tensor | None = None) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _refuse_with_cu_seqlens(embeds: Tensor, mask: Tensor | None, cache: Cache | None, use_cache: bool | None) -> None:
    """Refuses what would let documents see each other, or means something else than boundaries."""
    if embeds.shape[0] != 1:
        raise ValueError(f"cu_seqlens describes one packed row, got a batch of {embeds.shape[0]} rows; expected (1, T)")
    if mask is not None:
        raise ValueError("a packed row has no padding: pass cu_seqlens or attention_mask, not both")
    if cache is not None or use_cache:
        raise ValueError("a packed row cannot use a cache, which would carry state across documents; generate unpacked")


AutoModelForImageTextToText.register(NemotronVLConfig, NemotronVL, exist_ok=True)
