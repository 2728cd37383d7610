"""What the checkpoints of a run are for: going on after it was stopped, and averaging."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from fnl_hf import FNLConfig, Plan

from .errors import InputError
from .locking import LOCK
from .record import NAME


def complete_checkpoints(output_dir: str | Path, like: PreTrainedConfig | None = None) -> list[Path]:
    """Every `checkpoint-N` in `output_dir`, oldest first, whose trainer state, the last of its files, is whole.

    With `like`, the config of a factorized or a dense model, only those that hold the same kind of model.
    """
    paths = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    paths = sorted(filter(_trainer_state, paths), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    if like is None:
        return paths
    factorized = hasattr(like, "quantization_config")
    return [path for path in paths if ("quantization_config" in _config(path)) == factorized]


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint to resume from, or None if a new run starts in `output_dir`.

    A checkpoint that was being written when the run was killed is passed over, and replaced when training gets there
    again.

    Raises:
        InputError: there is none, but there are other files, which a new run would mix with its own. Folders, such as
            the Trainer's own logs, are not in its way.
    """
    if checkpoints := complete_checkpoints(output_dir):
        return checkpoints[-1]
    own = (LOCK, NAME)  # of a run that was killed before its first checkpoint
    others = sorted(path.name for path in Path(output_dir).glob("*") if path.is_file() and path.name not in own)
    if others:
        raise InputError(
            f"--output_dir {output_dir} holds {', '.join(others[:3])}, but no checkpoint to resume from. Give another "
            "directory, or empty this one."
        )
    return None


@torch.no_grad()
def average_checkpoints_(model: PreTrainedModel, checkpoints: list[Path]) -> None:
    """Give `model` the mean of the weights in `checkpoints`, as fairseq's recipes do before they evaluate.

    The inverse-sqrt schedule ends at a learning rate far above zero: each single checkpoint is a noisy one. Beside the
    model, memory holds one sum, in float32 or better, and a single tensor of a checkpoint. What is not of floating
    point is the last checkpoint's.

    Raises:
        InputError: a checkpoint has other weights than the model, or of other shapes.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    total: dict[str, Tensor] = {}
    for number, checkpoint in enumerate(checkpoints):
        found = set()
        for name, tensor in _weights(checkpoint):
            if shapes.get(name) != tensor.shape or (number and name not in total):
                raise InputError(_not_averaged(checkpoint, name))
            found.add(name)
            if not tensor.is_floating_point():
                total[name] = tensor
            elif number == 0:
                total[name] = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
            else:
                total[name] += tensor
        if missing := total.keys() - found:
            raise InputError(_not_averaged(checkpoint, min(missing)))
    for tensor in total.values():
        if tensor.is_floating_point():
            tensor /= len(checkpoints)
    model.load_state_dict(total, strict=False)  # tied weights are stored once


def _weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """The names and tensors of a checkpoint, of one file or of several with an index, each read when its turn comes."""
    files, index = [SAFE_WEIGHTS_NAME], checkpoint / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for file in files:
        with safe_open(checkpoint / file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a dict)
                yield name, weights.get_tensor(name)


def _not_averaged(checkpoint: Path, name: str) -> str:
    return (
        f"{checkpoint} cannot be averaged with the others: its {name} is missing, or of another shape. Remove it, or "
        "add --average_checkpoints 1."
    )


def steps_done(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint has behind it."""
    return _trainer_state(checkpoint)["global_step"]


def is_finished(checkpoint: Path, max_steps: int, patience: int | None = None) -> bool:
    """Whether training ended with `checkpoint`, after `max_steps` steps (not above 0: those it was started with), or
    because as many evaluations as `patience` had found nothing better.

    The Trainer itself does not ask: resumed there, it would do one step more.
    """
    state = _trainer_state(checkpoint)
    stopping = state.get("stateful_callbacks", {}).get("Patience")
    if patience and stopping and stopping["attributes"]["early_stopping_patience_counter"] >= patience:
        return True
    return state["global_step"] >= (max_steps if max_steps > 0 else state["max_steps"])


def check_same_model(config: PreTrainedConfig, checkpoint: Path, switches: bool = False, adapts: bool = False) -> None:
    """Raises `InputError` if `checkpoint` holds another model than the one that is to go on from it.

    Args:
        switches: the run makes a dense model a factorized one on its way: a checkpoint may hold either.
        adapts: the run changes the ranks of layers on its way: a checkpoint may hold others.
    """
    given = _as_written_today(json.loads(config.to_json_string(use_diff=False)), adapts)
    stored = _as_written_today(_config(checkpoint), adapts)
    kinds = ["factorized" if "quantization_config" in each else "dense" for each in (stored, given)]
    if kinds[0] != kinds[1] and not switches:
        raise InputError(
            f"{checkpoint} is of a {kinds[0]} model, and this one is {kinds[1]}. Give the arguments that it was "
            "trained with, or another --output_dir."
        )
    for name, known, value in _differences(stored, given):
        values = f" ({known}, not {value})" if isinstance(value, (int, float, str)) else ""
        raise InputError(
            f"{checkpoint} is of a model with another {name}{values}. Give the arguments that it was trained with, "
            "or another --output_dir."
        )


def _differences(stored: dict, given: dict) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of what differs in two configs, but for what saving and the Trainer set; in the configs
    of a model's parts, such as its encoder's, too."""
    unrelated = {"architectures", "dtype", "transformers_version", "_name_or_path", "use_cache"}
    unrelated |= {"bos_token_id", "eos_token_id"}
    if given.get("pad_token_id") is None:
        unrelated.add("pad_token_id")
    for name in sorted((given.keys() & stored.keys()) - unrelated):
        pair = stored[name], given[name]
        if all(isinstance(each, dict) and "model_type" in each for each in pair):
            yield from ((f"{name}.{inner}", *values) for inner, *values in _differences(*pair))
        elif pair[0] != pair[1]:
            yield name, *pair


def _as_written_today(config: dict, adapts: bool) -> dict:
    """A model's config with its plan as this version stores it: an older format of the same plan is no difference.

    Where ranks adapt, neither are those, nor the core that the layers have meanwhile.
    """
    stored = config.get("quantization_config")
    if not stored or stored.get("quant_method") != "fnl":
        return config
    plan = Plan.of(FNLConfig.from_dict(stored)).to_dict()
    if adapts:
        plan["targets"] = [{k: v for k, v in each.items() if k not in ("rank", "deep")} for each in plan["targets"]]
    return config | {"quantization_config": stored | {"plan": plan, "format_version": None}}


def _config(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))


def _trainer_state(checkpoint: Path) -> dict:
    try:
        return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
