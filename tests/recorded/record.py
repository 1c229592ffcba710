"""Records what transformers' Qwen2VLVideoProcessor makes of small clips, for tests/test_media.py. Not run by the tests.

Recorded with torch 2.13.0+cpu, torchvision 0.28.0, transformers 5.23.0. To rerun (torchvision stays out of the
project's own environment: transformers only looks whether it is there, then fails to import it with torch for CPUs):

    python3.11 -m venv /tmp/recording
    realpath .venv/lib/python3.11/site-packages > /tmp/recording/lib/python3.11/site-packages/project.pth
    /tmp/recording/bin/pip install --no-deps 'torchvision==0.28.*'
    /tmp/recording/bin/python -P tests/recorded/record.py

The wheel of torchvision needs CUDA libraries for its compiled operators. None of them is used here, but its Python part
wants two of their schemas, which are declared below before it is imported.
"""

import random
from pathlib import Path

import torch

OPERATORS = torch.library.Library("torchvision", "DEF")  # kept alive: the schemas vanish with it
for name in ("nms", "qnms"):
    OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from safetensors.torch import save_file  # noqa: E402
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor, smart_resize  # noqa: E402

CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}

# name: frames, height, width, patch, min_pixels, max_pixels, normalisation
CASES = {
    "up": (2, 20, 34, 14, 2 * 28 * 28, 16 * 28 * 28, CLIP),  # below min_pixels: 20x34 -> 56x56
    "down": (3, 70, 100, 14, 28 * 28, 2 * 28 * 28, CLIP),  # above max_pixels, odd count: 70x100 -> 28x28
    "both": (3, 30, 44, 14, 28 * 28, 16 * 28 * 28, CLIP),  # no multiple, rows shrink and columns grow: -> 28x56
    "same": (1, 28, 28, 14, 28 * 28, 16 * 28 * 28, CLIP),  # a single frame, nothing to resize
    "wide": (2, 40, 70, 16, 32 * 32, 16 * 32 * 32, HALF),  # patches of 16: 40x70 -> 32x64
}


def clip(frames: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Noise beside black and white edges, where bicubic weights overshoot and must be clamped."""
    pixels = torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=generator)
    pixels[..., : height // 2, : width // 3] = 0
    pixels[..., height // 2 :, : width // 3] = 255
    return pixels


def record() -> dict[str, torch.Tensor]:
    generator, recorded = torch.Generator().manual_seed(0), {}
    for name, (frames, height, width, patch, low, high, normalisation) in CASES.items():
        pixels = clip(frames, height, width, generator)
        size = {"shortest_edge": low, "longest_edge": high}
        processor = Qwen2VLVideoProcessor(size=size, patch_size=patch, cap_pixels_per_frame=False, **normalisation)
        output = processor(videos=[pixels], return_tensors="pt")
        recorded[f"{name}.frames"] = pixels
        recorded[f"{name}.settings"] = torch.tensor([patch, low, high])
        recorded[f"{name}.normalisation"] = torch.tensor(list(normalisation.values()), dtype=torch.float64)
        recorded[f"{name}.patches"] = output["pixel_values_videos"]
        recorded[f"{name}.grid"] = output["video_grid_thw"][0]
    draw, rows = random.Random(0), []
    for _ in range(400):
        height, width = draw.randint(8, 2200), draw.randint(16, 1600)
        cell = draw.choice([28, 32])
        low = draw.choice([1, 4, 128]) * cell * cell
        high = max(low, draw.choice([61250, 176400, 768 * cell * cell]))
        rows.append([height, width, cell, low, high, *smart_resize(height, width, cell, low, high)])
    recorded["sizes"] = torch.tensor(rows)
    return recorded


if __name__ == "__main__":
    save_file(record(), Path(__file__).with_name("qwen2_vl_video.safetensors"))
