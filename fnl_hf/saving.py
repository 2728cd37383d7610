"""What ``save_pretrained`` writes of a model that holds factors: the plan in its config, and the names of its weights.

A plan belongs to what is being saved: it is derived from the declarations in that, whatever its config object says and
whoever shares it, and stands in the config for the time of the save. So an encoder that is taken out of a factorized
model, a model of which only the encoder was factorized, and a dense model made from the config of a factorized one are
all saved as what they are. For this ``PreTrainedModel.save_pretrained`` is wrapped once a process has a declaration.
"""

import copy
import functools
import inspect
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .config import FNLConfig
from .factorization import Declares, FactorLeaf, when_declared
from .plan import Plan, attached, plain

# -- the plan in the config --------------------------------------------------------------------------

_KEY = "quantization_config"


@when_declared
def _write_plans() -> None:
    """From now on whatever is saved in this process has its own plan in its config."""
    save = PreTrainedModel.save_pretrained

    @functools.wraps(save)
    def save_pretrained(self, *args, **kwargs):
        with plan_in_config(self):
            if aliases := _unknown_aliases(self):
                given = inspect.signature(save).bind_partial(self, *args, **kwargs).arguments
                whole = given.get("state_dict") or self.state_dict()
                kept = {name: tensor for name, tensor in whole.items() if name not in aliases}
                args = args[:1]  # what follows the directory goes by keyword
                kwargs = {**{k: v for k, v in given.items() if k not in ("self", "kwargs", "save_directory")}, **kwargs}
                if not args:
                    kwargs["save_directory"] = given["save_directory"]
                kwargs["state_dict"] = kept
            return save(self, *args, **kwargs)

    PreTrainedModel.save_pretrained = save_pretrained


@contextmanager
def plan_in_config(model: PreTrainedModel) -> Iterator[None]:
    """Within, a model's config and those nested in it hold the plan of their part, or none where that is dense.

    Raises:
        ValueError: Factors lie in the model whose declaration lies outside, or it is quantized as well.
    """
    plans, before = _plans(model), []
    for config in configs(model):
        if id(config) in plans and _KEY in vars(config) and not _holds_ours(config):
            raise ValueError("a model that is factorized and quantized cannot be saved: call fnl_hf.to_dense(model)")
        if id(config) in plans or _holds_ours(config):
            before.append((config, vars(config).get(_KEY)))
    try:
        for config, _ in before:
            _set(config, plans.get(id(config)))
        yield
    finally:
        for config, stored in before:
            _set(config, stored)


def _plans(model: PreTrainedModel) -> dict[int, FNLConfig]:
    """What to store in which config, by its id: the whole plan in the model's own, and parts in those of parts.

    A part is stored with the names that its weights have in the file, as if it were loaded from there by itself.
    """
    _refuse_strays(model)
    stored = attached(model)
    if stored is None:
        return {}
    places = defaultdict(set)  # of parts with a config of their own
    for name, module in model.named_modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig) and config is not model.config:
            places[id(config)].add(f"{plain(name)}.")
    by_id = {id(config): config for config in configs(model)}
    for key in by_id.keys() - places.keys():  # a part that was factorized by itself holds a copy of what is nested here
        for other in [other for other in places if _same(by_id[key], by_id[other])]:
            places[key] |= places[other]
    plan, plans = Plan.of(stored), {}
    for key, prefixes in places.items():
        here = [
            tuple(entry for entry in entries if f"{entry.name}.".startswith(tuple(prefixes)))
            for entries in (plan.targets, plan.skipped)
        ]
        if here[0]:
            plans[key] = replace(stored, plan=Plan(*here).to_dict())
    return plans | {id(model.config): stored}


def _same(a: PreTrainedConfig, b: PreTrainedConfig) -> bool:
    """Whether two configs describe the same model, whatever was written of them."""
    written = {_KEY, "architectures", "dtype", "_name_or_path", "name_or_path"}
    described = [{k: v for k, v in config.to_dict().items() if k not in written} for config in (a, b)]
    return type(a) is type(b) and described[0] == described[1]


def _unknown_aliases(model: PreTrainedModel) -> set[str]:
    """Further names of the factors of tied layers, beside ``weight``, whose ties transformers knows.

    Kept is the name beside the ``weight`` that it keeps, so that a base model finds all factors of its embedding.
    """
    names = defaultdict(list)
    for layer, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FactorLeaf):
            for name, parameter in module.named_parameters(recurse=False):
                if name not in ("weight", "bias"):
                    names[id(parameter)].append((layer, name))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    aliases = set()
    for places in names.values():
        kept = next((place for place in places if f"{place[0]}.weight" not in tied), places[0])
        aliases |= {".".join(place) for place in places if place != kept}
    return aliases


def _refuse_strays(model: nn.Module) -> None:
    """A leaf of factors without a declaration could be written, but not read again."""
    named = dict(model.named_modules(remove_duplicate=False))
    declarations = {name: module for name, module in named.items() if isinstance(module, Declares)}
    targets = [declaration.target(name) for name, declaration in declarations.items()]
    if None in targets:  # layers that the class of the model builds by itself
        return
    layers = {path.rpartition(".")[0] for target in targets for path in target.parameters()}
    known = {getattr(module, "base_layer", module) for name in layers if (module := named.get(name)) is not None}
    for name, leaf in named.items():
        if isinstance(leaf, FactorLeaf) and not isinstance(leaf, Declares) and leaf not in known:
            raise ValueError(
                f"{type(model).__name__} holds factors in {name}, but what they are is declared in a module around it: "
                "save that one, or call fnl_hf.to_dense on it first"
            )


def own_configs(model: nn.Module) -> None:
    """Give a model copies of the configs that its modules hold, the same one where they hold the same.

    Other models may share them: a teacher and a student made from one config, or a model and its encoder.
    """
    memo = {}
    copies = [
        (module, name, copy.deepcopy(value, memo))
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, PreTrainedConfig)
    ]
    for module, name, config in copies:
        setattr(module, name, config)


def forget_plans(model: nn.Module, keep: PreTrainedConfig | None = None) -> None:
    """Take the plans out of all configs of a model but ``keep``."""
    for config in configs(model):
        if config is not keep and _holds_ours(config):
            _set(config, None)


def configs(model: nn.Module) -> list[PreTrainedConfig]:
    """Every config that a module of the model holds, and those nested in them, each once."""
    found = {}

    def visit(values) -> None:
        for value in values:
            if isinstance(value, PreTrainedConfig) and id(value) not in found:
                found[id(value)] = value
                visit(vars(value).values())

    for module in model.modules():
        visit(vars(module).values())
    return list(found.values())


def _holds_ours(config: PreTrainedConfig) -> bool:
    stored = vars(config).get(_KEY)
    return isinstance(stored, FNLConfig) or (isinstance(stored, dict) and stored.get("quant_method") == "fnl")


def _set(config: PreTrainedConfig, stored: FNLConfig | dict | None) -> None:
    if stored is not None:
        setattr(config, _KEY, stored)
    else:
        vars(config).pop(_KEY, None)


# -- the names of the weights ------------------------------------------------------------------------

_CONVERSIONS = "_weight_conversions"  # of a PreTrainedModel: back to the names of the checkpoint that it came from


def save_under_own_names(model: nn.Module) -> None:
    """Where leaves hold factors, keep ``save_pretrained`` from going back to names of older checkpoints.

    Its conversions fuse, split and permute weights as if all had their full size. At full rank they are right.
    """
    if any(isinstance(module, FactorLeaf) for module in model.modules()):
        for module in _submodels(model):
            vars(module)[_CONVERSIONS] = []


def save_under_any_names(model: nn.Module) -> None:
    """Take back what ``save_under_own_names`` set."""
    for module in _submodels(model):
        if vars(module).get(_CONVERSIONS) == []:
            del vars(module)[_CONVERSIONS]


@contextmanager
def own_names(model: nn.Module) -> Iterator[None]:
    """Within, ``save_pretrained`` keeps the names of the model's own parameters, whatever checkpoint it came from."""
    submodels = _submodels(model)
    before = [vars(module).get(_CONVERSIONS) for module in submodels]
    for module in submodels:
        vars(module)[_CONVERSIONS] = []
    try:
        yield
    finally:
        for module, value in zip(submodels, before, strict=True):
            vars(module)[_CONVERSIONS] = value
            if value is None:
                del vars(module)[_CONVERSIONS]


def _submodels(model: nn.Module) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]
