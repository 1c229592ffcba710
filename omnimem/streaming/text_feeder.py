"""Text streams: samples, and the feeder that makes chunks and prompts of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from torch import Tensor

from omnimem.backbones.base import Tracks, Turn
from omnimem.backbones.text import TextModel, TextSegment
from omnimem.policies.base import Policy, StreamOutline
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.feeder import last_position
from omnimem.streaming.prompt_pass import Prompt, pack
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk


@final
@dataclass(frozen=True, kw_only=True)
class TextQuestion:
    """A question and when it is asked: after so many tokens of the stream, or (None) after its end."""

    turn: Turn
    after: int | None = None


@final
@dataclass(frozen=True, kw_only=True)
class TextSample:
    """A text stream and the questions about it."""

    id: str
    segments: tuple[TextSegment, ...]
    questions: tuple[TextQuestion, ...] = ()
    needles: tuple[int, ...] = ()  # tokens of the stream that hold the answers, for the oracle
    tracks: Tracks | None = None

    @property
    def tokens(self) -> int:
        """Evictable tokens of the stream."""
        return sum(len(segment.ids) for segment in self.segments)

    @property
    def moments(self) -> tuple[float | None, ...]:
        """The distinct times of the questions in tokens, in order; None (after the end) is the last."""
        times = {question.after for question in self.questions}
        during = tuple(float(time) for time in sorted(time for time in times if time is not None))
        return (*during, None) if None in times else during

    def turns(self, due: Sequence[float | None]) -> list[Turn]:
        """The questions at these times with an answer to train on."""
        return [each.turn for each in self.questions if each.after in due and each.turn.answer is not None]


@final
class TextFeeder:
    """Chunks and prompts of text samples; the counterpart of `Feeder`, for `streamed_loss` and for answers."""

    def __init__(
        self, backbone: TextModel, *, chunk_tokens: int = 256, positions: Literal["original", "compact"] = "original"
    ) -> None:
        """With `positions: compact` a stream stays within the trained positions of the model."""
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens = {chunk_tokens} must be at least 1")
        self.backbone, self.chunk_tokens = backbone, chunk_tokens
        self.positions: Literal["original", "compact"] = positions

    def chunks(
        self, batch: Sequence[TextSample], chunk_tokens: int | None = None, *, rests: bool = False
    ) -> Iterator[Chunk]:
        """The opening and the chunks of samples of one layout, cut where questions are asked; so there are no rests."""
        cuts = [moment for moment in batch[0].moments if moment is not None]
        return self.backbone.chunks(
            [sample.segments for sample in batch], chunk_tokens=chunk_tokens or self.chunk_tokens, cuts=cuts
        )

    def stream(self, attached: StreamedAttention, policy: Policy, *, batch: int = 1, **settings: Any) -> Stream:
        """An empty stream."""
        last = last_position(self.positions, self.backbone.trained_positions)
        probes = [
            torch.tensor(self.backbone.probe(probe.text), device=self.backbone.device) for probe in policy.traits.probes
        ]
        return Stream(attached, policy, batch=batch, last_position=last, probes=probes, **settings)

    def with_oracle(self, policy: Policy, batch: Sequence[TextSample]) -> Policy:
        """The policy with the content of the streams, where it needs that."""
        if not policy.traits.needs_oracle:
            return policy
        return policy.with_oracle([self.outline(sample) for sample in batch])

    def outline(self, sample: TextSample) -> StreamOutline:
        """Modality and place of all tokens, the opening's included, and the sample's needles."""
        kinds, places = zip(*((chunk.modality[0], chunk.places[0]) for chunk in self.chunks([sample])), strict=True)
        modality = torch.cat(kinds).cpu()
        before = len(modality) - sample.tokens
        outline = StreamOutline(modality=modality, place=torch.cat(places, dim=1).cpu())
        return replace(outline, needles=tuple(before + place for place in sample.needles))

    def prompt(self, rows: Sequence[Sequence[Turn]], tracks: Tracks | None = None) -> Prompt:
        """The questions of each stream packed into one row; shorter rows are padded."""
        asked = [[self.backbone.turn(turn) for turn in turns] for turns in rows]
        return pack(asked, fill=(*self.backbone.stop, 0)[0], device=self.backbone.device)

    def answers(
        self,
        stream: Stream,
        questions: Sequence[str | Turn],
        *,
        max_new_tokens: int = 16,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> list[str]:
        """Greedy answers to questions about one stream; the stream does not change."""
        turns = [Turn(text=each) if isinstance(each, str) else replace(each, answer=None) for each in questions]
        rows = stream.answer(
            self.prompt([turns]), head or self.backbone.head, stop=self.backbone.stop, max_new_tokens=max_new_tokens
        )
        return [str(self.backbone.tokenizer.decode(ids, skip_special_tokens=True)) for ids in rows[0]]
