"""A fake GPU: its tensors are computed on the CPU, and mixing devices raises an error as CUDA does."""

from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
FROM_HOST = {"__getitem__", "__setitem__", "copy_"}  # a tensor on the device may be indexed and filled from the host
ASKS_ONLY = {"_has_compatible_shallow_copy_type"}


@final
class FakeGPU(TorchFunctionMode):
    """Inside the block `.to("cuda")` and `device="cuda"` work, and an operation on tensors of both places raises.

    The device of a tensor is noted by object, and by storage for views that autograd makes. Backward is not followed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._objects: Any = WeakIdKeyDictionary()
        self._storages: dict[int, Any] = {}  # those on the device; held, so that no address comes twice

    def has(self, tensor: Tensor) -> bool:
        known = self._objects.get(tensor)
        return tensor.untyped_storage().data_ptr() in self._storages if known is None else known

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return GPU if self.has(args[0]) else CPU
        if func == Tensor.data.__set__:
            func(*args)
            return self._noted(args[0], self.has(args[1]))
        if func is Tensor.to:
            return self._moved(args[0], args[1:], named)
        if func is Tensor.cpu:
            return self._moved(args[0], (CPU,), {})
        return self._computed(func, args, named)

    def _computed(self, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, named)) if isinstance(leaf, Tensor)]
        places = {self.has(tensor) for tensor in tensors if tensor.ndim or self.has(tensor)}
        if named.get("device") is not None:
            there = torch.device(named["device"]).type == "cuda"
            named["device"] = CPU
        else:
            self._refuse_mixing(func.__name__, tensors, places)
            there = True in places
        result = func(*args, **named)
        return tree_map_only(Tensor, lambda tensor: self._noted(tensor, there), result)

    def _refuse_mixing(self, name: str, tensors: list[Tensor], places: set[bool]) -> None:
        """Numbers without a shape may come from the host, as in CUDA."""
        if len(places) < 2 or name in ASKS_ONLY or (name in FROM_HOST and self.has(tensors[0])):
            return
        found = ", ".join(f"{'cuda' if self.has(tensor) else 'cpu'} {tuple(tensor.shape)}" for tensor in tensors)
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found {found}")

    def _moved(self, source: Tensor, args: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
        there, rest = self.has(source), list(args)
        for number, value in enumerate(rest):
            if isinstance(value, torch.device | str):
                there, rest[number] = torch.device(value).type == "cuda", CPU
            elif isinstance(value, Tensor):
                there = self.has(value)
        if named.get("device") is not None:
            there, named["device"] = torch.device(named["device"]).type == "cuda", CPU
        result = source.to(*rest, **named)
        return self._noted(source.clone() if result is source and there != self.has(source) else result, there)

    def _noted(self, tensor: Tensor, there: bool) -> Tensor:
        self._objects[tensor] = there
        storage = tensor.untyped_storage()
        if there and storage.data_ptr():
            self._storages[storage.data_ptr()] = storage
        return tensor
