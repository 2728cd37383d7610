"""Spectron: factors move in the metric of their product, by steps whose spectral norm is bounded.

AdamW moves U and V, and how far U Vᵀ then moves depends on how large they are. Here every hidden matrix, a product or
a dense one, moves by at most η in spectral norm: a dense one by its momentum's polar factor (Jordan et al., *Muon*,
2024), both factors of a product by theirs, with one ρ in front that bounds what the two together do to the product.
Everything else is stepped by AdamW.
"""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from .algebra import chain
from .algebra.polar import orthogonalized, spectral_norms
from .factorization import Factorization
from .messages import aligned
from .optim import evaluated
from .sharding import own_rows

FACTOR_LR = 0.03
# How far a dense matrix moves, of η. ρ bounds the two halves of a product's step as if they added up; they seldom do.
OF_DENSE = 0.4
_WAYS = ("adamw", "spectron", "muon")
_AT_ONCE = 2**25  # entries of matrices of one shape that are orthogonalized together


def bounded_steps(directions: Sequence[Tensor], norms: Sequence[Tensor], bound: float) -> tuple[Tensor, Tensor]:
    """ΔU = −ρ O_U and ΔV = −ρ O_V with ρ = bound / (‖U‖₂ + ‖V‖₂ + 1), for a batch of products U Vᵀ.

    With ‖O‖₂ ≤ 1 and ρ ≤ 1 the product moves by ‖U ΔVᵀ + ΔU Vᵀ + ΔU ΔVᵀ‖₂ ≤ ρ (‖U‖₂ + ‖V‖₂ + ρ) ≤ bound.

    Args:
        directions: O_U (B, m, r) and O_V (B, n, r), the momenta's polar factors.
        norms: ‖U‖₂ and ‖V‖₂, (B, 1, 1).
        bound: η.
    """
    rho = bound / (norms[0] + norms[1] + 1)
    return -rho * directions[0], -rho * directions[1]


class Spectron(Optimizer):
    """Steps of bounded spectral norm on hidden matrices and on products of two factors, AdamW on everything else.

    M ← μ M + (1 − μ) g and D = μ M + (1 − μ) g of every matrix and factor, O = polar(D) by Newton-Schulz. Then
    U ← U − ρ O_U and V ← V − ρ O_V with ρ = η / (‖U‖₂ + ‖V‖₂ + 1): U Vᵀ moves by at most η (by 1.5 η at most where
    Newton-Schulz leaves singular values of 1.2). A dense matrix moves by 0.4 η O. Weight decay is decoupled:
    p ← p (1 − lr λ) before.

    Every group of parameters becomes one for each of the three methods, some of them empty. Their ``lr`` is the bound η
    where ``method`` is "spectron" or "muon", so that a schedule scales all rates alike; it is the group's own
    ``factor_lr``, or ``factor_lr`` times what the group's ``lr`` is of ``lr``.

    Of a product with a factor that is frozen, or got no gradient, the other one alone moves, by as much.

    Args:
        params: parameters, or groups of them; with their names or without.
        products: gives the factorizations of the model as it is now. Those of two factors that both train, in
            parameters that hold nothing else, are stepped as products: each head as its own, heads that share a
            factor as their stacked matrix. Embeddings are not: few of their rows get a gradient in a step.
        matrices: dense weights (m, n) inside the layers; those that a product reads are left out.
        factor_lr: η, below 1.

    Raises:
        ValueError: A rate, momentum or weight decay out of range.
    """

    def __init__(
        self,
        params: Iterable,
        products: Callable[[], Sequence[Factorization]] = tuple,
        matrices: Iterable[nn.Parameter] = (),
        lr: float = 1e-3,
        factor_lr: float = FACTOR_LR,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fused: bool | None = None,
    ):
        if not 0 <= factor_lr < 1 or not 0 <= momentum < 1:
            raise ValueError(f"factor_lr {factor_lr}, momentum {momentum}: expected at least 0 and below 1")
        if weight_decay < 0:
            raise ValueError(f"weight_decay {weight_decay}: expected at least 0")
        groups = list(params)
        groups = groups if groups and isinstance(groups[0], dict) else [{"params": groups}]
        groups = [{**group, "params": _without_names(group["params"])} for group in groups]
        now = products()
        method_of = dict.fromkeys((p for p in matrices if min(p.shape) > 1), "muon")  # a row has no spectrum
        method_of |= dict.fromkeys((p for product in now for p in product.parameters()), "adamw")
        held = {p for group in groups for p in group["params"]}
        method_of |= dict.fromkeys((p for product in _steppable(now, held) for p in product.parameters()), "spectron")
        self.products = products
        self._adamw = AdamW([nn.Parameter(torch.zeros(1))], lr=lr, betas=betas, eps=eps, fused=fused)
        self._resolved: tuple[list[nn.Parameter], list[_Product]] = [], []
        super().__init__(
            [
                {**group, "params": some, "method": method}
                | ({} if method == "adamw" else {"lr": _factor_rate(group, lr, factor_lr)})
                for method in _WAYS
                for group in groups
                for some in [[p for p in group["params"] if method_of.get(p, "adamw") == method]]
            ],
            {**self._adamw.defaults, "weight_decay": weight_decay, "momentum": momentum},
        )

    @torch.no_grad()
    def step(self, closure=None):
        """One update; ``closure`` re-evaluates the loss, as in every torch optimizer."""
        loss = evaluated(closure)
        directions, bounds = self._directions()
        products = [product for product in self._products() if any(p in directions for p in product.parameters)]
        dense = [p for g in self.param_groups if g["method"] == "muon" for p in g["params"] if p in directions]
        sides = [side for product in products for side in product.sides(lambda p: _or_zeros(directions, p))]
        polar = _in_batches(orthogonalized, [*sides, *(_whole(directions[p])[None] for p in dense)])
        norms = self._norms(products)
        for i, product in enumerate(products):
            pair = slice(2 * i, 2 * i + 2)
            bound = next(bounds[p] for p in product.parameters if p in bounds)
            product.add_(bounded_steps(polar[pair], norms[pair], bound), directions)
        for parameter, direction in zip(dense, polar[2 * len(products) :], strict=True):
            _add_(parameter, direction * (-OF_DENSE * bounds[parameter]))
        self._step_others()
        return loss

    def table(self) -> str:
        """Which parameters are moved how: a line for each way."""
        rows = []
        for way, what in zip(_WAYS, ("everything else", "factors of products", "dense matrices"), strict=True):
            moved = [p for group in self.param_groups if group["method"] == way for p in group["params"]]
            of = OF_DENSE if way == "muon" else 1  # as far as it moves
            rates = {
                of * group.get("initial_lr", group["lr"])
                for group in self.param_groups
                if group["method"] == way and group["params"]
            }
            rate = " to ".join(f"{rate:g}" for rate in sorted({min(rates, default=0.0), max(rates, default=0.0)}))
            numbers = f"{len(moved)}", f"{sum(p.numel() for p in moved):,}", rate
            rows.append((way, what, *numbers))
        return "fnl_hf: what is stepped how\n" + aligned(
            [("optimizer", "of", "tensors", "parameters", "rate"), *(row for row in rows if row[2] != "0")]
        )

    def add_param_group(self, param_group: dict) -> None:
        """As in `Optimizer`; what is added later is stepped by AdamW."""
        super().add_param_group({"method": "adamw"} | param_group)

    def __getstate__(self):
        raise TypeError(
            "a Spectron cannot be copied or pickled, since it asks one model for its products: make a new one for the "
            "copy, and load_state_dict(optimizer.state_dict())"
        )

    def _directions(self) -> tuple[dict[nn.Parameter, Tensor], dict[nn.Parameter, float]]:
        """(D, and η now) of every parameter that moves in bounded steps; its weights decay here."""
        directions, bounds = {}, {}
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None] if group["method"] != "adamw" else []
            if not moving:
                continue
            gradients = [p.grad for p in moving]
            for p in moving:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            averages = [self.state[p]["exp_avg"] for p in moving]
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            directions |= zip(moving, torch._foreach_lerp(gradients, averages, group["momentum"]), strict=True)
            bounds |= dict.fromkeys(moving, group["lr"])
            if group["weight_decay"]:
                torch._foreach_mul_(moving, 1 - group["lr"] * group["weight_decay"])
        return directions, bounds

    def _products(self) -> list["_Product"]:
        """What is stepped as a product, found again only where parameters were replaced (as FSDP replaces them)."""
        held = [p for group in self.param_groups if group["method"] == "spectron" for p in group["params"]]
        known, products = self._resolved
        if len(known) != len(held) or any(a is not b for a, b in zip(known, held, strict=True)):
            products = [_Product(product) for product in _steppable(self.products(), set(held))]
            if lost := set(held).difference(p for product in products for p in product.parameters):
                raise RuntimeError(
                    f"{len(lost)} parameters that were factors when this optimizer was made are in no product of the "
                    "model now: make a new one, for the parameters that the model has"
                )
            self._resolved = held, products
        return products

    def _norms(self, products: Sequence["_Product"]) -> list[Tensor]:
        """Spectral norms (B, 1, 1) of all sides, by one power iteration from where the last step left them."""
        sides = [side for product in products for side in product.sides()]
        keys = [(view.parameter, f"vector_{view.offset}") for product in products for view in product.views]
        vectors = [self.state[parameter].get(key) for parameter, key in keys]
        found = _in_batches(spectral_norms, sides, vectors)
        for (parameter, key), (_, vector) in zip(keys, found, strict=True):
            self.state[parameter][key] = vector.to(parameter.dtype)  # as a checkpoint keeps it
        return [norm for norm, _ in found]

    def _step_others(self) -> None:
        inner = self._adamw
        inner.param_groups = [group for group in self.param_groups if group["method"] == "adamw"]
        for group in inner.param_groups:
            for parameter in group["params"]:
                if "exp_avg_sq" not in self.state.get(parameter, {"exp_avg_sq": None}):  # it was moved in bounded steps
                    del self.state[parameter]
        inner.state = self.state
        inner.step()


class _Product:
    """A product of two factors, resolved: what it reads, and as which matrices."""

    def __init__(self, product: Factorization):
        self.views, self.form = product.views, product.form
        self.parameters = product.parameters()

    def sides(self, of: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter) -> tuple[Tensor, Tensor]:
        """U (B, m, r) and V (B, n, r), or what else is shaped like their parameters."""
        left, right = self.form.batched([view.read(_whole(of(view.parameter))) for view in self.views])
        return left, right.mT

    def add_(self, steps: tuple[Tensor, Tensor], moving: Container[nn.Parameter]) -> None:
        for view, step in zip(self.views, (steps[0], steps[1].mT), strict=True):
            if view.parameter in moving:
                _add_(view.parameter, step, view.read)


def _steppable(products: Sequence[Factorization], held: set[nn.Parameter]) -> list[Factorization]:
    """Those that can be stepped as products: of two factors, in parameters that are held and hold nothing else."""
    readers = Counter((view.parameter, view.offset) for product in products for view in product.views)
    chosen = [
        product
        for product in products
        if product.form is chain and len(product.views) == 2 and product.family != "embedding"
    ]
    while True:
        read = Counter()
        for product in chosen:
            for view in product.views:
                read[view.parameter] += view.read(torch.empty(view.parameter.shape, device="meta")).numel()
        kept = [
            product
            for product in chosen
            if all(
                view.parameter in held
                and readers[view.parameter, view.offset] == 1
                and read[view.parameter] == view.parameter.numel()
                for view in product.views
            )
        ]
        if len(kept) == len(chosen):
            return kept
        chosen = kept  # what is left out may have read the rest of another one's parameter


def _without_names(params: Iterable[nn.Parameter | tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    return [each[1] if isinstance(each, tuple) else each for each in params]


def _factor_rate(group: dict, lr: float, factor_lr: float) -> float:
    """η of a group of parameters."""
    if "factor_lr" in group:
        return group["factor_lr"]
    return factor_lr * group["lr"] / lr if "lr" in group and lr else factor_lr


def _or_zeros(directions: dict[nn.Parameter, Tensor], parameter: nn.Parameter) -> Tensor:
    return directions[parameter] if parameter in directions else torch.zeros_like(parameter)


def _in_batches(function: Callable, matrices: Sequence[Tensor], *others: Sequence[Tensor | None]) -> list:
    """What a function of batches gives for each of many matrices (B, m, n), those of one shape taken together.

    Args:
        others: further arguments, one for each matrix or None.
    """
    alike: dict[tuple, list[list[int]]] = {}
    for i, matrix in enumerate(matrices):
        key = (matrix.shape[1:], matrix.dtype, matrix.device, *(other[i] is None for other in others))
        parts = alike.setdefault(key, [[]])
        if parts[-1] and sum(matrices[j].numel() for j in parts[-1]) + matrix.numel() > _AT_ONCE:
            parts.append([])
        parts[-1].append(i)
    results = [None] * len(matrices)
    for part in (part for parts in alike.values() for part in parts):
        columns = [[column[i] for i in part] for column in (matrices, *others)]
        found = function(*(None if column[0] is None else torch.cat(column) for column in columns))
        sizes = [len(matrices[i]) for i in part]
        several = isinstance(found, tuple)
        pieces = zip(*(piece.split(sizes) for piece in found), strict=True) if several else found.split(sizes)
        for i, piece in zip(part, pieces, strict=True):
            results[i] = piece
    return results


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _add_(parameter: nn.Parameter, step: Tensor, read: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
    """Add to what is read of a parameter; of a sharded one to the process's own rows."""
    if not isinstance(parameter, DTensor):
        part = read(parameter)
        part.add_(step.reshape(part.shape))
        return
    whole = step.new_zeros(parameter.shape)
    part = read(whole)
    part.copy_(step.reshape(part.shape))
    parameter.to_local().add_(whole[own_rows(parameter)])
