"""`factorize` and its way back, `to_dense`; `summary` tells what is factorized, what is not and why."""

import json
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from .attention import find_attention
from .config import FORMAT_VERSION, FNLConfig
from .factorization import HeadProduct, factorizations
from .heads import HeadLinear, Product, install, swap
from .initialization import initial_factors
from .messages import say


def factorize(model: nn.Module, config: FNLConfig | None = None) -> nn.Module:
    """Make the products of a model's attention heads explicit, initialise them, and return the model.

    In place, and all or nothing: an error leaves the model as it was. At full rank the function of the model does not
    change (beyond rounding); below it, each product becomes its best approximation of that rank, biases included.

    Args:
        model: Any model with softmax attention.
        config: What to factorize and how; ``FNLConfig()`` if not given.

    Raises:
        TypeError: ``config`` is not a `FNLConfig`.
        ValueError: The model is factorized already or quantized, has no attention that fits the config, holds
            non-finite weights, or a rank is above its head_dim.
    """
    config = FNLConfig() if config is None else config
    if not isinstance(config, FNLConfig):
        raise TypeError(f"factorize got a {type(config).__name__} as config, expected a fnl_hf.FNLConfig")
    _refuse_factorized(model)
    products, skipped = plan(model, config)
    if not products:
        raise ValueError(_nothing_found(model, config, skipped))
    factors = []
    for product in products:
        view = _as_found(model, product)
        for factor in view.augmented():
            if not torch.isfinite(factor).all():
                raise ValueError(
                    f"{product.name} holds NaN or infinite weights; load a sound checkpoint before factorizing"
                )
        factors.append(initial_factors(view, product.rank, config.init))
    install(model, products)
    for product, new in zip(products, factors, strict=True):
        _declared(model, product).write(new)
    attach(model, config, products, skipped)
    say(summary(model).headline())
    return model


def plan(model: nn.Module, config: FNLConfig) -> tuple[list[Product], list[dict]]:
    """What ``factorize`` would do: the products with their ranks, and {"name", "kind", "reason"} of what is skipped."""
    products, skipped = [], []
    for site in find_attention(model):
        for product in site.products:
            if product.kind in config.attention:
                products.append(replace(product, rank=config.head_rank_of(site.name, product.left.width)))
        skipped += [
            {"name": site.name, "kind": kind, "reason": reason}
            for kind, reason in site.skipped
            if kind in config.attention
        ]
    return products, skipped


def attach(model: nn.Module, config: FNLConfig, products: list[Product], skipped: list[dict]) -> None:
    """Store the config with its resolved plan where ``save_pretrained`` finds it."""
    resolved = {"products": [product.to_dict() for product in products], "skipped": skipped}
    stored = replace(config, plan=resolved, format_version=FORMAT_VERSION)
    getattr(model, "config", model).quantization_config = stored


def attached(model: nn.Module) -> FNLConfig | None:
    """The config with its plan that ``factorize`` or loading left on a model, if it is factorized."""
    stored = getattr(getattr(model, "config", model), "quantization_config", None)
    return stored if isinstance(stored, FNLConfig) else None


def to_dense(model: nn.Module) -> nn.Module:
    """The plain Hugging Face model of the same function, in place: ordinary layers, ordinary config.

    Raises:
        ValueError: The model is not factorized.
    """
    if not _is_factorized(model):
        raise ValueError(f"{type(model).__name__} is not factorized, there is nothing to make dense")
    swap(model, {leaf: leaf.widened() for leaf in model.modules() if isinstance(leaf, HeadLinear)})
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, HeadProduct):
                delattr(parent, name)
    if attached(model):
        del getattr(model, "config", model).quantization_config
    return model


@dataclass(frozen=True)
class Summary:
    """What `summary` returns: print it, or take ``rows`` and ``skipped`` (lists of dicts) as they are."""

    rows: list[dict]
    skipped: list[dict]
    covered: int  # parameters that belong to a product
    parameters: int

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
        widths = [max(len(row[i]) for row in [head, *table]) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [head, *table]
        ]
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
    products = factorizations(model)
    for product in products:
        left, *_, right = product.factors()
        rows.append(
            {
                "name": product.name,
                "kind": product.kind,
                "heads": declarations[product.name].left.size,
                "rank": left.shape[-1],
                "head_dim": declarations[product.name].head_dim,
                "shapes": f"{tuple(left.shape)} x {tuple(right.shape)}",
                "parameters": left.numel() + right.numel(),
            }
        )
    stored = attached(model)
    skipped = stored.plan["skipped"] if stored else plan(model, FNLConfig())[1]
    covered = {parameter for product in products for parameter in product.parameters()}
    sizes = [sum(parameter.numel() for parameter in some) for some in (covered, model.parameters())]
    return Summary(rows, skipped, *sizes)


# ----------------------------------------------------------------------------------------------------


def _is_factorized(model: nn.Module) -> bool:
    return any(isinstance(module, (HeadProduct, HeadLinear)) for module in model.modules())


def _refuse_factorized(model: nn.Module) -> None:
    if _is_factorized(model):
        raise ValueError("the model is factorized already; call fnl_hf.to_dense(model) before factorizing it anew")
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise ValueError("the model is quantized; factorize the unquantized model")


def _nothing_found(model: nn.Module, config: FNLConfig, skipped: list[dict]) -> str:
    wanted = " and ".join(config.attention) or "nothing (attention=())"
    reasons = "; ".join(sorted({f"{s['kind']}: {s['reason']}" for s in skipped}))
    why = (
        f"skipped {reasons}" if reasons else "no module has query, key, value and output projections that fit together"
    )
    return f"{type(model).__name__} has no product to factorize; asked for {wanted}: {why}"


def _as_found(model: nn.Module, product: Product):
    """The product in a model where nothing is declared yet."""
    declaration = HeadProduct(product.kind, product.left, product.right, product.left.width, product.rotary)
    return declaration.factorization(product.name, model.get_submodule(product.owner))


def _declared(model: nn.Module, product: Product):
    owner = model.get_submodule(product.owner)
    return getattr(owner, product.slot).factorization(product.name, owner)
