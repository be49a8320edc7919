"""A batch's media, cut into the micro-batches of a pipeline: NeMo AutoModel's functions, for those who migrate from it.

A pipeline schedule of torch cuts every tensor of a batch along its first axis, and that of patches counts no samples.
So media are cut before, as whole samples, and wait on the first stage's module until its forward asks for them: any
model that reads these attributes works, and one that does not read them trains without vision, unnoticed. Batches that
do not divide are cut as torch cuts ``input_ids`` (`torch.tensor_split`); NeMo's groups of ``ceil(B / n)`` are others,
and pair images with the text of other samples (6 samples in 4 micro-batches: 2, 2, 2, 0 of media, 2, 2, 1, 1 of text).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = [
    "VLM_PP_MEDIA_KEY",
    "chunk_step3_media",
    "chunk_vlm_media",
    "prepare_vlm_media_for_pp",
    "stage_vlm_media_for_pp",
    "wrap_vlm_collate_for_pp",
]

VLM_PP_MEDIA_KEY = "_vlm_pp_media_chunks"
"""Where a batch holds its cut media: name -> one value per micro-batch."""

_IMAGE_GRIDS = ("image_grid_hws", "image_grid_thw", "image_sizes", "image_position_ids")
_PATCHES = ("patch_pixel_values", "patch_newline_mask")
_VLM_MEDIA_KEYS = (
    "pixel_values",
    "num_patches",
    *_PATCHES,
    *_IMAGE_GRIDS,
    "n_images_per_sample",
    "pixel_values_videos",
    "video_grid_thw",
    "n_videos_per_sample",
)
_STAGED_KEYS = (
    "pixel_values",
    "image_grid_hws",
    "num_patches",
    *_PATCHES,
    "pixel_values_videos",
    "video_grid_thw",
)
_CURSOR = "_vlm_chunk_idx"

_Pixels = TypeVar("_Pixels", Tensor, list[Tensor])  # rows of images or patches, or a list of images that differ in size


def chunk_vlm_media(
    pixel_values: _Pixels,
    image_grid: Tensor,
    batch_size: int,
    n_microbatches: int,
    n_images_per_sample: Tensor | None = None,
) -> tuple[list[_Pixels], list[Tensor]]:
    """Cuts images, or videos, into micro-batches: those of sample i go where torch puts row i of ``input_ids``.

    Rows of ``pixel_values`` are images if there are as many as rows of ``image_grid``: (1) whole images, e.g.
    ``(num_images, C, H, W)``, or (2) their padded patches ``(num_images, max_patches, D)``. Otherwise they are patches
    ``(num_patches, ...)``, as many per image as its grid tells, of (3) samples with any number of images or (4) one
    image each, without counts.

    Three differences from NeMo AutoModel. Samples are divided as torch divides them, see this module. There are always
    ``n_microbatches`` parts, the last ones empty where there are fewer samples (NeMo: fewer parts, or an IndexError;
    torch's schedules refuse such a batch). And counts hold in every layout: NeMo ignores them where there happen to be
    as many images as samples, and gives sample 1 the second image of sample 0.

    Args:
        pixel_values: See above.
        image_grid: ``(num_images, 2)`` or ``(num_images, 3)``, an image's patches along each axis; in layouts 1 and 2
            any tensor with a row per image.
        batch_size: Samples of the batch, rows of its ``input_ids``.
        n_microbatches: Of the schedule.
        n_images_per_sample: ``(batch_size,)``; one each when ``None``.

    Returns:
        Pixels of each micro-batch, and grids of each micro-batch.

    Raises:
        ValueError: If the shapes do not go together, or there is no micro-batch.
    """
    counts = [1] * batch_size if n_images_per_sample is None else n_images_per_sample.tolist()
    num_images, num_rows = len(image_grid), len(pixel_values)
    rows_per_image = [1] * num_images
    if num_rows != num_images and image_grid.ndim == 2:
        rows_per_image = image_grid.prod(-1).tolist()
    if len(counts) != batch_size or sum(counts) != num_images or sum(rows_per_image) != num_rows:
        told = "None (one each)" if n_images_per_sample is None else counts
        raise ValueError(
            f"pixel_values {_shape(pixel_values)}, grid {_shape(image_grid)} and counts per sample {told} do not go "
            f"together in a batch of {batch_size}; expected a count per sample that add up to the grid's rows, and a "
            "row of pixels per image or per patch of the grid; have the collate function return n_images_per_sample"
        )
    images = _sum_groups(counts, n_microbatches)
    rows = [sum(group) for group in _split(rows_per_image, images)]
    return _split(pixel_values, rows), _split(image_grid, images)


def chunk_step3_media(
    pixel_values: _Pixels,
    batch_size: int,
    n_microbatches: int,
    num_patches: Tensor | None = None,
    patch_pixel_values: Tensor | None = None,
    patch_newline_mask: Tensor | None = None,
    *,
    n_images_per_sample: Tensor | None = None,
) -> dict[str, list[Any]]:
    """Cuts media without a grid into micro-batches: an image per sample, and Step3's crops of it, any number of them.

    Unlike in NeMo AutoModel samples are divided as torch divides them, see this module; counts of images are used; and
    crops that ``num_patches`` does not tell of are an error, where NeMo's parts lack them.

    Args:
        pixel_values: Rows are samples if there are ``batch_size``, else crops. With ``n_images_per_sample`` they are
            images, unless the counts do not add up to the rows and crops do, or a tensor has five axes (samples with
            their images) and ``batch_size`` rows.
        batch_size: Samples of the batch, rows of its ``input_ids``.
        n_microbatches: Of the schedule.
        num_patches: ``(batch_size,)``, crops of each sample; none when ``None``.
        patch_pixel_values: ``(crops, C, H, W)``, those of all samples.
        patch_newline_mask: ``(crops,)``.
        n_images_per_sample: ``(batch_size,)``. NeMo's function does not take it.

    Returns:
        One value per micro-batch for each of ``pixel_values``, ``num_patches``, and those of ``patch_pixel_values`` and
        ``patch_newline_mask`` that were given.

    Raises:
        ValueError: If the shapes do not go together, or there is no micro-batch.
    """
    if num_patches is None:
        num_patches = torch.zeros(batch_size, dtype=torch.int64)
    if num_patches.shape != (batch_size,):
        raise ValueError(f"num_patches is {_shape(num_patches)}; expected ({batch_size},), the crops of each sample")
    crops = num_patches.tolist()
    given = zip(_PATCHES, (patch_pixel_values, patch_newline_mask))
    patches = {name: value for name, value in given if value is not None}
    for name, value in patches.items():
        if len(value) != sum(crops):
            raise ValueError(
                f"{name} is {_shape(value)} but num_patches tells of {sum(crops)} crops; expected a row per crop, and "
                "num_patches from the same processor"
            )
    num_rows, samples = len(pixel_values), [1] * batch_size
    images = None if n_images_per_sample is None else n_images_per_sample.tolist()
    of_samples = num_rows == batch_size
    if images is None or (of_samples and _ndim(pixel_values) == 5):
        owned = samples if of_samples else crops
    else:
        owned = crops if sum(images) != num_rows == sum(crops) else images
    if len(owned) != batch_size or sum(owned) != num_rows:
        raise ValueError(
            f"pixel_values is {_shape(pixel_values)} in a batch of {batch_size}, with num_patches {crops} and "
            f"n_images_per_sample {images}; expected a row per sample, per image or per crop; have the collate "
            "function return counts that add up to the rows, or the grid of the images"
        )
    return {
        "pixel_values": _split(pixel_values, _sum_groups(owned, n_microbatches)),
        "num_patches": _split(num_patches, _sum_groups(samples, n_microbatches)),
        **{name: _split(value, _sum_groups(crops, n_microbatches)) for name, value in patches.items()},
    }


def prepare_vlm_media_for_pp(
    batch: MutableMapping[str, Any], batch_size: int, n_microbatches: int
) -> MutableMapping[str, Any]:
    """Moves a batch's media to `VLM_PP_MEDIA_KEY`, cut into micro-batches, where torch's schedules cannot cut them.

    The keys are NeMo AutoModel's; media of others, e.g. sound, stay where they are. Unlike there, a part without its
    whole (a grid without pixels, crops without images) is an error and is not dropped.

    Args:
        batch: Changed in place: it loses ``pixel_values``, ``num_patches``, ``patch_pixel_values``,
            ``patch_newline_mask``, ``n_images_per_sample``, the grids ``image_grid_hws``, ``image_grid_thw``,
            ``image_sizes`` and ``image_position_ids`` (of several the first counts; without any the images are
            Step3's), ``pixel_values_videos``, ``video_grid_thw`` and ``n_videos_per_sample``.
        batch_size: Samples of the batch.
        n_microbatches: Of the schedule.

    Returns:
        The same batch; with media, `VLM_PP_MEDIA_KEY` has ``pixel_values`` and ``image_grid_hws`` (whatever the grid's
        name was), or what `chunk_step3_media` returns, and ``pixel_values_videos`` and ``video_grid_thw``.

    Raises:
        ValueError: If there is no micro-batch, or media are incomplete or do not go together.
    """
    _check_microbatches(n_microbatches)
    media = {key: value for key in _VLM_MEDIA_KEYS if (value := batch.pop(key, None)) is not None}
    chunks: dict[str, list[Any]] = {}
    grid = next((media[key] for key in _IMAGE_GRIDS if key in media), None)
    if "pixel_values" not in media:
        _refuse_leftovers(media, (*_IMAGE_GRIDS, *_PATCHES), "without pixel_values; return both or neither")
    elif grid is None:
        more = {key: media.get(key) for key in ("num_patches", *_PATCHES, "n_images_per_sample")}
        chunks |= chunk_step3_media(media["pixel_values"], batch_size=batch_size, n_microbatches=n_microbatches, **more)
    else:
        _refuse_leftovers(media, _PATCHES, "beside an image grid; crops go with images that have no grid")
        chunks["pixel_values"], chunks["image_grid_hws"] = chunk_vlm_media(
            media["pixel_values"], grid, batch_size, n_microbatches, media.get("n_images_per_sample")
        )
    if "pixel_values_videos" not in media:
        _refuse_leftovers(media, ("video_grid_thw",), "without pixel_values_videos; return both or neither")
    elif "video_grid_thw" not in media:
        shape = _shape(media["pixel_values_videos"])
        raise ValueError(f"the batch has pixel_values_videos {shape} without video_grid_thw; return both or neither")
    else:
        chunks["pixel_values_videos"], chunks["video_grid_thw"] = chunk_vlm_media(
            media["pixel_values_videos"],
            media["video_grid_thw"],
            batch_size,
            n_microbatches,
            media.get("n_videos_per_sample"),
        )
    if chunks:
        batch[VLM_PP_MEDIA_KEY] = chunks
    return batch


def wrap_vlm_collate_for_pp(
    collate_fn: Callable[[Any], MutableMapping[str, Any]], n_microbatches: int
) -> Callable[[Any], MutableMapping[str, Any]]:
    """A collate function whose batches have their media cut for a pipeline, in the data loader's workers.

    Args:
        collate_fn: ``examples -> batch``. What it returns without media, or that is no mapping, is left as it is.
        n_microbatches: Of the schedule.

    Returns:
        ``examples -> batch``, which workers can be sent if ``collate_fn`` can. It raises ValueError where a batch has
        media but no ``input_ids``, and where `prepare_vlm_media_for_pp` does.

    Raises:
        ValueError: If there is no micro-batch.
    """
    _check_microbatches(n_microbatches)
    return partial(_collate_for_pp, collate_fn, n_microbatches)


def _collate_for_pp(
    collate_fn: Callable[[Any], MutableMapping[str, Any]], n_microbatches: int, examples: Any
) -> MutableMapping[str, Any]:
    batch = collate_fn(examples)
    found = [key for key in _VLM_MEDIA_KEYS if key in batch] if isinstance(batch, Mapping) else []
    if not found:
        return batch
    if batch.get("input_ids") is None:
        raise ValueError(
            f"the batch has {', '.join(found)} but no input_ids, whose rows are its samples; return them from the "
            "collate function"
        )
    return prepare_vlm_media_for_pp(batch, len(batch["input_ids"]), n_microbatches)


@contextmanager
def stage_vlm_media_for_pp(
    pp: Any, model_parts: Sequence[nn.Module], batch: MutableMapping[str, Any]
) -> Iterator[MutableMapping[str, Any]]:
    """Hands a batch's cut media to the first stage for one call of the schedule, on every rank of the pipeline.

    On the rank of the first stage ``model_parts[0]`` has ``_vlm_<key>_chunks``, one value per micro-batch or ``None``,
    for ``pixel_values``, ``image_grid_hws``, ``num_patches``, ``patch_pixel_values``, ``patch_newline_mask``,
    ``pixel_values_videos`` and ``video_grid_thw``; and ``_vlm_chunk_idx``, from 0, which its forward moves on by one
    each time, media or not. All are ``None`` afterwards, also after an error. To find shapes, a schedule may run the
    first micro-batch an extra time, before all others; the cursor then goes back to 0. NeMo AutoModel guesses before
    the call whether it will; here the schedule's own state tells during it, so a change from training to evaluation,
    for which torch looks for shapes again, is not missed.

    Args:
        pp: ``pp.info.has_first_stage`` tells whether this rank has the first stage; ``pp.info.schedule`` is torch's.
        model_parts: Modules of this rank's stages, in order.
        batch: Loses `VLM_PP_MEDIA_KEY`. Without media nothing happens, and ``pp`` is not asked.

    Yields:
        The same batch.

    Raises:
        ValueError: If media are not cut into as many parts as the schedule has micro-batches.
    """
    chunks = batch.pop(VLM_PP_MEDIA_KEY, None)
    if chunks is None:
        yield batch
        return
    schedule = getattr(pp.info, "schedule", None)
    expected = getattr(schedule, "_n_microbatches", None)
    found = {len(parts) for parts in chunks.values()}
    if isinstance(expected, int) and found != {expected}:
        raise ValueError(
            f"media are cut into {' and '.join(map(str, sorted(found)))} parts but the schedule has {expected} "
            f"micro-batches; give wrap_vlm_collate_for_pp n_microbatches={expected}"
        )
    if not pp.info.has_first_stage:
        yield batch
        return
    first = model_parts[0]
    for key in _STAGED_KEYS:
        setattr(first, f"_vlm_{key}_chunks", chunks.get(key))
    setattr(first, _CURSOR, 0)

    def rewind_after_probe(module: nn.Module, *_: Any) -> None:
        hook.remove()
        if _is_probing(schedule):
            setattr(module, _CURSOR, 0)

    hook = first.register_forward_hook(rewind_after_probe)
    try:
        yield batch
    finally:
        hook.remove()
        for name in (*(f"_vlm_{key}_chunks" for key in _STAGED_KEYS), _CURSOR):
            setattr(first, name, None)


def _is_probing(schedule: Any) -> bool:
    """Whether a forward that runs now is for its shapes alone: a schedule sets its marks after such forwards.

    The marks are torch's private ones; schedules with one stage per rank say "stage", others "stages".
    """

    def mark(direction: str) -> bool | None:
        names = (f"_stage_{direction}_initialized", f"_stages_{direction}_initialized")
        return next((getattr(schedule, name) for name in names if hasattr(schedule, name)), None)

    # Only schedules with this method (torch 2.13) look for shapes again between training and evaluation.
    if hasattr(schedule, "_initialize_pp_stages") and {schedule._has_backward, mark("backward")} == {True, False}:
        return True
    return mark("forward") is False


def _check_microbatches(n_microbatches: int) -> None:
    if n_microbatches < 1:
        raise ValueError(f"n_microbatches is {n_microbatches}; expected at least 1, the number of the schedule")


def _sum_groups(per_sample: Sequence[int], n_microbatches: int) -> list[int]:
    """Sums over the samples of each micro-batch, which are those that torch's own division gives it."""
    _check_microbatches(n_microbatches)
    return [int(part.sum()) for part in torch.tensor(per_sample, dtype=torch.int64).tensor_split(n_microbatches)]


def _split(values: Any, sizes: Sequence[int]) -> list[Any]:
    """Consecutive slices of a tensor or list; of a tensor they are views."""
    return [values[end - size : end] for end, size in zip(accumulate(sizes), sizes)]


def _refuse_leftovers(media: Mapping[str, Any], keys: Sequence[str], why: str) -> None:
    """Empty ones may be left: some processors return them for text."""
    if found := [f"{key} {_shape(media[key])}" for key in keys if key in media and len(media[key])]:
        raise ValueError(f"the batch has {', '.join(found)} {why}")


def _ndim(values: Tensor | list[Tensor]) -> int | None:
    return values.ndim if isinstance(values, Tensor) else None


def _shape(values: Tensor | list[Tensor]) -> str:
    return str(tuple(values.shape)) if isinstance(values, Tensor) else f"list of {len(values)}"
