"""Drift of selection: how many of the tokens that the tuned model would keep the untuned model keeps too."""

from collections.abc import Sequence
from dataclasses import replace
from typing import final

import torch

from omnimem.data import Sample
from omnimem.media import MediaError
from omnimem.memory import Held, in_common
from omnimem.policies.base import Policy
from omnimem.streaming.adapter import without_adapter
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.feeder import EncodedSample, Feeder


def is_due(every: int, step: int, steps: int, last: int) -> bool:
    """Whether the log at `step` of `steps` is the last one, or the first from a multiple of `every` on."""
    return every > 0 and (step // every > last // every or step == steps)


@final
class SelectionOverlap:
    """|T & U| / max(|T|, |U|) in each layer at the end of one fixed stream (ours), T the audio and visual tokens that
    the model keeps by its own scores with its adapter, U without it.

    Selection is hard, as in evaluation. With `selection_from: base` T is what would be kept without that setting. The
    stream is the first of `samples` that can be read; U is the same at every step, so it is found once.
    """

    def __init__(
        self, attached: StreamedAttention, feeder: Feeder, policy: Policy, samples: Sequence[Sample], every: int
    ) -> None:
        """`every`: steps between two measurements; 0: none."""
        self.attached, self.feeder, self.samples, self.every = attached, feeder, samples, every
        self.policy = replace(policy, selection_from="tuned")
        self._untuned: tuple[Held, ...] | None = None
        self.latest: list[float] | None = None

    def due(self, step: int, steps: int, last: int) -> bool:
        """Whether to measure at the log of this step, the previous log being that of step `last`."""
        return is_due(self.every, step, steps, last)

    def __call__(self) -> dict[str, float]:
        """`selection_overlap/mean` and `selection_overlap/layer_N`; nothing if no sample can be read.

        Where the sample names needles, also `needle_layers/tuned` and `needle_layers/untuned`: the share of layers (of
        heads of layers, if these keep their own) that hold a needle, mean over the needles. The model must be in
        evaluation mode.
        """
        opened = self._open()
        if opened is None:
            return {}
        if self._untuned is None:
            with without_adapter(self.attached.text_model):
                self._untuned = self._held(opened)
        held = self._held(opened)
        shares = self.latest = in_common(held, self._untuned)
        found = {"selection_overlap/mean": sum(shares) / len(shares)}
        found |= {f"selection_overlap/layer_{layer}": share for layer, share in enumerate(shares)}
        if opened.sample.meta.get("needles"):
            needles = self.feeder.outline(opened).needles
            found["needle_layers/tuned"] = self._needle_layers(held, needles)
            found["needle_layers/untuned"] = self._needle_layers(self._untuned, needles)
        return found

    def _needle_layers(self, held: Sequence[Held], needles: Sequence[int]) -> float:
        heads = self.attached.shape.kv_heads if self.policy.traits.per_head else 1
        there = sum((head, needle) in layer for layer in held for head in range(heads) for needle in needles)
        return there / (len(held) * heads * len(needles))

    def _open(self) -> EncodedSample | None:
        for sample in (sample for sample in self.samples if sample.has_stream):
            try:
                return self.feeder.open(sample)
            except MediaError:  # counted when the run trains on it
                continue
        return None

    @torch.no_grad()
    def _held(self, opened: EncodedSample) -> tuple[Held, ...]:
        """What is kept at the end of the stream."""
        stream = self.feeder.stream(self.attached, self.feeder.with_oracle(self.policy, [opened]))
        for chunk in self.feeder.chunks([opened]):
            stream.feed(chunk)
        return stream.memory.held()
