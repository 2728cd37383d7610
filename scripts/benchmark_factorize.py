"""What planning, proof and `factorize` take: time and memory, for BERT-large and a 4-layer Llama of width 2048.

    python scripts/benchmark_factorize.py
    python scripts/benchmark_factorize.py --json scripts/results/benchmark_factorize_cpu.json

Times are printed beside that of a forward of the recorded call. `verify` runs on BERT-base and 8 x 512 tokens beside a
forward of those, each in a process of its own, whose peak memory is compared.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers as tf

import fnl_hf
from fnl_hf.planning import plan

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
    """Seconds of planning, of `factorize`, and of a forward as short as the recorded one; GB above the model."""
    model = MODELS[name]().eval()
    inputs, before = {"input_ids": torch.randint(5, 900, (1, 9))}, peak()
    model(**inputs)
    forward = min(seconds(model, **inputs) for _ in range(3))
    planned = seconds(plan, model, fnl_hf.FNLConfig())
    return {
        "plan": planned,
        "factorize": seconds(fnl_hf.factorize, model),
        "forward": forward,
        "peak GB above the model": peak() - before,
    }


@torch.no_grad()
def of_verify(name: str, verify: bool) -> dict[str, float]:
    """Seconds, and the most GB that the process held, of `verify` or of one forward on 8 x 512 tokens."""
    model = fnl_hf.factorize(MODELS[name]()).eval()
    inputs = {"input_ids": torch.randint(5, 900, (8, 512))}
    taken = seconds(fnl_hf.verify, model, **inputs) if verify else seconds(model, **inputs)
    return {"seconds": taken, "peak GB": peak()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "MODEL"), help="one measurement, as JSON, in this process")
    options = parser.parse_args()
    tf.logging.set_verbosity_error()
    torch.manual_seed(0)
    if options.one:
        what, name = options.one
        print(json.dumps(of_factorize(name) if what == "factorize" else of_verify(name, what == "verify")))
        return
    figures = {}
    for what, name in (
        ("factorize", "llama 4 x 2048"), ("factorize", "bert-large"), ("forward", "bert-base"), ("verify", "bert-base"),
    ):  # fmt: skip
        command = [sys.executable, __file__, "--one", what, name]
        figures[f"{what} {name}"] = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
        )
        print(f"{what} {name}: " + ", ".join(f"{key} {value:.2f}" for key, value in figures[f"{what} {name}"].items()))
    forward, verified = figures["forward bert-base"], figures["verify bert-base"]
    ratios = {key: verified[key] / forward[key] for key in forward}
    print("verify / forward: " + ", ".join(f"{key} {value:.2f}" for key, value in ratios.items()))
    if options.json:
        options.json.write_text(json.dumps({"figures": figures, "verify / forward": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
