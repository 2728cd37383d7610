"""Whole models with layers of factors: ties, saving and loading, the proof, adapters, compilation, half precision."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch.testing import assert_close

import fnl_hf
from fnl_hf.layers import FactorizedEmbedding, FactorizedLayer, FactorizedLinear
from tests.families import BART, BERT, PIXELS, SEQ2SEQ, TEXT, VISION

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 2}
T5 = {
    "d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 4, "vocab_size": 50,
    "decoder_start_token_id": 0, "dropout_rate": 0.0,
}  # fmt: skip
MODELS = {
    "bert": (tf.BertForMaskedLM, lambda: tf.BertConfig(**BERT), TEXT),
    "marian": (tf.MarianMTModel, lambda: tf.MarianConfig(**BART), SEQ2SEQ),
    "gpt2": (tf.GPT2LMHeadModel, lambda: tf.GPT2Config(**GPT2), TEXT),
    "t5": (tf.T5ForConditionalGeneration, lambda: tf.T5Config(**T5), SEQ2SEQ),
    "bart": (tf.BartForConditionalGeneration, lambda: tf.BartConfig(**BART, scale_embedding=True), SEQ2SEQ),
    "albert": (tf.AlbertForMaskedLM, lambda: tf.AlbertConfig(**BERT, embedding_size=24), TEXT),
    "vit": (tf.ViTForImageClassification, lambda: tf.ViTConfig(**VISION), PIXELS),
}
TIED = ("bert", "marian", "gpt2", "t5", "bart", "albert")


def build(name, dtype=torch.float32):
    cls, config, inputs = MODELS[name]
    torch.manual_seed(0)
    model = cls(config()).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if n == "final_logits_bias")):
            if not tensor.is_floating_point() or (tensor.dim() > 1 and not tensor.any()):
                tensor.normal_() if tensor.is_floating_point() else None
            elif tensor.requires_grad:
                tensor.copy_(torch.randn_like(tensor) * 0.3)
    return model.to(dtype), {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def layers(**fields):
    return fnl_hf.FNLConfig(**{"target_modules": "all", "rank": 0.5, **fields})


def factorized(name, dtype=torch.float32, **fields):
    model, inputs = build(name, dtype)
    return fnl_hf.factorize(model, layers(**fields)), inputs


@torch.no_grad()
def logits(model, inputs):
    return model.eval()(**inputs).logits


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# -- the function --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["matrix", "deep"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_the_dense_one_with_truncated_weights(name, form):
    model, inputs = build(name, torch.float64)
    before = logits(model, inputs)
    reference, full = copy.deepcopy(model), copy.deepcopy(model)
    fnl_hf.factorize(model, layers(attention=(), form=form))
    with torch.no_grad():
        for product in fnl_hf.factorizations(model):
            weight = reference.get_submodule(product.name).weight
            rank, shape = product.size()[1], weight.shape
            u, s, vt = torch.linalg.svd(weight, full_matrices=False)  # no convolution is among them but ViT's first
            assert weight.dim() == 2 and rank == max(1, round(0.5 * min(shape)))
            weight.copy_(u[:, :rank] * s[:rank] @ vt[:rank])
    assert relative(logits(model, inputs), logits(reference, inputs)) < 1e-10
    assert relative(logits(model, inputs), before) > 1e-3
    model = fnl_hf.to_dense(model)
    assert repr(model) == repr(reference) and relative(logits(model, inputs), logits(reference, inputs)) < 1e-10
    for rank in (1.0, 1.5):  # nothing is lost
        assert (
            relative(logits(fnl_hf.factorize(copy.deepcopy(full), layers(rank=rank, form=form)), inputs), before) < 1e-9
        )


@pytest.mark.parametrize("form", ["matrix", "deep"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_model_are_those_of_the_dense_one(name, form):
    """Through one set of factors from all places where a tied weight is used."""
    model, inputs = factorized(name, torch.float64, attention=(), form=form)
    dense = fnl_hf.to_dense(copy.deepcopy(model))
    for each in (model, dense):
        each(**inputs).logits.square().sum().backward()
    for product in fnl_hf.factorizations(model):
        weight = dense.get_submodule(product.name).weight
        layer = model.get_submodule(product.name)
        gradient = weight.grad
        if isinstance(layer, FactorizedLinear) and layer.transposed:
            gradient = gradient.T
        factors = [f[0].detach().requires_grad_() for f in product.factors()]
        (torch.linalg.multi_dot(factors) * gradient).sum().backward()
        actual = [view.read(view.parameter.grad)[0] for view in product.views]
        for one, other in zip(actual, factors, strict=True):
            assert relative(one, other.grad) < 1e-9, product.name
    named = dict(dense.named_parameters())
    covered = {id(p) for f in fnl_hf.factorizations(model) for p in f.parameters()}
    for path, parameter in model.named_parameters():
        if id(parameter) not in covered and parameter.grad is not None and named[path].grad.norm() > 1e-8:
            assert relative(parameter.grad, named[path].grad) < 1e-9, path


# -- ties ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["matrix", "deep"])
@pytest.mark.parametrize("name", TIED)
def test_a_tied_embedding_and_head_are_one_factorization(name, form):
    model, inputs = factorized(name, form=form)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, FactorizedEmbedding) and type(head) is FactorizedLinear

    def tied():
        return all(table.stored(factor) is head.stored(factor) for factor in ("weight", "middle", "right"))

    assert tied()
    kinds = [f.kind for f in fnl_hf.factorizations(model)]
    assert kinds.count("embedding") == 1
    before = logits(model, inputs)
    model.tie_weights()
    assert tied() and torch.equal(logits(model, inputs), before)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (copied, pickled):
        assert other.get_input_embeddings().stored("right") is other.get_output_embeddings().stored("right")
        assert torch.equal(logits(other, inputs), before)
    # Decayed once
    (product,) = [f for f in fnl_hf.factorizations(model) if f.kind == "embedding"]
    expected = torch.autograd.grad(product.matrix().square().sum() / 2, product.parameters())
    fnl_hf.frobenius_decay_(model, 1.0, kinds=["embedding"])
    for parameter, gradient in zip(product.parameters(), expected, strict=True):
        assert relative(parameter.grad, gradient) < 1e-5
    # Dense again: tied again
    fnl_hf.to_dense(model)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not any(isinstance(module, FactorizedLayer) for module in model.modules())
    assert relative(logits(model, inputs), before) < 1e-5
    model.tie_weights()
    model.get_input_embeddings().weight.data.mul_(2)
    assert torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


def test_shared_layers_are_one_factorization_per_weight():
    model, inputs = factorized("albert", attention=())
    names = [f.name for f in fnl_hf.factorizations(model)]
    assert len(names) == len(set(names)) and sum("albert_layers" in name for name in names) == 6
    assert len({p for f in fnl_hf.factorizations(model) for p in f.parameters()}) == 2 * len(names)


def test_biases_of_tied_heads_are_kept():
    model, _ = build("bert")
    bias = model.cls.predictions.bias
    fnl_hf.factorize(model, layers())
    assert model.cls.predictions.decoder.bias is bias and model.cls.predictions.bias is bias
    fnl_hf.to_dense(model)
    assert model.cls.predictions.decoder.bias is bias
    model, inputs = build("marian")
    start = logits(model, inputs)
    assert model.final_logits_bias.any()
    fnl_hf.factorize(model, layers(rank=1.0))
    assert relative(logits(model, inputs), start) < 1e-5


@pytest.mark.parametrize("name", ["marian", "gpt2", "t5"])
def test_generation(name):
    model, inputs = factorized(name)
    given = {"input_ids": inputs["input_ids"], "max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    found = {cache: model.generate(**given, use_cache=cache) for cache in (True, False)}
    assert torch.equal(found[True], found[False])
    assert torch.equal(fnl_hf.to_dense(model).generate(**given), found[True])


def test_feed_forwards_that_look_at_the_weight_compose_nothing(monkeypatch):
    """T5 asks ``wo.weight.dtype`` in every forward."""
    model, inputs = factorized("t5", torch.bfloat16, rank=0.25)
    calls, composed = [], FactorizedLayer.composed
    monkeypatch.setattr(FactorizedLayer, "composed", lambda layer: calls.append(layer) or composed(layer))
    assert logits(model, inputs).dtype == torch.bfloat16 and not calls


# -- saving and loading ----------------------------------------------------------------------------------

RELOAD = """
import json, sys, torch, transformers as tf
root, mode = sys.argv[1:3]
if mode == "with":
    import fnl_hf
tf.logging.set_verbosity_error()
errors = {}
for case in json.load(open(f"{root}/cases.json")):
    cls = getattr(tf, json.load(open(f"{root}/{case}/config.json"))["architectures"][0])
    try:
        model = cls.from_pretrained(f"{root}/{case}").eval()
    except Exception as error:
        errors[case] = f"{type(error).__name__}: {error}"
        continue
    with torch.no_grad():
        torch.save(model(**torch.load(f"{root}/{case}.in.pt")).logits, f"{root}/{case}.{mode}.pt")
json.dump(errors, open(f"{root}/{mode}.json", "w"))
assert ("fnl_hf" in sys.modules) == (mode == "with")
"""
# case -> (model, fields, largest shard)
SAVED = {
    **{f"{name}-half": (name, {}, "1GB") for name in MODELS},
    **{f"{name}-full-alone": (name, {"rank": 1.0, "attention": ()}, "20KB") for name in ("bert", "gpt2", "t5", "vit")},
    "bert-deep": ("bert", {"form": "deep"}, "20KB"),
    "marian-wide": ("marian", {"rank": 1.5}, "20KB"),
    # one square layer at full rank, where U has the shape of the weight
    "bert-square": ("bert", {"target_modules": ["transform.dense"], "rank": 1.0, "attention": ()}, "1GB"),
    "gpt2-square": ("gpt2", {"target_modules": ["h.0.attn.c_proj"], "rank": 1.0, "attention": ()}, "1GB"),
    "vit-first": ("vit", {"target_modules": ["projection", "classifier"], "attention": ()}, "1GB"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every case saved, and read by a process that imports fnl_hf and by one that does not."""
    root = tmp_path_factory.mktemp("saved")
    for case, (name, fields, shard) in SAVED.items():
        model, inputs = factorized(name, **fields)
        model.save_pretrained(root / case, max_shard_size=shard)
        torch.save(inputs, root / f"{case}.in.pt")
        torch.save(logits(model, inputs), root / f"{case}.pt")
    (root / "cases.json").write_text(json.dumps(list(SAVED)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for mode in ("with", "without"):
        command = [sys.executable, "-c", RELOAD, str(root), mode]
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    return root


@pytest.mark.slow
@pytest.mark.parametrize("case", SAVED)
def test_a_new_process_restores_every_bit(saved, case):
    assert json.loads((saved / "with.json").read_text()).get(case) is None
    assert torch.equal(torch.load(saved / f"{case}.with.pt"), torch.load(saved / f"{case}.pt"))
    sharded = (saved / case / "model.safetensors.index.json").exists()
    assert sharded == (SAVED[case][2] == "20KB")


@pytest.mark.slow
@pytest.mark.parametrize("case", SAVED)
def test_plain_transformers_refuses_it(saved, case):
    assert "ignore_mismatched_sizes" in json.loads((saved / "without.json").read_text())[case]


@pytest.mark.parametrize("form", ["matrix", "deep"])
@pytest.mark.parametrize("name", MODELS)
def test_saving_and_loading_in_this_process(name, form, tmp_path):
    model, inputs = factorized(name, form=form)
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    loaded = type(model).from_pretrained(tmp_path / "a")
    assert repr(loaded) == repr(model) and torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert loaded.config.quantization_config == model.config.quantization_config
    assert {f.name: f.size() for f in fnl_hf.factorizations(loaded)} == {
        f.name: f.size() for f in fnl_hf.factorizations(model)
    }
    if name in TIED:
        table, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
        assert all(table.stored(factor) is head.stored(factor) for factor in ("weight", "middle", "right"))
    loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "b"), inputs), logits(model, inputs))
    fnl_hf.to_dense(loaded).save_pretrained(tmp_path / "dense")
    dense = type(model).from_pretrained(tmp_path / "dense")
    assert relative(logits(dense, inputs), logits(model, inputs)) < 1e-5
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


@pytest.mark.parametrize("name", ["bert", "marian", "gpt2"])
def test_factorizes_a_dense_checkpoint_while_loading(name, tmp_path):
    model, inputs = build(name)
    model.save_pretrained(tmp_path)
    fnl_hf.factorize(model, layers())
    loaded = type(model).from_pretrained(tmp_path, quantization_config=layers())
    assert repr(loaded) == repr(model) and torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_a_lost_factor_is_an_error_that_names_it(tmp_path):
    from safetensors.torch import save_file

    model, _ = factorized("bert")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = "bert.encoder.layer.1.output.dense.right"
    save_file(
        {k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match=f"the checkpoint lacks {lost}"):
        tf.BertForMaskedLM.from_pretrained(tmp_path)


def test_a_base_model_of_a_checkpoint_with_a_head_and_the_reverse(tmp_path):
    model, _ = factorized("bert")
    model.save_pretrained(tmp_path / "head")
    base = tf.BertModel.from_pretrained(tmp_path / "head").eval()
    with torch.no_grad():
        assert torch.equal(base(**TEXT).last_hidden_state, model.bert(**TEXT).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    for source in ("head", "base"):
        again = tf.BertForQuestionAnswering.from_pretrained(tmp_path / source).eval()
        with torch.no_grad():
            assert torch.equal(again.bert(**TEXT).last_hidden_state, model.bert(**TEXT).last_hidden_state)


@pytest.mark.parametrize("form", ["matrix", "deep"])
@pytest.mark.parametrize(("name", "part"), [("bert", tf.BertModel), ("gpt2", tf.GPT2Model), ("t5", tf.T5Model)])
def test_a_head_that_its_class_ties_to_a_base_models_table_gets_its_factors(name, part, form, tmp_path):
    model, inputs = factorized(name, form=form)
    model.save_pretrained(tmp_path / "head")
    base = part.from_pretrained(tmp_path / "head")
    base.save_pretrained(tmp_path / "base")
    again = type(model).from_pretrained(tmp_path / "base")
    table, head = again.get_input_embeddings(), again.get_output_embeddings()
    assert all(table.stored(factor) is head.stored(factor) for factor in ("weight", "middle", "right"))
    if name != "bert":  # whose head has layers of its own
        assert torch.equal(logits(again, inputs), logits(model, inputs))
    again.save_pretrained(tmp_path / "again")
    loaded = type(model).from_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded, inputs), logits(again, inputs))
    assert relative(logits(fnl_hf.to_dense(loaded), inputs), logits(again, inputs)) < 1e-5


# -- the proof -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["matrix", "deep"])
@pytest.mark.parametrize("name", MODELS)
def test_verify_proves_every_layer(name, form):
    model, inputs = factorized(name, form=form)
    proof = fnl_hf.verify(model, **inputs)
    assert proof and {v.name for v in proof.verdicts} >= {f.name for f in fnl_hf.factorizations(model)}


def test_verify_names_a_layer_that_does_not_use_its_factors(monkeypatch):
    model, inputs = factorized("bert")
    broken = model.bert.encoder.layer[1].output.dense
    other = torch.randn_like(broken.composed())
    monkeypatch.setattr(broken, "forward", lambda x: torch.nn.functional.linear(x, other, broken.bias))
    proof = fnl_hf.verify(model, **inputs)
    assert not proof and [v.name for v in proof.verdicts if not v.exact] == ["bert.encoder.layer.1.output.dense"]


def test_verify_names_a_layer_that_reads_one_factor_elsewhere(monkeypatch):
    model, inputs = factorized("gpt2")
    broken = model.transformer.h[0].mlp.c_fc
    forward = broken.forward
    monkeypatch.setattr(broken, "forward", lambda x: forward(x) + broken.left[:, 0])
    proof = fnl_hf.verify(model, **inputs)
    assert not proof and [v.name for v in proof.verdicts if not v.exact] == ["transformer.h.0.mlp.c_fc"]


# -- compiled, checkpointed, in half precision, adapted ------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0.25, 1.0])
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_compiles_as_one_graph(name, rank):
    torch._dynamo.reset()
    model, inputs = factorized(name, rank=rank, attention=())
    before = logits(model, inputs)
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert relative(compiled(**inputs).logits, before) < 1e-6
    for each in (reference, compiled):
        each.train()
        for module in each.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        each(**inputs).logits.square().sum().backward()
    for (path, p), q in zip(reference.named_parameters(), model.parameters(), strict=True):
        if p.grad is not None and p.grad.norm() > 1e-3:
            assert relative(q.grad, p.grad) < 1e-3, path


@pytest.mark.slow
def test_compiles_with_aot_autograd():
    torch._dynamo.reset()
    model, inputs = factorized("bert", torch.float64, rank=1.0, attention=())
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for each in (reference, compiled):
        each(**inputs).logits.square().sum().backward()
    for p, q in zip(reference.parameters(), model.parameters(), strict=True):
        if p.grad is not None:
            assert (p.grad - q.grad).norm() <= 1e-9 * p.grad.norm().clamp_min(1e-9)


@pytest.mark.parametrize("rank", [0.5, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_and_autocast(name, rank):
    model, inputs = factorized(name, rank=rank)
    reference = logits(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = logits(model, inputs)
        model.train()(**inputs).logits.float().sum().backward()
    assert relative(mixed.float(), reference) < 0.2
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    assert relative(logits(model, inputs), reference) < 1e-6  # no half-precise product was kept
    half = copy.deepcopy(model).bfloat16()
    halved = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    assert logits(half, halved).dtype == torch.bfloat16 and relative(logits(half, halved).float(), reference) < 0.2
    half.train()(**halved).logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in half.parameters() if p.grad is not None)


@pytest.mark.parametrize("rank", [0.25, 1.0])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_checkpointed_activations_give_the_same_gradients(name, rank):
    model, inputs = factorized(name, torch.float64, rank=rank)
    gradients = []
    for checkpointed in (False, True):
        each = copy.deepcopy(model).train()
        for module in each.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointed:
            each.gradient_checkpointing_enable()
        each(**inputs).logits.square().sum().backward()
        gradients.append([p.grad for p in each.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 1e-9 * one.norm().clamp_min(1e-9)


@pytest.mark.parametrize(("name", "targets"), [("bert", ["output.dense", "transform.dense"]), ("gpt2", ["c_fc"])])
@pytest.mark.parametrize("rank", [0.25, 1.0])
def test_lora_on_layers_trains_and_a_merge_says_what_to_do(name, targets, rank):
    peft = pytest.importorskip("peft")
    model, inputs = factorized(name, torch.float64, rank=rank, attention=())
    plain = fnl_hf.to_dense(copy.deepcopy(model))
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings).double()
    adapted_plain = peft.get_peft_model(plain, settings).double()
    adapted_plain.load_state_dict({k: v for k, v in adapted.state_dict().items() if "lora_" in k}, strict=False)
    expected = logits(adapted_plain, inputs)
    assert relative(logits(adapted, inputs), expected) < 1e-9
    assert (
        relative(expected, logits(fnl_hf.to_dense(factorized(name, torch.float64, rank=rank, attention=())[0]), inputs))
        > 1e-3
    )
    adapted.train()(**inputs).logits.sum().backward()
    trained = {path for path, p in adapted.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in path for path in trained)
    before = copy.deepcopy(adapted.state_dict())
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(ValueError, match=r"call fnl_hf\.to_dense\(model\) first"):
            merge()
    assert all(torch.equal(value, before[key]) for key, value in adapted.state_dict().items())
    fnl_hf.to_dense(adapted)
    assert relative(logits(adapted, inputs), expected) < 1e-9
    assert relative(logits(adapted.merge_and_unload(), inputs), expected) < 1e-9


def test_a_scale_that_no_checkpoint_holds_is_kept(tmp_path):
    """Gemma 3 fills the buffer anew, in embeddings of its own class only."""
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8, "vocab_size": 30}
    model = tf.Gemma3TextModel(tf.Gemma3TextConfig(num_attention_heads=2, num_key_value_heads=1, **size)).eval()
    before = model(torch.arange(6)[None]).last_hidden_state
    config = fnl_hf.FNLConfig(attention=(), target_modules="all")
    assert_close(fnl_hf.factorize(model, config)(torch.arange(6)[None]).last_hidden_state, before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "factorized")
    loaded = tf.AutoModel.from_pretrained(tmp_path / "factorized")
    assert torch.equal(loaded(torch.arange(6)[None]).last_hidden_state, model(torch.arange(6)[None]).last_hidden_state)
    fnl_hf.to_dense(loaded).save_pretrained(tmp_path / "dense")
    for dense in (loaded, tf.AutoModel.from_pretrained(tmp_path / "dense")):
        assert_close(dense(torch.arange(6)[None]).last_hidden_state, before, rtol=1e-4, atol=1e-4)
