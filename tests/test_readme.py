"""The README's Python examples run as they stand, one after the other."""

import json
import re
from pathlib import Path

import pytest

from scripts import benchmark_compression, benchmark_inference, compare_compressed
from scripts.benchmark_layers import bounds, numbers, table

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "scripts" / "results"
KEYS = ("products", "by default")  # of a row of the survey: proven, and of these found without inputs


def test_the_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 8
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    captured = capsys.readouterr()
    printed = captured.out
    assert "qk    12     32/64" in printed  # the summary's rows
    assert printed.count("exact") == 4 and "NOT EXACT" not in printed
    assert "Frobenius, decoupled  0.01         2 qk" in captured.err


def test_the_figures_are_those_of_the_results():
    text = (RESULTS / "README.md").read_text()
    ratios = json.loads((RESULTS / "benchmark_decay_cpu.json").read_text())["ratios"]
    for key, shown in (
        ("coupled decay / optimizer step", "coupled decay, share of an AdamW step | {:.1%}"),
        ("decoupled decay / optimizer step", "decoupled decay, share of an AdamW step | {:.1%}"),
        ("autograd penalty / coupled decay", "against coupled decay | {:.1f} x"),
        ("coupled decay / bare matrix products", "against its bare matrix products | {:.1f} x"),
        ("stacked over layers / coupled decay", "stacked into one, against coupled decay | {:.1f} x"),
        ("loop over heads / coupled decay", "a loop over the heads, against coupled decay | {:.1f} x"),
        ("coupled decay / bare matrix products, contiguous", "coupled decay takes {:.1f} times as long"),
        ("SVD of each product / spectral init", "against spectral initialisation | {:.0f} x"),
    ):
        assert shown.format(ratios[key]).replace("%", " %") in text
    for run in json.loads((RESULTS / "translation_default.json").read_text())["runs"]:
        assert f"| {run['seed']} | {run['test_bleu']:.2f} |" in text
    for corpus in json.loads((RESULTS / "batches_cpu.json").read_text())["corpora"].values():
        for variant in ("stock", "grouped"):
            figures, ratio = corpus[variant], corpus["ratios"][f"ours / {variant}"]
            row = f"| {figures['target_tokens_per_second']:,.0f} | {figures['padding']:.1%} | {ratio:.2f} x |"
            assert row.replace("%", " %") in text
        row = f"| {corpus['ours']['target_tokens_per_second']:,.0f} | {corpus['ours']['padding']:.1%} | |"
        assert row.replace("%", " %") in text
    pretraining = json.loads((RESULTS / "benchmark_mlm_cpu.json").read_text())["ratios"]
    for variant, row in (("ours", "masked tokens only"), ("ours, all logits", "as transformers computes them")):
        ratio = pretraining[variant]
        assert f"{row} | {ratio['tokens/s']:.2f} x | {ratio['peak memory']:.2f} x |" in text
    losses = json.loads((RESULTS / "losses.json").read_text())
    rows = {name: row for name, row in losses.items() if "off" in row}
    causal = sum(name.startswith("CAUSAL_LM/") for name in rows)
    every = sum(name.startswith("CAUSAL_LM/") for name in losses)
    assert f"{len(rows)} of {len(losses) - 1} classes could be built ({causal} of {every} causal ones)" in text
    off = [row["off by transformers' count"] for row in rows.values() if row["over"] == "labels"]
    assert max(row["off"] for row in rows.values()) < 1e-4 and max(off) == pytest.approx(0.014, abs=5e-4)
    by_setting = {}
    for run in json.loads((RESULTS / "translation_head_rank.json").read_text())["runs"]:
        by_setting.setdefault((run["head_rank"], run["factorize_at"]), {})[run["seed"]] = run["test_bleu"]
    for (rank, at), bleu in by_setting.items():
        when = "from the start" if at is None else f"after {float(at):.0%} of the steps".replace("%", " %")
        mean = sum(bleu.values()) / len(bleu)
        assert f"| {rank:g} | {when} | {bleu[42]:.2f} | {bleu[1]:.2f} | {mean:.2f} |" in text
    variants = json.loads((RESULTS / "bert_mini_cpu.json").read_text())["variants"]
    columns = (("pretrain", "eval_loss", 1, ".3f"), ("squad", "eval_f1", 1, ".2f"))
    columns += (("squad", "eval_exact_match", 1, ".2f"), ("sst2", "eval_accuracy", 100, ".1f"))
    for variant in variants.values():
        cells = [
            " / ".join(format(scale * value, form) for _, value in sorted(variant[stage]["metrics"][metric].items()))
            for stage, metric, scale, form in columns
        ]
        assert f"| {variant['parameters']:,} | {' | '.join(cells)} |" in text
    truncated = json.loads((RESULTS / "truncation_minilm_cpu.json").read_text())
    dense = truncated["dense"]
    assert f"{dense['parameters']:,} parameters and {dense['similarity']:.2f} dense" in " ".join(text.split())
    for name, rows in truncated["series"].items():
        share = [f"{100 * row['parameters'] / dense['parameters']:.1f}" for row in rows]
        reached = [f"{row['similarity']:.2f}" for row in rows]
        if name.startswith("all together"):
            for row, *cells in zip(rows, share, reached, strict=True):
                assert f"| {row['setting']}{name.removeprefix('all together')} | {' | '.join(cells)} |" in text
            continue
        at = " / ".join(row["setting"].removeprefix("rank ") for row in rows)
        assert f"| {name} | {at} | {' / '.join(share)} | {' / '.join(reached)} |" in text
    for row in json.loads((RESULTS / "functional_distance_cpu.json").read_text())["rows"]:
        runs = list(row["seeds"].values())
        means = {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}
        cells = [f"{m:.4f} ± {max(abs(run[n] - m) for run in runs):.4f}" for n, m in means.items()]
        assert f"| {row['model']} | {row['rank']:g} | {' | '.join(cells)} |" in text
    tuned = json.loads((RESULTS / "finetuning_cpu.json").read_text())["BLEU"]
    before = tuned.pop("before")
    assert f"| before | {before['new']:.2f} | {before['shipped']:.2f} |" in text
    for name, row in tuned.items():
        cells = [" / ".join(f"{row['fine-tuned'][seed][key]:.2f}" for seed in "12") for key in ("new", "shipped")]
        if "factorized" in row:
            start = row["factorized"]
            assert f"| {name}: factorized | {start['new']:.2f} | {start['shipped']:.2f} |" in text
        assert f"| {name}{':' if 'factorized' in row else ','} fine-tuned | {' | '.join(cells)} |" in text
    rows = json.loads((RESULTS / "attention_coverage.json").read_text())["types"].values()
    attention = [row for row in rows if row.get("executed")]
    clean = [row for row in attention if not row["wrong"] and not row["missed"]]
    assert f"{len(clean)} of the {len(attention)} model types" in text
    shares = []
    for slot in ("ov", "qk"):
        exact = sum(any(slot in kind for kind in row["products"]) for row in attention)
        counts = [sum(n for row in attention for kind, n in row[key].items() if slot in kind) for key in KEYS]
        assert f"{exact} types" in text and f"{counts[0]} products" in text
        shares.append(f"{100 * counts[1] / counts[0]:.1f} %")
    assert f"found without example inputs | {shares[0]} of O/V, {shares[1]} of Q/K |" in text


def test_the_figures_of_layers_are_those_of_the_results():
    text = " ".join((RESULTS / "README.md").read_text().split())
    layers = json.loads((RESULTS / "benchmark_layers_cpu.json").read_text())["layers"]
    for line in (*table(layers), *bounds(layers)):
        assert line in text
    (quarter,) = (row for row in layers if row["layer"] == "BERT-base 768 to 3072" and row["fraction"] == 0.25)
    faster = 1 / quarter["modes"]["training"]["ratios"]["dense"]
    assert faster > 2 and f"trains {faster:.1f} times faster at a quarter of the rank" in text
    linear = [row for row in layers if row["below break-even"] and "ResNet" not in row["layer"]]
    shares = [kept["ours"] / kept["dense"] for kept in map(numbers, linear)]
    shown = f"keeps {min(shares):.0%} to {max(shares):.0%} of the dense layer's".replace("%", " %")
    assert max(shares) <= 1 and shown in text
    for row in linear:  # the middle, and nothing else
        assert row["memory"]["ours"]["saved"] == row["rank"] * row["input"] // row["matrix"][1]


def test_the_figures_of_inference_are_those_of_the_results():
    figures = json.loads((RESULTS / "benchmark_inference_cpu.json").read_text())["figures"]
    text = (RESULTS / "README.md").read_text()
    assert all(row in text for row in benchmark_inference.table(figures))
    (half,) = (row for row in figures if "0.766" in row["setting"] and row["batch"] == 32)
    speed = half["times dense"]["for inference"]["median"]
    assert speed > 1.3 and f"comes {speed:.2f} times the dense" in " ".join(README.read_text().split())


@pytest.mark.parametrize("task", [*benchmark_compression.TASKS, "taught"])
def test_the_figures_of_compression_are_those_of_the_results(task):
    results = json.loads((RESULTS / f"compression_{task}_cpu.json").read_text())
    text = (RESULTS / "README.md").read_text()
    assert all(row in text for row in benchmark_compression.table(results))
    assert f"{results['dense']['parameters']:,} parameters" in " ".join(text.split())


def test_what_a_step_costs_whose_ranks_adapt():
    ratios = json.loads((RESULTS / "benchmark_dlrt_cpu.json").read_text())["ratios"]
    shown = "takes {:.2f} times the fixed-rank step and {:.2f} times the dense one"
    text = " ".join((RESULTS / "README.md").read_text().split())
    assert shown.format(ratios["dlrt / fixed"], ratios["dlrt / dense"]) in text


def test_what_longer_teaching_wins_is_what_was_measured():
    before, after = json.loads((RESULTS / "compression_short_cpu.json").read_text())["rows"]
    shown = f"{before['quality']} at half becomes {after['quality']}, in {after['seconds']:.0f} CPU seconds"
    assert shown in " ".join((RESULTS / "README.md").read_text().split())


def test_what_the_readme_says_of_compression_is_in_the_tables():
    text = " ".join(README.read_text().split())
    for task, ratio, shown in (
        ("sentences", 0.5, "at half of its parameters {} and {} of {} (STS"),
        ("language", 0.4, "at 40 % a perplexity of {} and {}, dense {}"),
        ("translation", 0.8, "at 80 % a BLEU of {} and {}, dense {}"),
    ):
        results = json.loads((RESULTS / f"compression_{task}_cpu.json").read_text())
        found = {row["method"]: row["quality"] for row in results["rows"] if row["ratio"] == ratio}
        methods = (found[benchmark_compression.METHODS[name][0]] for name in ("plain", "loss"))
        assert shown.format(*(f"{value:.2f}" for value in (*methods, results["dense"]["quality"]))) in text


def test_the_figures_of_compressed_models_are_those_of_the_results():
    text = (RESULTS / "README.md").read_text()
    for file in ("compressed_minilm_cpu.json", "compressed_decay_cpu.json"):
        for name, found in json.loads((RESULTS / file).read_text()).items():
            rows = list(compare_compressed.table(name, found))
            assert len(rows) >= 5 and all(row in text for row in rows)


def rows_of_translation(name):
    """The rows of a table of `compare.py`'s results: parameters, and BLEU and loss of every seed."""
    variants = json.loads((RESULTS / name).read_text())["variants"]
    for variant, found in variants.items():
        metrics = found["translation"]["metrics"]
        bleu, loss = (metrics.get(metric, {}) for metric in ("test_bleu", "eval_loss"))
        cells = " / ".join(f"{value:.2f}" for value in bleu.values()), " / ".join(f"{v:.3f}" for v in loss.values())
        if bleu:
            yield f"| {variant} | {found['parameters']:,} | {' | '.join(cells)} |"


@pytest.mark.parametrize(
    "name",
    [
        "low_rank_translation", "spectron_translation", "spectron_long", "spectron_width", "spectron_decay",
        "dlrt_translation", "dlrt_rate", "functional_translation",
    ],
)  # fmt: skip
def test_the_figures_of_translation_at_low_rank_are_those_of_the_results(name):
    text = (RESULTS / "README.md").read_text()
    rows = list(rows_of_translation(f"{name}_cpu.json"))
    assert len(rows) > 3 and all(row in text for row in rows)


@pytest.mark.parametrize("name", ["spectron_mlm", "functional_mlm", "dlrt_mlm"])
def test_the_figures_of_masked_lm_are_those_of_the_results(name):
    text = (RESULTS / "README.md").read_text()
    for variant, found in json.loads((RESULTS / f"{name}_cpu.json").read_text())["variants"].items():
        losses = " / ".join(f"{loss:.3f}" for loss in found["pretrain"]["metrics"]["eval_loss"].values())
        assert f"| {variant} | {found['parameters']:,} | {losses} |" in text


def test_what_decay_and_spectron_cost_is_what_was_measured():
    measured = json.loads((RESULTS / "benchmark_layer_decay_cpu.json").read_text())["layers"]
    text = (RESULTS / "README.md").read_text()
    for row in measured:
        shares = [100 * value for value in row["ratios"].values()]
        assert f"| {row['rank']:g} | {' | '.join(f'{share:.1f} %' for share in shares)} |" in text


def test_what_the_readme_quotes_is_in_the_tables():
    text = " ".join(README.read_text().split())
    ratios = json.loads((RESULTS / "benchmark_decay_cpu.json").read_text())["ratios"]
    share, penalty = ratios["coupled decay / optimizer step"], ratios["autograd penalty / coupled decay"]
    assert f"costs {100 * share:.1f} % of an AdamW step" in text and f"{penalty:.1f} x less than an autograd" in text
    assert f"{ratios['SVD of each product / spectral init']:.0f} x faster than an SVD" in text
    runs = json.loads((RESULTS / "translation_head_rank.json").read_text())["runs"]
    bleu = {(run["head_rank"], run["factorize_at"], run["seed"]): run["test_bleu"] for run in runs}
    assert f"reaches {bleu[1.0, None, 42]:.2f} and {bleu[1.0, None, 1]:.2f} test BLEU" in text
    for rank in (0.5, 0.25):
        assert f"({bleu[rank, None, 42]:.2f}, {bleu[rank, None, 1]:.2f})" in text
    low = json.loads((RESULTS / "low_rank_translation_cpu.json").read_text())["variants"]
    for variant, shown in (
        ("half-si-none", "{} BLEU from spectral"),
        ("half-default-none", "{} from"),
        ("dense", "{} dense"),
    ):
        values = low[variant]["translation"]["metrics"]["test_bleu"].values()
        assert shown.format(" and ".join(f"{value:.2f}" for value in values)) in text
    first = json.loads((RESULTS / "spectron_translation_cpu.json").read_text())["variants"]
    for variant, shown in (
        ("quarter-adamw-0.004", "under AdamW {}"),
        ("quarter-spectron-0.03-lr-0.004", "under Spectron {}"),
        ("dense-adamw-0.002", "the dense model under AdamW {}"),
        ("dense-spectron-0.03-lr-0.004", "under Muon {}"),
    ):
        assert shown.format(f"{first[variant]['translation']['metrics']['test_bleu']['42']:.2f}") in text
    masked = json.loads((RESULTS / "spectron_mlm_cpu.json").read_text())["variants"]
    for variant in ("quarter-spectron", "dense-lamb"):
        assert f"{masked[variant]['pretrain']['metrics']['eval_loss']['1']:.2f}" in text
    variants = json.loads((RESULTS / "bert_mini_cpu.json").read_text())["variants"].values()
    losses = [sorted(v["pretrain"]["metrics"]["eval_loss"].items())[0][1] for v in variants]
    assert f"(masked-LM loss {', '.join(f'{loss:.3f}' for loss in losses)})" in text
    types = json.loads((RESULTS / "attention_coverage.json").read_text())["types"].values()
    attention = [row for row in types if row.get("executed")]
    assert f"of {len(attention)} types with softmax attention" in text and not any(row["wrong"] for row in attention)
    for slot, shown in (("ov", "O/V is exact in {} types"), ("qk", "Q/K exact or rotary in {} types")):
        assert shown.format(sum(any(slot in kind for kind in row["products"]) for row in attention)) in text
    clean = [row for row in attention if not row["wrong"] and not row["missed"]]
    assert f"in {len(clean)} of the {len(attention)} model types" in text


def test_every_flag_of_the_table_for_fairseq_users_exists():
    from transformers import HfArgumentParser

    from fnl_hf.tasks.translation import DataArguments, ModelArguments, TranslationArguments

    parser = HfArgumentParser((ModelArguments, DataArguments, TranslationArguments))
    known = {option for action in parser._actions for option in action.option_strings}
    table = README.read_text().split("### Coming from fairseq")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ") and "---" not in line][1:]
    ours = {flag for row in rows for flag in re.findall(r"--\w+", row[1])}
    assert len(rows) > 15 and len(ours) > 30 and not ours - known
