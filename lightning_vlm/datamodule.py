"""VLMDataModule: from files to batches. Owns the three selections: sampler, packing, collate.

Built from plain values, does no work before `setup`, touches no device. Without a Trainer it serves one process:
``dm.setup("fit"); batch = next(iter(dm.train_dataloader()))``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus

from lightning_vlm.checkpoint.source import pretrained_source
from lightning_vlm.data.collate import PaddedCollate
from lightning_vlm.data.dataset import SampleDataset
from lightning_vlm.data.loader import ResumableLoader
from lightning_vlm.data.samplers import EpochPlan, SamplerName
from lightning_vlm.data.sources import JsonlSource, open_sources
from lightning_vlm.media.load import MediaPolicy
from lightning_vlm.processing.processor import NemotronVLProcessor
from lightning_vlm.schema import DataError

_LATER: dict[str, dict[Any, Any]] = {
    "sampler": {"length_grouped": "shuffle", "token_budget": "shuffle"},
    "packing": {True: False},
    "collate": {"packed": "padded"},
}
_NOW: dict[str, tuple[Any, ...]] = {"sampler": ("shuffle", "sequential"), "packing": (False,), "collate": ("padded",)}

Files = str | list[str] | None


class VLMDataModule(L.LightningDataModule):
    """Data of a vision-language model.

    Args:
        train: JSONL file or files to train on.
        val: Files to validate on while training.
        test: Files to test on.
        predict: Files whose last user turn is to be answered.
        processor: Folder or repository name of a processor, or a `NemotronVLProcessor`.
        media_root: Folder that image paths start from and may not leave; each file's own folder by default.
        batch_size: Samples per device and micro-batch.
        eval_batch_size: The same for validation, test and prediction; ``batch_size`` by default.
        max_tokens: Longest sample in tokens; a longer one is an error that names it.
        num_workers: Processes that decode images; 0 decodes in the training process.
        sampler: ``shuffle`` (a new order each epoch) or ``sequential``. Evaluation is always sequential.
        packing: ``False``; packing is not available yet.
        collate: ``padded``.
        seed: Seed of the order.
        max_image_pixels: Most pixels of one image, checked before decoding.
        allow_urls: Download images that rows name by URL. Off: such rows are errors.
        template_kwargs: Extra chat-template variables, e.g. ``{enable_thinking: false}``.

    Raises:
        ValueError: If a selection is unknown.
        NotImplementedError: If a selection is planned but not available yet.
    """

    def __init__(
        self,
        train: Files = None,
        val: Files = None,
        test: Files = None,
        predict: Files = None,
        processor: Any = None,
        media_root: str | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_tokens: int | None = None,
        num_workers: int = 0,
        sampler: str = "shuffle",
        packing: bool = False,
        collate: str = "padded",
        seed: int = 0,
        max_image_pixels: int = 64_000_000,
        allow_urls: bool = False,
        template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("sampler", sampler), ("packing", packing), ("collate", collate)):
            _check_selection(name, value)
        self.files = {"train": _listed(train), "val": _listed(val), "test": _listed(test), "predict": _listed(predict)}
        self.media_root = media_root
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.max_tokens = max_tokens
        self.num_workers = num_workers
        self.sampler: SamplerName = sampler  # type: ignore[assignment]
        self.packing = packing
        self.collate = collate
        self.seed = seed
        self.max_image_pixels = max_image_pixels
        self.allow_urls = allow_urls
        self.template_kwargs = template_kwargs
        self._processor = processor
        self._sources: dict[str, list[JsonlSource]] = {}
        self._train_loader: ResumableLoader | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def processor(self) -> NemotronVLProcessor:
        """The processor, loaded at first use.

        Raises:
            ValueError: If none was named.
            DataError: If it cannot be loaded.
        """
        if self._processor is None:
            raise ValueError(
                "VLMDataModule has no processor; name one: processor='folder', or pass a NemotronVLProcessor"
            )
        if not isinstance(self._processor, NemotronVLProcessor):
            name = pretrained_source(self._processor, "data.processor (by default model.model_id)")
            try:
                self._processor = NemotronVLProcessor.from_pretrained(name)
            except OSError as error:
                raise DataError(
                    "data.processor",
                    f"{name!r} holds no processor that can be loaded ({str(error).splitlines()[0]})",
                    "save one there with NemotronVLProcessor.save_pretrained, or name another folder",
                ) from error
        return self._processor

    def setup(self, stage: str | None = None) -> None:
        """Opens and checks the stage's files; a second call opens only what has changed on disk.

        Args:
            stage: ``fit``, ``validate``, ``test``, ``predict``, or ``None`` for all.

        Raises:
            DataError: If the stage has no files, or a file or a row is not acceptable.
        """
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
        if stage and not self.files[splits[stage][0]]:
            name = splits[stage][0]
            raise DataError(f"data.{name}", f"there are no {name} files, expected at least one", f"set data.{name}")
        for split in splits[stage] if stage else self.files:
            opened = self._sources.get(split)
            if opened is None or any(source.has_changed() for source in opened):
                self._sources[split] = open_sources(self.files[split], needs_answer=split != "predict")
        if stage == "fit":  # a fit starts at the beginning unless its checkpoint, restored after this, says otherwise
            self._train_loader = self._restored = None

    def groups(self, split: str) -> dict[str, str]:
        """The name that each file's scores are logged under: its stem, with its folder's name where stems are equal."""
        paths = [Path(file) for file in self.files[split]]
        stems = [path.stem for path in paths]
        return {
            str(path): path.stem if stems.count(path.stem) == 1 else f"{path.parent.name}_{path.stem}" for path in paths
        }

    def train_plan(self) -> EpochPlan:
        """The plan of training epochs: its length is the number of micro-batches of a rank."""
        overfits = self._is_fitting() and self.trainer.overfit_batches > 0
        return self._plan("train", self.batch_size, "sequential" if overfits else self.sampler)

    def train_dataloader(self) -> ResumableLoader:
        """Resumable batches to train on."""
        self._train_loader = self._loader(
            "train",
            self.train_plan(),
            micro_batches=lambda: self.trainer.accumulate_grad_batches if self._is_fitting() else 1,
            stop=lambda: int(self.trainer.num_training_batches) if self._is_fitting() else len(self.train_plan()),
        )
        if self._restored is not None:
            self._train_loader.load_state_dict(self._restored)
            self._restored = None
        return self._train_loader

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        """Batches to validate on."""
        return self._eval_loader("val")

    def test_dataloader(self) -> ResumableLoader | list[Any]:
        """Batches to test on."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> ResumableLoader | list[Any]:
        """Batches to answer."""
        return self._eval_loader("predict")

    def state_dict(self) -> dict[str, Any]:
        """The training position, saved in every checkpoint."""
        return self._train_loader.state_dict() if self._train_loader else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a position, whether or not the loader exists yet; testing a checkpoint moves nothing."""
        if not state_dict or (self.trainer is not None and not self._is_fitting()):
            return
        if self._train_loader is None:
            self._restored = state_dict
        else:
            self._train_loader.load_state_dict(state_dict)

    def _eval_loader(self, split: str) -> ResumableLoader | list[Any]:
        return self._loader(split, self._plan(split, self.eval_batch_size, "sequential")) if self.files[split] else []

    def _plan(self, split: str, batch_size: int, sampler: SamplerName) -> EpochPlan:
        sources = self._opened(split)
        content = hashlib.sha256("".join(source.fingerprint for source in sources).encode()).hexdigest()[:16]
        world_size, _ = self._ranks()
        return EpochPlan(sum(map(len, sources)), batch_size, world_size, sampler, self.seed, content)

    def _loader(self, split: str, plan: EpochPlan, **options: Any) -> ResumableLoader:
        dataset = SampleDataset(
            self._opened(split),
            self.processor,
            MediaPolicy(Path(), self.max_image_pixels, self.allow_urls),
            Path(self.media_root) if self.media_root else None,
            self.max_tokens,
            answer=split == "predict",
            template_kwargs=self.template_kwargs,
        )
        _, rank = self._ranks()
        return ResumableLoader(
            dataset,
            plan,
            PaddedCollate(self.processor.pad_token_id),
            rank=rank,
            num_workers=self.num_workers,
            pin_memory=self._pins_memory(),
            **options,
        )

    def _opened(self, split: str) -> list[JsonlSource]:
        if not self.files[split]:
            raise ValueError(f"VLMDataModule has no {split} files; pass {split}='file.jsonl'")
        if split not in self._sources:
            raise RuntimeError(f"the {split} files are not open; call setup() first")
        return self._sources[split]

    def _is_fitting(self) -> bool:
        """Whether a Trainer's fit is under way; after it, the datamodule stands alone again."""
        state = self.trainer.state if self.trainer is not None else None
        return state is not None and state.fn == TrainerFn.FITTING and state.status == TrainerStatus.RUNNING

    def _ranks(self) -> tuple[int, int]:
        """Number of data-parallel ranks and this one's; (1, 0) without a Trainer."""
        ranks = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None) if self.trainer else None
        return (ranks["num_replicas"], ranks["rank"]) if ranks else (1, 0)

    def _pins_memory(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"


def _check_selection(name: str, value: Any) -> None:
    if isinstance(value, (str, bool)) and value in _LATER[name]:
        instead = _LATER[name][value]
        raise NotImplementedError(f"{name}={value!r} is not available yet; use {name}={instead!r}")
    if value not in _NOW[name]:
        raise ValueError(f"{name}={value!r} is unknown; expected {' or '.join(map(repr, _NOW[name]))}")


def _listed(files: Files) -> list[str]:
    return [files] if isinstance(files, (str, Path)) else [str(file) for file in files or []]
