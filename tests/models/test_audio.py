"""Sounds in the model: every clip as if it were alone, also in training; nothing of it left to chance."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_vlm import NemotronVL, NemotronVLConfig
from lightning_vlm.models.audio import FixedBatchNorm1d
from lightning_vlm.models.fusion import FusionError
from tests.fixtures.gradients import assert_same_gradients, gradients
from tests.fixtures.media_samples import ALL_MEDIA, media_processor, sound

LENGTHS = [4000, 1600, 8000, 7999, 2720]  # samples: 25, 10, 50, 49 and 17 frames


@pytest.fixture
def hearing(make_model: Callable[..., NemotronVL], shake: Callable[..., Any]) -> NemotronVL:
    return shake(make_model(pattern="M*-", **ALL_MEDIA))


def clips(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Spectrograms and masks of one batch of sounds, each of one clip."""
    found = media_processor()(
        text=["<so_embedding>"] * len(lengths),
        audio=[sound(length, length) for length in lengths],
    )
    return found["input_features"], found["input_features_mask"]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_clip_is_as_alone(hearing: NemotronVL, training: bool) -> None:
    hearing.train(training)
    spectrograms, mask = clips(LENGTHS)
    with torch.no_grad():
        together, counts = hearing.get_audio_features(spectrograms, mask)
        alone = [hearing.get_audio_features(*clips([length])) for length in LENGTHS]
    assert counts == [4, 2, 7, 7, 3] == [count for _, (count,) in alone]
    # Worst measured over 50 seeds: 2.8e-6 (features up to 5): sums over longer rows, in another order.
    torch.testing.assert_close(together, torch.cat([values for values, _ in alone]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("frames", [1, 7, 8, 100])
def test_padding_changes_nothing(hearing: NemotronVL, frames: int) -> None:
    spectrograms, mask = clips(LENGTHS)
    padded = nn.functional.pad(spectrograms, (0, 0, 0, frames)), nn.functional.pad(mask, (0, frames))
    with torch.no_grad():
        expected, counts = hearing.get_audio_features(spectrograms, mask)
        actual, padded_counts = hearing.get_audio_features(*padded)
    assert padded_counts == counts
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)  # worst measured over 50 seeds: 2.9e-6


def test_no_clip_hears_another(hearing: NemotronVL) -> None:
    hearing.train()
    spectrograms, mask = clips(LENGTHS)
    spectrograms.requires_grad_()
    features, counts = hearing.get_audio_features(spectrograms, mask)
    features.split(counts)[2].sum().backward()
    assert spectrograms.grad is not None
    assert spectrograms.grad.any(-1).any(-1).tolist() == [False, False, True, False, False]


def test_training_leaves_the_statistics_and_is_evaluation(hearing: NemotronVL) -> None:
    spectrograms, mask = clips(LENGTHS)
    before = {name: buffer.clone() for name, buffer in hearing.audio_tower.named_buffers()}
    assert any("running_mean" in name for name in before)
    expected, _ = hearing.eval().get_audio_features(spectrograms, mask)  # with gradients: without, other kernels run
    actual, _ = hearing.train().get_audio_features(spectrograms, mask)
    assert torch.equal(actual, expected)
    actual.sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in hearing.audio_tower.named_buffers())
    norms = [module for module in hearing.modules() if isinstance(module, nn.BatchNorm1d)]
    assert len(norms) == 2
    assert all(norm.weight.grad.any() and norm.bias.grad.any() for norm in norms)


@pytest.mark.parametrize("train", ["model", "tower", "norm"])
def test_no_mode_takes_numbers_from_the_batch(hearing: NemotronVL, train: str) -> None:
    spectrograms, mask = clips(LENGTHS)
    with torch.no_grad():
        expected, _ = hearing.get_audio_features(spectrograms, mask)
        norm = hearing.audio_tower.layers[0].conv.norm
        {"model": hearing, "tower": hearing.audio_tower, "norm": norm}[train].train()
        assert torch.equal(hearing.get_audio_features(spectrograms, mask)[0], expected)


def test_without_a_mask_all_frames_count(hearing: NemotronVL) -> None:
    spectrograms, mask = clips([8000])
    with torch.no_grad():
        whole, counts = hearing.get_audio_features(spectrograms)
        expected, _ = hearing.get_audio_features(spectrograms, torch.ones_like(mask))
    assert counts == [7]  # 51 frames, the one beyond the sound too
    assert torch.equal(whole, expected)


def test_gradient_checkpointing_changes_no_gradient(hearing: NemotronVL) -> None:
    spectrograms, mask = clips(LENGTHS)
    results = []
    hearing.train()
    for checkpointing in (False, True):
        if checkpointing:
            hearing.activation_checkpointing_enable({"use_reentrant": False})
            assert hearing.audio_tower.layers[0].gradient_checkpointing
        features, _ = hearing.get_audio_features(spectrograms, mask)
        features.square().sum().backward()
        results.append(gradients(hearing))
    assert results[0]
    assert_same_gradients(results[1], results[0], 1e-6)  # worst measured: 0.0


def test_integer_masks_are_masks(hearing: NemotronVL) -> None:
    spectrograms, mask = clips(LENGTHS)
    with torch.no_grad():
        expected, _ = hearing.get_audio_features(spectrograms, mask)
        assert torch.equal(hearing.get_audio_features(spectrograms, mask.long())[0], expected)


def test_statistics_may_stay_float32_beside_bfloat16_weights() -> None:
    """FSDP2's mixed precision casts parameters and leaves buffers as they are."""
    norm = FixedBatchNorm1d(6)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    hidden = torch.randn(3, 6, 50).to(torch.bfloat16)
    mixed = copy.deepcopy(norm)
    for name, parameter in norm.named_parameters():
        setattr(mixed, name, nn.Parameter(parameter.detach().to(torch.bfloat16)))
        parameter.data = parameter.data.to(torch.bfloat16).float()
    mixed.train()
    results = []
    for module, given in ((norm, hidden.float()), (mixed, hidden)):
        own = given.detach().requires_grad_()
        output = module(own)
        output.backward(torch.ones_like(output))
        results.append((output.detach(), own.grad, module.weight.grad, module.bias.grad))
    for found, expected in zip(results[1], results[0]):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected.to(torch.bfloat16), rtol=2**-7, atol=0)  # a last bit


def test_a_model_without_sounds_refuses_them(make_model: Callable[..., NemotronVL]) -> None:
    with pytest.raises(FusionError, match="model without audio_config"):
        make_model().get_audio_features(*clips([4000]))


class TestConfig:
    def test_what_released_configs_leave_out_is_that_of_their_towers(self) -> None:
        # Spec A4: sound_config, its own type's name, no scale_input, no attention_bias.
        config = NemotronVLConfig(
            sound_config={
                "model_type": "parakeet",
                "hidden_size": 64,
                "num_hidden_layers": 1,
                "num_mel_bins": 128,
                "projection_hidden_size": 32,
                "convolution_bias": False,
            },
            sound_context_token_id=27,
            vision_config={"hidden_size": 32},
            text_config={"vocab_size": 100, "hybrid_override_pattern": "M*"},
        )
        audio = config.audio_config
        assert config.audio_token_id == 27
        assert (audio.scale_input, audio.attention_bias, audio.convolution_bias, audio.projection_bias) == (False,) * 4
        assert [audio.dropout, audio.attention_dropout, audio.activation_dropout, audio.layerdrop] == [0.0] * 4
        assert audio.dropout_positions == 0.0
        assert (audio.hidden_size, audio.num_mel_bins, audio.subsampling_factor) == (64, 128, 8)

    def test_what_is_asked_for_is_kept(self, tmp_path: Any) -> None:
        tiny = NemotronVLConfig.tiny(**ALL_MEDIA)
        audio = {**tiny.audio_config.to_dict(), "dropout": 0.25, "scale_input": True}
        config = NemotronVLConfig(
            tiny.vision_config, tiny.text_config, audio, image_token_id=4, audio_token_id=263, projector_hidden_size=64
        )
        config.save_pretrained(tmp_path)
        loaded = NemotronVLConfig.from_pretrained(tmp_path)
        for this in (config, loaded):
            assert this.audio_config.dropout == 0.25
            assert this.audio_config.scale_input is True
            assert this.audio_config.projection_hidden_size == 128
            assert this.audio_token_id == 263
            assert this.vision_config.video_temporal_patch_size == 2
        assert NemotronVL(loaded).audio_tower.input_scale == 8.0

    def test_a_projector_without_a_width_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no projection_hidden_size"):
            NemotronVLConfig(audio_config={"hidden_size": 64}, text_config={"vocab_size": 100})

    def test_a_token_outside_the_vocabulary_is_refused(self) -> None:
        with pytest.raises(ValueError, match="audio_token_id is 263 but the vocabulary has 263 rows"):
            NemotronVLConfig.tiny(audio_token_id=263)
