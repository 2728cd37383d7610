"""What batches of a model's inputs say of its products."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from .curvature import curvatures
from .moments import moments
from .plan import Target


class Calibration:
    """Batches, and what they say of the products of a dense model, each of which is looked at once."""

    def __init__(self, model: nn.Module, batches: Iterable[Mapping[str, object]]):
        self.model = model
        self.batches = batches if isinstance(batches, Mapping) else list(batches)  # they are run several times
        self._sides: dict[tuple, tuple[Tensor | None, ...]] = {}
        self._curvatures: dict[tuple, tuple[Tensor, ...]] = {}
        self._looked_at: set[str] = set()
        self._felt: set[str] = set()

    def of(self, targets: Sequence[Target]) -> dict[tuple, tuple[Tensor | None, ...]]:
        """``Factorization.weights`` -> moments of its inputs, those of all layers that are tied together."""
        new = [target for target in targets if target.name not in self._looked_at]
        found = moments(self.model, new, self.batches, True) if new else {}
        for target in new:
            product, own = target.found(self.model), found[target.name]
            self._sides[product.weights] = own + (self._sides.get(product.weights, ()) if product.lone else ())
        self._looked_at.update(found)
        return self._sides

    def curvatures(self, targets: Sequence[Target]) -> dict[tuple, tuple[Tensor, ...]]:
        """``Factorization.weights`` -> curvatures of the loss by its outputs, those of all layers that are tied."""
        new = [target for target in targets if target.name not in self._felt]
        found = curvatures(self.model, new, self.batches) if new else {}
        for target in new:
            key, own = target.found(self.model).weights, found[target.name]
            self._curvatures[key] = self._curvatures.get(key, ()) + (() if own is None else (own,))
        self._felt.update(found)
        return self._curvatures
