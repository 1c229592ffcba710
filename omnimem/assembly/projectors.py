"""Projectors in closed form: ridge regressions from encoder features to the embeddings of words."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from omnimem.assembly.bank import Features
from omnimem.errors import counted
from omnimem.recall.pictures import CORNERS, NAMES, NOISES, STEP, TEXTURES, WORDS, PictureWorld

# targets of a cell and of a second; textures and noises have their own, so that an empty token is not always the same
SHOWN: tuple[str, ...] = (*NAMES, *TEXTURES)
HEARD: tuple[str, ...] = (*WORDS, *NOISES)
PENALTY = 0.01  # of standardised features, times the number of rows

Track = Literal["visual", "audio"]


def cell_labels(world: PictureWorld) -> Int[Tensor, "steps cells"]:
    """Index into SHOWN of each corner at each step: the picture in it, else the texture."""
    rows = []
    for scene in world.scenes:
        row = [SHOWN.index(scene.texture)] * CORNERS
        if scene.picture is not None:
            row[scene.corner] = SHOWN.index(scene.picture)
        rows += [row] * (scene.seconds // STEP)
    return torch.tensor(rows)


def second_labels(world: PictureWorld) -> Int[Tensor, " seconds"]:
    """Index into HEARD of each second: the word spoken in it, else the noise."""
    found = torch.tensor([HEARD.index(scene.noise) for scene in world.scenes for _ in range(scene.seconds)])
    for scene in world.scenes:
        for word in scene.words:
            found[word.at] = HEARD.index(word.text)
    return found


@final
@dataclass(frozen=True, kw_only=True)
class Rows:
    """All cells, or all seconds, of some worlds."""

    features: Float[Tensor, "rows channels"]
    labels: Int[Tensor, " rows"]


def rows_of(bank: Iterable[Features], track: Track) -> Rows:
    """The rows of a track; worlds without it are left out."""
    found = []
    for each in bank:
        if track == "visual" and each.visual is not None:
            found.append((each.visual.flatten(0, 1), cell_labels(each.world).flatten()))
        if track == "audio" and each.audio is not None:
            found.append((each.audio, second_labels(each.world)))
    return Rows(features=torch.cat([one for one, _ in found]), labels=torch.cat([one for _, one in found]))


def fit_ridge(
    features: Float[Tensor, "rows channels"], targets: Float[Tensor, "rows width"], penalty: float = PENALTY
) -> nn.Linear:
    """argmin over (W, b) of |W z + b - y|² + n penalty |W|², z the features scaled to mean 0 and variance 1.

    The scaling is folded into W and b. Solved in float64 by the normal equations.
    """
    # 1. standardise
    rows, goal = features.double(), targets.double()
    mean, scale = rows.mean(0), rows.std(0).clamp(min=1e-6)
    inputs, centre = (rows - mean) / scale, goal.mean(0)
    # 2. solve
    square = inputs.T @ inputs + penalty * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(square, inputs.T @ (goal - centre)).T / scale
    # 3. as a linear layer
    layer = nn.Linear(features.shape[1], targets.shape[1]).requires_grad_(False)
    layer.weight.copy_(weight)
    layer.bias.copy_(centre - weight @ mean)
    return layer


@final
@dataclass(frozen=True, kw_only=True)
class Recognition:
    """Share of rows whose nearest word by cosine is the right one, among all of SHOWN or HEARD."""

    named: float  # rows that hold a picture or a word
    empty: float  # rows that hold a texture or a noise


def recognition(layer: nn.Linear, rows: Rows, table: Float[Tensor, "names width"], named: int) -> Recognition:
    """Of a projector; the first `named` rows of the table are pictures or words."""
    near = normalize(layer(rows.features), dim=1) @ normalize(table, dim=1).T
    right, holds = near.argmax(1) == rows.labels, rows.labels < named
    return Recognition(named=right[holds].float().mean().item(), empty=right[~holds].float().mean().item())


def word_rows(table: Float[Tensor, "tokens width"], ids: Sequence[Sequence[int]]) -> Float[Tensor, "names width"]:
    """Embeddings of words; raises ValueError for a word of several tokens."""
    for number, each in enumerate(ids):
        if len(each) != 1:
            raise ValueError(f"word {number} has {counted(len(each), 'token')}; choose words of one token")
    return table[torch.tensor([each[0] for each in ids])].float()
