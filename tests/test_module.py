"""NemotronVLModule: one gradient however the step is cut, learning rates, steps, checkpoints, Trainer flags."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader

from lightning_vlm import NemotronVLConfig, NemotronVLModule, NemotronVLProcessor, VLMDataModule
from lightning_vlm.schema import DataError

TINY = {"pattern": "M*E", "hidden_size": 32, "vision_hidden_size": 32, "vision_layers": 1}


class Gradients(L.Callback):
    """Keeps the gradients and the logged loss of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.network.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if "train/loss" in trainer.callback_metrics:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


def run(
    file: Path, processor: NemotronVLProcessor, *callbacks: L.Callback, batch_size: int = 4, **options: Any
) -> NemotronVLModule:
    L.seed_everything(3, verbose=False)
    module_options = {name: options.pop(name) for name in ("lr", "freeze", "gradient_checkpointing") if name in options}
    module = NemotronVLModule(config=NemotronVLConfig.tiny(**TINY), generate_on_validation=False, **module_options)
    data = VLMDataModule(train=str(file), processor=processor, batch_size=batch_size, **options.pop("data", {}))
    trainer = quiet_trainer(callbacks=list(callbacks), **options)
    trainer.fit(module, datamodule=data)
    return module


def quiet_trainer(**options: Any) -> L.Trainer:
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "max_epochs": 1,
            **options,
        }
    )


def test_accumulation_does_not_change_the_gradient(
    make_task: Callable[..., Path], processor: NemotronVLProcessor
) -> None:
    file = make_task(16)  # answers of 1 to 11 words: label tokens are uneven between micro-batches
    cuts = {1: 8, 2: 4, 4: 2, 8: 1}
    recorded = {}
    for accumulate, batch_size in cuts.items():
        recorded[accumulate] = Gradients()
        run(file, processor, recorded[accumulate], batch_size=batch_size, accumulate_grad_batches=accumulate)
    for accumulate in (2, 4, 8):
        assert len(recorded[accumulate].steps) == 2
        # Only the first step starts from equal weights; Adam turns rounding into visible differences afterwards.
        for name, expected in recorded[1].steps[0].items():
            # Measured worst case over all parameters: 1.2e-7.
            torch.testing.assert_close(recorded[accumulate].steps[0][name], expected, rtol=0, atol=1e-6, msg=name)
        assert recorded[accumulate].losses[0] == pytest.approx(recorded[1].losses[0], abs=1e-5)


def test_a_short_last_step_is_divided_by_its_own_tokens(
    make_task: Callable[..., Path], processor: NemotronVLProcessor
) -> None:
    file = make_task(6)
    whole, cut = Gradients(), Gradients()
    options = {"data": {"sampler": "sequential"}, "lr": 0.0}  # equal weights in both steps
    run(file, processor, whole, batch_size=4, **options)
    run(file, processor, cut, batch_size=1, accumulate_grad_batches=4, **options)  # 4 + 2 micro-batches
    assert len(whole.steps) == len(cut.steps) == 2
    for name, expected in whole.steps[1].items():
        torch.testing.assert_close(cut.steps[1][name], expected, rtol=0, atol=1e-6, msg=name)


def test_limited_epochs_divide_by_what_was_taken(
    make_task: Callable[..., Path], processor: NemotronVLProcessor
) -> None:
    recorded = Gradients()
    run(make_task(12), processor, recorded, batch_size=1, accumulate_grad_batches=4, limit_train_batches=6)
    assert len(recorded.steps) == 2


@pytest.mark.parametrize(
    ("options", "packed"),
    [
        ({}, {"packing": True, "batch_tokens": 2000}),
        ({}, {"collate": "packed"}),
        ({"gradient_checkpointing": True}, {"packing": True, "batch_tokens": 2000}),
        # Packs and padded batches divide the samples of the step differently: the whole epoch is one step.
        ({"accumulate_grad_batches": 2, "batch_size": 6}, {"packing": True, "batch_tokens": 420}),
        ({"accumulate_grad_batches": 12, "batch_size": 1}, {"packing": True, "batch_tokens": 100}),
    ],
    ids=str,
)
def test_a_packed_step_equals_a_padded_step(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, options: dict[str, Any], packed: dict[str, Any]
) -> None:
    file = make_task(12)
    recorded = {}
    for name, data in (("padded", {}), ("packed", packed)):
        recorded[name] = Gradients()
        run(file, processor, recorded[name], data=data, **{"batch_size": 12, **options})
    (expected,), (found,) = recorded["padded"].steps, recorded["packed"].steps
    assert recorded["packed"].losses[-1] == pytest.approx(recorded["padded"].losses[-1], abs=1e-5)  # measured: 9.6e-7
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # Measured worst case over all parameters: 2e-7.
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6, msg=name)


def test_logged_loss_is_the_mean_over_label_tokens(
    make_task: Callable[..., Path], processor: NemotronVLProcessor
) -> None:
    recorded = Gradients()
    file = make_task(8)
    module = run(file, processor, recorded, batch_size=8, lr=0.0)
    data = VLMDataModule(train=str(file), processor=processor, batch_size=8)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    logits = module.network.eval()(**batch.model_inputs()).logits.detach()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    assert recorded.losses[0] == pytest.approx(float(expected), abs=1e-5)


def test_gradient_checkpointing_changes_no_gradient(
    make_task: Callable[..., Path], processor: NemotronVLProcessor
) -> None:
    plain, checkpointed = Gradients(), Gradients()
    file = make_task(4)
    run(file, processor, plain)
    run(file, processor, checkpointed, gradient_checkpointing=True)
    for name, expected in plain.steps[0].items():
        torch.testing.assert_close(checkpointed.steps[0][name], expected, rtol=0, atol=1e-6, msg=name)


def test_frozen_parts_stay_and_trained_parts_move(
    make_task: Callable[..., Path], processor: NemotronVLProcessor
) -> None:
    L.seed_everything(3, verbose=False)
    before = NemotronVLModule(config=NemotronVLConfig.tiny(**TINY)).network.state_dict()
    after = run(make_task(4), processor, freeze=["vision", "language"], lr={"projector": 1e-2}).network.state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"multi_modal_projector"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_epochs": 3}, 3 * 6),
        ({"max_epochs": 3, "accumulate_grad_batches": 4}, 3 * 2),
        ({"max_epochs": 3, "limit_train_batches": 4}, 3 * 4),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 2 * 3),
        ({"max_epochs": 50, "max_steps": 7}, 7),
        ({"max_epochs": -1, "max_steps": 9}, 9),
        ({"max_epochs": 2, "overfit_batches": 2}, 2 * 2),
        ({"max_epochs": 2, "overfit_batches": 0.5}, 2 * 3),
        ({"max_epochs": 3, "data": {"packing": True, "batch_tokens": 140}}, 3 * 6),  # 703 tokens
        ({"max_epochs": 3, "data": {"packing": True, "batch_tokens": 140}, "accumulate_grad_batches": 4}, 3 * 2),
        ({"max_epochs": 2, "data": {"packing": True, "batch_tokens": 140}, "overfit_batches": 2}, 2 * 2),
        ({"max_epochs": 2, "data": {"sampler": "token_budget", "batch_tokens": 300}, "overfit_batches": 2}, 2 * 2),
    ],
    ids=str,
)
def test_the_schedule_ends_with_the_run(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, options: dict[str, Any], expected: int
) -> None:
    counted: dict[str, int] = {}

    class Count(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            counted["ours"] = pl_module.total_steps()

    module = run(make_task(11), processor, Count(), batch_size=2, **options)
    assert counted["ours"] == expected == module.trainer.global_step


@pytest.mark.parametrize("data", [{}, {"packing": True}, {"sampler": "token_budget"}], ids=str)
def test_overfit_batches_repeats_the_same_batches(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, data: dict[str, Any]
) -> None:
    seen: list[list[str]] = []

    class Note(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch.sources)

    run(make_task(8), processor, Note(), batch_size=2, overfit_batches=2, max_epochs=2, data=data)
    assert seen[:2] == seen[2:]


def test_fast_dev_run(make_task: Callable[..., Path], processor: NemotronVLProcessor) -> None:
    file = str(make_task(6))
    module = NemotronVLModule(config=NemotronVLConfig.tiny(**TINY), max_new_tokens=2)
    data = VLMDataModule(train=file, val=file, test=file, predict=file, processor=processor, batch_size=2)
    trainer = quiet_trainer(fast_dev_run=True)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    answers = trainer.predict(module, datamodule=data)
    assert answers is not None
    assert [len(batch["answers"]) for batch in answers] == [2]


def test_validation_loss_weighs_tokens_and_scores_group_by_file(
    make_task: Callable[..., Path], processor: NemotronVLProcessor
) -> None:
    files = [make_task(5, "short.jsonl"), make_task(3, "other.v2.jsonl")]
    module = NemotronVLModule(config=NemotronVLConfig.tiny(**TINY), max_new_tokens=2)
    results = []
    for batch_size in (1, 3):
        data = VLMDataModule(val=[str(file) for file in files], processor=processor, batch_size=batch_size)
        results.append(quiet_trainer().validate(module, datamodule=data, verbose=False)[0])
    assert set(results[0]) == {
        "val/loss",
        *(f"val/gen/{score}{group}" for score in ("exact_match", "anls") for group in ("", "/short", "/other_v2")),
    }
    assert results[0]["val/loss"] == pytest.approx(results[1]["val/loss"], abs=1e-5)


def test_hyperparameters_are_plain_and_reload(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, tmp_path: Path
) -> None:
    module = run(make_task(4), processor, lr={"vision": 1e-4, "projector": 1e-3, "language": 1e-4})
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = NemotronVLModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    for (name, a), b in zip(module.network.state_dict().items(), loaded.network.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert loaded.hparams.lr == {"vision": 1e-4, "projector": 1e-3, "language": 1e-4}


def test_pretrained_and_random_initialisation(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    pretrained = NemotronVLModule(model_id=str(tmp_path)).network
    random = NemotronVLModule(model_id=str(tmp_path), init="random").network
    name = "multi_modal_projector.linear_1.weight"
    assert torch.equal(pretrained.state_dict()[name], model.state_dict()[name])
    assert not torch.equal(random.state_dict()[name], model.state_dict()[name])
    assert pretrained.training


def test_wrong_use_is_named(tmp_path: Path) -> None:
    for options in ({}, {"model_id": "a", "config": {}}):
        with pytest.raises(ValueError, match="either model_id or config; give one of them"):
            NemotronVLModule(**options)
    with pytest.raises(ValueError, match=r"no part 'tower'; expected one of vision, projector, audio, "):
        NemotronVLModule(config=NemotronVLConfig.tiny(**TINY), freeze=["tower"])
    with pytest.raises(ValueError, match=r"no part 'head'; expected one of vision, projector, audio, "):
        NemotronVLModule(config=NemotronVLConfig.tiny(**TINY), lr={"head": 1.0})


def test_a_mismatch_in_a_step_names_the_sample(make_task: Callable[..., Path], processor: NemotronVLProcessor) -> None:
    file = make_task(6)
    data = VLMDataModule(train=str(file), processor=processor, batch_size=6, sampler="sequential")
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    row = int((batch.num_images > 0).nonzero()[1])
    batch.input_ids[row][batch.input_ids[row] == processor.image_token_id] = 9
    module = NemotronVLModule(config=NemotronVLConfig.tiny(**TINY))
    message = rf"rows.jsonl:{row + 1}: row {row} has 0 image placeholder tokens for \d+ features of its 2 image"
    with pytest.raises(DataError, match=message):
        module._loss_sum(batch)


def test_dropout_is_a_function_of_the_position() -> None:
    draws = []
    for position in (0, 1, 0):
        module = NemotronVLModule(config=NemotronVLConfig.tiny(**TINY))
        module.trainer = quiet_trainer()
        module.on_train_batch_start(None, position)  # type: ignore[arg-type]
        draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_building_it_makes_no_weights_and_touches_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("CUDA was initialised"))
    assert NemotronVLModule(model_id="somewhere/absent").model is None


def test_schedule_values_are_logged_per_part(make_task: Callable[..., Path], processor: NemotronVLProcessor) -> None:
    module = run(make_task(8), processor, batch_size=2, lr={"vision": 1.0, "projector": 2.0, "language": 3.0})
    groups = {group["name"]: group for group in module.trainer.optimizers[0].param_groups}
    assert {name: group["initial_lr"] for name, group in groups.items() if "/" not in name} == {
        "vision": 1.0,
        "projector": 2.0,
        "language": 3.0,
    }
    assert all(math.isclose(group["lr"], 0.1 * group["initial_lr"], rel_tol=1e-6) for group in groups.values())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_trains(make_task: Callable[..., Path], processor: NemotronVLProcessor, precision: str) -> None:
    exact, rounded = Gradients(), Gradients()
    file = make_task(8)
    run(file, processor, exact, batch_size=8)
    run(file, processor, rounded, batch_size=8, precision=precision)
    # Measured: 5.5182 in float32, 5.5177 in bf16-mixed, 5.5080 in bf16-true.
    assert rounded.losses[0] == pytest.approx(exact.losses[0], abs=0.02)
    assert all(gradient.isfinite().all() for gradient in rounded.steps[0].values())
    assert rounded.steps[0].keys() == exact.steps[0].keys()


def test_metrics_hold_no_float64() -> None:
    module = NemotronVLModule(config=NemotronVLConfig.tiny(**TINY))
    assert {state.dtype for state in module.val_loss.metric_state.values()} <= {torch.float32, torch.int64}


def test_other_loaders_must_tell_the_steps_label_tokens(
    make_task: Callable[..., Path], processor: NemotronVLProcessor
) -> None:
    data = VLMDataModule(train=str(make_task(4)), processor=processor, batch_size=4)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    batches = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    module = NemotronVLModule(config=NemotronVLConfig.tiny(**TINY))
    quiet_trainer(max_steps=1).fit(module, batches)
    batch.step_label_tokens = 0
    with pytest.raises(
        ValueError, match=r"label tokens says that its whole optimizer step has 0; load it with VLMDataM"
    ):
        quiet_trainer(max_steps=1).fit(module, batches)
    with pytest.raises(ValueError, match=r"needs to know the number of steps; set trainer.max_steps or max_epochs"):
        quiet_trainer(max_epochs=1).fit(module, batches)


def test_a_changing_accumulation_is_refused_by_name(
    make_task: Callable[..., Path], processor: NemotronVLProcessor
) -> None:
    with pytest.raises(NotImplementedError, match="GradientAccumulationScheduler is not supported"):
        run(make_task(4), processor, GradientAccumulationScheduler({0: 4, 1: 1}))


def test_a_second_fit_starts_afresh(make_task: Callable[..., Path], processor: NemotronVLProcessor) -> None:
    module = run(make_task(8), processor, batch_size=2)
    assert module._applied == (0, 4)
    module._step_loss = torch.tensor(100.0)  # as an interrupted accumulation leaves it
    recorded = Gradients()
    data = VLMDataModule(train=str(make_task(8)), processor=processor, batch_size=2)
    quiet_trainer(callbacks=[recorded], max_steps=1).fit(module, datamodule=data)
    assert recorded.losses[0] < 20
    assert module._applied == (0, 1)


def test_files_of_one_name_are_scored_apart(
    make_task: Callable[..., Path], processor: NemotronVLProcessor, tmp_path: Path
) -> None:
    files = [str(make_task(2, name)) for name in ("a/rows.jsonl", "b/rows.jsonl", "plain")]
    module = NemotronVLModule(config=NemotronVLConfig.tiny(**TINY), max_new_tokens=2)
    data = VLMDataModule(val=files, processor=processor, media_root=str(tmp_path))
    scores = quiet_trainer().validate(module, datamodule=data, verbose=False)
    names = {name.removeprefix("val/gen/anls") for name in scores[0] if "anls" in name}
    assert names == {"", "/a_rows", "/b_rows", "/plain"}


def test_a_module_is_validated_before_and_after_a_fit(
    make_task: Callable[..., Path], processor: NemotronVLProcessor
) -> None:
    """`Trainer.validate` runs in inference mode, validation inside a fit does not."""
    file = str(make_task(4))
    module = NemotronVLModule(config=NemotronVLConfig.tiny(**TINY), lr=0.0, max_new_tokens=2)
    data = VLMDataModule(train=file, val=file, processor=processor, batch_size=2, packing=True)
    before = quiet_trainer().validate(module, datamodule=data, verbose=False)[0]
    trainer = quiet_trainer()
    trainer.fit(module, datamodule=data)
    inside = {name: float(value) for name, value in trainer.callback_metrics.items() if name in before}
    after = quiet_trainer().validate(module, datamodule=data, verbose=False)[0]
    assert inside == pytest.approx(before, abs=1e-6)
    assert after == pytest.approx(before, abs=1e-6)
    assert {"val/loss", "val/gen/exact_match"} <= set(before)
