"""Activations of Gaussian pre-activations: how far σ(a) is from σ(b) on average, in closed form or by quadrature.

Of two zero-mean Gaussians a and b all follows from p = √E[a²], s = E[b²] and c = E[ab]. For a = ⟨w, x⟩ and b = ⟨y, x⟩
with x ~ N(0, I) these are ‖w‖, ‖y‖² and ⟨w, y⟩. Everything here is elementwise in them, and float64.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, Protocol

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

NODES = 32  # of Gauss-Hermite quadrature in each of two directions
NEGLIGIBLE = 1e-13  # weight of a node
ROWS = 1024  # at a time: rows x nodes must fit in the cache
SEARCH = 8  # steps of false position for the best length


class Terms(NamedTuple):
    """E (σ(a) − σ(b))², and its derivatives by s and by c; of the shape of p, s and c."""

    risk: Tensor
    by_square: Tensor
    by_product: Tensor


class Activation(Protocol):
    """An activation as the objective needs it."""

    def __call__(self, x: Tensor) -> Tensor:
        """σ(x)."""
        ...

    def terms(self, p: Tensor, s: Tensor, c: Tensor) -> Terms:
        """The mean squared difference and its derivatives, without autograd: finite for parallel a and b too."""
        ...

    def length(self, p: Tensor, rho: Tensor) -> Tensor:
        """The best √s for given p and correlation ρ ≥ 0."""
        ...


class Relu:
    """In closed form: E[relu(a) relu(b)] = ½ p q h(ρ), the arc-cosine kernel of order 1 (Cho and Saul, 2009)."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def terms(self, p: Tensor, s: Tensor, c: Tensor) -> Terms:
        """½ p² + ½ s − p √s h(ρ), and its derivatives: ½ − p sin θ / (2π √s), and −(π − θ)/π with cos θ = ρ."""
        q = s.clamp_min(0).sqrt()
        rho = correlation(p * q, c)
        sine, angle = _sine_and_angle(rho)
        by_square = 0.5 - p * sine / (2 * math.pi * torch.where(q > 0, q, 1))
        by_square = torch.where(q > 0, by_square, 0)  # there it has no derivative; a row of zeros stays one
        return Terms(0.5 * p.square() + 0.5 * s - p * q * arc_cosine(rho), by_square, angle / math.pi - 1)

    def length(self, p: Tensor, rho: Tensor) -> Tensor:
        return p * arc_cosine(rho)


class Smooth:
    """A smooth activation, by Gauss-Hermite quadrature in two dimensions.

    The derivatives are those of Gaussian expectations, ∂E f(a, b)/∂c = E ∂²f/∂a∂b and ∂E f/∂s = ½ E ∂²f/∂b² (Price,
    1958), so that nothing is divided by √(1 − ρ²). For GELU the risk is right to 1e-9 up to p = 1. Above, where σ
    bends between two nodes, it is to 1e-4 at 2 and to a hundredth from 4 on; of nearly parallel rows (ρ > 0.9), whose
    risk is small itself, to 1e-3 and to a tenth.

    Args:
        derivatives: x -> σ(x), σ'(x) and σ''(x).
        nodes: in each direction.
    """

    def __init__(self, derivatives: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], nodes: int = NODES):
        self.derivatives, self.nodes = derivatives, nodes

    def __call__(self, x: Tensor) -> Tensor:
        return self.derivatives(x)[0]

    def terms(self, p: Tensor, s: Tensor, c: Tensor) -> Terms:
        parts = zip(*(each.flatten().split(ROWS) for each in (p, s, c)), strict=True)
        several = [self._terms(*part) for part in parts]
        return Terms(*(torch.cat(each).view_as(p) for each in zip(*several, strict=True)))

    def _terms(self, p: Tensor, s: Tensor, c: Tensor) -> Terms:
        q = s.clamp_min(0).sqrt()
        rho = correlation(p * q, c)
        first, second, weights = (each.to(p) for each in _nodes(self.nodes))
        a = p[:, None] * first  # (rows, nodes)
        b = q[:, None] * (rho[:, None] * first + (1 - rho.square()).clamp_min(0).sqrt()[:, None] * second)
        (of_a, slope_of_a, _), (of_b, slope, curvature) = self.derivatives(a), self.derivatives(b)
        difference = of_b - of_a
        return Terms(
            difference.square() @ weights,
            (slope.square() + difference * curvature) @ weights,
            (slope_of_a * slope) @ weights * -2,
        )

    def length(self, p: Tensor, rho: Tensor) -> Tensor:
        """By false position between ‖w‖ρ, the best one of a linear function, and ‖w‖; the better of this and the first.

        The derivative by the length q = √s at a fixed direction is 2q ∂/∂s + pρ ∂/∂c.
        """

        def slope(q: Tensor) -> Tensor:
            terms = self.terms(p, q.square(), q * rho * p)
            return 2 * q * terms.by_square + rho * p * terms.by_product

        linear = rho * p
        low, high = linear.clone(), p.clone()
        at_low, at_high = slope(low), slope(high)
        brackets = (at_low < 0) & (at_high > 0)
        for _ in range(SEARCH):
            q = torch.where(brackets, (low * at_high - high * at_low) / (at_high - at_low), linear)
            at = slope(q)
            below = at < 0
            # Illinois: an end that stays twice counts half
            at_high = torch.where(below & brackets, at_high * 0.5, at_high)
            at_low = torch.where(~below & brackets, at_low * 0.5, at_low)
            low, at_low = torch.where(below, q, low), torch.where(below, at, at_low)
            high, at_high = torch.where(below, high, q), torch.where(below, at_high, at)
        before, after = (self.terms(p, each.square(), each * linear).risk for each in (linear, q))
        return torch.where(after < before, q, linear)


def _gelu(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    below = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    density = torch.exp(x.square() / -2) / math.sqrt(2 * math.pi)
    return x * below, below + x * density, density * (2 - x.square())


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    tanh = torch.tanh(scale * (x + cubic * x**3))
    slope = scale * (1 + 3 * cubic * x.square())
    rest = 1 - tanh.square()
    curvature = rest * (slope + x * (3 * scale * cubic * x - tanh * slope.square()))
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh + x * rest * slope), curvature


def _swish(beta: float) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """x · sigmoid(βx): SiLU is that of β = 1."""

    def derivatives(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate = torch.sigmoid(beta * x)
        slope = beta * gate * (1 - gate)
        return x * gate, gate + x * slope, slope * (2 + beta * x * (1 - 2 * gate))

    return derivatives


ACTIVATIONS: dict[str, Activation] = {
    "relu": Relu(),
    "gelu": Smooth(_gelu),
    "gelu_tanh": Smooth(_gelu_tanh),
    "quick_gelu": Smooth(_swish(1.702)),
    "silu": Smooth(_swish(1.0)),
}


def activation_named(name: str) -> Activation:
    """Raises a ValueError for one that is not known."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}, expected one of {tuple(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def arc_cosine(rho: Tensor) -> Tensor:
    """h(ρ) = (√(1 − ρ²) + (π − arccos ρ) ρ)/π: from h(−1) = 0 through h(0) = 1/π to h(1) = 1."""
    sine, angle = _sine_and_angle(rho)
    return (sine + (math.pi - angle) * rho) / math.pi


def correlation(lengths: Tensor, products: Tensor) -> Tensor:
    """c/(pq), within [−1, 1]; zero where a length is."""
    return (products / torch.where(lengths > 0, lengths, 1)).clamp(-1, 1) * (lengths > 0)


def _sine_and_angle(rho: Tensor) -> tuple[Tensor, Tensor]:
    sine = ((1 - rho) * (1 + rho)).clamp_min(0).sqrt()
    return sine, torch.atan2(sine, rho)


@cache
def _nodes(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes of two independent standard Gaussians, and their weights, without those of no weight."""
    nodes, weights = (torch.from_numpy(each) for each in numpy.polynomial.hermite_e.hermegauss(count))
    weights = torch.outer(weights, weights) / weights.sum() ** 2
    kept = weights > NEGLIGIBLE
    first, second = torch.meshgrid(nodes, nodes, indexing="ij")
    return first[kept], second[kept], weights[kept]
