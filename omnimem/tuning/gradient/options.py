"""Names of the gradient modes, and which settings go together."""

from typing import Literal

Mode = Literal["full", "states", "released", "paper"]
Horizon = int | Literal["all"]
Recompute = Literal["none", "chunk", "layer"]  # activations that live at once: all, those of a chunk, of a layer
NOT_THE_INPUT: tuple[Mode, ...] = ("states", "released")  # no gradient reaches the embeddings of a chunk
HALF_WAY: tuple[Mode, ...] = ("released", "paper")  # chunks run the layers below `stop_layer` alone


def check_settings(mode: Mode, horizon: Horizon, stop_layer: int | None, softening: str) -> None:
    """Raises ValueError where a setting has no effect in this mode."""
    if horizon != "all" and horizon < 1:
        raise ValueError(f"horizon = {horizon} must be at least 1 chunk, or all")
    if horizon != "all" and mode != "full":
        raise ValueError(
            f"horizon = {horizon} applies to gradient: full only (got {mode}); set horizon: all, or gradient: full"
        )
    if stop_layer is not None and mode not in HALF_WAY:
        raise ValueError(
            f"stop_layer = {stop_layer} applies to gradient: released or paper only (got {mode}, whose chunks run all "
            "layers); leave it out, or set gradient: released"
        )
    if stop_layer is not None and stop_layer < 1:
        raise ValueError(f"stop_layer = {stop_layer} must be at least 1: chunks run the layers below it")
    if mode in HALF_WAY and softening != "hard":
        raise ValueError(
            f"selection.softening = {softening} has no effect with gradient: {mode}, whose selection does not "
            "learn; set it to hard"
        )
