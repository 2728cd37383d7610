"""`factorize` and its way back, `to_dense`; `verify` proves what stands in between."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from .calibration import moments
from .config import CALIBRATED, FNLConfig
from .factorization import Declares, FactorLeaf, declared, factorizations, is_factorized, parameter_counts, swap
from .initialization import initial_factors
from .messages import say
from .plan import Plan, attach, attached, headline
from .planning import nothing_found, plan
from .proof import Recording, Verification
from .saving import save_under_any_names, save_under_own_names


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
    with _structure_kept_on_error(model):
        install(model, config, planned)
        products = list(declared(model))
        for product in products:  # before the first one is written
            given, wanted = ([tuple(f.shape) for f in some] for some in (factors[product.name], product.augmented()))
            if given != wanted:
                raise ValueError(
                    f"{product.name}: init={config.init!r} gives factors of shapes {given}, and its layer has {wanted}"
                )
    for product in products:
        product.write(factors[product.name])
    products = factorizations(model)
    sizes = [(product.kind, *product.size()) for product in products]
    say(headline(sizes, *parameter_counts(model, products), len(planned.skipped)))
    return model


@contextmanager
def _structure_kept_on_error(model: nn.Module) -> Iterator[None]:
    """Within, an error puts every module and attribute of a model back in its place; values are not looked at."""
    registries = ("_modules", "_parameters", "_buffers")
    before = {
        module: (dict(vars(module)), {name: dict(vars(module)[name]) for name in registries})
        for module in model.modules()
    }
    holder = getattr(model, "config", model)
    stored = getattr(holder, "quantization_config", None)
    try:
        yield
    except BaseException:
        for module, (attributes, entries) in before.items():
            vars(module).clear()
            vars(module).update(attributes)
            for name, values in entries.items():
                vars(module)[name].clear()
                vars(module)[name].update(values)
        if attached(model) is not stored:
            vars(holder).pop("quantization_config", None)
            if stored is not None:
                holder.quantization_config = stored
        raise


def install(model: nn.Module, config: FNLConfig, planned: Plan) -> None:
    """Give a dense model the layers and declarations of a plan; the values of their factors are still to be written."""
    planned.install(model)
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
        products = {t.name: (t.kind, t.found) for t in targets if not t.found(model).lone}
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
        if isinstance(module, Declares) and list(module.parameters()) and not isinstance(module, FactorLeaf):
            raise ValueError(
                f"{name} declares a factorization of its own parameters, but is no fnl_hf.FactorLeaf that "
                "says what to put in its place"
            )
        leaf = getattr(module, "base_layer", None)
        if isinstance(leaf, FactorLeaf) and leaf.compact:
            raise ValueError(f"{name} holds an adapter as narrow as its compact leaf: merge or unload adapters first")
    swap(model, {leaf: leaf.dense() for leaf in model.modules() if isinstance(leaf, FactorLeaf)})
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Declares):
                child.withdraw(parent)
                delattr(parent, name)
    if attached(model):
        del getattr(model, "config", model).quantization_config
    save_under_any_names(model)
    return model


# ----------------------------------------------------------------------------------------------------


def _refuse_factorized(model: nn.Module) -> None:
    if is_factorized(model):
        raise ValueError("the model is factorized already; call fnl_hf.to_dense(model) before factorizing it anew")
    stored = getattr(getattr(model, "config", None), "quantization_config", None)
    # Ours on a dense model is the config of a factorized one, from which `from_config` made a new model.
    if stored is not None and dict(stored)["quant_method"] != "fnl":
        raise ValueError("the model is quantized; factorize the unquantized model")


def _declared_at(name: str, model: nn.Module):
    parent, _, child = name.rpartition(".")
    parent = model.get_submodule(parent)
    return getattr(parent, child).factorization(name, parent)
