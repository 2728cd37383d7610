"""What planning, proof and `factorize` take: time and memory, for BERT-large and a 4-layer Llama of width 2048.

    python scripts/benchmark_factorize.py
    python scripts/benchmark_factorize.py --against ../before --json scripts/results/benchmark_factorize_cpu.json

Each figure is the median of some rounds, of a fresh process each; a second tree of this repository takes turns with
this one. `factorize` stands beside a forward of inputs as short as those that it records, `verify` of BERT-base on
8 x 512 tokens beside a forward of those. Memory is what the process held at most, above what it held before. Last, a
masked BERT-base is factorized to half its parameters, which takes a decomposition of every matrix, with the 30,522 rows
of its embedding among them: seconds, and the growth of memory over what the process held with the dense model, as a
share of that model. That alone, on as many threads as `OMP_NUM_THREADS` says:

    python scripts/benchmark_factorize.py --only half
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
import transformers as tf

import fnl_hf

MODELS = {
    "llama 4 x 2048": lambda: tf.LlamaModel(
        tf.LlamaConfig(
            hidden_size=2048, intermediate_size=5504, num_hidden_layers=4, num_attention_heads=16, vocab_size=1000
        )
    ),
    "bert-large": lambda: tf.BertModel(
        tf.BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    ),
    "bert-base": lambda: tf.BertModel(tf.BertConfig()),
    "masked bert-base": lambda: tf.BertForMaskedLM(tf.BertConfig()),
}


def seconds(function, *args, **kwargs) -> float:
    started = time.perf_counter()
    function(*args, **kwargs)
    return time.perf_counter() - started


def peak() -> float:
    """The most memory that this process has held, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


@torch.no_grad()
def of_factorize(name: str) -> dict[str, float]:
    """Seconds of `factorize`, of the planning and proof in it, and of a forward as short as the recorded one."""
    model = MODELS[name]().eval()
    inputs, before, planning = {"input_ids": torch.randint(5, 900, (1, 9))}, peak(), []
    model(**inputs)
    forward = min(seconds(model, **inputs) for _ in range(3))
    step = "plan_with_evidence" if hasattr(fnl_hf.patching, "plan_with_evidence") else "plan"  # of an older tree
    plan = getattr(fnl_hf.patching, step)

    def timed(*args, **kwargs):
        started = time.perf_counter()
        planned = plan(*args, **kwargs)
        planning.append(time.perf_counter() - started)
        return planned

    setattr(fnl_hf.patching, step, timed)
    return {
        "factorize": seconds(fnl_hf.factorize, model),
        "planning and proof": sum(planning),
        "forward": forward,
        "GB": peak() - before,
    }


def of_half(name: str) -> dict[str, float]:
    """Seconds of `factorize` to half of all parameters, and what memory grows by, also as a share of the model's."""
    model, config = MODELS[name](), fnl_hf.FNLConfig(target_ratio=0.5)
    size = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
    before = psutil.Process().memory_info().rss / 1e9  # not the most so far, below which growth would not show
    took = seconds(fnl_hf.factorize, model, config)
    return {"seconds": took, "GB": peak() - before, "of the model": (peak() - before) / size}


@torch.no_grad()
def of_verify(name: str) -> dict[str, float]:
    """Seconds and GB of `verify` on 8 x 512 tokens."""
    return _on_a_batch(name, lambda model, inputs: fnl_hf.verify(model, **inputs))


@torch.no_grad()
def of_forward(name: str) -> dict[str, float]:
    """Seconds and GB of a forward of 8 x 512 tokens."""
    return _on_a_batch(name, lambda model, inputs: model(**inputs))


def _on_a_batch(name, run) -> dict[str, float]:
    model = fnl_hf.factorize(MODELS[name]()).eval()
    inputs = {"input_ids": torch.randint(5, 900, (8, 512))}
    model(**{"input_ids": inputs["input_ids"][:1]})
    return {"seconds": seconds(run, model, inputs), "peak GB": peak()}


MEASUREMENTS = {"factorize": of_factorize, "forward": of_forward, "verify": of_verify, "half": of_half}
CASES = (
    ("factorize", "llama 4 x 2048"),
    ("factorize", "bert-large"),
    ("forward", "bert-base"),
    ("verify", "bert-base"),
    ("half", "masked bert-base"),
)


def measured(what: str, model: str, tree: Path) -> dict[str, float]:
    """One measurement in a fresh process, of the package that lies in ``tree``."""
    command = [sys.executable, __file__, "--one", what, model]
    environment = os.environ | {"PYTHONPATH": str(tree.resolve())}
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(printed.splitlines()[-1])


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes for each figure (default: %(default)s)")
    parser.add_argument("--against", type=Path, metavar="TREE", help="another tree of this repository to compare with")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=[*MEASUREMENTS], metavar="WHAT")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "MODEL"), help="one measurement, as JSON, in this process")
    options = parser.parse_args()
    tf.logging.set_verbosity_error()
    torch.manual_seed(0)
    if options.one:
        what, name = options.one
        print(json.dumps(MEASUREMENTS[what](name)))
        return
    trees = {"now": Path(__file__).parent.parent} | ({"before": options.against} if options.against else {})
    figures = {}
    for what, name in (case for case in CASES if case[0] in options.only):
        rounds = {tree: [] for tree in (trees if what == "factorize" else ["now"])}
        for _ in range(options.rounds):
            for tree in rounds:
                rounds[tree].append(measured(what, name, trees[tree]))
        for tree, values in rounds.items():
            figures[f"{what} {name}, {tree}"] = medians(values)
            line = ", ".join(f"{key} {value:.2f}" for key, value in figures[f"{what} {name}, {tree}"].items())
            print(f"{what} {name}, {tree}: {line}", flush=True)
    written = {"rounds": options.rounds, "threads": torch.get_num_threads(), "figures": figures}
    if {"forward", "verify"} <= set(options.only):
        forward, verified = figures["forward bert-base, now"], figures["verify bert-base, now"]
        written["verify / forward"] = ratios = {key: verified[key] / forward[key] for key in forward}
        print("verify / forward: " + ", ".join(f"{key} {value:.2f}" for key, value in ratios.items()))
    if options.json:
        options.json.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
