"""Finished stages of the pretraining in progress.pt, so that a run that was stopped continues after them."""

import pickle
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from omnimem.aside import written_aside
from omnimem.errors import UserError, first_line


class ProgressError(UserError):
    """progress.pt is damaged, or of another seed."""


@final
class Progress:
    """Names of the finished stages with the state after the last one: weights, optimizer, random generator.

    The continued run equals an unbroken one to the bit, on the same number of threads.
    """

    def __init__(self, folder: Path, parts: nn.Module, seed: int) -> None:
        """Raises ProgressError if there is a progress.pt that cannot be continued."""
        self.path, self._parts = folder / "progress.pt", parts
        self._state: dict[str, Any] = {"seed": seed, "done": []}  # done: names of the finished stages
        if not self.path.exists():
            return
        cure = f"remove it to start again, or give another --out (it is {self.path})"
        try:
            self._state = torch.load(self.path, weights_only=True)
            found = self._state["seed"]
            if found == seed and list(self._state["done"]):
                parts.load_state_dict(self._state["weights"])
                torch.set_rng_state(self._state["random"])
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError, TypeError, ValueError) as error:
            raise ProgressError(f"progress.pt cannot be read ({first_line(error)}); {cure}") from error
        if found != seed:
            raise ProgressError(f"progress.pt is of --seed {found}, not {seed}; {cure}")

    @property
    def done(self) -> list[str]:
        """The finished stages, in order."""
        return self._state["done"]

    def continue_optimizer(self, optimizer: torch.optim.Optimizer, stages: list[str]) -> int:
        """Load its state if the last finished stage is one of `stages`; returns the steps that they took so far."""
        if not self.done or self.done[-1] not in stages or self._state["optimizer"] is None:
            return 0
        optimizer.load_state_dict(self._state["optimizer"])
        return int(self._state["steps"])

    def save(self, stage: str, optimizer: torch.optim.Optimizer | None = None, steps: int = 0) -> None:
        """Add a finished stage."""
        self._state |= {
            "done": [*self.done, stage],
            "weights": self._parts.state_dict(),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            "steps": steps,
            "random": torch.get_rng_state(),
        }
        with written_aside(self.path) as partial:
            torch.save(self._state, partial)

    def remove(self) -> None:
        """Remove the file, after the result is complete."""
        self.path.unlink(missing_ok=True)
