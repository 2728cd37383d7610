"""`save_pretrained` and `from_pretrained` of factorized models, through transformers' quantizer plug-in.

After ``import fnl_hf`` a checkpoint whose config.json holds ``quantization_config: {"quant_method": "fnl", …}`` loads
factorized, bit for bit. What is rebuilt is the plan that the config holds: nothing is searched, so a newer finder
cannot decide otherwise. A dense checkpoint is factorized while loading when ``from_pretrained`` gets a
``quantization_config=fnl_hf.FNLConfig(…)``.

Otherwise a factorized model is an ordinary one: the flags of a quantized model, which would keep ``.half()`` and the
Trainer from working, are taken off once it is loaded. Only ``config.quantization_config`` stays, and what is saved is
written by `fnl_hf.saving`.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer, auto, register_quantization_config, register_quantizer

from .attachment import attached
from .config import FNLConfig
from .factorization import FactorLeaf
from .messages import say
from .patching import factorize, install
from .plan import RESTORE, Plan, Renaming, Target
from .saving import configs, forget_plans, save_under_own_names

register_quantization_config("fnl")(FNLConfig)
# from_pretrained asks these for get_loading_attributes() before it drops a config in favour of the stored one, and
# nothing else tells a plug-in that there was another.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (FNLConfig,)


@register_quantizer("fnl")
class FNLQuantizer(HfQuantizer):
    """What transformers calls while it loads: before the weights on meta tensors, and after them.

    Raises:
        ValueError: The stored config and the one given to ``from_pretrained`` differ; the plan is damaged or does
            not fit the model or the weights; factors are missing. The message names the key and what to do.
    """

    def __init__(self, quantization_config: FNLConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.restores = self.pre_quantized  # a factorized checkpoint, and not a dense one to factorize
        requested = vars(quantization_config).pop("requested", None)
        if requested is not None and _unresolved(requested) != _unresolved(quantization_config):
            raise ValueError(
                "the checkpoint is factorized already, with another config: load it without quantization_config, or "
                "make it dense first (fnl_hf.to_dense, or `fnl-hf to-dense DIR OUT`) and factorize that"
            )

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, checkpoint_files=None, **kwargs):
        if self.restores:
            self._rebuild(model, checkpoint_files)
        self.shapes = _shapes(model)

    def _rebuild(self, model: PreTrainedModel, checkpoint_files: list[str] | None) -> None:
        """The structure of the plan, on meta tensors."""
        # Older transformers take renamed keys of what is pre-quantized for packed integers, and ignore `dtype` there.
        self.pre_quantized = hasattr(HfQuantizer, "get_new_dtype")
        rename = _renaming(model)
        stored = {rename(key): (key, shape) for key, shape in _stored_shapes(checkpoint_files).items()}
        plan, dense = _placed(Plan.of(self.quantization_config), model, rename, stored), _shapes(model)
        more = _tied_to(plan, model)
        install(model, self.quantization_config, replace(plan, targets=(*plan.targets, *more)))
        for target in more:
            model.get_submodule(target.name)._is_hf_initialized = False  # the checkpoint may lack its bias
        self.names = _parameter_names(model, plan)
        _check_shapes(model, self.names, dense, stored, checkpoint_files)
        self.quantization_config = attached(model) or self.quantization_config

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs):
        _unflag(model)
        other = [name for name, shape in _shapes(model).items() if shape != self.shapes[name]]
        if other:  # transformers raises or re-initialises, but older ones take any shape when there is a plug-in
            raise ValueError(
                f"the checkpoint holds {_listed(other)} in a shape that config.json does not give: {RESTORE}, or load "
                f"the model as it was saved and change it then"
            )
        if not self.restores:
            del model.config.quantization_config
            if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
                raise ValueError(
                    "a model that is spread over devices cannot be factorized while loading: load it on one device, "
                    "save the factorized model, and load that with any device_map"
                )
            return factorize(model, _unresolved(self.quantization_config))
        tensors = dict(_tensors(model))
        missing = [name for name in self.names if _is_missing(tensors[name])]
        if missing:
            raise ValueError(
                f"the checkpoint lacks {_listed(missing)}, which the plan in its config.json holds: restore the "
                f"weights that were saved with it"
            )
        if not attached(model):  # a part in which nothing is factorized
            forget_plans(model)
        save_under_own_names(model)  # again: loading has just set conversions to revert
        return model


@contextmanager
def written_whole(directory: str | os.PathLike) -> Iterator[Path]:
    """A temporary sibling of ``directory`` to write into; it takes its place when the block ends without an error.

    ``save_pretrained`` writes config.json and then the weights in place, so a process that dies in between leaves a
    directory that is neither the old checkpoint nor the new one (loading that is an error, not a wrong model).
    Here an error leaves ``directory`` as it was. A process that is killed leaves it as it was too, or complete, apart
    from the moment between two renames when it replaces one that holds files: then the old one is whole in the
    hidden sibling ``.NAME.*``. No claim is made about a machine that loses power.

        with fnl_hf.loading.written_whole("out") as folder:
            model.save_pretrained(folder)
    """
    target = Path(directory).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as sibling:
        new, old = Path(sibling, "new"), Path(sibling, "previous")
        new.mkdir()
        yield new
        if not target.exists():
            new.rename(target)
            return
        target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            old.rename(target)
            raise


# -- the plan ----------------------------------------------------------------------------------------


def _unresolved(config: FNLConfig) -> FNLConfig:
    """What the user asked for, without what came of it."""
    return replace(config, plan=None, format_version=FNLConfig.format_version)


def _placed(plan: Plan, model: PreTrainedModel, rename: Renaming, stored: dict) -> Plan:
    """The targets named as in this model, which may be the base of the saved one, have a head over it, or be newer.

    A class that holds only a part of the saved model, as transformers can load it, gets the targets of that part.
    """
    placed, elsewhere = [], []
    for target in plan.targets:
        here = next((t for t in (target, target.renamed(rename)) if t and t.flaw(model) is None), None)
        if here is not None:
            placed.append(here)
            continue
        same_class, weight = type(model).__name__ in (model.config.architectures or []), target.parameters()[0]
        is_stored = target.is_tied() or rename(weight) in stored
        if same_class or not is_stored or _has_any(model, (weight, rename(weight))):
            lack = f"{type(model).__name__} {target.flaw(model)}"
            raise ValueError(f"quantization_config.plan names {target.name}, but {lack}: {RESTORE}")
        elsewhere.append(target.name)
    if elsewhere and not _has_any(model, stored):
        saved_from = ", ".join(model.config.architectures or ["the class it was saved from"])
        raise ValueError(
            f"{type(model).__name__} holds none of the products of this checkpoint, nor any of its weights: "
            f"{_listed(elsewhere)}; load it as {saved_from}"
        )
    if elsewhere:
        say(f"fnl_hf: {type(model).__name__} is a part of the saved model, without {_listed(elsewhere)}")
    return replace(plan, targets=tuple(placed))


def _tied_to(plan: Plan, model: PreTrainedModel) -> list[Target]:
    """The targets of layers that this class ties to those of a plan, where that is of a class without them."""
    families = dict.fromkeys(map(type, plan.targets))
    with_tied = (family.with_tied(model, [t for t in plan.targets if type(t) is family]) for family in families)
    return [target for targets in with_tied for target in targets if target not in plan.targets]


def _has_any(model: PreTrainedModel, names: Iterable[str | None]) -> bool:
    """Whether a model has a parameter of one of these names."""
    there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return not there.isdisjoint(names)


def _parameter_names(model: nn.Module, plan: Plan) -> list[str]:
    """All that is stored of the layers that hold a product, each once."""
    layers = dict.fromkeys(path.rpartition(".")[0] for target in plan.targets for path in target.parameters())
    return [f"{layer}.{name}".removeprefix(".") for layer in layers for name, _ in _tensors(model.get_submodule(layer))]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter, under each of its names, and what layers of factors keep in buffers."""
    yield from model.named_parameters(remove_duplicate=False)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FactorLeaf):
            for key, buffer in module._buffers.items():
                if key not in module._non_persistent_buffers_set:
                    yield f"{name}.{key}".removeprefix("."), buffer


# -- the weights -------------------------------------------------------------------------------------


def _stored_shapes(files: list[str] | None) -> dict[str, tuple]:
    """key -> shape of everything in the files, from their headers; empty if the weights come as a state dict."""
    shapes = {}
    for file in files or []:
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"{file}: a factorized checkpoint is loaded from safetensors only; save it anew")
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or cut off ({error}): copy or save the checkpoint again") from None
    return shapes


def _renaming(model: PreTrainedModel) -> Renaming:
    """How transformers names the keys of a checkpoint in this model: older names, prefix of the base model."""
    transforms, names, prefix = get_model_conversion_mapping(model), model.state_dict(), model.base_model_prefix
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]

    def rename(key: str) -> str | None:
        plain, _ = rename_source_key(key, [], [], prefix, names)
        name, converter = rename_source_key(key, renamings, converters, prefix, names)
        if name not in names and plain in names:
            return plain
        return name if converter is None else None

    return rename


def _check_shapes(
    model: PreTrainedModel,
    names: list[str],
    dense: dict[str, tuple],
    stored: dict[str | None, tuple[str, tuple]],
    files: list[str] | None,
) -> None:
    """Transformers would raise too, but without the name of the key, and not for weights that are simply dense."""
    shapes = _shapes(model)
    wrong = {name: stored[name] for name in names if name in stored and stored[name][1] != shapes[name]}
    for name, (key, found) in wrong.items():
        changed = [name for name in shapes.keys() & stored.keys() & dense.keys() if shapes[name] != dense[name]]
        if all(stored[name][1] == dense[name] for name in changed):
            config = os.path.join(os.path.dirname(files[0]), "config.json")
            why = f"the weights are dense; remove quantization_config from {config}"
        else:
            why = f"config.json and weights are not of one checkpoint: {RESTORE}; or, if other sizes were asked for "
            why += "(num_labels), which a product cannot take, load it as it was saved"
        raise ValueError(f"{key} is stored as {found}, the plan in config.json makes it {shapes[name]}: {why}")


def _shapes(model: nn.Module) -> dict[str, tuple]:
    """name -> shape of all that is stored, under each of its names: loading may tie and untie."""
    return {name: tuple(tensor.shape) for name, tensor in _tensors(model)}


def _is_missing(parameter: Tensor) -> bool:
    """Whether loading left a parameter or buffer alone: transformers marks what it sets, tied weights included."""
    return not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False)  # meta: offloaded


def _unflag(model: PreTrainedModel) -> None:
    """Take off what marks a model as quantized (``HfQuantizer.preprocess_model`` and ``postprocess_model``)."""
    for name in ("is_quantized", "quantization_method", "hf_quantizer"):
        delattr(model, name)
    for config in configs(model):
        vars(config).pop("_is_quantized", None)
    forget_plans(model, keep=model.config)  # parts have copies


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
