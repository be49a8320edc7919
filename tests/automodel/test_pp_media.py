"""Every sample's media reach the micro-batch that torch gives its tokens to, whatever divides, and the first stage."""

from __future__ import annotations

import itertools
import pickle
from collections import UserDict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.pipelining.microbatch import split_args_kwargs_into_chunks
from torch.distributed.pipelining.schedules import ScheduleLoopedBFS
from torch.utils.data import DataLoader

from lightning_vlm.automodel.pp_media import (
    VLM_PP_MEDIA_KEY,
    chunk_step3_media,
    chunk_vlm_media,
    prepare_vlm_media_for_pp,
    stage_vlm_media_for_pp,
    wrap_vlm_collate_for_pp,
)
from tests.distributed.test_text_only_ranks import run_ranks

Dict = dict[str, Any]

SIZES = list(itertools.product(range(1, 10), range(1, 7)))
IMAGE_KEYS = ["pixel_values", "image_grid_hws", "num_patches", "patch_pixel_values", "patch_newline_mask"]
VIDEO_KEYS = ["pixel_values_videos", "video_grid_thw"]
STAGED = [*(f"_vlm_{key}_chunks" for key in (*IMAGE_KEYS, *VIDEO_KEYS)), "_vlm_chunk_idx"]


def rows_of_torch(batch_size: int, n_microbatches: int) -> list[list[int]]:
    """Samples of each micro-batch, as torch's pipelines divide ``input_ids``; none where it has no micro-batch left."""
    chunks, _ = split_args_kwargs_into_chunks((torch.arange(batch_size)[:, None],), None, n_microbatches)
    rows = [ids.flatten().tolist() for (ids,) in chunks]
    return rows + [[]] * (n_microbatches - len(rows))


def counts_of(batch_size: int) -> Tensor:
    """2, 0, 1, 3, 2, 0, ... media."""
    return torch.tensor([(2, 0, 1, 3)[sample % 4] for sample in range(batch_size)])


def owners_of(counts: Tensor) -> Tensor:
    """The sample of each medium."""
    return torch.arange(len(counts)).repeat_interleave(counts)


def filled(owners: Tensor, *shape: int) -> Tensor:
    """A row for each owner, full of its number."""
    return owners.float().view(-1, *[1] * len(shape)).expand(-1, *shape).contiguous()


def grid_of(owners: Tensor) -> Tensor:
    """(t, h, w): 1 to 6 patches per image, h being the owner's number modulo 2, plus 1."""
    numbers = torch.arange(len(owners))
    return torch.stack([torch.ones_like(numbers), owners % 2 + 1, numbers % 3 + 1], dim=1)


def samples_in(part: Any) -> list[int]:
    """The samples that the rows of a part are of, in order, each once."""
    return [int(number) for number, _ in itertools.groupby(row.flatten()[0] for row in part)]


def with_media(rows: list[list[int]], counts: Tensor) -> list[list[int]]:
    return [[sample for sample in part if counts[sample]] for part in rows]


class TestSplits:
    """NeMo's groups of ceil(B / n) are others for 11 of these 54 sizes, 6 samples in 4 micro-batches among them."""

    def test_torch_divides_as_its_schedules_are_documented_to(self) -> None:
        assert [len(part) for part in rows_of_torch(6, 4)] == [2, 2, 1, 1]
        assert [len(part) for part in rows_of_torch(10, 4)] == [3, 3, 2, 2]

    @pytest.mark.parametrize(("batch_size", "parts"), SIZES)
    @pytest.mark.parametrize("shape", [(3, 4, 4), (5, 6), (2, 3, 4, 4)], ids=["whole", "padded", "tiled"])
    def test_an_image_per_sample(self, batch_size: int, parts: int, shape: tuple[int, ...]) -> None:
        owners = torch.arange(batch_size)
        pixels, grids = chunk_vlm_media(filled(owners, *shape), filled(owners, 2), batch_size, parts)
        expected = rows_of_torch(batch_size, parts)
        assert [samples_in(part) for part in pixels] == expected
        assert [samples_in(part) for part in grids] == expected
        assert all(part.shape[1:] == shape for part in pixels), "also of parts without any"

    @pytest.mark.parametrize(("batch_size", "parts"), SIZES)
    @pytest.mark.parametrize("shape", [(3, 4, 4), (5, 6)], ids=["whole", "padded"])
    def test_images_by_counts(self, batch_size: int, parts: int, shape: tuple[int, ...]) -> None:
        counts = counts_of(batch_size)
        owners = owners_of(counts)
        pixels, grids = chunk_vlm_media(filled(owners, *shape), filled(owners, 5, 2), batch_size, parts, counts)
        rows = rows_of_torch(batch_size, parts)
        assert [samples_in(part) for part in pixels] == with_media(rows, counts)
        assert [len(part) for part in grids] == [int(counts[part].sum()) for part in rows]
        assert torch.equal(torch.cat(pixels), filled(owners, *shape)), "nothing is lost or moved"

    @pytest.mark.parametrize(("batch_size", "parts"), SIZES)
    @pytest.mark.parametrize("columns", [2, 3])
    def test_patches_by_counts(self, batch_size: int, parts: int, columns: int) -> None:
        counts = counts_of(batch_size)
        owners = owners_of(counts)
        grid = grid_of(owners)[:, 3 - columns :]
        patches = filled(owners.repeat_interleave(grid.prod(-1)), 4)
        pixels, grids = chunk_vlm_media(patches, grid, batch_size, parts, counts)
        assert [samples_in(part) for part in pixels] == with_media(rows_of_torch(batch_size, parts), counts)
        assert [len(part) for part in pixels] == [int(part.prod(-1).sum()) for part in grids]
        assert torch.equal(torch.cat(grids), grid)

    @pytest.mark.parametrize(("batch_size", "parts"), SIZES)
    @pytest.mark.parametrize("shape", [(4,), (3, 2, 2)], ids=["flat", "Kimi's"])
    def test_patches_of_an_image_per_sample(self, batch_size: int, parts: int, shape: tuple[int, ...]) -> None:
        owners = torch.arange(batch_size)
        grid = grid_of(owners)
        pixels, grids = chunk_vlm_media(
            filled(owners.repeat_interleave(grid.prod(-1)), *shape), grid, batch_size, parts
        )
        assert [samples_in(part) for part in pixels] == rows_of_torch(batch_size, parts)
        assert [len(part) for part in pixels] == [int(part.prod(-1).sum()) for part in grids]

    @pytest.mark.parametrize(("batch_size", "parts"), SIZES)
    def test_images_of_several_sizes(self, batch_size: int, parts: int) -> None:
        """Defect 2B.9: a list of images has no shape."""
        counts = counts_of(batch_size)
        owners = owners_of(counts)
        images = [torch.full((3, 4 + number, 4), float(owner)) for number, owner in enumerate(owners)]
        sizes = torch.tensor([image.shape[1:] for image in images])
        pixels, _ = chunk_vlm_media(images, sizes, batch_size, parts, counts)
        assert [samples_in(part) for part in pixels] == with_media(rows_of_torch(batch_size, parts), counts)

    @pytest.mark.parametrize(("batch_size", "parts"), SIZES)
    @pytest.mark.parametrize("flat", [False, True], ids=["whole", "crops"])
    def test_step3(self, batch_size: int, parts: int, flat: bool) -> None:
        counts = counts_of(batch_size) + flat  # as many crops as samples would be images of samples
        owners = owners_of(counts)
        chunks = chunk_step3_media(
            filled(owners if flat else torch.arange(batch_size), 3, 4, 4),
            batch_size=batch_size,
            n_microbatches=parts,
            num_patches=counts,
            patch_pixel_values=filled(owners, 3, 2, 2),
            patch_newline_mask=owners % 2 == 0,
        )
        rows = rows_of_torch(batch_size, parts)
        crops = with_media(rows, counts)
        assert [samples_in(part) for part in chunks["pixel_values"]] == (crops if flat else rows)
        assert [part.tolist() for part in chunks["num_patches"]] == [counts[part].tolist() for part in rows]
        assert [samples_in(part) for part in chunks["patch_pixel_values"]] == crops
        assert torch.equal(torch.cat(chunks["patch_newline_mask"]), owners % 2 == 0)
        sizes = [len(part) for part in chunks["patch_pixel_values"]]
        assert [len(part) for part in chunks["patch_newline_mask"]] == sizes

    def test_as_many_images_as_samples_are_not_one_each(self) -> None:
        """Defect 2B.8: two images of sample 0 and none of sample 1 became one and one."""
        pixels, grids = chunk_vlm_media(torch.ones(2, 3, 4, 4), torch.ones(2, 2), 2, 2, torch.tensor([2, 0]))
        assert [len(part) for part in pixels] == [len(part) for part in grids] == [2, 0]
        chunks = chunk_step3_media(
            torch.ones(2, 3, 4, 4), batch_size=2, n_microbatches=2, n_images_per_sample=torch.tensor([0, 2])
        )
        assert [len(part) for part in chunks["pixel_values"]] == [0, 2]

    def test_parts_share_memory_with_the_whole(self) -> None:
        pixels = torch.zeros(4, 3, 2, 2)
        parts, _ = chunk_vlm_media(pixels, torch.ones(4, 2), 4, 2)
        pixels += 1
        assert all(torch.equal(part, torch.ones_like(part)) for part in parts)


class TestShapesThatDoNotGoTogether:
    @pytest.mark.parametrize(
        ("pixels", "grid", "counts"),
        [
            (torch.ones(7, 4), torch.ones(3, 2), None),  # 3 images of 4 samples, without counts
            (torch.ones(7, 4), torch.full((4, 2), 2), None),  # 16 patches are expected
            (torch.ones(3, 5, 4), torch.ones(3, 5, 2), torch.tensor([1, 1, 1])),  # 3 counts
            (torch.ones(3, 5, 4), torch.ones(3, 5, 2), torch.tensor([1, 1, 1, 1])),  # that add up to 4
            (torch.ones(7, 5, 4), torch.ones(4, 5, 2), torch.tensor([1, 1, 1, 1])),  # no grid of patches
        ],
    )
    def test_images(self, pixels: Tensor, grid: Tensor, counts: Tensor | None) -> None:
        with pytest.raises(ValueError, match="do not go together in a batch of 4") as caught:
            chunk_vlm_media(pixels, grid, 4, 2, counts)
        told = "None (one each)" if counts is None else str(counts.tolist())
        for part in (str(tuple(pixels.shape)), str(tuple(grid.shape)), told, "n_images_per_sample"):
            assert part in str(caught.value)

    @pytest.mark.parametrize("n_microbatches", [0, -1])
    def test_no_microbatch(self, n_microbatches: int) -> None:
        match = f"n_microbatches is {n_microbatches}; expected at least 1"
        with pytest.raises(ValueError, match=match):
            chunk_vlm_media(torch.ones(2, 3, 4, 4), torch.ones(2, 2), 2, n_microbatches)
        with pytest.raises(ValueError, match=match):
            chunk_step3_media(torch.ones(2, 3, 4, 4), 2, n_microbatches)
        with pytest.raises(ValueError, match=match):
            prepare_vlm_media_for_pp({"input_ids": torch.ones(2, 3)}, 2, n_microbatches)
        with pytest.raises(ValueError, match=match):
            wrap_vlm_collate_for_pp(dict, n_microbatches)

    def test_step3(self) -> None:
        pixels = torch.ones(2, 3, 4, 4)
        with pytest.raises(ValueError, match=r"num_patches is \(3,\); expected \(2,\)"):
            chunk_step3_media(pixels, 2, 2, torch.tensor([1, 0, 2]))
        with pytest.raises(ValueError, match=r"\(5, 3, 4, 4\) in a batch of 2, with num_patches \[1, 3\]"):
            chunk_step3_media(torch.ones(5, 3, 4, 4), 2, 2, torch.tensor([1, 3]))
        with pytest.raises(ValueError, match=r"\(5, 3, 4, 4\) in a batch of 2, with num_patches \[0, 0\]"):
            chunk_step3_media(torch.ones(5, 3, 4, 4), 2, 2)
        with pytest.raises(ValueError, match=r"n_images_per_sample \[2, 1\]"):
            chunk_step3_media(pixels, 2, 2, n_images_per_sample=torch.tensor([2, 1]))
        with pytest.raises(ValueError, match=r"n_images_per_sample \[2\]"):
            chunk_step3_media(pixels, 2, 2, n_images_per_sample=torch.tensor([2]))

    @pytest.mark.parametrize("name", ["patch_pixel_values", "patch_newline_mask"])
    def test_crops_that_no_number_tells_of(self, name: str) -> None:
        with pytest.raises(ValueError, match=rf"{name} is \(3,\) but num_patches tells of 0 crops"):
            chunk_step3_media(torch.ones(2, 3, 4, 4), 2, 2, **{name: torch.ones(3)})

    def test_step3_without_crops(self) -> None:
        chunks = chunk_step3_media(torch.ones(3, 3, 4, 4), 3, 2)
        assert {name: [len(part) for part in parts] for name, parts in chunks.items()} == {
            "pixel_values": [2, 1],
            "num_patches": [2, 1],
        }
        assert torch.cat(chunks["num_patches"]).tolist() == [0, 0, 0]

    def test_samples_that_hold_their_images_are_whole(self) -> None:
        chunks = chunk_step3_media(
            torch.ones(2, 3, 3, 4, 4), 2, 2, torch.tensor([9, 4]), n_images_per_sample=torch.tensor([3, 1])
        )
        assert [part.shape[0] for part in chunks["pixel_values"]] == [1, 1]

    def test_crops_beside_counts(self) -> None:
        chunks = chunk_step3_media(
            torch.ones(5, 3, 4, 4), 2, 2, torch.tensor([4, 1]), n_images_per_sample=torch.tensor([1, 1])
        )
        assert [part.shape[0] for part in chunks["pixel_values"]] == [4, 1]


def images_and_videos() -> Dict:
    """4 samples with 1, 0, 2, 1 images of 4 patches, and 0, 2, 0, 1 videos of 2."""
    images, videos = torch.tensor([1, 0, 2, 1]), torch.tensor([0, 2, 0, 1])
    return {
        "input_ids": torch.arange(4)[:, None].expand(-1, 5),
        "labels": torch.zeros(4, 5),
        "pixel_values": filled(owners_of(images).repeat_interleave(4), 6),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * 4),
        "n_images_per_sample": images,
        "pixel_values_videos": filled(owners_of(videos).repeat_interleave(2), 6),
        "video_grid_thw": torch.tensor([[2, 1, 1]] * 3),
        "n_videos_per_sample": videos,
    }


class TestPrepare:
    def test_images_and_videos_each_by_their_counts(self) -> None:
        batch = images_and_videos()
        ids = batch["input_ids"]
        assert prepare_vlm_media_for_pp(batch, 4, 2) is batch
        assert list(batch) == ["input_ids", "labels", VLM_PP_MEDIA_KEY]
        assert batch["input_ids"] is ids
        chunks = batch[VLM_PP_MEDIA_KEY]
        assert VLM_PP_MEDIA_KEY == "_vlm_pp_media_chunks"
        assert {
            name: [samples_in(part) for part in chunks[name]] for name in ("pixel_values", "pixel_values_videos")
        } == {
            "pixel_values": [[0], [2, 3]],
            "pixel_values_videos": [[1], [3]],
        }
        assert [len(part) for part in chunks["image_grid_hws"]] == [1, 3]
        assert [len(part) for part in chunks["video_grid_thw"]] == [2, 1]
        assert set(chunks) == {"pixel_values", "image_grid_hws", "pixel_values_videos", "video_grid_thw"}

    def test_a_batch_without_media_is_as_it_was(self) -> None:
        batch: Dict = {"input_ids": torch.ones(4, 3), "labels": None}
        assert prepare_vlm_media_for_pp(batch, 4, 2) is batch
        assert list(batch) == ["input_ids", "labels"]

    def test_media_that_are_none_leave_nothing(self) -> None:
        batch: Dict = {"input_ids": torch.ones(4, 3), "pixel_values": None, "image_grid_thw": None}
        assert list(prepare_vlm_media_for_pp(batch, 4, 2)) == ["input_ids"]
        text = {"input_ids": torch.ones(4, 3), "image_sizes": torch.tensor([]), "num_patches": torch.zeros(4)}
        assert list(prepare_vlm_media_for_pp(text, 4, 2)) == ["input_ids"], "Phi-4's empty sizes"

    @pytest.mark.parametrize("first", range(4))
    def test_the_first_grid_counts_and_is_stored_under_one_name(self, first: int) -> None:
        names = ["image_grid_hws", "image_grid_thw", "image_sizes", "image_position_ids"][first:]
        batch: Dict = {name: torch.full((2, 2), number) for number, name in reversed(list(enumerate(names)))}
        batch["pixel_values"] = torch.ones(2, 3, 4, 4)
        prepare_vlm_media_for_pp(batch, 2, 2)
        assert list(batch) == [VLM_PP_MEDIA_KEY]
        chunks = batch[VLM_PP_MEDIA_KEY]
        assert [part.tolist() for part in chunks["image_grid_hws"]] == [[[0, 0]], [[0, 0]]]
        assert set(chunks) == {"pixel_values", "image_grid_hws"}

    def test_padded_patches_with_their_positions(self) -> None:
        positions = torch.arange(3).view(3, 1, 1).expand(3, 5, 2)
        batch: Dict = {
            "pixel_values": torch.ones(3, 5, 6),
            "image_position_ids": positions,
            "n_images_per_sample": torch.tensor([0, 3]),
        }
        chunks = prepare_vlm_media_for_pp(batch, 2, 2)[VLM_PP_MEDIA_KEY]
        assert [len(part) for part in chunks["pixel_values"]] == [0, 3]
        assert torch.equal(chunks["image_grid_hws"][1], positions)

    def test_without_a_grid_images_are_step3s(self) -> None:
        batch: Dict = {
            "pixel_values": filled(torch.arange(3), 3, 4, 4),
            "num_patches": torch.tensor([2, 0, 1]),
            "patch_pixel_values": filled(torch.tensor([0, 0, 2]), 3, 2, 2),
            "patch_newline_mask": torch.tensor([True, False, True]),
        }
        prepare_vlm_media_for_pp(batch, 3, 2)
        assert list(batch) == [VLM_PP_MEDIA_KEY]
        chunks = batch[VLM_PP_MEDIA_KEY]
        assert [samples_in(part) for part in chunks["pixel_values"]] == [[0, 1], [2]]
        assert [part.tolist() for part in chunks["num_patches"]] == [[2, 0], [1]]
        assert [samples_in(part) for part in chunks["patch_pixel_values"]] == [[0], [2]]
        assert [part.tolist() for part in chunks["patch_newline_mask"]] == [[True, False], [True]]

    def test_without_a_grid_counts_hold(self) -> None:
        """Gemma 3 has images of one size, no grid, and any number per sample."""
        counts = torch.tensor([0, 2, 1])
        batch: Dict = {"pixel_values": filled(owners_of(counts), 3, 4, 4), "n_images_per_sample": counts}
        chunks = prepare_vlm_media_for_pp(batch, 3, 3)[VLM_PP_MEDIA_KEY]
        assert [samples_in(part) for part in chunks["pixel_values"]] == [[], [1], [2]]

    @pytest.mark.parametrize(
        ("batch", "match"),
        [
            ({"pixel_values_videos": torch.ones(8, 6)}, r"pixel_values_videos \(8, 6\) without video_grid_thw"),
            ({"video_grid_thw": torch.ones(2, 3)}, r"video_grid_thw \(2, 3\) without pixel_values_videos"),
            ({"image_grid_thw": torch.ones(2, 3)}, r"image_grid_thw \(2, 3\) without pixel_values"),
            ({"patch_pixel_values": torch.ones(2, 3)}, r"patch_pixel_values \(2, 3\) without pixel_values"),
            (
                {
                    "pixel_values": torch.ones(2, 3),
                    "image_sizes": torch.ones(2, 2),
                    "patch_pixel_values": torch.ones(5, 3),
                },
                r"patch_pixel_values \(5, 3\) beside an image grid",
            ),
        ],
    )
    def test_a_part_without_its_whole_is_not_dropped(self, batch: Dict, match: str) -> None:
        """Defect 2A.14: a grid without pixels, and crops without images, vanish."""
        with pytest.raises(ValueError, match=match):
            prepare_vlm_media_for_pp(batch, 2, 2)


def collate(examples: list[int]) -> Dict:
    """One image of one patch per sample."""
    owners = torch.tensor(examples)
    return {
        "input_ids": owners[:, None].repeat(1, 3),
        "pixel_values": filled(owners, 4),
        "image_grid_thw": torch.ones(len(owners), 3, dtype=torch.int64),
    }


class TestWrap:
    def test_batches_come_prepared_from_workers(self) -> None:
        wrapped = pickle.loads(pickle.dumps(wrap_vlm_collate_for_pp(collate, 2)))
        data: Any = list(range(7))
        for batch in DataLoader(data, batch_size=4, collate_fn=wrapped, num_workers=1):  # the last one has 3
            assert set(batch) == {"input_ids", VLM_PP_MEDIA_KEY}
            (first,), (second,) = split_args_kwargs_into_chunks((batch["input_ids"],), None, 2)[0]
            parts = batch[VLM_PP_MEDIA_KEY]["pixel_values"]
            assert [samples_in(part) for part in parts] == [first[:, 0].tolist(), second[:, 0].tolist()]

    def test_what_is_no_batch_or_has_no_media_is_left(self) -> None:
        text = {"input_ids": torch.ones(2, 3)}
        assert wrap_vlm_collate_for_pp(lambda _: text, 2)([]) is text
        assert list(text) == ["input_ids"]
        rows: Any = [1, 2]
        assert wrap_vlm_collate_for_pp(lambda _: rows, 2)([]) is rows

    def test_a_processors_own_mapping_is_a_batch(self) -> None:
        batch = wrap_vlm_collate_for_pp(lambda examples: UserDict(collate(examples)), 2)([0, 1, 2])
        assert [samples_in(part) for part in batch[VLM_PP_MEDIA_KEY]["pixel_values"]] == [[0, 1], [2]]

    def test_media_without_tokens(self) -> None:
        with pytest.raises(ValueError, match="has pixel_values, image_sizes but no input_ids"):
            wrap_vlm_collate_for_pp(lambda _: {"image_sizes": [], "pixel_values": []}, 2)([])


class FirstStage(nn.Module):
    """Takes its media as NeMo's models do; tells which tokens met which media."""

    _vlm_pixel_values_chunks: list[Tensor]
    _vlm_chunk_idx: int

    def __init__(self, reads: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.reads = reads
        self.met: list[tuple[list[int], list[int]]] = []

    def forward(self, ids: Tensor) -> Tensor:
        if self.reads:
            pixels = self._vlm_pixel_values_chunks[self._vlm_chunk_idx]
            self.met.append((ids[:, 0].int().tolist(), pixels[:, 0].int().tolist()))
            self._vlm_chunk_idx += 1
        return ids * self.scale


def staged(module: nn.Module) -> Dict:
    return {name: getattr(module, name) for name in STAGED if hasattr(module, name)}


def pipeline(first: bool = True, **schedule: Any) -> Any:
    return SimpleNamespace(info=SimpleNamespace(has_first_stage=first, schedule=SimpleNamespace(**schedule)))


class TestStage:
    def test_the_first_module_has_the_media_for_one_call(self) -> None:
        batch = prepare_vlm_media_for_pp(images_and_videos(), 4, 2)
        chunks = batch[VLM_PP_MEDIA_KEY]
        parts: list[nn.Module] = [FirstStage(), FirstStage()]
        with stage_vlm_media_for_pp(pipeline(), parts, batch) as given:
            assert given is batch
            assert VLM_PP_MEDIA_KEY not in batch
            expected = {f"_vlm_{key}_chunks": chunks.get(key) for key in (*IMAGE_KEYS, *VIDEO_KEYS)}
            found = staged(parts[0])
            assert found.pop("_vlm_chunk_idx") == 0
            assert all(found[name] is value for name, value in expected.items())
            assert set(found) == set(expected)
            assert staged(parts[1]) == {}
        assert staged(parts[0]) == dict.fromkeys(STAGED)
        assert not parts[0]._forward_hooks

    def test_crops_are_staged(self) -> None:
        batch: Dict = {
            "pixel_values": torch.ones(2, 3, 4, 4),
            "num_patches": torch.tensor([1, 1]),
            "patch_pixel_values": torch.ones(2, 3, 2, 2),
            "patch_newline_mask": torch.ones(2),
        }
        module = FirstStage()
        with stage_vlm_media_for_pp(pipeline(), [module], prepare_vlm_media_for_pp(batch, 2, 2)):
            names = [name for name, value in staged(module).items() if value is not None]
        assert names == [
            *(
                f"_vlm_{key}_chunks"
                for key in ("pixel_values", "num_patches", "patch_pixel_values", "patch_newline_mask")
            ),
            "_vlm_chunk_idx",
        ]

    def test_nothing_stays_after_an_error(self) -> None:
        module = FirstStage()
        batch = wrap_vlm_collate_for_pp(collate, 2)([0, 1])
        with pytest.raises(OSError, match="a rank is gone"), stage_vlm_media_for_pp(pipeline(), [module], batch):
            raise OSError("a rank is gone")
        assert staged(module) == dict.fromkeys(STAGED)
        assert not module._forward_hooks

    def test_other_ranks_lose_the_media_and_set_nothing(self) -> None:
        module = FirstStage()
        batch = wrap_vlm_collate_for_pp(collate, 2)([0, 1])
        with stage_vlm_media_for_pp(pipeline(first=False), [module], batch):
            assert list(batch) == ["input_ids"]
            assert staged(module) == {}
        assert staged(module) == {}

    def test_text_does_nothing(self) -> None:
        module, batch = FirstStage(), {"input_ids": torch.ones(2, 3)}
        with stage_vlm_media_for_pp(None, [module], batch) as given:
            assert given is batch
            assert staged(module) == {}
            assert not module._forward_hooks
        assert staged(module) == {}

    def test_a_pipeline_that_shows_no_schedule(self) -> None:
        module, batch = FirstStage(), wrap_vlm_collate_for_pp(collate, 2)([0, 1])
        with stage_vlm_media_for_pp(SimpleNamespace(info=SimpleNamespace(has_first_stage=True)), [module], batch):
            module(torch.zeros(1, 1))
            assert module._vlm_chunk_idx == 1

    @pytest.mark.parametrize("first", [True, False])
    def test_another_number_of_microbatches_is_refused_on_every_rank(self, first: bool) -> None:
        module, batch = FirstStage(), wrap_vlm_collate_for_pp(collate, 2)([0, 1, 2])
        with (
            pytest.raises(ValueError, match=r"cut into 2 parts but the schedule has 3 .* n_microbatches=3"),
            stage_vlm_media_for_pp(pipeline(first, _n_microbatches=3), [module], batch),
        ):
            raise AssertionError("unreachable")
        assert staged(module) == {}

    @pytest.mark.parametrize("name", ["_stage_forward_initialized", "_stages_forward_initialized"])
    def test_only_the_first_forward_can_be_for_shapes(self, name: str) -> None:
        module, batch = FirstStage(), wrap_vlm_collate_for_pp(collate, 3)([0, 1, 2])
        found = []
        with stage_vlm_media_for_pp(pipeline(**{name: False}), [module], batch):
            for _ in range(3):
                module(torch.zeros(1, 1))
                found.append(module._vlm_chunk_idx)
        assert found == [0, 1, 2]

    def test_an_older_schedule_does_not_look_again_for_evaluation(self) -> None:
        """Before torch 2.13 a schedule that was trained keeps its marks, and the first forward is a real one."""
        marks = {"_stage_forward_initialized": True, "_stage_backward_initialized": True, "_has_backward": False}
        module, batch = FirstStage(), wrap_vlm_collate_for_pp(collate, 3)([0, 1, 2])
        with stage_vlm_media_for_pp(pipeline(**marks), [module], batch):
            module(torch.zeros(1, 1))
            assert module._vlm_chunk_idx == 1


def run_schedules(kind: str, samples: int, rank: int) -> list[Any]:
    """A real pipeline of one process: trains twice, evaluates twice and trains; what met in each call.

    The looped one only trains: torch 2.13 fails to evaluate two stages of one process that do not communicate.
    """
    first, parts = FirstStage(), 4
    example = torch.zeros(samples // parts, 3)
    shapes: Dict = {"input_args": example, "output_args": example} if kind == "static" else {}
    modules: list[nn.Module] = [first, FirstStage(reads=False)] if kind == "looped" else [first]
    stages: list[Any] = [
        PipelineStage(module, index, len(modules), torch.device("cpu"), **shapes)
        for index, module in enumerate(modules)
    ]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum()

    schedule: Any = (
        ScheduleLoopedBFS(stages, parts, loss) if kind == "looped" else ScheduleGPipe(stages[0], parts, loss)
    )
    pp = SimpleNamespace(info=SimpleNamespace(has_first_stage=True, schedule=schedule))
    calls = []
    for call, evaluates in enumerate([False, False] if kind == "looped" else [False, False, True, True, False]):
        owners = list(range(10 * call, 10 * call + samples))
        batch = wrap_vlm_collate_for_pp(collate, parts)(owners)
        ids = batch["input_ids"].float()
        with stage_vlm_media_for_pp(pp, modules, batch):
            (schedule.eval if evaluates else schedule.step)(ids, target=ids)
        calls.append(first.met)
        first.met = []
    return calls


@pytest.mark.parametrize(
    ("kind", "samples", "extra"),
    [
        ("dynamic", 8, [1, 0, 1, 0, 1]),
        ("dynamic", 6, [1, 0, 1, 0, 1]),  # 2, 2, 1, 1
        ("looped", 8, [1, 0]),
        ("static", 8, [0, 0, 0, 0, 0]),
    ],
)
def test_torchs_own_schedules_pair_tokens_with_media(kind: str, samples: int, extra: list[int], tmp_path: Path) -> None:
    """The first forward of a call may be for shapes alone: another one meets the same media after it."""
    (calls,) = run_ranks(partial(run_schedules, kind, samples), tmp_path, ranks=1)
    for call, (met, probes) in enumerate(zip(calls, extra, strict=True)):
        expected = [[10 * call + sample for sample in part] for part in rows_of_torch(samples, 4)]
        assert [ids for ids, _ in met] == expected[:probes] + expected
        assert all(ids == media for ids, media in met)
