"""`summary`: the table of what is factorized, what is not, and why."""

import json
from dataclasses import asdict, dataclass

from torch import nn

from .config import FNLConfig
from .factorization import HeadProduct, factorizations
from .heads import Product
from .messages import aligned
from .planning import KEPT, plan


def attached(model: nn.Module) -> FNLConfig | None:
    """The config with its plan that ``factorize`` or loading left on a model, if it is factorized."""
    stored = getattr(getattr(model, "config", model), "quantization_config", None)
    return stored if isinstance(stored, FNLConfig) else None


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
        kinds = {
            kind: [row for row in self.rows if row["kind"] == kind]
            for kind in dict.fromkeys(r["kind"] for r in self.rows)
        }
        parts = []
        for kind, rows in kinds.items():
            ranks = sorted({row["rank"] for row in rows})
            span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"
            parts.append(f"{sum(row['heads'] for row in rows)} {kind} in {len(rows)} modules ({span})")
        line = f"fnl_hf: factorized {', '.join(parts)}; {self.covered:,} of {self.parameters:,} parameters"
        return line + (f"; {len(self.skipped)} skipped, see fnl_hf.summary(model)" if self.skipped else "")

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        head = ("name", "kind", "heads", "rank", "left x right", "parameters")
        table = [
            (r["name"], r["kind"], str(r["heads"]), f"{r['rank']}/{r['head_dim']}", r["shapes"], f"{r['parameters']:,}")
            for r in self.rows
        ]
        lines = [aligned([head, *table]), *self.notes]
        lines += [f"skipped {s['name']} {s['kind']}: {s['reason']}" for s in self.skipped]
        return "\n".join([*lines, self.headline() if self.rows else "not factorized"])

    __repr__ = __str__


def summary(model: nn.Module) -> Summary:
    """The table of a factorized model; for a dense one, which attention would be skipped, and why."""
    rows = []
    declarations = {
        f"{name}.{child_name}" if name else child_name: child
        for name, module in model.named_modules()
        for child_name, child in module.named_children()
        if isinstance(child, HeadProduct)
    }
    products, stored = factorizations(model), attached(model)
    planned = [Product.from_dict(entry) for entry in stored.plan["products"]] if stored else []
    layouts = {product.name: "compact" for product in planned if product.compact is not None}
    for product in products:
        declaration, tensors = declarations[product.name], product.factors()
        rows.append(
            {
                "name": product.name,
                "kind": product.kind,
                "heads": declaration.left.size,
                "rank": declaration.left.width,
                "head_dim": declaration.head_dim,
                "layout": layouts.get(product.name, "padded"),
                "shapes": " x ".join(str(tuple(tensor.shape)) for tensor in tensors),
                "parameters": sum(tensor.numel() for tensor in tensors),
            }
        )
    skipped = stored.plan["skipped"] if stored else plan(model, FNLConfig())[1]
    covered = {parameter for product in products for parameter in product.parameters()}
    sizes = [sum(parameter.numel() for parameter in some) for some in (covered, model.parameters())]
    full = [row["kind"] for row in rows if row["rank"] == row["head_dim"]]
    notes = []
    if stored is not None and stored.head_rank != 1.0 and full:
        notes = [f"{len(full)} products keep their full rank ({', '.join(sorted(set(full)))}): {KEPT}"]
    if stored is not None and stored.head_layout == "compact":
        padded = sum(row["layout"] == "padded" for row in rows)
        notes.append(f"{len(rows) - padded} products are compact, {padded} padded: not proven equal at a smaller width")
    return Summary(rows, skipped, *sizes, notes)
