"""NemotronVLConfig: one config for the released family and for tiny models of the same architecture.

The parts keep transformers' own configs (`RadioConfig`, `NemotronHConfig`); here stand only the numbers that
join them. The released config.json names (``llm_config``, ``img_context_token_id``...) are accepted.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from transformers import AutoConfig, NemotronHConfig, ParakeetEncoderConfig, PretrainedConfig, RadioConfig

_RELEASED_NAMES = {
    "llm_config": "text_config",
    "img_context_token_id": "image_token_id",
    "sound_config": "audio_config",
    "sound_context_token_id": "audio_token_id",
    "vit_hidden_size": "vision_hidden_size",
}

# What the released sound configs leave out, and transformers' defaults get wrong for them: their Parakeet has neither.
# Chance is off unless a config asks for it: what a clip becomes should depend on the clip.
_AUDIO_DEFAULTS = {
    "attention_bias": False,
    "scale_input": False,
    "convolution_bias": False,
    "projection_bias": False,
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "layerdrop"), 0.0),
}

# Width, blocks and heads of the towers by their names in timm, which RADIO's configs use.
_TOWERS = {
    "vit_base_patch16_224": (768, 12, 12),
    "vit_large_patch16_224": (1024, 24, 16),
    "vit_huge_patch16_224": (1280, 32, 16),
}


class NemotronVLConfig(PretrainedConfig):
    """Configuration of `NemotronVL`.

    Args:
        vision_config: RADIO tower, as a `RadioConfig` or its dict.
        text_config: Hybrid language model, as a `NemotronHConfig` or its dict.
        audio_config: Sound tower and projector, as a `ParakeetEncoderConfig` or its dict, with
            ``projection_hidden_size``; the model hears nothing when left out.
        downsample_ratio: Pixel shuffle merges ``1 / downsample_ratio`` patches per side into one token.
        ps_version: Pixel shuffle ``v2`` (released models) or ``v1``, which leaves the token grid transposed.
        projector_hidden_size: Width of the projector's hidden layer.
        vision_hidden_size: Width of the tower's features; must equal ``vision_config.hidden_size``.
        image_token_id: Id of the placeholder that receives features of images and videos.
        audio_token_id: Id of the placeholder that receives features of sounds; needed with ``audio_config``.
        video_pruning_rate: Share of a video's tokens that processors of this model leave out (EVS); the model itself
            goes by what a batch says.
        norm_mean: Per-channel pixel mean; the tower's own when left out.
        norm_std: Per-channel pixel standard deviation; the tower's own when left out.
        **kwargs: The released names of the above, and transformers' common options.

    Raises:
        ValueError: If two parts do not fit together, with both numbers; if placeholders are missing or the same.
    """

    model_type = "nemotron_vl"
    sub_configs: ClassVar[dict[str, type]] = {
        "vision_config": RadioConfig,
        "text_config": NemotronHConfig,
        "audio_config": ParakeetEncoderConfig,
    }
    has_no_defaults_at_init = True

    def __init__(
        self,
        vision_config: RadioConfig | dict[str, Any] | None = None,
        text_config: NemotronHConfig | dict[str, Any] | None = None,
        audio_config: ParakeetEncoderConfig | dict[str, Any] | None = None,
        downsample_ratio: float = 0.5,
        ps_version: str = "v2",
        projector_hidden_size: int = 20480,
        vision_hidden_size: int | None = None,
        image_token_id: int | None = None,
        audio_token_id: int | None = None,
        video_pruning_rate: float = 0.0,
        norm_mean: list[float] | None = None,
        norm_std: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        released = {new: kwargs.pop(old) for old, new in _RELEASED_NAMES.items() if kwargs.get(old) is not None}
        self.vision_config = _sub_config(_radio_names(vision_config), RadioConfig)
        self.text_config = _sub_config(text_config or released.get("text_config"), NemotronHConfig)
        self.downsample_ratio = downsample_ratio
        self.ps_version = ps_version
        self.projector_hidden_size = projector_hidden_size
        self.vision_hidden_size = (
            vision_hidden_size or released.get("vision_hidden_size") or self.vision_config.hidden_size
        )
        self.image_token_id = image_token_id if image_token_id is not None else released.get("image_token_id")
        audio_config = audio_config or released.get("audio_config")
        if isinstance(audio_config, dict):
            audio_config = _sub_config({**_AUDIO_DEFAULTS, **audio_config}, ParakeetEncoderConfig)
        self.audio_config = audio_config
        self.audio_token_id = audio_token_id if audio_token_id is not None else released.get("audio_token_id")
        self.video_pruning_rate = video_pruning_rate
        self.norm_mean = list(norm_mean or self.vision_config.norm_mean)
        self.norm_std = list(norm_std or self.vision_config.norm_std)
        self._check()
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)

    @property
    def merge_size(self) -> int:
        """Patches per side that become one token."""
        return round(1 / self.downsample_ratio)

    @property
    def frames_per_tubelet(self) -> int:
        """Frames of a video that are embedded together; 1 where the tower sees each frame as an image."""
        return self.vision_config.video_temporal_patch_size or 1

    @classmethod
    def tiny(
        cls,
        vocab_size: int = 263,
        image_token_id: int = 4,
        pattern: str = "M*-M*-",
        hidden_size: int = 128,
        vision_hidden_size: int = 96,
        vision_layers: int = 3,
        patch_size: int = 8,
        video: bool = False,
        audio_token_id: int | None = None,
        **text_options: Any,
    ) -> Self:
        """A model of the same architecture that learns on a laptop's CPU (about 1 million parameters).

        The defaults fit the tokenizer of `lightning_vlm.processing.tiny`.

        Args:
            vocab_size: Rows of the embedding.
            image_token_id: Placeholder id.
            pattern: Layers of the language model: ``M`` Mamba2, ``*`` attention, ``-`` MLP, ``E`` mixture
                of experts.
            hidden_size: Width of the language model.
            vision_hidden_size: Width of the tower.
            vision_layers: Blocks of the tower.
            patch_size: Side of a patch, in pixels.
            video: Whether the tower embeds two frames of a video together, as Nemotron-3-Nano-Omni does.
            audio_token_id: Placeholder id of sounds; without one the model has no sound tower.
            **text_options: Further `NemotronHConfig` options.
        """
        text: dict[str, Any] = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "hybrid_override_pattern": pattern,
            "intermediate_size": 2 * hidden_size,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": hidden_size // 4,
            "mamba_num_heads": 8,
            "mamba_head_dim": hidden_size // 4,
            "ssm_state_size": 32,
            "n_groups": 2,
            "chunk_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": hidden_size,
            "moe_shared_expert_intermediate_size": hidden_size,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 3,
            # transformers' 0.02 suits widths of thousands; with it the demo's harder tasks need more than four epochs.
            "initializer_range": 0.06,
            **text_options,
        }
        vision = {
            "hidden_size": vision_hidden_size,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": 4,
            "mlp_ratio": 2.0,
            "patch_size": patch_size,
            "max_img_size": 32 * patch_size,
            "video_temporal_patch_size": 2 if video else None,
        }
        audio = {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "subsampling_conv_channels": 32,
            "num_mel_bins": 32,
            "projection_hidden_size": hidden_size,
            # As for the language model: with 0.02 next to nothing of a spectrogram comes through the convolutions.
            "initializer_range": 0.15,
        }
        return cls(
            vision_config=vision,
            text_config=text,
            audio_config=None if audio_token_id is None else audio,
            projector_hidden_size=2 * hidden_size,
            image_token_id=image_token_id,
            audio_token_id=audio_token_id,
        )

    def _check(self) -> None:
        if self.vision_hidden_size != self.vision_config.hidden_size:
            raise ValueError(
                f"vision_hidden_size is {self.vision_hidden_size} but vision_config.hidden_size is "
                f"{self.vision_config.hidden_size}; make them equal"
            )
        if self.ps_version not in ("v1", "v2"):
            raise ValueError(f"ps_version is {self.ps_version!r}; expected 'v1' or 'v2'")
        for name in ("image_token_id", "audio_token_id"):
            token = getattr(self, name)
            if token is not None and token >= self.text_config.vocab_size:
                raise ValueError(f"{name} is {token} but the vocabulary has {self.text_config.vocab_size} rows")
        if self.audio_config is not None and getattr(self.audio_config, "projection_hidden_size", None) is None:
            raise ValueError("audio_config has no projection_hidden_size; expected the width of the sound projector")
        if self.audio_config is not None and self.audio_token_id is None:
            raise ValueError(
                "audio_config is given without audio_token_id; expected the id of the placeholder of sounds: add it, "
                "or leave audio_config out"
            )
        if self.audio_token_id is not None and self.audio_token_id == self.image_token_id:
            raise ValueError(
                f"image_token_id and audio_token_id are both {self.image_token_id}; expected a placeholder each: give "
                "one of them another id"
            )


def _radio_names(config: Any) -> Any:
    """A vision config as RADIO's own repositories write it, whose sizes stand in the name of its architecture."""
    if not isinstance(config, dict) or not isinstance(args := config.get("args"), dict):
        return config
    sizes: dict[str, Any] = {}
    if "hidden_size" not in config:
        if (name := args.get("model")) not in _TOWERS:
            raise ValueError(
                f"vision_config.args.model is {name!r}; expected one of {', '.join(_TOWERS)}, or hidden_size"
            )
        sizes = dict(zip(("hidden_size", "num_hidden_layers", "num_attention_heads"), _TOWERS[name]))
    if side := args.get("cpe_max_size") or config.get("max_resolution"):
        sizes["max_img_size"] = side
    if prefix := args.get("register_multiple"):  # class tokens are filled up with registers to a multiple of it
        classes = config.get("num_cls_tokens", RadioConfig.num_cls_tokens)
        sizes |= {"num_cls_tokens": classes, "num_registers": -classes % prefix}
    if frames := args.get("video_temporal_patch_size"):
        sizes["video_temporal_patch_size"] = frames
    return {**sizes, **config}


def _sub_config(value: Any, kind: type) -> Any:
    if value is None:
        return kind()
    return kind(**{k: v for k, v in value.items() if k != "model_type"}) if isinstance(value, dict) else value


AutoConfig.register(NemotronVLConfig.model_type, NemotronVLConfig, exist_ok=True)
