"""What modules of a model are called with: recorded in one forward of the model, or made up from their signatures."""

import inspect
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .outputs import copied, outputs_of

POSITIONS = 6  # of made-up sequences; 7 of what they attend to
GRID = 8  # rows and columns of a made-up map of features
SIDE = 16  # of made-up images: an attention that reduces its keys by 8 keeps four of them


class ProbeError(ValueError):
    """The model could not be run on the inputs at hand."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module's forward."""

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> "Call":
        """A copy with floating-point tensors in ``dtype``."""
        return Call(*copied((self.args, self.kwargs), dtype))

    def described(self) -> tuple:
        """What kind of arguments it has, and how wide they are: calls that differ in it may take other paths."""
        return _described(self.args), _described(self.kwargs)


class Recording:
    """One forward of a model: what the modules of interest were called with, and what came out.

    Attributes:
        calls: name -> the first call of the module, or that of its equal that came first.
        output: every floating-point tensor that the model returned.

    Args:
        inputs: of the model's forward, by keyword.
        names: of modules whose calls are recorded.
        alike: name -> what equal modules have in common: of those one call of a kind is kept, and not one of each.

    Raises:
        ProbeError: The model does not run on these inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        names: Iterable[str] = (),
        alike: Callable[[str], Hashable] = lambda name: name,
    ):
        self.inputs = dict(inputs)
        self.calls: dict[str, Call] = {}
        names, handles, kept = set(names), [], {}

        def recorder(name):
            def hook(module, args, kwargs):
                if name not in self.calls:
                    key = alike(name), Call(args, kwargs).described()
                    if key not in kept:
                        kept[key] = Call(*copied((args, kwargs), None))
                    self.calls[name] = kept[key]

            return hook

        for name, module in model.named_modules():
            if name in names:
                handles.append(module.register_forward_pre_hook(recorder(name), with_kwargs=True))
        try:
            self.output = outputs_of(model, inputs)
        except Exception as error:  # any model, any inputs: what it raised is what the user needs to know
            raise ProbeError(f"{type(model).__name__} does not run on {', '.join(inputs)}: {error}") from error
        finally:
            for handle in handles:
                handle.remove()


# -- a module's call ---------------------------------------------------------------------------------

_HIDDEN = re.compile(
    r"(hidden_states?|x|inputs?|input_tensor|latents|states|embeddings|features|quer(y|ies)|query_states|q|src|tgt|target)$"
)
_CONTEXT = re.compile(
    r"(key_value_states|encoder_hidden_states|encoder_states|cross_attention_states|context|memory|kv|keys?|values?|k|v|"
    r"key_states|value_states|ctx_tensor|current_states|source|inputs_kv)$"
)
_ROTARY = re.compile(r"position_embeddings?|rotary|rope|freqs|cos$|sin$")
_ADDED = re.compile(r"object_queries|spatial_position_embeddings|query_pos\w*|pos_embed\w*")
# What may be left out, or None: nothing can stand between projections because of it (SAM's similarity is a mask)
_HARMLESS = re.compile(
    r".*mask.*|attention_similarity|past.*|.*cache.*|layer_past|layer_state|use_.*|output_.*|return_.*|need_weights|"
    r"is_.*|.*position_ids?"
)
_OF_SCORES = re.compile(r".*(bias|alibi|relative|rel_pos|rel_emb|dist|cos|sin|position|rope|rotary|freqs|similarity).*")
_MASK = re.compile("mask|length|seqlens")


LARGE = 512  # positions from which on the first sequence alone is tried before all of them


def drawn(call: Call, module: nn.Module, generator: torch.Generator) -> Iterator[Call]:
    """A recorded call with its tensors drawn anew; a large one first without all but its first sequence.

    Masks and rotations stay what they are. None if a tensor of features has fewer than four positions: too few to tell
    one attention from another.
    """
    names = list(inspect.signature(module.forward).parameters)
    named = [*zip(names, call.args, strict=False), *((name, value) for name, value in call.kwargs.items())]
    hidden = [value for name, value in named if _is_drawn(name, value)]
    # (batch, positions, width), or (batch, width, rows, columns) of a convolution
    positions = [value.numel() // value.shape[1 if value.dim() == 4 else -1] for value in hidden]
    if not hidden or min(positions) < 4:
        return

    def new(name: str, value: Any, batch: int | None) -> Any:
        value = value if batch is None else _first_of(value, batch)
        return torch.randn(value.shape, generator=generator).to(value) if _is_drawn(name, value) else value

    def made(batch: int | None = None) -> Call:
        args = tuple(new(name, value, batch) for name, value in zip(names, call.args, strict=False))
        rest = call.args[len(args) :] if batch is None else _first_of(call.args[len(args) :], batch)
        return Call(args + rest, {name: new(name, value, batch) for name, value in call.kwargs.items()})

    if positions[0] > LARGE and hidden[0].dim() > 2 and hidden[0].shape[0] > 1:
        yield made(hidden[0].shape[0])
    yield made()


def _is_drawn(name: str, value: Any) -> bool:
    """Whether an argument is a tensor of features: no mask, no rotation, which would no longer be one."""
    if not (isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2):
        return False
    return not (_MASK.search(name) or _ROTARY.search(name) or bool((value < -1e4).any()))


def _first_of(value: Any, batch: int) -> Any:
    """The first entry of whatever has one per sequence of a batch."""
    if isinstance(value, Tensor):
        return value[:1] if value.dim() > 1 and value.shape[0] == batch else value
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_first_of(item, batch) for item in value)
    if isinstance(value, dict):
        return {key: _first_of(item, batch) for key, item in value.items()}
    return value


def made_up(
    module: nn.Module,
    widths: tuple[int, int],
    rotations: Iterable[tuple[Tensor, ...]],
    generator: torch.Generator,
    of_scores: bool = False,
) -> Iterator[Call]:
    """Calls that a module may take, by the names in its signature, the plainest first.

    Args:
        widths: of the hidden states, and of what they attend to.
        rotations: (cos, sin) as rotary modules give them.
        of_scores: for queries and keys, which a rotation or a bias in the signature would change if it were given.
    """
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    }
    required = {name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    length = SIDE * SIDE if "height" in parameters else POSITIONS

    def noise(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def call(attends: bool, rotation: tuple[Tensor, ...] | None, lead: tuple[int, ...]) -> Call:
        values, flat = {}, len(lead) == 1
        longer = (*lead[:-1], lead[-1] + 1)  # what is attended to, where nothing makes it as long
        for name in parameters:
            if _CONTEXT.fullmatch(name) and (attends or name in required):
                values[name] = noise(*(lead if name in required else longer), widths[1])
            elif _HIDDEN.fullmatch(name) and (name in required or not values):
                values[name] = noise(*lead, widths[0])
            elif _ADDED.fullmatch(name) and attends:
                values[name] = noise(*(longer if "spatial" in name else lead), widths[0])
            elif _ROTARY.search(name) and rotation is not None:
                values[name] = _rotation_as(name, rotation, flat)
            elif name in ("height", "width", "h", "w"):
                values[name] = SIDE
            elif name == "cu_seqlens":
                values[name] = torch.tensor([0, length], dtype=torch.int32)
            elif name == "max_seqlen":
                values[name] = length
            elif name == "position_ids":
                values[name] = torch.arange(length)[None]
            elif name == "residual":
                values[name] = torch.zeros(1, length, widths[0], dtype=torch.float64)
            elif name == "layer_idx":
                values[name] = 0
            elif name in required:
                values[name] = None
        return Call(kwargs=values)

    def decides(made: Call) -> bool:
        """Whether nothing is left out that might stand between the projections if it were given."""
        missing = {
            name
            for name, parameter in parameters.items()
            if made.kwargs.get(name, parameter.default) in (None, inspect.Parameter.empty)
        }
        harmless = (_HARMLESS, _CONTEXT, _ADDED) if of_scores else (_HARMLESS, _CONTEXT, _ADDED, _OF_SCORES)
        return all(any(names.fullmatch(name) for names in harmless) for name in missing)

    sequence = (length,) if "cu_seqlens" in parameters else (1, length)
    optional = any(_CONTEXT.fullmatch(name) or _ADDED.fullmatch(name) for name in parameters)
    turns, calls = any(map(_ROTARY.search, parameters)), []
    unturned = () if turns and of_scores else (None,)
    for rotation in (*rotations, *unturned) if turns else unturned:
        for attends in (False, True) if optional else (False,):
            calls.append(call(attends, rotation, sequence))
    if unturned:
        calls.append(call(False, None, (1, GRID, GRID)))
    yield from filter(decides, calls)


def a_rotation(width: int, length: int = POSITIONS) -> tuple[Tensor, Tensor]:
    """(cos, sin) for heads of this width, (1, positions, width), as rotary modules of the usual kind give them."""
    turns = torch.arange(length, dtype=torch.float64)[:, None] * 10.0 ** -torch.arange(width // 2, dtype=torch.float64)
    angles = torch.cat([turns, turns], -1)[None]
    return angles.cos(), angles.sin()


def rotations_for(model: nn.Module, owner: str, width: int, length: int = POSITIONS) -> list[tuple[Tensor, ...]]:
    """(cos, sin) at the first positions, in float64, of the rotary modules nearest to an attention module.

    A model may have several towers, each with a rotation of its own. None where the nearest ones differ in how much of
    a head they turn. For those that cannot be called like this, the usual rotation stands in if they have the
    frequencies of whole heads, ``width`` wide, along one axis or two.
    """
    near, found = _nearest(model, owner), []
    for module in near:
        found += _rotations(module, length)
    if len({values[0].shape[-1] for values in found}) > 1:
        return []
    frequencies = {module.inv_freq.numel() for module in near if isinstance(getattr(module, "inv_freq", None), Tensor)}
    if not found and frequencies & {width // 2, width // 4}:
        found.append(a_rotation(width, length))
    return found


def _nearest(model: nn.Module, owner: str) -> list[nn.Module]:
    """The rotary modules that share the longest part of their names with ``owner``."""
    steps, depths = owner.split("."), {}
    for name, module in model.named_modules():
        if re.search("Rotary|RoPE", type(module).__name__):
            pairs = zip(name.split("."), steps, strict=False)
            depths[module] = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(steps), name.count(".") + 1))
    return [module for module, depth in depths.items() if depth == max(depths.values())]


def _rotations(module: nn.Module, length: int) -> list[tuple[Tensor, ...]]:
    """What a rotary module gives for (hidden states, positions), each kind once; [] where it is called otherwise."""
    parameters, found = inspect.signature(module.forward).parameters, {}
    kinds = sorted(set(getattr(getattr(module, "config", None), "layer_types", None) or ()))
    for options in [{"layer_type": kind} for kind in kinds] if "layer_type" in parameters else [{}]:
        try:
            with torch.no_grad():
                buffer = next(iter([*module.buffers(), *module.parameters()]))
                x = torch.zeros(1, length, 1, dtype=torch.float64, device=buffer.device)
                positions = torch.arange(length, device=buffer.device)[None]
                values = tuple(value.double() for value in module(x, positions, **options))
        except Exception:  # rotary modules of other signatures: recorded calls serve those
            continue
        if all(isinstance(value, Tensor) and value.dim() == 3 for value in values):
            found.setdefault(str(options), values)
    return list(found.values())


def _rotation_as(name: str, rotation: tuple[Tensor, ...], flat: bool) -> Any:
    parts = tuple(part[0] for part in rotation) if flat else rotation
    return {"cos": parts[0], "sin": parts[-1]}.get(name, parts)


# ----------------------------------------------------------------------------------------------------


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        wide = value.is_floating_point() and value.dim() > 1  # rotations may turn more of a head here than there
        return value.dim(), value.is_floating_point(), value.shape[-1] if wide else None
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    if isinstance(value, dict):
        return tuple((name, _described(item)) for name, item in value.items())
    return value if isinstance(value, (bool, str, type(None))) else type(value).__name__
