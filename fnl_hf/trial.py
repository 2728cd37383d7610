"""Which of several equal modules is the fastest, on calls that a model makes of the one that it holds."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Call, ProbeError, Recording
from .examples import example_inputs
from .proof import Evidence
from .replay import fingerprint

# form -> what runs it, to form -> seconds of a run
Measure = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, float]]
DENSE = "dense"  # the form that no choice may be slower than
SLOWER = 1.03  # than the dense form: times that differ by less are the same
BATCHES = (1, 32)  # of made-up inputs
LENGTHS = (7, 4, 1)  # times those of made-up inputs, the first that the model takes: 63 tokens, mostly
SECONDS, ROUNDS = 0.3, 7  # of a measurement, all forms together, whichever takes longer


def timed(runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each run at its best, in rounds of all: other jobs only ever add to them.

    On the CPU on one thread, by the process's own clock. Where more threads than cores are busy they wait for each
    other, up to a hundred times as long as a small layer takes, and what is chosen would be left to chance.
    """
    on_gpu, threads = torch.cuda.is_initialized(), torch.get_num_threads()
    clock = time.perf_counter if on_gpu else time.process_time

    def seconds(run: Callable[[], object], calls: int) -> float:
        start = clock()
        for _ in range(calls):
            run()
        if on_gpu:
            torch.cuda.synchronize()
        return (clock() - start) / calls

    torch.set_num_threads(1)
    try:
        first = [min(seconds(run, 1) for _ in range(3)) for run in runs.values()]
        calls = max(1, round(1e-3 / max(min(first), 1e-6)))  # of one measurement
        times, until = {form: [] for form in runs}, time.perf_counter() + SECONDS
        while len(times[DENSE]) < ROUNDS or time.perf_counter() < until:
            for form, run in runs.items():
                times[form].append(seconds(run, calls))
    finally:
        torch.set_num_threads(threads)
    return {form: min(values) for form, values in times.items()}


def decided(times: Sequence[Mapping[str, float]]) -> str:
    """The form to take, of the same forms measured on several calls, the most welcome first.

    The first that is as fast as the fastest on the whole, among those that are slower than the dense one on no call.
    """
    ratios = {form: [each[form] / each[DENSE] for each in times] for form in times[0]}
    means = {form: prod(each) ** (1 / len(each)) for form, each in ratios.items() if max(each) <= SLOWER}
    return next(form for form, mean in means.items() if mean <= SLOWER * min(means.values()))


class Trial:
    """Forms of a model's layers, measured on its calls.

    Args:
        inputs: of the model's forward; None to make some up, of batches 1 and 32.
        measure: what times them, `timed` or a stand-in.
        make_dense: gives a dense copy of the model, on which what has another form can be proven.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any] | None,
        measure: Measure,
        make_dense: Callable[[nn.Module], nn.Module],
    ):
        self.model, self.inputs, self.chosen = model, inputs, Counter()
        self._measure, self._make_dense, self._known = measure, make_dense, {}

    @cached_property
    def dense(self) -> nn.Module:
        """A dense copy of the model."""
        return self._make_dense(self.model)

    def evidence(self, names: Iterable[str], leaves: Iterable[str]) -> Evidence:
        """To prove products of the dense copy with, by the inputs at hand."""
        return Evidence(self.dense, self.inputs, names, leaves)

    def calls(self, names: Iterable[str]) -> dict[str, list[Call]]:
        """What modules are called with in the model, by their names; [] of one that no inputs reach.

        Raises:
            ProbeError: The model does not run on the user's inputs.
        """
        names = list(names)
        recorded = self._recorded(names) if names else []
        return {name: [calls[name] for calls in recorded if name in calls] for name in names}

    def _recorded(self, names: list[str]) -> list[dict[str, Call]]:
        def calls(inputs: Mapping[str, Any]) -> dict[str, Call]:
            return Recording(self.model, inputs, names, lambda name: fingerprint(self.model.get_submodule(name))).calls

        if self.inputs is not None:
            return [calls(self.inputs)]
        recorded = []
        for batch in BATCHES:
            for inputs in (_repeated(inputs, batch, n) for inputs in example_inputs(self.model) for n in LENGTHS):
                try:
                    recorded.append(calls(inputs))
                except ProbeError:
                    continue
                break
        return recorded

    def fastest(self, name: str, forms: Mapping[str, Callable[[], nn.Module]], calls: Sequence[Call]) -> str | None:
        """The form that a module should have; None if it is never called, and nothing can be said.

        Args:
            forms: form -> what makes the module in it, the most welcome first, the dense one among them.
        """
        if not calls:
            self.chosen["not reached"] += 1
            return None
        module = self.model.get_submodule(name)
        like = next(module.parameters())
        key = (
            fingerprint(module),
            tuple(forms),
            like.dtype,
            like.device,
            str([_shapes((c.args, c.kwargs)) for c in calls]),
        )
        if key not in self._known:
            with torch.no_grad():
                made = {form: make().eval() for form, make in forms.items()}
                self._known[key] = decided([self._times(made, call) for call in calls])
        self.chosen[self._known[key]] += 1
        return self._known[key]

    def _times(self, made: Mapping[str, nn.Module], call: Call) -> Mapping[str, float]:
        return self._measure(
            {form: lambda module=module: module(*call.args, **call.kwargs) for form, module in made.items()}
        )


def _repeated(inputs: Mapping[str, Tensor], batch: int, times: int) -> dict[str, Tensor]:
    """A larger batch, of longer texts."""
    return {
        name: value.repeat(batch, *[1 if value.is_floating_point() else times] * (value.dim() - 1))
        for name, value in inputs.items()
    }


def _shapes(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_shapes(item) for item in value]
    if isinstance(value, dict):
        return {name: _shapes(item) for name, item in value.items()}
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
