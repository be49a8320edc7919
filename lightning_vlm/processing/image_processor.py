"""The transformers image processor of the family: PIL images in, packed patches and their grids out.

No torchvision, so it installs anywhere; by default it leaves pixels in uint8 and lets the model normalise on its
device. ``do_normalize=True`` gives the float path instead: resized without clamping and normalised, as
transformers does it.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs

from lightning_vlm.geometry.images import Grid, ImageGeometry, ImageLayout, lay_out_images
from lightning_vlm.media.image import image_to_patches, to_rgb
from lightning_vlm.ops.pixels import normalize_patches


class NemotronVLImageKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Options of `NemotronVLImageProcessor`; the meaning of each is in `ImageGeometry`."""

    mode: str
    patch_size: int
    downsample_ratio: float
    min_num_patches: int
    max_num_patches: int
    max_model_len: int
    tile_size: int
    max_tiles: int
    use_thumbnail: bool


class NemotronVLImageProcessor(PilBackend):
    """Resizes images as Nemotron-VL models were trained, in ``dynamic`` or ``static`` mode.

    Args:
        mode: ``dynamic`` (Nemotron-3-Nano-Omni) or ``static`` (Nemotron-Nano-12B-v2-VL tiles).
        patch_size: Side of a vision-tower patch, in pixels.
        downsample_ratio: Pixel-shuffle ratio of the model.
        min_num_patches: See `ImageGeometry`.
        max_num_patches: See `ImageGeometry`.
        max_model_len: See `ImageGeometry`.
        tile_size: See `ImageGeometry`.
        max_tiles: See `ImageGeometry`.
        use_thumbnail: See `ImageGeometry`.
        do_normalize: Return normalised float32 patches instead of uint8 ones.
        image_mean: Per-channel mean for ``do_normalize`` (released configs call it ``norm_mean``).
        image_std: Per-channel standard deviation for ``do_normalize`` (released configs call it
            ``norm_std``).
    """

    valid_kwargs = NemotronVLImageKwargs
    model_input_names = ["pixel_values", "image_grid_hw"]  # noqa: RUF012  transformers' name and type

    mode = "dynamic"
    patch_size = 16
    downsample_ratio = 0.5
    min_num_patches = 1024
    max_num_patches = 13312
    max_model_len = 16384
    tile_size = 512
    max_tiles = 12
    use_thumbnail = True
    do_convert_rgb = True
    do_normalize = False
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD

    def __init__(self, **kwargs: Any) -> None:
        for released, name in (("norm_mean", "image_mean"), ("norm_std", "image_std")):
            if (value := kwargs.pop(released, None)) is not None:
                kwargs.setdefault(name, value)
        super().__init__(**kwargs)

    @property
    def geometry(self) -> ImageGeometry:
        """The integer side of this processor: sizes to grids to token counts."""
        return self.geometry_with()

    def geometry_with(self, **overrides: Any) -> ImageGeometry:
        """The geometry with any constructor arguments replaced."""
        options = {**vars(self), **overrides}
        if options["max_num_patches"] == 0:  # transformers' way to say: bounded by max_model_len alone
            options["max_num_patches"] = options["max_model_len"] * round(1 / options["downsample_ratio"]) ** 2
        return ImageGeometry(
            merge_size=round(1 / options["downsample_ratio"]),
            **{name: options[name] for name in _GEOMETRY_NAMES},
        )

    def patchify(
        self, images: list[Image.Image], layout: ImageLayout | None = None, **overrides: Any
    ) -> tuple[Tensor, list[list[Grid]]]:
        """Cuts images into one stack of patches.

        Args:
            images: RGB images.
            layout: Grids to use instead of the geometry's own answer, made from these images' sizes.
            **overrides: Any constructor argument, for this call only.

        Returns:
            ``(num_patches, 3 * patch_size**2)`` patches, uint8 pixels or normalised float32; and per image
            the grids of its tiles (one grid in dynamic mode).
        """
        options = {**vars(self), **overrides}
        as_float = bool(options["do_normalize"])
        layout = layout or lay_out_images(
            [(image.height, image.width) for image in images], self.geometry_with(**overrides)
        )
        patches, grids = zip(
            *(
                image_to_patches(image, layout.geometry, tiles[0], as_float)
                for image, tiles in zip(images, layout.grids, strict=True)
            )
        )
        stacked = torch.cat(patches)
        if as_float:
            mean, std = torch.tensor(options["image_mean"]), torch.tensor(options["image_std"])
            stacked = normalize_patches(stacked, mean, std)
        return stacked, list(grids)

    def _preprocess_image_like_inputs(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        # The one hook between transformers' argument checking and our pixels: everything else is inherited.
        flat = [to_rgb(image) for image in make_flat_list_of_images(images)]
        patches, grids = self.patchify(flat, **{k: v for k, v in kwargs.items() if v is not None})
        rows = torch.tensor([grid for tiles in grids for grid in tiles])
        data = {"pixel_values": patches, "image_grid_hw": rows}
        return BatchFeature(data=data, tensor_type=kwargs.get("return_tensors"))


# Named alike here and in `ImageGeometry`; merge_size alone follows from downsample_ratio, a released name.
_GEOMETRY_NAMES = tuple(field.name for field in fields(ImageGeometry) if field.name != "merge_size")
