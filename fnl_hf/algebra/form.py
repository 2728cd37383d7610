"""What a form is: the protocol that the modules ``chain`` and ``rotary`` satisfy, and that a further form must."""

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Form(Protocol):
    """How the numbers that a model uses follow from factors that it stores: pure functions of tensors.

    A form is any object with these members; ours are modules (PEP 544). To add one (Tucker, tensor train), write a
    module with these functions and add a few of its factors to the table in tests/test_forms.py, which takes every
    form through the laws that are stated here. Nothing above the algebra asks which form it holds.

    ``factors`` is a sequence of tensors whose meaning is the form's own. All of them have the same number of batch
    dimensions in front, which count the matrices (heads) and broadcast: a factor that a group of heads shares has size
    1 there. "The product" is what the model makes of the factors: a matrix, or for rotary heads the scores at every
    offset of positions. A *gauge* is a change of basis between factors that leaves the product alone.

    Functions return new tensors, of the dtype of the factors that they stand for (``batched`` and ``change_basis``
    may return the factors themselves, and views of them). Sums of squares accumulate in float32 or better, whatever
    the factors' dtype. Where heads of a group share a factor, *batch in what is said of the product is the batch of
    the shared factor: values are those of the group's matrices stacked.
    """

    has_matrix: bool
    """Whether the product is a matrix (or a batch of them), so that ``product`` exists."""

    def product(self, factors: Sequence[Tensor]) -> Tensor:
        """The matrices, (*batch, m, n). For looking at and for tests: nothing in training forms them.

        Raises:
            ValueError: ``has_matrix`` is False.
        """
        ...

    def squared_norm(self, factors: Sequence[Tensor]) -> Tensor:
        """The squared Frobenius norm of the product, summed over the batch: a differentiable scalar.

        Every gauge leaves it alone.
        """
        ...

    def decay_grams(self, factors: Sequence[Tensor]) -> Any:
        """The small sums of squares (Gram matrices, sizes) that every function with ``grams`` works from.

        Opaque outside the form: tensors in nested lists and tuples, possibly with None among them. Zero rows add
        nothing to them.
        """
        ...

    def decay_gradients(self, factors: Sequence[Tensor], grams: Any = None) -> list[Tensor]:
        """The gradients of ½ ``squared_norm``, one per factor, of its shape and dtype.

        Args:
            grams: What ``decay_grams(factors)`` returned, where the caller has it.
        """
        ...

    def add_decay_(
        self, factors: Sequence[Tensor], targets: Sequence[Tensor | None], scales: Sequence[float], grams: Any
    ) -> None:
        """targets_i += scales_i · gradient_i in place, for every target that is not None: the hot path of decay.

        Args:
            factors: As they were when ``grams`` was taken.
            targets: Of the factors' shapes, and possibly the factors themselves: then every gradient is still that of
                the old factors.
            grams: What ``decay_grams(factors)`` returned.
        """
        ...

    def spectrum(self, grams: Any) -> Tensor:
        """Singular values of the product in descending order, (*batch, r), float64.

        Where there is no matrix, what each part contributes to the norm: in either case their squares sum to
        ``squared_norm``. From Grams, so small ones are known to about √ε of the largest only.

        Raises:
            ValueError: The Grams do not determine them (a dense matrix).
        """
        ...

    def singular_values(self, factors: Sequence[Tensor]) -> Tensor:
        """What ``spectrum`` gives, (*batch, r) in descending order, from the factors themselves: all digits right."""
        ...

    def bound(self, grams: Any) -> Tensor:
        """Half the sum of squares of two sides of the product, a scalar: at least the sum of ``spectrum``.

        For two factors ½ (‖U‖² + ‖V‖²), what weight decay on the factors bounds the nuclear norm by. Equal to the
        sum of ``spectrum`` where the factors are balanced.

        Raises:
            ValueError: As ``spectrum``.
        """
        ...

    def imbalance(self, grams: Any) -> Tensor:
        """How far the two sides of the product are from equal, (*batch), from 0 (balanced) to 1.

        Raises:
            ValueError: As ``spectrum``.
        """
        ...

    def stiffness(self, grams: Any, exact: bool = False, moving: Sequence[bool] | None = None) -> Tensor:
        """What rate · stiffness < 1 keeps a decoupled decay step from overshooting, a scalar, or a cheap upper bound.

        At least the largest ratio of a decay gradient's norm to its factor's, so that such a step enlarges no factor.
        Of two factors that is all; a form whose factors' steps compound says by how much more.

        Args:
            exact: Take eigenvalues, where the bound takes traces.
            moving: Which of the factors the step moves, at least one; all if not given. May be ignored: that is safe.
        """
        ...

    def size(self, factors: Sequence[Tensor]) -> tuple[int, int]:
        """(matrices, rank): how many matrices (query heads) the factors hold, and the rank that they give each."""
        ...

    def balance(self, factors: Sequence[Tensor], rank: int | None = None) -> Sequence[Tensor]:
        """Balanced factors of the best approximation of the product at a rank: spectral initialisation.

        Args:
            factors: One factor, a weight by itself, becomes two.
            rank: Not given, the product stays as it is. A form whose rank cannot be reduced ignores it; one factor may
                become two of any rank.

        Raises:
            ValueError: A rank that the factors do not have.
        """
        ...

    def leading(self, factors: Sequence[Tensor], rank: int) -> Sequence[Tensor]:
        """The first ``rank`` features of the factors as they are, copied: what no initialisation leaves.

        Raises:
            ValueError: A rank that the factors do not have.
        """
        ...

    def carry(
        self, before: Sequence[Tensor], after: Sequence[Tensor], moments: Sequence[Tensor], power: int
    ) -> list[Tensor]:
        """An optimizer's moments of factors, carried to the factors that took their place.

        Exact for power 1 wherever the gradient of the product is the same, as after ``balance`` and every gauge.

        Args:
            before, after: The factors, and what ``balance``, ``leading`` or a gauge made of them.
            moments: One per factor of ``before``, of its shape.
            power: 1 for sums of gradients, 2 for sums of their squares, which stay nonnegative.

        Returns:
            One per factor of ``after``, of its shape and of the moments' dtype.

        Raises:
            ValueError: The moments do not determine those of ``after``.
        """
        ...

    def batched(self, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The factors as a user sees them, live wherever strides allow: of a matrix (B, m, r), …, (B, r, n).

        Their matmul is the product; the matrices of a group that shares a factor are stacked, (B, g·m, r).
        """
        ...

    def change_basis(
        self, factors: Sequence[Tensor], generator: torch.Generator, sides: Collection[str] = ("left", "right")
    ) -> list[Tensor]:
        """All factors in a random, well-conditioned gauge, drawn wherever the form has one.

        With both sides the product is unchanged. Of one side alone it changes, which is the control of a proof that
        a model uses these factors as the form says: ``("left",)`` multiplies what is left of each joint between
        factors by its G, ``("right",)`` what is right of it by G⁻¹.

        Args:
            generator: On the CPU. The same state draws the same gauges whatever the sides.

        Raises:
            ValueError: Other names of sides.
        """
        ...
