"""Packed rows: documents get the numbers that they get alone, and no bit of one depends on another."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, RadioModel

from lightning_vlm import NemotronVL
from lightning_vlm.models.fusion import FusionError
from lightning_vlm.models.language import packed_inputs
from lightning_vlm.models.packed_mamba import PackedMamba2Mixer
from lightning_vlm.models.vision import PackedRadioAttention
from lightning_vlm.ops.attention import ATTENTION
from lightning_vlm.schema import IGNORE_INDEX
from lightning_vlm.segments import documents_from_lengths

IMAGE = 4

# Worst relative differences between a packed row and its documents (see `differences`), measured over 150 random rows
# each in train mode, in eval mode and with gradient checkpointing (60 in bfloat16). float32: logits 5.3e-7, loss
# 1.6e-7, gradients 1.1e-5 (A_log), and 2.7e-5 once, of a query that sees little but itself: rounding, for in float64
# it is 1.3e-14, the worst of all 150. bfloat16: logits 9.6e-4, loss 1.7e-7, gradients 2.2e-2 (norms of the tower).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2**-4}


@pytest.fixture
def make_model(shake: Callable[..., nn.Module], make_model: Callable[..., NemotronVL]) -> Callable[..., NemotronVL]:
    """Makes a small model in eval mode whose every parameter matters."""

    def make(pattern: str = "M*E-", dtype: torch.dtype = torch.float32, **options: Any) -> NemotronVL:
        return shake(make_model(pattern=pattern, **options)).to(dtype)

    return make


def pack(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A padded batch as one packed row; each of its rows becomes a document."""
    real = batch["attention_mask"].bool()
    packed = {name: batch[name][real][None] for name in ("input_ids", "labels")}
    packed["cu_seqlens"] = documents_from_lengths(real.sum(-1).tolist()).cu_seqlens
    return packed | {name: batch[name] for name in ("pixel_values", "image_grid_hw") if name in batch}


def separate(packed: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The documents of a packed row, each a batch of one row without boundaries; those without tokens are left out."""
    documents = []
    grids = packed.get("image_grid_hw", torch.zeros(0, 2, dtype=torch.int64)).tolist()
    patches = list(packed["pixel_values"].split([h * w for h, w in grids])) if grids else []
    for start, stop in itertools.pairwise(packed["cu_seqlens"].tolist()):
        document = {name: packed[name][:, start:stop] for name in ("input_ids", "labels")}
        placeholders, images = int((document["input_ids"] == IMAGE).sum()), 0
        while placeholders:
            placeholders -= grids[images][0] * grids[images][1] // 4
            images += 1
        if images:
            document |= {"pixel_values": torch.cat(patches[:images]), "image_grid_hw": torch.tensor(grids[:images])}
            grids, patches = grids[images:], patches[images:]
        if stop > start:
            documents.append(document)
    return documents


def random_rows(seed: int) -> list[list[int | tuple[int, int]]]:
    """Two to five documents: images first, last, in between, alone, several or none; lengths around every edge."""
    rng = random.Random(seed)
    rows: list[list[int | tuple[int, int]]] = []
    for _ in range(rng.randint(2, 5)):
        row: list[int | tuple[int, int]] = [rng.choice([1, 2, 7, 33, 63, 64, 65, 131])]
        if rng.random() < 0.6:
            for _ in range(rng.randint(1, 3)):
                image = (2 * rng.randint(1, 3), 2 * rng.randint(1, 3))
                row = rng.choice([[image, *row], [*row, image], [*row, image, rng.choice([1, 5])], [image]])
        rows.append(row)
    return rows


Result = tuple[Tensor, Tensor, dict[str, Tensor]]


def run(model: NemotronVL, batches: list[dict[str, Tensor]], **options: Any) -> Result:
    """Logits, summed loss and gradients over batches of one row each."""
    model.zero_grad()
    outputs = [model(**batch, num_items_in_batch=1, **options) for batch in batches]
    loss = torch.stack([output.loss for output in outputs]).sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    logits = [] if outputs[0].logits is None else [output.logits.detach()[0] for output in outputs]
    return torch.cat(logits) if logits else torch.zeros(1), loss.detach(), gradients


def differences(actual: Result, expected: Result) -> dict[str, float]:
    """Norms, relative; a gradient that is rounding alone is judged by a thousandth of the largest.

    A token alone in its document gives its query and key none, and a bias of keys never gets one.
    """
    (logits, loss, gradients), (their_logits, their_loss, their_gradients) = actual, expected
    pairs = {"logits": (logits, their_logits), "loss": (loss, their_loss)}
    for name in gradients.keys() | their_gradients.keys():
        zero = torch.zeros_like(gradients.get(name, their_gradients.get(name)))
        pairs[name] = (gradients.get(name, zero), their_gradients.get(name, zero))
    floor = 1e-3 * max((float(gradient.norm()) for gradient in their_gradients.values()), default=0.0)
    return {
        name: float((found.double() - wanted.double()).norm()) / max(float(wanted.norm()), floor, 1e-12)
        for name, (found, wanted) in pairs.items()
    }


def assert_equal_to_documents(model: NemotronVL, packed: dict[str, Tensor], tolerance: float = 2e-5, **options) -> None:
    # Only documents alone are told to use no cache: in eval mode the default would make one, a packed row must not.
    found = differences(run(model, [packed], **options), run(model, separate(packed), use_cache=False, **options))
    worst = max(found, key=found.get)
    assert found[worst] <= tolerance, f"{worst} differs by {found[worst]:.2e}, relative"
    assert max(found["logits"], found["loss"]) <= tolerance / 8


# --- A packed row equals its documents.


@pytest.mark.parametrize("mode", ["train", "eval", "checkpointing"])
@pytest.mark.parametrize("seed", range(14))
def test_a_packed_row_equals_its_documents(make_model, make_batch, seed, mode):
    rng = random.Random(seed)
    model = make_model("".join(rng.choice("M*E-") for _ in range(4))).train(mode != "eval")
    if mode == "checkpointing":
        model.activation_checkpointing_enable({"use_reentrant": False})
    assert_equal_to_documents(model, pack(make_batch(random_rows(seed), seed)))


class InFloat64(TorchFunctionMode):
    """What transformers' layers compute in float32 whatever their input, in float64: nothing rounds earlier."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wide(value):
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            return args[0].double()
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


@pytest.mark.parametrize("seed", [*range(12), 69, 114])
def test_in_float64_nothing_but_its_rounding_is_left(make_model, make_batch, seed):
    rng = random.Random(seed)
    model = make_model("".join(rng.choice("M*E-") for _ in range(4)), torch.float64).train()
    model.language_model.set_experts_implementation("eager")  # the grouped product has no float64
    with InFloat64():
        logits = model(**pack(make_batch(random_rows(seed), seed))).logits
        assert logits.dtype == torch.float64
        assert_equal_to_documents(model, pack(make_batch(random_rows(seed), seed)), TOLERANCE[torch.float64])


ROWS = {
    "text_only": [[12], [1], [70]],
    "one_token_each": [[1], [1], [1], [1]],
    "image_first_and_last": [[(2, 2), 5], [5, (4, 2)]],
    "images_only": [[(2, 2)], [(2, 4), (4, 2)], [(2, 2)]],
    "several_images": [[2, (2, 2), (4, 4), 3, (2, 6)], [9], [(2, 2), 1, (2, 2)]],
    "text_between_images": [[(4, 4), 3], [8], [8], [(4, 4)]],
    "longer_than_a_chunk": [[65], [131], [64, (2, 2)], [63]],
    "single_document": [[3, (2, 2), 40]],
    "documents_without_tokens": [[0], [5], [0], [0], [3, (2, 2)], [0]],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("pattern", ["M", "*", "M*M-", "ME*"])
def test_any_layout_of_documents(make_model, make_batch, pattern, rows):
    assert_equal_to_documents(make_model(pattern).train(), pack(make_batch(rows)))


@pytest.mark.parametrize("mode", ["train", "eval", "checkpointing"])
@pytest.mark.parametrize("pattern", ["M*-M", "MEM*"])
def test_in_bfloat16(make_model, make_batch, pattern, mode):
    model = make_model(pattern, torch.bfloat16).train(mode != "eval")
    if mode == "checkpointing":
        model.activation_checkpointing_enable({"use_reentrant": False})
    assert_equal_to_documents(model, pack(make_batch(ROWS["several_images"] + [[65], [1]])), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("threads", [1, 2])
def test_at_a_width_of_128(make_model, make_batch, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = make_model("M*E-", hidden_size=128).train()
        assert_equal_to_documents(model, pack(make_batch([[66], [1], [3, (2, 4), 5]])))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("kernel", "groups", "chunk"), [(2, 1, 1), (4, 8, 7), (3, 4, 128)], ids=str)
def test_other_shapes_of_mamba_layers(make_model, make_batch, kernel, groups, chunk):
    model = make_model("MM*", conv_kernel=kernel, n_groups=groups, chunk_size=chunk).train()
    assert_equal_to_documents(model, pack(make_batch(ROWS["several_images"])))


def test_under_autocast(make_model, make_batch):
    model = make_model("MEM*").train()
    packed = pack(make_batch(ROWS["several_images"]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal_to_documents(model, packed, TOLERANCE[torch.bfloat16])


def test_the_loss_without_logits_is_the_same(make_model, make_batch):
    model = make_model("M*").train()
    packed = pack(make_batch(ROWS["several_images"]))
    assert_equal_to_documents(model, packed, skip_logits=True)
    with_logits, without = run(model, [packed]), run(model, [packed], skip_logits=True)
    assert max(differences(without, (without[0], *with_logits[1:])).values()) <= 2e-5


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("pattern", ["M*-", "MEM*"])
def test_a_packed_row_equals_the_padded_batch(make_model, make_batch, pattern, mode):
    model = make_model(pattern).train(mode == "train")
    batch = make_batch(ROWS["several_images"] + [[40]])
    packed = pack(batch)
    real = batch["attention_mask"].bool()
    found = []
    for inputs in (packed, batch):
        model.zero_grad()
        outputs = model(**inputs, use_cache=False)  # the loss of each divides by its own label tokens
        outputs.loss.backward()
        logits = outputs.logits[0] if inputs is packed else outputs.logits[real]
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((logits.detach(), outputs.loss.detach(), {name: g.clone() for name, g in gradients.items()}))
    assert max(differences(*found).values()) <= TOLERANCE[torch.float32]


# --- No bit of a document depends on another.


def changed(packed: dict[str, Tensor], document: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The same row with other words and other pixels in every document but one."""
    ids, grids = packed["input_ids"].clone(), packed.get("image_grid_hw")
    start, stop = packed["cu_seqlens"][document : document + 2].tolist()
    words = ids != IMAGE
    words[:, start:stop] = False
    ids[words] = torch.randint(7, 263, (int(words.sum()),), generator=generator)
    other = {**packed, "input_ids": ids}
    if grids is not None:
        # Four patches make a placeholder, in reading order, so a document's patches are where its placeholders are.
        before, own = (
            int((packed["input_ids"][:, part] == IMAGE).sum()) for part in (slice(start), slice(start, stop))
        )
        pixels = torch.randint(0, 256, packed["pixel_values"].shape, dtype=torch.uint8, generator=generator)
        pixels[4 * before : 4 * (before + own)] = packed["pixel_values"][4 * before : 4 * (before + own)]
        other["pixel_values"] = pixels
    return other


def only(labels: Tensor, cu_seqlens: Tensor, document: int) -> Tensor:
    start, stop = cu_seqlens[document : document + 2].tolist()
    kept = torch.full_like(labels, IGNORE_INDEX)
    kept[:, start:stop] = labels[:, start:stop]
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("pattern", "hidden_size"),
    [("M", 32), ("*", 32), ("M*-M", 32), ("MEM*", 32), ("*E", 32), ("M*E-", 128)],
    ids=str,
)
def test_a_document_does_not_change_a_bit_of_another(make_model, make_batch, pattern, hidden_size, dtype):
    model = make_model(pattern, dtype, hidden_size=hidden_size)
    packed = pack(make_batch([[7, (2, 4), 3], [1], [66, (2, 2)], [(4, 4), 9, (2, 2)]]))
    labels, cu_seqlens = packed.pop("labels"), packed["cu_seqlens"]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        logits = model(**packed).logits[0]
        for document, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            other = changed(packed, document, generator)
            other_logits = model(**other).logits[0]
            assert torch.equal(other_logits[start:stop], logits[start:stop])
            rest = torch.cat([other_logits[:start] != logits[:start], other_logits[stop:] != logits[stop:]])
            assert rest.any(-1).all(), "the change reaches every token of the others"
            own = only(labels, cu_seqlens, document)
            for skip_logits in (False, True):
                losses = [model(**row, labels=own, skip_logits=skip_logits).loss for row in (packed, other)]
                assert torch.equal(*losses)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("pattern", ["M", "*", "M*-M", "MEM*"])
def test_a_document_does_not_change_a_bit_of_anothers_gradient(make_model, pattern, checkpointing):
    model = make_model(pattern).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    lengths = [33, 1, 70, 12]
    cu_seqlens = documents_from_lengths(lengths).cu_seqlens
    embeds, labels = torch.randn(1, sum(lengths), 32), torch.randint(7, 263, (1, sum(lengths)))

    def gradient(embeds: Tensor, labels: Tensor) -> Tensor:
        embeds = embeds.clone().requires_grad_()
        model(inputs_embeds=embeds, cu_seqlens=cu_seqlens, labels=labels, num_items_in_batch=1).loss.backward()
        return embeds.grad[0]

    before = gradient(embeds, labels)
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        other_embeds, other_labels = 3 * torch.randn_like(embeds), torch.randint(7, 263, labels.shape)
        other_embeds[:, start:stop], other_labels[:, start:stop] = embeds[:, start:stop], labels[:, start:stop]
        after = gradient(other_embeds, other_labels)
        assert torch.equal(after[start:stop], before[start:stop])
        assert not torch.equal(after, before)


@pytest.mark.parametrize("pattern", ["M", "*", "M*M"])
def test_a_documents_loss_has_no_gradient_in_another(make_model, pattern):
    model = make_model(pattern)
    lengths = [9, 1, 70, 12]
    cu_seqlens = documents_from_lengths(lengths).cu_seqlens
    labels = torch.randint(7, 263, (1, sum(lengths)))
    for document, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        embeds = torch.randn(1, sum(lengths), 32, requires_grad=True)
        own = only(labels, cu_seqlens, document)
        model(inputs_embeds=embeds, cu_seqlens=cu_seqlens, labels=own, num_items_in_batch=1).loss.backward()
        reached = embeds.grad[0].any(-1).nonzero().flatten().tolist()
        assert reached == list(range(start, stop - 1))  # the last token predicts nothing


def test_the_default_cache_of_eval_mode_does_not_leak(make_model, make_batch):
    model = make_model("M*M").eval()
    assert model.config.text_config.use_cache, "the default that this is about"
    packed = pack(make_batch(ROWS["several_images"]))
    with torch.no_grad():
        outputs = model(**packed)
        alone = torch.cat([model(**document, use_cache=False).logits[0] for document in separate(packed)])
    assert outputs.past_key_values is None
    # Worst difference measured over twenty seeds: 1.6e-6.
    torch.testing.assert_close(outputs.logits[0], alone, atol=5e-5, rtol=0)


def test_the_last_token_of_a_document_predicts_nothing(make_model):
    model = make_model("M*")
    lengths = [3, 1, 4]
    ids = torch.randint(7, 263, (1, 8))
    cu_seqlens = documents_from_lengths(lengths).cu_seqlens
    first_tokens = torch.full_like(ids, IGNORE_INDEX)
    first_tokens[0, [0, 3, 4]] = ids[0, [0, 3, 4]]  # what each document starts with; no token of it comes before
    for skip_logits in (False, True):
        assert model(input_ids=ids, cu_seqlens=cu_seqlens, labels=first_tokens, skip_logits=skip_logits).loss == 0
        outputs = model(input_ids=ids, cu_seqlens=cu_seqlens, labels=ids)
        predicted = nn.functional.cross_entropy(outputs.logits[0, [0, 1, 4, 5, 6]], ids[0, [1, 2, 5, 6, 7]])
        # Worst difference measured over twenty seeds: 4.8e-7.
        torch.testing.assert_close(outputs.loss, predicted, atol=5e-6, rtol=0)


# --- What is refused.


def row_of(*lengths: int) -> dict[str, Tensor]:
    ids = torch.randint(7, 263, (1, sum(lengths)))
    return {"input_ids": ids, "cu_seqlens": documents_from_lengths(lengths).cu_seqlens}


def test_a_cache_is_refused(make_model):
    model = make_model("M*")
    cache = model(input_ids=torch.tensor([[7, 8]]), use_cache=True).past_key_values
    assert cache is not None
    for option in ({"past_key_values": cache}, {"use_cache": True}):
        with pytest.raises(ValueError, match="cannot use a cache, which would carry state across documents"):
            model(**row_of(3, 4), **option)
    assert model(**row_of(3, 4), use_cache=False).past_key_values is None


def test_the_mixer_itself_refuses_a_cache(make_model):
    model = make_model("M")
    mixer = model.language_model.model.layers[0].mixer
    assert isinstance(mixer, PackedMamba2Mixer)
    with pytest.raises(ValueError, match="a packed row cannot use a cache; pass use_cache=False with cu_seqlens"):
        mixer(torch.randn(1, 7, 32), cache_params=DynamicCache(), documents=documents_from_lengths([3, 4]))


def test_a_mask_beside_the_boundaries_is_refused(make_model):
    with pytest.raises(ValueError, match="pass cu_seqlens or attention_mask, not both"):
        make_model("M")(**row_of(3, 4), attention_mask=torch.ones(1, 7, dtype=torch.int64))


def test_several_rows_are_refused(make_model):
    row = row_of(3, 4)
    with pytest.raises(ValueError, match=r"describes one packed row, got a batch of 2 rows; expected \(1, T\)"):
        make_model("M")(input_ids=row["input_ids"].repeat(2, 1), cu_seqlens=row["cu_seqlens"])


@pytest.mark.parametrize("boundaries", [[1, 7], [0, 5, 3, 7], [0, 3, 6], [0, 3, 8], [0], []], ids=str)
def test_boundaries_that_do_not_cover_the_row_are_refused(make_model, boundaries):
    row = {**row_of(3, 4), "cu_seqlens": torch.tensor(boundaries, dtype=torch.int32)}
    with pytest.raises(ValueError, match="for a row of 7 tokens; expected boundaries that start at 0, never decrease"):
        make_model("M")(**row)


def test_images_that_do_not_fit_name_the_document(make_model, make_batch):
    model = make_model("M")
    packed = pack(make_batch([[3, (2, 2)], [5], [(2, 4), 2, (2, 2)]]))
    assert packed["cu_seqlens"].tolist() == [0, 4, 9, 14]
    model(**packed, num_images=torch.tensor([1, 0, 2]))
    with pytest.raises(
        FusionError, match="document 1 has 0 image placeholder tokens for 2 features of its 1 image"
    ) as e:
        model(**packed, num_images=torch.tensor([1, 1, 1]))
    assert e.value.row == 1
    # The totals agree, and yet the first document ends inside the second image.
    shifted = {**packed, "image_grid_hw": packed["image_grid_hw"][[1, 0, 2]]}
    with pytest.raises(
        FusionError, match="document 0 has 1 image placeholder tokens that do not match the images"
    ) as e:
        model(**shifted)
    assert e.value.row == 0
    text = {name: value for name, value in packed.items() if name not in ("pixel_values", "image_grid_hw")}
    with pytest.raises(FusionError, match="document 0 has 1 image placeholder tokens and no image was given"):
        model(**text)


# --- The attention that runs.


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("chosen", ["sdpa", "eager"])
def test_attention_chosen_by_the_user_gives_the_same_numbers(make_model, make_batch, chosen, mode):
    ours, theirs = make_model("*M*E").train(mode == "train"), make_model("*M*E").train(mode == "train")
    theirs.set_attn_implementation(chosen)
    for config in (theirs.config.text_config, theirs.config.vision_config):
        assert config._attn_implementation == chosen
    for config in (ours.config.text_config, ours.config.vision_config):
        assert config._attn_implementation == ATTENTION
    packed = pack(make_batch(ROWS["several_images"]))
    found = differences(run(theirs, [packed]), run(ours, [packed]))
    # Worst relative difference measured over twenty seeds: 2.5e-6 (A_log).
    assert max(found.values()) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("chosen", ["sdpa", "eager"])
def test_attention_chosen_by_the_user_keeps_documents_apart(make_model, make_batch, chosen):
    model = make_model("*M*")
    model.set_attn_implementation(chosen)
    assert_equal_to_documents(model, pack(make_batch(ROWS["several_images"])))


def test_attention_that_takes_no_packed_row_is_refused(make_model):
    model = make_model("M*")
    model.config.text_config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation is 'flex_attention', which takes no packed rows here"):
        model(**row_of(3, 4))


def test_flash_attention_is_given_the_boundaries_and_no_mask(make_model):
    config = make_model("*").config.text_config
    config._attn_implementation = "flash_attention_2"
    documents = documents_from_lengths([3, 0, 5])
    inputs = packed_inputs(config, documents, torch.bfloat16)
    for side in "qk":
        assert inputs[f"cu_seq_lens_{side}"].tolist() == [0, 3, 3, 8]
        assert inputs[f"max_length_{side}"] == 5
    assert inputs["attention_mask"] == {"full_attention": None, "linear_attention": None}
    assert inputs["use_cache"] is False


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.made_by = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.numel() > self.elements:
                self.elements, self.made_by = value.numel(), f"{func} {tuple(value.shape)}"
        return result


@pytest.mark.parametrize("lengths", [[2048], [600, 1, 1447], [32] * 64], ids=["one", "three", "many"])
def test_nothing_in_the_square_of_the_row_is_made(make_model, lengths):
    model = make_model("M*E-", vocab_size=300, mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8).train()
    row = row_of(*lengths)
    tokens = sum(lengths)
    assert tokens == 2048
    with LargestTensor() as largest:
        model(**row, labels=row["input_ids"]).loss.backward()
    assert tokens * 300 <= largest.elements < tokens**2 // 4, largest.made_by  # the logits are seen, and are less
    model.set_attn_implementation("sdpa")
    with LargestTensor() as largest:
        model(**row)
    assert largest.elements >= tokens**2, "the detector does see a mask where there is one"


def test_nothing_in_the_square_of_the_images_is_made(make_model):
    model = make_model("M").train()
    grids = torch.tensor([[16, 16]] * 8)
    patches = torch.randint(0, 256, (2048, 192), dtype=torch.uint8)
    with LargestTensor() as largest:
        features, _ = model.get_image_features(patches, grids)
        features.sum().backward()
    assert 2048 * 192 <= largest.elements < 2048**2 // 4, largest.made_by


# --- The tower.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_image_does_not_change_a_bit_of_another(make_model, dtype):
    model = make_model("M", dtype, vision_layers=2)
    grids = torch.tensor([[2, 4], [4, 4], [2, 2]])
    patches = torch.randint(0, 256, (28, 192), dtype=torch.uint8)
    features, counts = model.get_image_features(patches, grids)
    for image, (start, stop) in enumerate(itertools.pairwise([0, *itertools.accumulate(counts)])):
        other = torch.randint(0, 256, (28, 192), dtype=torch.uint8)
        other[4 * start : 4 * stop] = patches[4 * start : 4 * stop]
        other_features, _ = model.get_image_features(other, grids)
        assert torch.equal(other_features[start:stop], features[start:stop])
        assert not torch.equal(other_features, features)
        alone, _ = model.get_image_features(patches[4 * start : 4 * stop], grids[image : image + 1])
        # Worst relative difference measured over twenty seeds: 7.0e-7 in float32, 0 in bfloat16.
        assert (alone - features[start:stop]).norm() <= TOLERANCE[dtype] * alone.norm()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("grids", [[[2, 4], [4, 4], [2, 2]], [[4, 6]]], ids=["several", "one"])
def test_the_tower_equals_transformers_loop_over_images(make_model, grids, mode):
    ours = make_model("M", vision_layers=2).vision_model.train(mode == "train")
    theirs = RadioModel(make_model("M", vision_layers=2).config.vision_config)
    theirs.make_preprocessor_external()
    theirs.load_state_dict(ours.state_dict())
    theirs.set_attn_implementation("sdpa")
    theirs.train(mode == "train")
    assert sum(isinstance(module, PackedRadioAttention) for module in ours.modules()) == 2
    assert not any(isinstance(module, PackedRadioAttention) for module in theirs.modules())
    grids = torch.tensor(grids)
    patches = torch.randn(int(grids.prod(-1).sum()), 192)
    features = ours(patches, image_grid_hw=grids).features
    expected = theirs(patches, image_grid_hw=grids).features
    assert torch.equal(features, expected)
    weight = torch.randn_like(features)
    for output in (features, expected):
        (output * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    assert len(gradients) > 20
    for name, parameter in ours.named_parameters():
        assert name not in gradients or torch.equal(parameter.grad, gradients[name]), name


def test_an_adapter_on_the_output_projection_is_applied(make_model):
    class Doubled(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * self.base(hidden)

    mixer = make_model("M").language_model.model.layers[0].mixer
    hidden, documents = torch.randn(1, 12, 32), documents_from_lengths([5, 7])
    before = mixer(hidden, documents=documents)
    mixer.out_proj = Doubled(mixer.out_proj)
    assert torch.equal(mixer(hidden, documents=documents), 2 * before)
