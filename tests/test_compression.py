"""`fnl-hf compress` on tiny checkpoints, what its table says, and `run_distillation.py`."""

import json

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

import fnl_hf
from fnl_hf.cli import main
from fnl_hf.texts import encoded_texts
from tests.families import BERT
from tests.script_runs import run_script

WORDS = [f"w{i}" for i in range(44)]


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "dense"
    model = tf.BertForMaskedLM(tf.BertConfig(**BERT, pad_token_id=0))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    model.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    lines = [" ".join(WORDS[(i * j + j) % 44] for j in range(3 + i % 7)) for i in range(60)]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    return folder


def compress(checkpoint, *arguments):
    out = checkpoint.parent / "small"
    options = ["--calibration", str(checkpoint.parent / "texts.txt"), *arguments]
    return main(["compress", str(checkpoint), str(out), *options]), out


@pytest.mark.parametrize("allocation", ["loss", "error", "uniform"])
def test_a_table_says_what_went_where(checkpoint, allocation, capsys):
    code, out = compress(checkpoint, "--target_ratio", "0.7", "--rank_allocation", allocation, "--json")
    assert code == 0
    found = json.loads(capsys.readouterr().out)
    dense, small = (tf.AutoModelForMaskedLM.from_pretrained(path) for path in (checkpoint, out))
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (dense, small)]
    assert [found["before"], found["after"]] == sizes and sizes[1] <= 0.7 * sizes[0]
    assert sum(part["before"] for part in found["parts"]) == sizes[0]
    assert sum(part["after"] for part in found["parts"]) == sizes[1]
    assert found["error"] > 0 and all(part["error"] is None or part["error"] >= 0 for part in found["parts"])
    assert (out / "1_Pooling" / "config.json").exists() and (out / "tokenizer.json").exists()
    stored = json.loads((out / "config.json").read_text())["quantization_config"]
    assert stored["calibrated_on"] == "512 lines of texts.txt" and stored["target_ratio"] == 0.7


def test_teaching_brings_it_nearer(checkpoint, capsys):
    code, out = compress(checkpoint, "--target_ratio", "0.6", "--teach", "40", "--json")
    assert code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["taught"] < found["error"]
    small = tf.AutoModelForMaskedLM.from_pretrained(out).eval()
    assert fnl_hf.factorizations(small) and main(["to-dense", str(out), str(out.parent / "again")]) == 0


def test_the_table_is_for_people(checkpoint, capsys):
    assert compress(checkpoint)[0] == 0
    text = capsys.readouterr().out
    for part in (
        "part",
        "embedding",
        "linear",
        "qk",
        "ov",
        "the rest",
        "the model",
        "batch of 32",
        "next: --teach 500",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calibration", "none.txt"], "--calibration none.txt: no such file"),
        (["--target_ratio", "1.5"], "target_ratio is 1.5"),
        (["--target_ratio", "0.01"], "give a larger ratio"),
        (["--teach", "-1"], "--teach -1: expected a number of steps"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(checkpoint, arguments, message, capsys):
    code, out = compress(checkpoint, *arguments)
    error = capsys.readouterr().err.strip()
    assert code == 2 and message in error and "\n" not in error.splitlines()[-1] and not out.exists()


def test_paragraphs_of_squad_are_texts(checkpoint, tmp_path):
    article = {
        "paragraphs": [
            {"context": "w1 w2 w3", "qas": [{"question": "w4"}, {"question": "w5"}]},
            {"context": "w6", "qas": []},
        ]
    }
    (tmp_path / "squad.json").write_text(json.dumps({"data": [article]}))
    tokenizer = tf.AutoTokenizer.from_pretrained(checkpoint)
    rows = encoded_texts(tmp_path / "squad.json", tokenizer, tf.AutoModelForMaskedLM.from_pretrained(checkpoint))
    assert sorted(len(row["input_ids"]) for row in rows) == [1, 4]


def test_the_script_lets_a_checkpoint_learn(checkpoint, monkeypatch):
    code, out = compress(checkpoint, "--target_ratio", "0.6")
    assert code == 0
    texts, taught = checkpoint.parent / "texts.txt", checkpoint.parent / "taught"
    arguments = {
        "model_name_or_path": out, "teacher": checkpoint, "train_file": texts, "validation_file": texts,
        "output_dir": taught, "max_steps": 6, "logging_steps": 2, "use_cpu": True, "save_steps": 3,
        "max_seq_length": 32,
    }  # fmt: skip
    run_script(monkeypatch, "run_distillation.py", **arguments)
    results = json.loads((taught / "all_results.json").read_text())
    assert results["eval_loss"] > 0 and results["train_loss"] > 0
    assert fnl_hf.factorizations(tf.AutoModelForMaskedLM.from_pretrained(taught))
