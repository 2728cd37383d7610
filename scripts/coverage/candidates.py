"""Guesses of the inputs on which a model runs, from the signature of its `forward`."""

import inspect
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from scripts.coverage.draws import Draws
from scripts.coverage.forward import tensors
from scripts.coverage.layouts import layouts
from scripts.coverage.reading import nearest
from scripts.coverage.sizes import DECODER_LENGTH
from scripts.coverage.special import special_inputs

_MEDIA = ("pixel_values", "input_features", "input_values", "pixel_values_videos")
_REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError)

Inputs = dict[str, Any]


def candidates(model: nn.Module, seed: int = 0) -> Iterator[Inputs]:
    """Keyword arguments to try in this order: what the type is known to take, then what uses most of the model."""
    return _Candidates(model, seed).all()


class _Candidates:
    def __init__(self, model: nn.Module, seed: int):
        self._model = model
        self._draws = Draws(model.config, seed + 2)
        self._parameters = inspect.signature(model.forward).parameters

    def all(self) -> Iterator[Inputs]:
        if (special := special_inputs(self._draws)) is not None:
            yield {name: value for name, value in special.items() if name in self._parameters}
        if "input_ids" in self._parameters and self._media():
            yield from self._text_with_media()
        done = set()
        for choice in self._choices():
            names = tuple(dict.fromkeys([*self._required(), *(n for n in choice if n in self._parameters)]))
            if not names or names in done:
                continue
            done.add(names)
            for values in itertools.islice(itertools.product(*(layouts(n, self._draws) for n in names)), 24):
                inputs = dict(zip(names, values, strict=True))
                yield from self._with_companions(inputs)
                yield inputs
            yield from self._patches_with_grid(names)

    def _media(self) -> list[str]:
        return [name for name in _MEDIA if name in self._parameters]

    def _required(self) -> list[str]:
        return [
            name
            for name, parameter in self._parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]

    def _choices(self) -> list[list[str]]:
        """Names of arguments to give beside the required ones."""
        main = getattr(self._model, "main_input_name", "input_ids")
        decoder = ["decoder_input_ids"] if "decoder_input_ids" in self._parameters else []
        media = self._media()
        with_text = [["input_ids", name, *decoder] for name in media] if "input_ids" in self._parameters else []
        return [
            *with_text,
            *([main, *decoder], [main], ["input_ids", *decoder], ["input_ids"]),
            *([name] for name in media),
            *(["inputs_embeds"], []),
        ]

    def _patches_with_grid(self, names: tuple[str, ...]) -> Iterator[Inputs]:
        """Flat patches and the grid that they come from, for models that take a grid."""
        grid = next((name for name in ("grid_thw", "image_grid_thw") if name in self._parameters), None)
        if grid and names[0] in ("pixel_values", "hidden_states"):
            rest = {name: found[0] for name in names[1:] if (found := layouts(name, self._draws))}
            for patches in self._draws.flat_patches():
                yield {**rest, names[0]: patches, grid: torch.tensor([[1, 4, 4]])}

    def _with_companions(self, inputs: Inputs) -> Iterator[Inputs]:
        """The same inputs with the optional arguments that some models of this kind insist on."""
        extra = {}
        wanted = {name for name in self._parameters if name not in inputs}
        if "bbox" in wanted:
            extra["bbox"] = layouts("bbox", self._draws)[0]
        if "input_features" in inputs:
            shape = inputs["input_features"].shape  # mel bands and frames, in either order
            frames = shape[-1] if shape[-1] > self._draws.mels else shape[1]
            for name in ("input_features_mask", "padding_mask"):
                if name in wanted:
                    extra[name] = torch.ones(2, frames, dtype=torch.long)
        if "encoder_hidden_states" in wanted and "decoder_input_ids" not in self._parameters:
            extra["encoder_hidden_states"] = layouts("encoder_hidden_states", self._draws)[0]
        if extra:
            yield {**inputs, **extra}

    def _text_with_media(self) -> Iterator[Inputs]:
        """Text with as many image (or audio) tokens as the tower makes of one image, by asking the tower."""
        for method, token_names, variants in (
            ("get_image_features", ("image_token_id", "image_token_index"), self._one_image()),
            ("get_audio_features", ("audio_token_id", "audio_token_index"), self._one_recording()),
        ):
            token = nearest(self._model.config, *token_names)
            features = getattr(self._model, method, None)
            if not isinstance(token, int) or features is None:
                continue
            accepted = inspect.signature(features).parameters
            for variant in variants:
                if not set(variant) <= set(accepted):
                    continue
                variant = {name: value for name, value in variant.items() if name in self._parameters}
                try:
                    with torch.no_grad():
                        found = features(**variant)
                except _REFUSALS:
                    continue
                yield from self._text_for(found, token, variant)

    def _one_image(self) -> list[Inputs]:
        d = self._draws
        height, width = d.size
        packed = d.randn(1, 16, d.channels * 64)
        images = [
            {"pixel_values": d.randn(1, d.channels, height, width)},
            {"pixel_values": d.randn(1, 1, d.channels, height, width)},
            *({"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])} for patches in d.flat_patches()),
            {
                "pixel_values": packed,
                "spatial_shapes": torch.tensor([[4, 4]]),
                "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
            },
            {"pixel_values": d.randn(1, 3, 8, 128), "target_sizes": torch.tensor([[4, 4]])},
            {"pixel_values": d.randn(1, 2, d.channels, height, width)},
        ]
        plain = (*images[:2], images[-1])
        return images + [{**image, "image_sizes": torch.tensor([[height, width]])} for image in plain]

    def _one_recording(self) -> list[Inputs]:
        ones = torch.ones(1, 64, dtype=torch.long)
        return [
            {"input_features": self._draws.randn(1, *shape), **mask}
            for shape in ((self._draws.mels, 64), (64, self._draws.mels))
            for mask in ({"input_features_mask": ones}, {"feature_attention_mask": ones}, {})
        ]

    def _text_for(self, found: Any, token: int, variant: Inputs) -> Iterator[Inputs]:
        """One row of text with a ``token`` for each feature vector in ``found``; nothing if there are too many."""
        states = getattr(found, "pooler_output", found)
        states = getattr(found, "last_hidden_state", found) if states is None else states
        count = sum(math.prod(t.shape[:-1]) for t in tensors(states))
        if not 0 < count < 300:
            return
        ids = torch.cat([self._draws.ids(4, 1), torch.full((1, count), token), self._draws.ids(4, 1)], 1)
        kinds = {n: (ids == token).long() for n in ("mm_token_type_ids", "token_type_ids") if n in self._parameters}
        decoder = ["decoder_input_ids"] if "decoder_input_ids" in self._parameters else []
        yield {"input_ids": ids, **variant, **kinds, **{name: self._draws.ids(DECODER_LENGTH, 1) for name in decoder}}
