"""Masked-LM training against transformers' own: tokens per second and peak memory, in one run.

    python scripts/benchmark_mlm.py                               # BERT-mini, 16 x 128 tokens
    python scripts/benchmark_mlm.py --size base --bf16            # on an accelerator, if there is one
    python scripts/benchmark_mlm.py --json results.json

ours: the trainer of run_mlm.py, attention factorized with spectral initialisation, Frobenius decay, our masks and
blocks; with the head at masked tokens only, as it is by default, and with all logits as transformers computes them.
stock: `Trainer` with `DataCollatorForLanguageModeling` on the same blocks as a `datasets.Dataset`, the same model not
factorized, weight decay. Both take AdamW, the optimizer that both have.

Short runs of the variants alternate, so that a drift of the machine hits all alike; the first steps of each are not
counted. The ratio is the median of the ratios of neighbouring runs. Peak memory is that of a process of its own for
each variant: resident on the CPU, allocated on an accelerator.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from transformers import (
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import fnl_hf
from fnl_hf.tasks.pretraining import (
    Blocks,
    Masking,
    MLMArguments,
    MLMTrainer,
    Run,
    new_model,
    prepare_store,
    prepare_tokenizer,
    read_corpus,
    shipped_file,
    train_tokenizer,
)
from fnl_hf.tasks.pretraining.model import MODEL_TYPES, SIZES
from fnl_hf.tasks.running import write_json

VARIANTS = ("stock", "ours", "ours, all logits")
WARMUP = 3  # steps of a run that are not counted


class Clock(TrainerCallback):
    """Seconds from the end of step `WARMUP` to the end of the last."""

    def __init__(self, device: torch.device):
        self.device = device

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (WARMUP, state.max_steps):
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
            now = time.perf_counter()
            self.seconds = now - self.started if state.global_step == state.max_steps else None
            self.started = now


def read():
    return read_corpus([shipped_file("train")], documents="blank_line")


class Bench:
    """Makes the trainer of any variant, on the same tokens."""

    def __init__(self, options: argparse.Namespace, directory: Path):
        self.options, self.directory = options, directory
        kind = "wordpiece" if options.model_type in ("bert", "electra") else "bpe"
        self.tokenizer = prepare_tokenizer(
            directory / "tokenizer",
            lambda: train_tokenizer(lambda: filter(None, read()), kind, options.vocab_size, token_types=False),
        )
        store = prepare_store(directory / "train", read, self.tokenizer)
        self.blocks = Blocks(store, options.tokens, self.tokenizer)

    def trainer(self, variant: str) -> tuple[Trainer, Clock]:
        """A trainer with a new model, and the clock that times its run."""
        options, tokenizer = self.options, self.tokenizer
        set_seed(0)
        model = new_model(options.model_type, options.size, tokenizer, options.tokens)
        common = {
            "output_dir": str(self.directory / "out"),
            "max_steps": WARMUP + options.steps,
            "per_device_train_batch_size": options.batch,
            "learning_rate": 1e-4,
            "weight_decay": 0.01,
            "bf16": options.bf16,
            "torch_compile": options.torch_compile,
            "save_strategy": "no",
            "logging_steps": 10_000,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_num_workers": options.workers,
            "dataloader_pin_memory": torch.accelerator.is_available(),
        }
        if variant == "stock":
            from datasets import Dataset  # after fnl_hf.tasks, which says how to install it

            rows = [self.blocks[i].tolist() for i in range(min(len(self.blocks), 2000))]
            special = [[int(token in tokenizer.all_special_ids) for token in row] for row in rows]
            data = Dataset.from_dict(
                {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows], "special_tokens_mask": special}
            )
            trainer = Trainer(
                model,
                TrainingArguments(**common),
                train_dataset=data,
                data_collator=DataCollatorForLanguageModeling(tokenizer),
            )
        else:
            fnl_hf.factorize(model, fnl_hf.FNLConfig())
            args = MLMArguments(
                **common,
                fnl_optim=None,
                lr_scheduler_type="linear",
                head_at_masks=variant == "ours",
                train_sampling_strategy="sequential",
                remove_unused_columns=False,
            )
            run = Run([self.blocks], [common["max_steps"] * args.train_batch_size], seed=0)
            trainer = MLMTrainer(model, args, train_dataset=run, data_collator=Masking(tokenizer))
        clock = Clock(trainer.args.device)
        trainer.add_callback(clock)
        return trainer, clock

    def tokens_per_second(self, variant: str) -> float:
        trainer, clock = self.trainer(variant)
        trainer.train()
        return self.options.steps * trainer.args.train_batch_size * self.options.tokens / clock.seconds


def peak_memory() -> int:
    """Bytes that this process held at most: on its accelerator if it has one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_of(variant: str) -> int:
    """Peak memory of a process that trains one variant, with the options of this one."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", variant]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {variant!r} failed:\n{done.stderr}")
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_type", choices=MODEL_TYPES, default="bert")
    parser.add_argument("--size", choices=tuple(SIZES), default="mini")
    parser.add_argument("--vocab_size", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=16, help="blocks of a step")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a block")
    parser.add_argument("--steps", type=int, default=10, help="steps of a run, without those that are not counted")
    parser.add_argument("--repeats", type=int, default=5, help="runs of every variant")
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--torch_compile", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--memory_of", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(options, Path(directory))
        if options.memory_of:
            bench.trainer(options.memory_of)[0].train()
            print(peak_memory())
            return
        memory = {variant: memory_of(variant) for variant in VARIANTS}
        rates = {variant: [] for variant in VARIANTS}
        for variant in VARIANTS * options.repeats:
            rates[variant].append(bench.tokens_per_second(variant))
    ratios = {
        variant: {
            "tokens/s": median(own / stock for own, stock in zip(rates[variant], rates["stock"], strict=True)),
            "peak memory": memory[variant] / memory["stock"],
        }
        for variant in VARIANTS[1:]
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{options.model_type} {options.size}, {options.batch} x {options.tokens} tokens a step, {device}")
    for variant in VARIANTS:
        print(f"{variant:18s} {median(rates[variant]):12.0f} tokens/s  {memory[variant] / 1e9:8.3f} GB")
    for variant, values in ratios.items():
        print(f"{variant + ' / stock':26s} " + ", ".join(f"{name} x {value:.3f}" for name, value in values.items()))
    if options.json:
        setting = {key: value for key, value in vars(options).items() if key not in ("json", "memory_of")}
        setting |= {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
        figures = {"setting": setting, "tokens_per_second": rates, "peak_memory_bytes": memory, "ratios": ratios}
        write_json(options.json, figures)


if __name__ == "__main__":
    main()
