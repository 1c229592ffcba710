"""LoRA on the text model alone, and the seam by which a trainer runs a whole stream as one forward pass."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, final

import torch
from peft import LoraConfig, PeftModel
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from omnimem.errors import UserError

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LAYERS = r".*model\.(?:language_model\.)?layers\.\d+\."  # of the text model, whichever level transformers keeps it at
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


class AdapterError(UserError):
    """An adapter that is empty, broken or made for another base; the message says which and how to repair it."""


@final
@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters on the text model's projections (release: r 128, alpha 256, dropout 0.05 on q, k, v)."""

    r: int = 128
    alpha: float = 256
    dropout: float = 0.05
    targets: tuple[Target, ...] = ("q_proj", "k_proj", "v_proj")

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"lora.r = {self.r} must be at least 1")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha = {self.alpha:g} must be above 0: it scales what the adapter adds")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout = {self.dropout:g} must be in [0, 1)")
        if not self.targets:
            raise ValueError("lora.targets is empty; name at least one projection, such as q_proj")

    def config(self) -> LoraConfig:
        """peft's configuration; the pattern keeps the encoders' projections of the same names out."""
        attention = "|".join(name for name in self.targets if name in ATTENTION)
        perceptron = "|".join(name for name in self.targets if name not in ATTENTION)
        places = [f"{part}\\.({names})" for part, names in (("self_attn", attention), ("mlp", perceptron)) if names]
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=self.dropout,
            target_modules=rf"{LAYERS}({'|'.join(places)})",
            bias="none",
            task_type="CAUSAL_LM",
        )


@final
class StreamedModel(PeftModel):
    """A PeftModel whose forward pass may be any function of it: a trainer's engine then sees one forward a stream."""

    def forward(self, *args: Any, streamed: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """`streamed()` if given, else the model's own forward pass."""
        return super().forward(*args, **kwargs) if streamed is None else streamed()

    def train(self, mode: bool = True) -> "StreamedModel":
        """Only the adapters' dropout follows the mode: frozen encoders and base stay as in evaluation."""
        super().train(False)
        self.training = mode
        for name, module in self.named_modules():
            if "lora_dropout" in name:
                module.training = mode
        return self


def add_adapter(model: Any, options: LoraOptions) -> StreamedModel:
    """The model with fresh adapters (B = 0, so nothing changes yet); everything else is frozen.

    Raises AdapterError when no module matches the targets.
    """
    model.requires_grad_(False)
    try:
        adapted = _adapted(model, options.config())
    except ValueError as error:
        there = ", ".join(_projections(model)) or "none"
        raise AdapterError(f"lora.targets: {', '.join(options.targets)} match no module; there are: {there}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # the optimizer's own precision, whatever the base's
    return adapted


def _projections(model: nn.Module) -> list[str]:
    """Names of the projections in the layers of the text model."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return sorted({name.rpartition(".")[2] for name in linear if re.match(LAYERS, name)})


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights of a saved adapter.

    Raises AdapterError when they are missing, unreadable, empty, not finite, or all B matrices are zero.
    """
    path = folder / WEIGHTS
    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder}: {name} is missing; give the adapter/ folder of a finished run")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise AdapterError(f"{path}: cannot be read ({error}); copy it again, or export it again") from error
    trained = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    if not trained or any(tensor.numel() == 0 for tensor in tensors.values()):
        raise AdapterError(f"{path}: the adapter is empty; save it again from a checkpoint (train/export.py)")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise AdapterError(f"{path}: the adapter holds numbers that are not finite; lower the learning rate and rerun")
    if not any(bool(tensor.any()) for tensor in trained):
        raise AdapterError(f"{path}: the adapter was never trained (every B is zero); rerun the fine-tuning")
    return tensors


def load_adapter(model: Any, folder: Path) -> StreamedModel:
    """The model with a saved adapter, verified.

    Raises AdapterError when the adapter is broken or its shapes are those of another base.
    """
    tensors = adapter_tensors(folder)
    config = cast(LoraConfig, LoraConfig.from_pretrained(str(folder)))
    try:
        adapted = _adapted(model.requires_grad_(False), config)
        result = set_peft_model_state_dict(adapted, tensors)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise AdapterError(
            f"{folder}: made for another base than {model.name_or_path} ({reason}); give its own"
        ) from error
    missing = [name for name, parameter in adapted.named_parameters() if "lora_" in name and _absent(name, tensors)]
    if result.unexpected_keys or missing:
        raise _foreign(folder, model, (list(result.unexpected_keys) + missing)[0])
    return adapted.eval()


def _adapted(model: Any, config: LoraConfig) -> StreamedModel:
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5 by a name that is deprecated there; nothing a user could do
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        return StreamedModel(model, config)


def _foreign(folder: Path, model: Any, reason: str) -> AdapterError:
    return AdapterError(f"{folder}: made for another base than {model.name_or_path} ({reason}); give its own adapter")


def _absent(name: str, tensors: dict[str, Tensor]) -> bool:
    return name.replace(".default", "") not in tensors


def trainable(model: nn.Module) -> list[Tensor]:
    """The parameters that learn."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
