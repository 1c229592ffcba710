"""Log-mel spectrogram in torch, equal to WhisperFeatureExtractor, for whole clips and for live streams."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from omnimem.errors import counted

TOP_HERTZ = 8000.0  # upper end of Whisper's filters at any sampling rate
DYNAMIC_RANGE = 8.0  # log10 units below the maximum; lower values are clamped
HELD = 1 << 25  # bytes of a spectrogram that is held while the maximum of its clip is found
BLOCK = 1 << 22  # values of one short-time Fourier transform; an hour of audio at once would need gigabytes


def _mel_to_hertz(mels: Float[Tensor, " points"]) -> Float[Tensor, " points"]:
    """Slaney's scale: linear below 1 kHz (3 mels per 200 Hz), then 27 mels per factor 6.4."""
    exponent = (mels - 15.0).clamp(min=0.0) / 27.0
    return torch.where(mels < 15.0, mels * 200.0 / 3.0, 1000.0 * 6.4**exponent)


@lru_cache(maxsize=8)
def mel_filters(mels: int, n_fft: int, rate: int) -> Float[Tensor, "{mels} bins"]:
    """Triangular filters between neighbouring mel points, each of area one in hertz (Slaney's normalisation)."""
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
    """Settings of a checkpoint's WhisperFeatureExtractor: filters, hop and window in samples, sampling rate in Hz."""

    mels: int = 128
    hop: int = 160
    n_fft: int = 400
    rate: int = 16000

    def __post_init__(self) -> None:
        if min(self.mels, self.hop, self.n_fft, self.rate) < 1 or self.n_fft % 2:
            raise ValueError(f"{self}: mels, hop, rate must be positive and n_fft even; fix preprocessor_config.json")

    def clip(self, samples: Float[Tensor, " samples"]) -> Float[Tensor, "{self.mels} mel_frames"]:
        """(max(log10 power, maximum of the clip - 8) + 4) / 4 of a whole clip, with ceil(samples / hop) frames.

        Equal to the frames that WhisperFeatureExtractor(padding="max_length") marks as audio, at every length up to
        its 300 s (less half a window): the clip is followed by silence, and the maximum includes the frames after its
        end that reach into it. Longer clips are not truncated.
        """
        running = RunningMel(self)
        return normalise(torch.cat(list(running.logs([samples])), dim=1), running.maximum)

    def window(self, samples: Float[Tensor, " samples"], frames: int) -> Float[Tensor, "{self.mels} mel_frames"]:
        """A clip padded with silence to a window of `frames`, normalised by the window's own maximum.

        Equal to WhisperFeatureExtractor on one window: both ends are reflected, the frame after the last is left out.
        Raises ValueError when the clip is longer.
        """
        length, half = frames * self.hop, self.n_fft // 2
        if len(samples) > length:
            raise ValueError(f"a window of {counted(length, 'sample')} cannot hold {len(samples):,}")
        whole = F.pad(samples, (0, length - len(samples)))
        log = self.log_power(F.pad(whole[None, None], (half, half), mode="reflect")[0, 0], frames)
        return normalise(log, log.max())

    def pieces(
        self, read: Callable[[], Iterable[Float[Tensor, " _"]]], mel_frames: int
    ) -> Iterator[Float[Tensor, "{self.mels} _"]]:
        """The result of `clip` in pieces of `mel_frames`, the last may be shorter; `read` yields its samples in blocks.

        The maximum of the clip is needed first. A spectrogram above HELD bytes, 10 minutes of 128 mels, is not held
        meanwhile: the audio is read twice.
        """
        # 1. the maximum, and the spectrogram of a short clip
        running, logs, size = RunningMel(self), list[Tensor](), 0
        for log in running.logs(read()):
            size += log.nbytes
            logs.append(log)
            if size > HELD:
                logs.clear()
        # 2. normalised pieces
        maximum, held = running.maximum, torch.empty(self.mels, 0)
        for log in logs or RunningMel(self).logs(read()):
            held = torch.cat([held, normalise(log, maximum)], dim=1)
            while held.shape[1] >= mel_frames:
                yield held[:, :mel_frames]
                held = held[:, mel_frames:]
        if held.shape[1]:
            yield held

    def log_power(self, padded: Float[Tensor, " padded"], frames: int) -> Float[Tensor, "{self.mels} mel_frames"]:
        """log10 of the mel power (at least 1e-10) of the first `frames` windows; window i starts at i * hop."""
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


def normalise(log: Float[Tensor, "mels mel_frames"], maximum: Float[Tensor, ""]) -> Float[Tensor, "mels mel_frames"]:
    """Whisper's normalisation, in place: clamp at 8 below the maximum, then (x + 4) / 4."""
    return torch.maximum(log, maximum - DYNAMIC_RANGE, out=log).add_(4.0).div_(4.0)


@final
class RunningMel:
    """Log-mel of a live stream, normalised by the running maximum; frame i is centred at sample i * hop.

    The beginning is reflected, the end is followed by silence. Let M be the maximum of the whole clip. Every value v
    obeys max(v, (M - 8 + 4) / 4) = value of `LogMel.clip`. From the first `take` that contains the maximum on, v equals
    it.
    """

    def __init__(self, mel: LogMel) -> None:
        self._mel = mel
        self._buffer = torch.empty(0)  # reflected start, then the samples still needed
        self._fed = 0  # samples fed
        self.taken = 0  # mel frames taken
        self._ended = False
        self.maximum = torch.tensor(float("-inf"))  # maximum log10 power taken

    @property
    def ready(self) -> int:
        """Number of mel frames with a complete window that were not taken yet (all remaining ones after `end`)."""
        if self._ended:
            return -(-self._fed // self._mel.hop) - self.taken
        half = self._mel.n_fft // 2
        if self._fed <= half:
            return 0
        return max(0, (self._fed - half) // self._mel.hop + 1 - self.taken)

    def feed(self, samples: Float[Tensor, " samples"]) -> None:
        """Append samples; raises ValueError after `end`."""
        if self._ended:
            raise ValueError("samples after the end of the stream; make a new RunningMel for the next one")
        before = self._fed
        self._fed += len(samples)
        self._append(samples, before)

    def _append(self, samples: Float[Tensor, " samples"], before: int) -> None:
        """Append to the buffer of `before` samples, and reflect the beginning as soon as it is complete."""
        half = self._mel.n_fft // 2
        self._buffer = torch.cat([self._buffer, samples])
        if before <= half < before + len(samples):
            self._buffer = torch.cat([self._buffer[1 : half + 1].flip(0), self._buffer])

    def end(self) -> None:
        """End the stream: add the silence that the windows of the last frames reach into."""
        if not self._ended:
            self._append(torch.zeros(self._mel.n_fft), self._fed)
            self._ended = True

    def logs(self, blocks: Iterable[Float[Tensor, " _"]]) -> Iterator[Float[Tensor, "mels _"]]:
        """The spectrogram of a clip before normalisation, in pieces, one per block and one at the end."""
        for samples in blocks:
            self.feed(samples)
            yield self.take_log(self.ready)
        self.end()
        yield self.take_log(self.ready)

    def skip(self, first: int) -> None:
        """Take frames until `first` are taken; fewer if so many are not ready."""
        self.take_log(min(self.ready, max(0, first - self.taken)))

    def take(self, frames: int) -> Float[Tensor, "mels mel_frames"]:
        """The next `frames` mel frames (at most `ready`), normalised by the maximum up to their end."""
        log = self.take_log(frames)
        return normalise(log, self.maximum)

    def take_log(self, frames: int) -> Float[Tensor, "mels mel_frames"]:
        """The next `frames` mel frames before normalisation; updates `maximum`. Raises ValueError beyond `ready`."""
        if frames > self.ready:
            raise ValueError(
                f"{counted(frames, 'mel frame')} requested, {self.ready} ready; feed more samples or call end()"
            )
        log = self._mel.log_power(self._buffer, frames)
        self._buffer = self._buffer[frames * self._mel.hop :]
        self.taken += frames
        heard = [log, self._mel.log_power(self._buffer, self._reaching)] if self._ended and not self.ready else [log]
        for part in heard:
            if part.numel():
                self.maximum = torch.maximum(self.maximum, part.max())
        return log

    @property
    def _reaching(self) -> int:
        """Number of frames after the last one whose windows reach into the clip."""
        until = self._fed + self._mel.n_fft // 2 if self._fed else 0
        return -(-until // self._mel.hop) - -(-self._fed // self._mel.hop)
