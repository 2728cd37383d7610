"""Seconds of a training step whose ranks adapt, beside a fixed rank under Frobenius decay and the dense model.

    python scripts/benchmark_dlrt.py                              # BERT-mini, 8 x 128 tokens
    python scripts/benchmark_dlrt.py --size base --bf16           # on an accelerator, if there is one
    python scripts/benchmark_dlrt.py --interval 20 --json results.json

A masked language model on random tokens, AdamW, all linear layers of its blocks and head at the same fraction of their
rank. What is timed is whole cycles of --interval steps: growing the bases, steps of the augmented cores (twice the
rank), and the cut; at a tolerance of zero and a largest rank of --rank, every cut comes back to the rank of the fixed
model. Short runs of the variants alternate, so that a drift of the machine hits all alike; the first cycle of each is
not counted. A ratio is the median of the ratios of neighbouring runs.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from transformers import BertConfig, BertForMaskedLM, TrainerCallback, set_seed

import fnl_hf
from fnl_hf.tasks.pretraining.model import SIZES
from fnl_hf.tasks.running import write_json

VARIANTS = ("dense", "fixed", "dlrt")


class Clock(TrainerCallback):
    """Seconds of the steps from `first` to before `last`."""

    def __init__(self, first: int, last: int):
        self.first, self.last = first, last
        self.seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step in (self.first, self.last):
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            self.seconds = time.perf_counter() - self.seconds


def seconds_per_step(variant: str, options: argparse.Namespace, folder: str) -> float:
    """The mean over whole cycles of a new model."""
    set_seed(0)
    layers, width = SIZES[options.size]
    config = BertConfig(
        vocab_size=options.vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
    )
    model = BertForMaskedLM(config)
    if variant != "dense":
        fnl_hf.factorize(model, fnl_hf.FNLConfig(attention=(), target_modules="all-linear", rank=options.rank))
    tokens = torch.randint(options.vocab_size, (options.batch, options.tokens))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    first, last = options.interval, (1 + options.cycles) * options.interval
    fields = {"rank_adaptation": "dlrt", "rank_interval": options.interval, "rank_tolerance": 0.0}
    # The last cycle of a run does not augment: there is one more than those that are timed
    args = fnl_hf.FNLTrainingArguments(
        folder,
        max_steps=last + options.interval,
        per_device_train_batch_size=options.batch,
        learning_rate=1e-4,
        bf16=options.bf16,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **(fields | {"rank_max": round(options.rank * width)} if variant == "dlrt" else {}),
        **({"frobenius_decay": 0.01} if variant == "fixed" else {}),
    )
    clock = Clock(first, last)
    fnl_hf.FNLTrainer(model, args, train_dataset=data, callbacks=[clock]).train()
    return clock.seconds / (last - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="mini")
    parser.add_argument("--vocab_size", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--rank", type=float, default=0.25, help="of the layers, as a fraction of the full one")
    parser.add_argument("--interval", type=int, default=20, help="steps of a cycle (rank_interval)")
    parser.add_argument("--cycles", type=int, default=1, help="cycles of a run, without those that are not timed")
    parser.add_argument("--repeats", type=int, default=5, help="runs of every variant")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()

    seconds = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for variant in VARIANTS * options.repeats:
            seconds[variant].append(seconds_per_step(variant, options, folder))
    ratios = {
        f"dlrt / {other}": median(own / theirs for own, theirs in zip(seconds["dlrt"], seconds[other], strict=True))
        for other in ("fixed", "dense")
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    step = f"{options.batch} x {options.tokens} tokens a step"
    print(f"BERT {options.size}, {step}, interval {options.interval}, {device}")
    for variant in VARIANTS:
        print(f"{variant:6s} {1000 * median(seconds[variant]):8.1f} ms a step")
    for name, ratio in ratios.items():
        print(f"{name:13s} x {ratio:.3f}")
    if options.json:
        setting = {key: value for key, value in vars(options).items() if key != "json"}
        setting |= {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
        write_json(options.json, {"setting": setting, "seconds_per_step": seconds, "ratios": ratios})


if __name__ == "__main__":
    main()
