"""Nothing mixes tensors of two devices: every path runs on a GPU that is only pretended."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.evaluations import Given
from support.fake_gpu import GPU, FakeGPU
from support.models import cut, text_model, whole_stream
from support.streams import LENGTHS, POLICIES, policy_of, prompt_of
from support.thinkers import write_folder

from omnimem.attention import blocked
from omnimem.backbones import Backbone, ModelOptions, load_backbone
from omnimem.budget import SplitBudget
from omnimem.calibration import CalibrationOptions, Recorder
from omnimem.data import Message, Sample
from omnimem.evaluation import Arm, EvaluateOptions, Evaluation
from omnimem.policies import PerturbationOptions
from omnimem.policies.base import Policy
from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world
from omnimem.selection import Softness
from omnimem.streaming.attach import attach
from omnimem.streaming.chunk_pass import DirectStep
from omnimem.streaming.feeder import Feeder
from omnimem.streaming.options import StreamOptions
from omnimem.streaming.stream import Stream
from omnimem.tuning import LoraOptions, add_adapter, streamed_loss

SECONDS = 8


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    """No kernel could run on it."""
    monkeypatch.setattr(blocked, "TRITON", False)  # its kernels do not follow who pretends
    with FakeGPU() as pretended:
        yield pretended


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "video.mp4"
    write_mp4(draw_world(3, SECONDS), path)
    return path


@pytest.fixture
def loaded(tmp_path: Path) -> Backbone:
    """A tiny thinker, loaded before anything is pretended: inside, transformers leaves its buffers unset."""
    return load_backbone(ModelOptions(path=str(write_folder(tmp_path / "thinker", rates="tiny"))))


@pytest.fixture
def backbone(loaded: Backbone, gpu: FakeGPU) -> Backbone:
    """The tiny thinker on the pretended device."""
    torch.nn.Module.to(loaded.model, GPU)
    return loaded


def sample(video: Path, number: int, at: float | None = None) -> Sample:
    """The video with one question."""
    messages = (Message(role="user", content="what colour ?", at=at), Message(role="assistant", content="red"))
    return Sample(id=f"sample{number}", video=video, audio=None, messages=messages, meta={})


def policy_at(backbone: Backbone, slots: int = 12) -> Policy:
    layers = backbone.text_model.config.num_hidden_layers
    return PerturbationOptions().build(SplitBudget().build(layers, slots))


@pytest.mark.parametrize(("policy", "last_position"), [(name, None) for name in POLICIES] + [("omnimem", 40)])
def test_a_stream_stays_on_its_device(policy, last_position, gpu) -> None:
    model = text_model("qwen2_5_omni")
    torch.nn.Module.to(model, GPU)
    output = model.get_input_embeddings().weight
    with torch.no_grad(), attach(model) as attached:
        stream = Stream(attached, policy_of(policy), last_position=last_position)
        for chunk in cut(whole_stream(), LENGTHS):
            names = ("embeddings", "positions", "modality", "place")
            stream.feed(replace(chunk, **{name: getattr(chunk, name).to(GPU) for name in names}))
        prompt = prompt_of([[[5, 6, 7], [8, 9]]])
        tensors = {"ids": prompt.ids.to(GPU), "segments": prompt.segments.to(GPU), "offsets": prompt.offsets.to(GPU)}
        answers = stream.answer(replace(prompt, **tensors), lambda h: h @ output.T, stop=[3], max_new_tokens=3)
    assert len(answers[0]) == 2
    assert {tensor.device for tensor in stream.memory.tensors()} == {GPU}


@pytest.mark.slow
@pytest.mark.parametrize("tracks", ["both", "video", "audio", None])
def test_an_evaluation_runs_on_the_models_device(tracks, backbone, video, tmp_path) -> None:
    """Two samples share a pass, though the second one comes from the cache; one question comes on the way."""
    feeder = Feeder(backbone, StreamOptions(chunk_tokens=40, positions="compact"), tmp_path / "cache")
    samples = [sample(video, 0), sample(video, 1), sample(video, 2, at=4.0)]
    with attach(backbone.text_model) as attached:
        options = EvaluateOptions(batch_size=2, max_new_tokens=3)
        evaluation = Evaluation(attached=attached, feeder=feeder, options=options)
        arm = Arm(name="arm", policy=policy_at(backbone), tracks=tracks)
        assert evaluation.run(arm, Given(samples), tmp_path / "out")["n"] == 3


@pytest.mark.parametrize("cached", [False, True])
def test_a_streamed_loss_lies_on_the_models_device(cached, backbone, video, tmp_path) -> None:
    feeder = Feeder(backbone, StreamOptions(chunk_tokens=40), tmp_path / "cache" if cached else None)
    add_adapter(backbone.model, LoraOptions(r=2, alpha=4.0)).train()
    with attach(backbone.text_model) as attached:
        batch = [feeder.open(sample(video, number, at=4.0)) for number in range(2)]
        modes = {"softness": Softness(temperature=0.5), "carry": DirectStep()}
        loss = streamed_loss(attached, feeder, batch, policy_at(backbone), **modes).loss
    assert loss.device == GPU


def test_calibration_measures_on_the_models_device(backbone, video) -> None:
    feeder = Feeder(backbone, StreamOptions(chunk_tokens=40))
    with torch.no_grad(), attach(backbone.text_model) as attached:
        recorder = Recorder(attached.shape.layers, CalibrationOptions(streams=1, skip_chunks=1))
        recorder.begin()
        stream = feeder.stream(attached, policy_at(backbone), recorder=recorder)
        for chunk in feeder.chunks([feeder.open(sample(video, 0))]):
            stream.feed(chunk)
    assert recorder.signals().streams == 1
