"""LoRA on the text model, and StreamedModel, which runs a whole stream as one forward pass for the trainer."""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, final, get_args

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omnimem.backbones.files import weights_digest
from omnimem.checksums import SEAL, SHOWN, damage, is_sealed, origin_of
from omnimem.errors import UserError, first_line
from omnimem.limits import exceeds
from omnimem.run import write_text
from omnimem.textfile import StoredFileError, read_stored
from omnimem.tuning.adapter_names import ForeignError, fitted, path_of, released
from omnimem.tuning.saved_modules import chosen, copies, fitted_modules, released_modules, split

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# Decoder layers: of a text model alone, of its language model, or nested deeper by version; encoders match nowhere.
ABOVE = r"(?:(?:.*\.)?model\.)?(?:language_model\.)?"
LAYER = r"layers\.\d+\."
LAYERS = ABOVE + LAYER
READ = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")  # settings of a saved adapter
UNREAD = (  # checked apart, or notes without an effect
    "target_modules",
    "modules_to_save",
    "init_lora_weights",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "task_type",
    "peft_type",
    "peft_version",
)
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


class AdapterError(UserError):
    """An adapter that is empty, damaged or made for another base model; the message says how to fix it."""


@final
@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters on the text model's projections (release: r 128, alpha 256, dropout 0.05 on q, k, v)."""

    r: int = 128  # rank
    alpha: float = 256  # the adapter is scaled by alpha / r
    dropout: float = 0.05  # of the adapter's input in training
    # projections of the decoder layers that get an adapter: names, all, or a regular expression of the path from
    # `layers.` on
    targets: tuple[Target, ...] | str = ("q_proj", "k_proj", "v_proj")
    rslora: bool = False  # scale alpha / sqrt(r) in place of alpha / r (arXiv 2312.03732)
    dora: bool = False  # a trained magnitude per output beside the low-rank direction (arXiv 2402.09353)
    plus_ratio: float = 1.0  # learning rate of B over that of A (LoRA+, arXiv 2402.12354)
    # projectors that are trained in full, at the learning rate of A: visual_projector, audio_projector, or module paths
    # of them (docs/tuning.md)
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"lora.r = {self.r} must be at least 1")
        if what := exceeds("lora_rank", self.r):
            raise ValueError(f"lora.r = {what}")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha = {self.alpha:g} must be above 0: it scales the adapter")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout = {self.dropout:g} must be in [0, 1)")
        if not self.targets:
            raise ValueError("lora.targets is empty; name at least one projection, such as q_proj")
        if not 0 < self.plus_ratio < float("inf"):
            raise ValueError(f"lora.plus_ratio = {self.plus_ratio:g} must be a number above 0; 1: one learning rate")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"lora.targets: {self.targets!r} is no regular expression ({error})") from error

    @property
    def named(self) -> tuple[Target, ...] | None:
        """The projections by name; None of a regular expression."""
        if isinstance(self.targets, str):
            return get_args(Target) if self.targets == "all" else None
        return self.targets

    @property
    def pattern(self) -> str:
        """A regular expression of module paths; it excludes projections of the same names in the encoders."""
        return f"{ABOVE}(?={LAYER})(?:{self.targets})" if self.named is None else _pattern(self.named)

    def matched(self, layers: int) -> list[tuple[int, Target]]:
        """(layer, projection) of the adapted modules of a text model with so many layers."""
        every = [(layer, name) for layer in range(layers) for name in get_args(Target)]
        inside = {name: "self_attn" if name in ATTENTION else "mlp" for name in get_args(Target)}
        pattern = re.compile(self.pattern)
        return [(at, name) for at, name in every if pattern.fullmatch(f"layers.{at}.{inside[name]}.{name}")]

    def config(self, saved: Sequence[str] = ()) -> LoraConfig:
        """The peft configuration; `saved` are the paths of `modules_to_save` in the model."""
        return LoraConfig(
            modules_to_save=list(saved) or None,
            r=self.r,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=self.dropout,
            target_modules=self.pattern,
            use_rslora=self.rslora,
            use_dora=self.dora,
            bias="none",
            task_type="CAUSAL_LM",
        )


def _pattern(targets: Iterable[str]) -> str:
    """A regular expression of the projections in the layers of the text model."""
    named = tuple(targets)
    attention = "|".join(name for name in named if name in ATTENTION)
    mlp = "|".join(name for name in named if name not in ATTENTION)
    places = [f"{part}\\.({names})" for part, names in (("self_attn", attention), ("mlp", mlp)) if names]
    return rf"{LAYERS}({'|'.join(places)})"


@final
class StreamedModel(PeftModel):
    """A PeftModel with an arbitrary function as its forward pass: one forward call per stream for the engine."""

    def forward(self, *args: Any, streamed: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """`streamed()` if given, otherwise the model's forward pass."""
        return super().forward(*args, **kwargs) if streamed is None else streamed()

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Write the adapter alone; peft adds the embeddings when the folder of the base has another config."""
        super().save_pretrained(save_directory, *args, **{"save_embedding_layers": False, **kwargs})

    def train(self, mode: bool = True) -> "StreamedModel":
        """Switch the dropout of the adapters only; frozen encoders and base stay in evaluation mode."""
        super().train(False)
        self.training = mode
        for name, module in self.named_modules():
            if "lora_dropout" in name:
                module.training = mode
        return self


def add_adapter(model: Any, options: LoraOptions) -> StreamedModel:
    """Add new adapters (B = 0, so the output is unchanged) and freeze all other parameters.

    Raises AdapterError when no module matches the targets.
    """
    model.requires_grad_(False)
    saved = _saved_by(options, model)
    try:
        adapted = _adapted(model, options.config(saved))
    except ValueError as error:
        known = ", ".join(_projections(model)) or "none"
        given = options.targets if isinstance(options.targets, str) else ", ".join(options.targets)
        what = "match no module" if "not found" in str(error) else f"cannot be adapted ({first_line(error)})"
        raise AdapterError(f"lora.targets: {given} {what}; known: {known}") from error
    return _in_float32(adapted)


def start_adapter(model: Any, options: LoraOptions, folder: Path) -> StreamedModel:
    """The adapters of a folder (`model.adapter`), to be trained further with the dropout of `options`.

    Raises AdapterError as `load_adapter`, and when the folder was made with other settings than `options`.
    """
    # 1. the settings agree
    check_start(model, options, folder, model.name_or_path)
    # 2. load, train
    adapted = load_adapter(model, folder, dropout=options.dropout)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name or ".modules_to_save." in name)
    return _in_float32(adapted)


def _saved_by(options: LoraOptions, model: Any) -> tuple[str, ...]:
    """The paths of `modules_to_save` in a model; raises AdapterError for a name that fits none."""
    try:
        return chosen(model, options.modules_to_save)
    except ForeignError as error:
        raise AdapterError(f"tuning.lora.modules_to_save: {error}") from error


def check_start(model: nn.Module, options: LoraOptions, folder: Path, base: str) -> None:
    """Raises AdapterError as `start_adapter`, for a model that may be without weights (meta device).

    `base` is the folder or id that the adapter must have been tuned on.
    """
    # 1. files and settings
    tensors = adapter_tensors(folder)
    low, whole = split(tensors)
    config, targets = _saved_config(folder, low)
    require_base(folder, base)
    pairs = {"r": config.r, "alpha": config.lora_alpha, "rslora": config.use_rslora, "dora": config.use_dora}
    for name, found in pairs.items():
        if getattr(options, name) != found:
            what = f"tuning.lora.{name} = {getattr(options, name)}, but the adapter in {folder} has {found}"
            raise AdapterError(f"{what}; set tuning.lora.{name}={found}, or remove model.adapter")
    # 2. modules
    try:
        adapted = {path_of(name) for name in fitted(low, model, targets)}
    except ForeignError as error:
        raise _foreign(folder, base, str(error)) from error
    pattern = re.compile(options.pattern)
    odd = sorted(name for name in adapted if not pattern.fullmatch(name))
    missed = [name for name, _ in model.named_modules() if pattern.fullmatch(name) and name not in adapted]
    if odd or missed:
        what = f"tuning.lora.targets and the adapter in {folder} differ at {(odd or missed)[0]}"
        raise AdapterError(f"{what}; set tuning.lora.targets to the modules of the adapter, or remove model.adapter")
    saved = _whole_modules(folder, whole, model, config)[1]
    if set(saved) != set(wanted := _saved_by(options, model)):
        one, other = (", ".join(paths) or "[]" for paths in (wanted, saved))
        what = f"tuning.lora.modules_to_save is {one}, but the adapter in {folder} has {other}"
        raise AdapterError(f"{what}; set it to the modules of the adapter, or remove model.adapter")


def _in_float32(adapted: StreamedModel) -> StreamedModel:
    """The optimizer needs float32, whatever the base model's dtype."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def _projections(model: nn.Module) -> list[str]:
    """Names of the linear modules in the layers of the text model."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return sorted({name.rpartition(".")[2] for name in linear if re.match(LAYERS, name)})


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights of a saved adapter.

    Raises AdapterError when they are missing, unreadable, empty, not finite, all B matrices are zero, or a file of the
    adapter differs from sealed.json.
    """
    # 1. read
    path = folder / WEIGHTS
    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder}: {name} is missing; give the adapter/ folder of a finished run")
    if is_sealed(folder) and (what := damage(folder, (SETTINGS, WEIGHTS))):
        raise AdapterError(
            f"{folder}: {what}; restore the file from where the adapter was saved, or export it again; without {SEAL} "
            "the adapter is not checked"
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise AdapterError(f"{path}: cannot be read ({error}); copy it again, or export it again") from error
    # 2. validate
    trained = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    if not trained or any(tensor.numel() == 0 for tensor in tensors.values()):
        raise AdapterError(f"{path}: the adapter is empty; save it again from a checkpoint (omnimem export)")
    if whole := sorted(name for name, tensor in tensors.items() if not tensor.is_floating_point()):
        raise AdapterError(
            f"{path}: {whole[0][:80]} holds whole numbers, as a quantized adapter does; save it as floats"
        )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise AdapterError(f"{path}: the adapter has values that are not finite; lower the learning rate and rerun")
    if not any(bool(tensor.any()) for tensor in trained):
        raise AdapterError(f"{path}: the adapter was never trained (every B is zero); rerun the fine-tuning")
    return tensors


def load_adapter(model: Any, folder: Path, *, dropout: float | None = None) -> StreamedModel:
    """Load a saved adapter into the model and verify it; `dropout` replaces its own.

    The names of its weights may be those of the release, or of another version of transformers. Raises AdapterError
    when the adapter is damaged, or was made for other base weights.
    """
    # 1. read, and name the weights as this model does
    tensors = adapter_tensors(folder)
    low, whole = split(tensors)
    config, targets = _saved_config(folder, low)
    require_base(folder, model.name_or_path)
    try:
        low = fitted(low, model, targets)
    except ForeignError as error:
        raise _foreign(folder, model.name_or_path, str(error)) from error
    whole, saved = _whole_modules(folder, whole, model, config)
    tensors = low | whole
    # 2. load
    config.target_modules, config.modules_to_save = _modules(low), list(saved) or None
    config.lora_dropout = config.lora_dropout if dropout is None else dropout
    try:
        adapted = _adapted(model.requires_grad_(False), config)
        result = set_peft_model_state_dict(adapted, dict(tensors))  # peft 0.18 removes keys from it
    except (ValueError, RuntimeError) as error:
        raise _foreign(folder, model.name_or_path, str(error).splitlines()[0]) from error
    # 3. verify that no tensor is missing or left over
    missing = [name for name in get_peft_model_state_dict(adapted) if name not in tensors]
    if result.unexpected_keys or missing:
        raise _foreign(folder, model.name_or_path, (list(result.unexpected_keys) + missing)[0])
    return adapted.eval()


def _whole_modules(
    folder: Path, tensors: Mapping[str, Tensor], model: Any, config: LoraConfig
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """`fitted_modules` of an adapter's folder; raises AdapterError."""
    try:
        return fitted_modules(tensors, model, config.modules_to_save or ())
    except ForeignError as error:
        raise AdapterError(
            f"{folder}: {error}; only projectors of this model are read as modules_to_save (merge the adapter into its "
            "base with peft)"
        ) from error


def name_as_released(folder: Path, model: Any) -> None:
    """Write a saved adapter of a loaded model again with the names of the model's release (`Family.trees`).

    peft loads it on the classes of the release, and `load_adapter` on those of this version. Raises AdapterError for a
    model without a release.
    """
    tensors, settings = adapter_tensors(folder), read_stored(folder / SETTINGS, dict[str, Any], "export it again")
    try:
        low, whole = split(tensors)
        low = released(low, model)
        whole, saved = released_modules(whole, model)
    except ForeignError as error:
        raise AdapterError(f"--names released: {error}; leave it out") from error
    save_file(low | whole, folder / WEIGHTS, metadata={"format": "pt"})
    named = {"target_modules": _modules(low), "modules_to_save": list(saved) or None}
    write_text(folder / SETTINGS, json.dumps({**settings, **named}, indent=2) + "\n")


def require_base(folder: Path, base: str) -> None:
    """Raises AdapterError if the adapter in a folder was tuned on other weights than those of `base`, a folder or id.

    An adapter without a record of them passes, and any adapter on a model that was not read from files.
    """
    tuned = origin_of(folder).base
    found = weights_digest(base) if tuned else None
    if tuned is not None and found is not None and tuned != found:
        raise AdapterError(
            f"{folder}: made for another base than {base} (digest of the weights {tuned[:SHOWN]}, not "
            f"{found[:SHOWN]}); give the base that it was tuned from with --model, or model.path=..."
        )


def _saved_config(folder: Path, tensors: Mapping[str, Tensor]) -> tuple[LoraConfig, tuple[str, ...]]:
    """The settings of a saved adapter, checked against its weights of low rank, and the modules that they name.

    Settings of peft that would import a module, or change the base model, are refused; a regular expression of modules
    is replaced by the modules of the weights. Raises AdapterError.
    """
    # 1. read
    path = folder / SETTINGS
    try:
        table = read_stored(path, dict[str, Any], "copy it again, or export it again")
    except StoredFileError as error:
        raise AdapterError(str(error)) from error
    if table.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: is not that of a LoRA adapter (peft_type: LORA); give the folder of one")
    # 2. check
    problem = _settings_problem(table, tensors)
    if problem is not None:
        raise AdapterError(f"{path}: {problem}; restore the file that the adapter was saved with")
    # 3. the modules: those of the weights, and no others of the same name
    read = {name: table[name] for name in READ if name in table}
    config = LoraConfig(
        **read,
        target_modules=_modules(tensors),
        modules_to_save=list(table.get("modules_to_save") or ()) or None,
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    return config, _targets(table.get("target_modules"))


def _targets(named: Any) -> tuple[str, ...]:
    """Ends of paths of the modules that `target_modules` of a saved adapter names.

    Lists are read, and the regular expressions that this package writes; others are never evaluated.
    """
    if isinstance(named, str) and named.startswith(LAYERS):
        return tuple(name for name in get_args(Target) if re.search(rf"\b{name}\b", named))
    listed = named.replace("\\.", ".").split("|") if isinstance(named, str) else named
    paths = [path for path in listed if isinstance(path, str)] if isinstance(listed, list) else []
    plain = all(re.fullmatch(r"[\w.]+", path) for path in paths)
    return tuple(path[max(0, path.rfind("layers.")) :] for path in paths) if plain else ()


def _modules(tensors: Mapping[str, Tensor]) -> str:
    """A regular expression of the modules that weights adapt."""
    return "|".join(re.escape(path) for path in sorted({path_of(name) for name in tensors}))


def _settings_problem(table: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    """What in adapter_config.json cannot be, or contradicts the weights."""
    usual = {each.name: each.default for each in fields(LoraConfig)}
    for name, value in table.items():
        if name not in (*READ, *UNREAD) and value and value != usual.get(name):
            return f"{name}: {str(value)[:60]} is not supported"
    saved = table.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        return f"modules_to_save: {str(saved)[:60]} is not a list of module names"
    if table.get("init_lora_weights", True) not in (True, False, "gaussian"):
        return f"init_lora_weights: {str(table['init_lora_weights'])[:60]} would change the base model"
    for name in ("use_rslora", "use_dora"):
        if not isinstance(table.get(name, False), bool):
            return f"{name}: {str(table[name])[:60]} is not true or false"
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name}
    if ranks != {table.get("r", usual["r"])} or type(table.get("r", usual["r"])) is not int:
        return f"r: {str(table.get('r'))[:60]}, but the weights have rank {', '.join(map(str, sorted(ranks)))}"
    for name, least, most in (("lora_alpha", 0.0, float("inf")), ("lora_dropout", -1e-9, 1.0)):
        value = table.get(name, usual[name])
        if isinstance(value, bool) or not isinstance(value, int | float) or not least < value < most:
            return f"{name}: {str(value)[:60]} is not a number {'above 0' if least == 0 else 'in [0, 1)'}"
    return None


def _adapted(model: Any, config: LoraConfig) -> StreamedModel:
    if hasattr(model.config.get_text_config(), "num_experts"):
        # peft reduces a pattern to bare names for some of these models, which encoders have too
        named = [name for name, _ in model.named_modules() if re.fullmatch(str(config.target_modules), name)]
        config.target_modules = named or config.target_modules
    with warnings.catch_warnings():
        # peft 0.21 uses an attribute that is deprecated in transformers 5
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        adapted = StreamedModel(model, config)
    for copy in copies(adapted):
        copy.float()  # as peft does with the weights of low rank: they are added to in small steps
    return adapted


def _foreign(folder: Path, base: str, reason: str) -> AdapterError:
    return AdapterError(f"{folder}: made for another base than {base} ({reason}); give its own adapter")


def trainable(model: nn.Module) -> list[Tensor]:
    """The trainable parameters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
