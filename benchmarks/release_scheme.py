"""The release's scheme of a memory, written from its description, to be timed beside ours on the same weights.

A layer's memory holds its inputs (the residual stream), cos and sin, modality and accumulated attention of the kept
tokens. For every chunk the whole layer runs over [memory ; chunk]: keys and values are computed again, memory tokens
are queries too, and the rows of the chunk go on to the next layer. Scores, halving and selection are those of
`released`, so the kept tokens are the same; a test compares them. The measures use this project's own functions, which
are faster than the description asks for. One stream, no text.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from omnimem.attention.blocked import mass
from omnimem.budget import Budget
from omnimem.policies.base import slots_of_layer
from omnimem.positions import rotate
from omnimem.selection import select
from omnimem.tokens import Chunk
from omnimem.view import FLOOR, Measures, similarity

SHARPNESS = 0.02


@final
@dataclass(frozen=True, kw_only=True)
class Carried:
    """What a layer keeps of its tokens."""

    states: Tensor  # batch tokens width
    cos: Tensor  # batch tokens dim
    sin: Tensor
    modality: Tensor  # batch tokens
    importance: Tensor  # batch tokens
    order: Tensor  # batch tokens; for tests, not counted

    def parts(self) -> tuple[Tensor, ...]:
        """Its tensors."""
        return self.states, self.cos, self.sin, self.modality, self.importance, self.order

    @property
    def bytes(self) -> int:
        """Of all but `order`, with one more byte per token for its second mask."""
        counted = sum(part.numel() * part.element_size() for part in self.parts()[:-1])
        return counted + self.modality.numel()


@final
class ReleaseScheme:
    """A stream of one text model of Qwen2.5-Omni, outside of `attach`."""

    def __init__(self, model: Any, budget: Budget) -> None:
        self.model, self.budget = model, budget
        self.layers: list[Carried | None] = [None] * len(model.layers)
        self.fed = 0

    @property
    def bytes(self) -> int:
        """Of all layers."""
        return sum(layer.bytes for layer in self.layers if layer is not None)

    @torch.no_grad()
    def feed(self, chunk: Chunk) -> None:
        """Read a chunk, then keep the budget of every layer."""
        states = chunk.embeddings
        cos, sin = self.model.rotary_emb(states, chunk.positions.transpose(0, 1))
        zeros = torch.zeros(chunk.modality.shape, device=states.device)
        order = (torch.arange(chunk.count, device=states.device) + self.fed).expand(chunk.modality.shape)
        self.fed += chunk.count
        for number in range(len(self.layers)):
            fresh = Carried(states=states, cos=cos, sin=sin, modality=chunk.modality, importance=zeros, order=order)
            states = self._layer(number, fresh)

    def _layer(self, number: int, fresh: Carried) -> Tensor:
        """Output rows of the chunk; the layer's memory is replaced."""
        # 1. the pool of inputs
        old, count = self.layers[number], fresh.states.shape[1]
        pool = fresh
        if old is not None:
            pool = Carried(**{
                name: torch.cat([getattr(old, name), getattr(fresh, name)], dim=1) for name in vars(fresh)
            })  # fmt: skip
        # 2. the whole layer on every row
        layer, attention = self.model.layers[number], self.model.layers[number].self_attn
        queries, keys, values = self._projected(layer, pool)
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=attention.scaling, enable_gqa=True
        )
        states = pool.states + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        states = states + layer.mlp(layer.post_attention_layernorm(states))
        # 3. scores and selection
        received = mass(queries[:, :, -count:], keys, scale=attention.scaling, heads="logits")
        before = pool.importance[:, :-count]
        importance = torch.cat([(before + received[:, :-count]) / 2, received[:, -count:]], dim=1).clamp_min(FLOOR)
        novelty = (1 - similarity(pool.states, pool.modality, Measures(ends="one"))).clamp_min(FLOOR)
        scores = importance**SHARPNESS * novelty**0.5
        index = select(scores, pool.modality, slots_of_layer(self.budget, number)).index
        pool = Carried(**{**vars(pool), "importance": importance})
        self.layers[number] = Carried(**{name: part[:, index[0]] for name, part in vars(pool).items()})
        return states[:, -count:]

    def _projected(self, layer: Any, pool: Carried) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of every row, after RoPE."""
        attention = layer.self_attn
        normed = layer.input_layernorm(pool.states)
        queries, keys, values = (
            projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return rotate(queries, pool.cos, pool.sin), rotate(keys, pool.cos, pool.sin), values
