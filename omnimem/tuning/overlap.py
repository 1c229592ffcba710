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
        """Whether to measure at the log of this step, the previous one being `last`: and at the end of the run."""
        return self.every > 0 and (step // self.every > last // self.every or step == steps)

    def __call__(self) -> dict[str, float]:
        """`selection_overlap/mean` and `selection_overlap/layer_N`; nothing if no sample can be read.

        The model must be in evaluation mode.
        """
        opened = self._open()
        if opened is None:
            return {}
        if self._untuned is None:
            with without_adapter(self.attached.text_model):
                self._untuned = self._held(opened)
        shares = self.latest = in_common(self._held(opened), self._untuned)
        layers = {f"selection_overlap/layer_{layer}": share for layer, share in enumerate(shares)}
        return {"selection_overlap/mean": sum(shares) / len(shares), **layers}

    def _open(self) -> EncodedSample | None:
        for sample in self.samples:
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
