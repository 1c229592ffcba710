"""Qwen2.5-Omni thinker: layout, TMRoPE positions and rates as transformers computes them, all read from the checkpoint.

Prompt: {opening}<|vision_bos|><|audio_bos|>[video, audio]*<|audio_eos|><|vision_eos|>{question}, interleaved every
`seconds_per_chunk`; a stream with one track has only the markers of that track.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from math import ceil
from typing import Any, final

import torch
from torch import Tensor
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniAudioEncoder,
    Qwen2_5OmniThinkerTextModel,
    Qwen2_5OmniVisionEncoder,
)

from omnimem.backbones.base import Encoded, Layout, Tracks
from omnimem.backbones.family import Table
from omnimem.backbones.files import CheckpointError
from omnimem.backbones.qwen import Qwen, QwenFamily, SpanLayout
from omnimem.errors import counted
from omnimem.media import LogMel, Segment

CLASSES = (Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration)
# settings that are read from the preprocessor files
PREPROCESSED = ("feature_size", "hop_length", "n_fft", "image_mean", "image_std")


@final
class Qwen25Omni(Qwen):
    """A loaded Qwen2.5-Omni thinker; `model` is the unmodified transformers class."""

    name = "Qwen2.5-Omni"
    classes = {"qwen2_5_omni": CLASSES, "qwen2_5_omni_thinker": CLASSES}  # noqa: RUF012
    decoder = (Qwen2_5OmniThinkerTextModel,)
    towers = ((Qwen2_5OmniVisionEncoder,), (Qwen2_5OmniAudioEncoder,))
    projecting = (("merger",), ("proj",))
    preprocessed = PREPROCESSED
    defaults = {}  # noqa: RUF012
    video = "<|vision_bos|><|VIDEO|><|vision_eos|>"
    begin = {"both": "<|vision_bos|><|audio_bos|>", "video": "<|vision_bos|>", "audio": "<|audio_bos|>"}  # noqa: RUF012
    end = {"both": "<|audio_eos|><|vision_eos|>", "video": "<|vision_eos|>", "audio": "<|audio_eos|>"}  # noqa: RUF012
    paired = True

    @classmethod
    def hearing(cls, config: Any, table: Table) -> dict[str, Any]:
        """Mel settings of the preprocessor file, checked against the encoder's configuration."""
        audio, hop, rate = config.audio_config, table["hop_length"], table["sampling_rate"]
        mel = LogMel(mels=table["feature_size"], hop=hop, n_fft=table["n_fft"], rate=rate)
        frames = config.seconds_per_chunk * mel.rate / mel.hop
        if mel.mels != audio.num_mel_bins or frames % (2 * audio.n_window):
            raise CheckpointError(
                f"{counted(mel.mels, 'mel bin')} and {counted(frames, 'mel frame')} per {config.seconds_per_chunk:g} s "
                f"do not fit the audio tower ({counted(audio.num_mel_bins, 'bin')}, blocks of "
                f"{counted(2 * audio.n_window, 'frame')}); fix preprocessor_config.json"
            )
        return {"mel": mel, "segment_seconds": float(config.seconds_per_chunk)}

    def audio_tokens(self, mel_frames: int) -> int:
        return audio_tokens(mel_frames)

    def encode(self, segments: Iterable[Segment], *, fps: float, per_pass: int = 32) -> Iterator[Encoded]:
        """Encode segments with the vision and audio towers, `per_pass` of them in one pass.

        The result of a segment does not depend on its neighbours: the vision tower attends within a frame grid and
        the audio tower within its block. The audio of a rest ends within a block, so that nothing follows it in a pass.
        """
        rest = iter(segments)
        while block := list(islice(rest, per_pass)):
            whole = super().encode([segment for segment in block if segment.at is None], fps=fps, per_pass=per_pass)
            for segment in block:
                yield from islice(whole, 1) if segment.at is None else super().encode([segment], fps=fps)

    def listen(self, block: Sequence[Segment]) -> list[Tensor | None]:
        """Audio tokens [1, tokens, width] for each segment; every mel but the last fills whole audio blocks."""
        # 1. encode all segments in one pass
        present = [segment.mel for segment in block if segment.mel is not None]
        if audio_tokens(sum(mel.shape[1] for mel in present)) == 0:
            return [None] * len(block)
        towers = self.parts
        mel = torch.cat(present, dim=1)[None].to(device=self.device, dtype=towers.dtype)
        mask = torch.ones(1, mel.shape[2], dtype=torch.long, device=self.device)
        tokens = towers.get_audio_features(mel, feature_attention_mask=mask).last_hidden_state
        # 2. split the tokens by segment
        found, mel_frames, first = [], 0, 0
        for segment in block:
            mel_frames += 0 if segment.mel is None else segment.mel.shape[1]
            last = audio_tokens(mel_frames)
            found.append(tokens[None, first:last] if segment.mel is not None and last > first else None)
            first = last
        return found

    def laid_out(self, opening: str, tracks: Tracks | None, batch: int, group: int) -> Layout:
        embeddings, config = self.embedded(opening, batch), self.parts.config
        return InterleavedLayout(
            embeddings,
            rate=float(config.position_id_per_seconds),
            tracks=tracks,
            base=embeddings.shape[1] - (1 if tracks == "both" else 0),  # both begin markers have the same position
            seconds_per_chunk=float(config.seconds_per_chunk),
        )


@final
class InterleavedLayout(SpanLayout):
    """Blocks of `seconds_per_chunk`: their frames, then their audio.

    With less than one frame grid per block (fps < temporal_patch / seconds_per_chunk) the processor pairs the n-th grid
    with the n-th block of audio, before the grid's time. A stream cannot do that, so it keeps the order of time (ours).
    """

    divided = False
    visual_pieces, visual_last = 0, -1  # blocks of visual tokens, largest position of the last one

    def __init__(self, opening: Tensor, *, seconds_per_chunk: float, **span: Any) -> None:
        super().__init__(opening, **span)
        self.block = int(self.rate * seconds_per_chunk)  # positions of one interleaved block of video and its audio

    @property
    def next_position(self) -> int | None:
        """Position of text that follows here, from 0 at the start of the prompt; None: after the largest.

        get_rope_index appends the n-th piece of video and then the n-th of audio, and continues text after the last
        piece. So text shares positions with frames that reach beyond the audio of their block.
        """
        if self.tracks != "both":
            return None
        audio_pieces = ceil(self.audio_tokens / self.block)
        video_is_last = self.visual_pieces > audio_pieces
        return self.base + 1 + (self.visual_last if video_is_last else self.audio_tokens - 1)

    def order(self, time: Tensor, frame: Tensor, audio: Tensor) -> Tensor:
        return time // self.block

    def seen(self, times: Sequence[int], rows: int, columns: int) -> None:
        """Count the blocks that get_rope_index cuts visual tokens into: a token begins at most one.

        Where a grid takes longer than a block, its first tokens are pieces of their own.
        """
        for time in times:
            begun = time // self.block + 1
            self.visual_pieces += max(0, min(rows * columns, begun - self.visual_pieces))
            self.visual_last = max(time, rows - 1, columns - 1)


def audio_tokens(mel_frames: int) -> int:
    """Number of audio tokens for a number of mel frames: halved twice, rounded as in transformers."""
    return max(0, ((mel_frames - 1) // 2 + 1 - 2) // 2 + 1) if mel_frames > 0 else 0


@final
class Qwen25OmniFamily(QwenFamily):
    """Qwen2.5-Omni 3B and 7B: the thinker, with or without the talker beside it."""

    name = Qwen25Omni.name
    sizes = "3B and 7B (budget8k.yaml), and the bundled models/tiny"
    trees = ("thinker.model", "model", "model.language_model", "thinker.model.language_model")
    backbone = Qwen25Omni
