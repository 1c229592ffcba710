"""The audio branch of video-SALMONN 2+: Whisper's encoder and a Q-Former, beside a Qwen vision-language model.

A folder says the `model_type` of the vision-language model and is told apart by `audio_config`. transformers' own
classes load it too, without its audio. Tokenizer and processors are in another folder (`model.processor`).

Audio: windows of 30 s, each padded with silence and normalised by itself. Every `second_stride` seconds a Q-Former with
one query reads `second_per_window` seconds of the encoder's states: two tokens per second, 60 per begun window.

Prompt: the release's own template, a line break between the stream and the question.
"""

from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, PreTrainedTokenizerBase, WhisperConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from omnimem.backbones.family import Table
from omnimem.backbones.files import CheckpointError
from omnimem.backbones.qwen import Classes, Qwen
from omnimem.backbones.template import SAMPLE
from omnimem.errors import counted
from omnimem.media import LogMel, Segment

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
        self._states, self._stride = query_states(config)

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


def query_states(audio: Any) -> tuple[int, int]:
    """States of the encoder that a query reads, and states from one query to the next, rounded as in the release.

    Raises CheckpointError if a window of the encoder has no such part.
    """
    rate = audio.max_source_positions / window_seconds(audio)  # states per second
    read, stride = round(rate * audio.second_per_window), round(rate * audio.second_stride)
    if not 1 <= read <= audio.max_source_positions or not 1 <= stride <= audio.max_source_positions:
        raise CheckpointError(
            f"audio_config: second_per_window = {audio.second_per_window} and second_stride = {audio.second_stride} "
            f"are {read} and {counted(stride, 'state')}, and a window of {window_seconds(audio):g} s has "
            f"{audio.max_source_positions}; copy config.json again from the model's page"
        )
    return read, stride


def with_audio(name: str, config_base: Any, model_base: Any, whole_base: Any, *conversions: Any) -> Classes:
    """Classes of the configuration and of the whole model: those of a Qwen-VL with an audio branch, `model.audio`.

    Its weights have the names of the release in files. No two patterns overlap, so that saving writes them again.
    """

    def fill(self: Any, **kwargs: Any) -> None:
        if self.audio_config is None or isinstance(self.audio_config, dict):
            self.audio_config = WhisperConfig(**AUDIO | (self.audio_config or {}))
        config_base.__post_init__(self, **kwargs)

    def build(self: Any, config: Any) -> None:
        model_base.__init__(self, config)
        self.audio = AudioBranch(config.audio_config, config.text_config.hidden_size)
        self.post_init()

    def build_whole(self: Any, config: Any) -> None:
        whole_base.__init__(self, config)
        self.model = model_class(config)
        self.post_init()

    # 1. the classes
    table = "sub_configs_defaults" if hasattr(config_base, "sub_configs_defaults") else "sub_configs"  # before 5.23
    parts = {**getattr(config_base, table), "audio_config": WhisperConfig}
    fields = {table: parts, "audio_config": None, "__annotations__": {"audio_config": Any}}
    config_class = type(f"{name}Config", (config_base,), {**fields, "__post_init__": fill, "__module__": __name__})
    known = {"config_class": config_class, "__module__": __name__}
    model_class = type(f"{name}Model", (model_base,), {**known, "__init__": build})
    extra = {"_keys_to_ignore_on_load_unexpected": [UNUSED]}
    outer = f"{name}ForConditionalGeneration"
    whole_class = type(outer, (whole_base,), {**known, **extra, "__init__": build_whole})
    # 2. the names of their weights in files
    renamings = [
        WeightRenaming(r"audio\.qformer\.bert\.embeddings\.LayerNorm", r"audio.qformer.layernorm"),
        WeightRenaming(r"audio\.qformer\.bert\.encoder\.", r"audio.qformer.encoder."),
        WeightRenaming(r"attention\.self\.", r"attention.attention."),
    ]
    register_checkpoint_conversion_mapping(outer, [*renamings, *conversions], overwrite=True)
    return config_class, whole_class


class WithAudioBranch(Qwen):
    """The half of a family that hears; before the class of the vision-language model in the bases of its backbone."""

    senses = ("both", "video", "audio")

    @classmethod
    def hearing(cls, config: Any, table: Table) -> dict[str, Any]:
        """A segment per window of the audio encoder."""
        audio = config.audio_config
        query_states(audio)
        return {"mel": mel_of(audio), "segment_seconds": window_seconds(audio), "windowed": True}

    @classmethod
    def template(cls, tokenizer: PreTrainedTokenizerBase, system: str | None) -> tuple[str, str]:
        before = f"<|im_start|>system\n{SYSTEM if system is None else system}<|im_end|>\n<|im_start|>user\n"
        return before, f"\n{SAMPLE}<|im_end|>\n<|im_start|>assistant\n"

    @property
    def _audio(self) -> Any:
        config: Any = self.model.config
        return config.audio_config

    @property
    def audio_tokens_per_second(self) -> float:
        return self.audio_tokens(2 * self._audio.max_source_positions) / window_seconds(self._audio)

    def audio_tokens(self, mel_frames: int) -> int:
        states, (read, stride) = self._audio.max_source_positions, query_states(self._audio)
        return -(-mel_frames // (2 * states)) * ((states - read) // stride + 1)

    def listen(self, block: Sequence[Segment]) -> list[Tensor | None]:
        """Audio tokens [1, tokens, width] of each segment, whose mel fills whole windows."""
        branch: AudioBranch = self.parts.model.audio
        frames = 2 * self._audio.max_source_positions
        heard = []
        for segment in block:
            if segment.mel is None:
                heard.append(None)
                continue
            windows = segment.mel.unflatten(1, (-1, frames)).transpose(0, 1)
            heard.append(branch.tokens(windows.to(self.device)).flatten(0, 1)[None])
        return heard
