"""Made-up streams of one layer with frames of rows and columns: what a rival's view shows, drawn from a seed."""

from itertools import pairwise

import torch
from torch import Tensor

from omnimem.memory import Memory, Shape
from omnimem.policies.base import Policy
from omnimem.tokens import TOKEN_AXES, Modality, Tokens, place_of
from omnimem.view import LayerView, Measures
from support.reference_policies import Row

SCALE = 0.4
DIM = 6
ROWS, COLUMNS = 2, 3  # of a frame
OPENING = 3  # tokens of text at the start; one more stands after every second step


def layout(steps: int) -> list[tuple[int, tuple[int, int, int]]]:
    """Modality and position of each token of a stream of `steps` frames."""
    tokens = [(0, (n, n, n)) for n in range(OPENING)]
    for step in range(steps):
        start = OPENING + 2 * step
        for cell in range(ROWS * COLUMNS):
            tokens.append((2, (start, OPENING + cell // COLUMNS, OPENING + cell % COLUMNS)))
        tokens += [(1, (start + n,) * 3) for n in range(2)]
        if step % 2:
            tokens.append((0, (start + 1,) * 3))
    return tokens


def chunks_of(
    lengths: list[int], *, batch: int = 1, kv_heads: int = 1, heads: int = 2, seed: int = 0
) -> list[tuple[Tensor, Tokens]]:
    """Queries and tokens of chunks of these lengths; keys of one cell are alike from frame to frame."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    table = layout(count)[:count]
    kinds = torch.tensor([kind for kind, _ in table], dtype=torch.int8).expand(batch, count)
    positions = torch.tensor([place for _, place in table]).T.expand(batch, 3, count)
    queries = torch.randn(batch, heads, count, DIM, generator=generator) * 2
    scene = torch.randn(batch, kv_heads, ROWS * COLUMNS, DIM, generator=generator)
    keys = torch.randn(batch, kv_heads, count, DIM, generator=generator)
    for k, (kind, (_, row, column)) in enumerate(table):
        if kind == 2:
            cell = (row - OPENING) * COLUMNS + column - OPENING
            keys[:, :, k] = scene[:, :, cell] + 0.5 * keys[:, :, k]
    values = torch.randn(batch, kv_heads, count, DIM, generator=generator)
    order = torch.arange(count).expand(batch, count)
    zeros = torch.zeros(batch, count)
    whole = Memory.empty(shape_of(kv_heads), batch).layers[0]
    drawn = {"keys": keys, "values": values, "positions": positions, "modality": kinds, "order": order}
    fields = dict(zip(TOKEN_AXES, whole.tensors(), strict=True))
    rest = {name: zeros if tensor.ndim == 2 else zeros[..., None][..., :0] for name, tensor in fields.items()}
    rest["place"], rest["group"] = place_of(positions).split([3, 1], dim=1)
    rest["group"] = rest["group"][:, 0]
    rest["owner"] = kinds[:, None][:, :0]
    tokens = Tokens(**{**rest, **drawn})
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return [
        (queries[:, :, first:last], tokens.gather(torch.arange(first, last).expand(batch, -1)))
        for first, last in pairwise(ends)
    ]


def shape_of(kv_heads: int, layers: int = 1) -> Shape:
    return Shape(
        layers=layers, kv_heads=kv_heads, dim=DIM, width=4, feature=0, dtype=torch.float32, device=torch.device("cpu")
    )


def view_after(memory: Tokens | None, chunk: tuple[Tensor, Tokens], measures: Measures | None = None) -> LayerView:
    """What a policy sees when a chunk meets a memory."""
    queries, fresh = chunk
    return LayerView(
        pool=fresh if memory is None else memory.cat(fresh),
        new=fresh.count,
        queries=queries,
        scale=SCALE,
        measures=measures or Measures(),
        gradient="none",
    )


def kept_by(policy: Policy, chunks: list[tuple[Tensor, Tokens]], layer: int = 0) -> list[Tokens]:
    memory, after = None, []
    for chunk in chunks:
        memory = policy.keep(layer, view_after(memory, chunk, policy.measures))
        after.append(memory)
    return after


def row_of(view: LayerView, number: int) -> Row:
    pool = view.pool
    visual = pool.modality == Modality.VISUAL
    spans = [pool.positions[:, axis][visual] for axis in (1, 2)] if visual.any() else [torch.zeros(1).long()] * 2
    (top, bottom), (left, right) = ((int(span.min()), int(span.max())) for span in spans)
    return Row(
        extent=(top, left, bottom - top + 1, right - left + 1),
        keys=pool.keys[number].double().tolist(),
        values=pool.values[number].double().tolist(),
        queries=view.queries[number].double().tolist(),
        kinds=pool.modality[number].tolist(),
        order=pool.order[number].tolist(),
        positions=[tuple(place) for place in pool.positions[number].T.tolist()],
        importance=pool.importance[number].double().tolist(),
        scale=view.scale,
    )


def evictable(tokens: Tokens, row: int = 0) -> list[int]:
    """Arrival numbers of the audio and visual tokens."""
    return tokens.order[row][tokens.modality[row] != Modality.TEXT].tolist()
