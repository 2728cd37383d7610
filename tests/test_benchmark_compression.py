"""`scripts/benchmark_compression.py` on tiny models: every method, its sizes, and what it takes from where."""

import copy
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import fnl_hf
from fnl_hf.algebra.weighted import of_weight
from fnl_hf.tasks.pretraining.tokenizer import train_tokenizer
from fnl_hf.tasks.similarity import read_scored_pairs, similarity
from fnl_hf.tasks.translation import new_marian
from fnl_hf.tasks.translation.corpus import read_pairs, shipped_text
from fnl_hf.tasks.translation.tokenizer import train_tokenizer as train_translation_tokenizer
from fnl_hf.texts import blocks
from scripts import benchmark_compression as benchmark
from tests.script_runs import refusal, run_script


@pytest.fixture(scope="module")
def english():
    return [target for _, target in read_pairs(shipped_text("train"), 400)]


@pytest.fixture(scope="module")
def text(english, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(english))
    return path


def run(monkeypatch, **values) -> dict:
    words = [
        str(w) for name, value in values.items() for w in (f"--{name}", *(value if type(value) is list else [value]))
    ]
    monkeypatch.setattr(sys, "argv", ["benchmark_compression.py", *words])
    benchmark.main()
    return json.loads(values["json"].read_text())


def check(results: dict, ratio: float, methods: int) -> None:
    assert len(results["rows"]) == methods
    assert {row["method"] for row in results["rows"]} == {
        label for name, (label, _) in benchmark.METHODS.items() if name != benchmark.TAUGHT
    }
    for row in results["rows"]:
        assert 0 < row["parameters"] <= ratio * results["dense"]["parameters"]
        assert row["quality"] == row["quality"] and row["seconds"] > 0
    assert len(benchmark.table(results)) == methods + 1


def test_sentences(monkeypatch, english, text, tmp_path):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(lambda: english, "wordpiece", 400)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "bert")
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(
        "".join(f'"{a}","{b}",{i % 5}\n' for i, (a, b) in enumerate(zip(english, english[1:9], strict=False)))
    )
    results = run(
        monkeypatch,
        task="sentences",
        model=tmp_path / "bert",
        calibration=text,
        test=pairs,
        samples=40,
        ratios=0.6,
        json=tmp_path / "results.json",
        plot=tmp_path / "plot.png",
    )
    check(results, 0.6, 6)
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_language(monkeypatch, text, tmp_path):
    run_script(monkeypatch, "make_language_model.py", text, tmp_path / "lm", steps=2, batch=2, vocab_size=400)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "lm")
    rows = blocks(text, tokenizer, 16)
    assert rows.shape[1] == 16 and torch.equal(blocks(text, tokenizer, 16, 3), rows[:3])
    assert tokenizer.eos_token_id in rows
    with pytest.raises(ValueError, match="not one block of 100000: give a longer text"):
        blocks(text, tokenizer, 100_000)
    results = run(
        monkeypatch,
        task="language",
        model=tmp_path / "lm",
        calibration=text,
        test=text,
        samples=8,
        limit=2,
        ratios=0.6,
        json=tmp_path / "results.json",
    )
    check(results, 0.6, 6)
    assert results["dense"]["quality"] < 450  # near the uniform distribution's


def test_translation(monkeypatch, tmp_path):
    torch.manual_seed(0)
    tokenizer = train_translation_tokenizer(
        (side for pair in read_pairs(shipped_text("train"), 400) for side in pair), 400
    )
    model = new_marian(tokenizer, d_model=32, layers=1, heads=2, ffn_dim=64, dropout=0.0, max_length=64)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "mt")
    results = run(
        monkeypatch,
        task="translation",
        model=tmp_path / "mt",
        samples=32,
        limit=2,
        ratios=0.7,
        json=tmp_path / "results.json",
    )
    check(results, 0.7, 6)


def test_what_is_missing_is_told(monkeypatch, capsys, tmp_path):
    error = refusal(monkeypatch, capsys, "benchmark_compression.py", task="sentences", model=tmp_path)
    assert error == "--task sentences needs --calibration. See --help for what it should be."


def test_what_is_collected_once_counts_for_every_row(monkeypatch):
    time = SimpleNamespace(now=0.0)
    monkeypatch.setattr(benchmark, "clock", lambda: time.now)

    def collect(names):
        time.now += 10
        return dict.fromkeys(names, 1)

    def action():
        time.now += 1
        return collected.once("moments", ["a"], collect)

    collected = benchmark.Collected()
    assert [collected.timed(action) for _ in range(2)] == [({"a": 1}, 11.0)] * 2
    assert time.now == 12


def test_fisher_rows_weigh_layers_and_leave_heads(english):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=100, max_position_embeddings=16, **sizes)).eval()
    batches = [{"input_ids": torch.randint(100, (4, 8))} for _ in range(3)]
    rows = benchmark.fisher_rows(model, batches)
    seen = torch.cat([batch["input_ids"].flatten() for batch in batches]).unique()
    assert set(rows["embeddings.word_embeddings"].nonzero().flatten().tolist()) == set(seen.tolist())
    plain = fnl_hf.factorize(copy.deepcopy(model), fnl_hf.FNLConfig(target_ratio=0.5))
    old = {p.name: [f.clone() for f in p.factors()] for p in fnl_hf.factorizations(plain)}
    benchmark.weigh_rows(plain, model, rows)
    for product in fnl_hf.factorizations(plain):
        same = all(map(torch.equal, product.factors(), old[product.name]))
        assert same == (product.kind in ("qk", "ov"))
        if product.kind == "linear":
            weight = model.get_submodule(product.name).weight
            left, right = of_weight(weight[None], product.size()[1], rows=rows[product.name][None])
            torch.testing.assert_close(product.matrix().double(), left @ right, rtol=1e-4, atol=1e-5)


def test_similarity_is_the_correlation_of_ranks(tmp_path):
    scipy = pytest.importorskip("scipy.stats")
    from fnl_hf.tasks import similarity as module

    values, scores = torch.randn(30, dtype=torch.float64), torch.randint(4, (30,)).double()
    ranks = torch.stack([module._ranks(values), module._ranks(scores)]).corrcoef()[0, 1]
    assert float(ranks) == pytest.approx(scipy.spearmanr(values, scores).statistic)
    (tmp_path / "pairs.csv").write_text("a,b\n")
    with pytest.raises(benchmark.InputError, match="expected rows of sentence, sentence, score"):
        read_scored_pairs(tmp_path / "pairs.csv")
    assert similarity is module.similarity
