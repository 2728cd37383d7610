"""The plan of a model as it is now: what an installed plan leaves on the model, and how it is read off again."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .config import FORMAT_VERSION, FNLConfig
from .factorization import Declares, FactorLeaf
from .plan import Plan, Skip

_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}
_SKIPPED = "_fnl_skipped"  # of a module: [(name below it, kind, reason)]


def attach(model: nn.Module, config: FNLConfig, plan: Plan) -> None:
    """Tell the declarations of an installed plan what they were installed for, and show it in the model's config.

    They are what a plan is derived from whenever the model, a part of it or a whole around it is saved.

    Raises:
        TypeError: A family has put no declaration where its target says.
    """
    settings = replace(config, plan=None, format_version=FORMAT_VERSION)
    for target in plan.targets:
        declaration = model.get_submodule(target.name)
        if not isinstance(declaration, Declares):
            raise TypeError(f"{type(target).__name__}.install left no declaration at {target.name}")
        declaration.planned, declaration.settings = target, settings
        if not isinstance(declaration, FactorLeaf):  # in no mode of its own
            declaration.training = model.get_submodule(target.name.rpartition(".")[0]).training
    note_skipped(model, plan.skipped)
    show(model)


def note_skipped(model: nn.Module, skipped: Iterable[Skip]) -> None:
    """Leave on a model what is not factorized, and why, for the plan that is derived from it."""
    for skip in skipped:
        module, below = _deepest(model, skip.name)
        vars(module).setdefault(_SKIPPED, []).append((below, skip.kind, skip.reason))


def show(model: nn.Module) -> None:
    """Show in a model's config the plan of the model as it is now."""
    for holder in _holders(model):
        if stored := attached(holder):
            holder.config.quantization_config = stored


def attached(model: nn.Module) -> FNLConfig | None:
    """The config with its plan, derived from the declarations in a model; None for one that is not factorized."""
    declarations = [(plain(name), module) for name, module in _declarations(model)]
    settings = next((each.settings for _, each in declarations if each.planned), None)
    if settings is None:  # not factorized, or pickled by a version whose declarations did not know their targets
        stored = getattr(getattr(model, "config", None), "quantization_config", None)
        return stored if declarations and isinstance(stored, FNLConfig) else None
    targets = tuple(target for name, each in declarations if (target := each.target(name)) is not None)
    skipped = tuple(
        Skip(".".join(filter(None, (plain(name), below))), kind, reason)
        for name, module in model.named_modules()
        for below, kind, reason in vars(module).get(_SKIPPED, ())
    )
    return replace(settings, plan=Plan(targets, skipped).to_dict(), format_version=FORMAT_VERSION)


def _declarations(model: nn.Module) -> Iterator[tuple[str, Declares]]:
    """Each by its name; a layer that stands in several places by all of them, since it may not be one when loaded."""
    seen = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Declares) and (module not in seen or isinstance(module, FactorLeaf)):
            seen.add(module)
            yield name, module


def plain(name: str) -> str:
    """The name of a module without what FSDP, activation checkpointing and ``torch.compile`` put around others."""
    return ".".join(step for step in name.split(".") if step not in _WRAPPERS)


def detach(model: nn.Module) -> None:
    """Forget what ``attach`` left on a model beside its declarations."""
    for module in model.modules():
        vars(module).pop(_SKIPPED, None)


def _deepest(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module at a dotted path, or the last one on the way there with what remains of the path."""
    steps = path.split(".") if path else []
    while steps and isinstance(child := getattr(module, steps[0], None), nn.Module):
        module = child
        del steps[0]
    return module, ".".join(steps)


def _holders(model: nn.Module) -> list[nn.Module]:
    """The outermost modules whose config is stored: the model itself, or the models that it wraps."""
    if isinstance(getattr(model, "config", None), PreTrainedConfig):
        return [model]
    below = [child for child in model.children() if isinstance(child, PreTrainedModel) or not hasattr(child, "config")]
    return [holder for child in below for holder in _holders(child)]
