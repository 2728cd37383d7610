"""Classification of tables: reading and its errors, labels, metrics; and the script."""

import gzip
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
)

import fnl_hf
from fnl_hf.tasks.finetuning import classification_scores, label_ids, label_names, read_table
from fnl_hf.tasks.running import InputError
from tests.script_runs import help_of, leave_half_a_checkpoint, refusal, run_script, same_weights, stopped_before

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {"max_seq_length": 32, "disable_tqdm": "true", "save_steps": 100, "per_device_train_batch_size": 8}
WORDS = ["good", "great", "fine", "bad", "awful", "poor", "film", "book", "play", "a", "was", "the", "not", "at", "all"]


def table(path: Path, header: str, *rows: str) -> Path:
    """A file of lines in which | stands for a tab."""
    text = "".join(line.replace("|", "\t") + "\n" for line in (header, *rows))
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


# -- reading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header, row, texts, label",
    [
        ("sentence|label", "good film|1", ("good film",), "1"),
        ("index|sentence1|sentence2|label", "0|a b|c|entailment", ("a b", "c"), "entailment"),
        ("index|question|sentence|label", "0|why ?|so .|not", ("why ?", "so ."), "not"),
        ("id|qid1|qid2|question1|question2|is_duplicate", "0|1|2|who|where|0", ("who", "where"), "0"),
        ("Quality|#1 ID|#2 ID|#1 String|#2 String", "1|7|8|one|two", ("one", "two"), "1"),
        ("premise|hypothesis|gold_label", "p|h|neutral", ("p", "h"), "neutral"),
        ("label|text", "x|only", ("only",), "x"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_columns_of_glue_are_known(tmp_path, header, row, texts, label, suffix):
    read = read_table(table(tmp_path / f"x.tsv{suffix}", header, row))
    assert (read.texts, read.labels, read.lines) == ([texts], [label], [2])


def test_columns_that_are_named_and_what_text_may_hold(tmp_path):
    path = table(tmp_path / "x.tsv", "stars|review|title|label", '3| 5" "of"\u2028wood |It\'s ok|no', "", "4|two|x|no")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    read = read_table(path, text_column="review", label_column="stars")
    assert read.texts == [('5" "of"\u2028wood',), ("two",)] and read.labels == ["3", "4"] and read.lines == [2, 4]
    assert read_table(path, "review", "title", labelled=False).texts[0] == ('5" "of"\u2028wood', "It's ok")
    assert read_table(path, "review", "title", labelled=False).labels is None
    assert read.first(1).labels == ["3"] and read.first(None).labels == ["3", "4"]


@pytest.mark.parametrize(
    "lines, options, message",
    [
        ([""], {}, "empty"),
        (["sentence|label"], {}, "no rows after the header"),
        (["review|label", "x|1"], {}, "no text column is known among 'review', 'label'. Name it with --text_column"),
        (["good film|1", "bad film|0"], {}, "no text column is known among 'good film', '1'"),
        (["sentence|stars", "x|1"], {}, "no label column is known among 'sentence', 'stars'. Name it with --label_col"),
        (["sentence|label", "x|1"], {"text_column": "text"}, "no column 'text' for --text_column, only 'sentence'"),
        (["sentence|label", "x|1"], {"label_column": "stars"}, "no column 'stars' for --label_column"),
        (["sentence|label", "x|1"], {"text_pair_column": "sentence"}, "without --text_column. Give both"),
        (["sentence|label", "x|1", "y|z|0"], {}, "line 3: 3 columns, and the header has 2"),
        (["sentence|label", "x|1", "y"], {}, "line 3: 1 columns, and the header has 2"),
        (["sentence|label", "x|1", "|1"], {}, "line 3: nothing in column 'sentence'"),
        (["sentence|label", "x|"], {}, "line 2: nothing in column 'label'"),
    ],
)
def test_reading_errors_name_the_place(tmp_path, lines, options, message):
    path = table(tmp_path / "x.tsv", *lines)
    with pytest.raises(InputError, match=message) as error:
        read_table(path, **options)
    assert "\n" not in str(error.value)


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "x.tsv").write_bytes(b"sentence\tlabel\n\xff\t1\n")
    (tmp_path / "x.tsv.gz").write_bytes(b"sentence\tlabel\n")
    for name in ("x.tsv", "x.tsv.gz"):
        with pytest.raises(InputError, match="not a readable UTF-8 text file"):
            read_table(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        read_table(tmp_path / "y.tsv")


def test_labels():
    assert label_names(["10", "2", "-1", "2"], "x") == ["-1", "2", "10"]
    assert label_names(["b", "1", "a"], "x") == ["1", "a", "b"]
    for labels, message in [(["1", "1"], "all labels are '1'"), (["1", "2.5"], "are real numbers")]:
        with pytest.raises(InputError, match=message):
            label_names(labels, "x")


def test_label_ids_refuse_what_was_not_trained_on(tmp_path):
    read = read_table(table(tmp_path / "x.tsv", "sentence|label", "x|yes", "y|no", "z|maybe"))
    assert label_ids(read, ["maybe", "no", "yes"]) == [2, 1, 0]
    with pytest.raises(InputError, match=r"x.tsv, line 4: label 'maybe' is not one of those trained on \(no, yes\)"):
        label_ids(read, ["no", "yes"])


# -- metrics --------------------------------------------------------------------------------------------


def test_metrics_of_two_classes():
    pytest.importorskip("sklearn")
    labels, predictions = [1, 1, 1, 0, 0, 1], [1, 0, 1, 0, 1, 1]  # 3 true, 1 false positives; 1 true, 1 false negatives
    scores = classification_scores(labels, predictions, 2)
    assert scores == pytest.approx(
        {
            "accuracy": 4 / 6,
            "f1": 2 * 3 / (2 * 3 + 1 + 1),
            "f1_macro": (0.75 + 0.5) / 2,
            "matthews": (3 * 1 - 1 * 1) / np.sqrt(4 * 4 * 2 * 2),
        }
    )
    assert all(type(score) is float for score in scores.values())


def test_metrics_of_several_classes():
    pytest.importorskip("sklearn")
    scores = classification_scores([0, 0, 1, 2], [0, 1, 1, 2], 4)  # nothing of class 3
    assert scores.keys() == {"accuracy", "f1_macro", "matthews"}
    assert scores["accuracy"] == 0.75 and scores["f1_macro"] == pytest.approx((2 / 3 + 2 / 3 + 1 + 0) / 4)


def test_metrics_need_scikit_learn(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    options = TINY | {"model_name_or_path": tmp_path, "train_file": "x.tsv", "output_dir": tmp_path / "out"}
    assert "pip install 'fnl-hf[tasks]'" in refusal(monkeypatch, capsys, "run_classification.py", **options)


# -- the script -----------------------------------------------------------------------------------------


def run(monkeypatch, **values):
    """Run the script in this process, as from the command line: tiny, but for what `values` say."""
    run_script(monkeypatch, "run_classification.py", **TINY | values)


def results_of(out: Path) -> dict:
    return json.loads((out / "all_results.json").read_text())


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": token for name, token in names.items()},
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(special) + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertForMaskedLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    """Films are good or bad: one word tells."""
    rng = random.Random(0)
    rows = []
    for i in range(40):
        word = rng.choice(WORDS[:3] if i % 2 else WORDS[3:6])
        rows.append(f"the {rng.choice(WORDS[6:9])} was {word}|{i % 2}")
    return table(tmp_path_factory.mktemp("reviews") / "train.tsv", "sentence|label", *rows)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """What the second text says of the first; three classes, as words."""
    rows = []
    for i in range(48):
        second, label = [("great", "same"), ("poor", "other"), ("a", "none")][i % 3]
        rows.append(f"{i}|the {WORDS[6 + i % 2]}|{second}|{label}")
    return table(tmp_path_factory.mktemp("pairs") / "train.tsv.gz", "index|sentence1|sentence2|label", *rows)


def test_learns_scores_and_reloads(monkeypatch, tmp_path, bert, reviews, capsys):
    pytest.importorskip("sklearn")
    out = tmp_path / "out"
    options = {"model_name_or_path": bert, "train_file": reviews, "validation_file": reviews, "learning_rate": 3e-3}
    options |= {"num_train_epochs": 12, "output_dir": out, "test_file": tmp_path / "test.tsv"}
    table(tmp_path / "test.tsv", "sentence", "the play was great", "the book was awful")
    run(monkeypatch, **options)
    results = results_of(out)
    assert results["eval_accuracy"] == results["eval_f1"] == results["eval_f1_macro"] == results["eval_matthews"] == 1
    assert results["eval_rows"] == results["train_rows"] == 40 and results["test_rows"] == 2
    assert results["run_seconds"] > 0 and results["run_peak_memory_gb"] > 0
    lines = [line.split("\t") for line in (out / "predictions.tsv").read_text().splitlines()]
    assert lines[0] == ["index", "prediction", "probability"]
    assert [line[:2] for line in lines[1:]] == [[str(i), str(i % 2)] for i in range(40)]
    assert all(0.5 < float(line[2]) <= 1 for line in lines[1:])
    tests = [line.split("\t")[1] for line in (out / "test_predictions.tsv").read_text().splitlines()[1:]]
    assert tests == ["1", "0"]
    assert AutoModelForSequenceClassification.from_pretrained(out).config.id2label == {0: "0", 1: "1"}
    assert not list(out.rglob("*.partial"))

    # Once more: nothing is trained again
    capsys.readouterr()
    run(monkeypatch, **options)
    assert "training is finished" in capsys.readouterr().out
    assert results_of(out)["train_runtime"] == results["train_runtime"]
    error = refusal(monkeypatch, capsys, "run_classification.py", **TINY | options | {"dropout": 0.5})
    assert "holds a run with --dropout None, not 0.5" in error

    # The fine-tuned model alone; rows sorted by length in training do not change the order of predictions
    options = {"model_name_or_path": out, "validation_file": reviews, "output_dir": tmp_path / "eval"}
    run(monkeypatch, **options, train_sampling_strategy="group_by_length", pad_to_max_length="true", max_eval_samples=9)
    assert results_of(tmp_path / "eval")["eval_accuracy"] == 1 and results_of(tmp_path / "eval")["eval_rows"] == 9

    # And trained on, with its own order of the classes
    other = table(tmp_path / "other.tsv", "sentence|label", "the play was great|good", "the book was bad|bad")
    error = refusal(monkeypatch, capsys, "run_classification.py", **TINY | options | {"validation_file": other})
    assert "line 2: label 'good' is not one of those trained on (0, 1)" in error


@pytest.mark.parametrize("head_rank", ["1.0", "0.5"])
def test_pairs_with_words_as_labels_and_a_factorized_checkpoint(monkeypatch, tmp_path, bert, pairs, head_rank):
    pytest.importorskip("sklearn")
    model = BertForMaskedLM.from_pretrained(bert)
    fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=float(head_rank))).save_pretrained(tmp_path / "mlm")
    out = tmp_path / "out"
    run(
        monkeypatch,
        model_name_or_path=tmp_path / "mlm",
        tokenizer_name=bert,
        train_file=pairs,
        validation_file=pairs,
        learning_rate=3e-3,
        num_train_epochs=25,
        frobenius_decay=0.001,
        output_dir=out,
    )
    results = results_of(out)
    assert results["eval_accuracy"] > 0.9 and "eval_f1" not in results
    tuned = AutoModelForSequenceClassification.from_pretrained(out)
    assert tuned.config.id2label == {0: "none", 1: "other", 2: "same"}
    products = fnl_hf.factorizations(tuned)
    assert len(products) == 4 and products[0].factors()[0].shape[-1] == int(16 * float(head_rank))


def test_a_classifier_of_other_classes_and_a_broken_checkpoint(monkeypatch, tmp_path, bert, reviews, pairs, capsys):
    pytest.importorskip("sklearn")
    three = {"model_name_or_path": bert, "train_file": pairs, "max_steps": 1, "output_dir": tmp_path / "three"}
    run(monkeypatch, **three)
    two = {"train_file": reviews, "validation_file": reviews, "max_steps": 1, "output_dir": tmp_path / "two"}
    run(monkeypatch, **two, model_name_or_path=tmp_path / "three")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "two").config.num_labels == 2

    weights = load_file(bert / "model.safetensors")
    shutil.copytree(bert, tmp_path / "broken")
    lost = next(name for name in weights if "encoder.layer" in name)
    del weights[lost]
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    options = TINY | two | {"model_name_or_path": tmp_path / "broken", "output_dir": tmp_path / "none"}
    error = refusal(monkeypatch, capsys, "run_classification.py", **options)
    assert f"its weights lack {lost}" in error and not (tmp_path / "none").exists()


def test_a_checkpoint_without_a_padding_token_is_run_again(monkeypatch, tmp_path, bert, reviews, capsys):
    """The Trainer writes the tokenizer's into the config."""
    pytest.importorskip("sklearn")
    shutil.copytree(bert, tmp_path / "bert")
    config = json.loads((bert / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    options = {"model_name_or_path": tmp_path / "bert", "train_file": reviews, "max_steps": 1}
    run(monkeypatch, **options, output_dir=tmp_path / "out")
    run(monkeypatch, **options, output_dir=tmp_path / "out")
    assert "training is finished" in capsys.readouterr().out


@pytest.mark.parametrize("factorize", ["false", "true"])
def test_a_resumed_run_is_the_uninterrupted_one(monkeypatch, tmp_path, bert, reviews, factorize):
    """Stopped with a checkpoint half-written, and resumed: bit for bit the same weights."""
    pytest.importorskip("sklearn")
    options = {"model_name_or_path": bert, "train_file": reviews, "num_train_epochs": 3, "save_steps": 5}
    options |= {"dropout": 0.1, "factorize": factorize, "learning_rate": 1e-3}
    run(monkeypatch, **options, output_dir=tmp_path / "whole")

    out = tmp_path / "stopped"
    with stopped_before(monkeypatch, step=14):
        run(monkeypatch, **options, output_dir=out)
    leave_half_a_checkpoint(out, whole=10, step=15)
    run(monkeypatch, **options, output_dir=out)
    assert same_weights(out, tmp_path / "whole")


@pytest.mark.parametrize(
    "accumulation, epochs, drop, steps", [(1, 3, "false", 18), (4, 2, "false", 4), (1, 2, "true", 10)]
)
def test_a_run_ends_where_the_trainer_would_end_it(monkeypatch, tmp_path, bert, accumulation, epochs, drop, steps):
    """41 rows in batches of 8; the number of steps is what tells the next call that the run is finished."""
    pytest.importorskip("sklearn")
    path = table(tmp_path / "x.tsv", "sentence|label", *[f"the film was {WORDS[i % 6]}|{i % 2}" for i in range(41)])
    options = {"model_name_or_path": bert, "train_file": path, "num_train_epochs": epochs, "dataloader_drop_last": drop}
    run(monkeypatch, **options, gradient_accumulation_steps=accumulation, output_dir=tmp_path / "out")
    state = json.loads((tmp_path / "out" / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    assert state["global_step"] == state["max_steps"] == steps and state["epoch"] == epochs


@pytest.mark.parametrize(
    "option, message",
    [
        ({"model_name_or_path": None}, "no checkpoint. Give --model_name_or_path"),
        ({"train_file": None, "validation_file": None}, "nothing to do"),
        ({"train_file": None}, "Fine-tune it: give --train_file"),
        ({"train_file": "no.tsv"}, "no.tsv: no such file"),
        ({"train_file": "one.tsv"}, "all labels are '1'"),
        ({"validation_file": "other.tsv"}, "label '7' is not one of those trained on (0, 1)"),
        ({"validation_file": "pair.tsv"}, "has single texts, and"),
        ({"text_column": "review"}, "no column 'review' for --text_column"),
        ({"max_seq_length": 33}, "takes at most 32 tokens"),
        ({"frobenius_decay": 0.1}, "the model is dense. Add --factorize"),
        ({"attention": "ov"}, "Add --factorize"),
        ({"output_dir": "full"}, "holds thesis.tex, but no checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(monkeypatch, tmp_path, capsys, bert, reviews, option, message):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "one.tsv", "sentence|label", "good|1", "bad|1")
    table(tmp_path / "other.tsv", "sentence|label", "good|7")
    table(tmp_path / "pair.tsv", "sentence1|sentence2|label", "good|bad|1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    options = {"model_name_or_path": bert, "train_file": reviews, "validation_file": reviews, "max_steps": 1}
    options |= {"output_dir": "out", **option}
    before = sorted(tmp_path.rglob("*"))
    assert message in refusal(monkeypatch, capsys, "run_classification.py", **TINY | options)
    assert sorted(tmp_path.rglob("*")) == before


def test_help_shows_commands(monkeypatch, capsys):
    assert "\n    python scripts/run_classification.py --model_name_or_path" in help_of(
        monkeypatch, capsys, "run_classification.py"
    )


def test_a_comparison_of_compressed_models_goes_on_where_it_was_stopped(monkeypatch, tmp_path, bert, reviews, capsys):
    pytest.importorskip("sklearn")
    path, arms = tmp_path / "figures.json", ["half, activation, ranks by loss", "heads at 0.5, default"]
    options = {"model": bert, "table": [reviews, reviews], "seeds": [1], "length": 16, "batch": 8, "json": path}
    options |= {"dense_steps": 1, "steps": 1, "samples": 8, "output_dir": tmp_path / "runs"}
    run_script(monkeypatch, "compare_compressed.py", **options, arms=arms[:1], decays=[0])
    (row,) = json.loads(path.read_text())["table"]["seeds"]["1"]["arms"].values()
    assert set(row["tuned"]) == {"0"} and 0 <= row["compressed"]["accuracy"] <= 100
    capsys.readouterr()
    run_script(monkeypatch, "compare_compressed.py", **options, arms=arms, decays=[0, 0.1])
    printed = capsys.readouterr().out
    assert "dense:" not in printed and printed.count("at decay 0:") == 1 and printed.count("at decay 0.1:") == 2
    rows = json.loads(path.read_text())["table"]["seeds"]["1"]
    assert list(rows["arms"]) == arms and rows["arms"][arms[0]]["parameters"] <= rows["parameters"] / 2
    capsys.readouterr()
    run_script(monkeypatch, "compare_compressed.py", show=path)
    assert capsys.readouterr().out in printed
    assert "was made with" in refusal(monkeypatch, capsys, "compare_compressed.py", **options | {"steps": 2})
