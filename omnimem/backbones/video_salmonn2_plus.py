"""video-SALMONN 2+ 4B and 8B (and with experts): Qwen3-VL with Whisper's encoder and a Q-Former for audio.

A folder says `model_type: qwen3_vl` and is told apart by `audio_config`. transformers' own classes load it too, without
its audio. Tokenizer and processors are in another folder (`model.processor`).

Stream: as in qwen3_vl.py, with the audio of a group of grids after its frames; audio alone has no markers. Prompt:
the release's own template, a line break between the stream and the question.

Audio: windows of 30 s, each padded with silence and normalised by itself. Every `second_stride` seconds a Q-Former with
one query reads `second_per_window` seconds of the encoder's states: two tokens per second, 60 per begun window.
"""

from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLMoeModel,
    WhisperConfig,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from omnimem.backbones.family import Table
from omnimem.backbones.qwen3_vl import Classes, Qwen3VL, Qwen3VLFamily
from omnimem.backbones.shapes import AudioShape
from omnimem.backbones.template import SAMPLE
from omnimem.media import Geometry, LogMel, Segment

SYSTEM = "You are a helpful assistant."
# values that the release's classes take when audio_config or its qformer_config does not give them
AUDIO = {
    "encoder_layers": 32,
    "d_model": 1280,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
    "second_per_window": 0.5,
    "second_stride": 0.5,
}
QFORMER = {
    "hidden_size": 3072,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "intermediate_size": 12288,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}
MEL = {"hop_length": 160, "n_fft": 400, "sampling_rate": 16000}  # constants of the release; no file holds them
UNUSED = r"audio\.qformer\.bert\.embeddings\.position_ids"  # a buffer in the released files


@final
class AudioBranch(WhisperEncoder):
    """Whisper's encoder, a Q-Former over windows of its states, and a projection to the text model."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__(config)
        given = dict(getattr(config, "qformer_config", None) or {})
        known = {name: given.get(name, value) for name, value in QFORMER.items()}
        qformer = Blip2QFormerConfig(
            **known, cross_attention_frequency=1, encoder_hidden_size=config.d_model, use_qformer_text_input=False
        )
        qformer._attn_implementation = config._attn_implementation
        self.q_tokens = nn.Parameter(torch.zeros(1, 1, qformer.hidden_size))
        self.qformer = Blip2QFormerModel(qformer)
        self.audio_proj = nn.Linear(qformer.hidden_size, width)
        rate = config.max_source_positions / window_seconds(config)  # states per second
        self._states, self._stride = round(rate * config.second_per_window), round(rate * config.second_stride)

    def tokens(self, mel: Float[Tensor, "windows mels mel_frames"]) -> Float[Tensor, "windows tokens width"]:
        """The audio tokens of whole windows."""
        states = self(mel.to(self.conv1.weight.dtype)).last_hidden_state
        parts = states.unfold(1, self._states, self._stride).transpose(2, 3)
        queries = self.q_tokens.expand(parts.shape[0] * parts.shape[1], -1, -1)
        read = self.qformer(query_embeds=queries, encoder_hidden_states=parts.flatten(0, 1)).last_hidden_state
        return self.audio_proj(read).view(mel.shape[0], parts.shape[1], -1)


def mel_of(audio: Any) -> LogMel:
    """Settings of the log-mel spectrogram; a config that is not of a release may give its own."""
    hop, n_fft, rate = (getattr(audio, name, value) for name, value in MEL.items())
    return LogMel(mels=audio.num_mel_bins, hop=hop, n_fft=n_fft, rate=rate)


def window_seconds(audio: Any) -> float:
    """Seconds of a window; the encoder halves the number of mel frames."""
    mel = mel_of(audio)
    return 2 * audio.max_source_positions * mel.hop / mel.rate


def _filled(audio: Any) -> Any:
    """audio_config with the release's values where it gives none."""
    return AUDIO | audio if isinstance(audio, dict) else audio


class VideoSalmonn2PlusConfig(Qwen3VLConfig):
    """Qwen3-VL's configuration with that of the audio branch."""

    sub_configs_defaults = {**Qwen3VLConfig.sub_configs_defaults, "audio_config": WhisperConfig}  # noqa: RUF012
    audio_config: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.audio_config = _filled(self.audio_config)
        super().__post_init__(**kwargs)


class VideoSalmonn2PlusMoeConfig(Qwen3VLMoeConfig):
    """The same with experts."""

    sub_configs_defaults = {**Qwen3VLMoeConfig.sub_configs_defaults, "audio_config": WhisperConfig}  # noqa: RUF012
    audio_config: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.audio_config = _filled(self.audio_config)
        super().__post_init__(**kwargs)


class VideoSalmonn2PlusModel(Qwen3VLModel):
    """Vision encoder, text model and audio branch."""

    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.audio = AudioBranch(config.audio_config, config.text_config.hidden_size)
        self.post_init()


class VideoSalmonn2PlusMoeModel(Qwen3VLMoeModel):
    """The same with experts."""

    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.audio = AudioBranch(config.audio_config, config.text_config.hidden_size)
        self.post_init()


class VideoSalmonn2PlusForConditionalGeneration(Qwen3VLForConditionalGeneration):
    """The model under the names of the release, which writes `model.audio.*` beside Qwen3-VL's."""

    config_class = VideoSalmonn2PlusConfig
    _keys_to_ignore_on_load_unexpected = [UNUSED]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = VideoSalmonn2PlusModel(config)
        self.post_init()


class VideoSalmonn2PlusMoeForConditionalGeneration(Qwen3VLMoeForConditionalGeneration):
    """The same with experts."""

    config_class = VideoSalmonn2PlusMoeConfig
    _keys_to_ignore_on_load_unexpected = [UNUSED]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = VideoSalmonn2PlusMoeModel(config)
        self.post_init()


def _renamings() -> list[Any]:
    """From the names of the release to ours; no two patterns overlap, so saving writes the release's names again."""
    return [
        WeightRenaming(r"audio\.qformer\.bert\.embeddings\.LayerNorm", r"audio.qformer.layernorm"),
        WeightRenaming(r"audio\.qformer\.bert\.encoder\.", r"audio.qformer.encoder."),
        WeightRenaming(r"attention\.self\.", r"attention.attention."),
    ]


def _register(name: str, *more: Any) -> None:
    """Tell transformers the renamings of a class; a second import changes nothing."""
    register_checkpoint_conversion_mapping(name, [*_renamings(), *more], overwrite=True)


_register("VideoSalmonn2PlusForConditionalGeneration")
_register("VideoSalmonn2PlusMoeForConditionalGeneration", *(get_checkpoint_conversion_mapping("qwen3_vl_moe") or ()))


@final
class VideoSalmonn2Plus(Qwen3VL):
    """A loaded model of this family."""

    senses = ("both", "video", "audio")
    classes: dict[str, Classes] = {  # noqa: RUF012
        "qwen3_vl": (VideoSalmonn2PlusConfig, VideoSalmonn2PlusForConditionalGeneration),
        "qwen3_vl_moe": (VideoSalmonn2PlusMoeConfig, VideoSalmonn2PlusMoeForConditionalGeneration),
    }

    @classmethod
    def geometry_of(cls, config: Any, table: Table) -> Geometry:
        """Patch settings, and a segment per window of the audio encoder."""
        audio, vision = config.audio_config, config.vision_config
        return Geometry(
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            temporal_patch=vision.temporal_patch_size,
            mean=tuple(table["image_mean"]),
            std=tuple(table["image_std"]),
            mel=mel_of(audio),
            segment_seconds=window_seconds(audio),
            windowed=True,
        )

    def rendered(self, system: str | None) -> tuple[str, str]:
        text = SYSTEM if system is None else self.text.plain(system)
        before = f"<|im_start|>system\n{text}<|im_end|>\n<|im_start|>user\n"
        return before, f"\n{SAMPLE}<|im_end|>\n<|im_start|>assistant\n"

    @property
    def _audio(self) -> Any:
        config: Any = self.model.config
        return config.audio_config

    def encoder_weights(self) -> Iterator[Tensor]:
        """Weights of the vision encoder, then of the audio branch."""
        yield from super().encoder_weights()
        yield from self._parts.model.audio.state_dict().values()

    @property
    def audio_tokens_per_second(self) -> float:
        return self.audio_tokens(2 * self._audio.max_source_positions) / window_seconds(self._audio)

    def audio_tokens(self, mel_frames: int) -> int:
        audio = self._audio
        states, rate = audio.max_source_positions, audio.max_source_positions / window_seconds(audio)
        read, stride = round(rate * audio.second_per_window), round(rate * audio.second_stride)
        return -(-mel_frames // (2 * states)) * ((states - read) // stride + 1)

    def listen(self, block: Sequence[Segment]) -> list[Tensor | None]:
        """Audio tokens [1, tokens, width] of each segment, whose mel fills whole windows."""
        branch: AudioBranch = self._parts.model.audio
        frames = 2 * self._audio.max_source_positions
        heard = []
        for segment in block:
            if segment.mel is None:
                heard.append(None)
                continue
            windows = segment.mel.unflatten(1, (-1, frames)).transpose(0, 1)
            heard.append(branch.tokens(windows.to(self.device)).flatten(0, 1)[None])
        return heard


@final
class VideoSalmonn2PlusFamily(Qwen3VLFamily):
    """video-SALMONN 2+ 4B, 8B and its variant with experts."""

    name = "video-SALMONN 2+ (Qwen3-VL)"
    backbone = VideoSalmonn2Plus

    def claims(self, config: Table) -> bool:
        return config.get("model_type") in VideoSalmonn2Plus.classes and "audio_config" in config

    def audio_shape(self, config: Any) -> AudioShape:
        audio = config.audio_config
        return AudioShape(width=audio.d_model, inner=audio.encoder_ffn_dim, mels=audio.num_mel_bins)
