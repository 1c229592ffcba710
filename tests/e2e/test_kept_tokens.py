"""benchmarks/kept_tokens.py: ranks among tokens of one modality, kinds of tokens, means."""

from types import SimpleNamespace

import torch

from benchmarks.kept_tokens import Observer, as_text, means, picture_kinds, text_labels, with_age
from omnimem.recall.pictures import draw_pictures


def test_ranks_are_among_the_tokens_of_a_modality_in_the_part_given() -> None:
    pool = SimpleNamespace(modality=torch.tensor([[0, 1, 1, 2, 2, 2]]), order=torch.tensor([[0, 1, 2, 3, 4, 5]]))
    observer = Observer()
    observer.note("a", pool, torch.tensor([[9.0, 5.0, 6.0, 0.1, 0.3, 0.2]]), slice(None))
    assert observer.ranks["a"] == {1: [0.0], 2: [1.0], 3: [0.0], 4: [1.0], 5: [0.5]}
    observer.note("a", pool, torch.tensor([[9.0, 5.0, 6.0, 0.1, 0.3, 0.2]]), slice(4, None))
    assert observer.ranks["a"][4] == [1.0, 1.0]
    assert observer.ranks["a"][5] == [0.5, 0.0]
    assert observer.ranks["a"][3] == [0.0]


def test_kinds_of_text_tokens() -> None:
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda i: ["Ġthe", "ing", ".", "Ġlion"][i])
    episode = SimpleNamespace(ids=(0, 1, 3, 2, 0, 2), questions=[SimpleNamespace(value=2, fact=(1, 4))])
    found = text_labels(tokenizer, episode)
    true = {name: [place for place, member in enumerate(members) if member] for name, members in found.items()}
    assert true["value of a fact"] == [2]
    assert true["rest of a fact"] == [1, 3]
    assert true["prose"] == [0, 4, 5]
    assert true["prose: first occurrence"] == [0]
    assert true["prose: punctuation"] == [5]
    assert true["prose: once in the stream"] == []


def test_the_ends_of_a_stream_and_means_of_kinds() -> None:
    chunks = [SimpleNamespace(modality=torch.tensor([row])) for row in ([0, 0], [2, 1], [2], [2, 2])]
    labels = with_age({}, chunks)  # type: ignore[arg-type]
    assert labels == {"first chunk": [True, True, False, False, False], "last chunk": [False] * 3 + [True] * 2}
    assert means({0: 1.0, 1: 0.0, 4: 0.5}, labels) == {"first chunk": 0.5, "last chunk": 0.5}


def test_picture_tokens_are_four_cells_and_two_seconds_of_sound_per_step() -> None:
    world = draw_pictures(5, 32, "test")
    kinds = list(picture_kinds(world))
    assert len(kinds) == 32 * 3
    assert kinds.count("word") == sum(len(scene.words) for scene in world.scenes)
    assert kinds.count("picture") == sum(scene.seconds // 2 for scene in world.scenes if scene.picture)


def test_a_question_is_text_after_the_stream() -> None:
    attached = SimpleNamespace(embed=lambda ids: torch.zeros(*ids.shape, 4))
    chunk = as_text(attached, torch.tensor([7, 8]), 5)  # type: ignore[arg-type]
    assert chunk.positions[0, 0].tolist() == [5, 6]
    assert chunk.modality.tolist() == [[0, 0]]
    assert chunk.embeddings.shape == (1, 2, 4)
