"""`factorize` and its way back, `to_dense`; `verify` proves what stands in between."""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import nn

from .calibration import moments
from .config import CALIBRATED, FNLConfig
from .factorization import Declares, FactorLeaf, declared, factorizations, is_factorized, parameter_counts, swap
from .initialization import initial_factors
from .messages import say
from .plan import Plan, attach, detach, headline
from .planning import nothing_found, plan
from .proof import Recording, Verification
from .saving import forget_plans, own_configs, save_under_any_names, save_under_own_names


def factorize(
    model: nn.Module,
    config: FNLConfig | None = None,
    verify: Mapping | None = None,
    calibration: Iterable[Mapping] | None = None,
) -> nn.Module:
    """Make the products of a model explicit, initialise them, and return the model.

    In place, and all or nothing: an error leaves the model as it was. At full rank the function of the model does not
    change (beyond rounding); below it, each product becomes its best approximation of that rank, biases included.

    Args:
        model: Any model with softmax attention.
        config: What to factorize and how; ``FNLConfig()`` if not given.
        verify: Example inputs, as the model's forward takes them by keyword. Every product is then proven on them
            first, and what fails is skipped. Without them, what structure leaves open is probed on made-up inputs.
        calibration: Batches, each a dict of the forward's inputs, for an ``init`` that looks at data; padding
            (``attention_mask``) is left out.

    Raises:
        TypeError: ``config`` is not a `FNLConfig`.
        ValueError: The model is factorized already or quantized, has nothing that fits the config, holds non-finite
            weights, or a rank is too high; ``calibration`` is given to an ``init`` that takes none, or is missing.
    """
    config = FNLConfig() if config is None else config
    if not isinstance(config, FNLConfig):
        raise TypeError(f"factorize got a {type(config).__name__} as config, expected a fnl_hf.FNLConfig")
    if (calibration is not None) != (config.init in CALIBRATED):
        raise ValueError(
            f"init={config.init!r} looks at data: pass factorize(..., calibration=batches of model inputs)"
            if calibration is None
            else f"init={config.init!r} does not look at data: drop calibration"
        )
    _refuse_factorized(model)
    planned = plan(model, config, verify)
    if not planned.targets:
        raise ValueError(nothing_found(model, config, planned))
    sides = moments(model, planned.targets, calibration) if calibration is not None else {}
    factors = {}
    for target in planned.targets:
        product = target.found(model)
        for factor in product.augmented():
            if not torch.isfinite(factor).all():
                raise ValueError(
                    f"{target.name} holds NaN or infinite weights; load a sound checkpoint before factorizing"
                )
        factors[target.name] = initial_factors(product, target.rank, config.init, sides.get(target.name))
    install(model, config, planned)
    for product in declared(model):
        product.write(factors[product.name])
    products = factorizations(model)
    sizes = [(product.kind, *product.size()) for product in products]
    say(headline(sizes, *parameter_counts(model, products), len(planned.skipped)))
    return model


def install(model: nn.Module, config: FNLConfig, planned: Plan) -> None:
    """Give a dense model the layers and declarations of a plan; the values of their factors are still to be written.

    Its config becomes a copy of what it was, which it shares with no other model.
    """
    own_configs(model)
    planned.install(model)
    forget_plans(model)
    attach(model, config, planned)
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
    products = {product.name: (product.kind, partial(_declared_at, product.name)) for product in declared(model)}
    if not products:
        targets = plan(model, FNLConfig(), example_inputs).targets
        products = {target.name: (target.kind, target.found) for target in targets}
    recording = Recording(model, example_inputs, {name.rpartition(".")[0] for name in products})
    return Verification([recording.verdict(name, *product) for name, product in products.items()])


def to_dense(model: nn.Module) -> nn.Module:
    """The plain Hugging Face model of the same function, in place: ordinary layers, ordinary config.

    Raises:
        ValueError: The model is not factorized, or an unmerged adapter has the width of a compact leaf.
    """
    if not is_factorized(model):
        raise ValueError(f"{type(model).__name__} is not factorized, there is nothing to make dense")
    for name, module in model.named_modules():
        leaf = getattr(module, "base_layer", None)
        if isinstance(leaf, FactorLeaf) and leaf.compact:
            raise ValueError(f"{name} holds an adapter as narrow as its compact leaf: merge or unload adapters first")
    swap(model, {leaf: leaf.dense() for leaf in model.modules() if isinstance(leaf, FactorLeaf)})
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Declares):
                child.withdraw(parent)
                delattr(parent, name)
    own_configs(model)
    forget_plans(model)
    detach(model)
    save_under_any_names(model)
    return model


# ----------------------------------------------------------------------------------------------------


def _refuse_factorized(model: nn.Module) -> None:
    if is_factorized(model):
        raise ValueError("the model is factorized already; call fnl_hf.to_dense(model) before factorizing it anew")
    stored = getattr(getattr(model, "config", None), "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    # Ours on a dense model is the config of a factorized one, from which `from_config` made a new model.
    if stored is not None and method != "fnl":
        raise ValueError("the model is quantized; factorize the unquantized model")


def _declared_at(name: str, model: nn.Module):
    parent, _, child = name.rpartition(".")
    parent = model.get_submodule(parent)
    return getattr(parent, child).factorization(name, parent)
