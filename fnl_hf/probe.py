"""Proof on the user's own model that a found product *is* the product the model uses.

A product is exact if a random change of basis inside it (A G and G⁻¹ B, biases carried along; for rotary heads only
what commutes with the rotation) leaves the attention's output where it was, while the one-sided change moves it.

One forward of the model records what each attention module is called with; the modules are then replayed alone, in
float64, so that a probe costs milliseconds and tells rounding from a wrong layout.
"""

import copy
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .factorization import Factorization, HeadProduct
from .heads import Product, install

TOLERANCE = 5e-5  # of the change that the one-sided control makes; wrong layouts have shown 1.4e-4 and more
COMPACT_TOLERANCE = 1e-6  # of the outputs' norm, between padded and compact heads
REACH = 3  # how far above a product's owner the module may be whose call is replayed
UNREACHED = "these inputs do not reach it: pass verify=example inputs that do"


class ProbeError(ValueError):
    """The model could not be run on the inputs at hand."""


@dataclass(frozen=True)
class Verdict:
    """What a probe found: relative changes of the output under the two-sided and the one-sided change of basis."""

    name: str
    kind: str
    change: float | None
    control: float | None
    reason: str | None = None

    @property
    def exact(self) -> bool:
        """True if the output stays and the control moves it."""
        return self.reason is None and self.change < TOLERANCE * self.control

    def __str__(self) -> str:
        if self.reason:
            return f"{self.name} {self.kind}: not probed, {self.reason}"
        word = "exact" if self.exact else "NOT EXACT"
        return f"{self.name} {self.kind}: {word} (changes by {self.change:.1e}, one-sided by {self.control:.1e})"


@dataclass(frozen=True)
class Verification:
    """What `verify` returns: a `Verdict` per product. True if every product is exact; print it for the table."""

    verdicts: list[Verdict]

    def __bool__(self) -> bool:
        return bool(self.verdicts) and all(verdict.exact for verdict in self.verdicts)

    def __str__(self) -> str:
        return "\n".join(map(str, self.verdicts)) or "no product to verify"

    __repr__ = __str__


class Recording:
    """The calls that the executed modules of a model received in one forward, and their replay in float64."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], owners: Iterable[str]):
        self._model = model
        self._replayed: dict[str, tuple[nn.Module, Tensor]] = {}
        ancestors = {name for owner in owners for name in _lineage(owner)}
        self._calls = _record(model, inputs, ancestors)

    def verdict(self, owner: str, name: str, declaration: HeadProduct) -> Verdict:
        """Probe one product of the recorded model, declared (or to be declared) in the module ``owner``."""
        executed = next((ancestor for ancestor in _lineage(owner)[:REACH] if ancestor in self._calls), None)
        if executed is None:
            return Verdict(name, declaration.kind, None, None, UNREACHED)
        try:
            module, reference = self._replica(executed)
            below = owner.removeprefix(executed).removeprefix(".")
            product = declaration.factorization(name, module.get_submodule(below))
            change = self._moved(executed, module, reference, product, ("left", "right"))
            # A large change is a refutation whatever the control says; the control costs another replay.
            control = 1.0 if change > 1e-2 else self._moved(executed, module, reference, product, ("left",))
        except Exception as error:  # any user model may stand here; what it raised is the reason to report
            return Verdict(name, declaration.kind, None, None, f"its module does not replay alone: {error}")
        return Verdict(name, declaration.kind, change, control, None if control else UNREACHED)

    def compact_attributes(self, qk: Product, ov: Product) -> dict[str, int] | None:
        """Attributes of ``qk.owner`` with which really narrower heads give what padded ones give, or None.

        The width of a head stands under several names, and some classes compute their scale from it: what is tried
        counts only if the replayed outputs agree.
        """
        name = next((ancestor for ancestor in _lineage(ov.owner)[:REACH] if ancestor in self._calls), None)
        if name is None:
            return None
        try:
            padded = copy.deepcopy(self._model.get_submodule(name)).double().requires_grad_(False)
            qk, ov = (replace(p, owner=p.owner.removeprefix(name).removeprefix(".")) for p in (qk, ov))
            dense = copy.deepcopy(padded)
            install(padded, [qk, ov])
            reference = self._run(name, padded)
            for attributes in _narrow_attributes(dense.get_submodule(qk.owner), qk):
                module = copy.deepcopy(dense)
                install(module, [replace(qk, compact=attributes), replace(ov, compact={})])
                if self._agrees(name, module, reference):
                    return attributes
        except Exception:  # any user model may stand here, and padded heads are always right
            return None
        return None

    def _agrees(self, name: str, module: nn.Module, reference: Tensor) -> bool:
        try:
            output = self._run(name, module)
        except (RuntimeError, ValueError):  # shapes that do not fit
            return False
        same_shape = output.shape == reference.shape
        return same_shape and bool((output - reference).norm() <= COMPACT_TOLERANCE * reference.norm())

    def _replica(self, name: str) -> tuple[nn.Module, Tensor]:
        """A copy of an executed module and what it returns: in float64, or in float32 where it insists on that."""
        if name not in self._replayed:
            self._replayed.clear()  # one module at a time: a float64 copy of a large one is large
            for dtype in (torch.float64, torch.float32):
                module = copy.deepcopy(self._model.get_submodule(name)).to(dtype).requires_grad_(False)
                try:
                    reference = self._run(name, module)
                except Exception:
                    if dtype is torch.float32:
                        raise
                    continue
                if reference.isfinite().all():
                    break
            self._replayed[name] = module, reference
        return self._replayed[name]

    def _run(self, name: str, module: nn.Module) -> Tensor:
        dtype = next(module.parameters()).dtype
        args, kwargs = _cast(self._calls[name], dtype)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _first_tensor(module(*args, **kwargs))

    def _moved(self, name, module, reference, product: Factorization, sides: tuple[str, ...]) -> float:
        """The relative change of the output when these sides of the product get a new basis."""
        original = [tensor.clone() for tensor in product.augmented()]
        try:
            product.write(product.form.change_basis(original, torch.Generator().manual_seed(0), sides))
            output = self._run(name, module)
        finally:
            product.write(original)
        return ((output - reference).norm() / reference.norm().clamp_min(1e-300)).item()


def _narrow_attributes(module: nn.Module, product: Product) -> Iterator[dict[str, int]]:
    """Attribute values of an attention module that may say its narrower heads, the fewest first."""
    width, heads, rank = product.left.width, product.left.size, product.rank
    numbers = {name: value for name, value in vars(module).items() if type(value) is int}
    of_head = {name: rank for name, value in numbers.items() if value == width and re.search("dim|size|d_kv", name)}
    of_all = {name: heads * rank for name, value in numbers.items() if value == width * heads}
    usual = {name: value for name, value in of_all.items() if name in ("all_head_size", "inner_dim", "split_size")}
    yield from ({}, of_head, of_head | usual, of_head | of_all)


def record_examples(model: nn.Module, owners: Iterable[str]) -> Recording:
    """A recording on made-up inputs, for a probe where the user gave none.

    Raises:
        ProbeError: The model runs on nothing that could be made up from its config.
    """
    error = ProbeError(f"no example inputs are known for {type(model).__name__}")
    for inputs in example_inputs(model):
        try:
            return Recording(model, inputs, owners)
        except ProbeError as tried:
            error = tried
    raise error


def example_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Small inputs for a Hugging Face model, from its config: what forward requires, then everything it takes."""
    config = getattr(model, "config", None)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)

    def ids(length):
        vocabulary = _config_number(config, "vocab_size", "src_vocab_size") or 32
        return torch.randint(min(5, vocabulary - 1), vocabulary, (1, length), generator=generator).to(device)

    def noise(*shape):
        return torch.randn(shape, generator=generator).to(device, next(model.parameters()).dtype)

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


# ----------------------------------------------------------------------------------------------------


def _lineage(name: str) -> list[str]:
    """A module's name and its ancestors', nearest first."""
    parts = name.split(".") if name else []
    return [".".join(parts[:end]) for end in range(len(parts), -1, -1)]


def _record(model: nn.Module, inputs: Mapping[str, Any], names: set[str]) -> dict[str, tuple[tuple, dict]]:
    """module name -> (args, kwargs) of its first call, copied before the call could change them."""
    calls, handles, modes = {}, [], {module: module.training for module in model.modules()}

    def recorder(name):
        def hook(module, args, kwargs):
            if name not in calls:
                calls[name] = _cast((args, kwargs), None)

        return hook

    for name, module in model.named_modules():
        if name in names:
            handles.append(module.register_forward_pre_hook(recorder(name), with_kwargs=True))
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model(**_without_cache(model, inputs))
    except Exception as error:  # any model, any inputs: what it raised is what the user needs to know
        raise ProbeError(f"{type(model).__name__} does not run on {', '.join(inputs)}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return calls


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    """Detached copies, floating-point tensors in ``dtype`` if given, through containers; other objects are copied."""
    if isinstance(value, Tensor):
        value = value.detach().clone()
        return value.to(dtype) if dtype and value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_cast(item, dtype) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return copy.deepcopy(value)


def _without_cache(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs that ask for no key-value cache, where the model has one."""
    takes_it = "use_cache" in inspect.signature(model.forward).parameters
    return {"use_cache": False, **inputs} if takes_it else dict(inputs)


def _first_tensor(output: Any) -> Tensor:
    """The main output: the first floating-point tensor."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return next(_first_tensor(value) for value in values if isinstance(value, (tuple, list, Mapping)))


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
