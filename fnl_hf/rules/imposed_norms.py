"""The normalization experiment (Khodak et al., ICLR 2021, section 3.3): is it the norms that decay helps by?

Run A trains with decay and records the Frobenius norm of every product after every step. Run B trains without decay
and has these norms imposed: after each step its factors are scaled so that every product is as large as A's was.

    FNLTrainer(..., FNLTrainingArguments(frobenius_decay=0.01, ...), callbacks=[RecordNorms("norms.jsonl")]).train()
    FNLTrainer(..., FNLTrainingArguments(frobenius_decay=0.0, ...), callbacks=[ImposeNorms("norms.jsonl")]).train()
"""

import json
import os
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback

from ..factorization import Factorization, factorizations
from ..sharding import is_sharded
from .rule import Rule


@torch.no_grad()
def norms(products: list[Factorization]) -> dict[str, float]:
    """name -> ‖product‖_F, over all its heads.

    Raises:
        ValueError: Parameters are sharded.
    """
    if any(map(is_sharded, products)):
        raise ValueError("norms of sharded parameters are not recorded or imposed: run this experiment without FSDP")
    values = torch.stack([product.squared_norm().sqrt() for product in products]).tolist() if products else []
    return {product.name: value for product, value in zip(products, values, strict=True)}


@torch.no_grad()
def scale_to_(product: Factorization, norm: float) -> None:
    """Multiply every factor by the same number, √(norm / ‖product‖_F) for two of them: the product gets that norm.

    A product that is zero stays zero.
    """
    tensors, squared = product.tensors(), float(product.squared_norm())
    if squared > 0:
        # ½ ‖product‖² is homogeneous in its factors, of twice the degree k of the product: Σ ⟨A, ∂A⟩ = k ‖product‖².
        gradients = product.form.decay_gradients(tensors)
        slope = sum(float((tensor * gradient).sum()) for tensor, gradient in zip(tensors, gradients, strict=True))
        scale = (norm / squared**0.5) ** (1 / round(slope / squared))
        for tensor in tensors:
            tensor.mul_(scale)


class RecordNorms(TrainerCallback):
    """Writes the norm of every product after every optimizer step: JSON lines {"step": 1, "norms": {name: norm}}.

    It only looks, so it is no `Rule` but a plain callback, which every `Trainer` takes.

    A resumed run goes on where its checkpoint was: what a killed run recorded after that is dropped.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def on_train_begin(self, args, state, control, **kwargs):
        """Keep the steps that a resumed run has behind it."""
        if state.is_world_process_zero:
            kept = [row for row in _rows(self.path) if row["step"] <= state.global_step] if state.global_step else []
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
            os.replace(partial, self.path)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """One line."""
        if state.is_world_process_zero:
            row = {"step": state.global_step, "norms": norms(factorizations(model))}
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


class ImposeNorms(Rule):
    """Scales the factors after every optimizer step to the norms that `RecordNorms` wrote; they get no weight decay.

    Raises:
        ValueError: At start, if Frobenius decay is on, or the record is of another model or of fewer steps.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.targets = {row["step"]: row["norms"] for row in _rows(self.path)}
        if not self.targets:
            raise ValueError(f"{self.path} holds no norms: record them first, with RecordNorms({str(self.path)!r})")

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Fail before the first step, not at the first one that is missing."""
        super().on_train_begin(args, state, control)
        if args.frobenius_decay != 0:
            raise ValueError(
                f"norms are imposed in place of decay, but frobenius_decay is {args.frobenius_decay}: set it to 0.0"
            )
        here = set(norms(factorizations(model)))
        if different := sorted(set().union(*(here ^ set(recorded) for recorded in self.targets.values()))):
            raise ValueError(f"{self.path} is of another model: only one of the two has {different[0]}")
        if missing := set(range(state.global_step + 1, state.max_steps + 1)) - set(self.targets):
            raise ValueError(
                f"{self.path} ends before the run does: step {min(missing)} of {state.max_steps} is missing; record a "
                "run of as many steps"
            )

    def covered(self) -> set[nn.Parameter]:
        return {parameter for product in factorizations(self.run.model) for parameter in product.parameters()}

    def after_step(self) -> None:
        """The same norms as the recorded run had after this step."""
        norms_now = self.targets[self.run.state.global_step]
        for product in factorizations(self.run.model):
            scale_to_(product, norms_now[product.name])


def _rows(path: Path) -> list[dict]:
    """The lines of a record; one that was cut off in the middle is dropped."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
