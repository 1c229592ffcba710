"""The memory table against what autograd and the stream hold after the forward pass of a training step."""

import gc
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import pytest
import torch
from support.gradients import adapted, head_of, labelled_prompt, loss_of
from support.models import SIZES, cut, whole_stream
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from omnimem.backbones.load import read_shapes
from omnimem.budget import Budget
from omnimem.config import CONFIGS
from omnimem.footprint import Load, footprint
from omnimem.policies import PerturbationOptions
from omnimem.selection import SelectionOptions
from omnimem.streaming.attach import attach
from omnimem.streaming.stream import Stream
from omnimem.tuning import LoraOptions, TuningOptions, gradient_of, policy_in_training

LAYERS, WIDTH, TOKENS, CHUNKS, SLOTS = 4, SIZES["hidden_size"], 64, 5, 96
LORA = LoraOptions(r=4, alpha=8.0, dropout=0.0, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
KINDS = [("hard", "redundancy"), ("straight_through", "redundancy"), ("soft", "both")]
MEMORY = ("memory: keys and values", "memory: side state", "memory: layer inputs", "memories in the graph")


class Saved:
    """A tensor that autograd holds, for as long as its node lives."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def options_of(softening: str, score: str, **settings: Any) -> TuningOptions:
    selection = SelectionOptions(softening=softening, gradient=score)  # type: ignore[arg-type]
    return TuningOptions(lora=LORA, selection=selection, **settings)


def held(family: str, options: TuningOptions, measured: PerturbationOptions, slots: int | None, moments: int) -> int:
    """Bytes of the memory and of what autograd holds once the questions are read, without weights and chunks."""
    model, alive = adapted(family, torch.float32), WeakSet[Saved]()

    def note(tensor: Tensor) -> Saved:
        alive.add(saved := Saved(tensor))
        return saved

    recompute_layers = options.recompute == "layer"
    softness = None if options.selection.softening == "hard" or slots is None else options.selection.at(0.0)
    policy = policy_in_training(options, measured.build(None if slots is None else Budget.shared(LAYERS, slots)))
    whole = replace(whole_stream(TOKENS * CHUNKS), modality=torch.tensor([2, 2, 2, 1] * 80, dtype=torch.int8)[None])
    chunks = cut(whole, [TOKENS] * CHUNKS)
    with attach(model, recompute_layers=recompute_layers) as attached:
        stream, losses = Stream(attached, policy, carry=gradient_of(options, LAYERS), softness=softness), []
        with saved_tensors_hooks(note, lambda saved: saved.tensor):
            for number, chunk in enumerate(chunks):
                stream.feed(chunk)
                if CHUNKS - number <= moments:
                    prompt = labelled_prompt(number)
                    losses.append(stream.read(loss_of(stream.reader(prompt), head_of(model), prompt.labels)))
    gc.collect()
    given = {part.untyped_storage().data_ptr() for part in (*model.parameters(), *(c.embeddings for c in chunks))}
    every = [*stream.memory.tensors(), *(saved.tensor for saved in alive)]
    sizes = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in every}
    assert losses
    return sum(size for place, size in sizes.items() if place not in given)


def estimated(options: TuningOptions, measured: PerturbationOptions, slots: int | None, moments: int) -> int:
    """The same by the table of a dry run."""
    # 1. sizes of the model and of its measures
    shapes = read_shapes(CONFIGS / "models" / "Qwen2.5-Omni-7B.json")
    sizes = {"layers": LAYERS, "width": WIDTH, "heads": 4, "kv_heads": 2, "dim": 16, "inner": 96, "vocabulary": 300}
    measures, selection = measured.build(None).measures, options.selection
    learns = selection.softening != "hard"
    feature = min(measures.feature or WIDTH, WIDTH)
    # 2. the table
    load = Load(
        dtype=torch.float32,
        lora=LORA,
        feature=feature,
        sketch=(16 if learns else measures.sketch) if measures.sketch else None,
        covered=feature if learns else 0,
        gated=learns,
        weighed=selection.gradient == "both",
        entries=LAYERS * (TOKENS * CHUNKS if slots is None else selection.most(slots)),
        limited=0 if slots is None else None,
        chunk_tokens=TOKENS,
        chunks=CHUNKS,
        text_tokens=0,
        question_tokens=0,
        moments=moments,
        frame=(308, 560),
        frames_per_segment=2,
        half=False,
        stage=None,
        recompute=options.recompute,
        gradient=options.gradient,
        horizon=options.horizon,
        stop_layer=LAYERS // 2 if options.gradient in ("released", "paper") else 0,
    )
    rows = footprint(replace(shapes, text=replace(shapes.text, **sizes)), load)
    wanted = (*MEMORY, "activations of all chunks")
    return sum(row.bytes for row in rows if row.what in wanted)


@pytest.mark.parametrize(("family", "compared"), [("qwen2_5_omni", "sketch"), ("llama", "inputs")])
@pytest.mark.parametrize(("softening", "score"), KINDS)
@pytest.mark.parametrize(
    ("settings", "slots", "moments"),
    [
        ({"recompute": "chunk"}, SLOTS, 1),
        ({"recompute": "layer"}, SLOTS, 2),
        ({"recompute": "chunk"}, None, 1),
        ({"horizon": 1}, SLOTS, 1),
        ({"horizon": 3}, SLOTS, 1),
        ({"gradient": "states"}, SLOTS, 2),
    ],
)
def test_memories_in_the_graph_equal_the_table(family, compared, softening, score, settings, slots, moments) -> None:
    options, measured = options_of(softening, score, **settings), PerturbationOptions(compared=compared, feature=32)
    table = estimated(options, measured, slots, moments)
    assert table == pytest.approx(held(family, options, measured, slots, moments), rel=1e-6)


@pytest.mark.parametrize(("family", "compared"), [("qwen2_5_omni", "sketch"), ("llama", "inputs")])
@pytest.mark.parametrize(
    ("softening", "score", "settings", "slots"),
    [
        ("hard", "redundancy", {"gradient": "released"}, SLOTS),
        ("hard", "redundancy", {"gradient": "paper"}, SLOTS),
        *((*kind, {"recompute": "none"}, slots) for kind in KINDS for slots in (SLOTS, None)),
    ],
)
def test_what_no_recomputation_saves_is_near_the_table(family, compared, softening, score, settings, slots) -> None:
    """At most 15 % below or above."""
    options, measured = options_of(softening, score, **settings), PerturbationOptions(compared=compared, feature=32)
    table = estimated(options, measured, slots, 1)
    found = held(family, options, measured, slots, 1)
    assert table == pytest.approx(found, rel=0.15)
