"""Adapted models, episodes with questions, their losses and gradients; samples of random encodings."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from omnimem.backbones import Encoded, Turn
from omnimem.budget import SplitBudget
from omnimem.data import Message, Sample
from omnimem.memory import Memory
from omnimem.policies import PerturbationOptions
from omnimem.policies.base import Policy
from omnimem.selection import Softness
from omnimem.streaming.attach import StreamedAttention
from omnimem.streaming.chunk_pass import MemoryStep
from omnimem.streaming.encoder_cache import MediaStats
from omnimem.streaming.feeder import EncodedSample, Feeder, feed_until_due
from omnimem.streaming.prompt_pass import Prompt, PromptState
from omnimem.streaming.stream import Stream
from omnimem.tokens import Chunk
from omnimem.tuning import FullGradient
from support.episodes import IGNORED, Episode
from support.models import cut, text_model, whole_stream
from support.streams import LENGTHS, levels_of


def adapted(family: str, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> PreTrainedModel:
    """A random text model with LoRA whose A and B are random, alone trainable; only the dropout is in training mode."""
    model = text_model(family)
    if family == "qwen3_omni":
        model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets), model)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    for module in model.modules():
        module.training = isinstance(module, nn.Dropout)
    return model.to(dtype)


def chunks_of(family: str, dtype: torch.dtype = torch.float64, batch: int = 1) -> list[Chunk]:
    found = []
    for chunk in cut(whole_stream(levels=levels_of(family), batch=batch), LENGTHS):
        stack = chunk.deepstack
        if stack is not None:
            stack = replace(stack, features=tuple(level.to(dtype) for level in stack.features))
        found.append(replace(chunk, embeddings=chunk.embeddings.to(dtype), deepstack=stack))
    return found


def labelled_prompt(seed: int, batch: int = 1) -> Prompt:
    """Two packed questions of 5 and 3 tokens; the last two tokens of each are the answer."""
    ids = torch.randint(5, 300, (batch, 8), generator=torch.Generator().manual_seed(seed))
    segments, offsets = torch.tensor([[0] * 5 + [1] * 3, [0, 1, 2, 3, 4, 0, 1, 2]])[:, None].expand(-1, batch, -1)
    labels = torch.full_like(ids, IGNORED)
    for place in (2, 3, 5, 6):
        labels[:, place] = ids[:, place + 1]
    return Prompt(ids=ids, segments=segments, offsets=offsets, labels=labels)


def episode_of(family: str, dtype: torch.dtype = torch.float64, batch: int = 1) -> Episode:
    """Five chunks, questions after the third and after the last one."""
    return Episode(
        chunks=chunks_of(family, dtype, batch), asked=[(3, labelled_prompt(1, batch)), (5, labelled_prompt(2, batch))]
    )


def loss_of(
    read: Callable[[Memory], PromptState], head: Callable[[Tensor], Tensor], labels: Tensor
) -> Callable[[Memory], Tensor]:
    """batch x tokens: cross-entropy of each answer token, 0 elsewhere."""

    def loss(memory: Memory) -> Tensor:
        logits = head(read(memory).hidden)
        return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")

    return loss


def streamed_loss_of(
    attached: StreamedAttention,
    episode: Episode,
    policy: Policy,
    carry: MemoryStep,
    softness: Softness | None = None,
    **settings: int,
) -> Tensor:
    batch = len(episode.chunks[0].modality)
    stream = Stream(attached, policy, batch=batch, carry=carry, softness=softness, **settings)
    asked = dict(episode.asked)
    losses = []
    for number, chunk in enumerate(episode.chunks, start=1):
        stream.feed(chunk)
        if number in asked:
            prompt = asked[number]
            loss = loss_of(stream.reader(prompt), head_of(attached.text_model), prompt.labels)
            losses.append(stream.read(loss))
    answers = sum((prompt.labels != IGNORED).sum(dim=1) for prompt in asked.values())
    return (torch.cat(losses, dim=1).sum(dim=1) / answers).mean()


def head_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    return lambda hidden: hidden @ model.get_input_embeddings().weight.T


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([part.reshape(-1).double() for part in torch.autograd.grad(loss, learning)])


def assert_same_gradient(got: Tensor, expected: Tensor, relative: float) -> None:
    cosine = float(F.cosine_similarity(got, expected, dim=0))
    error = float((got - expected).norm() / expected.norm())
    assert cosine >= 0.99999, f"cosine {cosine}"
    assert error <= relative, f"relative error {error:.1e}"


WAYS = {
    "recomputed": FullGradient(),
    "offloaded": FullGradient(offload=True),
    "kept": FullGradient(recompute=False),
    "kept, offloaded": FullGradient(recompute=False, offload=True),
}
HELD = {**{name: (way, False) for name, way in WAYS.items()}, "recomputed by layer": (FullGradient(), True)}


def opened(number: int, times: Sequence[float | None], answers: Sequence[str], seconds: int = 16) -> EncodedSample:
    """A stream of random encodings, 4 visual and 2 audio tokens every 2 s, with a question at each time."""
    generator = torch.Generator().manual_seed(number)
    segments = [
        Encoded(
            visual=torch.randn(1, 4, 32, generator=generator, dtype=torch.float64),
            audio=torch.randn(1, 2, 32, generator=generator, dtype=torch.float64),
            grid=(1, 2, 2),
            start=float(start),
            seconds=2.0,
            seconds_per_grid=2.0,
        )
        for start in range(0, seconds, 2)
    ]
    messages = []
    for time, answer in zip(times, answers, strict=True):
        messages.append(Message(role="user", content=f"what colour was the {answer} ?", at=time))
        messages.append(Message(role="assistant", content=answer))
    sample = Sample(id=str(number), video=Path("x.mp4"), audio=None, messages=tuple(messages))
    return EncodedSample(
        sample=sample, segments=segments, tracks="both", heard=MediaStats(frames=seconds, audio_seconds=float(seconds))
    )


def policy_at(slots: int | None) -> Policy:
    return PerturbationOptions().build(None if slots is None else SplitBudget(visual_audio_ratio=2.0).build(2, slots))


@torch.no_grad()
def episode_from(attached: StreamedAttention, feeder: Feeder, batch: Sequence[EncodedSample]) -> Episode:
    """What the trainer streams, as chunks and prompts."""
    chunks, asked = list(feeder.chunks(batch)), []
    stream = Stream(attached, policy_at(None), batch=len(batch))
    for due in feed_until_due(stream, chunks, batch[0].sample.moments):
        numbers = batch[0].sample.asked(due.moments)
        questions = [[one.sample.questions[number] for number in numbers] for one in batch]
        turns = [[Turn(text=question.text, answer=question.answer) for question in row] for row in questions]
        asked.append((stream.usage.chunks, feeder.prompt(turns, "both")))
    return Episode(chunks=chunks, asked=asked)
