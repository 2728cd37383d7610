"""`factorize` and its way back, `to_dense`; `verify` proves what stands in between."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from .config import FORMAT_VERSION, FNLConfig
from .factorization import HeadProduct
from .heads import HeadLinear, Product, install, swap
from .initialization import initial_factors
from .messages import say
from .overview import attached, summary
from .planning import as_declared, nothing_found, plan
from .probe import Recording, Verification


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
        raise ValueError(nothing_found(model, config, skipped))
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


def attach(model: nn.Module, config: FNLConfig, products: list[Product], skipped: list[dict]) -> None:
    """Store the config with its resolved plan where ``save_pretrained`` finds it."""
    resolved = {"products": [product.to_dict() for product in products], "skipped": skipped}
    stored = replace(config, plan=resolved, format_version=FORMAT_VERSION)
    getattr(model, "config", model).quantization_config = stored
    save_under_own_names(model)


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
        declared = [(product.owner, product.name, as_declared(product)) for product in products]
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


@contextmanager
def own_names(model: nn.Module) -> Iterator[None]:
    """Within, ``save_pretrained`` keeps the names of the model's own parameters, whatever checkpoint it came from."""
    conversions = "_weight_conversions"
    submodels = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [vars(module).get(conversions) for module in submodels]
    for module in submodels:
        vars(module)[conversions] = []
    try:
        yield
    finally:
        for module, value in zip(submodels, before, strict=True):
            vars(module)[conversions] = value
            if value is None:
                del vars(module)[conversions]


def to_dense(model: nn.Module) -> nn.Module:
    """The plain Hugging Face model of the same function, in place: ordinary layers, ordinary config.

    Raises:
        ValueError: The model is not factorized, or an unmerged adapter has the width of a compact leaf.
    """
    if not _is_factorized(model):
        raise ValueError(f"{type(model).__name__} is not factorized, there is nothing to make dense")
    for name, module in model.named_modules():
        leaf = getattr(module, "base_layer", None)
        if isinstance(leaf, HeadLinear) and leaf.compact:
            raise ValueError(f"{name} holds an adapter as narrow as its compact leaf: merge or unload adapters first")
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


def _as_found(model: nn.Module, product: Product):
    """The product in a model where nothing is declared yet."""
    return as_declared(product).factorization(product.name, model.get_submodule(product.owner))


def _declared(model: nn.Module, product: Product):
    owner = model.get_submodule(product.owner)
    return getattr(owner, product.slot).factorization(product.name, owner)
