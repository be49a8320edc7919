"""Videos in the model: the tower in micro-batches, tubelets of any grids, beside other media, and in generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_vlm import NemotronVL
from lightning_vlm.data.collate import PaddedCollate
from lightning_vlm.models.fusion import FusionError
from lightning_vlm.models.media import MediaInputs, encode_media
from lightning_vlm.schema import MEDIA_FIELDS, Sample, VLMBatch
from lightning_vlm.training.freezing import freeze
from lightning_vlm.training.generation import left_padded_prompts
from tests.fixtures.gradients import assert_same_gradients, gradients
from tests.fixtures.media_samples import ALL_MEDIA, media_processor, picture, sample, sound, varied_samples, video

NEW_TOKENS = 6
VIDEOS = torch.tensor([[3, 4, 4], [1, 2, 8], [4, 4, 2], [2, 4, 4]])  # of 10 tubelets, 20 frames


@pytest.fixture
def seeing(make_model: Callable[..., NemotronVL], shake: Callable[..., Any]) -> NemotronVL:
    return shake(make_model(pattern="M*-", vision_layers=2, **ALL_MEDIA))


def patches(grids: Tensor = VIDEOS, frames: int = 2, seed: int = 0) -> Tensor:
    shape = (int(grids.prod(-1).sum()), frames * 3 * 8 * 8)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# The tower


def passes_of(model: NemotronVL) -> list[int]:
    """Tokens of each pass through the encoder, filled as it runs."""
    seen: list[int] = []
    model.vision_model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    return seen


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 5, 7, 19, 20, 1000])
def test_micro_batches_change_nothing(seeing: NemotronVL, micro_batch: int, checkpointing: bool) -> None:
    weights, results = torch.randn(int(VIDEOS.prod(-1).sum()) // 4, 32), []
    if checkpointing:
        seeing.activation_checkpointing_enable({"use_reentrant": False})
    seeing.train()
    for size in (None, micro_batch):
        seeing.vision_model.micro_batch = size
        features, _ = seeing.get_video_features(patches(), VIDEOS)
        (features * weights).sum().backward()
        results.append((features.detach(), gradients(seeing)))
    (features, expected), (actual, found) = results
    # Worst measured over all cases and four seeds: 4.8e-6 (features up to 9) and 8.6e-7 (gradients).
    torch.testing.assert_close(actual, features, rtol=0, atol=2e-5)
    assert_same_gradients(found, expected, 3e-6)


@pytest.mark.parametrize(
    ("micro_batch", "tubelets"),
    [(1, [1] * 10), (2, [1] * 10), (3, [1] * 10), (4, [2] * 5), (7, [3, 3, 3, 1]), (20, [10]), (None, [10])],
)
def test_a_tubelet_is_never_divided(seeing: NemotronVL, micro_batch: int | None, tubelets: list[int]) -> None:
    seen = passes_of(seeing)
    seeing.vision_model.micro_batch = micro_batch
    with torch.no_grad():
        seeing.get_video_features(patches(), VIDEOS)
    sizes = [rows * columns for number, rows, columns in VIDEOS.tolist() for _ in range(number)]
    prefix, expected = seeing.config.vision_config.num_summary_tokens, []
    for count in tubelets:
        own, sizes = sizes[:count], sizes[count:]
        expected.append(sum(own) + count * prefix)
    assert seen == expected
    assert not sizes


def test_images_count_as_one_frame_each(seeing: NemotronVL) -> None:
    seen, grids = passes_of(seeing), torch.tensor([[4, 4], [2, 6], [4, 2], [2, 2], [4, 4]])
    with torch.no_grad():
        whole, _ = seeing.get_image_features(patches(grids, 1), grids)
        seeing.vision_model.micro_batch = 2
        parts, _ = seeing.get_image_features(patches(grids, 1), grids)
    assert len(seen) == 1 + 3
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("recompute", [True, False])
def test_only_training_with_checkpointing_recomputes_a_pass(seeing: NemotronVL, recompute: bool) -> None:
    seen = passes_of(seeing.train())
    seeing.vision_model.micro_batch = 4
    if recompute:
        seeing.activation_checkpointing_enable({"use_reentrant": False})
    features, _ = seeing.get_video_features(patches(), VIDEOS)
    assert len(seen) == 5
    features.sum().backward()
    assert len(seen) == (10 if recompute else 5)
    with torch.no_grad():
        seeing.get_video_features(patches(), VIDEOS)
    assert len(seen) == (15 if recompute else 10)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_a_pass_ends_behind_the_projector(seeing: NemotronVL, frozen: bool) -> None:
    """Its hidden layer is wider than the tower: all at once it would need more memory than a pass of the tower."""
    freeze(seeing.train(), ["vision"] if frozen else [])
    seeing.activation_checkpointing_enable({"use_reentrant": False})
    tower, projected = passes_of(seeing), list[int]()
    seeing.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: projected.append(len(inputs[0])))
    features, _ = seeing.get_video_features(patches(), VIDEOS)
    assert projected == [len(features)]
    seeing.vision_model.micro_batch = 4
    features, _ = seeing.get_video_features(patches(), VIDEOS)
    assert projected[1:] == [8, 8, 4, 4, 8]
    assert sum(projected[1:]) == len(features)
    features.sum().backward()
    assert len(projected) == 1 + 5 + 5, "recomputed pass by pass"
    assert len(tower) == 1 + 5 + (0 if frozen else 5), "a frozen tower is not run again for the projector's sake"


def test_every_tubelet_is_as_alone(seeing: NemotronVL) -> None:
    # Several grids, of equal and of swapped sides: each has its own place embeddings.
    pixels = patches()
    with torch.no_grad():
        together, kept = seeing.get_video_features(pixels, VIDEOS)
        alone = []
        for number, rows, columns in VIDEOS.tolist():
            for _ in range(number):
                own, pixels = pixels[: rows * columns], pixels[rows * columns :]
                alone.append(seeing.get_video_features(own, torch.tensor([[1, rows, columns]]))[0])
    assert not len(pixels)
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=2e-5)  # worst measured: 4.0e-6
    assert [counts.tolist() for counts in kept] == [[4, 4, 4], [4], [2, 2, 2, 2], [4, 4]]


def test_place_embeddings_tell_grids_apart(seeing: NemotronVL) -> None:
    grey = torch.full((8, 2 * 192), 128, dtype=torch.uint8)
    with torch.no_grad():
        wide, tall = (seeing.get_video_features(grey, torch.tensor([[1, *grid]]))[0] for grid in ((2, 4), (4, 2)))
    assert not torch.allclose(wide, tall, atol=1e-3)


def test_frames_without_a_video_embedder_are_images(make_model: Callable[..., NemotronVL]) -> None:
    model, grids = make_model(), torch.tensor([[3, 4, 4]])
    pixels = patches(grids, frames=1)
    with torch.no_grad():
        of_video, kept = model.get_video_features(pixels, grids)
        of_images, _ = model.get_image_features(pixels, torch.tensor([[4, 4]] * 3))
    assert torch.equal(of_video, of_images)
    assert kept[0].tolist() == [4, 4, 4]


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_frames_that_are_images_share_a_pass_with_images(make_model: Callable[..., NemotronVL], shake, rate) -> None:
    """So that ranks with both and ranks with one of them run the tower equally often."""
    model = shake(make_model(pattern="M*-", vision_layers=2))
    processor = media_processor(rate, video={"temporal_patch_size": 1})
    both = sample(processor, "a", picture(seed=1), video(processor, 4, seed=2), "b", video(processor, 2, seed=3), "?")
    batch = PaddedCollate(0)([both])
    seen = passes_of(model)
    together = encode_media(model, MediaInputs(**batch.media_inputs()), None)[0]
    assert len(seen) == 1
    for kind, fields in {"image": ("pixel_values", "image_grid_hw"), "video": MEDIA_FIELDS[2:5]}.items():
        alone = encode_media(model, MediaInputs(**{name: getattr(batch, name) for name in fields}), None)[0]
        assert alone.keys() == {kind}
        assert together[kind].counts == alone[kind].counts
        # Worst measured: 3.6e-6, at features up to 4.
        torch.testing.assert_close(together[kind].values, alone[kind].values, rtol=0, atol=1e-5)
    assert (together["video"].tokens_per_tubelet is None) == (rate == 0)
    assert model(**batch.model_inputs(), labels=batch.labels).loss.isfinite()


@pytest.mark.parametrize("video", [True, False])
def test_patches_of_another_width_are_refused(make_model: Callable[..., NemotronVL], video: bool) -> None:
    model, grids = make_model(video=video), torch.tensor([[1, 2, 2]])
    expected = r"expected 192 \(an image's\)" + (r" or 384 \(a tubelet's\)" if video else "; use")
    for width in (576, 768) if video else (384, 768):
        with pytest.raises(ValueError, match=rf"patches have {width} values; " + expected.replace("; use", ": use")):
            model.get_video_features(torch.zeros(4, width, dtype=torch.uint8), grids)


def test_patches_of_another_kind_are_refused(seeing: NemotronVL) -> None:
    """The tower has an embedder for either, so they would be seen all the same, by the wrong one."""
    with pytest.raises(FusionError, match=r"values_videos has patches of 1 frame\(s\) each; this model expects 2"):
        seeing.get_video_features(torch.zeros(4, 192, dtype=torch.uint8), torch.tensor([[1, 2, 2]]))
    with pytest.raises(FusionError, match=r"pixel_values has patches of 2 frame\(s\) each; this model expects 1"):
        seeing.get_image_features(torch.zeros(4, 384, dtype=torch.uint8), torch.tensor([[2, 2]]))


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_pixels_become_floats_pass_by_pass(seeing: NemotronVL, micro_batch: int | None) -> None:
    """All at once they would be many times the size of the video, whatever a pass of the tower takes."""
    normalised: list[int] = []
    seeing.vision_model.input_conditioner.register_forward_hook(lambda _, __, output: normalised.append(len(output)))
    seeing.vision_model.micro_batch = micro_batch
    seeing.get_video_features(patches(), VIDEOS)
    assert sum(normalised) == len(patches())
    assert len(normalised) == (1 if micro_batch is None else 5)


def test_mismatches_are_refused_with_both_numbers(seeing: NemotronVL) -> None:
    with pytest.raises(FusionError, match="pixel_values_videos has 15 patches but video_grid_thw describes 16"):
        seeing.get_video_features(patches()[:15], torch.tensor([[1, 4, 4]]))
    with pytest.raises(FusionError, match=r"grid \(3, 4\) is not a multiple of 2"):
        seeing.get_video_features(patches()[:12], torch.tensor([[1, 3, 4]]))
    ids = torch.tensor([[5, 4, 6]])
    with pytest.raises(FusionError, match="pixel_values_videos needs video_grid_thw beside it"):
        seeing(ids, pixel_values_videos=patches()[:16])
    with pytest.raises(FusionError, match="video features need input_ids"):
        seeing(inputs_embeds=torch.zeros(1, 3, 32), pixel_values_videos=patches()[:48], video_grid_thw=VIDEOS[:1])


# Together


def inputs_of(items: list[Sample]) -> dict[str, Tensor]:
    return PaddedCollate(0)(items).model_inputs()


def test_images_and_videos_need_their_types(seeing: NemotronVL) -> None:
    given = inputs_of(varied_samples(media_processor()))
    del given["mm_token_type_ids"]
    with pytest.raises(FusionError, match="needs mm_token_type_ids"):
        seeing(**given)


def test_videos_alone_need_no_types(seeing: NemotronVL) -> None:
    processor = media_processor(0.5)
    given = inputs_of([sample(processor, video(processor, 6, seed=1), "a"), sample(processor, sound(), "b")])
    with torch.no_grad():
        expected = seeing(**given).logits
        del given["mm_token_type_ids"]
        assert torch.equal(seeing(**given).logits, expected)


def test_every_medium_reaches_its_own_row_alone(seeing: NemotronVL) -> None:
    items = varied_samples(media_processor(0.5))
    batch = PaddedCollate(0)(items)
    with torch.no_grad():
        logits = seeing(**batch.model_inputs()).logits
        for name, rows in {
            "pixel_values": [0, 3],
            "pixel_values_videos": [0, 2],
            "input_features": [0, 4],
        }.items():
            changed = batch.model_inputs()
            changed[name] = changed[name].flip(-1)
            difference = (seeing(**changed).logits - logits).abs().amax((1, 2)) > 1e-4
            assert difference.nonzero().flatten().tolist() == rows, name


@pytest.mark.parametrize("kind", ["image", "video", "sound"])
def test_placeholders_without_a_medium_are_refused(seeing: NemotronVL, kind: str) -> None:
    processor = media_processor()
    said = {"image": picture(), "video": video(processor, 3), "sound": sound()}[kind]
    fields = {
        "image": ("pixel_values", "image_grid_hw"),
        "video": ("pixel_values_videos", "video_grid_thw", "num_video_tokens"),
        "sound": ("input_features", "input_features_mask"),
    }[kind]
    given = inputs_of([sample(processor, "a"), sample(processor, said)])
    given = {name: value for name, value in given.items() if name not in fields}
    with pytest.raises(FusionError, match=rf"row 1 has \d+ {kind} placeholder tokens and no {kind} was given"):
        seeing(**given)


@pytest.mark.parametrize("known", [True, False], ids=["counted", "not counted"])
def test_media_of_another_row_are_refused(seeing: NemotronVL, known: bool) -> None:
    processor = media_processor()
    short, long = sample(processor, video(processor, 2)), sample(processor, video(processor, 4))
    given = inputs_of([short, long])
    swapped = inputs_of([long, short])
    for name in ("pixel_values_videos", "video_grid_thw", "num_video_tokens"):
        given[name] = swapped[name]
    if not known:
        del given["num_videos"]
    with pytest.raises(FusionError, match="row 0 has 4 video placeholder tokens"):
        seeing(**given)


# Generation


@pytest.fixture(params=["M*-", "MEM*"])
def talker(request: Any, make_model: Callable[..., NemotronVL], shake: Callable[..., Any]) -> NemotronVL:
    """A model that does not repeat itself, and says neither the end token nor a placeholder."""
    model = shake(make_model(pattern=request.param, **ALL_MEDIA), std=0.2)
    with torch.no_grad():
        model.language_model.lm_head.weight[[3, 4, 263]] = 0.0
        model.multi_modal_projector.linear_2.weight *= 10.0
        model.embed_audio.linear_2.weight *= 10.0
    return model


def prompt_of(batch: VLMBatch) -> dict[str, Tensor]:
    return left_padded_prompts(batch, 0) | batch.media_inputs()


def generate(model: NemotronVL, prompt: dict[str, Tensor], **options: Any) -> Tensor:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(**prompt, **options)[:, prompt["input_ids"].shape[1] :]


def scores(model: NemotronVL, prompt: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Logits of two steps."""
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    return model.generate(**prompt, **options, return_dict_in_generate=True, output_logits=True).logits


@torch.no_grad()
def plain_loop(model: NemotronVL, prompt: dict[str, Tensor]) -> Tensor:
    prompt = {name: value for name, value in prompt.items() if name != "attention_mask"}
    for _ in range(NEW_TOKENS):
        token = model(**prompt, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        prompt["input_ids"] = torch.cat([prompt["input_ids"], token], 1)
        if "mm_token_type_ids" in prompt:
            prompt["mm_token_type_ids"] = torch.cat([prompt["mm_token_type_ids"], torch.zeros_like(token)], 1)
    return prompt["input_ids"][:, -NEW_TOKENS:]


@pytest.mark.parametrize("rate", [0.0, 0.6])
def test_answers_are_alike_padded_alone_cached_and_not(talker: NemotronVL, rate: float) -> None:
    items = varied_samples(media_processor(rate))
    together = generate(talker, prompt_of(PaddedCollate(0)(items)))
    prompts = [prompt_of(PaddedCollate(0)([item])) for item in items]
    alone = [generate(talker, prompt) for prompt in prompts]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(generate(talker, prompt_of(PaddedCollate(0)(items)), use_cache=False), together)
    for prompt, answer in zip(prompts, alone):
        assert torch.equal(plain_loop(talker, prompt), answer)
    for prompt, name in zip(prompts[2:], ("pixel_values_videos", "pixel_values", "input_features")):
        changed = {**prompt, name: prompt[name].flip(-1)}
        (first, second), (other_first, other_second) = scores(talker, prompt), scores(talker, changed)
        assert (first - other_first).abs().max() > 1e-3, name
        assert (second - other_second).abs().max() > 1e-3, name  # told by the cache
    assert len({tuple(row) for row in together.tolist()}) > 2


def test_media_are_encoded_in_the_first_step_only(talker: NemotronVL) -> None:
    runs: list[str] = []
    talker.vision_model.register_forward_hook(lambda *_: runs.append("vision"))
    talker.audio_tower.register_forward_hook(lambda *_: runs.append("sound"))
    generate(talker, prompt_of(PaddedCollate(0)(varied_samples(media_processor(0.5)))))
    assert runs == ["vision", "vision", "sound"]
