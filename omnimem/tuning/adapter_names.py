"""Names of an adapter's weights: they depend on the release, and on the version of transformers that wrote them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from omnimem.backbones.family import Family
from omnimem.backbones.load import FAMILIES
from omnimem.errors import counted

PREFIX = "base_model.model."  # of peft
PART = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)\b.*")  # what follows the path of the adapted module
TREE = re.compile(r"((?:.*\.)?(?:model|language_model)|)\.?layers\.\d+")  # decoder layers; encoders match nowhere
SIZES = {"lora_A": ("inputs", "in_features", 1), "lora_B": ("outputs", "out_features", 0)}  # and the axis of a weight


class ForeignError(ValueError):
    """Weights that are not of a model; the message says which."""


def fitted(tensors: Mapping[str, Tensor], model: nn.Module, targets: Iterable[str] = ()) -> dict[str, Tensor]:
    """The weights under the names of a loaded model, whatever tree of its family they were saved from.

    `targets` are the modules that the adapter's settings name, by the ends of their paths. Raises ForeignError if a
    weight has no module in the model, not the size of its module, or another one for the same module beside it, and if
    a named module of the decoder layers has no weights.
    """
    # 1. names
    modules, family, tree = dict(model.named_modules()), family_of(model), tree_of(model)
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        named = None if family is None or path_of(key) in modules else family.adapter_key(key, tree)
        if (named or key) in found:
            raise ForeignError(f"two of its weights are for {path_of(named or key)}")
        found[named or key] = tensor
    unknown = [key for key in found if path_of(key) not in modules]
    if unknown:
        kind = f"{family.name} model" if family is not None and family.trees else type(model).__name__
        raise ForeignError(
            f"no module of a {kind} matches {len(unknown)} of {counted(len(found), 'weight')}, as {unknown[0][:90]}"
        )
    # 2. sizes
    for key, tensor in found.items():
        path = path_of(key)
        what, name, axis = SIZES.get(key.removeprefix(PREFIX + path).split(".")[1], ("", "", 0))
        size = getattr(modules[path], name, None) if name and tensor.ndim == 2 else None
        if size is not None and tensor.shape[axis] != size:
            raise ForeignError(f"{path} has {size} {what}, and the adapter is for {tensor.shape[axis]}")
    # 3. layers
    adapted, inside = {path_of(key) for key in found}, re.compile(rf"{re.escape(_below(tree))}layers\.\d+\..+")
    layers = [path for path, module in modules.items() if isinstance(module, nn.Linear) and inside.fullmatch(path)]
    targets = tuple(targets)
    named = [path for path in layers if any(path.endswith(f".{target}") for target in targets)]
    if lacking := [path for path in named if path not in adapted]:
        raise ForeignError(
            f"no weights for {len(lacking)} of {counted(len(named), 'module')} that it names, as {lacking[0]}"
        )
    return found


def released(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights of a loaded model's adapter under the names of its release.

    Raises ForeignError for a model of no family that has a release.
    """
    family, tree = family_of(model), tree_of(model)
    if family is None or not family.trees:
        raise ForeignError(f"a {type(model).__name__} has no names of a release")
    ours, theirs = PREFIX + _below(tree), PREFIX + _below(family.trees[0])
    return {key.replace(ours, theirs, 1): tensor for key, tensor in tensors.items()}


def family_of(model: Any) -> Family | None:
    """The family of a loaded model; None for a text model alone."""
    return next((family for family in FAMILIES if family.owns(model)), None)


def tree_of(model: nn.Module) -> str:
    """The module that holds the decoder layers; empty for a text model alone."""
    matches = (TREE.fullmatch(name) for name, _ in model.named_modules())
    return next((match[1] for match in matches if match), "")


def path_of(key: str) -> str:
    """The module that a weight adapts."""
    return PART.sub("", key.removeprefix(PREFIX))


def _below(tree: str) -> str:
    return f"{tree}." if tree else ""
