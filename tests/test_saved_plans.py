"""A plan belongs to what is saved: parts, wholes, wrappers, shared configs, dense models, and configs of any kind."""

import copy
import gc
import inspect
import json
import pickle
import shutil
import subprocess
import sys
import types
import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import PreTrainedModel

import fnl_hf
from fnl_hf.attachment import attached, plain
from fnl_hf.plan import Plan
from fnl_hf.saving import configs
from tests.families import BART, BERT, FAMILIES, TEXT, VISION, build, output

HALF = fnl_hf.FNLConfig(head_rank=0.5)
COMPACT = fnl_hf.FNLConfig(head_rank=0.5, head_layout="compact")
RANKS = pytest.mark.parametrize("config", [fnl_hf.FNLConfig(), HALF, COMPACT], ids=["full", "half", "compact"])


def drawn(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def vision_encoder_decoder():
    decoder = tf.BertLMHeadModel(tf.BertConfig(**BERT, is_decoder=True, add_cross_attention=True))
    return drawn(tf.VisionEncoderDecoderModel(encoder=tf.ViTModel(tf.ViTConfig(**VISION)), decoder=decoder))


class SentenceEncoder(nn.Module):
    """A model inside a plain module, saved by itself: what sentence-transformers does."""

    def __init__(self, model):
        super().__init__()
        self.auto_model, self.pooling = model, nn.Identity()

    def forward(self, **inputs):
        return self.pooling(self.auto_model(**inputs).last_hidden_state)


PARTS = {
    "bart encoder": (lambda: build("bart")[0], "encoder"),
    "bart decoder": (lambda: build("bart")[0], "decoder"),
    "t5 encoder": (lambda: build("t5")[0], "encoder"),
    "clip vision model": (lambda: build("clip")[0], "vision_model"),
    "wrapper": (lambda: SentenceEncoder(build("bert")[0]), "auto_model"),
    "vision encoder": (vision_encoder_decoder, "encoder"),
    "language decoder": (vision_encoder_decoder, "decoder"),
}


def assert_same(loaded, model):
    """The same structure under the same names, bit for bit."""
    assert repr(loaded) == repr(model)
    theirs = dict(model.named_parameters())
    assert all(torch.equal(p, theirs.pop(name)) for name, p in loaded.named_parameters()) and not theirs
    names = [f.name for f in fnl_hf.factorizations(model)]
    assert [f.name for f in fnl_hf.factorizations(loaded)] == names


def assert_saves_and_loads(model, folder):
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder)
    assert_same(loaded, model)
    loaded.save_pretrained(folder / "again")
    assert_same(type(model).from_pretrained(folder / "again"), model)
    return loaded


def stored_config(folder):
    return json.loads((folder / "config.json").read_text())


# -- parts and wholes --------------------------------------------------------------------------------


@RANKS
@pytest.mark.parametrize("how", ["alone", "taken out"])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_saves_and_loads(part, how, config, tmp_path):
    make, name = PARTS[part]
    whole = make()
    fnl_hf.factorize(whole.get_submodule(name) if how == "alone" else whole, config)
    assert_saves_and_loads(whole.get_submodule(name), tmp_path / "part")
    assert fnl_hf.factorizations(whole.get_submodule(name))
    if isinstance(whole, PreTrainedModel):
        assert_saves_and_loads(whole, tmp_path / "whole")


@RANKS
def test_an_encoder_that_cannot_save_itself_is_saved_with_its_model(config, tmp_path):
    model, inputs = build("bert")
    fnl_hf.factorize(model.encoder, config)
    loaded = assert_saves_and_loads(model, tmp_path)
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    assert fnl_hf.factorizations(loaded)[0].name == "encoder.layer.0.attention.self.qk"
    assert fnl_hf.summary(model).rows == fnl_hf.summary(loaded).rows
    assert "skipped" not in str(fnl_hf.summary(model))


def test_parts_that_were_factorized_one_after_the_other(tmp_path):
    model, _ = build("bart")
    fnl_hf.factorize(model.encoder, HALF)
    fnl_hf.factorize(model.decoder, fnl_hf.FNLConfig(head_rank=2))
    assert_saves_and_loads(model, tmp_path)
    assert {f.name.split(".")[0]: f.size()[1] for f in fnl_hf.factorizations(model)} == {"encoder": 4, "decoder": 2}


def test_a_model_that_is_put_together_from_factorized_ones(tmp_path):
    whole = vision_encoder_decoder()
    fnl_hf.factorize(whole.encoder, HALF).save_pretrained(tmp_path / "encoder")
    whole.decoder.save_pretrained(tmp_path / "decoder")
    parts = tmp_path / "encoder", tmp_path / "decoder"
    model = tf.VisionEncoderDecoderModel.from_encoder_decoder_pretrained(*map(str, parts))
    assert_same(model.encoder, whole.encoder)
    assert_saves_and_loads(model, tmp_path / "whole")
    assert_saves_and_loads(model.encoder, tmp_path / "encoder again")


PARTS_OF_CHECKPOINTS = {
    tf.CLIPTextModel: (lambda: build("clip")[0], 4),
    tf.CLIPVisionModel: (lambda: build("clip")[0], 4),
    tf.CLIPForImageClassification: (lambda: build("clip")[0], 4),
    tf.BartForCausalLM: (lambda: drawn(tf.BartForConditionalGeneration(tf.BartConfig(**BART))), 8),
    tf.T5EncoderModel: (lambda: drawn(tf.T5ForConditionalGeneration(FAMILIES["t5"][0]())), 4),
    tf.WhisperForCausalLM: (lambda: drawn(tf.WhisperForConditionalGeneration(FAMILIES["whisper"][0]())), 8),
}


@RANKS
@pytest.mark.parametrize("part", PARTS_OF_CHECKPOINTS, ids=lambda part: part.__name__)
def test_a_part_of_a_checkpoint_as_its_own_class(part, config, tmp_path):
    make, count = PARTS_OF_CHECKPOINTS[part]
    whole = fnl_hf.factorize(make(), config)
    whole.save_pretrained(tmp_path / "whole")
    loaded = part.from_pretrained(tmp_path / "whole")
    products = fnl_hf.factorizations(loaded)
    assert len(products) == count < len(fnl_hf.factorizations(whole))
    known = [f.factors() for f in fnl_hf.factorizations(whole)]
    for product in products:
        assert any(all(map(torch.equal, product.factors(), each)) for each in known if len(each) == 2)
    assert_saves_and_loads(loaded, tmp_path / "part")


def test_a_part_of_which_nothing_is_factorized_is_dense(tmp_path, capsys):
    whole = drawn(tf.BartForConditionalGeneration(tf.BartConfig(**BART)))
    fnl_hf.factorize(whole.model.encoder, HALF)
    whole.save_pretrained(tmp_path / "bart")
    decoder = tf.BartForCausalLM.from_pretrained(tmp_path / "bart")
    assert "is a part of the saved model, without model.encoder" in capsys.readouterr().err
    assert not fnl_hf.factorizations(decoder) and attached(decoder) is None
    assert torch.equal(decoder.model.decoder.layers[1].fc1.weight, whole.model.decoder.layers[1].fc1.weight)
    decoder.save_pretrained(tmp_path / "decoder")
    assert "quantization_config" not in stored_config(tmp_path / "decoder")
    clip, _ = build("clip")
    fnl_hf.factorize(clip.vision_model, HALF)
    clip.save_pretrained(tmp_path / "clip")
    text = tf.CLIPTextModel.from_pretrained(tmp_path / "clip")
    assert not fnl_hf.factorizations(text) and not hasattr(text.config, "quantization_config")


def test_plans_of_parts_stand_in_their_configs_for_the_time_of_the_save(tmp_path):
    clip, _ = build("clip")
    fnl_hf.factorize(clip, HALF)
    clip.save_pretrained(tmp_path)
    config = stored_config(tmp_path)
    names = [target["name"] for target in config["quantization_config"]["plan"]["targets"]]
    for part in ("text", "vision"):
        inside = [target["name"] for target in config[f"{part}_config"]["quantization_config"]["plan"]["targets"]]
        assert inside == [name for name in names if name.startswith(f"{part}_model.")] and len(inside) == 4
    for model in (clip, tf.CLIPModel.from_pretrained(tmp_path)):
        assert [c for c in configs(model) if hasattr(c, "quantization_config")] == [model.config]


def test_factors_without_their_declaration_are_refused(tmp_path):
    class Odd(tf.BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.dense = nn.Linear(1, 1)
            self.post_init()

    bert, _ = build("bert")
    fnl_hf.factorize(bert, HALF)
    odd = Odd(tf.BertConfig(**BERT))
    odd.dense = bert.encoder.layer[0].attention.self.query
    with pytest.raises(
        ValueError, match="Odd holds factors in dense, but what they are is declared in a module around"
    ):
        odd.save_pretrained(tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


def test_a_model_that_is_quantized_as_well_is_refused(tmp_path):
    model, _ = build("bert")
    fnl_hf.factorize(model.encoder, HALF)
    model.config.quantization_config = tf.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="factorized and quantized cannot be saved"):
        model.save_pretrained(tmp_path)


# -- configs that models share -----------------------------------------------------------------------


def test_modules_of_one_model_keep_sharing_its_config():
    bart, config = build("bart")[0], None
    config = bart.config
    fnl_hf.factorize(bart, HALF)
    assert bart.config is not config and not hasattr(config, "quantization_config")
    assert bart.encoder.config is bart.config is bart.decoder.layers[1].self_attn.config
    clip, _ = build("clip")
    fnl_hf.factorize(clip, HALF)
    assert clip.vision_model.config is clip.config.vision_config and clip.text_model.config is clip.config.text_config
    assert not any(c is config for c in configs(bart))
    fnl_hf.to_dense(bart)
    assert bart.encoder.config is bart.config and bart.config.to_dict() == config.to_dict()


@pytest.mark.parametrize("when", ["before", "after"])
def test_teacher_and_student_of_one_config(when, tmp_path):
    teacher, inputs = build("bert")
    student = tf.BertModel(teacher.config) if when == "before" else None
    fnl_hf.factorize(teacher, HALF)
    student = student or tf.BertModel(teacher.config)
    student.eval().save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in stored_config(tmp_path / "dense")
    assert_same(tf.AutoModel.from_pretrained(tmp_path / "dense"), student)
    assert attached(student) is None and attached(teacher)
    fnl_hf.factorize(student, fnl_hf.FNLConfig(head_rank=2))
    assert_saves_and_loads(student, tmp_path / "student")
    loaded = assert_saves_and_loads(teacher, tmp_path / "teacher")
    assert loaded.config.quantization_config == teacher.config.quantization_config == attached(teacher)
    fnl_hf.to_dense(student)
    student.save_pretrained(tmp_path / "dense again")
    assert "quantization_config" not in stored_config(tmp_path / "dense again")
    assert teacher.config.quantization_config.head_rank == 0.5
    assert_saves_and_loads(teacher, tmp_path / "teacher again")
    assert torch.equal(output(loaded, inputs), output(teacher, inputs))


def test_a_part_that_becomes_dense_leaves_the_rest_as_it_is(tmp_path):
    bart, _ = build("bart")
    fnl_hf.factorize(bart, HALF)
    fnl_hf.to_dense(bart.encoder)
    assert isinstance(bart.config.quantization_config, fnl_hf.FNLConfig)
    assert_saves_and_loads(bart, tmp_path / "bart")
    assert {f.name.split(".")[0] for f in fnl_hf.factorizations(bart)} == {"decoder"}
    bart.encoder.save_pretrained(tmp_path / "encoder")
    assert "quantization_config" not in stored_config(tmp_path / "encoder")


@pytest.mark.parametrize("config", [fnl_hf.FNLConfig(), HALF], ids=["full", "half"])
@pytest.mark.parametrize("where", ["model", "directory"])
def test_from_config_of_a_stored_config_saves_and_loads(where, config, tmp_path):
    model, _ = build("clip")
    fnl_hf.factorize(model, config)
    model.save_pretrained(tmp_path / "factorized")
    stored = model.config if where == "model" else tf.AutoConfig.from_pretrained(tmp_path / "factorized")
    dense = tf.AutoModel.from_config(stored)
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()
    loaded = tf.AutoModel.from_pretrained(tmp_path / "dense")
    assert_same(loaded, dense)
    assert not fnl_hf.factorizations(loaded)
    fnl_hf.factorize(dense, COMPACT)
    assert [c for c in configs(dense) if hasattr(c, "quantization_config")] == [dense.config]
    assert_saves_and_loads(dense, tmp_path / "factorized again")


@pytest.mark.parametrize("family", ["bert", "gpt2", "clip"])
def test_dense_weights_under_a_plan_are_one_clear_error(family, tmp_path):
    model, _ = build(family)
    model.save_pretrained(tmp_path)
    fnl_hf.factorize(model, HALF).save_pretrained(tmp_path / "half")
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "half")
    with pytest.raises(ValueError, match="the weights are dense; remove quantization_config from .*half/config.json"):
        tf.AutoModel.from_pretrained(tmp_path / "half")


# -- configs of any kind -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Frozen:
    hidden_size: int = 32


CONFIGS = {
    "dict": {"hidden_size": 32}, "None": None, "frozen dataclass": Frozen(), "number": 3,
    "namespace": types.SimpleNamespace(hidden_size=32),
}  # fmt: skip


@pytest.mark.parametrize("config", [*CONFIGS, "no config"])
def test_a_model_with_any_config_is_factorized(config):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = build("bert")[0].encoder
            del self.encoder.config
            if config != "no config":
                self.config = CONFIGS[config]

        def forward(self, x):
            return self.encoder(x).last_hidden_state

    model = Plain()
    x = torch.linspace(-1, 1, 2 * 5 * 32).reshape(2, 5, 32)
    expected = model(x)
    fnl_hf.factorize(model, fnl_hf.FNLConfig())
    assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert len(Plan.of(attached(model)).targets) == 4 and fnl_hf.summary(model).rows
    assert config == "no config" or model.config is CONFIGS[config]
    with pytest.raises(ValueError, match="factorized already"):
        fnl_hf.factorize(model)
    fnl_hf.to_dense(model)
    assert attached(model) is None
    assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


# -- everything around a save ------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_a_state_dict_that_is_passed_is_what_is_written(shard, tmp_path):
    model, _ = build("bert")
    fnl_hf.factorize(model, HALF)
    passed = {name: value + 1 for name, value in model.state_dict().items()}
    expected = dict(passed)
    model.save_pretrained(tmp_path, state_dict=passed, max_shard_size=shard)
    written = {k: v for file in tmp_path.glob("*.safetensors") for k, v in load_file(file).items()}
    assert written.keys() == expected.keys() and all(torch.equal(written[k], expected[k]) for k in written)
    assert len(fnl_hf.factorizations(tf.BertModel.from_pretrained(tmp_path))) == 4


def test_a_save_that_fails_leaves_the_configs_as_they_were(tmp_path, monkeypatch):
    clip, _ = build("clip")
    fnl_hf.factorize(clip.vision_model, HALF)
    before = [copy.deepcopy(vars(config)) for config in configs(clip)]
    monkeypatch.setattr(type(clip), "state_dict", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        clip.save_pretrained(tmp_path)
    ignored = {"architectures", "dtype"}  # transformers writes them
    for config, attributes in zip(configs(clip), before, strict=True):
        assert {k: v for k, v in vars(config).items() if k not in ignored} == {
            k: v for k, v in attributes.items() if k not in ignored
        }


def test_copies_and_pickles_are_saved_like_their_originals(tmp_path):
    bart, _ = build("bart")
    fnl_hf.factorize(bart, COMPACT)
    makes = (copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), lambda m: m.half().float())
    for i, make in enumerate(makes):
        copied = make(bart)
        assert attached(copied) == attached(bart)
        assert_saves_and_loads(copied, tmp_path / str(i))
        assert_saves_and_loads(copied.encoder, tmp_path / f"{i}-encoder")


def test_an_unpickled_model_is_saved_by_a_process_that_factorized_nothing(tmp_path):
    model, _ = build("bert")
    torch.save(fnl_hf.factorize(model.encoder, HALF), tmp_path / "encoder.pt")
    model.save_pretrained(tmp_path / "expected")
    model.config.save_pretrained(tmp_path / "dense")
    program = """
import sys, torch, transformers as tf
model = tf.BertModel(tf.AutoConfig.from_pretrained(sys.argv[1] + "/dense"))
model.encoder = torch.load(sys.argv[1] + "/encoder.pt", weights_only=False)
model.save_pretrained(sys.argv[1] + "/saved")
"""
    root = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=root, capture_output=True)
    saved, expected = (stored_config(tmp_path / name)["quantization_config"] for name in ("saved", "expected"))
    assert saved == expected
    assert len(fnl_hf.factorizations(tf.BertModel.from_pretrained(tmp_path / "saved"))) == 4


def test_a_model_pickled_before_declarations_knew_their_targets_is_saved_by_its_config(tmp_path):
    model, inputs = build("bert")
    fnl_hf.factorize(model, HALF)
    for module in model.modules():
        for name in ("planned", "settings"):
            vars(module).pop(name, None)
    assert attached(model) is model.config.quantization_config
    model.save_pretrained(tmp_path)
    loaded = tf.BertModel.from_pretrained(tmp_path)
    assert torch.equal(output(loaded, inputs), output(model, inputs)) and fnl_hf.factorizations(loaded)


def test_resized_after_loading(tmp_path):
    model = drawn(tf.GPT2LMHeadModel(FAMILIES["gpt2"][0]()))
    fnl_hf.factorize(model, HALF).save_pretrained(tmp_path / "a")
    loaded = tf.GPT2LMHeadModel.from_pretrained(tmp_path / "a")
    loaded.resize_token_embeddings(57)
    again = assert_saves_and_loads(loaded, tmp_path / "b")
    assert torch.equal(again(**TEXT).logits, loaded(**TEXT).logits)


@pytest.mark.parametrize("trainer", [tf.Trainer, fnl_hf.FNLTrainer])
def test_a_trainers_checkpoint_of_a_model_whose_encoder_was_factorized(trainer, tmp_path):
    model = drawn(tf.BertForSequenceClassification(tf.BertConfig(**BERT)))
    fnl_hf.factorize(model.bert.encoder, HALF)
    data = [{"input_ids": TEXT["input_ids"][i % 2], "labels": i % 2} for i in range(4)]
    make = tf.TrainingArguments if trainer is tf.Trainer else fnl_hf.FNLTrainingArguments
    arguments = make(tmp_path, max_steps=1, report_to=[], use_cpu=True, save_steps=1, disable_tqdm=True)
    trainer(model, arguments, train_dataset=data).train()
    assert_same(tf.BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-1"), model.eval())


def test_adapters_are_saved_and_loaded_beside_a_factorized_base(tmp_path):
    peft = pytest.importorskip("peft")
    model, inputs = build("bert")
    fnl_hf.factorize(model, HALF).save_pretrained(tmp_path / "base")
    base = tf.BertModel.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    wrapped = peft.get_peft_model(base, config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json"}
    base = tf.BertModel.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(output(again, inputs), output(wrapped, inputs))
    unloaded = again.unload()
    assert_saves_and_loads(unloaded, tmp_path / "unloaded")
    direct = tf.BertModel.from_pretrained(tmp_path / "base")
    try:
        direct.add_adapter(config)
    except ValueError as error:  # transformers may ask for a PEFT that is not out yet
        assert "version of PEFT" in str(error)
        return
    direct.save_pretrained(tmp_path / "direct")
    assert (tmp_path / "direct" / "adapter_config.json").exists()


def test_layers_compiled_or_checkpointed_keep_their_names_in_the_plan(tmp_path):
    model, _ = build("bert")
    fnl_hf.factorize(model, HALF)
    plan = attached(model)
    model.encoder.layer[0] = torch.compile(model.encoder.layer[0], backend="eager")
    assert attached(model) == plan == attached(torch.compile(model, backend="eager"))
    assert plain("a._fsdp_wrapped_module.b._checkpoint_wrapped_module.c._orig_mod") == "a.b.c"


def test_a_saved_model_is_freed_with_its_last_reference(tmp_path):
    """The plan is written without a reference from a model to itself, which would keep its memory."""

    def kept(factorize):
        model = tf.BertModel(tf.BertConfig(**BERT))
        if factorize:
            fnl_hf.factorize(model, HALF).save_pretrained(tmp_path)
        reference = weakref.ref(model)
        del model
        return reference() is not None

    gc.collect()
    gc.disable()
    try:
        assert kept(True) == kept(False)
    finally:
        gc.enable()


def test_what_saving_leans_on_in_transformers():
    """One method, of which all models save themselves, and which writes the config that it finds on the model."""
    fnl_hf.factorize(build("bert")[0])  # a declaration
    plain_method = inspect.unwrap(PreTrainedModel.save_pretrained)
    assert plain_method is not PreTrainedModel.save_pretrained
    assert inspect.signature(PreTrainedModel.save_pretrained) == inspect.signature(plain_method)
    source = inspect.getsource(plain_method)
    assert "model_to_save.config.save_pretrained(" in source and "model_to_save = unwrap_model(self)" in source
    fnl_hf.factorize(build("bert")[0])
    assert inspect.unwrap(PreTrainedModel.save_pretrained, stop=lambda f: f.__wrapped__ is plain_method) is (
        PreTrainedModel.save_pretrained
    )  # wrapped once
