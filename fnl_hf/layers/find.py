"""Finds the linear layers, embeddings and convolutions that ``target_modules`` asks for, as PEFT understands it."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..config import FNLConfig
from ..leaves import is_plain_linear
from ..names import ends_with
from ..plan import Candidate
from .target import LayerTarget, layer_class

KEPT = "stays dense unless it is named in target_modules"
# Parts of names behind which lie outputs and choices: small layers whose rank is their function
_OUTPUTS = re.compile(
    r"(^|\.)(\w*classifier|classification_head|score|pooler|qa_outputs|seq_relationship|lm_head|router|gate|"
    r"\w+_router|summary|class_predictor|bbox_predictor)(\.|$)"
)


def find_layers(model: nn.Module, config: FNLConfig) -> list[Candidate]:
    """The finder of this family: what ``target_modules`` names, and all of its kinds with "all-linear" or "all".

    What is tied to a layer comes with it. Not named, some layers stay dense: outputs and what is tied to them
    ("all-linear"), classifiers, poolers, routers, the first convolution, and tables of embeddings that are not those of
    the model's inputs.

    Raises:
        ValueError: An entry of ``target_modules`` names no layer of these kinds.
    """
    if not (wanted := config.layers_wanted()):
        return []
    leaves = {name: leaf for name, leaf in model.named_modules() if name and layer_class(leaf) and _holds(leaf)}
    named = _named(leaves, config, model)
    kinds = {"all-linear": ("linear",), "all": ("linear", "embedding", "conv")}
    swept = {kind for entry in wanted for kind in kinds.get(entry, ())}
    kept = _kept(model, leaves) if swept else {}
    chosen = {
        name: leaf
        for name, leaf in leaves.items()
        if name in named or (layer_class(leaf).kind in swept and name not in kept)
    }
    weights = {id(leaf.weight): name for name, leaf in chosen.items()}
    names = defaultdict(list)
    for name, leaf in leaves.items():
        names[id(leaf.weight)].append(name)
    candidates = []
    for name, leaf in leaves.items():
        kind = layer_class(leaf).kind
        if id(leaf.weight) in weights:
            swept_up = weights[id(leaf.weight)] not in named
            candidates.append(_candidate(names[id(leaf.weight)], name, leaf, config, swept_up))
        elif kind in swept:
            candidates.append(Candidate(name, kind, (), doubt=kept[name], yields=True))
    return candidates


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Dense weights of the linear layers that "all-linear" means, each once: no outputs, embeddings or adapters."""
    leaves = {
        name: leaf
        for name, leaf in model.named_modules()
        if layer_class(leaf) and layer_class(leaf).kind == "linear" and is_plain_linear(leaf) and _holds(leaf)
    }
    adapted = [f"{name}." for name, module in model.named_modules() if hasattr(module, "base_layer")]
    adapters = {name for name in leaves for start in adapted if name.startswith(start) and name != f"{start}base_layer"}
    kept = adapters.union(_kept(model, leaves))
    return list(dict.fromkeys(leaf.weight for name, leaf in leaves.items() if name not in kept))


def _candidate(tied: list[str], name: str, leaf: nn.Module, config: FNLConfig, swept_up: bool) -> Candidate:
    """Of a leaf; ``tied`` are the names of all that have its weight, which get one rank."""
    layer = layer_class(leaf)
    if reason := _obstacle(leaf):
        return Candidate(name, layer.kind, (), doubt=reason, yields=swept_up)
    transposed = layer.kind == "linear" and not isinstance(leaf, nn.Linear)
    matrix = leaf.weight.t() if transposed else layer.as_matrix(leaf.weight)
    scale = leaf._buffers.get("embed_scale")
    scale = None if scale is None else float(scale)
    rank = config.rank_of(tied, *matrix.shape)
    target = LayerTarget(name, layer.kind, rank, config.form == "deep", len(tied) > 1, scale)
    return Candidate(name, layer.kind, (target,), certain=True, yields=swept_up)


def _holds(leaf: nn.Module) -> bool:
    """Whether the weight is a parameter of its own, and no quantized or computed one."""
    return isinstance(leaf._parameters.get("weight"), nn.Parameter) and leaf.weight.is_floating_point()


def _named(leaves: dict[str, nn.Module], config: FNLConfig, model: nn.Module) -> set[str]:
    """The layers that ``target_modules`` names one by one."""
    names = set()
    for entry in config.layers_wanted():
        if entry in ("all-linear", "all"):
            continue
        matches = re.compile(entry).fullmatch if isinstance(config.target_modules, str) else None
        found = {name for name in leaves if (matches(name) if matches else ends_with(name, entry))}
        if not found:
            others = [
                (name, type(module).__name__)
                for name, module in model.named_modules()
                if name and (matches(name) if matches else ends_with(name, entry))
            ]
            if others:
                what = f"names {others[0][0]}, a {others[0][1]}: only linear layers, embeddings and convolutions can be"
                raise ValueError(f"target_modules has '{entry}', which {what} made low-rank")
            raise ValueError(
                f"target_modules has '{entry}', which matches no layer{_hint(entry, leaves, bool(matches))}"
            )
        names |= found
    return names


def _hint(entry: str, names: Collection[str], is_expression: bool) -> str:
    """What an entry that matches nothing may have been meant as, or what there is."""
    if is_expression and any(ends_with(name, entry) for name in names):
        return f": a string is a regular expression for whole names; give ['{entry}'] for what ends in it"
    if not is_expression and re.search(r"[^\w.]", entry):
        return ": in a list it is the end of names; give a regular expression by itself, as a string"
    shown, more = ", ".join(list(names)[:4]) or "none", len(names) - 4
    return f": there are {shown}" + (f" and {more} more" if more > 0 else "")


def _kept(model: nn.Module, leaves: dict[str, nn.Module]) -> dict[str, str]:
    """name -> why, of the layers that only a name makes low-rank."""
    kept = {name: KEPT for name in leaves if _OUTPUTS.search(name)}
    inputs, outputs = _ends(model)
    for name, leaf in leaves.items():
        kind = layer_class(leaf).kind
        if kind == "linear" and leaf in outputs and id(leaf.weight) not in {id(table.weight) for table in inputs}:
            kept[name] = KEPT
        elif kind == "linear" and leaf in outputs:  # tied: it goes with the embedding, where that is wanted
            kept[name] = f"{KEPT}, or the embedding that it is tied to is"
        elif kind == "embedding" and inputs and not any(leaf.weight is table.weight for table in inputs):
            kept[name] = f"{KEPT}: no table of the model's inputs"
    if first := next((name for name, leaf in leaves.items() if layer_class(leaf).kind == "conv"), None):
        kept.setdefault(first, f"{KEPT}: the first convolution")
    return kept


def _ends(model: nn.Module) -> tuple[list[nn.Embedding], list[nn.Module]]:
    """The tables of input embeddings, and the layers of output embeddings, of all models inside."""
    inputs, outputs = [], []
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            for into, read in ((inputs, part.get_input_embeddings), (outputs, part.get_output_embeddings)):
                into += [end for end in _tried(read) if end not in into]
    return [table for table in inputs if isinstance(table, nn.Embedding)], outputs


def _tried(read) -> Iterator[nn.Module]:
    try:
        end = read()
    except (NotImplementedError, AttributeError):  # a model without one
        return
    if isinstance(end, nn.Module):
        yield end


def _obstacle(leaf: nn.Module) -> str:
    """Why a layer cannot be a product; "" for one that can."""
    if "forward" in vars(leaf):  # it would go on with the weights that it is bound to
        return "its forward was replaced, as accelerate's hooks do (device_map, dispatch_model): factorize before that"
    if isinstance(leaf, nn.Embedding):
        for name, unset in (("max_norm", None), ("scale_grad_by_freq", False), ("sparse", False)):
            if getattr(leaf, name) != unset:
                return f"{name} is of rows of the table, which its factors do not have"
        plain = type(leaf) is nn.Embedding or _is_scaled_embedding(leaf)
    elif isinstance(leaf, (nn.Conv1d, nn.Conv2d)):
        if leaf.groups != 1:
            return f"{leaf.groups} groups of channels: each is a matrix of its own, and small"
        plain = type(leaf) in (nn.Conv1d, nn.Conv2d)
    else:
        plain = is_plain_linear(leaf)
    if not plain:
        return f"{type(leaf).__name__} is a class of its own, and may compute something else"
    return "its matrix is a single row or column" if min(layer_class(leaf).as_matrix(leaf.weight).shape) < 2 else ""


def _is_scaled_embedding(leaf: nn.Embedding) -> bool:
    """Whether a subclass looks rows up and multiplies them by its ``embed_scale``, and does nothing else."""
    scale = getattr(leaf, "embed_scale", None)
    if scale is None or leaf.weight.is_meta:
        return scale is not None
    ids = torch.arange(min(3, leaf.num_embeddings), device=leaf.weight.device)
    with torch.no_grad():
        try:
            found = leaf(ids)
        except Exception:  # it takes other arguments
            return False
        rows = F.embedding(ids, leaf.weight)
        expected = rows * (scale.to(rows.dtype) if torch.is_tensor(scale) else scale)
    return found.shape == expected.shape and torch.allclose(found, expected)
