"""Building a tiny random model of a type, with inputs on which it runs."""

import contextlib
import copy
import importlib
import inspect
import math
import signal
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from scripts.coverage.candidates import candidates
from scripts.coverage.configs import PROFILES, Profile, tiny_config
from scripts.coverage.forward import outputs
from scripts.coverage.sizes import MAX_PARAMETERS, SECONDS

_STAGES = ("config", "model", "forward")


class NotBuilt(Exception):
    """No tiny model of this type; ``stage`` is what failed: "config", "model" or "forward"."""

    def __init__(self, stage: str, reason: object):
        self.stage = stage
        self.reason = " ".join(str(reason).split())[:300]
        super().__init__(f"{stage}: {self.reason}")


def build(model_type: str, seed: int = 0) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A tiny random model of this type in eval mode, and keyword inputs on which it runs.

    Raises:
        NotBuilt: no model, or none that runs on inputs that we know to make; the attempt that came furthest says why.
    """
    failures = []
    with warnings.catch_warnings(), _time_limit(SECONDS):
        warnings.simplefilter("ignore")
        for profile in PROFILES:
            try:
                return _build(model_type, seed, profile)
            except NotBuilt as error:
                failures.append(error)
            except TimeoutError as error:
                raise NotBuilt("forward", error) from None
    raise max(failures, key=lambda error: _STAGES.index(error.stage))


def _build(model_type: str, seed: int, profile: Profile) -> tuple[PreTrainedModel, dict[str, Any]]:
    with _failing_as("config"):
        config = tiny_config(model_type, profile)
    with _failing_as("model"):
        classes = _classes(model_type, config)
    failures = []
    for cls in classes[:3]:
        try:
            with _failing_as("model"):
                model = _instantiate(cls, config, seed)
            return model, _fitting_inputs(model, seed)
        except NotBuilt as error:
            failures.append(NotBuilt(error.stage, f"{cls.__name__}: {error.reason}"))
    raise failures[0] if failures else NotBuilt("model", "no model class takes this config")


@contextlib.contextmanager
def _failing_as(stage: str) -> Iterator[None]:
    """Any error but the time limit's becomes `NotBuilt` at this stage."""
    try:
        yield
    except TimeoutError:
        raise
    except Exception as error:
        raise NotBuilt(stage, f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Stops a build that hangs (main thread only: elsewhere signals are not available)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise TimeoutError(f"more than {seconds} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


@contextlib.contextmanager
def _parameter_limit(limit: int) -> Iterator[None]:
    """Stops a build at the parameter that exceeds the limit, also for classes that cannot be built on meta."""
    seen = 0

    def count(module, name, parameter):
        nonlocal seen
        seen += 0 if parameter is None else parameter.numel()
        if seen > limit:
            raise MemoryError(f"more than {limit} parameters (at {type(module).__name__}.{name} {[*parameter.shape]})")

    hook = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _classes(model_type: str, config: PreTrainedConfig) -> list[type[PreTrainedModel]]:
    """Model classes for a config: what AutoModel maps to, else those of its file, base models first."""
    mapped = []
    if model_type in MODEL_MAPPING_NAMES:
        with contextlib.suppress(KeyError, ValueError):
            mapped = AutoModel._model_mapping[type(config)]
            mapped = list(mapped) if isinstance(mapped, (list, tuple)) else [mapped]
    try:
        module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    except ModuleNotFoundError:  # a config that borrows another family's model
        if mapped:
            return mapped
        raise
    found = [
        c
        for c in vars(module).values()
        if inspect.isclass(c)
        and issubclass(c, PreTrainedModel)
        and c.config_class is type(config)
        and "PreTrained" not in c.__name__
        and c.forward is not nn.Module.forward
        and c not in mapped
    ]
    return mapped + sorted(found, key=lambda c: (not c.__name__.endswith(("Model", "Encoder")), len(c.__mro__)))


def _instantiate(cls: type[PreTrainedModel], config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    with _parameter_limit(MAX_PARAMETERS):
        try:
            model = cls._from_config(copy.deepcopy(config), attn_implementation="eager", dtype=torch.float32)
        except ValueError as error:
            if "attention implementation" not in str(error):
                raise
            model = cls._from_config(copy.deepcopy(config), dtype=torch.float32)
    return _randomize(model.eval().float(), seed)


@torch.no_grad()
def _randomize(model: nn.Module, seed: int) -> nn.Module:
    """Makes every parameter matter: constants are perturbed, matrices get a gain of about one."""
    generator = torch.Generator().manual_seed(seed + 1)
    seen = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen or not parameter.is_floating_point() or not parameter.numel():
                continue
            seen.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator)
            low, high = parameter.min().item(), parameter.max().item()
            if not math.isfinite(low) or not math.isfinite(high):
                parameter.copy_(0.1 * noise)
            elif low == high and parameter.dim() >= 2 and abs(low) < 0.05:
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))  # zero-initialised projections
            elif low == high == 0:
                parameter.copy_(0.1 * noise)
            elif low == high and abs(low) < 0.05:
                parameter.copy_(0.5 + 0.1 * noise)  # layer scale
            elif low == high:
                parameter.mul_(1 + 0.2 * noise.clamp(-2, 2))
            elif parameter.dim() >= 2:
                convolution = isinstance(module, nn.modules.conv._ConvNd)
                fan_in = math.prod(parameter.shape[1:]) if convolution else parameter.shape[-1]
                gain = parameter.std().item() * math.sqrt(fan_in)
                if 0 < gain < 0.7:
                    parameter.mul_(1 / gain)
    return model


def _fitting_inputs(model: nn.Module, seed: int) -> dict[str, Any]:
    """The first candidate on which the model runs."""
    try:
        guesses = list(candidates(model, seed))
    except (TypeError, AttributeError, ValueError) as error:
        raise NotBuilt("forward", f"no example inputs: {type(error).__name__}: {error}") from error
    reasons = []
    for inputs in guesses:
        try:
            found = outputs(model, inputs, seed)
        except TimeoutError:
            raise
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error} (inputs {', '.join(inputs)})")
            continue
        if found and torch.isfinite(found[0]).any():
            return inputs
        reasons.append("no finite float output")
    parameters = list(inspect.signature(model.forward).parameters)
    reasons.append(f"no example inputs for forward({', '.join(parameters[:6])}, ...)")
    raise NotBuilt("forward", reasons[0])
