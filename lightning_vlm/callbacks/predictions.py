"""PredictionTable: what the model answered, beside what it saw, for people to look at.

After validation and test it writes an HTML page (self-contained, images as the model saw them, a few frames of videos,
spectrograms of sounds) and, with a W&B logger, a table; after prediction also a JSONL file with every answer. The same
samples each time, so pages compare.
"""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor

from lightning_vlm.data.preview_page import data_uri
from lightning_vlm.data.preview_sound import draw_spectrogram
from lightning_vlm.media.frames import patches_to_frames
from lightning_vlm.media.image import patches_to_pixels
from lightning_vlm.schema import VLMBatch, file_of
from lightning_vlm.strategies.ranks import data_ranks
from lightning_vlm.training.metrics import SCORES

MOST_FRAMES = 4
"""Frames that are shown of a video."""

_FRAME_SIDE = 128  # larger frames are reduced: a page holds those of many rows


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answered prompt.

    Attributes:
        source: ``file:line``.
        prompt: The prompt as text.
        references: Accepted answers; empty when the row holds none.
        answer: The model's answer.
        scores: Score by name; empty without references.
        images: What the model saw and heard: images, then frames of videos, then spectrograms of sounds.
    """

    source: str
    prompt: str
    references: tuple[str, ...]
    answer: str
    scores: dict[str, float]
    images: tuple[Image.Image, ...]


class PredictionTable(L.Callback):
    """Collects predictions of evaluation loops and writes them into the run folder.

    Args:
        max_rows: Rows of the page and the W&B table: the first ones of each data file, as rank 0 sees them.
        folder: Where files go; the Trainer's ``default_root_dir`` by default.
    """

    def __init__(self, max_rows: int = 40, folder: str | None = None) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}; expected at least 1")
        self.max_rows = max_rows
        self.folder = folder
        self._rows: dict[str, list[Prediction]] = {}
        self._lines: list[dict[str, Any]] = []

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets the last page."""
        self._clear()

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets the last page."""
        self._clear()

    def on_predict_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets the last page."""
        self._clear()

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: VLMBatch, *args: Any
    ) -> None:
        """Keeps some of the batch's predictions."""
        self._collect(trainer, pl_module, outputs, batch)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: VLMBatch, *args: Any
    ) -> None:
        """Keeps some of the batch's predictions."""
        self._collect(trainer, pl_module, outputs, batch)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: VLMBatch, *args: Any
    ) -> None:
        """Keeps every answer, and some with their media."""
        self._collect(trainer, pl_module, outputs, batch)
        self._lines += [
            {"source": source, "prompt": prompt, "answer": answer}
            for source, prompt, answer, counted in zip(
                batch.sources, batch.prompts, outputs["answers"], batch.counted.tolist(), strict=True
            )
            if counted
        ]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the page and the W&B table."""
        if not trainer.sanity_checking:
            self._write(trainer, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the page and the W&B table."""
        self._write(trainer, "test")

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes ``predictions.jsonl``, in the order of the data, and the page."""
        lines = self._lines
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, (data_ranks(trainer)[1], lines))
            lines = [line for part in dict(gathered).values() for line in part]  # ranks with the same data: once
        if trainer.is_global_zero:
            path = self._path(trainer, "predictions.jsonl")
            lines.sort(key=lambda line: _position(line["source"], trainer))
            path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
            rank_zero_info(f"{len(lines)} answers: {path}")
        self._write(trainer, "predict")

    def _clear(self) -> None:
        self._rows, self._lines = {}, []

    def _collect(self, trainer: L.Trainer, module: Any, outputs: Any, batch: VLMBatch) -> None:
        if not trainer.is_global_zero or not outputs or "answers" not in outputs:
            return
        # A patch does not tell of how many frames it is; the model knows.
        frames_per_tubelet = 1 if batch.pixel_values_videos is None else module.model.config.frames_per_tubelet
        for row, source in enumerate(batch.sources):
            kept = self._rows.setdefault(file_of(source), [])
            if len(kept) < self.max_rows and batch.counted[row]:
                images = [
                    *sample_images(batch, row),
                    *sample_frames(batch, row, frames_per_tubelet),
                    *sample_spectrograms(batch, row),
                ]
                kept.append(_prediction(batch, row, outputs["answers"][row], trainer.predicting, tuple(images)))

    def _chosen(self) -> list[Prediction]:
        """The kept rows, one of each file in turn."""
        turns = zip_longest(*self._rows.values())
        return [row for turn in turns for row in turn if row is not None][: self.max_rows]

    def _write(self, trainer: L.Trainer, split: str) -> None:
        rows = self._chosen()
        if not trainer.is_global_zero or not rows:
            return
        path = self._path(trainer, f"predictions_{split}.html")
        origin = f"of {trainer.ckpt_path}" if split != "val" and trainer.ckpt_path else f"at step {trainer.global_step}"
        path.write_text(render_page(rows, f"{split} {origin}"), encoding="utf-8")
        if split != "val":
            rank_zero_info(f"predictions with images: {path}")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                _log_wandb_table(logger, rows, split, trainer.global_step)

    def _path(self, trainer: L.Trainer, name: str) -> Path:
        folder = Path(self.folder or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name


def sample_images(batch: VLMBatch, row: int) -> list[Image.Image]:
    """The images of one row as the model saw them.

    Args:
        batch: A batch with uint8 patches.
        row: The row.
    """
    if batch.pixel_values is None or batch.image_grid_hw is None or batch.pixel_values.dtype != torch.uint8:
        return []
    grids = [tuple(grid) for grid in batch.image_grid_hw.tolist()]
    first = int(batch.num_images[:row].sum())
    start = sum(rows * columns for rows, columns in grids[:first])
    images = []
    for rows, columns in grids[first : first + int(batch.num_images[row])]:
        patches = batch.pixel_values[start : start + rows * columns].cpu()
        start += rows * columns
        images.append(_to_image(patches, (rows, columns)))
    return images


def sample_frames(batch: VLMBatch, row: int, frames_per_tubelet: int) -> list[Image.Image]:
    """A few frames of each video of one row, evenly taken and, where they are large, reduced.

    Args:
        batch: A batch with uint8 patches.
        row: The row.
        frames_per_tubelet: Frames that share a patch.
    """
    patches, grids, counts = batch.pixel_values_videos, batch.video_grid_thw, batch.num_videos
    if patches is None or grids is None or counts is None or patches.dtype != torch.uint8:
        return []
    own = slice(int(counts[:row].sum()), int(counts[: row + 1].sum()))
    videos = patches.split(grids.prod(dim=1).tolist())
    shown = []
    for video, (_, rows, columns) in zip(videos[own], grids.tolist()[own], strict=True):
        frames = patches_to_frames(video.cpu(), (rows, columns), frames_per_tubelet)
        chosen = torch.linspace(0, len(frames) - 1, min(MOST_FRAMES, len(frames))).round().long()
        shown += [Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in frames[chosen]]
    for picture in shown:
        picture.thumbnail((_FRAME_SIDE, _FRAME_SIDE))
    return shown


def sample_spectrograms(batch: VLMBatch, row: int) -> list[Image.Image]:
    """What the model heard in one row: a picture of all its clips, one after another; none without a sound.

    Args:
        batch: A batch.
        row: The row.
    """
    features, mask, counts = batch.input_features, batch.input_features_mask, batch.num_clips
    if features is None or mask is None or counts is None or not counts[row]:
        return []
    own = slice(int(counts[:row].sum()), int(counts[: row + 1].sum()))
    return [draw_spectrogram(features[own][mask[own]].float().cpu().numpy())]


def render_page(rows: list[Prediction], title: str) -> str:
    """A self-contained HTML page of predictions.

    Args:
        rows: The predictions.
        title: Shown on top.
    """
    names = list(SCORES)
    head = "".join(f"<th>{name}</th>" for name in ("media", "prompt", "target", "answer", *names))
    body = "".join(_render_row(row, names) for row in rows)
    means = {name: [row.scores[name] for row in rows if name in row.scores] for name in names}
    summary = ", ".join(f"{name} {sum(values) / len(values):.3f}" for name, values in means.items() if values)
    return _PAGE.format(
        title=html.escape(title), count=len(rows), most_frames=MOST_FRAMES, summary=summary, head=head, body=body
    )


def _position(source: str, trainer: L.Trainer) -> tuple[int, str, int]:
    """Sorts places as the config lists their files."""
    files = [str(Path(file)) for file in getattr(trainer.datamodule, "files", {}).get("predict", [])]
    file = file_of(source)
    return files.index(file) if file in files else len(files), file, int(source.rpartition(":")[2])


def _prediction(
    batch: VLMBatch, row: int, answer: str, predicting: bool, images: tuple[Image.Image, ...]
) -> Prediction:
    references = () if predicting else batch.references[row]
    scores = {
        name: max(score.score(answer, reference) for reference in references)
        for name, score in SCORES.items()
        if references
    }
    return Prediction(batch.sources[row], batch.prompts[row], references, answer, scores, images)


def _to_image(patches: Tensor, grid: tuple[int, int]) -> Image.Image:
    patch_size = round((patches.shape[-1] / 3) ** 0.5)
    return Image.fromarray(patches_to_pixels(patches, grid, patch_size).permute(1, 2, 0).contiguous().numpy())


def _side_by_side(images: tuple[Image.Image, ...]) -> Image.Image:
    """One picture of several: a W&B table shows one image per cell."""
    sheet = Image.new("RGB", (sum(image.width + 4 for image in images) - 4, max(image.height for image in images)))
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + 4
    return sheet


def _render_row(row: Prediction, names: list[str]) -> str:
    images = "".join(f'<img src="{data_uri(image)}">' for image in row.images) or "<i>text only</i>"
    right = row.scores.get("exact_match", 0.0) == 1.0
    cells = [
        f"<td class=media>{images}</td>",
        f"<td><pre>{html.escape(row.prompt)}</pre><small>{html.escape(row.source)}</small></td>",
        f"<td><pre>{html.escape(' | '.join(row.references))}</pre></td>",
        f"<td class={'right' if right or not row.scores else 'wrong'}><pre>{html.escape(row.answer)}</pre></td>",
        *(f"<td>{row.scores[name]:.2f}</td>" if name in row.scores else "<td></td>" for name in names),
    ]
    return f"<tr>{''.join(cells)}</tr>\n"


def _log_wandb_table(logger: WandbLogger, rows: list[Prediction], split: str, step: int) -> None:
    import wandb

    names = list(SCORES)
    table = [
        [
            step,
            row.source,
            wandb.Image(_side_by_side(row.images)) if row.images else None,
            row.prompt,
            " | ".join(row.references),
            row.answer,
            *(row.scores.get(name) for name in names),
        ]
        for row in rows
    ]
    columns = ["step", "source", "images", "prompt", "target", "answer", *names]
    logger.log_table(f"{split}/predictions", columns=columns, data=table)


_PAGE = """<!doctype html>
<meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em; color: #222; }}
table {{ border-collapse: collapse; }}
th, td {{ border-bottom: 1px solid #ddd; padding: .5em .8em; text-align: left; vertical-align: top; }}
th {{ position: sticky; top: 0; background: #fff; }}
pre {{ margin: 0; font: 13px/1.4 ui-monospace, monospace; white-space: pre-wrap; }}
small {{ color: #999; }}
.media img {{ height: 64px; margin-right: 6px; image-rendering: pixelated; border: 1px solid #ddd; }}
.right pre {{ color: #137333; font-weight: 600; }}
.wrong pre {{ color: #b3261e; font-weight: 600; }}
</style>
<h1>{title}</h1>
<p>{count} rows, images as the model saw them, at most {most_frames} frames of a video. {summary}</p>
<table><thead><tr>{head}</tr></thead><tbody>
{body}</tbody></table>
"""
