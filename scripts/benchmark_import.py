"""How long `import fnl_hf` takes beside `import transformers` with its Trainer loaded.

    python scripts/benchmark_import.py
    python scripts/benchmark_import.py --runs 3

Each is imported in new processes, in turn; every pair is printed, then the medians and their ratio.
"""

import argparse
import statistics
import subprocess
import sys

STATEMENTS = {
    "transformers with its Trainer": "from transformers import Seq2SeqTrainer, Trainer",
    "fnl_hf": "import fnl_hf",
}
PROGRAM = "import time; started = time.perf_counter(); {}; print(time.perf_counter() - started)"


def seconds(statement: str) -> float:
    """How long a statement takes in a process of its own."""
    command = [sys.executable, "-c", PROGRAM.format(statement)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="pairs of processes (default: 9)")
    runs = parser.parse_args().runs
    for statement in STATEMENTS.values():  # what the file system has not read yet
        seconds(statement)
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(runs):
        for name, statement in STATEMENTS.items():
            times[name].append(seconds(statement))
        print("  ".join(f"{name} {measured[-1]:.2f} s" for name, measured in times.items()), flush=True)
    for name, measured in times.items():
        print(f"{name:32} {statistics.median(measured):.2f} s ({min(measured):.2f} to {max(measured):.2f})")
    pairs = [ours / theirs for theirs, ours in zip(*times.values(), strict=True)]
    print(f"{'ratio, pair by pair':32} {statistics.median(pairs):.3f} ({min(pairs):.3f} to {max(pairs):.3f})")


if __name__ == "__main__":
    main()
