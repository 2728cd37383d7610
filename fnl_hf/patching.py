"""`factorize` and its way back, `to_dense`; `summary` tells what is factorized, what is not and why."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .attention import find_attention
from .config import FORMAT_VERSION, FNLConfig
from .factorization import HeadProduct, factorizations
from .heads import HeadLinear, Product, install, swap
from .initialization import initial_factors
from .messages import say
from .probe import ProbeError, Recording, Verification, record_examples

KEPT = "a narrower basis does not commute with a rotation, and only the heads of nn.Linear and Conv1D can be narrowed"


def factorize(model: nn.Module, config: FNLConfig | None = None, verify: Mapping | None = None) -> nn.Module:
    """Make the products of a model's attention heads explicit, initialise them, and return the model.

    In place, and all or nothing: an error leaves the model as it was. At full rank the function of the model does not
    change (beyond rounding); below it, each product becomes its best approximation of that rank, biases included.

    Args:
        model: Any model with softmax attention.
        config: What to factorize and how; ``FNLConfig()`` if not given.
        verify: Example inputs, as the model's forward takes them by keyword. Every product is then proven on them
            first, and what fails is skipped. Without them, what structure leaves open is probed on made-up inputs.

    Raises:
        TypeError: ``config`` is not a `FNLConfig`.
        ValueError: The model is factorized already or quantized, has no attention that fits the config, holds
            non-finite weights, or a rank is above its head_dim.
    """
    config = FNLConfig() if config is None else config
    if not isinstance(config, FNLConfig):
        raise TypeError(f"factorize got a {type(config).__name__} as config, expected a fnl_hf.FNLConfig")
    _refuse_factorized(model)
    products, skipped = plan(model, config, verify)
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


def plan(
    model: nn.Module, config: FNLConfig, inputs: Mapping | None = None
) -> tuple[list[Product], list[dict[str, str]]]:
    """What ``factorize`` would do: the products with their ranks, and {"name", "kind", "reason"} of what is skipped.

    Where structure does not decide (fused layouts, rotary positions), or everywhere if ``inputs`` are given, the first
    option of a site that the probe finds exact is taken.
    """
    sites = find_attention(model)
    choices = [(site, slot) for site in sites for slot in config.attention if site.options[slot] or slot in site.doubts]
    probed = [(site, slot) for site, slot in choices if inputs is not None or slot not in site.certain]
    compact = config.head_layout == "compact"
    owners = {option.owner for site, slot in (choices if compact else probed) for option in site.options[slot]}
    recording, obstacle = None, ""
    if owners:
        try:
            recording = record_examples(model, owners) if inputs is None else Recording(model, inputs, owners)
        except ProbeError as error:
            if inputs is not None:
                raise
            obstacle = f"{error}; pass factorize(..., verify=example_inputs) to decide"
    products, skipped, kept = {}, [], []
    for site, slot in choices:
        if (site, slot) in probed:
            product, reason = _probed(recording, site, slot, obstacle)
        else:
            product, reason = site.options[slot][0], None
        if product is None:
            skipped.append({"name": site.name, "kind": slot, "reason": reason})
            continue
        rank = config.head_rank_of(site.name, product.left.width)
        if rank < product.left.width and not _narrows(model, product):
            kept.append(product.kind)
        else:
            product = replace(product, rank=rank)
        products[site.name, slot] = product
    if compact and recording:
        _compact(recording, products)
    products = list(products.values())
    if products and len(kept) == len(products):
        raise ValueError(
            f"head_rank is {config.head_rank}, but every product found ({', '.join(sorted(set(kept)))}) keeps its full "
            f"rank: {KEPT}; leave head_rank at 1.0"
        )
    return products, skipped


def _compact(recording: Recording, products: dict[tuple[str, str], Product]) -> None:
    """Plan really narrower heads for the attention modules where both products agree and a replay proves them."""
    for site in {name for name, _ in products}:
        qk, ov = products.get((site, "qk")), products.get((site, "ov"))
        if qk and ov and qk.rank == ov.rank < qk.left.width == ov.left.width:
            attributes = recording.compact_attributes(qk, ov)
            if attributes is not None:
                products[site, "qk"], products[site, "ov"] = replace(qk, compact=attributes), replace(ov, compact={})


def _narrows(model: nn.Module, product: Product) -> bool:
    """Whether the heads of a product can have a lower rank: not under rotation, and only in ordinary leaves."""
    if product.rotary is not None:
        return False
    sides = (product.left, product.right)
    if any(side.bias and side.bias.rpartition(".")[0] != side.weight.rpartition(".")[0] for side in sides):
        return False  # a bias outside the leaf would keep its old width
    return all(type(_submodule(model, product.leaf(side))) in (nn.Linear, Conv1D) for side in sides)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # a parameter of the attention module itself, such as in_proj_weight
        return None


def _probed(recording, site, slot: str, obstacle: str) -> tuple[Product | None, str | None]:
    """The first option that is exact, or why there is none."""
    verdict = None
    for option in site.options[slot] if recording else ():
        verdict = recording.verdict(option.owner, option.name, _as_declared(option))
        if verdict.exact:
            return option, None
    doubt = site.doubts.get(slot, "")
    if verdict is None:
        return None, "; ".join(filter(None, (doubt, obstacle)))
    return None, verdict.reason or doubt or "something stands between its projections: the output does not follow them"


def attach(model: nn.Module, config: FNLConfig, products: list[Product], skipped: list[dict]) -> None:
    """Store the config with its resolved plan where ``save_pretrained`` finds it."""
    resolved = {"products": [product.to_dict() for product in products], "skipped": skipped}
    stored = replace(config, plan=resolved, format_version=FORMAT_VERSION)
    getattr(model, "config", model).quantization_config = stored
    save_under_own_names(model)


def attached(model: nn.Module) -> FNLConfig | None:
    """The config with its plan that ``factorize`` or loading left on a model, if it is factorized."""
    stored = getattr(getattr(model, "config", model), "quantization_config", None)
    return stored if isinstance(stored, FNLConfig) else None


def verify(model: nn.Module, **example_inputs) -> Verification:
    """Prove, product by product, that a model uses what ``factorizations`` says it uses.

    A random change of basis inside a product must leave its attention's output where it was; the one-sided change must
    move it. A dense model is probed for the products that ``factorize`` would declare.

    Args:
        example_inputs: What the model's forward takes, by keyword.

    Raises:
        ProbeError: The model does not run on these inputs.
    """
    declared = [
        (name, f"{name}.{slot}" if name else slot, child)
        for name, module in model.named_modules()
        for slot, child in module.named_children()
        if isinstance(child, HeadProduct)
    ]
    if not declared:
        products, _ = plan(model, FNLConfig(), example_inputs)
        declared = [(product.owner, product.name, _as_declared(product)) for product in products]
    recording = Recording(model, example_inputs, {owner for owner, *_ in declared})
    return Verification([recording.verdict(*product) for product in declared])


def save_under_own_names(model: nn.Module) -> None:
    """Where heads are narrow, keep ``save_pretrained`` from going back to names of older checkpoints.

    Its conversions fuse, split and permute weights as if all heads had their full width. At full rank they are right.
    """
    if any(isinstance(module, HeadLinear) for module in model.modules()):
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module._weight_conversions = []


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
                for attribute, value in child.wide.items():
                    setattr(parent, attribute, value)
                delattr(parent, name)
    if attached(model):
        del getattr(model, "config", model).quantization_config
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and vars(module).get("_weight_conversions") == []:
            del module._weight_conversions  # what `save_under_own_names` left
    return model


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
        widths = [max(len(row[i]) for row in [head, *table]) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [head, *table]
        ]
        lines += self.notes
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


# ----------------------------------------------------------------------------------------------------


def _is_factorized(model: nn.Module) -> bool:
    return any(isinstance(module, (HeadProduct, HeadLinear)) for module in model.modules())


def _refuse_factorized(model: nn.Module) -> None:
    if _is_factorized(model):
        raise ValueError("the model is factorized already; call fnl_hf.to_dense(model) before factorizing it anew")
    stored = getattr(getattr(model, "config", None), "quantization_config", None)
    # Ours on a dense model is the config of a factorized one, from which `from_config` made a new model.
    if stored is not None and dict(stored)["quant_method"] != "fnl":
        raise ValueError("the model is quantized; factorize the unquantized model")


def _nothing_found(model: nn.Module, config: FNLConfig, skipped: list[dict]) -> str:
    wanted = " and ".join(config.attention) or "nothing (attention=())"
    reasons = "; ".join(sorted({f"{s['kind']}: {s['reason']}" for s in skipped}))
    why = (
        f"skipped {reasons}" if reasons else "no module has query, key, value and output projections that fit together"
    )
    return f"{type(model).__name__} has no product to factorize; asked for {wanted}: {why}"


def _as_declared(product: Product) -> HeadProduct:
    """The declaration of a product at full width."""
    return HeadProduct(product.kind, product.left, product.right, product.left.width, product.rotary)


def _as_found(model: nn.Module, product: Product):
    """The product in a model where nothing is declared yet."""
    return _as_declared(product).factorization(product.name, model.get_submodule(product.owner))


def _declared(model: nn.Module, product: Product):
    owner = model.get_submodule(product.owner)
    return getattr(owner, product.slot).factorization(product.name, owner)
