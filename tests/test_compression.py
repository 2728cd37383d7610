"""`fnl-hf compress` on tiny checkpoints, what its table says, and `run_distillation.py`."""

import copy
import json

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

import fnl_hf
from fnl_hf.cli import main
from fnl_hf.compression import teach
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
    assert stored["calibrated_on"] == "60 texts of texts.txt" and stored["target_ratio"] == 0.7


def test_teaching_brings_it_nearer(checkpoint, capsys):
    code, out = compress(checkpoint, "--target_ratio", "0.6", "--teach", "60", "--json")
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
        "errors: divergence of the distributions of the logits, in nats",
        "batch of 32",
        "next: --teach 500",
    ):
        assert part in text


def test_what_stays_dense_is_named(checkpoint, capsys):
    assert compress(checkpoint, "--target_ratio", "0.97")[0] == 0
    assert "stayed dense: " in capsys.readouterr().out


def test_interrupted_it_is_one_line_and_leaves_nothing(checkpoint, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fnl_hf.cli.factorize", interrupted)
    assert compress(checkpoint)[0] == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "fnl-hf: interrupted, nothing was written"
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["dense", "texts.txt"]


def test_what_cannot_be_done_is_refused_before_the_work(checkpoint, monkeypatch, capsys):
    def looked(*arguments):
        raise AssertionError("ran batches")

    monkeypatch.setattr("fnl_hf.calibration.moments", looked)
    texts = ["--calibration", str(checkpoint.parent / "texts.txt")]
    (checkpoint.parent / "file").write_text("")
    for out, arguments, message in (
        (checkpoint / "small", [], f"lies in {checkpoint}, which it would be made of"),
        (checkpoint.parent / "file" / "small", [], "cannot be made"),
        (checkpoint.parent / "small", ["--target_ratio", "0.01"], "give a larger ratio"),
        (checkpoint.parent / "small", ["--target_ratio", "0.01", "--rank_allocation", "uniform"], "a larger ratio"),
    ):
        assert main(["compress", str(checkpoint), str(out), *texts, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["dense", "file", "texts.txt"]


def test_teaching_leaves_the_cache_on(checkpoint, capsys):
    """Which a Trainer turns off for good."""
    tokenizer = tf.AutoTokenizer.from_pretrained(checkpoint)
    dense = tf.LlamaForCausalLM(
        tf.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokenizer)
        )
    )
    student = fnl_hf.factorize(copy.deepcopy(dense), fnl_hf.FNLConfig(target_ratio=0.8))
    teach(student, dense, encoded_texts(checkpoint.parent / "texts.txt", tokenizer, dense), tokenizer, 2, False)
    assert student.config.use_cache is True and dense.config.use_cache is True


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
    assert (taught / "1_Pooling" / "config.json").exists()


def test_what_only_gets_worse_is_left_out(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("fnl_hf.compression.TAUGHT_RATE", 3.0)
    code, out = compress(checkpoint, "--target_ratio", "0.6", "--teach", "30")
    assert code == 0 and "worse, so what it has learned is left out" in capsys.readouterr().out
    again = checkpoint.parent / "again"
    assert (
        main(
            [
                "compress",
                str(checkpoint),
                str(again),
                "--calibration",
                str(checkpoint.parent / "texts.txt"),
                "--target_ratio",
                "0.6",
            ]
        )
        == 0
    )
    models = [tf.AutoModelForMaskedLM.from_pretrained(path) for path in (out, again)]
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


@pytest.mark.parametrize("name", ["cut.gz", "cut.xz", "no.xz", "binary.txt"])
def test_damaged_files_are_one_line(checkpoint, name, capsys):
    import gzip
    import lzma

    path = checkpoint.parent / name
    whole = {"gz": gzip, "xz": lzma}.get(name.rpartition(".")[2], gzip).compress(b"w1 w2 w3\n" * 500)
    path.write_bytes(bytes([0xFF, 0xFE, 0xFA]) * 9 if name.startswith(("no", "binary")) else whole[: len(whole) // 2])
    code, out = compress(checkpoint, "--calibration", str(path))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and name in error and "not a readable UTF-8 text file" in error and not out.exists()
