"""`factorize` and its way back, `to_dense`; `verify` proves what stands in between."""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import nn

from .attachment import attach, detach
from .calibration import Calibration
from .checking import OutputsDiffer, check_unchanged, kept_on_error, refuse_wrapped
from .config import CALIBRATABLE, CALIBRATED, FNLConfig
from .factorization import (
    Declares,
    FactorLeaf,
    declared,
    factorizations,
    is_factorized,
    parameter_counts,
    swap,
)
from .fitting import fitted
from .initialization import keeps_the_product
from .messages import say
from .plan import Plan, headline
from .planning import nothing_found, plan_with_evidence
from .proof import Evidence, Verification, declared_at, holders, prove
from .replay import distance, new_basis
from .saving import forget_plans, own_configs, save_under_any_names, save_under_own_names

SAME_BASIS = 0.1  # relative change of a factor under which it is nearly the old one


def factorize(
    model: nn.Module,
    config: FNLConfig | None = None,
    verify: Mapping | None = None,
    calibration: Iterable[Mapping] | None = None,
    check: bool = True,
) -> nn.Module:
    """Make the products of a model explicit, initialise them, and return the model.

    In place, and all or nothing: an error leaves the model as it was. At full rank the function of the model does not
    change (beyond rounding); below it, each product becomes its best approximation of that rank, biases included.

    Args:
        model: Any model with softmax attention.
        config: What to factorize and how; ``FNLConfig()`` if not given.
        verify: Example inputs, as the model's forward takes them by keyword. Every product is proven on a replay of its
            attention module: on the call that it receives from these inputs; without them from made-up ones, or on what
            its signature asks for. What fails is skipped.
        calibration: Batches, each a dict of the forward's inputs, for an ``init`` that looks at data ("functional" may
            do without); padding (``attention_mask``) is left out.
        check: Where all products keep their full rank, run the model once more on the inputs that it was recorded with:
            it must give what it gave before.

    Raises:
        TypeError: ``config`` is not a `FNLConfig`, or the model is wrapped (compiled, parallel, adapted).
        ValueError: The model is factorized already or quantized, has nothing that fits the config, holds non-finite
            weights or such that are not in memory, or a rank is too high; ``calibration`` is given to an ``init`` that
            takes none, or is missing; the check failed.
    """
    config = FNLConfig() if config is None else config
    if not isinstance(config, FNLConfig):
        raise TypeError(f"factorize got a {type(config).__name__} as config, expected a fnl_hf.FNLConfig")
    if not isinstance(model, nn.Module):
        raise TypeError(f"factorize got a {type(model).__name__} as model, expected a torch.nn.Module")
    if verify is not None and not isinstance(verify, Mapping):
        raise TypeError(f"verify is a {type(verify).__name__}, expected a dict of inputs by the names of forward")
    if calibration is None and config.init in CALIBRATED:
        raise ValueError(
            f"init={config.init!r} looks at data: pass factorize(..., calibration=batches of model inputs)"
        )
    if calibration is not None and config.init not in CALIBRATED | CALIBRATABLE:
        raise ValueError(f"init={config.init!r} does not look at data: drop calibration")
    if calibration is not None and (isinstance(calibration, str) or not isinstance(calibration, Iterable)):
        raise TypeError(
            f"calibration is {calibration!r}, expected batches: an iterable of dicts of the model's inputs, such as "
            "fnl_hf.texts.text_batches(file, tokenizer, model)"
        )
    refuse_wrapped(model)
    _refuse_factorized(model)
    # The check at the end is a change of basis of the whole model too: one in planning is only to say what fails it.
    trusting = check and calibration is None and config.is_full_rank() and keeps_the_product(config.init, lone=True)
    try:
        planned = _factorized(model, config, verify, calibration, check, whole=not trusting)
    except OutputsDiffer:
        if not trusting:
            raise
        planned = _factorized(model, config, verify, calibration, check, whole=True)
    products = factorizations(model)
    sizes = [(product.kind, *product.size()) for product in products]
    say(headline(sizes, *parameter_counts(model, products), len(planned.skipped)))
    for line in planned.told(config):
        say(f"fnl_hf: {line}")
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

    A random change of basis inside all products must leave the outputs of the model where they were, and changing one
    side of each must move them: three forwards where all hold, more to name what does not. Each product is replayed in
    its attention module by itself too. A dense model is probed for the products that ``factorize`` would declare.

    Args:
        example_inputs: What the model's forward takes, by keyword.

    Raises:
        ValueError: There are no inputs, or (ProbeError) the model does not run on them.
    """
    if not example_inputs:
        raise ValueError("verify needs example inputs of the model's forward, by keyword: verify(model, input_ids=...)")
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    products = list(declared(model))
    if not products:
        planned, evidence = plan_with_evidence(model, FNLConfig(), example_inputs)
        return prove(evidence, [target.found for target in planned.targets if not target.found(model).lone])
    names, leaves = [product.name for product in products], holders(model, products)
    return prove(Evidence(model, example_inputs, names, leaves), [partial(declared_at, name) for name in names])


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
    swap(model, _dense_leaves(model))
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


@torch.no_grad()
def _factorized(
    model: nn.Module,
    config: FNLConfig,
    verify: Mapping | None,
    calibration: Iterable[Mapping] | None,
    check: bool,
    whole: bool,
) -> Plan:
    """Factorize a model; ``whole``: what the whole model refutes is left out, rather than found by the check."""
    data = None if calibration is None else Calibration(model, calibration)
    planned, evidence = plan_with_evidence(model, config, verify, whole, data)
    if not planned.targets:
        raise ValueError(nothing_found(model, config, planned))
    found = {target.name: target.found(model) for target in planned.targets}
    checked = (
        check
        and all(target.rank == found[target.name].full_rank for target in planned.targets)
        and all(keeps_the_product(config.init, product.lone) for product in found.values())
        and evidence.recording
    )
    if not (whole or checked):  # a family takes less than the full rank: nothing would look at the whole model
        return _factorized(model, config, verify, calibration, check, whole=True)
    factors, unmoved = {}, set()
    for target, new in fitted(model, planned.targets, config, data):
        original, factors[target.name] = found[target.name].augmented(), new
        if distance(new[0][..., :64, :], original[0][..., :64, :]) < SAME_BASIS:  # of some rows
            unmoved.add(target.name)
    own = set(model.parameters())  # what an error must bring back
    with kept_on_error(model) as written:
        install(model, config, planned)
        products = list(declared(model))
        for product in products:  # before the first one is written
            given = [tuple(factor.shape) for factor in factors[product.name]]
            wanted = [tuple(view.augmented(_shape_only).shape) for view in product.views]
            if given != wanted:
                raise ValueError(
                    f"{product.name}: init={config.init!r} gives factors of shapes {given}, and its layer has {wanted}"
                )
        for product in products:
            if own.intersection(tensor for view in product.views for tensor in (view.parameter, view.bias)):
                written.append((product, [factor.clone() for factor in product.augmented()]))
            product.write(factors.pop(product.name))  # one set in memory beside the model's own, the new or the old
        if checked:  # what is in its old basis shows nothing
            with new_basis([product for product in products if product.name in unmoved]):
                check_unchanged(model, evidence.recording, products)
    return planned


def _shape_only(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().to("meta")


def _dense_leaves(model: nn.Module) -> dict[FactorLeaf, nn.Module]:
    """Every factor leaf and the ordinary layer of its function; leaves that are tied become layers that are."""
    dense: dict[FactorLeaf, nn.Module] = {}
    first: dict[tuple, nn.Parameter] = {}
    for leaf in model.modules():
        if isinstance(leaf, FactorLeaf):
            dense[leaf] = leaf.dense()
            of_weight = [id(p) for name, p in leaf.named_parameters() if name != "bias"]
            biases = [id(p) for name, p in leaf.named_parameters() if name == "bias"]
            for name, key in (("weight", of_weight), ("bias", biases)):
                if (parameter := getattr(dense[leaf], name, None)) is not None:
                    setattr(dense[leaf], name, first.setdefault((tuple(key), parameter.shape), parameter))
    return dense


def _refuse_factorized(model: nn.Module) -> None:
    if is_factorized(model):
        raise ValueError("the model is factorized already; call fnl_hf.to_dense(model) before factorizing it anew")
    stored = getattr(getattr(model, "config", None), "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    # Ours on a dense model is the config of a factorized one, from which `from_config` made a new model.
    if stored is not None and method != "fnl":
        raise ValueError("the model is quantized; factorize the unquantized model")
