"""Batches by tokens against transformers' own batches: target tokens per second and padding, in one run.

    python scripts/benchmark_batches.py                           # the corpus that ships
    python scripts/benchmark_batches.py --corpus multi30k train.de.gz train.en.gz --corpus iwslt x.de.gz x.en.gz
    python scripts/benchmark_batches.py --json results.json

ours: the trainer of run_translation.py. stock: `Seq2SeqTrainer` as it comes, with batches of sentences drawn at random.
grouped: the same with `train_sampling_strategy="group_by_length"`. All three train the same dense Marian on the same
token ids; the sentences of a stock batch are as many as ours have in the mean.

What is counted are target tokens without padding. Short runs of the three alternate, so that a drift of the machine
hits all alike; the first steps of each are not counted. The ratio is the median of the ratios of neighbouring runs.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback, set_seed

from fnl_hf.tasks.running import write_json
from fnl_hf.tasks.translation import (
    DataArguments,
    ParallelText,
    TokenBatchSampler,
    TranslationArguments,
    TranslationTrainer,
    new_marian,
    prepare_pairs,
    prepare_vocabulary,
)
from fnl_hf.tasks.translation.corpus import shipped_text

VARIANTS = ("stock", "grouped", "ours")
WARMUP = 3  # steps of a run that are not counted


class Meter(TrainerCallback):
    """Counts what goes into the steps after `WARMUP`, and their seconds."""

    def __init__(self, trainer: Seq2SeqTrainer):
        self.trainer, self.step = trainer, trainer.training_step
        trainer.training_step = self.training_step
        trainer.add_callback(self)
        self.start()

    def start(self) -> None:
        self.sentences = self.tokens = self.padded = self.targets = 0
        self.started = time.perf_counter()

    def training_step(self, model, inputs, *args, **kwargs):
        targets = int(inputs["labels"].ne(-100).sum())
        self.sentences += len(inputs["labels"])
        self.targets += targets
        self.tokens += targets + int(inputs["attention_mask"].sum())
        self.padded += inputs["labels"].numel() + inputs["input_ids"].numel()
        return self.step(model, inputs, *args, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (WARMUP, state.max_steps):
            if args.device.type != "cpu":
                torch.accelerator.synchronize()
            self.seconds = time.perf_counter() - self.started
            if state.global_step == WARMUP:
                self.start()

    def figures(self) -> dict[str, float]:
        steps = self.trainer.args.max_steps - WARMUP
        return {
            "target_tokens_per_second": self.targets / self.seconds,
            "padding": 1 - self.tokens / self.padded,
            "sentences_per_batch": self.sentences / steps,
        }


class Bench:
    """Makes the trainer of any variant, on the same token ids."""

    def __init__(self, text: ParallelText, options: argparse.Namespace, directory: Path):
        import datasets  # after fnl_hf.tasks, which says how to install it

        self.options, self.directory = options, directory
        data_args = DataArguments(max_length=options.max_length)
        self.tokenizer = prepare_vocabulary(text, options.vocab_size, data_args, directory)
        self.pairs = prepare_pairs(text, self.tokenizer, data_args, directory)
        self.rows = datasets.Dataset.from_list(list(self.pairs))
        batches = TokenBatchSampler(self.pairs.lengths, options.max_tokens, seed=0)
        self.padding = 1 - self.pairs.lengths.sum() / sum(
            len(batch) * self.pairs.lengths[batch].max(0).sum() for batch in batches
        )
        self.sentences = round(len(self.pairs) / len(batches))

    def figures(self, variant: str, seed: int) -> dict[str, float]:
        """What a short run of a new model gives."""
        options = self.options
        set_seed(seed)
        sizes = {name: getattr(options, name) for name in ("d_model", "layers", "heads", "ffn_dim", "max_length")}
        model = new_marian(self.tokenizer, **sizes, dropout=0.0)
        common = {
            "output_dir": str(self.directory / "out"),
            "max_steps": WARMUP + options.steps,
            "label_smoothing_factor": 0.1,
            "save_strategy": "no",
            "logging_steps": 10_000,
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": options.bf16,
            "seed": seed,
            "dataloader_pin_memory": torch.accelerator.is_available(),
        }
        parts = {"model": model, "data_collator": DataCollatorForSeq2Seq(self.tokenizer, model=model)}
        if variant == "ours":
            args = TranslationArguments(**common, max_tokens=options.max_tokens)
            trainer = TranslationTrainer(args=args, train_dataset=self.pairs, **parts)
        else:
            sampling = {"grouped": "group_by_length", "stock": "random"}[variant]
            common |= {"per_device_train_batch_size": self.sentences, "train_sampling_strategy": sampling}
            trainer = Seq2SeqTrainer(args=Seq2SeqTrainingArguments(**common), train_dataset=self.rows, **parts)
        meter = Meter(trainer)
        trainer.train()
        return meter.figures()


def measure(text: ParallelText, options: argparse.Namespace, directory: Path) -> dict:
    """Figures of all variants on one corpus, and the ratios of ours to the others."""
    bench = Bench(text, options, directory)
    runs = {variant: [] for variant in VARIANTS}
    for repeat in range(options.repeats):
        for variant in VARIANTS:
            runs[variant].append(bench.figures(variant, seed=repeat))
    rate = "target_tokens_per_second"
    return {
        "pairs": len(bench.pairs),
        "padding_of_an_epoch": bench.padding,
        **{variant: {key: median(run[key] for run in each) for key in each[0]} for variant, each in runs.items()},
        "ratios": {
            f"ours / {other}": median(a[rate] / b[rate] for a, b in zip(runs["ours"], runs[other], strict=True))
            for other in VARIANTS[:2]
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--corpus",
        action="append",
        nargs=3,
        metavar=("NAME", "SOURCE", "TARGET"),
        help="two line-aligned text files (.gz, .xz too); several times for several corpora",
    )
    parser.add_argument("--max_tokens", type=int, default=4096, help="tokens of a batch, as in run_translation.py")
    parser.add_argument("--max_length", type=int, default=128, help="tokens of a sentence")
    parser.add_argument("--vocab_size", type=int, default=3000, help="tokens of the joint BPE")
    parser.add_argument("--d_model", type=int, default=192)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--ffn_dim", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20, help="steps of a run, without those that are not counted")
    parser.add_argument("--repeats", type=int, default=3, help="runs of every variant")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()

    texts = {name: ParallelText((Path(a), Path(b)), ("source", "target")) for name, a, b in options.corpus or ()}
    figures = {}
    for name, text in (texts or {"tatoeba": shipped_text("train")}).items():
        with tempfile.TemporaryDirectory() as directory:
            figures[name] = result = measure(text, options, Path(directory))
        print(f"{name}, {result['pairs']:,} pairs; padding of an epoch of ours {result['padding_of_an_epoch']:.1%}")
        for variant in VARIANTS:
            values = result[variant]
            print(
                f"  {variant:8s} {values['target_tokens_per_second']:8.0f} target tokens/s, padding "
                f"{values['padding']:6.1%}, {values['sentences_per_batch']:6.1f} sentences a batch"
            )
        print("  " + ", ".join(f"{ratio} {value:.2f} x" for ratio, value in result["ratios"].items()))
    if options.json:
        setting = {key: value for key, value in vars(options).items() if key not in ("json", "corpus")}
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        setting |= {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
        write_json(options.json, {"setting": setting, "corpora": figures})


if __name__ == "__main__":
    main()
