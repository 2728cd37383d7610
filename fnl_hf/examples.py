"""Small inputs for a model, made up from its config, for a forward in which the calls of its modules are recorded."""

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator

import torch
from torch import Tensor, nn

from .calls import ProbeError, Recording


def record_examples(model: nn.Module, names: Iterable[str], alike: Callable[[str], Hashable]) -> Recording:
    """A recording on made-up inputs.

    Raises:
        ProbeError: The model runs on nothing that could be made up from its config.
    """
    error = ProbeError(f"no example inputs are known for {type(model).__name__}")
    for inputs in example_inputs(model):
        try:
            return Recording(model, inputs, names, alike)
        except ProbeError as tried:
            error = tried
    raise error


def example_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Small inputs for a Hugging Face model, from its config: what forward requires, then everything it takes."""
    config = getattr(model, "config", None)
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(0)

    def ids(length):
        vocabulary = _config_number(config, "vocab_size", "src_vocab_size") or 32
        return torch.randint(min(5, vocabulary - 1), vocabulary, (1, length), generator=generator).to(device)

    def noise(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    parameters = inspect.signature(model.forward).parameters
    required = {name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    required.add(getattr(model, "main_input_name", None))
    for names in (required, set(parameters)):
        inputs = {name: example(config, ids, noise) for name, example in _EXAMPLES.items() if name in names}
        if inputs and getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
            inputs["decoder_input_ids"] = ids(6)
        if inputs:
            yield inputs


def _image(config, ids, noise):
    size = _config_number(config, "image_size") or 32
    return noise(1, _config_number(config, "num_channels") or 3, size, size)


def _spectrogram(config, ids, noise):
    mels = _config_number(config, "num_mel_bins", "feature_size") or 80
    return noise(1, mels, 2 * (_config_number(config, "max_source_positions") or 50))


# name of an input -> an example of it, from the config and makers of token ids and of noise
_EXAMPLES = {
    "input_ids": lambda config, ids, noise: ids(9),
    "pixel_values": _image,
    "input_features": _spectrogram,
    "input_values": lambda config, ids, noise: noise(1, 4000),
}


def _config_number(config: object, *names: str) -> int | None:
    """The first of these attributes on a config or one of its sub-configs."""
    owners = [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))] if config else []
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int) and value > 0:
                return value
    return None
