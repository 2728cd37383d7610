"""Proof on the user's own model that a found product *is* the product the model uses.

A product is exact if a random change of basis inside it (A G and G⁻¹ B, biases carried along; for rotary heads only
what commutes with the rotation) leaves the output where it was, while changing either side alone moves it: the control,
without which a product that nothing reads would pass.

Two ways to look. `Evidence` replays an attention module by itself, a float64 copy with random weights on a call that it
received or could receive, so that rounding, zero weights and short inputs hide nothing; what is proven for one layer
holds for its equals. `prove` changes every product of the whole model at once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .calls import (
    Call,
    ProbeError,
    Recording,
    a_rotation,
    drawn,
    made_up,
    rotations_for,
)
from .examples import record_examples
from .factorization import Factorization, FactorLeaf
from .outputs import changes, largest_rounding, outputs_of
from .replay import MOVED, REFUTED, UNREACHED, Found, Stage, Verdict, fingerprint, may_count, new_basis, numbers

DRAWS = 3  # of rounding, where outputs change by more than it should
JUMP = 10.0  # times what rounding alone does to a model, up to which a change refutes no product
REACH = 3  # how far above a product's owner the module may be that is replayed
# What a forward of the whole model loses by rounding, as a share of what the control changes
ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3}
COARSE_ROUNDING = 0.1  # in half precision
UNREAD = "what it gives does not follow its factors"
JUMPS = "the model's outputs jump when it changes by rounding, and no replay of its module reaches it"


@dataclass(frozen=True)
class Verification:
    """What `verify` returns: a `Verdict` per product. True if every product is exact; print it for the table."""

    verdicts: list[Verdict]

    def __bool__(self) -> bool:
        return bool(self.verdicts) and all(verdict.exact for verdict in self.verdicts)

    def __str__(self) -> str:
        return "\n".join(map(str, self.verdicts)) or "no product to verify"

    __repr__ = __str__


# -- modules by themselves ---------------------------------------------------------------------------


class Evidence:
    """What there is to prove the products of a model with: one forward, run when it is first asked for, and replays.

    Args:
        inputs: the user's example inputs; None to make some up.
        names: of what is to be proven; calls are recorded at or above the modules that (will) hold it.
        leaves: names of the modules that hold factors, of which it is told whether they are called.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any] | None = None,
        names: Iterable[str] = (),
        leaves: Iterable[str] = (),
    ):
        self.model, self.inputs, self._leaves = model, inputs, set(leaves)
        self._owners = {name.rpartition(".")[0] for name in names}
        self.obstacle = ""  # why there is no recording
        self._fingerprints: dict[str, tuple] = {}
        self._known: dict[tuple, Any] = {}
        self._counting: dict[tuple, bool] = {}
        self._stages: dict[tuple, Stage | Exception] = {}

    @cached_property
    def recording(self) -> Recording | None:
        """The recorded forward; None where no inputs could be made up that the model runs on.

        Raises:
            ProbeError: The model does not run on the user's inputs.
        """
        if self.inputs is None:
            return self._examples
        return Recording(self.model, self.inputs, self._names, self._alike)

    @cached_property
    def _examples(self) -> Recording | None:
        """A recording on made-up inputs: what a user's are too short for may show there."""
        try:
            return record_examples(self.model, self._names, self._alike)
        except ProbeError as error:
            self.obstacle = str(error)
            return None

    @property
    def _names(self) -> set[str]:
        return {ancestor for owner in self._owners for ancestor in _lineage(owner)[:REACH]} | self._leaves

    def _alike(self, name: str) -> tuple:
        if name not in self._fingerprints:
            self._fingerprints[name] = fingerprint(self.model.get_submodule(name))
        return self._fingerprints[name]

    def chosen(self, options: Sequence[tuple[str, str, Found]], recorded_only: bool = False) -> tuple[int | None, str]:
        """(index of the first option that is exact, ""), or (None, why there is none; "" for a refutation).

        Args:
            options: (name, kind, how it is found) of what may lie in one place.
            recorded_only: a call made up from the signature is not enough: something optional may stand in between.
        """
        owner, _, slot = options[0][0].rpartition(".")
        question, reasons = ("exact", slot, tuple(kind for _, kind, _ in options)), []

        def first_exact(stage: Stage) -> tuple[int | None, str]:
            verdicts = []
            for i, option in enumerate(options):
                verdicts.append(stage.verdict(*option))
                if verdicts[-1].exact:
                    return i, ""
            return None, next((verdict.reason for verdict in verdicts if verdict.reason), "")

        for index, reason in self.tried(owner, options[0][2](self.model), question, first_exact, recorded_only):
            if index is not None or not reason:  # proven, or refuted
                return index, reason
            reasons.append(reason)
        if UNREACHED in reasons:
            return None, UNREACHED
        why = f"its module does not replay alone ({reasons[0]})" if reasons else self.obstacle or UNREACHED
        return None, f"{why}: pass verify=example inputs that reach it" if self.inputs is None else why

    def replayed(self, found: Found) -> Verdict | None:
        """The verdict of a replay on a product of the model; None where nothing replays or reaches it."""
        product = found(self.model)
        owner, _, slot = product.name.rpartition(".")
        declaration = dict(self.model.named_modules(remove_duplicate=False)).get(product.name)  # None in a dense model
        if isinstance(declaration, FactorLeaf):  # a layer by itself
            owner = product.name
        if any(hasattr(module, "base_layer") for module in self.model.get_submodule(owner).modules()):
            return None  # what an adapter adds is no factor: random, it would refute any product

        def verdict(stage: Stage) -> tuple[Verdict, str]:
            one = stage.verdict(product.name, product.kind, found)
            return one, one.reason or ""

        # a forward that someone has set on one module holds for no other
        question = "as it is", slot, product.kind, getattr(declaration, "__dict__", {}).get("forward")
        unread = None
        for one, reason in self.tried(owner, product, question, verdict):
            if one and not reason:
                return replace(one, name=product.name)
            if one and isinstance(declaration, FactorLeaf):
                unread = replace(one, name=product.name, reason=UNREAD)
        return unread

    def tried(
        self,
        owner: str,
        product: Factorization,
        question: tuple,
        answer: Callable[[Stage], tuple[Any, str]],
        recorded_only: bool = False,
    ) -> Iterator[tuple[Any, str]]:
        """What each stage at or above ``owner`` answers, the likeliest first; (None, error) where it does not run.

        An answer is remembered for all modules that are equal to this one but for the values of their weights, and for
        the number of the layer where their forward does not compute with it.

        Args:
            product: what the question is about, for the sizes of inputs.
        """
        calls = self._recorded_calls(owner) if recorded_only else self._calls(owner, product)
        for i, (name, call) in enumerate(calls):
            where = owner.removeprefix(name), self._alike(name)
            key = (question, *where, i, call.described(), self._number(name, call, i))
            if key not in self._known:
                stage = self._stage(name, call, i)
                try:
                    self._known[key] = (None, _line(stage)) if isinstance(stage, Exception) else answer(stage)
                except Exception as error:  # any user module may stand here; what it raised is the reason to report
                    self._known[key] = None, _line(error)
            yield self._known[key]

    def _recorded_calls(self, owner: str) -> Iterator[tuple[str, Call]]:
        """(the nearest called module at or above ``owner``, its call drawn anew), of each recording."""
        generator = torch.Generator().manual_seed(0)
        for which in ("recording", "_examples"):  # the second only where the first does not decide
            recording = getattr(self, which)
            for name in _lineage(owner)[:REACH]:
                if recording and name in recording.calls:
                    for call in drawn(recording.calls[name], self.model.get_submodule(name), generator):
                        yield name, call
                    break
            if self.inputs is None:  # both are one
                return

    def _calls(self, owner: str, product: Factorization) -> Iterator[tuple[str, Call]]:
        """Recorded calls, then what the signatures of the module and of the one around it ask for."""
        yield from self._recorded_calls(owner)
        generator, widths = torch.Generator().manual_seed(0), widths_of(product)
        width = product.size()[1]
        rotations = rotations_for(self.model, owner, width)
        if product.family != "qk":  # values are not turned
            rotations.append(a_rotation(width))
        for name in _lineage(owner)[: REACH - 1]:
            module = self.model.get_submodule(name)
            if type(module).forward is nn.Module.forward or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                continue
            inner = next((part.in_features for part in module.modules() if isinstance(part, nn.Linear)), widths[0])
            for sizes in dict.fromkeys((widths, (inner, inner))):  # the second of queries that have a latent
                for call in made_up(module, sizes, rotations, generator, of_scores=product.family == "qk"):
                    yield name, call

    def _number(self, name: str, call: Call, i: int) -> tuple:
        """The number of a layer among its equals, if it gives something else with that of another."""
        module, key = self.model.get_submodule(name), (self._alike(name), i, call.described())
        if key not in self._counting:
            near = {other for owner in self._owners for other in _lineage(owner)[:REACH]}
            kin = {other for other in near if type(self.model.get_submodule(other)) is type(module)}
            others = {numbers(self.model.get_submodule(n)) for n in kin if self._alike(n) == key[0]} - {numbers(module)}
            stage = self._stage(name, call, i) if others and may_count(module) else None
            self._counting[key] = isinstance(stage, Stage) and stage.counts(others)
        return numbers(module) if self._counting[key] else ()

    def _stage(self, name: str, call: Call, i: int) -> Stage | Exception:
        """The stage for the i-th call; one at a time is kept, since a float64 copy of a large module is large."""
        key = name, i, call.described()
        if key not in self._stages:
            self._stages.clear()
            try:
                self._stages[key] = Stage(name, self.model.get_submodule(name), call)
            except Exception as error:  # any user module may stand here
                self._stages[key] = error
        return self._stages[key]


# -- the whole model ---------------------------------------------------------------------------------


def prove(evidence: Evidence, found: Sequence[Found]) -> Verification:
    """Prove what a model is said to use: by replays of its modules, and by changing all products of it at once.

    Three forwards of the model where all hold: as it is, with every product in another basis, and with one side of
    every product so. More only to name what fails.

    Args:
        found: how each product is found in a model of these names.

    Raises:
        ProbeError: The model does not run on the inputs.
    """
    if not found:
        return Verification([])
    model, recording = evidence.model, evidence.recording
    products = [each(model) for each in found]
    dtype = products[0].views[0].parameter.dtype
    tolerance = ROUNDING.get(dtype, COARSE_ROUNDING)
    is_reached = [_is_called(evidence, product) for product in products]
    reached = [product for product, there in zip(products, is_reached, strict=True) if there]

    def moved(some: Sequence[Factorization], sides: Sequence[str]) -> float:
        with new_basis(some, sides):
            return _changed(model, recording)

    change, control = (moved(reached, ("left", "right")), moved(reached, ("left",))) if reached else (0.0, 0.0)
    verdicts = []
    for each, product, there in zip(found, products, is_reached, strict=True):
        if not there:
            verdicts.append(Verdict(product.name, product.kind, None, None, UNREACHED))
            continue
        values, replayed = (change, control), evidence.replayed(each)
        if not change < tolerance * control:  # something fails: is it this one?
            values = moved([product], ("left", "right")), moved([product], ("left",))
        reason = None if values[0] > REFUTED or values[1] > MOVED else UNREACHED
        alone = Verdict(product.name, product.kind, *values, reason, tolerance)
        if not alone.exact and not reason and rounding_alone(model, recording, [product]) > values[0] / JUMP:
            alone = replace(alone, reason=JUMPS)  # of sorted, rounded or drawn values: only the replay can tell
        doubted = alone.reason or (replayed and not replayed.exact)  # or nothing moves, behind weights that are zero
        verdicts.append(replayed if replayed and doubted else alone)
    return Verification(verdicts)


def refuted_by_the_whole(evidence: Evidence, found: Sequence[Found]) -> set[str]:
    """Names of products whose change of basis moves the outputs of the recorded forward; one forward if there are none.

    Layers may differ where no replay looks: in the number of the layer, the values of their arguments, what hooks and
    other modules do with their weights.
    """
    model, products = evidence.model, [each(evidence.model) for each in found]
    recording = evidence.recording if products else None
    if not recording:
        return set()

    def moved(some: Sequence[Factorization]) -> float:
        with new_basis(some):
            return _changed(model, recording)

    allowed = allowed_change(recording, products)
    if moved(products) <= allowed:
        return set()
    alone = {product.name: (product, moved([product])) for product in products}
    suspects = {name: (product, change) for name, (product, change) in alone.items() if change > allowed}
    # where rounding in one of them moves the outputs as far, the model jumps, which refutes none
    jump = max((rounding_alone(model, recording, [product]) for product, _ in suspects.values()), default=0.0)
    return {name for name, (_, change) in suspects.items() if jump < change / JUMP}


def allowed_change(recording: Recording, products: Sequence[Factorization]) -> float:
    """The relative change of outputs by rounding: a loss is in float32 though the weights behind it are not."""
    weights = [parameter for product in products for parameter in product.parameters()]
    return largest_rounding([*recording.output, *weights])


def rounding_alone(model: nn.Module, recording: Recording, products: Sequence[Factorization]) -> float:
    """How far the outputs of a model move when products change by rounding alone: the furthest of some draws."""
    generator, outputs, furthest = torch.Generator().manual_seed(0), outputs_of(model, recording.inputs), 0.0
    for _ in range(DRAWS):
        with new_basis(products, ()):
            for product in products:
                product.write([_rounded(factor, generator) for factor in product.augmented()])
            furthest = max(furthest, *changes(outputs_of(model, recording.inputs), outputs), 0.0)
    return furthest


def _rounded(factor: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.rand(factor.shape, generator=generator).to(factor) * 2 - 1
    return factor * (1 + 2 * torch.finfo(factor.dtype).eps * noise)


def _changed(model: nn.Module, recording: Recording) -> float:
    """The largest relative change of what a model returns."""
    return max(changes(outputs_of(model, recording.inputs), recording.output), default=0.0)


def holders(model: nn.Module, products: Iterable[Factorization]) -> set[str]:
    """Names of the modules that hold the factors of products as parameters of their own."""
    parameters = {parameter for product in products for parameter in product.parameters()}
    return {name for name, module in model.named_modules() if parameters.intersection(module.parameters(recurse=False))}


def _is_called(evidence: Evidence, product: Factorization) -> bool:
    """Whether the module that declares a product was called, or a leaf that holds one of its factors."""
    calls = evidence.recording.calls
    return product.name.rpartition(".")[0] in calls or bool(holders(evidence.model, [product]) & calls.keys())


# ----------------------------------------------------------------------------------------------------


def widths_of(product: Factorization) -> tuple[int, int]:
    """Of what the projections of a product take: the hidden states (or put out, the same width), and their context."""
    first, second = (view().shape[view.outer] for view in product.views[:2])
    return first, second


def declared_at(name: str, model: nn.Module) -> Factorization:
    """The factorization that the module of this name declares."""
    parent, _, child = name.rpartition(".")
    parent = model.get_submodule(parent)
    return getattr(parent, child).factorization(name, parent)


def _lineage(name: str) -> list[str]:
    """A module's name and its ancestors', nearest first."""
    parts = name.split(".") if name else []
    return [".".join(parts[:end]) for end in range(len(parts), -1, -1)]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
