"""VLMDataModule: from files to batches. Owns the three selections: sampler, packing, collate.

Built from plain values, does no work before `setup`, touches no device. Without a Trainer it serves one process:
``dm.setup("fit"); batch = next(iter(dm.train_dataloader()))``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_info

from lightning_vlm.automodel.collate_choice import collate_for
from lightning_vlm.checkpoint.source import open_processor
from lightning_vlm.data.bad_samples import BadSamples
from lightning_vlm.data.collate import PackedCollate, PaddedCollate
from lightning_vlm.data.dataset import OverlongPolicy, SampleDataset
from lightning_vlm.data.examples import ExampleCollate, ExampleDataset, blank_example
from lightning_vlm.data.ledger import Ledger
from lightning_vlm.data.lengths import measure_lengths
from lightning_vlm.data.loader import ResumableLoader
from lightning_vlm.data.mixture import cycle_length
from lightning_vlm.data.plan import BatchOptions, DataPlan, SamplerName, in_file_order
from lightning_vlm.data.preview import Previews, make_previews
from lightning_vlm.data.samplers import EpochPlan, Position
from lightning_vlm.data.screening import BadSamplePolicy, first_good
from lightning_vlm.data.selection import OUR_COLLATES, Files, check_examples, check_selections, listed
from lightning_vlm.data.split import ReadOptions, Split, check_ranks_agree
from lightning_vlm.data.summary import PlanSummary, summarize
from lightning_vlm.media.load import MediaPolicy
from lightning_vlm.processing.processor import NemotronVLProcessor
from lightning_vlm.schema import DataError, Sample
from lightning_vlm.sources.open import group_names, weights_of
from lightning_vlm.strategies.ranks import data_ranks


class VLMDataModule(L.LightningDataModule):
    """Data of a vision-language model.

    Args:
        train: What to train on: JSONL, JSON, Parquet or tar files, folders of Hugging Face datasets, or a `DataSource`
            with settings of its own (format, columns, weight, media_root); from Python also opened sources such as
            `ListSource`.
        val: Files to validate on while training.
        test: Files to test on.
        predict: Files whose last user turn is to be answered.
        processor: Folder or repository name of a processor, or a processor: a `NemotronVLProcessor` for our module, or
            one of transformers for another family's.
        processor_options: Options in place of those saved with the processor, e.g. ``{max_num_patches: 4096}`` or
            ``{video: {num_frames: 32, pruning_rate: 0.5}}``.
        media_root: Folder that media paths start from and may not leave; each file's own folder by default.
        batch_size: Samples per device and micro-batch; where a budget rules, the average number of samples that the
            default budget is made for.
        eval_batch_size: The same for validation, test and prediction; ``batch_size`` by default.
        max_tokens: Longest sample in tokens; what happens to a longer one is ``overlong``.
        packing: Put samples one after another into rows without padding, kept apart in every layer.
        batch_tokens: Most tokens of a micro-batch: of a pack, or of the padded rows with the sampler ``token_budget``;
            by default ``batch_size`` samples of average length, and never less than the longest sample.
        batch_patches: Most vision patches of a micro-batch: bounds the memory of the vision tower.
        overlong: What happens to a sample that exceeds a limit by itself: ``error`` before training, ``drop`` (counted
            and reported), ``truncate_text`` (its end cut off, never inside an image), or ``downscale_images`` until it
            fits.
        num_workers: Processes that decode images; 0 decodes in the training process.
        sampler: ``shuffle`` (a new order each epoch), ``sequential``, ``length_grouped`` (similar lengths together) or
            ``token_budget`` (as many similar samples per padded batch as fit). Evaluation is always sequential.
        collate: ``auto``, ``padded`` or ``packed`` (rows without padding from any sampler's batches). With a processor
            of another family, ``auto`` takes the collate function of that family; a function may also be named, e.g.
            ``qwen2_5``, or by its import path. Such batches are plain dicts, for a module of your own.
        collate_options: Further arguments of a collate function, as far as it takes any.
        seed: Seed of the order.
        max_image_pixels: Most pixels of one image or video frame, checked before decoding.
        max_video_frames: Most frames that are taken from one video, whatever the processor or the row asks for.
        max_audio_s: Longest sound, in seconds, checked before decoding.
        allow_urls: Read media that rows name by URL: ``true`` for http and https, or a list of schemes, e.g. ``[s3]``.
            Off: such samples are bad.
        verify: What is looked at of every sample before training: its row (``rows``), also the headers of its media and
            its length (``headers``; always, where batches follow from lengths), or all bytes of its media (``decode``).
            What was found is kept, so a second start is quick.
        max_bad_fraction: The largest share of bad samples: rows or media that cannot be used, which are left out, and
            answers of which another family's function leaves nothing to learn. Whatever the LightningModule, they are
            named in ``bad_samples.jsonl`` and counted, see `BadSamples`; more of them stop the run.
        strict: The first bad sample stops the run.
        template_kwargs: Extra chat-template variables, e.g. ``{enable_thinking: false}``.
        cache_dir: Where measured lengths are kept; ``$LIGHTNING_VLM_CACHE`` or ``~/.cache/lightning_vlm`` by default.

    Raises:
        ValueError: If a selection is unknown, or two of them contradict each other.
    """

    def __init__(
        self,
        train: Files = None,
        val: Files = None,
        test: Files = None,
        predict: Files = None,
        processor: Any = None,
        processor_options: dict[str, Any] | None = None,
        media_root: str | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_tokens: int | None = None,
        num_workers: int = 0,
        sampler: str = "shuffle",
        packing: bool = False,
        batch_tokens: int | None = None,
        batch_patches: int | None = None,
        overlong: str = "error",
        collate: str = "auto",
        collate_options: dict[str, Any] | None = None,
        seed: int = 0,
        max_image_pixels: int = MediaPolicy.max_image_pixels,
        max_video_frames: int = MediaPolicy.max_video_frames,
        max_audio_s: float = MediaPolicy.max_audio_s,
        allow_urls: bool | list[str] = False,
        verify: str = "rows",
        max_bad_fraction: float = 0.01,
        strict: bool = False,
        template_kwargs: dict[str, Any] | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        if collate not in OUR_COLLATES and "." not in collate:
            collate_for(None, collate)  # a known name, or an error
        check_selections(sampler=sampler, packing=packing, collate=collate, overlong=overlong, verify=verify)
        self.files = {"train": listed(train), "val": listed(val), "test": listed(test), "predict": listed(predict)}
        cycle_length(weights_of(self.files["train"]))  # weights that cannot be met are wrong settings
        self.media_root = media_root
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.max_tokens = max_tokens
        self.num_workers = num_workers
        self.sampler: SamplerName = sampler  # type: ignore[assignment]
        self.packing = packing
        self.batch_tokens = batch_tokens
        self.batch_patches = batch_patches
        self.overlong: OverlongPolicy = overlong  # type: ignore[assignment]
        self.collate = collate
        self.collate_options = collate_options or {}
        self.seed = seed
        urls = tuple(allow_urls) if isinstance(allow_urls, list) else allow_urls
        self.media = MediaPolicy(Path(), max_image_pixels, urls, max_video_frames, max_audio_s)
        self.verify = verify
        self.bad_samples = BadSamplePolicy(strict, max_bad_fraction)
        self.template_kwargs = template_kwargs
        self.cache_dir = cache_dir
        self._processor = processor
        self._processor_options = processor_options
        self.splits = {name: Split(name, files, lambda: self.processor) for name, files in self.files.items()}
        self._train_loader: ResumableLoader | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def processor(self) -> Any:
        """The processor, loaded at first use.

        Raises:
            DataError: If none was named, or it cannot be loaded.
        """
        self._processor = open_processor(self._processor, self._processor_options)
        self._processor_options = None  # they are in it
        return self._processor

    def prepare_data(self) -> None:
        """Looks at all training samples once per machine; `setup` reads what was found in every process."""
        if self._is_fitting() and self.files["train"]:
            self.splits["train"].open(self._reading())
            self._data_plan("train")

    def setup(self, stage: str | None = None) -> None:
        """Opens, checks and plans the stage's files; a second call opens only what has changed on disk.

        Args:
            stage: ``fit``, ``validate``, ``test``, ``predict``, or ``None`` for all.

        Raises:
            DataError: If the stage has no files, a file is not acceptable, or too many samples are not.
        """
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
        if stage and not self.files[splits[stage][0]]:
            name = splits[stage][0]
            raise DataError(f"data.{name}", f"there are no {name} files, expected at least one", f"set data.{name}")
        for split in splits[stage] if stage else self.files:
            if self.files[split]:
                self.splits[split].open(self._reading())
                self._data_plan(split)
        if self.trainer is not None:  # before its callbacks are set up: Lightning comes here first
            BadSamples.attach(self.trainer, self)
        if stage == "fit":  # a fit starts at the beginning unless its checkpoint, restored after this, says otherwise
            self._train_loader = self._restored = None

    def dataset_to_check(self, split: str) -> tuple[SampleDataset | None, list[DataError]]:
        """All samples of a split, however many are bad; and what is wrong with sources that cannot be opened."""
        reading, files = self._reading(), self.splits[split]
        errors, dataset = files.open_each(reading), None
        if files.sources:
            processor = None if self._processor is None else self.processor
            dataset = files.dataset(self._batch_options(split), reading, processor)
        files.close()
        return dataset, errors

    def groups(self, split: str) -> dict[str, str]:
        """The name that each source's scores are logged under, by its path."""
        return group_names(self.files[split])

    def train_plan(self) -> EpochPlan:
        """The plan of training epochs: its length is the number of micro-batches of a rank."""
        return self._epoch_plan("train", shuffled=not (self._is_fitting() and self.trainer.overfit_batches > 0))

    def summary(self, world_size: int | None = None) -> PlanSummary:
        """What an epoch of training consists of; measures lengths, whether or not the batches need them.

        Args:
            world_size: Number of data-parallel ranks; the Trainer's by default.
        """
        plan = self._data_plan("train")
        lengths = plan.lengths or measure_lengths(plan.dataset, self.num_workers, self.cache_dir)
        self.bad_samples.check(lengths.errors, len(lengths), "data.train")
        ranks = self._ranks()[0] if world_size is None else world_size
        return summarize(plan, lengths, ranks, self.batch_size, self.packs_rows)

    def train_dataloader(self) -> ResumableLoader:
        """Resumable batches to train on."""
        plan = self.train_plan()
        check_ranks_agree(plan.fingerprint, len(self.known_bad("train")), *self._ranks())
        self._train_loader = self._loader(
            "train",
            plan,
            micro_batches=lambda: self.trainer.accumulate_grad_batches if self._is_fitting() else 1,
            stop=lambda: int(self.trainer.num_training_batches) if self._is_fitting() else len(plan),
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

    def resumed_position(self, state_dict: dict[str, Any]) -> Position | None:
        """The position that a saved one means for this number of ranks; ``None`` outside a fit."""
        return self.train_plan().restore(state_dict) if self._is_fitting() else None

    def ledger(self, yielded: int) -> Ledger:
        """A ledger of the running epoch, opened at a batch.

        Args:
            yielded: Batches of the epoch that each rank has done.
        """
        if self._train_loader is None:
            raise RuntimeError("no training is under way; a ledger belongs to an epoch of train_dataloader()")
        members = self._data_plan("train").members
        position = replace(self._train_loader.position, yielded=yielded)
        _, rank = self._ranks()
        return Ledger(self._train_loader.plan, position, rank, members[position.epoch % len(members)])

    @property
    def num_dropped(self) -> int:
        """Training samples that are left out because they exceed a limit."""
        overlong = self._data_plan("train").overlong
        return 0 if overlong is None else len(overlong.dropped)

    def known_bad(self, split: str) -> dict[int, DataError]:
        """Samples of a split that were found to be bad before they were needed, by their number."""
        return self._data_plan(split).bad if self.files[split] else {}

    def num_samples(self, split: str) -> int:
        """Samples of a split, bad ones included."""
        return len(self._data_plan(split).dataset)

    @property
    def packs_rows(self) -> bool:
        """Whether training rows are packed."""
        return self.packing or self.collate == "packed"

    def preview(self, count: int = 5, split: str = "train", **which: Any) -> Previews:
        """Some samples as the model gets them: the first ``count`` of training, or ``which``, see `make_previews`."""
        self.splits[split].open(self._reading())
        plan = self._data_plan(split, tell=None)  # its reports stand in the preview
        return make_previews(plan, self._epoch_plan(split, tell=None), count, split, **which)

    def probe_samples(self, count: int = 2) -> list[Sample]:
        """The first samples that training will see, for checks before it starts."""
        indices = (index for batch in self.train_plan().batches(Position()) for index in batch.indices)
        return first_good(self._data_plan("train").dataset, indices, count)

    def _eval_loader(self, split: str) -> ResumableLoader | list[Any]:
        return self._loader(split, self._epoch_plan(split)) if self.files[split] else []

    def _epoch_plan(self, split: str, shuffled: bool = True, tell: Any = rank_zero_info) -> EpochPlan:
        world_size, _ = self._ranks()
        batcher = self._data_plan(split, shuffled, tell).batcher
        return EpochPlan(batcher, world_size, self.splits[split].fingerprint)

    def _data_plan(self, split: str, shuffled: bool = True, tell: Any = rank_zero_info) -> DataPlan:
        if self.collate not in OUR_COLLATES or not isinstance(self.processor, NemotronVLProcessor):
            self._check_examples()
        show_progress = self.trainer is None or self.trainer.is_global_zero
        options = self._batch_options(split) if shuffled else in_file_order(self._batch_options(split))
        return self.splits[split].plan(options, self._reading(), show_progress, tell)

    def _reading(self) -> ReadOptions:
        return ReadOptions(
            self.media_root,
            self.media,
            self.template_kwargs,
            self.cache_dir,
            self.num_workers,
            self.bad_samples,
            as_examples=self.collate not in OUR_COLLATES,
        )

    def _batch_options(self, split: str) -> BatchOptions:
        if split != "train":  # evaluation generates answers, for which rows are padded
            options = BatchOptions("sequential", False, self.eval_batch_size, self.max_tokens, overlong=self.overlong)
            return replace(options, verify=self.verify)  # type: ignore[arg-type]
        return BatchOptions(
            self.sampler,
            self.packing,
            self.batch_size,
            self.max_tokens,
            self.batch_tokens,
            self.batch_patches,
            self.overlong,
            self.seed,
            self.verify,  # type: ignore[arg-type]
            weighted=True,
        )

    def _check_examples(self) -> None:
        default = {"packing": False, "overlong": "error", "max_tokens": None, "batch_tokens": None}
        chosen = {name: getattr(self, name) for name in default if getattr(self, name) != default[name]}
        if self.sampler in ("length_grouped", "token_budget"):
            chosen["sampler"] = self.sampler
        name = type(self.processor).__name__ if self.collate in OUR_COLLATES else f"collate={self.collate!r}"
        check_examples(name, **chosen)

    def _loader(self, split: str, plan: EpochPlan, **options: Any) -> ResumableLoader:
        _, rank = self._ranks()
        dataset = self._data_plan(split).dataset
        collate: Any = PackedCollate() if split == "train" and self.packs_rows else None
        blank: Any = None
        if isinstance(dataset, ExampleDataset):
            function = collate_for(self.processor, self.collate, **self.collate_options)
            collate = ExampleCollate(function, trains=split == "train")
            blank = blank_example()
        return ResumableLoader(
            dataset,
            plan,
            collate or PaddedCollate(self.processor.pad_token_id),
            rank=rank,
            num_workers=self.num_workers,
            pin_memory=self._pins_memory(),
            strict=self.bad_samples.strict,
            blank=blank,
            share=getattr(self.trainer.strategy, "share_batches", None) if self.trainer is not None else None,
            **options,
        )

    def _is_fitting(self) -> bool:
        """Whether a Trainer's fit is under way; after it, the datamodule stands alone again."""
        state = self.trainer.state if self.trainer is not None else None
        return state is not None and state.fn == TrainerFn.FITTING and state.status == TrainerStatus.RUNNING

    def _ranks(self) -> tuple[int, int]:
        """Number of data-parallel ranks and this one's."""
        return data_ranks(self.trainer)

    def _pins_memory(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
