"""Projectors that are trained in full beside the adapter: peft's `modules_to_save`, by the names of a family."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from omnimem.backbones.projectors import named
from omnimem.tuning.adapter_names import PREFIX, ForeignError, family_of, tree_of


def projectors_of(model: Any) -> dict[str, tuple[str, ...]]:
    """Paths of the modules of a loaded model's projectors, by the short names of settings."""
    family = family_of(model)
    return {} if family is None else named(family.projectors(model), model)


def chosen(model: Any, names: Iterable[str]) -> tuple[str, ...]:
    """The paths of the modules that `tuning.lora.modules_to_save` names, in the order of the model.

    A name is a projector's short name, the end of a module's path (`visual.merger`), or that of a list of modules.
    Raises ForeignError for a name that fits no projector of the model.
    """
    known = projectors_of(model)
    paths = [path for each in known.values() for path in each]
    found: set[str] = set()
    for name in names:
        fits = known.get(name) or [path for path in paths if _ends(path, name) or _ends(_list_of(path), name)]
        if not fits:
            has = "; ".join(f"{short} ({', '.join(map(_tail, each))})" for short, each in known.items())
            what = f"this model has {has}" if known else "this model has none; set it to []"
            raise ForeignError(f"{name!r} is not a projector; {what}")
        found.update(fits)
    return tuple(path for path in paths if path in found)


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a saved adapter: those of low rank, and those of whole modules."""
    low = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    return low, {key: tensor for key, tensor in tensors.items() if key not in low}


def fitted_modules(
    tensors: Mapping[str, Tensor], model: Any, names: Sequence[str]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights of whole modules under the names of a loaded model, and the paths of these modules.

    `names` are those of `modules_to_save` in the adapter's settings, of whatever version of transformers. Raises
    ForeignError if a weight is of no projector of this model or of another shape, if a module lacks one, and if
    settings and weights name different modules.
    """
    paths = [path for each in projectors_of(model).values() for path in each]
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        own = next((place for path in paths if (place := _own_name(key, path))), None)
        if own is None:
            raise ForeignError(f"{key.removeprefix(PREFIX)[:90]} is of no projector of this model")
        if own in found:
            raise ForeignError(f"two of its weights are for {own.removeprefix(PREFIX)}")
        found[own] = tensor
    saved = tuple(path for path in paths if any(key.startswith(f"{PREFIX}{path}.") for key in found))
    for path in saved:
        _require_whole(path, found, model)
    fits = {name: [path for path in paths if _ends(path, name) or _ends(name, _tail(path))] for name in names}
    if lacking := [name for name, each in fits.items() if not set(each) & set(saved)]:
        raise ForeignError(f"modules_to_save names {lacking[0]}, of which it has no weights for this model")
    if unnamed := [path for path in saved if not any(path in each for each in fits.values())]:
        raise ForeignError(f"it has weights of {unnamed[0]}, which its modules_to_save does not name")
    return found, saved


def released_modules(tensors: Mapping[str, Tensor], model: Any) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """`fitted_modules` of a loaded model under the names of its release, which has the encoders beside its decoder."""
    family, above = family_of(model), tree_of(model).rpartition(".")[0]
    theirs = family.trees[0].rpartition(".")[0] if family is not None and family.trees else above
    saved = {path for each in projectors_of(model).values() for path in each}

    def renamed(path: str) -> str:
        return ".".join(filter(None, (theirs, _tail(path))))

    renames = {path: renamed(path) for path in saved if any(key.startswith(f"{PREFIX}{path}.") for key in tensors)}
    made = {}
    for key, tensor in tensors.items():
        path = next(path for path in renames if key.startswith(f"{PREFIX}{path}."))
        made[f"{PREFIX}{renames[path]}{key.removeprefix(PREFIX + path)}"] = tensor
    return made, tuple(renames.values())


def copies(model: nn.Module) -> list[nn.Module]:
    """The adapter's own copies of whole modules."""
    wrappers = (module for module in model.modules() if isinstance(module, ModulesToSaveWrapper))
    return [copy for wrapper in wrappers for copy in wrapper.modules_to_save.values()]


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _list_of(path: str) -> str:
    """The list that holds a module; the module's own path if there is none."""
    above, _, last = path.rpartition(".")
    return above if last.isdigit() else path


def _tail(path: str) -> str:
    """The path from its encoder on, which no version of transformers changes."""
    inside = re.sub(r"\.\d+$", "", path).split(".")[:-2]
    return path.removeprefix("".join(f"{each}." for each in inside))


def _own_name(key: str, path: str) -> str | None:
    """The key of a weight under the path of a module of the loaded model; None: it is not of this module."""
    match = re.fullmatch(rf"{re.escape(PREFIX)}(?:.*\.)?{re.escape(_tail(path))}\.(.+)", key)
    return f"{PREFIX}{path}.{match[1]}" if match else None


def _require_whole(path: str, found: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raises ForeignError unless the weights of a module are those of the model's, in number and shape."""
    module: Any = model.get_submodule(path)
    module = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
    expected = {f"{PREFIX}{path}.{name}": weight.shape for name, weight in module.state_dict().items()}
    given = {key: tensor.shape for key, tensor in found.items() if key.startswith(f"{PREFIX}{path}.")}
    if given != expected:
        odd = min(key for key in {*given, *expected} if given.get(key) != expected.get(key))
        sizes = [list(each[odd]) if odd in each else "nothing" for each in (given, expected)]
        raise ForeignError(f"{odd.removeprefix(PREFIX)} has {sizes[0]}, and the model {sizes[1]}")
