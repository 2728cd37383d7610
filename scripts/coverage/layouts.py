"""Tensors by argument name: the layouts in which models expect them, the most common first. Draws come as ``d``."""

import torch
from torch import Tensor

from scripts.coverage.draws import Draws
from scripts.coverage.reading import nearest
from scripts.coverage.sizes import DECODER_LENGTH, LAYERS, TEXT_LENGTH


def layouts(name: str, d: Draws) -> list[Tensor]:
    """Possible tensors for an argument of `forward`; none if its name is unknown."""
    return _LAYOUTS[name](d) if name in _LAYOUTS else []


def _frames(d: Draws) -> int:
    return nearest(d.config, "num_frames", "frames_per_clip", default=2)


def _images(d: Draws) -> list[Tensor]:
    height, width = d.size
    return [
        d.randn(2, d.channels, height, width),
        d.randn(2, _frames(d), d.channels, height, width),
        d.randn(2, 1, d.channels, height, width),
        d.randn(2, d.channels, 64, 64),
        d.randn(2, 1, d.channels, 2 * height, 2 * width),
    ]


def _waves(d: Draws) -> list[Tensor]:
    return [d.randn(2, 2000), d.randn(2, 1, 2000), d.randn(2, 64, d.mels), d.randn(2, TEXT_LENGTH, d.hidden)]


def _spectrograms(d: Draws) -> list[Tensor]:
    length = 2 * nearest(d.config, "max_source_positions", default=32)
    return [
        d.randn(2, d.mels, length),
        d.randn(2, length, d.mels),
        d.randn(2, 1, length, d.mels),
        d.randn(2, length, 2 * d.mels),
    ]


def _encoder_states(d: Draws) -> list[Tensor]:
    return [d.randn(2, 6, nearest(d.config, "encoder_hidden_size", "cross_hidden_size", default=d.hidden))]


def _boxes(d: Draws) -> list[Tensor]:
    box = torch.tensor([1, 2, 30, 40])
    if d.config.model_type == "bros":  # four corners, relative
        box = torch.tensor([0.1, 0.1, 0.3, 0.1, 0.3, 0.2, 0.1, 0.2])
    elif d.config.model_type == "udop":
        box = box / 100
    return [box.repeat(2, TEXT_LENGTH, 1)]


_LAYOUTS = {
    "input_ids": lambda d: [d.ids(TEXT_LENGTH)],
    "decoder_input_ids": lambda d: [d.ids(DECODER_LENGTH)],
    "attention_mask": lambda d: [torch.ones(2, TEXT_LENGTH, dtype=torch.long)],
    "position_ids": lambda d: [torch.arange(TEXT_LENGTH).repeat(2, 1)],
    "bbox": _boxes,
    "merge_sizes": lambda d: [torch.tensor([1])],
    "input_features_mask": lambda d: [torch.ones(2, n, dtype=torch.long) for n in (2 * LAYERS * 16, d.mels)],
    **dict.fromkeys(["grid_thw", "image_grid_thw"], lambda d: [torch.tensor([[1, 4, 4]])]),
    **dict.fromkeys(["pixel_values", "pixel_values_images", "images", "image", "input"], _images),
    **dict.fromkeys(["pixel_values_videos", "video"], lambda d: [d.randn(2, _frames(d), d.channels, *d.size)]),
    **dict.fromkeys(["input_values", "waveform", "audio_values", "audio", "input_audio"], _waves),
    **dict.fromkeys(["input_features", "spectrogram", "audio_features"], _spectrograms),
    **dict.fromkeys(
        ["hidden_states", "inputs_embeds", "query_embeds", "x"],
        lambda d: [d.randn(2, TEXT_LENGTH, d.hidden), d.randn(TEXT_LENGTH, d.hidden)],
    ),
    **dict.fromkeys(["encoder_hidden_states", "cross_attention_states", "context"], _encoder_states),
}
