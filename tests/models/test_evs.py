"""EVS: which tokens of a video stay, where the text between its tubelets goes, and what reaches the language model."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.nemotron_h_omni.modeling_nemotron_h_omni import compute_retention_mask

from lightning_vlm import NemotronVL
from lightning_vlm.data.collate import PackedCollate, PaddedCollate
from lightning_vlm.geometry.videos import retained_tokens
from lightning_vlm.models.evs import lay_out_videos, prune_videos, retention_mask, spread_placeholders
from lightning_vlm.models.fusion import FusionError
from lightning_vlm.schema import IGNORE_INDEX, Sample
from tests.fixtures.gradients import assert_same_gradients, gradients
from tests.fixtures.media_samples import ALL_MEDIA, conversation, media_processor, picture, sample, sound, video

IMAGE, START, END = 4, 5, 6


def random_features(tubelets: int, size: int, seed: int = 0, width: int = 8) -> Tensor:
    return torch.randn(tubelets, size, width, generator=torch.Generator().manual_seed(seed))


shapes = st.tuples(st.integers(1, 9), st.integers(1, 12), st.floats(0, 0.99), st.integers(0, 10**6))


class TestWhichStay:
    @settings(max_examples=150, deadline=None)
    @given(shape=shapes)
    def test_as_many_as_planned_and_all_of_the_first(self, shape: tuple[int, int, float, int]) -> None:
        tubelets, size, rate, seed = shape
        kept = retained_tokens(size, tubelets, rate)
        mask = retention_mask(random_features(tubelets, size, seed), kept)
        assert int(mask.sum()) == kept
        assert mask[0].all()

    @settings(max_examples=150, deadline=None)
    @given(shape=shapes)
    def test_are_those_of_a_naive_choice(self, shape: tuple[int, int, float, int]) -> None:
        tubelets, size, rate, seed = shape
        # Unit vectors along eight axes: cosines are exactly -1, 0 or 1, so nearly all is decided by ties.
        generator = random.Random(seed)
        axes = [[(generator.randrange(4), generator.choice([-1, 1])) for _ in range(size)] for _ in range(tubelets)]
        features = torch.zeros(tubelets, size, 4)
        scored = []
        for t, tubelet in enumerate(axes):
            for place, (axis, sign) in enumerate(tubelet):
                features[t, place, axis] = sign * generator.choice([1.0, 2.0, 4.0])
                before = axes[t - 1][place]
                cosine = sign * before[1] if axis == before[0] else 0
                scored.append((-255 if t == 0 else cosine - 1, t * size + place))
        kept = retained_tokens(size, tubelets, rate)
        chosen = sorted(place for _, place in sorted(scored)[:kept])
        assert retention_mask(features, kept).flatten().nonzero().flatten().tolist() == chosen

    @pytest.mark.parametrize("rate", [0.0, 0.3, 0.7, 0.95])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_are_those_of_transformers(self, rate: float, dtype: torch.dtype) -> None:
        for tubelets, rows, columns in [(1, 2, 3), (2, 1, 1), (7, 4, 5), (16, 6, 2)]:
            features = random_features(tubelets, rows * columns, tubelets).to(dtype)
            theirs = compute_retention_mask(
                video_embeds=features, thw=(tubelets, rows, columns), spatial_merge_size=1, q=rate
            )
            mask = retention_mask(features, retained_tokens(rows * columns, tubelets, rate))
            assert torch.equal(mask.flatten(), theirs)

    def test_among_equals_the_earlier(self) -> None:
        still = torch.ones(5, 4, 3)
        assert retention_mask(still, 7).int().tolist() == [[1] * 4, [1, 1, 1, 0], [0] * 4, [0] * 4, [0] * 4]

    def test_a_change_stays_where_it_is(self) -> None:
        features = torch.ones(4, 3, 2)
        features[2, 1] *= -1  # appears in tubelet 2, and is gone again in tubelet 3
        assert retention_mask(features, 5).int().tolist() == [[1] * 3, [0] * 3, [0, 1, 0], [0, 1, 0]]

    def test_brightness_is_no_change(self) -> None:
        features = random_features(1, 6).repeat(3, 1, 1) * torch.tensor([1.0, 8.0, 0.5]).view(3, 1, 1)
        features[1, 4] += random_features(1, 1, 5)[0, 0]
        assert retention_mask(features, 7)[1].tolist() == [False] * 4 + [True, False]

    def test_the_choice_has_no_gradient(self) -> None:
        assert not retention_mask(random_features(3, 4).requires_grad_(), 6).requires_grad


class TestPruning:
    def test_keeps_order_and_counts_of_each_video(self) -> None:
        sizes, kept = [(3, 4), (2, 6), (1, 5), (4, 2)], [7, 12, 5, 2]
        features = torch.cat([random_features(t, s, seed).flatten(0, 1) for seed, (t, s) in enumerate(sizes)])
        pruned, counts = prune_videos(features, sizes, kept)
        parts = features.split([t * s for t, s in sizes])
        masks = [retention_mask(part.view(t, s, -1), k) for part, (t, s), k in zip(parts, sizes, kept)]
        assert torch.equal(pruned, torch.cat([part[mask.flatten()] for part, mask in zip(parts, masks)]))
        assert [count.tolist() for count in counts] == [mask.sum(-1).tolist() for mask in masks]
        assert [int(count.sum()) for count in counts] == kept

    def test_without_numbers_keeps_all(self) -> None:
        features = random_features(3, 4).flatten(0, 1)
        pruned, counts = prune_videos(features, [(3, 4)], None)
        assert torch.equal(pruned, features)
        assert counts[0].tolist() == [4, 4, 4]

    def test_gradient_reaches_what_stays_and_nothing_else(self) -> None:
        features = random_features(5, 6).flatten(0, 1).requires_grad_()
        pruned, _ = prune_videos(features, [(5, 6)], [13])
        weights = torch.randn_like(pruned)
        (pruned * weights).sum().backward()
        mask = retention_mask(features.detach().view(5, 6, -1), 13).flatten()
        assert torch.equal(features.grad[mask], weights)
        assert not features.grad[~mask].any()

    @pytest.mark.parametrize("number", [3, 13])
    def test_less_than_a_tubelet_or_more_than_all_is_refused(self, number: int) -> None:
        with pytest.raises(FusionError, match=rf"num_video_tokens is {number} for a video of 3 tubelets of 4 tokens"):
            prune_videos(random_features(3, 4).flatten(0, 1), [(3, 4)], [number])

    @pytest.mark.parametrize("numbers", [[6], [6, 6, 6]])
    def test_as_many_numbers_as_videos_are_expected(self, numbers: list[int]) -> None:
        with pytest.raises(FusionError, match=rf"num_video_tokens has {len(numbers)} number\(s\) for 2 video\(s\)"):
            prune_videos(random_features(6, 4).flatten(0, 1), [(3, 4), (3, 4)], numbers)


# Where the text goes


Rows = list[list[int]]


def random_rows(generator: random.Random) -> tuple[Rows, Rows, Rows, Rows, list[Tensor]]:
    """Rows as the processor writes them, and as they should become: tokens, and ones at the placeholders of videos.

    Text has a new number each time, so that any other order shows. Images stand between. And what tubelets keep.
    """
    text, counts = iter(range(100, 10_000)), []
    written: tuple[Rows, Rows] = ([], [])
    expected: tuple[Rows, Rows] = ([], [])

    def add(rows: tuple[Rows, Rows], tokens: list[int], is_video: bool = False) -> None:
        rows[0][-1] += tokens
        rows[1][-1] += [int(is_video)] * len(tokens)

    for _ in range(generator.randint(1, 3)):
        for rows in (*written, *expected):
            rows.append([])
        for _ in range(generator.randint(0, 4)):
            before = [next(text) for _ in range(generator.randint(0, 3))]
            before += generator.choice([[], [], [START, IMAGE, IMAGE, END]])
            kept = [generator.randint(1, 4)] + [generator.randint(0, 4) for _ in range(generator.randint(0, 3))]
            counts.append(torch.tensor(kept))
            add(written, before)
            add(expected, before)
            for number, count in enumerate(kept):
                label = [*(next(text) for _ in range(generator.randint(0, 3))), START]
                for rows, placed in ((written, 0 if number else sum(kept)), (expected, count)):
                    add(rows, label)
                    add(rows, [IMAGE] * placed, True)
                    add(rows, [END])
        tail = [next(text) for _ in range(generator.randint(0 if written[0][-1] else 1, 3))]
        add(written, tail)
        add(expected, tail)
    width = max(map(len, written[0]))
    for rows in (*written, *expected):
        for row in rows:
            row += [0] * (width - len(row))
    return *written, *expected, counts


class TestLayout:
    def test_is_that_of_sequences_built_tubelet_by_tubelet(self) -> None:
        moved = 0
        for seed in range(300):
            written, is_video, expected, _, counts = random_rows(random.Random(seed))
            ids, marks = torch.tensor(written), torch.tensor(is_video).bool()
            order = lay_out_videos(ids, marks, counts)
            assert sorted(order.tolist()) == list(range(ids.numel()))
            assert ids.flatten()[order].view_as(ids).tolist() == expected
            assert (order[marks.flatten()[order]].diff() > 0).all(), "features stay in order"
            moved += ids.tolist() != expected
        assert moved > 150

    def test_of_tokens_that_stand_right_changes_nothing(self) -> None:
        for seed in range(100):
            _, _, expected, is_video, counts = random_rows(random.Random(seed))
            ids = torch.tensor(expected)
            order = lay_out_videos(ids, torch.tensor(is_video).bool(), counts)
            assert torch.equal(order, torch.arange(ids.numel()))

    def test_span_with_other_numbers_is_refused(self) -> None:
        with pytest.raises(FusionError, match=r"2 placeholder tokens after 1 start token\(s\), expected 2 after 2"):
            spread_placeholders(
                torch.tensor([False, True, True]), torch.tensor([True, False, False]), torch.tensor([1, 1])
            )

    def test_placeholders_of_another_video_are_refused(self) -> None:
        ids = torch.tensor([[START, IMAGE, IMAGE, END, START, END]])
        with pytest.raises(FusionError, match=r"2 video placeholder tokens for 3 retained features of 1 video"):
            lay_out_videos(ids, ids == IMAGE, [torch.tensor([1, 2])])

    def test_a_cut_off_tubelet_is_refused(self) -> None:
        ids = torch.tensor([[START, IMAGE, IMAGE, IMAGE, END, 100, 101]])
        with pytest.raises(FusionError, match=r"after 1 start token\(s\), expected 3 after 2"):
            lay_out_videos(ids, ids == IMAGE, [torch.tensor([1, 2])])


# In the model

RATES = [0.3, 0.5, 0.9]


@pytest.fixture
def seeing(make_model: Callable[..., NemotronVL], shake: Callable[..., Any]) -> NemotronVL:
    return shake(make_model(pattern="M*-", **ALL_MEDIA))


def samples(rate: float) -> list[Sample]:
    """Videos of several lengths and grids beside images, sounds and text; one in an answer."""
    processor = media_processor(rate)
    film, long, wide = (
        video(processor, 7, seed=1),
        video(processor, 16, 24, 40, seed=2),
        video(processor, 4, 16, 64, None, 3),
    )
    asked, media = conversation(["show me", picture(seed=4)], ["here: ", film, " it is"], ["more"], ["yes"])
    return [
        sample(processor, "a", film, "b", picture(seed=5), long, "?"),
        sample(processor, wide, sound(3000, 6), video(processor, 1, seed=7), "c", film),
        processor.encode(asked, media),
        sample(processor, "none", answer="indeed"),
    ]


def pruned_by_hand(model: NemotronVL, pruned: Sample, whole: Sample) -> dict[str, Tensor]:
    """What vLLM builds: the sequence of the whole video, tubelet by tubelet, without the tokens that do not stay."""
    is_image, is_video = (whole.mm_token_type_ids == kind for kind in (1, 2))
    embeds = model.get_input_embeddings()(whole.input_ids)
    stays = torch.ones(len(whole), dtype=torch.bool)
    if whole.pixel_values is not None:
        images, _ = model.get_image_features(whole.pixel_values, whole.image_grid_hw)
        embeds = embeds.index_put((is_image,), images)
    if whole.input_features is not None:
        sounds, _ = model.get_audio_features(whole.input_features, whole.input_features_mask)
        embeds = embeds.index_put((whole.mm_token_type_ids == 3,), sounds)
    features, _ = model.get_video_features(whole.pixel_values_videos, whole.video_grid_thw)
    masks = []
    grids = whole.video_grid_thw.tolist()
    for own, (t, h, w), kept in zip(
        features.split([t * h * w // 4 for t, h, w in grids]), grids, pruned.num_video_tokens.tolist()
    ):
        tubelets = own.view(t, h * w // 4, -1)
        scores = [[255.0] * (h * w // 4)] + [
            [1 - torch.cosine_similarity(a, b, dim=0).item() for a, b in zip(now, before)]
            for before, now in itertools.pairwise(tubelets)
        ]
        flat = [score for tubelet in scores for score in tubelet]
        best = sorted(range(len(flat)), key=lambda place: -flat[place])[:kept]
        masks.append(torch.zeros(len(flat), dtype=torch.bool).index_fill(0, torch.tensor(best), True))
    stays[is_video] = torch.cat(masks)
    embeds = embeds.index_put((is_video,), features)
    return {"inputs_embeds": embeds[stays][None], "labels": whole.labels[stays][None]}


@pytest.mark.parametrize("rate", RATES)
def test_a_row_is_the_whole_video_without_the_pruned_tokens(seeing: NemotronVL, rate: float) -> None:
    for pruned, whole in zip(samples(rate)[:3], samples(0.0)):
        assert len(pruned) < len(whole)
        expected = pruned_by_hand(seeing, pruned, whole)
        output = seeing(**PaddedCollate(0)([pruned]).model_inputs(), labels=pruned.labels[None])
        by_hand = seeing(**expected)
        assert expected["labels"].shape[1] == len(pruned)
        assert torch.equal(output.logits, by_hand.logits)
        assert torch.equal(output.loss, by_hand.loss)
        output.loss.backward()
        actual = gradients(seeing)
        by_hand.loss.backward()
        wanted = gradients(seeing)
        assert_same_gradients(actual, wanted, 1e-6)  # worst measured: 0.0; room for kernels that add in another order


def test_none_pruned_is_no_pruning_bit_by_bit(seeing: NemotronVL) -> None:
    batch = PaddedCollate(0)(samples(0.0))
    inputs = batch.model_inputs()
    results = []
    for kept in (batch.num_video_tokens, None):
        output = seeing(**{**inputs, "num_video_tokens": kept}, labels=batch.labels)
        output.loss.backward()
        results.append((output.logits, output.loss, gradients(seeing)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert all(torch.equal(results[0][2][name], gradient) for name, gradient in results[1][2].items())


@pytest.mark.parametrize("rate", RATES)
def test_tower_gradients_come_from_what_stays_alone(seeing: NemotronVL, rate: float) -> None:
    item = samples(rate)[0]
    seen: list[Tensor] = []

    def keep(_: Any, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(seen.append)

    seeing.multi_modal_projector.register_forward_hook(keep)
    batch = PaddedCollate(0)([item])
    seeing(**batch.model_inputs(), labels=batch.labels).loss.backward()
    of_videos = next(gradient for gradient in seen if len(gradient) != 12)  # the image has 12 tokens
    masks = []
    with torch.no_grad():
        features, _ = seeing.get_video_features(item.pixel_values_videos, item.video_grid_thw)
    grids = item.video_grid_thw.tolist()
    for own, (t, h, w), kept in zip(
        features.split([t * h * w // 4 for t, h, w in grids]), grids, item.num_video_tokens.tolist()
    ):
        masks.append(retention_mask(own.view(t, h * w // 4, -1), kept).flatten())
    assert torch.equal(of_videos.any(-1), torch.cat(masks))


@pytest.mark.parametrize("rate", [0.0, *RATES])
def test_padded_is_packed_is_one_by_one(seeing: NemotronVL, rate: float) -> None:
    # In float64, but for norms, logits and loss: in float32 the smallest gradients differ by 1.4e-4, of rounding alone.
    seeing, items = seeing.double(), samples(rate)
    padded, packed = PaddedCollate(0)(items), PackedCollate()(items)
    results = []
    for batches in ([padded], [packed], [PaddedCollate(0)([item]) for item in items]):
        losses, logits = 0.0, []
        for batch in batches:
            output = seeing(**batch.model_inputs(), labels=batch.labels, num_items_in_batch=padded.num_label_tokens)
            losses = losses + output.loss
            real = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
            logits.append(output.logits[real.bool()])
        losses.backward()
        results.append((losses.detach(), torch.cat(logits).detach(), gradients(seeing)))
    loss, logits, grads = results.pop()
    for other_loss, other_logits, other_grads in results:
        torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(other_logits, logits, rtol=0, atol=5e-6)  # worst measured: 6.0e-7 at logits up to 3
        assert_same_gradients(other_grads, grads, 3e-6)  # worst measured: 6.5e-7


def test_labels_move_with_their_tokens(seeing: NemotronVL) -> None:
    # A video in an answer, so that text between its tubelets is trained on: with labels on a row that has only those of
    # one label token, the loss is that token's own at its new place.
    pruned, whole = samples(0.5)[2], samples(0.0)[2]
    placeholders = (pruned.mm_token_type_ids == 2).nonzero().flatten()
    assert (pruned.labels[placeholders] == IGNORE_INDEX).all()
    assert (pruned.labels[[int(placeholders[0]) - 1, int(placeholders[-1]) + 1]] != IGNORE_INDEX).all()
    with torch.no_grad():
        expected = pruned_by_hand(seeing, pruned, whole)
        logits = seeing(inputs_embeds=expected["inputs_embeds"]).logits
        targets = expected["labels"][0, 1:]
        losses = torch.nn.functional.cross_entropy(logits[0, :-1], targets, ignore_index=IGNORE_INDEX, reduction="none")
        batch = PaddedCollate(0)([pruned])
        loss = seeing(**batch.model_inputs(), labels=batch.labels, num_items_in_batch=1).loss
    torch.testing.assert_close(loss, losses.sum(), rtol=1e-5, atol=0)


def test_embeddings_beside_tokens_move_with_them(seeing: NemotronVL) -> None:
    batch = PaddedCollate(0)(samples(0.5))
    embeds = seeing.get_input_embeddings()(batch.input_ids)
    with torch.no_grad():
        expected = seeing(**batch.model_inputs()).logits
        assert torch.equal(seeing(**batch.model_inputs(), inputs_embeds=embeds).logits, expected)


def test_a_video_cut_inside_takes_no_tubelet_of_the_next_row(seeing: NemotronVL) -> None:
    # All of a pruned video's placeholders stand in its first tubelet, so their number does not show the cut.
    processor = media_processor(0.5)
    cut, other = sample(processor, video(processor, 8, seed=1)), sample(processor, video(processor, 8, seed=2))
    cut = copy.copy(cut)
    end = int((cut.mm_token_type_ids == 2).nonzero()[-1]) + 3
    for name in ("input_ids", "labels", "mm_token_type_ids"):
        setattr(cut, name, getattr(cut, name)[:end])
    for batch in (PaddedCollate(0)([cut, other]), PackedCollate()([cut, other])):
        inputs = batch.model_inputs()
        for known in (True, False):
            given = inputs if known else {name: value for name, value in inputs.items() if name != "num_videos"}
            with pytest.raises(FusionError, match="cut no text inside a video"):
                seeing(**given)


def test_bfloat16_keeps_as_many(seeing: NemotronVL) -> None:
    model, batch = seeing.to(torch.bfloat16), PaddedCollate(0)(samples(0.7))
    output = model(**batch.model_inputs(), labels=batch.labels)
    assert output.loss.isfinite()
    _, kept = model.get_video_features(batch.pixel_values_videos, batch.video_grid_thw, batch.num_video_tokens)
    assert [int(counts.sum()) for counts in kept] == batch.num_video_tokens.tolist()
