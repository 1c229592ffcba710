"""The release's training path once more, without optimizations: stock layers with eager attention over hidden states.

Every layer of every pass runs over [memory ; chunk] as rows of one sequence, memory rows included, whose outputs are
then dropped; nothing is stored but layer inputs; selection is by plain loops. One stream.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from omnimem.streaming.prompt_pass import Prompt
from omnimem.tokens import Chunk
from support import reference
from support.episodes import mean_answer_loss
from support.models import position_ids

AXIS = {"states": 1, "positions": 2, "modality": 1, "order": 1}  # of the tokens


@final
@dataclass(frozen=True, kw_only=True)
class Rows:
    """Layer inputs of some tokens, in order of arrival."""

    states: Tensor  # batch tokens width
    positions: Tensor
    modality: Tensor
    order: Tensor

    def at(self, places: Sequence[int]) -> "Rows":
        index = torch.tensor(places, dtype=torch.long)
        return Rows(**{name: tensor.index_select(AXIS[name], index) for name, tensor in vars(self).items()})

    def then(self, later: "Rows") -> "Rows":
        both = {name: (tensor, getattr(later, name)) for name, tensor in vars(self).items()}
        return Rows(**{name: torch.cat(pair, dim=AXIS[name]) for name, pair in both.items()})

    def of(self, states: Tensor) -> "Rows":
        return replace(self, states=states)

    def constant(self) -> "Rows":
        return self.of(self.states.detach())


@final
class SlowRelease:
    """A stream read as the release trains; `whole_last_chunk` keeps the last chunk's graph below the stop layer."""

    def __init__(
        self, model: PreTrainedModel, slots: Sequence[tuple[int, int]], rule: dict, stop: int, whole_last_chunk: bool
    ) -> None:
        self.model, self.slots, self.rule, self.stop = model, slots, rule, stop
        self.whole_last_chunk = whole_last_chunk
        self.kept: list[list[list[int]]] = []  # [chunk][layer up to stop] arrival numbers

    def stored(self, chunks: Sequence[Chunk]) -> list[Rows]:
        """Layer inputs that the question finds in every layer."""
        memory: list[Rows | None] = [None] * (self.stop + 1)
        arrived = 0
        for number, chunk in enumerate(chunks):
            last = number == len(chunks) - 1
            order = torch.arange(arrived, arrived + chunk.count)[None]
            arrived += chunk.count
            rows = Rows(states=chunk.embeddings, positions=chunk.positions, modality=chunk.modality, order=order)
            for layer in range(self.stop):
                attached = last and self.whole_last_chunk
                pool = join(memory[layer], rows if attached else rows.constant())
                output = self.run(layer, pool)[:, -chunk.count :]
                kept = pool.at(self.chosen(layer, pool))
                memory[layer] = kept if attached else kept.constant()
                rows = rows.of(with_visual_features(output, chunk, layer))
            pool = join(memory[self.stop], rows)
            places = self.chosen(self.stop, pool)
            memory[self.stop] = pool.at(places)
            self.kept.append([rows.order[0].tolist() for rows in memory if rows is not None])
        found = [rows for rows in memory if rows is not None]
        rows = pool.of(self.run(self.stop, pool)).at(places)
        for layer in range(self.stop + 1, len(self.slots)):
            found.append(rows.at(self.chosen(layer, rows)))
            rows = rows.of(self.run(layer, rows))
        return found

    def run(self, layer: int, rows: Rows, seen: Tensor | None = None) -> Tensor:
        """Output of a decoder layer over these rows; `seen` is queries x keys, causal where it is not given."""
        count = rows.states.shape[1]
        seen = torch.ones(count, count, dtype=torch.bool).tril() if seen is None else seen
        mask = torch.zeros(count, count, dtype=rows.states.dtype).masked_fill(~seen, float("-inf"))
        rotary = self.model.rotary_emb(rows.states, position_ids(self.model, rows.positions))
        return self.model.layers[layer](
            rows.states, attention_mask=mask[None, None], position_embeddings=rotary, past_key_values=None
        )

    def chosen(self, layer: int, rows: Rows) -> list[int]:
        kinds = rows.modality[0].tolist()
        redundancy = reference.similarity(rows.states[0].tolist(), kinds, "sequence", self.rule["ends"])
        return reference.select([1 - s for s in redundancy], kinds, *self.slots[layer], lend=self.rule["lend"])

    def loss(self, chunks: Sequence[Chunk], prompt: Prompt, head: Callable[[Tensor], Tensor]) -> Tensor:
        """Mean answer loss of packed questions at the end of the chunks."""
        stored, count = self.stored(chunks), prompt.ids.shape[1]
        after = max(int(chunk.positions.max()) for chunk in chunks) + 1
        states = self.model.get_input_embeddings()(prompt.ids)
        asked = Rows(
            states=states,
            positions=(prompt.offsets + after)[:, None].expand(-1, 3, -1),
            modality=torch.zeros_like(prompt.ids, dtype=torch.int8),
            order=prompt.offsets,
        )
        own = (prompt.segments[0][:, None] == prompt.segments[0][None, :]).tril()
        for layer, rows in enumerate(stored):
            held = rows.states.shape[1]
            seen = torch.ones(held + count, held + count, dtype=torch.bool).tril()
            seen[held:, held:] = own
            asked = asked.of(self.run(layer, rows.then(asked), seen)[:, held:])
        return mean_answer_loss(head(self.model.norm(asked.states)), prompt.labels)


def join(memory: Rows | None, rows: Rows) -> Rows:
    return rows if memory is None else memory.then(rows)


def with_visual_features(states: Tensor, chunk: Chunk, layer: int) -> Tensor:
    """Visual features that some models add after their first layers."""
    if chunk.deepstack is None or layer >= len(chunk.deepstack.features):
        return states
    added = torch.zeros_like(states)
    added[chunk.deepstack.mask] = chunk.deepstack.features[layer]
    return states + added
