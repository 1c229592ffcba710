"""The names of the gradient modes, and which settings mean something together."""

from typing import Literal

Mode = Literal["full", "states", "released", "paper"]
Horizon = int | Literal["all"]
Recompute = Literal["none", "chunk", "layer"]  # whose activations live at once: all, a chunk's, a layer's
HALF_WAY: tuple[Mode, ...] = ("released", "paper")  # chunks run the layers below `stop_layer` alone


def check_settings(mode: Mode, horizon: Horizon, stop_layer: int | None, softening: str) -> None:
    """Raises ValueError, with the cure, where a setting means nothing."""
    if horizon != "all" and horizon < 1:
        raise ValueError(f"horizon = {horizon} must be at least 1 chunk, or all")
    if horizon != "all" and mode != "full":
        raise ValueError(
            f"horizon = {horizon} means nothing with gradient: {mode}, which has a reach of its own; "
            "set horizon: all, or gradient: full"
        )
    if stop_layer is not None and mode not in HALF_WAY:
        raise ValueError(
            f"stop_layer = {stop_layer} means nothing with gradient: {mode}, whose chunks run all layers; "
            "leave it out, or set gradient: released"
        )
    if stop_layer is not None and stop_layer < 1:
        raise ValueError(f"stop_layer = {stop_layer} must be at least 1: chunks run the layers below it")
    if mode in HALF_WAY and softening != "hard":
        raise ValueError(
            f"selection.softening = {softening} means nothing with gradient: {mode}, whose selection does not "
            "learn; set it to hard"
        )
