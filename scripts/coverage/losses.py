"""Does `FNLTrainer` weight the loss of every class right? One batch against its rows, in float64.

    python -m scripts.coverage.losses                    # every class of these tasks, a few minutes
    python -m scripts.coverage.losses gpt2 t5 --json rows.json

The mean loss of a batch of rows with unequal numbers of labels must be the mean of the rows' own losses, weighted with
what `fnl_hf.loss` counts. `off` is the relative difference, `off by transformers' count` that with the labels that the
stock Trainer counts.
"""

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto import modeling_auto

from fnl_hf.loss import LabelCount
from scripts.coverage.building import NotBuilt, _fitting_inputs, _instantiate, _time_limit
from scripts.coverage.configs import PROFILES, tiny_config

ROWS, LENGTH = 4, 8
COUNTS = (8, 3, 5, 0)  # labels per row; the first label of the last row is void
SECONDS = 60
EXACT = {
    "float64": 1e-6,
    "float32": 1e-4,
}  # a class may compute a part in float32; wrong counts are off by 1e-3 and more
TASKS = {
    "CAUSAL_LM": "tokens",
    "MASKED_LM": "tokens",
    "SEQ_TO_SEQ_CAUSAL_LM": "tokens",
    "SPEECH_SEQ_2_SEQ": "tokens",
    "IMAGE_TEXT_TO_TEXT": "tokens",
    "TOKEN_CLASSIFICATION": "classes",
    "SEQUENCE_CLASSIFICATION": "rows",
    "QUESTION_ANSWERING": "answers",
    "CTC": "spoken",
}


def classes(task: str) -> dict[str, str]:
    """model type -> the class that transformers maps it to for a task."""
    names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
    return {model_type: name if isinstance(name, str) else name[0] for model_type, name in names.items()}


def examine(model_type: str, task: str) -> dict[str, Any]:
    """How the labels of a tiny model of this type are counted, and how exact that is.

    Raises:
        NotBuilt: no tiny model, or none that gives a loss on inputs that we know to make.
    """
    cls, failure = getattr(transformers, classes(task)[model_type]), NotBuilt("config", "no profile")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for profile in PROFILES:
            try:
                model = _model(model_type, cls, profile)
            except Exception as error:
                failure = NotBuilt("model", f"{type(error).__name__}: {error}")
                continue
            for dtype in (torch.float64, torch.float32):  # some kernels know no float64
                for inputs in _inputs(model.to(dtype), task):
                    try:
                        with _losses_in_float64():
                            return _row(model, inputs)
                    except TimeoutError as error:
                        raise NotBuilt("forward", error) from None
                    except Exception as error:
                        failure = NotBuilt("forward", f"{type(error).__name__}: {error}")
    raise failure


def _model(model_type: str, cls: type, profile) -> nn.Module:
    config = tiny_config(model_type, profile)
    wanted = cls.config_class
    if wanted is not None and not isinstance(config, wanted):
        parts = [part for part in vars(config).values() if isinstance(part, wanted)]
        config = parts[0] if parts else config
    if "Reformer" in cls.__name__:
        config.is_decoder = cls.__name__ == "ReformerModelWithLMHead"
    if getattr(config.get_text_config(), "pad_token_id", None) is None:
        config.get_text_config().pad_token_id = 1
    config._experts_implementation = "eager"  # grouped kernels know no float64
    return _instantiate(cls, config, 0)


def _inputs(model: nn.Module, task: str) -> Iterator[dict[str, Tensor]]:
    """Batches with labels of a kind, in unequal numbers."""
    generator = torch.Generator().manual_seed(0)
    text = model.config.get_text_config(decoder=True)
    vocabulary = next((n for n in (getattr(text, "vocab_size", None), 32) if isinstance(n, int)), 32)
    ids = torch.randint(3, vocabulary - 1, (ROWS, LENGTH), generator=generator)
    if isinstance(end := getattr(text, "eos_token_id", None), int):
        ids[:, -1] = end  # where some classify
    kind = TASKS[task]
    top = {"tokens": vocabulary - 1, "spoken": vocabulary - 1}.get(kind, 2)
    labels = torch.randint(min(3, top - 1) if top > 2 else 0, top, (ROWS, LENGTH), generator=generator)
    for row, count in enumerate(COUNTS):
        labels[row, count:] = -100
    labels[-1, 4:6] = labels[0, 0]
    scored = {"labels": labels}
    if kind == "rows":
        scored = {"labels": torch.tensor([0, 1, 1, 0])}
    if kind == "answers":
        scored = {"start_positions": torch.tensor([1, 2, 0, 3]), "end_positions": torch.tensor([4, 2, 5, 6])}
    if kind == "spoken":
        labels[-1, :2] = labels[0, :2]
        scored = {"labels": labels.where(torch.arange(LENGTH) < torch.tensor([[4], [2], [3], [2]]), -100)}
    for given in ({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {"input_ids": ids}):
        yield {**given, **scored}
        yield {**given, "use_cache": False, **scored}
        yield {**given, "decoder_input_ids": ids, **scored}
        if books := getattr(model.config, "num_codebooks", None):  # of sounds: (rows, length, codebooks)
            yield {"input_ids": ids.repeat_interleave(books, 0), "labels": labels[..., None].repeat(1, 1, books)}
    with contextlib.suppress(Exception):
        found = _fitting_inputs(model.float(), 0)
        dtype = next(model.parameters()).dtype
        found = {name: value for name, value in found.items() if torch.is_tensor(value)}
        rows = {
            name: (value.to(dtype) if value.is_floating_point() else value)[:1].repeat(ROWS, *[1] * (value.dim() - 1))
            for name, value in found.items()
        }
        if kind == "tokens" and "input_ids" in rows and "decoder_input_ids" not in rows:
            length = rows["input_ids"].shape[1]
            labels = labels.repeat(1, length // LENGTH + 1)[:, :length]
            labels[:, LENGTH:] = -100
            scored = {"labels": labels}
        yield {**rows, **scored}
        rows.pop("decoder_input_ids", None)
        yield {**rows, **scored}


@torch.no_grad()
def _row(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    count = LabelCount(model)
    if not count.knows(batch):
        count.learn(batch)
    parts = [{name: _one_row(value, row) for name, value in batch.items()} for row in range(ROWS)]
    whole = _loss(model, batch)
    if not whole.isfinite():
        raise ValueError("the loss is not finite")
    losses = [torch.nan_to_num(_loss(model, part)) for part in parts]
    mapped = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss
    stock = mapped and not getattr(model.config, "is_encoder_decoder", False)
    shifted = next(iter(count._shifted.values()), ())

    def off(weights: list[Tensor]) -> float:
        mean = sum(n * loss for n, loss in zip(weights, losses, strict=True))
        total = 1 if count.sums else sum(weights)
        return ((mean / total - whole).abs() / whole.abs()).item()

    labels = [part.get("labels", part.get("start_positions")) for part in parts]
    ones = [torch.tensor(1)] * ROWS
    return {
        "class": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "shifts": bool(shifted),
        "over": count._over,
        "transformers shifts": stock,
        "off": off(ones if count.sums else [count.of(part) for part in parts]),
        "off by transformers' count": off([(x[..., 1:] if stock else x).ne(-100).sum() for x in labels]),
    }


def _one_row(value: Any, row: int) -> Any:
    each = len(value) // ROWS if torch.is_tensor(value) else 0
    return value[row * each : (row + 1) * each] if each else value


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)
    outputs = model(**batch)
    return (outputs["loss"] if isinstance(outputs, dict) else outputs[0]).double()


@contextlib.contextmanager
def _losses_in_float64() -> Iterator[None]:
    """Loss functions cast to float32 by ``.float()``, which would hide what is asked here in rounding."""
    cast = Tensor.float
    Tensor.float = lambda tensor: tensor if tensor.dtype is torch.float64 else cast(tensor)
    try:
        yield
    finally:
        Tensor.float = cast


def main(arguments: list[str] | None = None) -> None:
    """Examine types and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types (default: all)")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    rows, failures = {}, {}
    for task in options.tasks:
        for model_type in classes(task):
            if options.types and model_type not in options.types:
                continue
            try:
                with _time_limit(SECONDS):
                    rows[f"{task}/{model_type}"] = row = examine(model_type, task)
                print(
                    f"{task}/{model_type}: {row['class']}, shifts {row['shifts']}, off by {row['off']:.0e}", flush=True
                )
            except (NotBuilt, TimeoutError) as error:
                failures[f"{task}/{model_type}"] = {"not built": str(error)}
                print(f"{task}/{model_type}: not built, {error}", file=sys.stderr, flush=True)
    if options.json:
        lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in sorted((rows | failures).items())]
        text = ",\n".join([f'"transformers": "{transformers.__version__}"', *lines])
        options.json.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
    wrong = [name for name, row in rows.items() if not row["off"] <= EXACT[row["dtype"]]]
    print(f"{len(rows)} classes examined, {len(failures)} not built; weighted wrongly: {', '.join(wrong) or 'none'}")


if __name__ == "__main__":
    main()
