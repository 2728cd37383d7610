"""save_pretrained / from_pretrained of factorized models, what is refused, and the calls that people make every day."""

import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers.core_model_loading import rename_source_key, revert_weight_conversion
from transformers.quantizers import auto

import fnl_hf
from fnl_hf.heads import HeadLinear
from fnl_hf.loading import written_whole
from tests.families import BART, BERT, FAMILIES, TEXT, build, output

ROOT = Path(__file__).parents[1]
HALF = fnl_hf.FNLConfig(head_rank=0.5)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def factorized(family, config=HALF, **kwargs):
    model, inputs = build(family, **kwargs)
    return fnl_hf.factorize(model, config), inputs


def head_model(cls, config):
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def edit_config(directory, edit):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


# -- round trips in new processes --------------------------------------------------------------------

RELOAD = """
import json, sys, torch, transformers as tf
if sys.argv[2] == "with":
    import fnl_hf
from tests.families import FAMILIES, output
tf.logging.set_verbosity_error()
root, result = sys.argv[1], {}
for family in FAMILIES:
    inputs = torch.load(f"{root}/{family}/inputs.pt")
    for kind in sys.argv[3:]:
        try:
            model = tf.AutoModel.from_pretrained(f"{root}/{family}/{kind}")
        except RuntimeError as error:
            result[f"{family}/{kind}"] = str(error)
            continue
        torch.save(output(model, inputs), f"{root}/{family}/{kind}-{sys.argv[2]}.pt")
assert ("fnl_hf" in sys.modules) == (sys.argv[2] == "with")
json.dump(result, open(f"{root}/{sys.argv[2]}.json", "w"))
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Every family saved reduced, at full rank and dense again, and reloaded by processes with and without fnl_hf."""
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        for kind, config in (("reduced", HALF), ("full", fnl_hf.FNLConfig())):
            model, inputs = factorized(family, config)
            model.save_pretrained(root / family / kind)
            torch.save(output(model, inputs), root / family / f"{kind}.pt")
            if kind == "reduced":
                fnl_hf.to_dense(model).save_pretrained(root / family / "dense")
        torch.save(inputs, root / family / "inputs.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for arguments in (["with", "reduced", "full"], ["without", "reduced", "full", "dense"]):
        command = [sys.executable, "-c", RELOAD, str(root), *arguments]
        subprocess.run(command, check=True, env=environment, cwd=root, capture_output=True)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trips_in_new_processes(processes, family):
    folder = processes / family
    reduced, full = torch.load(folder / "reduced.pt"), torch.load(folder / "full.pt")
    with_import, without = (json.loads((processes / f"{name}.json").read_text()) for name in ("with", "without"))
    # With fnl_hf: bit for bit.
    assert not with_import
    assert torch.equal(torch.load(folder / "reduced-with.pt"), reduced)
    assert torch.equal(torch.load(folder / "full-with.pt"), full)
    # Without it: full rank gives the same outputs, reduced rank is an error and never random weights.
    assert_close(torch.load(folder / "full-without.pt"), full)
    assert "ignore_mismatched_sizes" in without[f"{family}/reduced"] and len(without) == len(FAMILIES)
    # Dense again: the same function anywhere, and no trace.
    assert relative(torch.load(folder / "dense-without.pt"), reduced) < 1e-5
    config = (folder / "dense" / "config.json").read_text()
    assert "quantization" not in config and "fnl" not in config


# -- in this process ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart", "albert"])
@pytest.mark.parametrize("shard", ["20KB", "1GB"])
@pytest.mark.parametrize("layout", ["padded", "compact"])
def test_restores_structure_and_weights(family, layout, shard, tmp_path, monkeypatch):
    model, inputs = factorized(family, fnl_hf.FNLConfig(head_rank=0.5, head_layout=layout))
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    monkeypatch.setattr(fnl_hf.heads.find, "find_attention", None)  # loading never searches
    loaded = tf.AutoModel.from_pretrained(tmp_path)
    assert repr(loaded) == repr(model)
    assert loaded.config.quantization_config == model.config.quantization_config
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    names = [f.name for f in fnl_hf.factorizations(model)]
    assert [f.name for f in fnl_hf.factorizations(loaded)] == names and names
    loaded.save_pretrained(tmp_path / "again")
    again = tf.AutoModel.from_pretrained(tmp_path / "again")
    assert torch.equal(output(again, inputs), output(model, inputs))


def test_a_head_over_a_base_checkpoint_and_the_base_of_a_head_checkpoint(tmp_path):
    with_head = fnl_hf.factorize(head_model(tf.BertForMaskedLM, tf.BertConfig(**BERT)), HALF)
    with_head.save_pretrained(tmp_path / "head")
    base = tf.BertModel.from_pretrained(tmp_path / "head")
    assert torch.equal(output(base, TEXT), output(with_head.bert, TEXT))
    assert [f.name for f in fnl_hf.factorizations(base)][0] == "encoder.layer.0.attention.self.qk"
    base.save_pretrained(tmp_path / "base")
    for cls in (tf.BertForMaskedLM, tf.BertForSequenceClassification):
        again = cls.from_pretrained(tmp_path / "base")
        assert torch.equal(output(again.bert, TEXT), output(base, TEXT))
        assert len(fnl_hf.factorizations(again)) == 4
        assert fnl_hf.summary(again).rows[0]["name"] == "bert.encoder.layer.0.attention.self.qk"
    with_head.bert.save_pretrained(tmp_path / "inner")  # shares its config, and so the plan, with the outer model
    assert torch.equal(output(tf.BertModel.from_pretrained(tmp_path / "inner"), TEXT), output(base, TEXT))


def test_a_class_that_holds_a_part_of_the_saved_model(tmp_path, capsys):
    model = fnl_hf.factorize(head_model(tf.BartForConditionalGeneration, tf.BartConfig(**BART)), HALF)
    model.save_pretrained(tmp_path)
    decoder = tf.BartForCausalLM.from_pretrained(tmp_path)
    assert "is a part of the saved model, without model.encoder.layers.0.self_attn" in capsys.readouterr().err
    assert len(fnl_hf.factorizations(decoder)) == 8
    for a, b in zip(fnl_hf.factorizations(decoder), fnl_hf.factorizations(model.model.decoder), strict=True):
        assert torch.equal(a.matrix(), b.matrix())


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "clip"])
def test_factorizes_a_dense_checkpoint_while_loading(family, tmp_path):
    model, inputs = build(family)
    model.save_pretrained(tmp_path / "dense")
    fnl_hf.factorize(model, HALF)
    loaded = tf.AutoModel.from_pretrained(tmp_path / "dense", quantization_config=fnl_hf.FNLConfig(head_rank=0.5))
    assert repr(loaded) == repr(model) and torch.equal(output(loaded, inputs), output(model, inputs))
    assert loaded.config.quantization_config == model.config.quantization_config
    loaded.save_pretrained(tmp_path / "factorized")
    again = tf.AutoModel.from_pretrained(tmp_path / "factorized")
    assert torch.equal(output(again, inputs), output(model, inputs))


def test_conversions_of_old_checkpoints_do_not_come_back(tmp_path):
    """Legacy names are converted while loading; what is saved then must fit the plan, narrow factors included."""
    model, inputs = build("bert")
    model.save_pretrained(tmp_path / "old")
    weights = load_file(tmp_path / "old" / "model.safetensors")
    legacy = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): value for key, value in weights.items()}
    assert legacy.keys() != weights.keys()
    save_file(legacy, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    loaded = tf.BertModel.from_pretrained(tmp_path / "old", quantization_config=HALF)
    loaded.save_pretrained(tmp_path / "new")
    assert set(load_file(tmp_path / "new" / "model.safetensors")) == set(loaded.state_dict())
    assert torch.equal(output(tf.BertModel.from_pretrained(tmp_path / "new"), inputs), output(loaded, inputs))
    fnl_hf.to_dense(loaded).save_pretrained(tmp_path / "dense")
    assert relative(output(tf.BertModel.from_pretrained(tmp_path / "dense"), inputs), output(loaded, inputs)) < 1e-6


@pytest.mark.parametrize("config", [fnl_hf.FNLConfig(), HALF], ids=["full", "half"])
def test_a_family_whose_checkpoints_have_other_names_than_its_modules(config, tmp_path):
    model, inputs = factorized("vit", config)
    model.save_pretrained(tmp_path)
    stored = set(load_file(tmp_path / "model.safetensors"))
    assert (stored == set(model.state_dict())) == (config is HALF)  # full rank: the names of any ViT checkpoint
    assert torch.equal(output(tf.ViTModel.from_pretrained(tmp_path), inputs), output(model, inputs))


@pytest.mark.parametrize("config", [fnl_hf.FNLConfig(), HALF], ids=["full", "half"])
def test_a_plan_with_the_names_of_an_older_transformers(config, tmp_path):
    """Transformers renames modules now and then, and converts the keys of weights; the plan goes the same way."""
    model, inputs = factorized("vit", config)
    model.save_pretrained(tmp_path)
    older = {
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
        "o_proj": "output.dense",
    }

    def rename(name):
        for new, old in older.items():
            name = name.replace(f"attention.{new}", f"attention.{old}")
        return name

    def edit(quantization):
        for product in quantization["plan"]["targets"]:
            for side in (product["left"], product["right"]):
                for field in ("weight", "bias"):
                    if side[field]:
                        side[field] = rename(f"attention.{side[field]}").removeprefix("attention.")

    edit_config(tmp_path, edit)
    weights = load_file(tmp_path / "model.safetensors")
    old_weights = {rename(name): value for name, value in weights.items()}
    save_file(old_weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = tf.AutoModel.from_pretrained(tmp_path)
    assert repr(loaded) == repr(model)
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    edit_config(tmp_path, lambda q: first(q, rank=2))
    with pytest.raises(ValueError, match=r"attention\.attention\.query\.weight is stored as"):
        tf.AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_respected(dtype, tmp_path):
    with_head = fnl_hf.factorize(head_model(tf.BertForMaskedLM, tf.BertConfig(**BERT)), HALF)
    with_head.save_pretrained(tmp_path)
    for cls in (tf.BertForMaskedLM, tf.BertModel):  # the second renames every key
        loaded = cls.from_pretrained(tmp_path, dtype=dtype)
        assert {p.dtype for p in loaded.parameters()} == {dtype}
    loaded.save_pretrained(tmp_path / "cast")
    assert tf.BertModel.from_pretrained(tmp_path / "cast", dtype="auto").dtype == dtype
    dense, _ = build("bert")
    dense.save_pretrained(tmp_path / "dense")
    loaded = tf.BertModel.from_pretrained(tmp_path / "dense", dtype=dtype, quantization_config=HALF)
    assert {p.dtype for p in loaded.parameters()} == {dtype}


def test_device_map_is_respected(tmp_path):
    model, inputs = factorized("bert")
    model.save_pretrained(tmp_path / "whole")
    for device_map in ("cpu", "auto", {"": "cpu"}):
        loaded = tf.BertModel.from_pretrained(tmp_path / "whole", device_map=device_map)
        assert torch.equal(output(loaded, inputs), output(model, inputs))
    on_disk = {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": "disk", "pooler": "cpu"}
    folder = str(tmp_path / "offload")
    loaded = tf.BertModel.from_pretrained(tmp_path / "whole", device_map=on_disk, offload_folder=folder)
    assert_close(output(loaded, inputs), output(model, inputs))
    fnl_hf.to_dense(model).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="load it on one device"):
        tf.BertModel.from_pretrained(
            tmp_path / "dense", device_map=on_disk, offload_folder=folder, quantization_config=HALF
        )


def test_nothing_marks_it_as_quantized_but_the_config(tmp_path):
    model, _ = factorized("t5")
    model.save_pretrained(tmp_path)
    loaded = tf.T5Model.from_pretrained(tmp_path)
    assert not any(hasattr(loaded, name) for name in ("hf_quantizer", "is_quantized", "quantization_method"))
    assert isinstance(loaded.config.quantization_config, fnl_hf.FNLConfig)
    assert not hasattr(loaded.config, "_is_quantized") and not hasattr(loaded.encoder.config, "quantization_config")
    assert loaded.half().dtype == torch.float16 and loaded.float().dtype == torch.float32
    assert loaded.to("cpu", torch.bfloat16).dtype == torch.bfloat16
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    fnl_hf.to_dense(loaded)
    assert "quantization_config" not in loaded.config.to_dict()
    assert "quantization_config" not in loaded.encoder.config.to_dict()


def test_the_stock_trainer_trains_a_loaded_model(tmp_path):
    model = fnl_hf.factorize(head_model(tf.BertForSequenceClassification, tf.BertConfig(**BERT)), HALF)
    model.save_pretrained(tmp_path / "start")
    loaded = tf.BertForSequenceClassification.from_pretrained(tmp_path / "start")
    before = [f.squared_norm().item() for f in fnl_hf.factorizations(loaded)]
    data = [{"input_ids": TEXT["input_ids"][i % 2], "labels": i % 2} for i in range(8)]
    arguments = tf.TrainingArguments(
        tmp_path / "run", max_steps=2, learning_rate=0.01, report_to=[], use_cpu=True, save_steps=2, disable_tqdm=True
    )
    tf.Trainer(loaded, arguments, train_dataset=data).train()
    assert all(f.squared_norm().item() != b for f, b in zip(fnl_hf.factorizations(loaded), before, strict=True))
    again = tf.BertForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert torch.equal(again(**TEXT).logits, loaded.eval()(**TEXT).logits)


# -- what is refused ---------------------------------------------------------------------------------


def test_another_config_is_refused_and_the_same_is_not(tmp_path):
    model, inputs = factorized("bert")
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers says that it takes the stored config
        same = tf.BertModel.from_pretrained(tmp_path, quantization_config=fnl_hf.FNLConfig(head_rank=0.5))
        assert torch.equal(output(same, inputs), output(model, inputs))
        assert "requested" not in same.config.to_json_string()
        for other in ({"head_rank": 0.25}, {"head_rank": 0.5, "attention": ("ov",)}):
            with pytest.raises(ValueError, match="factorized already, with another config.*to-dense"):
                tf.AutoModel.from_pretrained(tmp_path, quantization_config=fnl_hf.FNLConfig(**other))


def test_a_config_of_another_model_is_a_config_like_any_other(tmp_path):
    model, inputs = factorized("bert")
    model.save_pretrained(tmp_path)
    loaded = tf.BertModel.from_pretrained(tmp_path, config=model.config)
    assert torch.equal(output(loaded, inputs), output(model, inputs))


def test_from_config_makes_a_dense_model_that_can_be_factorized(tmp_path):
    factorized("bert")[0].save_pretrained(tmp_path)
    for config in (tf.AutoConfig.from_pretrained(tmp_path), tf.AutoModel.from_pretrained(tmp_path).config):
        model = tf.AutoModel.from_config(config)
        assert not fnl_hf.factorizations(model)
        fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=2))
        assert model.config.quantization_config.head_rank == 2
    config.quantization_config = tf.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="quantized"):
        fnl_hf.factorize(tf.BertModel(config), HALF)


def test_the_private_parts_of_transformers_that_loading_leans_on(tmp_path):
    assert fnl_hf.FNLConfig in auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    assert "get_loading_attributes" in inspect.getsource(auto.AutoHfQuantizer.merge_quantization_configs)
    parameters = ["source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"]
    assert list(inspect.signature(rename_source_key).parameters)[:5] == parameters
    assert '"_weight_conversions"' in inspect.getsource(revert_weight_conversion)
    factorized("bert")[0].save_pretrained(tmp_path)
    loaded = tf.AutoModel.from_pretrained(tmp_path)
    assert loaded.encoder.layer[0].attention.self.query.weight._is_hf_initialized


def first(plan, **changes):
    plan["plan"]["targets"][0].update(changes)


DAMAGED = {
    "wrong rank": (lambda q: first(q, rank=2), r"stored as \(16, 32\), the plan .* makes it \(8, 32\)"),
    "rank too high": (lambda q: first(q, rank=9), r"targets\[0\] \(encoder.*\): rank is 9, expected an int in 1\.\.8"),
    "rank no int": (lambda q: first(q, rank=0.5), "rank is 0.5, expected an int"),
    "unknown leaf": (lambda q: first(q, name="encoder.layer.9.qk"), "names encoder.layer.9.qk, but BertModel has no"),
    "unknown kind": (lambda q: first(q, kind="qq"), "kind is 'qq', expected one of"),
    "other heads": (lambda q: q["plan"]["targets"][0]["left"].update(heads=[5]), "whose features are split like that"),
    "no width": (lambda q: q["plan"]["targets"][0]["left"].pop("width"), r"targets\[0\] cannot be read.*width"),
    "odd width": (lambda q: q["plan"]["targets"][0]["left"].update(width="8"), "makes no sense"),
    "odd compact": (lambda q: first(q, compact={"forward": "x"}), "compact is .*, expected whole numbers"),
    "unknown compact": (lambda q: first(q, compact={"forward": 4}), "whose features are split like that"),
    "no targets": (lambda q: q["plan"].pop("targets"), "holds no list of targets"),
    "no plan": (lambda q: q.update(plan=None), "plan in config.json holds no list of targets"),
    "target dropped": (lambda q: q["plan"]["targets"].pop(0), "ignore_mismatched_sizes|in a shape that"),
    "unknown init": (lambda q: q.update(init="svd"), "init is 'svd', expected one of"),
    "unknown field": (lambda q: q.update(headrank=2), "does not know headrank"),
    "newer format": (lambda q: q.update(format_version=3, novelty=1), "has format_version 3, .* upgrade fnl_hf"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_config_is_one_clear_error(damage, tmp_path):
    edit, message = DAMAGED[damage]
    factorized("bert")[0].save_pretrained(tmp_path)
    edit_config(tmp_path, edit)
    with pytest.raises((ValueError, RuntimeError), match=message):
        tf.AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", [fnl_hf.FNLConfig(), HALF], ids=["full", "half"])
@pytest.mark.parametrize("ignore", [False, True])
def test_missing_factors_are_an_error_that_names_them(config, ignore, tmp_path):
    factorized("bert", config)[0].save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.attention.self.key.weight"], weights["encoder.layer.1.attention.self.key.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks encoder\.layer\.1\.attention\.self\.key\.weight, .*key\.bias, which"):
        tf.AutoModel.from_pretrained(tmp_path, ignore_mismatched_sizes=ignore)


@pytest.mark.parametrize("ignore", [False, True])
def test_factors_of_another_shape_are_an_error_that_names_them(ignore, tmp_path):
    factorized("bert")[0].save_pretrained(tmp_path / "half")
    factorized("bert", fnl_hf.FNLConfig(head_rank=0.25))[0].save_pretrained(tmp_path / "quarter")
    os.replace(tmp_path / "quarter" / "model.safetensors", tmp_path / "half" / "model.safetensors")
    with pytest.raises(ValueError, match=r"weight is stored as \(8, 32\), the plan .* restore the config.json"):
        tf.AutoModel.from_pretrained(tmp_path / "half", ignore_mismatched_sizes=ignore)


def test_a_head_of_another_shape_is_never_taken(tmp_path):
    model = fnl_hf.factorize(head_model(tf.BertForSequenceClassification, tf.BertConfig(**BERT)), HALF)
    model.save_pretrained(tmp_path / "factorized")
    fnl_hf.to_dense(model).save_pretrained(tmp_path / "dense")
    for directory, config in (("factorized", None), ("dense", HALF)):
        with pytest.raises(
            (RuntimeError, ValueError), match="ignore_mismatched_sizes|classifier.weight, classifier.bias"
        ):
            tf.BertForSequenceClassification.from_pretrained(
                tmp_path / directory, num_labels=5, quantization_config=config
            )


def test_a_truncated_file_is_an_error(tmp_path):
    factorized("bert")[0].save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is damaged or cut off"):
        tf.AutoModel.from_pretrained(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    model, _ = factorized("bert")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors only"):
        tf.AutoModel.from_pretrained(tmp_path)


def test_writing_whole_leaves_the_previous_checkpoint_as_it_was(tmp_path, monkeypatch):
    out = tmp_path / "out"
    model, inputs = factorized("bert")
    with written_whole(out) as folder:
        model.save_pretrained(folder)
    other, _ = factorized("bert", fnl_hf.FNLConfig(head_rank=0.25), seed=1)
    with pytest.raises(KeyboardInterrupt), written_whole(out) as folder:
        other.config.save_pretrained(folder)
        raise KeyboardInterrupt
    assert torch.equal(output(tf.AutoModel.from_pretrained(out), inputs), output(model, inputs))
    with written_whole(out) as folder:
        other.save_pretrained(folder)
    assert torch.equal(output(tf.AutoModel.from_pretrained(out), inputs), output(other, inputs))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_between_the_renames_brings_the_previous_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: 1 / 0 if self.name == "new" else rename(self, to))
    with pytest.raises(ZeroDivisionError), written_whole(out) as folder:
        (folder / "new file").touch()
    assert [path.name for path in out.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_save_in_place_that_was_cut_short_is_an_error(tmp_path):
    factorized("bert")[0].save_pretrained(tmp_path)
    other, _ = factorized("bert", fnl_hf.FNLConfig(head_rank=0.25))
    other.config.save_pretrained(tmp_path)  # transformers writes the config first, then the weights
    with pytest.raises(ValueError, match="are not of one checkpoint"):
        tf.AutoModel.from_pretrained(tmp_path)


# -- everyday calls ----------------------------------------------------------------------------------


@pytest.fixture(params=[1.0, 0.5], ids=["full", "half"])
def rank(request):
    return request.param


@pytest.fixture
def tokenizer(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return tf.BertTokenizer(str(tmp_path / "vocab.txt"))


def both(cls, config, rank):
    """A factorized model, and the dense one of the same function."""
    model = fnl_hf.factorize(head_model(cls, config), fnl_hf.FNLConfig(head_rank=rank))
    return model, fnl_hf.to_dense(copy.deepcopy(model))


@pytest.mark.parametrize("task", ["fill-mask", "text-classification"])
def test_pipeline_from_a_directory(task, rank, tokenizer, tmp_path):
    cls = tf.BertForMaskedLM if task == "fill-mask" else tf.BertForSequenceClassification
    model, dense = both(cls, tf.BertConfig(**BERT), rank)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    found = tf.pipeline(task, model=str(tmp_path / "m"), device="cpu")("the cat sat on a [MASK]")
    expected = tf.pipeline(task, model=dense, tokenizer=tokenizer, device="cpu")("the cat sat on a [MASK]")
    assert [round(x["score"], 4) for x in found] == [round(x["score"], 4) for x in expected]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["gpt2", "marian", "t5"])
def test_generate(family, cache, rank, tmp_path):
    classes = {"gpt2": tf.GPT2LMHeadModel, "marian": tf.MarianMTModel, "t5": tf.T5ForConditionalGeneration}
    config = FAMILIES[family][0]()
    config.decoder_start_token_id = config.pad_token_id = 1
    model, dense = both(classes[family], config, rank)
    model.save_pretrained(tmp_path)
    model = classes[family].from_pretrained(tmp_path)
    arguments = {
        **TEXT, "attention_mask": torch.ones_like(TEXT["input_ids"]), "max_new_tokens": 6, "do_sample": False,
        "cache_implementation": cache, "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    ours, theirs = model.generate(**arguments), dense.generate(**arguments)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_compiles_as_one_graph(family, rank):
    model, inputs = factorized(family, fnl_hf.FNLConfig(head_rank=rank))
    expected = output(model, inputs)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert_close(output(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(rank):
    model, inputs = factorized("bert", fnl_hf.FNLConfig(head_rank=rank))
    gradients = []
    for checkpointing in (False, True):
        (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
        model.train().zero_grad()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.attention_probs_dropout_prob = 0.0
        torch.manual_seed(0)
        model(**inputs).last_hidden_state.square().sum().backward()
        gradients.append([p.grad.clone() for f in fnl_hf.factorizations(model) for p in f.parameters()])
    assert_close(*gradients)


def test_copies_pickles_and_casts(rank):
    model, inputs = factorized("bart", fnl_hf.FNLConfig(head_rank=rank))
    expected = output(model, inputs)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(copied, inputs), expected)
        assert {f.name for f in fnl_hf.factorizations(copied)} == {f.name for f in fnl_hf.factorizations(model)}
        covered = {id(p) for f in fnl_hf.factorizations(copied) for p in f.parameters()}
        assert covered <= {id(p) for p in copied.parameters()}
        assert fnl_hf.summary(copied).rows == fnl_hf.summary(model).rows
    assert relative(output(copied.to(torch.bfloat16), inputs).float(), expected) < 0.1
    assert {p.dtype for f in fnl_hf.factorizations(copied) for p in f.factors()} == {torch.bfloat16}
    assert output(copied.half(), inputs).dtype == torch.float16
    assert output(copied.double(), inputs).dtype == torch.float64


def test_resized_embeddings_change_no_product(rank, tmp_path):
    model = fnl_hf.factorize(head_model(tf.GPT2LMHeadModel, FAMILIES["gpt2"][0]()), fnl_hf.FNLConfig(head_rank=rank))
    expected = model(**TEXT).logits
    model.resize_token_embeddings(57)
    assert_close(model(**TEXT).logits[..., :50], expected)
    model.save_pretrained(tmp_path)
    loaded = tf.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().num_embeddings == 57
    assert torch.equal(loaded(**TEXT).logits, model(**TEXT).logits)


# -- PEFT --------------------------------------------------------------------------------------------


def with_lora(model, targets=("query", "value")):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False))
    return wrapped.eval()


def test_lora_on_full_rank_leaves_merges():
    model, inputs = factorized("bert", fnl_hf.FNLConfig())
    names = [f.name for f in fnl_hf.factorizations(model)]
    wrapped = with_lora(model)
    assert [f.name for f in fnl_hf.factorizations(wrapped)] == [f"base_model.model.{name}" for name in names]
    before = output(wrapped, inputs)
    merged = wrapped.merge_and_unload()
    assert relative(output(merged, inputs), before) < 1e-5
    assert [f.name for f in fnl_hf.factorizations(merged)] == names


def test_lora_on_compact_leaves_merges():
    model, inputs = factorized("bert", fnl_hf.FNLConfig(head_rank=0.5, head_layout="compact"))
    wrapped = with_lora(model)
    before = output(wrapped, inputs)
    with pytest.raises(ValueError, match="as narrow as its compact leaf: merge or unload adapters first"):
        fnl_hf.to_dense(wrapped)
    assert torch.equal(output(wrapped, inputs), before)
    merged = wrapped.merge_and_unload()
    assert relative(output(merged, inputs), before) < 1e-5
    assert relative(output(fnl_hf.to_dense(merged), inputs), before) < 1e-5


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_lora_on_narrow_leaves_trains_and_a_merge_says_what_to_do(family):
    model, inputs = factorized(family)
    wrapped = with_lora(model, ("query", "value") if family == "bert" else ("c_attn", "c_proj"))
    kinds = [f.kind for f in fnl_hf.factorizations(wrapped)]
    assert kinds.count("qk") == kinds.count("ov") == 2
    wrapped(**inputs).last_hidden_state.square().sum().backward()
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and p.grad.abs().sum() > 0 for name, p in trained.items())
    before = output(wrapped, inputs)
    for merge in (wrapped.merge_adapter, wrapped.merge_and_unload, copy.deepcopy(wrapped).merge_adapter):
        with pytest.raises(ValueError, match=r"fnl_hf\.to_dense\(model\) first"):
            merge()
    assert torch.equal(output(wrapped, inputs), before)
    fnl_hf.to_dense(wrapped)
    assert relative(output(wrapped, inputs), before) < 1e-5
    merged = wrapped.merge_and_unload()
    assert relative(output(merged, inputs), before) < 1e-5
    assert not any(isinstance(module, HeadLinear) for module in merged.modules())


# -- properties --------------------------------------------------------------------------------------

CONFIGS = st.builds(
    fnl_hf.FNLConfig,
    attention=st.sampled_from([("qk",), ("ov",), ("qk", "ov")]),
    head_rank=st.one_of(st.integers(1, 8), st.floats(0.05, 1.0)),
    rank_pattern=st.dictionaries(st.sampled_from([r".*\.0\..*", r".*\.1\..*"]), st.integers(1, 8), max_size=2),
    init=st.sampled_from(["spectral", "default"]),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=CONFIGS,
    family=st.sampled_from(["gpt2", "bert", "bart"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_any_config_saves_loads_and_densifies(config, family, dtype, tmp_path_factory):
    model, inputs = factorized(family, config, dtype=dtype)
    expected = output(model, inputs)
    directory = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(directory)
    loaded = tf.AutoModel.from_pretrained(directory, dtype="auto")
    assert repr(loaded) == repr(model) and loaded.config.quantization_config == model.config.quantization_config
    # Weights that lie elsewhere in memory may be multiplied in another order.
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert relative(output(loaded, inputs), expected) < torch.finfo(dtype).eps * 10
    dense = fnl_hf.to_dense(loaded)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float64: 1e-12}[dtype]
    assert relative(output(dense, inputs), expected) < tolerance
