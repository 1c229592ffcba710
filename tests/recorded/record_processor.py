"""Records what transformers' Qwen2_5OmniProcessor and get_rope_index make of the files of support/processor_cases.py.

Not run by the tests. Recorded with torch 2.13.0+cpu, torchvision 0.28.0, transformers 5.23.0, in the environment of
record.py (-P: statistics.py beside this file must not hide Python's own):

    PYTHONPATH=tests:. /tmp/recording/bin/python -P tests/recorded/record_processor.py
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

OPERATORS = torch.library.Library("torchvision", "DEF")  # as in record.py: wanted by torchvision, not used
for name in ("nms", "qnms"):
    OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from safetensors.torch import save_file  # noqa: E402
from support.processor_cases import CASES, PIXELS, QUESTION, Case, decoded, summary, write_case  # noqa: E402
from support.thinkers import write_folder  # noqa: E402
from transformers import (  # noqa: E402
    AutoTokenizer,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor  # noqa: E402
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor  # noqa: E402

CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}


def processor_of(tokenizer: Any) -> Qwen2_5OmniProcessor:
    """The processor with the settings of the published checkpoints but for the pixels."""
    size = {"shortest_edge": PIXELS[0], "longest_edge": PIXELS[1]}
    return Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(**CLIP),
        video_processor=Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False, **CLIP),
        feature_extractor=WhisperFeatureExtractor(feature_size=128, chunk_length=300),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )


def recorded(case: Case, folder: Path, processor: Qwen2_5OmniProcessor, model: Any) -> dict[str, torch.Tensor]:
    # 1. the prompt and the decoded media
    frames, samples = decoded(case, write_case(case, folder))
    media = {"type": "audio", "audio": "x"} if frames is None else {"type": "video", "video": "x"}
    messages = [{"role": "user", "content": [media, {"type": "text", "text": QUESTION}]}]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    given: dict[str, Any] = {}
    if frames is not None:
        size = {"shortest_edge": PIXELS[0], "longest_edge": PIXELS[1]}
        given |= {"videos": [frames], "videos_kwargs": {"fps": case.fps, "do_sample_frames": False, "size": size}}
    if samples is not None:
        given["audio"] = [samples.numpy()]
    if case.tracks == "both":
        given |= {"load_audio_from_video": True, "audio_from_video_indices": [0]}
    # 2. the processor
    output = processor(text=[text], return_tensors="pt", **given)
    mask, grid = output.get("feature_attention_mask"), output.get("video_grid_thw")
    # 3. positions
    spacing = output.get("video_second_per_grid")
    positions, _ = model.get_rope_index(
        output["input_ids"],
        video_grid_thw=grid,
        attention_mask=output["attention_mask"],
        use_audio_in_video=case.tracks == "both",
        audio_seqlens=None if mask is None else mask.sum(-1),
        second_per_grids=None if spacing is None else torch.as_tensor(spacing),
    )
    found = {"ids": output["input_ids"][0], "positions": positions[:, 0].long()}
    if grid is not None:
        found |= {"grid": grid[0], **dict(summary("pixels", output["pixel_values_videos"]))}
    if mask is not None:
        found |= dict(summary("mel", output["input_features"][0, :, : int(mask.sum())]))
    return found


def record() -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as place:
        folder = write_folder(Path(place) / "model")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder)
        processor = processor_of(tokenizer)
        every = {case.name: recorded(case, Path(place), processor, model) for case in CASES}
    return {f"{case}.{name}": value.contiguous() for case, found in every.items() for name, value in found.items()}


if __name__ == "__main__":
    save_file(record(), Path(__file__).with_name("qwen2_5_omni.safetensors"))
