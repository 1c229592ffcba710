"""Rivals that decide over all layers or make new tokens: against plain loops, their oracles, and moved places."""

from dataclasses import replace

import pytest
import torch
from support import reference_cycle as cycle
from support import reference_policies as loops
from support.grid_streams import DIM, chunks_of, evictable, row_of, view_after
from support.models import cut as support_cut
from support.models import text_model
from support.policy_streams import cut, opened, whole_stream
from support.reference import AUDIO, VISUAL, best
from torch import Tensor

from omnimem.budget import Budget
from omnimem.per_head import packed, rows_of
from omnimem.policies.base import PolicyError, StreamOutline
from omnimem.policies.baselines.hermes import Bands, HermesOptions
from omnimem.policies.baselines.infinipot_v import InfiniPotVOptions
from omnimem.policies.baselines.input_uniform import InputUniformOptions
from omnimem.policies.baselines.lava import LavaOptions
from omnimem.policies.baselines.oracle import OracleOptions
from omnimem.policies.baselines.recent_frames import RecentFramesOptions
from omnimem.policies.baselines.streaming_llm import StreamingLLMOptions
from omnimem.policies.baselines.streammem import StreamMemOptions, filtered
from omnimem.positions import rotate
from omnimem.streaming.attach import attach
from omnimem.tokens import Chunk, Modality, Tokens
from omnimem.tuning import StatesGradient
from omnimem.view import LayerView, Probed

LENGTHS = [3, 17, 9, 28, 12]
LAYERS, SLOTS = 4, 12
POOL = Budget(slots=((0, SLOTS),) * LAYERS, split=False)


def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Angles of three frequencies, one an axis."""
    speeds = torch.tensor([0.9, 0.5, 0.3])[:, None, None]
    angle = (positions.float() * speeds).permute(1, 2, 0)
    both = torch.cat([angle, angle], dim=-1)
    return both.cos(), both.sin()


def probed(view: LayerView, count: int, seed: int) -> LayerView:
    """The view with `count` probes of three tokens."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, kv_heads = len(view.modality), view.queries.shape[1], view.pool.keys.shape[1]
    probes = []
    for _ in range(count):
        queries = torch.randn(batch, heads, 3, DIM, generator=generator) * 2
        probes.append(Probed(queries=queries, keys=torch.randn(batch, kv_heads, 3, DIM, generator=generator)))
    return replace(view, probes=tuple(probes), rotary=rotary)


def layers_of_chunks(batch: int = 1, kv_heads: int = 2) -> list[list[tuple[Tensor, Tokens]]]:
    """The same stream in every layer, with other keys, values and queries in each: [chunk][layer]."""
    by_layer = [chunks_of(LENGTHS, batch=batch, kv_heads=kv_heads, heads=4, seed=layer) for layer in range(LAYERS)]
    return [list(row) for row in zip(*by_layer, strict=True)]


@pytest.mark.parametrize("preset", ["as_published", "as_released", "january"])
def test_hermes_keeps_what_plain_loops_keep_in_every_layer(preset) -> None:
    policy = HermesOptions(preset=preset).build(POOL)
    bands = Bands.of(LAYERS, 0.1, 0.3)
    places = [bands.place(layer) for layer in range(LAYERS)]
    assert [band for band, _ in places] == [0, 1, 1, 2]
    memory: list[Tokens | None] = [None] * LAYERS
    for number, chunk in enumerate(layers_of_chunks(batch=2)):
        views = [
            probed(view_after(old, part), 2, seed=10 * number + layer)
            for layer, (old, part) in enumerate(zip(memory, chunk, strict=True))
        ]
        kept = policy.select_joint(list(views))
        for stream in range(2) if number else ():
            rows = [row_of(view, stream) for view in views]
            scores = []
            for row, view, (band, depth) in zip(rows, views, places, strict=True):
                probe = view.probes[max(0, band - 1)]
                attention = cycle.probe_attention(
                    row, probe.queries[stream].tolist(), probe.keys[stream].tolist(), preset == "as_published"
                )
                mine = [attention[k] for k in row.of(AUDIO, VISUAL)]
                scores.append(cycle.hermes_scores(row, band, depth, mine, policy.decay, policy.recency))
            smooth = cycle.hermes_smoothed(scores, [band for band, _ in places], recursive=policy.recursive)
            for row, score, (band, _), tokens in zip(rows, smooth, places, kept, strict=True):
                members = row.of(AUDIO, VISUAL)
                of_token = dict(zip(members, score, strict=True))
                summed_up = band == 2 and len(members) > SLOTS
                stays = best(of_token, members, SLOTS - summed_up)
                held = evictable(tokens, stream)
                expected = sorted(row.order[k] for k in stays)
                assert len(held) == min(len(members), SLOTS)
                if summed_up:  # the summary stands by the number of the last kept picture
                    last = max(row.order[k] for k in stays if row.kinds[k] == VISUAL)
                    assert held == sorted([*expected, last])
                else:
                    assert held == expected
        memory = list(kept)


def test_hermes_without_smoothing_judges_each_layer_alone_and_with_full_recency_keeps_a_window() -> None:
    """Baselines, section 12: lambda = 0 reduces to independent layers, omega = 1 equals a sliding window."""
    options = HermesOptions(smoothing=(0.0, 0.0, 0.0), recency=(1.0, 1.0), summary=False)
    policy = options.build(POOL)
    chunks = layers_of_chunks()
    memory: list[Tokens | None] = [None] * LAYERS
    for number, chunk in enumerate(chunks):
        views = [probed(view_after(old, part), 2, seed=number) for old, part in zip(memory, chunk, strict=True)]
        memory = list(policy.select_joint(list(views)))
    arrived = [k for chunk in chunks for k in evictable(chunk[0][1])]
    assert [evictable(tokens) for tokens in memory[:3]] == [arrived[-SLOTS:]] * 3
    assert evictable(memory[3]) != arrived[-SLOTS:]
    shuffled = [replace(view, probes=view.probes[::-1]) if layer == 3 else view for layer, view in enumerate(views)]
    again = policy.select_joint(list(shuffled))
    assert [evictable(tokens) for tokens in again[:3]] == [evictable(tokens) for tokens in memory[:3]]
    mixed = HermesOptions(recency=(1.0, 1.0), summary=False, smoothing=(0.0, 0.9, 0.0)).build(POOL)
    assert [evictable(tokens) for tokens in mixed.select_joint(list(views))] != [evictable(tokens) for tokens in memory]


def test_a_summary_of_like_keys_is_that_key_at_the_place_after_the_last_kept_picture() -> None:
    """Baselines, section 12: identical keys before RoPE, wherever they stood, give that key turned to the target."""
    policy = HermesOptions().build(POOL)
    chunk = chunks_of([40], kv_heads=2, heads=4)[0]
    queries, fresh = chunk
    bare = torch.randn(1, 2, 1, DIM, generator=torch.Generator().manual_seed(3))
    turned = rotate(bare.expand(-1, -1, 40, -1), *rotary(fresh.positions.transpose(0, 1)))
    view = probed(view_after(None, (queries, replace(fresh, keys=turned))), 2, seed=1)
    kept = policy.select_joint([view] * LAYERS)[3]
    numbers = kept.order[0].tolist()
    (summary,) = [n for n in range(1, kept.count) if numbers[n] == numbers[n - 1]]
    source = view.pool.positions[0, :, numbers[summary]]
    assert (kept.positions[0, :, summary] - source).tolist() == [1, 0, 0]
    target = rotate(bare, *rotary(kept.positions[:, :, summary : summary + 1].transpose(0, 1)))
    torch.testing.assert_close(kept.keys[:, :, summary : summary + 1], target, atol=1e-5, rtol=1e-5)
    going = [k for k in range(40) if fresh.modality[0, k] == VISUAL and k not in numbers]
    torch.testing.assert_close(kept.values[0, :, summary], fresh.values[0][:, going].mean(dim=1))


@pytest.mark.parametrize("preset", ["as_published", "as_released"])
def test_lava_shares_slots_by_entropy_and_pairs_by_weight(preset) -> None:
    heads, window = 2, 5
    options = LavaOptions(preset=preset, window=window)
    policy = options.build(POOL)
    memory: list[Tokens | None] = [None] * LAYERS
    uneven = 0
    for chunk in layers_of_chunks(kv_heads=heads):
        views = []
        for old, (queries, fresh) in zip(memory, chunk, strict=True):
            rows = rows_of(fresh, heads)
            pool = rows if old is None else rows_of(old, heads).cat(rows)
            base = view_after(None, (queries.unflatten(1, (heads, 2)).flatten(0, 1), rows))
            views.append(replace(base, pool=pool, new=rows.count, heads=heads))
        kept = policy.select_joint(list(views))
        counts = [(tokens.modality > 0).sum(dim=1).tolist() for tokens in kept]
        available = [int((view.modality > 0).sum()) for view in views]
        assert sum(map(sum, counts)) == min(sum(available), heads * SLOTS * LAYERS)
        if sum(available) > heads * SLOTS * LAYERS:
            _check_lava(views, kept, counts, preset, window)
            uneven += any(len(set(row)) > 1 for row in counts)
        memory = [packed(tokens, heads) for tokens in kept]
    assert uneven


def _check_lava(views, kept, counts, preset: str, window: int) -> None:
    """Layers as their entropies, heads half by weight and half alike, within one pair of the real numbers."""
    judged = [[cycle.lava_scores(_held(view, head), window, 7, window) for head in range(2)] for view in views]
    spread = []
    for heads in judged:
        scores = [score[k] for score, past in heads for k in past]
        spread.append(cycle.entropy(scores) / len(scores))
        if preset == "as_released":
            spread[-1] = cycle.entropy(scores) / torch.tensor(float(len(scores))).log().item()
    past = (SLOTS - window) * LAYERS
    by_entropy = [past * part / sum(spread) for part in spread]
    sizes = by_entropy if preset == "as_published" else [(size + SLOTS - window) / 2 for size in by_entropy]
    for heads, mine, size, ranked, tokens in zip(judged, counts, sizes, by_entropy, kept, strict=True):
        if max(size, ranked) * 2 < sum(len(past) for _, past in heads) - 4:  # not held back by what there is
            assert abs((sum(mine) - 2 * window) / 2 - size) < 1.01
        floor = (sum(mine) - 2 * window) / 2 if preset == "as_published" else SLOTS - window
        asked = round(2 * ((sum(mine) - 2 * window) / 2 if preset == "as_published" else ranked))
        share = cycle.highest_by_head([s for s, _ in heads], [p for _, p in heads], asked)
        for head, (score, past_places) in enumerate(heads):
            assert abs(mine[head] - window - (share[head] + floor) / 2) < 2.01
            held = tokens.order[head][tokens.modality[head] > 0].tolist()
            row = _held(views[judged.index(heads)], head)
            chosen = best(score, past_places, mine[head] - window)
            assert held == sorted(row.order[k] for k in [*chosen, *row.of(AUDIO, VISUAL)[-window:]])


def _held(view: LayerView, head: int):
    """One head's row without the places that hold nothing."""
    row = row_of(view, head)
    return replace(loops.only(row, [k for k in range(row.count) if row.kinds[k] >= 0]), queries=row.queries)


def test_streammem_keeps_what_plain_loops_keep_and_a_prototype_of_every_new_frame() -> None:
    policy = StreamMemOptions(frame_filter=False).build(POOL)
    memory, made_in_all = None, 0
    for number, chunk in enumerate(chunks_of(LENGTHS, batch=2, kv_heads=2, heads=4)):
        view = probed(view_after(memory, chunk), 1, seed=number)
        kept = policy.keep(0, view)
        fresh = slice(view.pool.count - view.new, None)
        times = view.pool.positions[0, 0, fresh][view.modality[0, fresh] == VISUAL].unique().flip(0).tolist()
        for stream in range(2):
            row = row_of(view, stream)
            importance = cycle.streammem_importance(row, view.probes[0].queries[stream].double().tolist())
            stays, made = cycle.streammem_kept(row, importance, SLOTS, len(times))
            expected = [row.order[k] for k in stays]
            made_in_all += made
            for time in times[:made]:
                frame = [k for k in row.of(VISUAL) if k >= row.old and row.positions[k][0] == time]
                expected.append(max(row.order[k] for k in frame))
                _check_prototype(view, kept, stream, row, frame, importance)
            assert kept.order[stream].tolist() == sorted(expected)
        memory = kept
    assert made_in_all > 4


def _check_prototype(view, kept, stream: int, row, frame: list[int], importance: list[float]) -> None:
    """Values averaged as they are, keys turned to the middle of the frame first."""
    weights = torch.tensor([importance[k] for k in frame])
    weights = weights / weights.sum()
    heights, widths = ([row.positions[k][axis] for k in frame] for axis in (1, 2))
    centre = [row.positions[frame[0]][0]] + [min(x) + (max(x) - min(x) + 1) // 2 for x in (heights, widths)]
    value = (view.pool.values[stream][:, frame] * weights[None, :, None]).sum(dim=1)
    away = torch.tensor(centre)[:, None] - view.pool.positions[stream][:, frame]
    keys = rotate(view.pool.keys[stream : stream + 1][:, :, frame], *rotary(away[:, None]))
    key = (keys[0] * weights[None, :, None]).sum(dim=1)
    last = max(row.order[k] for k in frame)
    mine = (kept.order[stream] == last).nonzero()[-1, 0]  # after the token whose number it has
    assert kept.positions[stream, :, mine].tolist() == centre
    torch.testing.assert_close(kept.values[stream, :, mine], value, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(kept.keys[stream, :, mine], key, atol=1e-5, rtol=1e-4)


def test_the_frame_filter_averages_runs_of_like_frames_and_passes_sound_and_text() -> None:
    whole = whole_stream(batch=2)
    embeddings = whole.embeddings.clone()
    visual = (whole.modality[0] == VISUAL).nonzero()[:, 0].view(-1, 6)  # frames x cells
    for row, (first, count) in enumerate(((2, 3), (5, 2))):
        for later in range(1, count):
            noise = 0.02 * torch.randn(6, 64, generator=torch.Generator().manual_seed(later))
            embeddings[row, visual[first + later]] = embeddings[row, visual[first]] + noise
    chunk = replace(whole, embeddings=embeddings)
    order = torch.arange(whole.count).expand(2, -1)
    sifted = filtered(chunk, order, 0.95)
    lost = [
        set(range(whole.count)) - set(sifted.order[row][sifted.chunk.modality[row] >= 0].tolist()) for row in (0, 1)
    ]
    repeated = {int(k) for frame in (2, 5, 8, 11) for k in visual[frame]}  # whole_stream's own, row by row alike
    assert {int(k) for k in visual[3:5].flatten()} <= lost[0]
    assert {int(k) for k in visual[6]} <= lost[1]
    assert all(int(whole.modality[0, k]) == VISUAL for row in lost for k in row)
    place = sifted.order[0].tolist().index(int(visual[2, 0]))
    torch.testing.assert_close(sifted.chunk.embeddings[0, place], embeddings[0, visual[2:5, 0]].mean(dim=0))
    assert repeated
    assert filtered(chunk, order, 1.0).chunk.count == whole.count


@pytest.mark.parametrize("options", [StreamingLLMOptions(), HermesOptions(reindex=True, summary=False)])
def test_moved_keys_equal_the_kept_tokens_encoded_at_their_new_places(options, family) -> None:
    """In every layer, with the model's own modules, from the inputs that entered the layer."""
    policy = options.build(POOL)
    with attach(text_model(family)) as attached, torch.no_grad():
        stream = opened(attached, policy, carry=StatesGradient())
        for chunk in cut(whole_stream()):
            stream.feed(chunk)
        moved = stream._compaction()(stream.memory, attached.rotary)
        assert stream.moved > 0
        for layer, tokens in enumerate(moved.layers):
            _, keys, _ = attached.project(layer, tokens.states, tokens.positions)
            assert float((keys - tokens.keys).abs().max()) < 1e-4
            visual = tokens.modality[0] == VISUAL
            original = whole_stream().positions[0][:, tokens.order[0]]
            space = original[1:, visual] if attached.axes == 3 else torch.zeros_like(original[1:, visual])
            assert torch.equal(tokens.positions[0, 1:, visual], space)
            times = tokens.positions[0, 0][tokens.modality[0] > 0]
            assert int(times.max()) < int(original[0].max())


def test_heads_that_keep_their_own_move_together_and_keys_are_those_of_the_new_places() -> None:
    policy = InfiniPotVOptions(reindex=True).build(POOL)
    whole = whole_stream()
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        stream = opened(attached, policy)
        for chunk in cut(whole):
            stream.feed(chunk)
        moved = stream._compaction()(stream.memory, attached.rotary).layers[0]
        rows = rows_of(moved, 2)
        for head in range(2):
            _, keys, _ = attached.project(0, whole.embeddings[:, rows.order[head]], rows.positions[head : head + 1])
            assert float((keys[0, head] - rows.keys[head, 0]).abs().max()) < 1e-4
        times = moved.positions[0, 0][moved.positions[0, 0] >= stream.opening].unique()
        (end,) = stream._compaction().end
        assert times.tolist() == list(range(end - len(times), end))  # of both modalities and of all heads


@pytest.mark.parametrize("lengths", [[24, 72], [10, 14, 72]])
@pytest.mark.parametrize("options", [
    StreamingLLMOptions(), InfiniPotVOptions(reindex=True), HermesOptions(reindex=True, summary=False)
])  # fmt: skip
def test_the_opening_stays_at_its_places_in_a_stream_that_is_reindexed(options, lengths) -> None:
    whole = text_stream(24, 72)
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        stream = opened(attached, options.build(POOL))
        for chunk in support_cut(whole, lengths):
            stream.feed(chunk)
            for layer in stream.memory.layers:
                places = layer.positions[0, 0][layer.modality[0] == Modality.TEXT]
                assert sorted(set(places.tolist())) == list(range(min(24, stream.fed)))
        assert stream.opening == 24


def text_stream(text: int, visual: int) -> Chunk:
    """Text, then visual tokens, at consecutive positions of equal axes."""
    count = text + visual
    return Chunk(
        embeddings=torch.randn(1, count, 64, generator=torch.Generator().manual_seed(3)),
        positions=torch.arange(count).expand(1, 3, count),
        modality=torch.tensor([[0] * text + [2] * visual], dtype=torch.int8),
    )


def test_input_uniform_reads_frames_spread_over_the_whole_stream_and_nothing_else() -> None:
    whole = whole_stream()
    outline = StreamOutline(modality=whole.modality[0], place=whole.places[0])
    policy = InputUniformOptions().build(Budget(slots=((0, 26),) * LAYERS, split=False)).with_oracle([outline])
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        stream = opened(attached, policy)
        for chunk in cut(whole):
            stream.feed(chunk)
    visual = (whole.modality[0] == VISUAL).nonzero()[:, 0].view(-1, 6)
    frames = [visual[number].tolist() for number in (2, 6, 10)]  # floor((i + 1/2) 12 / 3)
    held = evictable(stream.memory.layers[0])
    assert [k for k in held if whole.modality[0, k] == VISUAL] == [k for frame in frames for k in frame]
    assert len(held) == 24
    assert stream.usage.peak_entries == stream.memory.entries == 24 * LAYERS
    assert stream.usage.tokens_in[2] == 72


def test_policies_that_must_be_told_say_so() -> None:
    with attach(text_model("qwen2_5_omni")) as attached, torch.no_grad():
        with pytest.raises(PolicyError, match="choose policy uniform instead"):
            opened(attached, InputUniformOptions().build(POOL)).feed(cut(whole_stream())[1])
        whole = whole_stream()
        with pytest.raises(PolicyError, match="no `needles` in its meta"):
            OracleOptions().build(POOL).with_oracle([StreamOutline(modality=whole.modality[0], place=whole.places[0])])


def test_recent_frames_are_whole_and_the_latest() -> None:
    policy = RecentFramesOptions().build(Budget(slots=((0, 21),) * LAYERS, split=False))
    memory = None
    for chunk in chunks_of([3, 17, 17, 17]):
        memory = policy.keep(0, view_after(memory, chunk))
    kinds, times = memory.modality[0], memory.positions[0, 0]
    assert sorted(times[kinds == Modality.VISUAL].tolist()) == [11] * 6 + [13] * 6
    assert len(evictable(memory)) == 16  # two frames and their sound; five slots hold no third frame
