"""Load balancing adds the gradient of its loss, no more and no less: beside a naive term in the loss of the step."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_vlm import NemotronVLConfig, NemotronVLModule, VLMDataModule
from lightning_vlm.models.language import Float32Router
from lightning_vlm.models.load_balancing import BalancedRouter, Balancing, balance_load, load_balancing_loss
from lightning_vlm.training.balancing import StepBalance

TINY = {"pattern": "ME*-E", "hidden_size": 32, "vision_hidden_size": 32, "vision_layers": 1}
DATA = {"padded": {"batch_size": 2}, "packed": {"packing": True, "batch_tokens": 200}}
COEFFICIENT = 0.5


class Kept(L.Callback):
    """Keeps the micro-batches, gradient and logged numbers of the first step."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.gradients: dict[str, Tensor] = {}
        self.logged: dict[str, float] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = pl_module.network.named_parameters()
        self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}

    def on_train_batch_end(self, trainer, *args):
        self.logged = {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.fixture
def first_step(make_task, processor):
    """What the first step of a fit does; ``prepare`` may change its network."""
    file = make_task(12)

    def first_step(accumulate=1, data="padded", prepare=None, plugins=None, **options: Any) -> Kept:
        L.seed_everything(3, verbose=False)
        config = NemotronVLConfig.tiny(**{**TINY, **options.pop("config", {})})
        module = NemotronVLModule(config=config, warmup=0, generate_on_validation=False, **options)
        kept = Kept()
        trainer = L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            max_steps=1,
            accumulate_grad_batches=accumulate,
            callbacks=[kept],
            plugins=plugins,
        )
        if prepare is not None:
            module.configure_model()
            prepare(module.network)
        source = VLMDataModule(str(file), processor=processor, sampler="sequential", **DATA[data])
        trainer.fit(module, datamodule=source)
        return kept

    return first_step


def naive(scores: Tensor, chosen: Tensor, real: Tensor) -> Tensor:
    """Token by token and expert by expert, from the paper."""
    rows = [row for row in range(len(real)) if real[row]]
    experts, k, total = scores.shape[1], chosen.shape[1], scores.new_zeros(())
    for expert in range(experts):
        times = sum(int((chosen[row] == expert).sum()) for row in rows)
        probability = sum(scores[row, expert] / scores[row].sum() for row in rows) / len(rows)
        total = total + experts / (k * len(rows)) * times * probability
    return total


def naive_gradients(seed: int, batches: list[Any]) -> tuple[dict[str, Tensor], float]:
    """Of a step whose loss has the term in it; and the mean of that over layers, without its coefficient."""
    L.seed_everything(seed, verbose=False)
    module = NemotronVLModule(config=NemotronVLConfig.tiny(**TINY))
    network = module.network.train()
    routed: list[Any] = []
    for router in routers(network):
        router.register_forward_hook(lambda router, inputs, output: routed.append(output))
    label_tokens = sum(batch.num_label_tokens for batch in batches)
    loss, mean = torch.zeros(()), 0.0
    for batch in batches:
        routed.clear()
        loss = loss + network(**batch.model_inputs(), labels=batch.labels, num_items_in_batch=label_tokens).loss
        real = (batch.input_ids != 0).flatten()
        terms = [naive(logits.sigmoid(), chosen, real) for logits, _, chosen in routed]
        assert len(terms) == 2
        share = batch.num_label_tokens / label_tokens
        loss = loss + COEFFICIENT * share * sum(terms)
        mean += share * sum(term.item() for term in terms) / 2
    loss.backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}, mean


def routers(network):
    return [module for module in network.modules() if isinstance(module, Float32Router)]


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of a gradient, relative to its norm (that of keys' biases is all rounding: 1e-12)."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - g).norm() / (g.norm() + 1e-6)) for name, g in expected.items())


def test_the_loss_is_that_of_the_paper():
    logits, real = torch.randn(30, 8), torch.rand(30) > 0.4
    chosen = (logits + torch.randn(8)).topk(3).indices  # a bias chooses too
    found = load_balancing_loss(logits, chosen, real)
    assert found.item() == pytest.approx(naive(logits.sigmoid().double(), chosen, real).item(), rel=1e-6)


def test_one_is_balanced_and_all_on_the_same_experts_is_not():
    every = torch.arange(8).view(4, 2)
    assert load_balancing_loss(torch.zeros(4, 8), every, torch.ones(4, dtype=torch.bool)).item() == pytest.approx(1)
    same = torch.full((4, 8), -20.0).index_fill_(1, torch.tensor([0, 1]), 20.0)
    found = load_balancing_loss(same, same.topk(2).indices, torch.ones(4, dtype=torch.bool))
    assert found.item() == pytest.approx(8 / 2)


def test_padding_does_not_count():
    logits, real = torch.randn(20, 8), torch.arange(20) < 12
    chosen = logits.topk(2).indices
    padded = load_balancing_loss(logits, chosen, real)
    alone = load_balancing_loss(logits[:12], chosen[:12], torch.ones(12, dtype=torch.bool))
    assert padded.item() == pytest.approx(alone.item(), rel=1e-6)
    logits.requires_grad_()
    load_balancing_loss(logits, chosen, real).backward()
    assert not logits.grad[12:].any()
    assert logits.grad[:12].any()


def test_padding_is_found_by_its_token_and_by_the_mask(first_step):
    batch = first_step().batches[0]
    first = batch.attention_mask[0].tolist()
    batch.input_ids[0, 2] = 0  # as what fills up a packed row, or a row of a pipeline
    batch.attention_mask[1, 3:] = 0
    config = NemotronVLConfig.tiny(**TINY).text_config
    tokens = StepBalance(1.0).begin(batch, config, torch.tensor(10.0), 1)["balancing"].tokens
    assert tokens[0].nonzero().flatten().tolist() == [c for c in range(len(first)) if c != 2 and first[c]]
    assert tokens[1].nonzero().flatten().tolist() == [0, 1, 2]


def test_nothing_but_padding_has_no_loss_and_no_gradient():
    logits = torch.randn(5, 8, requires_grad=True)
    loss = load_balancing_loss(logits, logits.topk(2).indices, torch.zeros(5, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("data", DATA)
def test_the_gradient_is_that_of_a_term_in_the_loss(first_step, data, accumulate, recomputes):
    found = first_step(accumulate, data, load_balancing=COEFFICIENT, gradient_checkpointing=recomputes)
    assert len(found.batches) == accumulate
    expected, mean = naive_gradients(3, found.batches)
    gates = [name for name in expected if name.endswith("gate.weight")]
    # The worst that was measured: 1.7e-6 (keys of the tower, whose gradient is 1e-5), of routers 2.6e-7.
    assert worst(found.gradients, expected) < 5e-6
    assert worst(*({name: g[name] for name in gates} for g in (found.gradients, expected))) < 1e-6
    assert found.logged["train/load_balance"] == pytest.approx(mean, rel=1e-6)
    without = first_step(accumulate, data).gradients
    assert len(gates) == 2
    assert min(float((without[name] - expected[name]).norm() / expected[name].norm()) for name in gates) > 0.2


def test_without_it_nothing_changes(first_step):
    off, prepared, on = first_step(3), first_step(3, prepare=balance_load), first_step(3, load_balancing=0.1)
    assert worst(off.gradients, prepared.gradients) == 0.0
    assert off.logged["train/loss"] == prepared.logged["train/loss"] == on.logged["train/loss"]
    assert "train/load_balance" not in off.logged


@pytest.mark.parametrize("mode", ["eval", "no_grad"])
def test_nothing_is_balanced_outside_of_training(make_model, mode):
    model = make_model(**TINY)
    balance_load(model)
    model.train(mode == "no_grad")
    tokens = torch.randint(1, 100, (2, 9))
    told = Balancing(torch.ones(2, 9, dtype=torch.bool), torch.tensor(100.0), torch.full((5,), -1.0))

    def gradients(**more):
        model.zero_grad()
        with torch.set_grad_enabled(mode != "no_grad"):
            output = model(input_ids=tokens, labels=tokens, **more)
        if output.loss.requires_grad:
            output.loss.backward()
        return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    (plain, expected), (balanced, found) = gradients(), gradients(balancing=told)
    assert torch.equal(plain.logits, balanced.logits)
    assert bool(expected) == (mode == "eval")
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert (told.losses == -1).all()


def test_the_weights_of_experts_stay_as_they_are(make_model):
    model = make_model(**TINY).train()
    tokens = torch.randint(1, 100, (2, 9))
    expected = model(input_ids=tokens, labels=tokens)
    balance_load(model)
    told = Balancing(torch.ones(2, 9, dtype=torch.bool), torch.tensor(1.0), torch.zeros(5))
    found = model(input_ids=tokens, labels=tokens, balancing=told)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    assert (told.losses > 0).tolist() == [False, True, False, False, True]
    assert all(router.balancing is None for router in routers(model))


def test_layers_keep_their_names_and_weights(make_model):
    model = make_model(**TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    balance_load(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_following_the_gradient_balances_the_load():
    hidden, real = torch.randn(200, 16) + 0.5, torch.ones(200, dtype=torch.bool)  # with a mean, so some experts win
    weight = torch.randn(8, 16, requires_grad=True)
    optimizer, losses = torch.optim.SGD([weight], lr=1.0), []
    for _ in range(50):
        logits = hidden @ weight.T
        loss = load_balancing_loss(logits, logits.topk(2).indices, real)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.1
    assert losses[-1] < 1.02


def test_a_negative_coefficient_is_refused():
    with pytest.raises(ValueError, match=r"load_balancing is -0\.1; expected 0 for none, or a small number"):
        NemotronVLModule(config=NemotronVLConfig.tiny(**TINY), load_balancing=-0.1)


@pytest.mark.parametrize(
    ("config", "options", "sentence"),
    [
        ({"pattern": "M*-"}, {}, "no layer of the language model has experts; set it to 0"),
        ({}, {"freeze": ["language"]}, "leaves the routers as they are, so there is nothing to balance"),
        ({}, {"lora": {"rank": 2, "alpha": 4}}, "leaves the routers as they are, so there is nothing to balance"),
    ],
)
def test_nothing_to_balance_is_refused(config, options, sentence):
    module = NemotronVLModule(config=NemotronVLConfig.tiny(**{**TINY, **config}), load_balancing=1e-4, **options)
    with pytest.raises(ValueError, match=sentence):
        module.configure_model()


def test_adapters_elsewhere_are_no_hindrance():
    lora = {"rank": 2, "alpha": 4, "language": "full", "vision": "lora"}
    module = NemotronVLModule(config=NemotronVLConfig.tiny(**TINY), load_balancing=1e-4, lora=lora)
    module.configure_model()
    assert any(isinstance(part, BalancedRouter) for part in module.network.modules())


def test_a_gradient_scaler_is_refused(first_step):
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]
    with pytest.raises(ValueError, match=r"load_balancing does not work with trainer\.precision 16-mixed, whose"):
        first_step(load_balancing=1e-4, plugins=plugins)
