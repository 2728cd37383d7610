"""A smaller copy of a trained model, taught by it, and what of it went where: what `fnl-hf compress` does."""

import contextlib
import copy
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback

from .attachment import attached
from .distillation import HIDDEN, Teacher
from .factorization import Factorization, declared, overwrite
from .messages import aligned
from .moments import evaluated, on_device
from .plan import Plan, Target
from .texts import TextCollator
from .trainer import FNLTrainer
from .training_arguments import FNLTrainingArguments

LOOKS, ROWS = 4, 8  # batches that errors are measured on, and texts of each
TAUGHT_BATCH, TAUGHT_RATE, WARMUP = 32, 3e-4, 20
ROUNDS = 5  # of timing
SHOWN = 3  # names of what stayed dense
DENSE = "dense: "
OF_HIDDEN = "squared, of hidden states as a share of their own, and of their means over a text, added up"
OF_LOGITS = "divergence of the distributions of the logits, in nats"


@dataclass(frozen=True)
class Part:
    """What became of the products of one kind.

    Attributes:
        kind: "embedding", "linear", "qk", …; "the rest" is what stayed dense.
        count: modules.
        before, after: parameters.
        ranks: "88" or "12-31", and the full one behind a stroke.
        error: how far the model's outputs are from what they were with this kind alone compressed, before any teaching.
    """

    kind: str
    count: int
    before: int
    after: int
    ranks: str
    error: float | None


@dataclass(frozen=True)
class Report:
    """What a compression did, by kinds and as a whole; ``print`` it.

    Attributes:
        error, taught: distance of the whole from the dense model, before and after it learned from that.
        measure: what errors are of, in words.
        kept: what was selected and stayed dense, and why.
        speeds: (batch, texts per second of the dense model, and of the compressed one).
    """

    parts: list[Part]
    before: int
    after: int
    error: float
    taught: float | None
    measure: str
    kept: list[str]
    speeds: list[tuple[int, float, float]]

    def learned(self) -> bool:
        """Whether it is nearer to the dense model than before it learned from that."""
        return self.taught is not None and self.taught < self.error

    def to_dict(self) -> dict:
        """JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        head = ("part", "modules", "parameters", "after", "rank", "error alone")
        rows = [
            (
                p.kind,
                str(p.count),
                f"{p.before:,}",
                f"{p.after:,}",
                p.ranks,
                "" if p.error is None else f"{p.error:.4f}",
            )
            for p in self.parts
        ]
        whole = ("the model", "", f"{self.before:,}", f"{self.after:,}", f"{self.after / self.before:.1%}")
        lines = [aligned([head, *rows, (*whole, _figure(self.error))]), f"errors: {self.measure}"]
        if self.kept:
            more = f" and {len(self.kept) - SHOWN} more" if len(self.kept) > SHOWN else ""
            lines.append(f"stayed dense: {', '.join(self.kept[:SHOWN])}{more}")
        lines += [
            f"batch of {batch}: {dense:.1f} texts a second before, {small:.1f} after ({small / dense:.2f} times)"
            for batch, dense, small in self.speeds
        ]
        if any(small < dense for _, dense, small in self.speeds):
            lines.append("slower than before: fnl_hf.for_inference(model) gives every layer its fastest equal form")
        if self.taught is not None:
            kept = "" if self.learned() else ": worse, so what it has learned is left out"
            lines.append(f"error after learning from the dense model: {_figure(self.taught)}{kept}")
        return "\n".join([*lines, f"next: {self._advice()}"])

    def _advice(self) -> str:
        if self.taught is None:
            return "--teach 500 lets it learn from the dense model on the same texts, which wins back most of the loss"
        if not self.learned():
            return "more steps: few of them only disturb it"
        if self.taught > 0.5 * self.error:
            return "more steps or more texts of the kind that it will see, or a larger --target_ratio"
        return (
            "measure it on your task; fnl_hf.for_inference(model) makes it faster, and fnl-hf to-dense ordinary again"
        )


def report(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    batches: Sequence[Mapping[str, object]],
    taught: PreTrainedModel | None = None,
) -> Report:
    """Compare a compressed model with the dense one that it was made of.

    Args:
        compressed: as it was factorized.
        batches: of texts, to measure errors and speeds on.
        taught: the same model after it learned from the dense one.
    """
    looks = [_some_rows(batch, ROWS) for batch in batches[:: max(1, len(batches) // LOOKS)][:LOOKS]]
    looks = [on_device(dense, batch) for batch in looks]
    teacher = Teacher(dense)
    wanted = [teacher.outputs(batch) for batch in looks]

    @torch.no_grad()
    def error(model: nn.Module) -> float:
        with evaluated(model):
            pairs = zip(looks, wanted, strict=True)
            return sum(float(teacher.distance(model(**batch), before, batch)) for batch, before in pairs) / len(looks)

    scratch, products = copy.deepcopy(dense), {product.name: product for product in declared(compressed)}
    planned = Plan.of(attached(compressed))
    targets = planned.targets
    parts, seen = [], set()
    for kind in dict.fromkeys(target.kind for target in targets):
        of_kind = [target for target in targets if target.kind == kind]
        with _overwritten(scratch, of_kind, products):
            alone = error(scratch)
        parts.append(_part(kind, dense, [t for t in of_kind if _is_new(t, dense, seen)], products, alone))
    before, after = (sum(p.numel() for p in model.parameters()) for model in (dense, compressed))
    rest = [sum(getattr(part, name) for part in parts) for name in ("before", "after")]
    parts.append(Part("the rest", 0, before - rest[0], after - rest[1], "", None))
    final = compressed if taught is None else taught
    return Report(
        parts,
        before,
        after,
        error(compressed),
        None if taught is None else error(taught),
        OF_HIDDEN if HIDDEN in wanted[0] else OF_LOGITS,
        [f"{skip.name} ({skip.reason.removeprefix(DENSE)})" for skip in planned.skipped if DENSE in skip.reason],
        [(rows, *_speeds(dense, final, batches, rows)) for rows in (1, 32)],
    )


class Learner(FNLTrainer):
    """`FNLTrainer` for a student that is to give what its teacher gives, without the noise of dropout.

    Afterwards the student keeps keys and values if its teacher does: a Trainer turns that off in a config for good.
    """

    def train(self, *args, **kwargs):
        """As in `FNLTrainer`."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if (caching := getattr(self._teacher.model.config, "use_cache", None)) is not None:
                self.model.config.use_cache = caching

    def compute_loss(self, model, *args, **kwargs):
        """As in `FNLTrainer`, in evaluation mode."""
        return super().compute_loss(model.eval(), *args, **kwargs)


def teach(
    student: PreTrainedModel,
    dense: PreTrainedModel,
    rows: Sequence[Mapping[str, list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    progress: bool = True,
) -> None:
    """Let a compressed model learn from the dense one, in place, on texts without labels.

    Args:
        rows: of ``texts.encoded_texts``.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = FNLTrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=TAUGHT_BATCH,
            learning_rate=TAUGHT_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=max(WARMUP, 0.1 * steps),
            train_sampling_strategy="group_by_length",
            remove_unused_columns=False,
            label_names=[],
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            frobenius_decay=0.0,
            dataloader_pin_memory=torch.accelerator.is_available(),
            disable_tqdm=not progress,
        )
        collate = TextCollator(tokenizer, dense)
        trainer = Learner(student, arguments, collate, train_dataset=list(rows), teacher=dense)
        trainer.remove_callback(ProgressCallback if progress else PrinterCallback)
        if progress:
            trainer.add_callback(_Bar())
        trainer.train()
    student.eval()


# ----------------------------------------------------------------------------------------------------


class _Bar(ProgressCallback):
    """A progress bar, and nothing on standard output."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


def _figure(error: float | None) -> str:
    return "" if error is None else f"{error:.4f}"


@contextlib.contextmanager
def _overwritten(model: nn.Module, targets: Sequence[Target], products: Mapping[str, Factorization]):
    """Within, a dense model has the products of some targets as a compressed model has them."""
    kept = []
    for target in targets:
        product = target.found(model)
        kept.append((product, [factor.clone() for factor in product.augmented()]))
        overwrite(product, [factor.detach() for factor in products[target.name].augmented()])
    try:
        yield
    finally:
        for product, factors in reversed(kept):
            with torch.no_grad():
                product.write(factors)


def _is_new(target: Target, model: nn.Module, seen: set) -> bool:
    """Whether no tied layer was counted before."""
    key = target.found(model).weights
    return not (key in seen or seen.add(key))


def _part(
    kind: str, dense: nn.Module, targets: Sequence[Target], products: Mapping[str, Factorization], error: float
) -> Part:
    found = [target.found(dense) for target in targets]
    now = [products[target.name] for target in targets]
    ranks, full = sorted({product.size()[1] for product in now}), sorted({product.full_rank for product in now})
    span = "-".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))) if ranks else ""
    return Part(kind, len(targets), _size(found), _size(now), f"{span}/{full[-1]}" if full else "", error)


def _size(products: Sequence[Factorization]) -> int:
    """Parameters behind products, with the biases that get narrower with them."""
    return sum(view.augmented().numel() for product in products for view in product.views)


@torch.no_grad()
def _speeds(
    dense: nn.Module, compressed: nn.Module, batches: Sequence[Mapping[str, object]], rows: int
) -> tuple[float, float]:
    """Texts per second of both, the best of interleaved rounds: other jobs only ever slow them down."""
    middle = dict(batches[len(batches) // 2])
    one = on_device(dense, _repeated(middle, rows))
    best = [float("inf")] * 2
    with evaluated(dense), evaluated(compressed):
        for _ in range(ROUNDS):
            for i, model in enumerate((dense, compressed)):
                start = time.perf_counter()
                model(**one)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                best[i] = min(best[i], time.perf_counter() - start)
    return rows / best[0], rows / best[1]


def _some_rows(batch: Mapping[str, object], rows: int) -> dict[str, object]:
    return {name: value[:rows] if isinstance(value, Tensor) else value for name, value in batch.items()}


def _repeated(batch: Mapping[str, object], rows: int) -> dict[str, object]:
    """A batch of some rows, its own again and again if it has fewer."""
    return {
        name: value[torch.arange(rows) % len(value)] if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
