"""Calibration signals of a model, and the audio-visual budget allocation (AVBA) computed from them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from omnimem.budget.allocation import BudgetError, Pair, Shares
from omnimem.errors import counted

Form = Literal["printed", "released"]


@final
@dataclass(frozen=True, kw_only=True)
class Readings:
    """One measurement per layer: over all audio and visual tokens, and over each modality."""

    whole: tuple[float, ...]
    audio: tuple[float, ...]
    visual: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.whole) == len(self.audio) == len(self.visual) >= 1:
            counts = f"{len(self.whole)}, {len(self.audio)} and {len(self.visual)}"
            raise BudgetError(
                f"signals list {counts} layers for all, audio and visual; give each layer one number in each"
            )
        if not all(math.isfinite(value) for row in (self.whole, self.audio, self.visual) for value in row):
            raise BudgetError("signals hold a number that is not finite; calibrate again")

    def json(self) -> dict[str, list[float]]:
        """The readings as stored in a budget file."""
        return {"all": list(self.whole), "audio": list(self.audio), "visual": list(self.visual)}

    @classmethod
    def of(cls, table: Mapping[str, Sequence[float]]) -> "Readings":
        """The inverse of `json`."""
        whole, audio, visual = (tuple(float(value) for value in table[key]) for key in ("all", "audio", "visual"))
        return cls(whole=whole, audio=audio, visual=visual)


@final
@dataclass(frozen=True, kw_only=True)
class Signals:
    """Calibration signals: normalised entropy of attention mass (0 to 1) and mean similarity of neighbours."""

    entropy: Readings
    similarity: Readings
    streams: int = 0
    chunks: int = 0  # measured chunks of all streams

    def __post_init__(self) -> None:
        if len(self.entropy.whole) != len(self.similarity.whole):
            raise BudgetError(
                f"signals hold entropy for {counted(len(self.entropy.whole), 'layer')} and similarity for "
                f"{len(self.similarity.whole)}; calibrate again"
            )

    @property
    def layers(self) -> int:
        """Number of layers measured."""
        return len(self.entropy.whole)

    def capacity(self, form: Form) -> tuple[float, ...]:
        """C of each layer: H (1 − s) as printed (eq. 13), H √(((1 − s_v) + (1 − s_a)) / 2) as released.

        H is divided by log K in both forms; T = 0.2 does not fit an entropy in nats.
        """
        if form == "printed":
            return tuple(h * _novelty(s) for h, s in zip(self.entropy.whole, self.similarity.whole, strict=True))
        rows = zip(self.entropy.whole, self.similarity.audio, self.similarity.visual, strict=True)
        return tuple(h * math.sqrt((_novelty(s_a) + _novelty(s_v)) / 2) for h, s_a, s_v in rows)

    def capacities(self, form: Form) -> tuple[Pair, ...]:
        """C_m of each layer and modality: H_m (1 − s_m) as printed (eq. 12), H_m √(1 − s_m) as released."""
        power = 1.0 if form == "printed" else 0.5
        audio = zip(self.entropy.audio, self.similarity.audio, strict=True)
        visual = zip(self.entropy.visual, self.similarity.visual, strict=True)
        return tuple(
            (h_a * _novelty(s_a) ** power, h_v * _novelty(s_v) ** power)
            for (h_a, s_a), (h_v, s_v) in zip(audio, visual, strict=True)
        )

    def shares(
        self,
        *,
        visual_audio_ratio: float = 5.0,
        layer_temperature: float = 0.2,
        form: Form = "released",
        clip: tuple[float, float] | None = None,
    ) -> Shares:
        """AVBA (eqs. 12-14; release `get_config.py`): layers by softmax(C / T), w_v = r C_v / (r C_v + C_a).

        `clip` bounds the visual slots of a layer in units of slots_per_layer; the bounds of audio are those divided
        by r. Raises BudgetError when C_v = C_a = 0 in a layer.
        """
        # 1. fractions of layers and modalities
        positive("visual_audio_ratio", visual_audio_ratio)
        positive("layer_temperature", layer_temperature)
        layers = _softmax([c / layer_temperature for c in self.capacity(form)])
        fractions = tuple(
            (layer * audio, layer * visual)
            for layer, (audio, visual) in zip(layers, self._split(visual_audio_ratio, form), strict=True)
        )
        # 2. bounds
        low, high = clip if clip else (0.0, math.inf)
        return Shares(
            fractions=fractions,
            low=(low / visual_audio_ratio, low),
            high=(high / visual_audio_ratio, high),
            provenance={
                "form": form,
                "visual_audio_ratio": visual_audio_ratio,
                "layer_temperature": layer_temperature if math.isfinite(layer_temperature) else "inf",
                "clip": list(clip) if clip else None,
                "streams": self.streams,
                "chunks": self.chunks,
            },
        )

    def _split(self, ratio: float, form: Form) -> tuple[Pair, ...]:
        """w_a and w_v of each layer."""
        pairs = []
        for layer, (audio, visual) in enumerate(self.capacities(form)):
            weight = ratio * visual + audio
            if weight <= 0:
                raise BudgetError(
                    f"layer {layer} has no capacity (C_v = C_a = 0: entropy 0 or similarity 1); "
                    "calibrate on longer streams or set budget: {name: split}"
                )
            pairs.append((audio / weight, ratio * visual / weight))
        return tuple(pairs)

    def json(self) -> dict[str, Any]:
        """The signals as stored in a budget file."""
        return {
            "entropy": self.entropy.json(),
            "similarity": self.similarity.json(),
            "streams": self.streams,
            "chunks": self.chunks,
        }

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> "Signals":
        """The inverse of `json`."""
        entropy, similarity = Readings.of(table["entropy"]), Readings.of(table["similarity"])
        return cls(entropy=entropy, similarity=similarity, streams=int(table["streams"]), chunks=int(table["chunks"]))


def positive(name: str, value: float) -> None:
    """Raise BudgetError unless the option is above 0."""
    if not value > 0:
        raise BudgetError(f"budget.{name} is {value}; give a number above 0")


def _softmax(values: Sequence[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    whole = math.fsum(powers)
    return [power / whole for power in powers]


def _novelty(similarity: float) -> float:
    """1 − s, clamped at 0: a mean of cosines may exceed 1 by rounding."""
    return max(0.0, 1.0 - similarity)
