"""fnl-hf: factorize, to-dense and inspect on directories."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import fnl_hf
from fnl_hf.cli import main
from fnl_hf.measure import spectra
from fnl_hf.ranks import adaptive
from tests.families import BART, TEXT, build, output

ROOT = Path(__file__).parents[1]


@pytest.fixture
def dense(tmp_path):
    """A dense BERT in tmp_path/dense, with files around it."""
    model, _ = build("bert")
    directory = tmp_path / "dense"
    model.save_pretrained(directory)
    for name in ("tokenizer_config.json", "vocab.txt", "chat_template.jinja", "special_tokens_map.json"):
        (directory / name).write_text("{}")
    left = ("pytorch_model.bin", "optimizer.pt", "modeling_x.py", "run_results.json", "test_predictions.tsv")
    for name in (*left, "generated_predictions.txt", "model.safetensors.index.json"):
        (directory / name).write_text("not to be carried along")
    (directory / "model.safetensors.index.json").unlink()
    (directory / "README.md").write_text("---\nlicense: mit\n---\n# My BERT\n")
    return directory


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_factorize_inspect_and_back(dense, tmp_path, capsys):
    assert run("factorize", dense, tmp_path / "half", "--head_rank", "0.5") == 0
    assert "8 qk in 2 modules (rank 4)" in capsys.readouterr().out
    model, loaded = tf.AutoModel.from_pretrained(dense), tf.AutoModel.from_pretrained(tmp_path / "half")
    fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=0.5))
    assert torch.equal(output(loaded, TEXT), output(model, TEXT))
    names = {path.name for path in (tmp_path / "half").iterdir()}
    assert names == {
        "config.json", "model.safetensors", "README.md", "tokenizer_config.json", "vocab.txt", "chat_template.jinja",
        "special_tokens_map.json",
    }  # fmt: skip
    capsys.readouterr()

    assert run("inspect", tmp_path / "half") == 0
    table = capsys.readouterr().out
    assert "encoder.layer.1.attention.self.qk" in table and "effective rank" in table

    assert run("to-dense", tmp_path / "half", tmp_path / "again") == 0
    again = tf.AutoModel.from_pretrained(tmp_path / "again")
    assert not fnl_hf.factorizations(again)
    torch.testing.assert_close(output(again, TEXT), output(model, TEXT))
    assert "quantization" not in (tmp_path / "again" / "config.json").read_text()
    assert (tmp_path / "again" / "README.md").read_text() == (dense / "README.md").read_text()
    assert (tmp_path / "again" / "vocab.txt").exists()


def test_options_reach_the_config(dense, tmp_path):
    pattern = '{"layer.0.attention.self": 2}'
    options = ["--attention", "ov", "--head_rank", "1", "--init", "default", "--rank_pattern", pattern]
    options += ["--head_layout", "compact"]
    assert run("factorize", dense, tmp_path / "out", *options) == 0
    config = tf.AutoModel.from_pretrained(tmp_path / "out").config.quantization_config
    assert (config.attention, config.head_rank, config.init) == (("ov",), 1, "default")
    assert (
        isinstance(config.head_rank, int)
        and config.head_layout == "compact"
        and config.rank_pattern == {"layer.0.attention.self": 2}
    )


def test_inspect_json_measures_every_product(dense, tmp_path, capsys):
    run("factorize", dense, tmp_path / "half", "--head_rank", "0.5")
    capsys.readouterr()
    assert run("inspect", tmp_path / "half", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    model = tf.AutoModel.from_pretrained(tmp_path / "half")
    for row, product in zip(rows, fnl_hf.factorizations(model), strict=True):
        sigma = torch.linalg.svdvals(product.matrix())[:, :4]
        share = sigma / sigma.sum(-1, keepdim=True)
        effective = (-(share * share.log()).sum(-1)).exp().mean().item()
        assert (row["name"], row["kind"], row["rank"]) == (product.name, product.kind, 4)
        assert row["nuclear_norm"] == pytest.approx(sigma.sum().item(), rel=1e-4)
        assert row["stable_rank"] == pytest.approx((sigma.square().sum(-1) / sigma[:, 0] ** 2).mean().item(), rel=1e-4)
        assert row["effective_rank"] == pytest.approx(effective, rel=1e-4)
        assert row["singular_values"] == pytest.approx(sigma.mean(0).tolist(), rel=1e-4)


def test_inspect_of_a_dense_checkpoint(dense, capsys):
    assert run("inspect", dense) == 0
    assert capsys.readouterr().out.strip().endswith("not factorized")


def test_spectra_of_zero_factors_are_numbers():
    model, _ = build("bert")
    with torch.no_grad():
        for parameter in model.encoder.layer[0].attention.self.parameters():
            parameter.zero_()
    rows = spectra(fnl_hf.factorize(model, fnl_hf.FNLConfig(init="default")))
    zero = next(row for row in rows if row["name"] == "encoder.layer.0.attention.self.qk")
    assert (zero["nuclear_norm"], zero["stable_rank"]) == (0, 0) and zero["effective_rank"] == 1


def test_the_class_dtype_and_generation_config_stay(tmp_path):
    torch.manual_seed(0)
    model = tf.BartForConditionalGeneration(tf.BartConfig(**BART)).to(torch.bfloat16)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "dense")
    assert run("factorize", tmp_path / "dense", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [type(model).__name__]
    assert {w.dtype for w in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_new_tokens"] == 7


@pytest.mark.parametrize(("rank", "needs"), [("0.5", "loads with `fnl_hf` only"), ("1.0", "stored at full rank")])
def test_the_model_card_says_what_is_needed(rank, needs, dense, tmp_path):
    run("factorize", dense, tmp_path / "out", "--head_rank", rank)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# My BERT\n") and needs in card
    assert "import fnl_hf" in card and "BertModel.from_pretrained" in card
    (dense / "README.md").unlink()
    run("factorize", dense, tmp_path / "bare", "--head_rank", rank)
    assert (tmp_path / "bare" / "README.md").read_text().startswith("---\nlibrary_name: transformers")


def test_ranks_that_adapted_are_fixed(dense, tmp_path, capsys):
    model = fnl_hf.factorize(tf.AutoModel.from_pretrained(dense), fnl_hf.FNLConfig(head_rank=0.5))
    for each in adaptive(model):
        each.make_orthonormal()
    model.save_pretrained(tmp_path / "deep")
    for options, rank in (((), 4), (("--rank_max", "3"), 3)):
        assert run("fix-ranks", tmp_path / "deep", tmp_path / f"fixed-{rank}", *options) == 0
        fixed = tf.AutoModel.from_pretrained(tmp_path / f"fixed-{rank}")
        assert {(p.layout, p.size()[1]) for p in fnl_hf.factorizations(fixed)} == {("padded", rank)}
        close = torch.allclose(output(fixed, TEXT), output(model, TEXT), atol=1e-5)
        assert close == (rank == 4)
    assert "is not factorized: there are no ranks to fix" in refused(capsys, "fix-ranks", dense, tmp_path / "out")


# -- what is refused ---------------------------------------------------------------------------------


def refused(capsys, *arguments):
    """The line on stderr of a command that ends with 2."""
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("fnl-hf: ") and not any("Traceback" in line for line in lines)
    return lines[-1]


def test_one_line_for_what_is_wrong(dense, tmp_path, capsys):
    out = tmp_path / "out"
    assert "holds no config.json" in refused(capsys, "inspect", tmp_path / "nowhere")
    assert "is not factorized" in refused(capsys, "to-dense", dense, out)
    assert "above its head_dim 8" in refused(capsys, "factorize", dense, out, "--head_rank", "9")
    assert "head_rank is 1.5" in refused(capsys, "factorize", dense, out, "--head_rank", "1.5")
    assert "exists and is not an empty directory" in refused(capsys, "factorize", dense, dense)
    run("factorize", dense, tmp_path / "half")
    assert "factorized already" in refused(capsys, "factorize", tmp_path / "half", out)
    (dense / "model.safetensors").write_bytes(b"short")
    assert "fnl-hf: " in refused(capsys, "inspect", dense)
    (dense / "config.json").write_text("{")
    assert "is not JSON" in refused(capsys, "inspect", dense)
    (dense / "config.json").write_text('{"architectures": ["Mine"]}')
    assert "has architectures ['Mine']" in refused(capsys, "inspect", dense)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "half"]  # nothing half-written is left


def test_out_may_be_an_empty_directory_but_no_file(dense, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run("factorize", dense, tmp_path / "empty") == 0
    (tmp_path / "file").touch()
    assert "is not an empty directory" in refused(capsys, "factorize", dense, tmp_path / "file")


def test_a_failed_save_leaves_nothing(dense, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tf.BertModel, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    assert "disk full" in refused(capsys, "factorize", dense, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    "arguments", [[], ["train"], ["factorize", "a"], ["factorize", "a", "b", "--head_rank", "half"],
                  ["factorize", "a", "b", "--rank_pattern", "["], ["factorize", "a", "b", "--rank_pattern", "3"]]
)  # fmt: skip
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2 and "usage: fnl-hf" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["factorize"], ["to-dense"], ["fix-ranks"], ["inspect"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0 and "DIR" in capsys.readouterr().out


def test_folders_without_weights_are_carried_along(dense, tmp_path, capsys):
    """A sentence-transformers checkpoint stays one; other weights, code and logs stay behind."""
    kept = {
        "modules.json", "1_Pooling/config.json", "additional_chat_templates/tool.jinja", "2_Normalize/deeper/a.txt",
    }  # fmt: skip
    left = {
        "checkpoint-5/optimizer.pt", "onnx/model.onnx", "runs/Jan/events.out.tfevents.1", ".git/HEAD",
        "1_Pooling/code.py", "2_Normalize/__pycache__/code.pyc", "2_Dense/model.safetensors", "2_Dense/config.json",
    }  # fmt: skip
    for name in kept | left:
        (dense / name).parent.mkdir(parents=True, exist_ok=True)
        (dense / name).write_text("{}")
    (dense / "2_Normalize" / "linked").symlink_to(dense, target_is_directory=True)
    (dense / "linked").symlink_to(dense / "1_Pooling", target_is_directory=True)
    assert run("factorize", dense, tmp_path / "half") == 0
    assert "fnl_hf: 2_Dense, checkpoint-5, onnx, runs not carried along: weights" in capsys.readouterr().out
    found = {str(path.relative_to(tmp_path / "half")) for path in (tmp_path / "half").rglob("*") if path.is_file()}
    assert kept <= found and not left & found and not any("linked" in name for name in found)
    assert run("to-dense", tmp_path / "half", tmp_path / "again") == 0
    assert all((tmp_path / "again" / name).is_file() for name in kept)


@pytest.mark.parametrize("target", ["empty", "nowhere"])
def test_a_symbolic_link_is_no_out(dense, tmp_path, capsys, target):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / target, target_is_directory=True)
    for command in (("factorize", dense), ("to-dense", dense)):
        assert run(*command, tmp_path / "link") == 2
        assert "link is a symbolic link: give the directory that it points to" in capsys.readouterr().err
    assert (tmp_path / "link").is_symlink() and not any((tmp_path / "empty").iterdir())
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("command", ["--help", "inspect", "factorize"])
def test_a_closed_pipe_ends_quietly(command, dense, tmp_path):
    arguments = {"--help": [], "inspect": [dense], "factorize": [dense, tmp_path / "half"]}[command]
    program = [sys.executable, "-m", "fnl_hf.cli", command, *map(str, arguments)]
    if command == "inspect":
        fnl_hf.factorize(tf.AutoModel.from_pretrained(dense)).save_pretrained(dense)
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(program, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, text=True) as process:
        os.close(writer)
        errors = process.communicate()[1]
    assert process.returncode == 0
    assert all(line.startswith("fnl_hf: factorized") for line in errors.splitlines()), errors
    assert command != "factorize" or (tmp_path / "half" / "model.safetensors").exists()  # it does its work


def test_layers_by_ratio_by_rank_and_by_energy(dense, tmp_path, capsys):
    assert run("factorize", dense, tmp_path / "half", "--target_ratio", "0.6") == 0
    files = [load_file(directory / "model.safetensors") for directory in (dense, tmp_path / "half")]
    before, after = (sum(tensor.numel() for tensor in file.values()) for file in files)
    assert 0.55 < after / before <= 0.6
    assert "stored as factors" in (tmp_path / "half" / "README.md").read_text()
    quarter = ("--attention", "--target_modules", "all-linear", "--rank", "0.25", "--init", "xavier")
    assert run("factorize", dense, tmp_path / "quarter", *quarter) == 0
    assert "12 linear in 12 modules" in capsys.readouterr().out
    model = tf.AutoModel.from_pretrained(tmp_path / "quarter")
    assert {product.kind for product in fnl_hf.factorizations(model)} == {"linear"}
    energy = ("--attention", "none", "--target_modules", "intermediate.dense", "--rank", "energy=0.5", "--form", "deep")
    assert run("factorize", dense, tmp_path / "energy", *energy) == 0
    assert run("factorize", dense, tmp_path / "all", *energy[:4], "--rank", "energy=1") == 2
    assert "keeps its full rank" in capsys.readouterr().err
    assert run("inspect", tmp_path / "energy") == 0 and run("to-dense", tmp_path / "energy", tmp_path / "again") == 0
    capsys.readouterr()
    assert run("factorize", dense, tmp_path / "none", "--rank", "0.5") == 2
    assert "give target_modules" in capsys.readouterr().err and not (tmp_path / "none").exists()
