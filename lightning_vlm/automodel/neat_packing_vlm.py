"""NeMo AutoModel's neat packing, planned from estimated lengths in no time: the way in, for those who migrate from it.

All names of NeMo's module of that name can be imported from here. A plan from estimates overflows, see `neat_dataset`;
our own path (`VLMDataModule(packing=True)`) measures exact lengths and plans from those.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lightning_vlm.automodel.estimates import (
    _estimate_image_tokens,
    _estimate_sample_length,
    _estimate_video_tokens,
    estimate_tokens,
    image_config,
    video_config,
)
from lightning_vlm.automodel.knapsack import greedy_knapsack, greedy_knapsack_vt_balanced
from lightning_vlm.automodel.neat_dataset import PackedDatasetWrapper
from lightning_vlm.automodel.neat_samples import (
    MEDIA_KEYS,
    _aligned_length,
    _build_packed_vlm_sample,
    _compute_mrope_position_ids,
    _shift_sample,
    check_alignment,
)

__all__ = [
    "MEDIA_KEYS",
    "NeatPackConfig",
    "PackedDatasetWrapper",
    "_aligned_length",
    "_build_packed_vlm_sample",
    "_compute_mrope_position_ids",
    "_estimate_image_tokens",
    "_estimate_sample_length",
    "_estimate_video_tokens",
    "_shift_sample",
    "greedy_knapsack",
    "greedy_knapsack_vt_balanced",
    "neat_pack_dataset_vlm",
]

_log = logging.getLogger(__name__)


@dataclass
class NeatPackConfig:
    """Options of neat packing; `build` makes the packs.

    Attributes:
        pack_size: Most tokens of a pack, after the shift.
        drop_long_samples: Leave out samples that are estimated at more than that.
        max_packs: Most packs.
        packing_ratio: Part of a pack that is filled by estimate.
        balance_media_tokens: Sort packs by visual tokens.
        collate_max_length: Width of collated batches; for the collate function, only checked here.
        attn_implementation: For the collate function.
        packing_format: ``neat``, or ``thd`` with documents aligned for context parallelism.

    Raises:
        ValueError: If the format is another.
    """

    pack_size: int = 2048
    drop_long_samples: bool = False
    max_packs: int | None = None
    packing_ratio: float = 1.0
    balance_media_tokens: bool = True
    collate_max_length: int | None = None
    attn_implementation: str | None = None
    packing_format: Literal["neat", "thd"] = "neat"

    def __post_init__(self) -> None:
        if self.packing_format not in ("neat", "thd"):
            raise ValueError(f"packing_format is {self.packing_format!r}; expected 'neat' or 'thd'")

    def build(
        self,
        *,
        dataset: Any,
        padding_idx: int,
        ds_raw: Any = None,
        get_rope_index: Callable[..., Any] | None = None,
        processor: Any = None,
        cp_size: int = 1,
    ) -> PackedDatasetWrapper:
        """Plans the packs of a dataset, see `neat_pack_dataset_vlm`.

        Args:
            dataset: Index -> sample.
            padding_idx: Token that pads documents.
            ds_raw: Index -> raw row.
            get_rope_index: ``model.get_rope_index`` of a model with mRoPE.
            processor: Hugging Face processor that estimates of media follow.
            cp_size: Ranks that share a sequence; ``thd`` documents are aligned to twice as many where more than 1.

        Raises:
            ValueError: If ``cp_size`` is less than 1, or ``collate_max_length`` is no multiple of the alignment.
            NotImplementedError: If documents are to be aligned with mRoPE.
        """
        if cp_size < 1:
            raise ValueError(f"cp_size is {cp_size}; expected at least 1")
        alignment = 2 * cp_size if self.packing_format == "thd" and cp_size > 1 else 1
        check_alignment(alignment, get_rope_index is not None)
        if self.collate_max_length is not None and self.collate_max_length % alignment:
            raise ValueError(f"collate_max_length is {self.collate_max_length}; expected a multiple of {alignment}")
        return neat_pack_dataset_vlm(
            dataset, self.pack_size, padding_idx, self.drop_long_samples, self.max_packs, get_rope_index, ds_raw,
            self.packing_ratio, processor, self.balance_media_tokens, alignment,
        )  # fmt: skip


def neat_pack_dataset_vlm(
    dataset: Any,
    pack_size: int,
    padding_idx: int = 0,
    drop_long_samples: bool = False,
    max_packs: int | None = None,
    get_rope_index: Callable[..., Any] | None = None,
    ds_raw: Any = None,
    packing_ratio: float = 1.0,
    processor: Any = None,
    balance_media_tokens: bool = True,
    sequence_alignment: int = 1,
) -> PackedDatasetWrapper:
    """Plans packs from estimated lengths.

    What the plan leaves out is warned of and listed in ``left_out`` of the result, where NeMo AutoModel logs a number.

    Args:
        dataset: Index -> sample, see `neat_samples`.
        pack_size: Most tokens of a pack, after the shift.
        padding_idx: Token that pads documents.
        drop_long_samples: Leave out samples that are estimated at more than ``pack_size`` (``"estimated_too_long"``).
            Otherwise each gets a pack, because the estimate may be too high.
        max_packs: Keep so many packs; after sorting, so those with fewest visual tokens. The samples of the others
            are ``"beyond_max_packs"``.
        get_rope_index: ``model.get_rope_index`` of a model with mRoPE.
        ds_raw: Index -> raw row of the same sample, see `automodel.estimates`. Without it every sample counts as half a
            pack.
        packing_ratio: Part of a pack that is filled by estimate; the rest is room for errors.
        processor: Hugging Face processor that estimates of media follow.
        balance_media_tokens: Sort packs by visual tokens, if there are any.
        sequence_alignment: Each document is padded to a multiple of this many tokens.

    Raises:
        ValueError: If there is no room in a pack, the alignment is less than 1, or ``ds_raw`` is of another length.
        NotImplementedError: If the alignment is more than 1 with mRoPE.
    """
    check_alignment(sequence_alignment, get_rope_index is not None)
    capacity = int(pack_size * packing_ratio)
    if capacity < 1:
        raise ValueError(f"pack_size {pack_size} and packing_ratio {packing_ratio} leave no room in a pack")
    total = len(dataset)
    if ds_raw is None:
        planned, media = list(range(total)), [0] * total
        lengths = [min(_aligned_length(capacity // 2, sequence_alignment), capacity)] * total
        dropped: list[int] = []
    else:
        if len(ds_raw) != total:
            raise ValueError(f"ds_raw has {len(ds_raw)} rows for {total} samples")
        configs = image_config(processor), video_config(processor)
        estimates = [estimate_tokens(ds_raw[index], *configs) for index in range(total)]
        needed = [_aligned_length(max(text + visual - 1, 0), sequence_alignment) for text, visual in estimates]
        planned = [index for index in range(total) if needed[index] <= pack_size or not drop_long_samples]
        dropped = [index for index in range(total) if needed[index] > pack_size and drop_long_samples]
        lengths, media = [min(needed[index], capacity) for index in planned], [estimates[index][1] for index in planned]
    if balance_media_tokens and any(media):
        bins = greedy_knapsack_vt_balanced(lengths, capacity, media)
    else:
        bins = greedy_knapsack(lengths, capacity)
    bins = [[planned[item] for item in members] for members in bins]
    packed = PackedDatasetWrapper(
        dataset, bins[:max_packs], pack_size, padding_idx, get_rope_index, sequence_alignment=sequence_alignment
    )
    beyond = sorted(index for members in bins[len(packed) :] for index in members)
    packed.left_out = {"estimated_too_long": dropped, "beyond_max_packs": beyond}
    for reason, indices in packed.left_out.items():
        if indices:
            _log.warning("%d of %d samples are in no pack (%s)", len(indices), total, reason)
    return packed
