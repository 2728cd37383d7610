"""`summary`: the table of what is factorized, what is not, and why."""

import json
from dataclasses import asdict, dataclass

from torch import nn

from .attachment import attached
from .config import FNLConfig
from .factorization import FactorLeaf, factorizations, parameter_counts
from .messages import aligned
from .plan import FAMILIES, Plan, headline
from .planning import plan


@dataclass(frozen=True)
class Summary:
    """What `summary` returns: print it, or take ``rows`` and ``skipped`` (lists of dicts) as they are."""

    rows: list[dict]
    skipped: list[dict]
    covered: int  # parameters that belong to a product
    parameters: int
    notes: list[str]

    def headline(self) -> str:
        """One line: how many products of which kind, what they cover, how much was skipped."""
        sizes = [(row["kind"], row["heads"], row["rank"]) for row in self.rows]
        return headline(sizes, self.covered, self.parameters, len(self.skipped))

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        head = ("name", "kind", "heads", "rank", "left x right", "parameters")
        table = [
            (
                r["name"], r["kind"], str(r["heads"]), f"{r['rank']}/{r['head_dim']}", r["shapes"],
                f"{r['parameters']:,}{'' if r['saves'] else ' (saves nothing)'}",
            )
            for r in self.rows
        ]  # fmt: skip
        lines = [aligned([head, *table]), *self.notes]
        lines += [f"skipped {s['name']} {s['kind']}: {s['reason']}" for s in self.skipped]
        if self.rows or not self.notes:  # notes alone: all that is left is in its inference form
            lines.append(self.headline() if self.rows else "not factorized")
        return "\n".join(lines)

    __repr__ = __str__


def summary(model: nn.Module) -> Summary:
    """The table of a factorized model; for a dense one, what would be skipped, and why."""
    products, stored = factorizations(model), attached(model)
    rows = []
    for product in products:
        (heads, rank), tensors = product.size(), product.factors()
        parameters = sum(tensor.numel() for tensor in tensors)
        is_layer = isinstance(model.get_submodule(product.name), FactorLeaf)
        rows.append(
            {
                "name": product.name,
                "kind": product.kind,
                "heads": heads,
                "rank": rank,
                "head_dim": product.full_rank or rank,
                "layout": product.layout,
                "shapes": " x ".join(str(tuple(tensor.shape)) for tensor in tensors),
                "parameters": parameters,
                "saves": not is_layer or parameters < tensors[0].shape[-2] * tensors[-1].shape[-1],
            }
        )
    planned = Plan.of(stored) if stored else Plan((), plan(model, FNLConfig()).skipped)
    notes = planned.told(stored) if stored else []
    for family in FAMILIES.values() if stored else ():
        kinds = {target.kind for target in planned.targets if type(target) is family.target}
        notes += family.target.notes(stored, [product for product in products if product.kind in kinds])
    return Summary(rows, [asdict(skip) for skip in planned.skipped], *parameter_counts(model, products), notes)
