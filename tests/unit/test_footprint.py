"""The memory table against transformers' own modules and against what autograd and the memory really hold."""

import json
from dataclasses import replace

import pytest
import torch
from support import thinkers
from support.paths import ROOT
from torch.autograd.graph import saved_tensors_hooks
from transformers import Qwen2_5OmniConfig, Qwen2_5OmniThinkerForConditionalGeneration

from omnimem.backbones.load import read_shapes
from omnimem.budget import Budget
from omnimem.config import CONFIGS
from omnimem.footprint import Load, Row, footprint, layer_activations
from omnimem.policies import PerturbationOptions
from omnimem.streaming.attach import attach
from omnimem.streaming.stream import Stream
from omnimem.tiny.omni import build_tokenizer
from omnimem.tokens import Chunk
from omnimem.tuning import LoraOptions, add_adapter

MODELS = sorted((CONFIGS / "models").glob("Qwen2.5-Omni-*.json"))
LORA = LoraOptions(r=8, alpha=16.0)
LOAD = Load(
    dtype=torch.bfloat16,
    lora=LoraOptions(),
    feature=128,
    entries=28 * 8192,
    chunk_tokens=16_384,
    chunks=1,
    text_tokens=0,
    question_tokens=0,
    frame=(308, 560),
    frames_per_segment=2,
    half=True,
    stage=2,
)


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def rows_of(load: Load, model: str = "Qwen2.5-Omni-7B") -> dict[str, Row]:
    return {row.what: row for row in footprint(read_shapes(CONFIGS / "models" / f"{model}.json"), load)}


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_parameters_from_shapes_equal_transformers_own_count(path) -> None:
    config = Qwen2_5OmniConfig.from_dict(json.loads(path.read_text())).thinker_config
    with torch.device("meta"):
        model = Qwen2_5OmniThinkerForConditionalGeneration._from_config(config)
    assert read_shapes(path).parameters == parameters(model)


@pytest.mark.parametrize(("tied", "hub"), [(False, False), (True, True)])
def test_a_checkpoint_folder_is_read_like_the_shipped_shapes(tied, hub, tmp_path) -> None:
    folder = thinkers.write_folder(tmp_path / "model", tied=tied, hub=hub, rates="tiny")
    shapes = read_shapes(folder)
    model = thinkers.random_model(thinkers.config_of(build_tokenizer(), tied=tied, rates="tiny"))
    assert shapes.parameters == parameters(model)
    assert shapes.geometry.mel.hop == 4000


@pytest.mark.parametrize("bits", [None, 4, 16])
def test_bytes_of_an_entry_equal_those_of_a_real_memory(bits) -> None:
    model = thinkers.random_model(thinkers.config_of(build_tokenizer(), tied=False, rates="tiny"))
    tokens = 24
    options = PerturbationOptions(feature=7, compared="inputs" if bits is None else "sketch", sketch_bits=bits)
    with attach(model.model.language_model) as attached:
        stream = Stream(attached, options.build(Budget.full(2)))
        stream.feed(chunk(tokens, 32, 0))
    config = model.config.text_config
    shapes = read_shapes(CONFIGS / "models" / "Qwen2.5-Omni-7B.json")
    shapes = replace(shapes, text=replace(shapes.text, kv_heads=config.num_key_value_heads, dim=8, width=32))
    pair, side = shapes.entry(7, torch.float32, sketch=bits)
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in stream.memory.layers) == 2 * tokens * pair
    assert stream.memory.bytes == 2 * tokens * (pair + side)


def test_adapter_states_are_those_of_mixed_precision_adamw_and_shard_by_stage() -> None:
    adapter = 28 * 128 * ((3584 + 3584) + 2 * (3584 + 512))
    alone = {stage: rows_of(replace(LOAD, stage=stage, ranks=4)) for stage in (0, 1, 2, 3)}
    assert [alone[stage]["AdamW states"].bytes for stage in (0, 1, 2, 3)] == [12 * adapter] + [3 * adapter] * 3
    assert [alone[stage]["LoRA gradients"].bytes for stage in (0, 1, 2, 3)] == [2 * adapter] * 2 + [adapter // 2] * 2
    weights = alone[2]["weights, frozen"].bytes
    assert alone[3]["weights, frozen"].bytes == weights // 4
    plain = rows_of(replace(LOAD, stage=None, half=False))
    assert (plain["LoRA weights"].bytes, plain["AdamW states"].bytes) == (4 * adapter, 8 * adapter)


def test_the_adapter_has_the_size_that_peft_gives_it() -> None:
    model = thinkers.random_model(thinkers.config_of(build_tokenizer(), tied=False, rates="tiny"))
    lora = LoraOptions(r=4, alpha=8.0, targets=("q_proj", "v_proj", "o_proj", "down_proj"))
    adapted = add_adapter(model, lora)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    text = replace(read_shapes(MODELS[0]).text, layers=2, width=32, heads=4, kv_heads=2, dim=8, inner=48)
    assert trained == 2 * sum(lora.r * sum(text.projection(name)) for name in lora.targets)


def test_memories_in_the_graph_depend_on_gradient_and_horizon() -> None:
    """Layer inputs of 7B are 3584 wide in bf16; a chunk has LOAD's tokens."""
    load = replace(LOAD, chunks=5)
    full = rows_of(load)
    memory = full["memory: keys and values"].bytes + full["memory: side state"].bytes
    horizon = {number: rows_of(replace(load, horizon=number)) for number in (1, 3, 9)}
    found = [horizon[number]["memories in the graph"].bytes for number in (1, 3, 9)]
    assert found == [memory, (3 + 2) * memory, (4 + 4) * memory], "before the chunks, and computed again for the loss"
    states = rows_of(replace(load, gradient="states"))
    assert states["memories in the graph"].bytes == 0
    tokens = full["memory: keys and values"].bytes // (2 * 4 * 128 * 2)
    assert states["memory: layer inputs"].bytes == tokens * 3584 * 2
    released = rows_of(replace(load, gradient="released", stop_layer=14))
    assert released["memory: layer inputs"].bytes == tokens // 28 * 15 * 3584 * 2
    layer = memory // 28 + tokens // 28 * 3584 * 2
    pool = layer + load.chunk_tokens * (memory // 28 // (tokens // 28) + 3584 * 2)
    assert released["memories in the graph"].bytes == 4 * (layer + load.chunk_tokens * 3584 * 2) + pool
    assert "memory: layer inputs" not in full
    offloaded = rows_of(replace(load, gradient="released", stop_layer=14, offload=True))
    assert offloaded["memories in the graph"].bytes == 0


def test_full_memory_adds_its_blocks_to_the_graph_once_however_long_the_stream_is() -> None:
    load = replace(LOAD, entries=28 * 80_000, limited=0, chunks=5)
    few, many = (rows_of(replace(load, chunks=chunks))["memories in the graph"].bytes for chunks in (5, 50))
    memory = rows_of(load)
    assert few == many == memory["memory: keys and values"].bytes + memory["memory: side state"].bytes
    limited = replace(LOAD, chunks=50, entries=28 * 8192)
    drawn_too = rows_of(replace(load, chunks=50, limited=28 * 8192))["memories in the graph"].bytes
    assert drawn_too == rows_of(limited)["memories in the graph"].bytes > few
    kept = rows_of(replace(load, chunks=50, recompute="none"))["memories in the graph"].bytes
    assert kept == 0, "attention saves them: a part of the activations"


def chunk(tokens: int, width: int, first: int) -> Chunk:
    """A random chunk with audio and visual tokens."""
    generator = torch.Generator().manual_seed(first)
    return Chunk(
        embeddings=torch.randn(1, tokens, width, generator=generator) * 0.3,
        positions=(torch.arange(tokens) + first).expand(1, 3, tokens),
        modality=torch.tensor([2, 2, 2, 1], dtype=torch.int8).repeat(tokens // 4)[None],
    )


@pytest.mark.parametrize("lora", [LORA, LoraOptions(r=8, alpha=16.0, dropout=0.0, targets=("q_proj", "down_proj"))])
@pytest.mark.parametrize(("width", "inner"), [(128, 384), (256, 128)])
def test_the_activation_formula_is_within_a_fifth_of_what_autograd_saves(lora, width, inner) -> None:
    tokens, layers = 256, 4
    config = thinkers.config_of(build_tokenizer(), tied=False, rates="tiny")
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = width, inner, layers
    text.num_attention_heads, text.layer_types = 8, ["full_attention"] * layers
    text.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [width // 16 - 4, 2, 2]}
    config.vision_config.out_hidden_size = config.audio_config.output_dim = width
    model = thinkers.random_model(config)
    adapted = add_adapter(model, lora).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}
    alive = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with attach(adapted.base_model.model.model.language_model) as attached:
        stream = Stream(attached, PerturbationOptions().build(Budget.shared(layers, tokens)))
        stream.feed(chunk(tokens, width, 0))
        with saved_tensors_hooks(note, lambda tensor: tensor):
            stream.feed(chunk(tokens, width, tokens))
    shapes = read_shapes(MODELS[0])
    text_shape = replace(shapes.text, layers=layers, width=width, inner=inner, heads=8, kv_heads=2, dim=width // 8)
    token = layer_activations(text_shape, lora, torch.float32, 2 * tokens)
    formula = layers * (
        tokens * token + 2 * tokens * (2 * 2 * width // 8) * 4
    )  # the pool; scores without gradient save no features
    assert sum(saved.values()) == pytest.approx(formula, rel=0.2)


@pytest.mark.parametrize(
    ("recompute", "arm"), [("none", "stored"), ("chunk", "recompute"), ("layer", "recompute by layers too")]
)
def test_what_a_gpu_held_in_training_is_within_a_quarter_of_the_table(recompute, arm) -> None:
    """benchmarks/results: 7 of the 7B model's layers, 8,192 slots, 6 chunks of 2,048 tokens, LoRA 128, no dropout."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "h200-2026-11-26.json").read_text())["rows"]
    (measured,) = (row for row in rows if row["section"].startswith("training, 6 chunks") and row["arm"] == arm)
    lora = LoraOptions(r=128, alpha=256.0, dropout=0.0)
    load = replace(LOAD, entries=7 * 8192, chunk_tokens=2048, chunks=6, recompute=recompute, lora=lora)
    shapes = read_shapes(CONFIGS / "models" / "Qwen2.5-Omni-7B.json")
    found = footprint(replace(shapes, text=replace(shapes.text, layers=7)), load)
    table = sum(row.bytes for row in found if row.what.startswith(("activations", "memor", "tokens of the stream")))
    assert table / 2**30 == pytest.approx(measured["transient_gib"], rel=0.25)


def test_quantized_projections_have_half_a_byte_and_scales_per_weight() -> None:
    """7B: 6.53e9 weights in the decoder's projections, as their shapes multiply."""
    whole, packed = rows_of(LOAD), rows_of(replace(LOAD, quantized=True))
    weights = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    rest = whole["weights, frozen"].bytes - weights * LOAD.dtype.itemsize
    assert packed["weights, frozen"].bytes == rest
    assert packed["weights, frozen, 4 bits"].bytes == pytest.approx(0.5159 * weights, rel=1e-3)
