"""Which linear layers are followed by an activation that is known in closed form or by quadrature.

Told by a forward: the tensor that a layer puts out is the one that the activation takes. Of gated feed-forward layers
that is the gate's. What no forward reaches goes by its name and the config's activation.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.activations import ACT2FN

from ..algebra.functional import ACTIVATIONS
from ..outputs import outputs_of

# Calls of torch, by the name of the function
_FUNCTIONS = {"relu": "relu", "relu_": "relu", "silu": "silu", "silu_": "silu"}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}
# The layers in front of the activation, by the names that transformers' models give them
_BY_NAME = re.compile(
    r"(.*\.)?(fc1|fc_in|c_fc|wi|wi_0|w1|gate_proj|lin1|dense_h_to_4h|(intermediate|transform)\.dense|intermediate_dense)"
)
_IN_CONFIG = ("hidden_act", "activation_function", "hidden_activation", "dense_act_fn", "activation")

NOTHING, OTHER = "nothing", "other"
SAME = 1e-5  # to which two activations agree that are one: GELU and its tanh differ by 5e-4

Seen = tuple[int, int, int]  # where a tensor lies, how many entries it has, how often it was written to


def activations(model: nn.Module, names: Collection[str], inputs: Mapping[str, Any] | None) -> dict[str, str]:
    """name of a linear layer -> the activation that its output goes through, one of ``ACTIVATIONS``.

    Only of layers whose every call goes there, and to nothing else that is an activation.

    Args:
        names: of the layers that are asked about.
        inputs: that the model runs on; None where there are none.
    """
    found, called = ({}, set()) if inputs is None else _traced(model, names, inputs)
    return found | _by_name(model, [name for name in names if name not in called])


class _Tracer(TorchFunctionMode):
    """Follows what layers put out through one forward, while it is active and its hooks are in place.

    Attributes:
        calls: name of a layer -> the activations that took each of its outputs.
    """

    def __init__(self):
        super().__init__()
        self.calls: dict[str, list[set[str]]] = defaultdict(list)
        self._outputs: dict[Seen, tuple[str, int]] = {}
        self._alive: list[Tensor] = []  # so that no other tensor comes to lie where one of these does
        self._inside: list[nn.Module] = []
        self._kinds: dict[nn.Module, str] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        kind = _GELUS.get(kwargs.get("approximate", "none")) if name == "gelu" else _FUNCTIONS.get(name)
        if kind and args:
            self.taken(args[0], kind)
        return function(*args, **kwargs)

    def hooks(self, model: nn.Module, names: Collection[str]) -> Iterator[Any]:
        """Handles of all that must be watched."""
        for name in names:
            yield model.get_submodule(name).register_forward_hook(self._recorder(name))
        for module in model.modules():
            if not list(module.children()) and not list(module.parameters()):  # as activations are
                yield module.register_forward_pre_hook(self._entered)

    def taken(self, value: Any, kind: str) -> None:
        """An activation takes a tensor."""
        if isinstance(value, Tensor) and (output := self._outputs.get(_seen(value))):
            name, call = output
            self.calls[name][call].add(kind)

    def _recorder(self, name: str) -> Callable:
        def put_out(module: nn.Module, args: tuple, output: Any) -> None:
            if isinstance(output, Tensor):
                self._alive.append(output)
                self._outputs[_seen(output)] = name, len(self.calls[name])
            self.calls[name].append(set())

        return put_out

    def _entered(self, module: nn.Module, args: tuple) -> None:
        if args and isinstance(args[0], Tensor) and _seen(args[0]) in self._outputs:
            if module not in self._kinds:
                self._kinds[module] = kind_of(module)
            if self._kinds[module] != NOTHING:
                self.taken(args[0], self._kinds[module])


def kind_of(function: Any) -> str:
    """Which of ``ACTIVATIONS`` a function is, by its values; ``NOTHING`` if it changes none, else ``OTHER``.

    It is called on a tensor of its own, and may be any module.
    """
    grid = torch.linspace(-8, 8, 321, dtype=torch.float64)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            values = function(grid.clone())
        except Exception:  # whatever it is, it is no activation
            return OTHER
        if not isinstance(values, Tensor) or values.shape != grid.shape:
            return OTHER
        known = {NOTHING: lambda x: x} | ACTIVATIONS
        return next(
            (name for name, each in known.items() if torch.allclose(values.double(), each(grid), 0, SAME)), OTHER
        )


def _traced(model: nn.Module, names: Collection[str], inputs: Mapping[str, Any]) -> tuple[dict[str, str], set[str]]:
    """What a forward shows, and which layers it calls: none if the model does not run while it is watched."""
    tracer = _Tracer()
    with ExitStack() as stack:
        for handle in tracer.hooks(model, names):
            stack.callback(handle.remove)
        stack.enter_context(tracer)
        try:
            outputs_of(model, inputs)
        except Exception:  # any model: it has run on these inputs, but not under a mode
            return {}, set()
    every = {name: set.union(*calls) for name, calls in tracer.calls.items() if all(calls)}
    return {n: min(kinds) for n, kinds in every.items() if len(kinds) == 1 and kinds <= ACTIVATIONS.keys()}, set(
        tracer.calls
    )


def _by_name(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """What configs say of layers that are called as those in front of an activation are."""
    kinds = {name: _by_config(model, name) for name in names if _BY_NAME.fullmatch(name)}
    return {name: kind for name, kind in kinds.items() if kind in ACTIVATIONS}


def _by_config(model: nn.Module, name: str) -> str:
    """The activation that is stated nearest to a layer: parts of a model have configs of their own."""
    while name:
        name = name.rpartition(".")[0]
        config = getattr(model.get_submodule(name), "config", None)
        stated = next((value for key in _IN_CONFIG if isinstance(value := getattr(config, key, None), str)), None)
        if stated is not None:
            return kind_of(ACT2FN[stated]) if stated in ACT2FN else OTHER
    return OTHER


def _seen(tensor: Tensor) -> Seen:
    """The same for a tensor and for views of all of it, until one of them is written to."""
    return tensor.data_ptr(), tensor.numel(), tensor._version
