"""Replayed: keeps what another stream of the same chunks keeps (`memory.selection_from: base`)."""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from omnimem.memory import Memory
from omnimem.per_head import rows_of
from omnimem.policies.base import Policy, Traits
from omnimem.selection import Softness
from omnimem.tokens import ABSENT, Tokens
from omnimem.view import LayerView, Measures


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """The tokens that one layer keeps, row by row; a row is a stream, or one key-value head of it."""

    order: Int[Tensor, "rows kept"]  # arrival numbers
    present: Bool[Tensor, "rows kept"]  # False: padding of a shorter row


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Replayed(Policy):
    """In every layer the tokens of `kept`, whatever their scores are here (ours).

    It measures nothing and its selection has no gradient; kept tokens have. Storage and positions are those of the
    policy that chose the tokens.
    """

    stored: Traits
    kept: tuple[Kept, ...] = ()  # by layer, after the present chunk

    @classmethod
    def of(cls, policy: Policy) -> "Replayed":
        """What a policy keeps elsewhere, before the first chunk."""
        stored = replace(
            policy.traits, probes=(), needs_novelty=False, needs_place=False, compared=None, needs_oracle=False
        )
        kept = {"name": policy.name, "budget": policy.budget, "markers": policy.markers}
        return cls(**kept, measures=Measures(feature=0), stored=stored)

    def after(self, memory: Memory, kv_heads: int) -> "Replayed":
        """The policy that keeps the tokens which `memory` holds after the chunk."""
        heads = kv_heads if self.stored.per_head else None
        return replace(self, kept=tuple(_kept(layer, heads) for layer in memory.layers))

    @property
    def traits(self) -> Traits:
        """Those that determine how tokens are stored and moved."""
        return self.stored

    def keep(self, layer: int, view: LayerView, softness: Softness | None = None) -> Tokens:
        """The tokens of `kept`; each of them is in the pool, as evicted tokens never return."""
        pool, kept = view.pool, self.kept[layer]
        number = torch.where(pool.modality == ABSENT, torch.iinfo(pool.order.dtype).max, pool.order)
        ordered, places = number.sort(dim=1, stable=True)
        place = torch.searchsorted(ordered, kept.order.contiguous()).clamp_max(pool.count - 1)
        found = pool.gather(places.gather(1, place))
        unequal = self.stored.ragged or (self.markers == "with_group" and len(kept.present) > 1)
        return found.masked(kept.present) if unequal else found


def _kept(layer: Tokens, kv_heads: int | None) -> Kept:
    """The arrival numbers of a layer's tokens; None: all heads hold all of them."""
    bare = replace(layer, keys=layer.keys[..., :0], values=layer.values[..., :0], feature=layer.feature[..., :0])
    rows = bare if kv_heads is None else rows_of(bare, kv_heads)
    return Kept(order=rows.order, present=rows.modality != ABSENT)
