"""Fine-tuning a trained translation model on other text: dense, and with narrower heads that start in two ways.

    python scripts/run_translation.py
    python scripts/compare_finetuning.py --model runs/translation --train train.de.gz train.en.gz \\
        --test test.de.gz test.en.gz --json scripts/results/finetuning_cpu.json

The model is made dense first. BLEU on the new test set, and on the test set that ships, which is what the model was
trained for: before, after factorizing, after fine-tuning with each of some seeds.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, set_seed

import fnl_hf
from fnl_hf.tasks.running import prepared_directory, run_main, write_json
from fnl_hf.tasks.translation import (
    DataArguments,
    TranslationArguments,
    TranslationCollator,
    TranslationTrainer,
    prepare_pairs,
    sacrebleu_scores,
    translate,
)
from fnl_hf.tasks.translation.corpus import ParallelText, read_pairs, shipped_text

VARIANTS = {
    "dense": None,
    "heads at 0.5, spectral": fnl_hf.FNLConfig(head_rank=0.5, init="spectral"),
    "heads at 0.5, default": fnl_hf.FNLConfig(head_rank=0.5, init="default"),
}


def dense_model(path: Path):
    """The model of a finished run, dense."""
    model = AutoModelForSeq2SeqLM.from_pretrained(path)
    return fnl_hf.to_dense(model) if fnl_hf.factorizations(model) else model


def bleu(model, tokenizer, tests: dict[str, list]) -> dict[str, float]:
    scores = {}
    for name, pairs in tests.items():
        sources, targets = map(list, zip(*pairs, strict=True))
        translations = translate(model, tokenizer, sources, num_beams=5, progress=False)
        scores[name] = round(sacrebleu_scores(translations, [targets], "en")["bleu"], 2)
    return scores


def fine_tune(model, tokenizer, dataset, seed: int, options: argparse.Namespace) -> None:
    """Train in place, without a trace on the disk."""
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        args = TranslationArguments(
            output_dir=folder,
            seed=seed,
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            warmup_steps=0.05,
            max_tokens=options.max_tokens,
            save_strategy="no",
            logging_steps=options.steps,
            report_to="none",
            disable_tqdm=True,
            frobenius_decay=0.0,
        )
        collator = TranslationCollator.of(model, tokenizer)
        TranslationTrainer(model, args, train_dataset=dataset, data_collator=collator).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=Path("runs/translation"), help="a finished run (default: %(default)s)"
    )
    parser.add_argument("--train", nargs=2, required=True, metavar=("SOURCE", "TARGET"), help="text to fine-tune on")
    parser.add_argument("--test", nargs=2, required=True, metavar=("SOURCE", "TARGET"), help="its test set")
    parser.add_argument("--steps", type=int, default=600, help="of fine-tuning (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="(default: %(default)s)")
    parser.add_argument("--max_tokens", type=int, default=2000, help="of a batch (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [ParallelText(tuple(map(Path, files)), ("de", "en")) for files in (options.train, options.test)]
    tests = {"new": read_pairs(texts[1]), "shipped": read_pairs(shipped_text("test"))}
    dataset = prepare_pairs(texts[0], tokenizer, DataArguments(), prepared_directory(None, options.model))
    results = {"before": bleu(dense_model(options.model), tokenizer, tests)}
    print(f"before: {results['before']}", flush=True)
    for name, config in VARIANTS.items():
        row = {"fine-tuned": {}}
        for seed in options.seeds:
            model = dense_model(options.model)
            if config is not None:
                fnl_hf.factorize(model, config)
                row.setdefault("factorized", bleu(model, tokenizer, tests))
            fine_tune(model, tokenizer, dataset, seed, options)
            row["fine-tuned"][str(seed)] = bleu(model, tokenizer, tests)
        results[name] = row
        means = {test: round(statistics.mean(s[test] for s in row["fine-tuned"].values()), 2) for test in tests}
        print(
            f"{name}: factorized {row.get('factorized', '-')}, fine-tuned {row['fine-tuned']}, mean {means}", flush=True
        )
    if options.json:
        given = {"steps": options.steps, "learning rate": options.learning_rate, "max_tokens": options.max_tokens}
        write_json(options.json, {"settings": given, "BLEU": results})


if __name__ == "__main__":
    run_main(main)
