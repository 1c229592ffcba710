"""Plain text: a causal language model whose stream is text too, in tokens that are marked evictable.

A text stream uses the two evictable modalities as tags: VISUAL by default, or AUDIO and VISUAL for two interleaved
texts with slots of their own. Positions are consecutive, equal on all axes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from omnimem.backbones.base import LayoutError, Turn, labelled
from omnimem.errors import counted
from omnimem.textfile import whole_characters
from omnimem.tokens import EVICTABLE, Chunk, ChunkFacts, Counts, Modality

SAMPLE = "\x00"  # placeholder of the user's text while the template is rendered


@final
@dataclass(frozen=True, kw_only=True)
class TextSegment:
    """Token ids of a part of a stream, and the evictable modality that they count as."""

    ids: tuple[int, ...]
    modality: Modality = Modality.VISUAL

    def __post_init__(self) -> None:
        if self.modality not in EVICTABLE:
            raise LayoutError(
                f"a segment of a stream is {self.modality.name}; give AUDIO or VISUAL: text is never evicted"
            )


@final
class TextModel:
    """A causal language model (`LlamaForCausalLM` and others with rotary positions) and its tokenizer.

    The prompt is the chat template's: {opening}{stream}{question}. With `template=False` it is `system`, the stream and
    the question as they are, for continuations. Raises LayoutError when the template cannot be used, or the model has
    no head.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        template: bool = True,
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        head: Any = model.get_output_embeddings()
        if head is None:
            raise LayoutError(f"{type(model).__name__} has no language-model head; load it as a causal language model")
        self._head: nn.Module = head
        self._opening, self._closing = (system or "", SAMPLE) if not template else _rendered(tokenizer, system)
        self._template = template
        self._require_plain_head()

    def _require_plain_head(self) -> None:
        """Raise LayoutError if the model is attached, or its logits are not head(hidden states): scaled or capped."""
        settings: Any = self.text_model.config
        if settings._attn_implementation == "omnimem":
            raise LayoutError("this model is attached to a stream; make the TextModel before `with attach(...)`")
        ids = torch.tensor([[0, 1, 2]], device=self.device)
        with torch.no_grad():
            expected = self.model(input_ids=ids, use_cache=False).logits.float()
            found = self._head(self.text_model(input_ids=ids, use_cache=False).last_hidden_state).float()
        difference, scale = float((expected - found).abs().max()), max(1.0, float(expected.abs().max()))
        if not difference <= 1e-2 * scale:
            raise LayoutError(
                f"{type(self.model).__name__} changes the logits of its head (by up to {difference:.3g}; a scale or a"
                " cap in its config), which streams do not; it is not supported"
            )

    @property
    def text_model(self) -> PreTrainedModel:
        """The decoder that processes a stream."""
        decoder: Any = self.model.base_model
        return decoder

    @property
    def head(self) -> nn.Module:
        """The language-model head: hidden states to logits."""
        return self._head

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    @property
    def stop(self) -> tuple[int, ...]:
        """Token ids that end an answer."""
        found = self.tokenizer.eos_token_id
        return (int(found),) if isinstance(found, int) else ()

    @property
    def trained_positions(self) -> int:
        """Number of positions that the model was trained on."""
        config: Any = self.text_model.config
        return int(config.max_position_embeddings)

    def ids(self, text: str, *, control: bool = False) -> list[int]:
        """Token ids of a text; unless `control`, control tokens in it are encoded as text."""
        plain: dict[str, Any] = {} if control else {"split_special_tokens": True}
        encoded = self.tokenizer(whole_characters(text), add_special_tokens=False, **plain)
        return list(encoded["input_ids"])  # type: ignore[arg-type]

    def segment(self, text: str, modality: Modality = Modality.VISUAL) -> TextSegment:
        """A part of a stream from text."""
        return TextSegment(ids=tuple(self.ids(text)), modality=modality)

    def chunks(
        self, batch: Sequence[Sequence[TextSegment]], *, chunk_tokens: int, cuts: Sequence[float] = ()
    ) -> Iterator[Chunk]:
        """The opening as a chunk of text, then streams of one layout in chunks of at most `chunk_tokens` tokens.

        `Chunk.seconds` counts the tokens of the stream up to the end of the chunk. A chunk also ends at every cut,
        counted alike. Raises LayoutError when the streams of a batch differ in length or modality.
        """
        # 1. the streams as tensors
        ids = [[i for segment in row for i in segment.ids] for row in batch]
        kinds = [[int(segment.modality) for segment in row for _ in segment.ids] for row in batch]
        odd = next((number for number, row in enumerate(kinds) if row != kinds[0]), None)
        if odd is not None:
            raise LayoutError(
                f"text streams 0 and {odd} of a batch differ in length or modality ({len(kinds[0])} and "
                f"{counted(len(kinds[odd]), 'token')}); batch streams of one layout, or set the batch size to 1"
            )
        # 2. the opening
        opening = self.ids(self._opening, control=True)
        if opening:
            yield self._chunk([opening] * len(batch), [int(Modality.TEXT)] * len(opening), 0, 0)
        # 3. the stream
        ends = sorted({int(cut) for cut in cuts if 0 < cut < len(ids[0])} | {len(ids[0])})
        first = 0
        for end in ends:
            while first < end:
                last = min(first + chunk_tokens, end)
                yield self._chunk([row[first:last] for row in ids], kinds[0][first:last], len(opening) + first, last)
                first = last

    def _chunk(self, ids: Sequence[Sequence[int]], kinds: Sequence[int], first: int, read: int) -> Chunk:
        tokens = torch.tensor(ids, device=self.device)
        with torch.no_grad():
            embeddings: Tensor = self.text_model.get_input_embeddings()(tokens)
        places = torch.arange(first, first + tokens.shape[1], device=self.device)
        modality = torch.tensor(kinds, dtype=torch.int8, device=self.device).expand(tokens.shape)
        audio, text = kinds.count(int(Modality.AUDIO)), kinds.count(int(Modality.TEXT))
        ends = (first + len(kinds) - 1,) * len(ids)
        return Chunk(
            embeddings=embeddings,
            positions=places.expand(len(ids), 3, -1),
            modality=modality,
            seconds=float(read),
            facts=ChunkFacts(Counts(text, len(kinds) - text, audio, 0), ends, ends),
        )

    def probe(self, text: str | None) -> list[int]:
        """Token ids of a text in place of a question; None: what the template puts after a question, or a new line."""
        after = self._closing.partition(SAMPLE)[2]
        return self.ids(after or "\n", control=True) if text is None else self.ids(text)

    def turn(self, turn: Turn) -> tuple[list[int], list[int], list[int]]:
        """(ids, offsets, labels) of a question and its answer; a label is at the token that predicts it, else -100.

        Without a template an answer has no end token.
        """
        if turn.ids is None:
            before, _, after = self._closing.partition(SAMPLE)
            asked = [*self.ids(before, control=True), *self.ids(turn.text), *self.ids(after, control=True)]
        else:
            asked = list(turn.ids)
        answer = [] if turn.answer is None else self.ids(turn.answer)
        if turn.answer is not None and self._template:
            answer += self.stop[:1]
        ids, labels = labelled([*asked, *self.ids(turn.given)], answer)
        return ids, list(range(len(ids))), labels


def _rendered(tokenizer: PreTrainedTokenizerBase, system: str | None) -> tuple[str, str]:
    """The template before the stream, and from there on with `SAMPLE` in place of the question.

    Raises LayoutError when there is no template, or it does not hold the user's text.
    """
    if tokenizer.chat_template is None:
        raise LayoutError("the tokenizer has no chat template; give one, or TextModel(..., template=False)")
    messages = [{"role": "user", "content": SAMPLE}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    opening, found, closing = text.partition(SAMPLE)
    if not found:
        raise LayoutError("the chat template does not render the user's text; use TextModel(..., template=False)")
    return opening, f"\n\n{SAMPLE}{closing}"
