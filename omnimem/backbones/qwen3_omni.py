"""Qwen3-Omni thinker (30B-A3B): frames and audio merged token by token in order of time, with deepstack features.

Prompt: {opening}<|vision_start|><|audio_start|>[a frame grid, then audio up to the next one]*<|audio_end|>
<|vision_end|>{question}; a stream with one track has only its own markers. Every marker has a position of its own.

Positions: a grid at `position_id_per_seconds` times its time, rows and columns from the start of the stream; the k-th
audio token at k, so one second has as many positions as audio tokens (13). Rates of frames with other than whole
positions are refused.

Audio: the encoder attends within `n_window_infer` mel frames, so a segment is as long (8 s).
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeThinkerForConditionalGeneration
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoeAudioEncoder,
    Qwen3OmniMoeThinkerTextModel,
    Qwen3OmniMoeVisionEncoder,
)

from omnimem.backbones.base import Encoded, Layout, LayoutError, Part, Tracks, raster
from omnimem.backbones.family import Table
from omnimem.backbones.files import CheckpointError
from omnimem.backbones.qwen3_vl import HALVES, VIDEO, Qwen3VL, Qwen3VLFamily
from omnimem.backbones.settings import only
from omnimem.backbones.shapes import AudioShape
from omnimem.backbones.template import around_video
from omnimem.media import Geometry, LogMel, Segment
from omnimem.tokens import Modality

CLASSES = (Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeThinkerForConditionalGeneration)
# the tokens before and after the tracks of a stream
BEGIN = {"both": "<|vision_start|><|audio_start|>", "video": "<|vision_start|>", "audio": "<|audio_start|>"}
END = {"both": "<|audio_end|><|vision_end|>", "video": "<|vision_end|>", "audio": "<|audio_end|>"}
PER_BLOCK = 13  # audio tokens of 2 x n_window mel frames, as transformers counts them


@final
class Qwen3Omni(Qwen3VL):
    """A loaded thinker; `model` is the unmodified transformers class."""

    senses = ("both", "video", "audio")
    compacts = True
    stamped = False
    classes = {"qwen3_omni_moe": CLASSES, "qwen3_omni_moe_thinker": CLASSES}  # noqa: RUF012
    preprocessed = ("feature_size", "hop_length", "n_fft", "image_mean", "image_std")
    defaults = {**HALVES, "feature_size": 128, "hop_length": 160, "n_fft": 400}  # noqa: RUF012
    markers = (*BEGIN["both"].replace("><", "> <").split(), *END["both"].replace("><", "> <").split(), "<|video_pad|>")

    @classmethod
    def geometry_of(cls, config: Any, table: Table) -> Geometry:
        """Patch and mel settings, checked against the encoders' configuration."""
        audio, vision = config.audio_config, config.vision_config
        mel = LogMel(mels=table["feature_size"], hop=table["hop_length"], n_fft=table["n_fft"])
        rate = PER_BLOCK * mel.rate / (mel.hop * 2 * audio.n_window)
        if mel.mels != audio.num_mel_bins or audio.n_window_infer % (2 * audio.n_window):
            raise CheckpointError(
                f"{mel.mels} mel bins and windows of {audio.n_window_infer} mel frames do not fit the audio encoder "
                f"({audio.num_mel_bins} bins, blocks of {2 * audio.n_window} frames); fix preprocessor_config.json"
            )
        if config.position_id_per_seconds != rate:
            raise CheckpointError(
                f"position_id_per_seconds = {config.position_id_per_seconds}, but the audio encoder gives {rate:g} "
                "tokens per second; copy config.json again from the model's page"
            )
        return Geometry(
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            temporal_patch=vision.temporal_patch_size,
            mean=tuple(table["image_mean"]),
            std=tuple(table["image_std"]),
            mel=mel,
            segment_seconds=audio.n_window_infer * mel.hop / mel.rate,
        )

    def rendered(self, system: str | None) -> tuple[str, str]:
        text = None if system is None else self.text.plain(system)
        return around_video(self.tokenizer, text, video=VIDEO, family="Qwen3-Omni")

    @property
    def _config(self) -> Any:
        return self.model.config

    @property
    def text_model(self) -> PreTrainedModel:
        return only(self.model, Qwen3OmniMoeThinkerTextModel)

    def encoder_weights(self) -> Iterator[Tensor]:
        """Weights of the vision encoder, then of the audio encoder."""
        for tower in (Qwen3OmniMoeVisionEncoder, Qwen3OmniMoeAudioEncoder):
            yield from only(self.model, tower).state_dict().values()

    def audio_tokens(self, mel_frames: int) -> int:
        block = 2 * self._config.audio_config.n_window
        left = mel_frames % block
        for _ in range(3):  # three convolutions halve what is left
            left = (left - 1) // 2 + 1
        return mel_frames // block * PER_BLOCK + left

    def listen(self, block: Sequence[Segment]) -> list[Tensor | None]:
        """Audio tokens [1, tokens, width] of each segment, which fills whole windows unless it is the last one."""
        heard = []
        for segment in block:
            if segment.mel is None or not segment.mel.shape[1]:
                heard.append(None)
                continue
            mel = segment.mel[None].to(device=self.device, dtype=self._parts.dtype)
            mask = torch.ones(1, mel.shape[2], dtype=torch.long, device=self.device)
            tokens = self._parts.get_audio_features(mel, feature_attention_mask=mask).last_hidden_state
            heard.append(tokens[None])
        return heard

    def layout(self, *, tracks: Tracks | None, batch: int, system: str | None, group: int) -> Layout:
        text = self._opening if system is None else self.rendered(system)[0]
        ids = self.text.ids(text + (BEGIN[tracks] if tracks else ""))
        rate = float(self._config.position_id_per_seconds)
        return MergedLayout(self.embed(ids).expand(batch, -1, -1), rate=rate, merged=tracks == "both")

    def end_of(self, tracks: Tracks | None) -> str:
        return END[tracks] if tracks else ""


@final
class MergedLayout(Layout):
    """Every grid at its time, then the audio up to the next grid."""

    def __init__(self, opening: Float[Tensor, "batch tokens width"], *, rate: float, merged: bool) -> None:
        self._opening, self.base = opening, opening.shape[1]
        self.rate, self.merged = rate, merged
        self.grids = self.audio_tokens = 0
        self.last = -1  # time of the latest grid
        self.extent = 0  # rows or columns of a grid, whichever is more

    def opening(self) -> Part:
        count = self.base
        return Part(
            embeddings=self._opening,
            positions=torch.arange(count).expand(3, -1),
            modality=torch.zeros(count, dtype=torch.int8),
            place=torch.full((4, count), -1, dtype=torch.int32),
        )

    @property
    def next_position(self) -> int | None:
        """Of text that follows: after the last piece that get_rope_index appends, which may not be the largest."""
        if not self.merged:
            return None
        if self.audio_tokens > self.last:
            return self.base + self.audio_tokens
        return self.base + max(self.last, self.extent - 1) + 1

    def push(self, segment: Encoded) -> list[Part]:
        # 1. frames, then audio: positions from the start of the stream, and places
        embeddings, positions, places, kinds, starts = [], [], [], [], []
        step = self.rate * segment.seconds_per_grid
        if step != int(step):
            raise LayoutError(
                f"stream.fps: a frame grid takes {step:g} positions; give a rate with whole ones, as 1 or 2"
            )
        if segment.visual is not None:
            place, (count, rows, columns) = raster(segment.grid, self.grids), segment.grid
            starts = [int(step) * number for number in range(self.grids, self.grids + count)]
            self.grids, self.last, self.extent = self.grids + count, starts[-1], max(rows, columns)
            embeddings.append(segment.visual)
            positions.append(torch.stack([place[0] * int(step), *place[1:]]))
            places.append(place)
            kinds += [int(Modality.VISUAL)] * place.shape[1]
        if segment.audio is not None:
            times = torch.arange(segment.audio.shape[1]) + self.audio_tokens
            self.audio_tokens += segment.audio.shape[1]
            frames = (times // int(step)).clamp_max(self.grids - 1)
            embeddings.append(segment.audio)
            positions.append(times.expand(3, -1))
            places.append(torch.stack([frames, *torch.full((2, len(times)), -1)]))
            kinds += [int(Modality.AUDIO)] * len(times)
        # 2. in order of time, frames before audio of the same time
        position, modality = torch.cat(positions, dim=1), torch.tensor(kinds, dtype=torch.int8)
        order = (2 * position[0] + (modality == Modality.AUDIO)).argsort(stable=True)
        place = torch.cat([torch.cat(places, dim=1), torch.full((1, len(order)), -1)]).int()[:, order]
        whole = (torch.cat(embeddings, dim=1)[:, order.to(embeddings[0].device)], position[:, order], modality[order])
        # 3. a part per grid with the audio after it
        cuts = [int((whole[1][0] < start).sum()) for start in starts[1:]]
        return self._parts_of(segment, *whole, place, sorted({0, *cuts, len(order)}))

    def _parts_of(
        self, segment: Encoded, rows: Tensor, position: Tensor, modality: Tensor, place: Tensor, cuts: Sequence[int]
    ) -> list[Part]:
        """The tokens between the cuts, each part with its own deepstack features, which are in order of the frames."""
        parts, seen = [], 0
        for first, last in pairwise(cuts):
            visual = int((modality[first:last] == Modality.VISUAL).sum())
            levels = segment.deepstack if visual else ()
            parts.append(
                Part(
                    embeddings=rows[:, first:last],
                    positions=position[:, first:last] + self.base,
                    modality=modality[first:last],
                    place=place[:, first:last],
                    deepstack=tuple(level[:, seen : seen + visual] for level in levels),
                    next_position=self.next_position,
                )
            )
            seen += visual
        return parts


@final
class Qwen3OmniFamily(Qwen3VLFamily):
    """Qwen3-Omni-30B-A3B: the thinker, with or without the talker beside it."""

    name = "Qwen3-Omni"
    sizes = "the thinker of 30B-A3B (qwen3_omni_30b.yaml)"
    trees = ("thinker.model", "model", "model.language_model", "thinker.model.language_model")
    backbone = Qwen3Omni

    def claims(self, config: Table) -> bool:
        return config.get("model_type") in Qwen3Omni.classes

    def audio_shape(self, config: Any) -> AudioShape:
        audio = config.audio_config
        return AudioShape(width=audio.d_model, inner=audio.encoder_ffn_dim, mels=audio.num_mel_bins)
