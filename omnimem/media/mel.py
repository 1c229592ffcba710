"""Log-mel spectrogram in torch, equal to WhisperFeatureExtractor, for whole clips and for streams that still grow."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

TOP_HERTZ = 8000.0  # Whisper's filters end here at any sampling rate
DYNAMIC_RANGE = 8.0  # log10 units below the maximum that are kept
BLOCK = 1 << 22  # values of one short-time Fourier transform held at once: an hour of audio would need gigabytes


def _mel_to_hertz(mels: Float[Tensor, " points"]) -> Float[Tensor, " points"]:
    """Slaney's scale: linear below 1 kHz (3 mels per 200 Hz), then 27 mels per factor 6.4."""
    exponent = (mels - 15.0).clamp(min=0.0) / 27.0
    return torch.where(mels < 15.0, mels * 200.0 / 3.0, 1000.0 * 6.4**exponent)


@lru_cache(maxsize=8)
def mel_filters(mels: int, n_fft: int, rate: int) -> Float[Tensor, "{mels} bins"]:
    """Triangles between neighbouring mel points, each of area one in hertz (Slaney's normalisation), float32."""
    top = (
        15.0
        + 27.0
        * torch.log(torch.tensor(TOP_HERTZ / 1000.0, dtype=torch.float64)).item()
        / torch.log(torch.tensor(6.4, dtype=torch.float64)).item()
    )
    points = _mel_to_hertz(torch.linspace(0.0, top, mels + 2, dtype=torch.float64))
    hertz = torch.linspace(0.0, rate // 2, n_fft // 2 + 1, dtype=torch.float64)
    low, middle, high = (points[i : i + mels, None] for i in range(3))
    triangle = torch.minimum((hertz - low) / (middle - low), (high - hertz) / (high - middle)).clamp(min=0.0)
    return (triangle * 2.0 / (high - low)).to(torch.float32)


@final
@dataclass(frozen=True, kw_only=True)
class LogMel:
    """The numbers of a checkpoint's WhisperFeatureExtractor: filters, hop and window in samples, sampling rate."""

    mels: int = 128
    hop: int = 160
    n_fft: int = 400
    rate: int = 16000

    def __post_init__(self) -> None:
        if min(self.mels, self.hop, self.n_fft, self.rate) < 1 or self.n_fft % 2:
            raise ValueError(
                f"{self}: mels, hop, rate must be positive and n_fft even; repair preprocessor_config.json"
            )

    def clip(self, samples: Float[Tensor, " samples"]) -> Float[Tensor, "{self.mels} mel_frames"]:
        """(max(log10 power, maximum of the clip - 8) + 4) / 4 of a whole clip: samples // hop frames.

        Equal to WhisperFeatureExtractor(padding="longest", truncation=False); clips shorter than half a window,
        which that refuses, are continued with silence.
        """
        log = torch.cat(list(self._logs([samples])), dim=1)
        return normalise(log, _loudest([log]))

    def loudest(self, blocks: Iterable[Float[Tensor, " _"]]) -> Float[Tensor, ""]:
        """log10 power of the loudest value of a clip that comes in blocks; they are not held together."""
        return _loudest(self._logs(blocks))

    def pieces(
        self, blocks: Iterable[Float[Tensor, " _"]], maximum: Float[Tensor, ""], mel_frames: int
    ) -> Iterator[Float[Tensor, "{self.mels} _"]]:
        """`clip` in pieces of `mel_frames`, the last one may be shorter, given the clip's `loudest`.

        An hour of 128 mels is 184 MB; read twice, it takes none of them.
        """
        held = torch.empty(self.mels, 0)
        for log in self._logs(blocks):
            held = torch.cat([held, normalise(log, maximum)], dim=1)
            while held.shape[1] >= mel_frames:
                yield held[:, :mel_frames]
                held = held[:, mel_frames:]
        if held.shape[1]:
            yield held

    def _logs(self, blocks: Iterable[Float[Tensor, " _"]]) -> Iterator[Float[Tensor, "{self.mels} _"]]:
        """The spectrogram of a clip before normalisation, as far as it is heard after each block."""
        running = self.running()
        for samples in blocks:
            running.feed(samples)
            yield running.take_log(running.ready)
        running.end()
        yield running.take_log(running.ready)

    def running(self) -> "RunningMel":
        """The same spectrogram for a stream whose maximum is not known yet."""
        return RunningMel(self)

    def reflected(self, samples: Float[Tensor, " samples"]) -> Float[Tensor, " padded"]:
        """Samples mirrored by half a window at both ends, so that frame i is centred at sample i * hop."""
        half = self.n_fft // 2
        short = max(0, half + 1 - len(samples))
        return pad(pad(samples, (0, short))[None], (half, half), mode="reflect")[0]

    def log_power(self, padded: Float[Tensor, " padded"], frames: int) -> Float[Tensor, "{self.mels} mel_frames"]:
        """log10 of the mel power (at least 1e-10) of the first `frames` windows, the i-th beginning at i * hop."""
        window = torch.hann_window(self.n_fft, device=padded.device)
        filters = mel_filters(self.mels, self.n_fft, self.rate).to(padded.device)
        step = max(1, BLOCK // self.n_fft)
        blocks = [torch.empty(self.mels, 0, device=padded.device)]
        for first in range(0, frames, step):
            count = min(step, frames - first)
            piece = padded[first * self.hop : (first + count - 1) * self.hop + self.n_fft]
            spectrum = torch.stft(piece, self.n_fft, self.hop, window=window, center=False, return_complex=True)
            blocks.append((filters @ (spectrum.abs() ** 2)).clamp(min=1e-10).log10())
        return torch.cat(blocks, dim=1)


def _loudest(logs: Iterable[Float[Tensor, "mels _"]]) -> Float[Tensor, ""]:
    """Of nothing at all: minus infinity."""
    return torch.stack([torch.tensor(float("-inf")), *(log.max() for log in logs if log.numel())]).max()


def normalise(log: Float[Tensor, "mels mel_frames"], maximum: Float[Tensor, ""]) -> Float[Tensor, "mels mel_frames"]:
    """Whisper's range, in place: nothing lower than 8 below the maximum, then (x + 4) / 4."""
    return torch.maximum(log, maximum - DYNAMIC_RANGE, out=log).add_(4.0).div_(4.0)


@final
class RunningMel:
    """Log-mel of a stream that is still growing, normalised by the maximum heard so far.

    Let M be the maximum of the whole clip. Every value v taken here obeys max(v, (M - 8 + 4) / 4) = LogMel.clip's
    value, and from the first `take` that contains the maximum on, v itself equals it.
    """

    def __init__(self, mel: LogMel) -> None:
        self._mel = mel
        self._buffer = torch.empty(0)  # mirrored start, then the samples not yet done with
        self._heard = 0  # samples fed
        self._taken = 0  # mel frames taken
        self._ended = False
        self.maximum = torch.tensor(float("-inf"))  # log10 power of the loudest value taken

    @property
    def ready(self) -> int:
        """Mel frames that can be taken now: those whose window is complete (all of them after `end`)."""
        if self._ended:
            return self._heard // self._mel.hop - self._taken
        half = self._mel.n_fft // 2
        if self._heard <= half:
            return 0
        # the last frame of a clip, centred on its end, is dropped: a frame needs hop samples from its centre on
        lookahead = max(half, self._mel.hop)
        return max(0, (self._heard - lookahead) // self._mel.hop + 1 - self._taken)

    def feed(self, samples: Float[Tensor, " samples"]) -> None:
        """Hears more samples."""
        if self._ended:
            raise ValueError("samples after the end of the stream; start a new LogMel.running() for the next one")
        half = self._mel.n_fft // 2
        before = self._heard
        self._heard += len(samples)
        self._buffer = torch.cat([self._buffer, samples])
        if before <= half < self._heard:
            self._buffer = torch.cat([self._buffer[1 : half + 1].flip(0), self._buffer])

    def end(self) -> None:
        """The stream is over: its end is mirrored as a clip's end is."""
        if self._ended:
            return
        half = self._mel.n_fft // 2
        if self._heard <= half:
            self._buffer = self._mel.reflected(self._buffer)
        else:
            self._buffer = torch.cat([self._buffer, self._buffer[-half - 1 : -1].flip(0)])
        self._ended = True

    def take(self, frames: int) -> Float[Tensor, "mels mel_frames"]:
        """The next `frames` mel frames (at most `ready`), normalised by the maximum up to and including them."""
        log = self.take_log(frames)
        return normalise(log, self.maximum)

    def take_log(self, frames: int) -> Float[Tensor, "mels mel_frames"]:
        """The next `frames` mel frames before normalisation; `maximum` takes part in them."""
        if frames > self.ready:
            raise ValueError(f"{frames} mel frames asked for, {self.ready} ready; feed more samples or call end()")
        log = self._mel.log_power(self._buffer, frames)
        self._buffer = self._buffer[frames * self._mel.hop :]
        self._taken += frames
        if frames:
            self.maximum = torch.maximum(self.maximum, log.max())
        return log
