"""NemotronVLModule: a NemotronVL under Lightning. Steps, scores, optimizer; no strategy and no file format.

Built from plain values that a checkpoint can hold; the network itself is made in `configure_model`, on the device
and in the precision of the Trainer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import ModuleDict

from lightning_vlm.callbacks.adapter_check import AdapterCheck
from lightning_vlm.callbacks.isolation import IsolationProbe
from lightning_vlm.callbacks.ledger import EpochLedger
from lightning_vlm.callbacks.record import RunRecord
from lightning_vlm.callbacks.stop_signals import StopSignals
from lightning_vlm.callbacks.trainable_check import TrainableCheck
from lightning_vlm.checkpoint.atomic_io import use_whole_files
from lightning_vlm.datamodule import VLMDataModule
from lightning_vlm.models.config import NemotronVLConfig
from lightning_vlm.models.fusion import FusionError
from lightning_vlm.models.lora import Coverage, Lora
from lightning_vlm.models.nemotron_vl import NemotronVL
from lightning_vlm.models.parts import check_parts
from lightning_vlm.network import build_network
from lightning_vlm.processing.processor import NemotronVLProcessor
from lightning_vlm.schema import VLMBatch, file_of
from lightning_vlm.strategies.checkpoints import layouts
from lightning_vlm.strategies.ranks import data_ranks
from lightning_vlm.training.balancing import StepBalance
from lightning_vlm.training.freezing import check_new_is_trained
from lightning_vlm.training.generation import generate_answers
from lightning_vlm.training.gradients import clip_gradients, gradient_norm
from lightning_vlm.training.losses import divide_loss, step_label_tokens
from lightning_vlm.training.metrics import SCORES, AnswerScore, MeanOverTokens, take_scores
from lightning_vlm.training.optim import OptimizerName, check_accumulation, count_steps, warmup_cosine
from lightning_vlm.training.optimizer_state import names_of, take_names
from lightning_vlm.training.optimizers import check_optimizer, make_optimizer, require_optimizer
from lightning_vlm.training.pairing import pair
from lightning_vlm.training.reached import ReachedMedia
from lightning_vlm.training.recomputation import check_recomputed
from lightning_vlm.training.resume import move_progress, reopen_epoch, rewind_to_last_step


class NemotronVLModule(L.LightningModule):
    """Trains and evaluates a Nemotron-style vision-language model.

    Args:
        model_id: Folder or repository name of a model.
        config: Instead of ``model_id``: a `NemotronVLConfig` or its dict, for a model with random weights.
        init: ``pretrained`` loads the weights of ``model_id``; ``random`` takes its config only.
        from_scratch: Parts (``projector``), or modules of parts (``vision.embeddings.video_patch_projection``), that
            get new random weights instead of those of ``model_id``.
        lr: Peak learning rate, or one per part: ``{vision: 2e-6, projector: 1e-4, language: 1e-5}``.
        weight_decay: Of weight matrices.
        betas: Of AdamW.
        optimizer: ``adamw``; ``adamw8bit``, which keeps its states in 8 bits (torchao); or ``muon``, for the hidden
            matrices, with AdamW for the rest.
        layer_decay: Factor of the learning rate from one layer of the vision tower to the one below, e.g. 0.75.
        no_decay: Parameters without weight decay, besides vectors and learned positions: names or patterns such as
            ``language.model.embeddings.weight`` and ``vision.encoder.layer.*.mlp.*``.
        warmup: Warm-up steps, or a fraction of the run if below 1.
        min_lr_ratio: Learning rate at the end of the run, relative to the peak.
        freeze: Parts that are not trained: ``vision``, ``projector``, ``audio``, ``audio_projector``, ``language``.
        lora: Train adapters instead of weights: `Lora`, or its fields as a dict; parts that it does not name are
            frozen.
        gradient_checkpointing: Recompute activations in the backward pass to save memory: in all parts, or in those
            named among ``vision``, ``audio`` and ``language``.
        vision_micro_batch: Most frames (images, tiles, frames of videos) of one pass of the vision tower and its
            projector, so that a long video needs no more memory than these; all at once by default.
        load_balancing: Coefficient of the load-balancing loss of each layer of experts, which spreads tokens over
            them, e.g. 1e-4; 0 for none.
        generate_on_validation: Score generated answers in validation, besides the loss.
        max_new_tokens: Longest generated answer.
        generation: Further arguments of transformers' ``generate``, e.g. ``{do_sample: true, temperature: 0.6}``;
            greedy by default.

    Raises:
        ValueError: If not exactly one of ``model_id`` and ``config`` is given, ``freeze`` or ``lr`` names an unknown
            part, or a number is out of its range.
    """

    def __init__(
        self,
        model_id: str | None = None,
        config: Any = None,
        init: Literal["pretrained", "random"] = "pretrained",
        from_scratch: list[str] | None = None,
        lr: float | dict[str, float] = 1e-5,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.95),
        optimizer: OptimizerName = "adamw",
        layer_decay: float = 1.0,
        no_decay: list[str] | None = None,
        warmup: float = 0.03,
        min_lr_ratio: float = 0.1,
        freeze: list[str] | None = None,
        lora: Lora | dict[str, Any] | None = None,
        gradient_checkpointing: bool | list[str] = False,
        vision_micro_batch: int | None = None,
        load_balancing: float = 0.0,
        generate_on_validation: bool = True,
        max_new_tokens: int = 64,
        generation: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if (model_id is None) == (config is None):
            raise ValueError("NemotronVLModule takes either model_id or config; give one of them")
        check_parts([*(freeze or []), *(lr if isinstance(lr, dict) else [])])
        check_recomputed(gradient_checkpointing)
        check_optimizer(optimizer, layer_decay)
        if vision_micro_batch is not None and vision_micro_batch < 1:
            raise ValueError(f"vision_micro_batch is {vision_micro_batch}; expected at least one frame, or none")
        config = config.to_dict() if isinstance(config, NemotronVLConfig) else config
        if lora is not None and freeze:
            raise ValueError(f"freeze={freeze} beside lora, which freezes what it does not name; give one of them")
        adapters = Lora(**lora) if isinstance(lora, dict) else lora
        check_new_is_trained(from_scratch or [], freeze or [], adapters)
        lora = None if adapters is None else asdict(adapters)
        self.save_hyperparameters()
        self.model: NemotronVL | None = None
        self.coverage: Coverage | None = None  # of adapters
        self.processor: NemotronVLProcessor | None = None
        self.val_loss = MeanOverTokens()
        self.scores = ModuleDict()
        self._groups: dict[str, str] = {}  # file -> name of its score group
        self._step_loss: Tensor | None = None
        self._gradient_norm: Tensor | None = None  # before clipping
        self.reached = ReachedMedia()
        self.balance = StepBalance(load_balancing)
        self._applied = (0, 0)  # epoch, and batches of it whose gradient is in the weights
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))  # where seed_everything leaves it

    def configure_model(self) -> None:
        """Makes the network, once."""
        if self.model is not None:
            return
        strategy = None if self._trainer is None else self.trainer.strategy
        self.model, self.coverage = build_network(self.hparams, strategy)
        if self.processor is not None:
            pair(self.model.config, self.processor)

    def configure_callbacks(self) -> list[L.Callback]:
        """What every run brings: documents are isolated, what trains moves, nothing is lost, exports know the run."""
        return [IsolationProbe(), TrainableCheck(), AdapterCheck(), EpochLedger(), RunRecord(), StopSignals()]

    def setup(self, stage: str) -> None:
        """Starts afresh, and takes the processor and the names of score groups from the datamodule.

        Raises:
            NotImplementedError: If a callback changes ``accumulate_grad_batches`` during the run.
            ImportError: If the optimizer's package is missing.
            ValueError: If load balancing does not work with the precision.
        """
        use_whole_files(self.trainer.strategy)
        if stage == "fit":
            check_accumulation(self.trainer)
            require_optimizer(self.hparams.optimizer)
            self._applied, self._step_loss = (0, 0), None  # a checkpoint is loaded after this
            self.reached, self.balance = ReachedMedia(), StepBalance(self.hparams.load_balancing)
            self.balance.check_precision(self.trainer.precision_plugin)
        datamodule = self._datamodule
        if datamodule is None:
            return
        self.processor = datamodule.processor
        if self.model is not None:  # it was made before its data was known
            pair(self.model.config, self.processor)
        for split in {"fit": ("val",), "validate": ("val",), "test": ("test",)}.get(stage, ()):
            self._groups |= datamodule.groups(split)
            for key in [split, *(_score_key(split, group) for group in datamodule.groups(split).values())]:
                if key not in self.scores:
                    self.scores[key] = ModuleDict({name: score() for name, score in SCORES.items()})
        self.scores.to(self.device)

    def forward(self, **inputs: Any) -> Any:
        """Calls the model, see `NemotronVL.forward`."""
        return self.network(**inputs)

    @property
    def network(self) -> NemotronVL:
        """The model; made now if the Trainer has not made it."""
        if self.model is None:
            self.configure_model()
        assert self.model is not None
        return self.model

    def training_step(self, batch: VLMBatch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, as its share of the whole step's mean."""
        label_tokens = self.begin_micro_batch(batch)
        ranks = data_ranks(self.trainer)[0]
        told = self.balance.begin(batch, self.network.config.text_config, label_tokens, ranks)
        loss_sum = self._loss_sum(batch, **told)
        self.add_loss(loss_sum.detach() / label_tokens.to(loss_sum.device, loss_sum.dtype))
        return divide_loss(loss_sum, label_tokens, self.trainer.accumulate_grad_batches, ranks)

    def begin_micro_batch(self, batch: VLMBatch) -> Tensor:
        """Enters a micro-batch; returns the label tokens of its whole step over all ranks, a float64 scalar.

        Args:
            batch: The micro-batch.

        Raises:
            ValueError: If the batch does not know the label tokens of its step.
        """
        if batch.step_label_tokens < batch.num_label_tokens:
            raise ValueError(
                f"a batch with {batch.num_label_tokens} label tokens says that its whole optimizer step has "
                f"{batch.step_label_tokens}; load it with VLMDataModule, or set batch.step_label_tokens to their sum"
            )
        self.reached.add(batch)
        return step_label_tokens(batch.step_label_tokens, self.device, self.trainer.strategy.reduce)

    def add_loss(self, share: Tensor) -> None:
        """Adds to the loss of the step that is under way.

        Args:
            share: Scalar: sum of some token losses, divided by the label tokens of the whole step.
        """
        self._step_loss = share if self._step_loss is None else self._step_loss + share

    def on_train_batch_start(self, batch: VLMBatch, batch_idx: int) -> None:
        """Makes random numbers (dropout) a function of the position, so a resumed run draws the same ones."""
        position = (self._seed, self.current_epoch, batch_idx, data_ranks(self.trainer)[1])
        torch.manual_seed(hash(position) % 2**63)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leaves alone what no medium reached; logs the step's loss and the norm of its gradient before clipping."""
        self.reached.leave_unreached_alone(self.network, self.device)
        stages = getattr(self.trainer.strategy, "stage_group", None)
        self._gradient_norm = gradient_norm(self.parameters(), self.device, stages)
        self.log("train/grad_norm", self._gradient_norm, prog_bar=False)
        if self._step_loss is not None:
            loss = self.trainer.strategy.reduce(self._step_loss, reduce_op="sum")
            self.log("train/loss", loss, prog_bar=True)
            self._step_loss = None
        if (balance := self.balance.take(self.trainer.strategy.reduce, stages)) is not None:
            self.log("train/load_balance", balance)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips by the norm of the whole gradient, wherever its parts are; by value as Lightning does."""
        if not gradient_clip_val or gradient_clip_val < 0 or gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif self._gradient_norm is not None:
            clip_gradients(self.parameters(), gradient_clip_val, self._gradient_norm)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Steps, and notes which batches are now in the weights."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._applied = (epoch, batch_idx + 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Says what the optimizers' numbers mean; makes the checkpoint stand between two optimizer steps."""
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_layouts"] = layouts(self.trainer, self)
        if self._datamodule is None:
            return
        key = type(self._datamodule).__qualname__
        if taken_back := rewind_to_last_step(checkpoint, key, self._applied):
            rank_zero_info(f"stopped inside an optimizer step: {taken_back} batch(es) will be repeated on resume")
        if self.trainer.should_stop or 0 <= self.trainer.max_steps <= self.trainer.global_step:
            reopen_epoch(checkpoint, key, int(self.trainer.num_training_batches))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continues the count of batches in the weights: all that the data's position has passed.

        On another number of ranks than before, the epoch's remaining batches are counted from its end.
        """
        if self._datamodule is None or not (state := checkpoint.get(type(self._datamodule).__qualname__)):
            return
        self._applied = (state["epoch"], state["yielded"])
        if (position := self._datamodule.resumed_position(state)) is None:
            return
        ended = position.epoch > state["epoch"]
        done = len(self._datamodule.train_plan()) if ended else position.yielded
        if done == state["yielded"]:
            return
        if not ended:
            rank_zero_info(
                f"the epoch was stopped on {state['world_size']} rank(s); its remaining samples are dealt out anew"
            )
            self._applied = (position.epoch, done)
        move_progress(checkpoint, done, self.trainer.accumulate_grad_batches, ended)

    def validation_step(self, batch: VLMBatch, batch_idx: int) -> dict[str, Any]:
        """Loss and, if wanted, generated answers; see `_evaluate`."""
        return self._evaluate(batch, "val", self.hparams.generate_on_validation)

    def test_step(self, batch: VLMBatch, batch_idx: int) -> dict[str, Any]:
        """Loss and generated answers."""
        return self._evaluate(batch, "test", generates=True)

    def predict_step(self, batch: VLMBatch, batch_idx: int) -> dict[str, Any]:
        """Generated answers, the places of their rows, and which count: a stand-in's answer is to nothing."""
        return {"answers": self.answer(batch), "sources": batch.sources, "counted": batch.counted.tolist()}

    def answer(self, batch: VLMBatch) -> list[str]:
        """Generates an answer to each row's prompt.

        Args:
            batch: A padded batch on this module's device.

        Raises:
            ValueError: If there is no processor to decode with.
        """
        if self.processor is None:
            raise ValueError("the module has no processor; set module.processor or fit with a VLMDataModule")
        in_step = self._trainer is not None and self.trainer.world_size > 1
        options = self.hparams
        return generate_answers(
            self.network, self.processor, batch, options.max_new_tokens, in_step, options.generation
        )

    def on_validation_epoch_end(self) -> None:
        """Logs the scores of the whole validation set."""
        for name, value in take_scores(self.scores, "val"):
            self.log(name, value)

    def on_test_epoch_end(self) -> None:
        """Logs the scores of the whole test set."""
        for name, value in take_scores(self.scores, "test"):
            self.log(name, value)

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer with groups by part, warm-up and cosine over our own count of steps."""
        options = self.hparams
        names = ("optimizer", "lr", "betas", "weight_decay", "layer_decay", "no_decay")
        optimizer = make_optimizer(self.network, **{name: options[name] for name in names})
        take_names(optimizer, names_of(self))
        schedule = warmup_cosine(optimizer, self.total_steps(), options.warmup, options.min_lr_ratio)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def total_steps(self) -> int:
        """Optimizer steps of the run, from the data plan.

        Never from ``trainer.estimated_stepping_batches``, which builds the loader before its position is restored.

        Raises:
            ValueError: If the run has no end, or its data is not a `VLMDataModule`'s and ``max_steps`` is not set.
        """
        batches = None if self._datamodule is None else len(self._datamodule.train_plan())
        return count_steps(self.trainer, batches)

    @property
    def _datamodule(self) -> VLMDataModule | None:
        datamodule = getattr(self.trainer, "datamodule", None) if self._trainer is not None else None
        return datamodule if isinstance(datamodule, VLMDataModule) else None

    def _loss_sum(self, batch: VLMBatch, **told: Any) -> Tensor:
        inputs = {**batch.model_inputs(), **told}
        try:
            return self.network(
                **inputs, labels=batch.labels, num_items_in_batch=1, skip_logits=True, use_cache=False
            ).loss
        except FusionError as error:
            raise error.named(batch.sources) from error.__cause__

    def _evaluate(self, batch: VLMBatch, split: str, generates: bool) -> dict[str, Any]:
        self.val_loss.update(self._loss_sum(batch), batch.num_label_tokens)
        self.log(f"{split}/loss", self.val_loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(batch))
        if not generates:
            return {}
        answers = self.answer(batch)
        rows = [row for row in range(len(batch)) if batch.counted[row]]
        for row in rows:
            group = self._groups.get(file_of(batch.sources[row]), "")
            for key in (split, _score_key(split, group)):
                for score in self._scores(key).values():
                    score.update([answers[row]], [batch.references[row]])
        return {"answers": answers}

    def _scores(self, key: str) -> dict[str, AnswerScore]:
        """The scores of a split or of one of its groups; none for rows of a datamodule that is not ours."""
        return dict(self.scores[key].items()) if key in self.scores else {}  # type: ignore[operator]


def _score_key(split: str, group: str) -> str:
    return f"{split}/{group.replace('.', '_')}"  # torch allows no dot in a module's name
