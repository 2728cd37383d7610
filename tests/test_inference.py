"""The form for inference: the same function in other layers, whatever is chosen; and how it is chosen."""

import copy
import json
import pickle

import pytest
import torch
import transformers as tf
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import fnl_hf
from fnl_hf.algebra.columns import LARGEST, own_columns
from fnl_hf.factorization import is_factorized
from fnl_hf.layers import FactorizedConv2d, FactorizedEmbedding, FactorizedLayer, FactorizedLinear, PivotedLinear
from fnl_hf.trial import decided, timed
from tests.families import BART, BERT, PIXELS, SEQ2SEQ, TEXT, build, output
from tests.test_layers import close, drawn, factorized

pytestmark = pytest.mark.usefixtures("one_thread")

HALF = fnl_hf.FNLConfig(head_rank=0.5, target_modules="all", rank=0.5)
LAYERS = fnl_hf.FNLConfig(attention=(), target_modules="all", rank=0.5)
DEEP = fnl_hf.FNLConfig(attention=(), target_modules="all", rank=0.5, form="deep")
CONFIGS = pytest.mark.parametrize("config", [HALF, LAYERS, DEEP], ids=["half", "layers", "deep"])


def prefer(*forms):
    """A measure by which forms are the faster the earlier they are named, and what is not named is slow."""

    def measure(runs):
        for run in runs.values():
            run()  # the calls fit every form
        return {form: 1.0 + forms.index(form) if form in forms else 50.0 for form in runs}

    return measure


FAST = prefer("compact", "pivoted", "kept")


def layers_of(model, kind):
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def reloaded(model, folder):
    model.save_pretrained(folder)
    again, info = type(model).from_pretrained(folder, output_loading_info=True, dtype=model.dtype)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return again.eval()


# -- a matrix by its own columns ---------------------------------------------------------------------


@pytest.mark.parametrize("rows, columns, rank", [(7, 5, 3), (5, 9, 4), (40, 30, 29), (6, 6, 1)])
def test_columns_of_a_matrix_make_the_others(rows, columns, rank):
    left, right = torch.randn(rows, rank).double(), torch.randn(columns, rank).double()
    right *= torch.logspace(-4, 4, columns).double()[:, None]  # as badly conditioned as it may come
    right[:, :1] *= 1e-9
    matrix = left @ right.T
    own, rest, order = own_columns(left, right)
    assert own.shape == (rows, rank) and rest.shape == (columns - rank, rank)
    assert torch.equal(order.sort().values, torch.arange(columns))
    close(torch.cat([own, own @ rest.T], 1), matrix[:, order])
    assert rest.abs().max() <= LARGEST + 1e-9


def test_dependent_factors_have_columns_too():
    left, right = torch.randn(6, 3).double(), torch.randn(8, 3).double()
    left[:, 2] = 0
    right[:, 2] = 0
    own, rest, order = own_columns(left, right)
    close(torch.cat([own, own @ rest.T], 1), (left @ right.T)[:, order])


@pytest.mark.parametrize(
    "leaf, rank",
    [(nn.Linear(8, 12), 3), (nn.Linear(12, 8, bias=False), 5), (Conv1D(12, 8), 4), (nn.Linear(8, 8), 4)],
    ids=["wide", "narrow without bias", "Conv1D", "square"],
)
def test_a_pivoted_layer_is_the_layer(leaf, rank):
    layer = factorized(drawn(leaf), rank)
    pivoted, x = PivotedLinear.of(layer), torch.randn(2, 3, layer.matrix_shape[1]).double()
    close(pivoted(x), layer(x))
    close(pivoted(x[0, 0]), layer(x[0, 0]))  # a vector
    close(pivoted.weight.clone(), layer.weight.clone())
    (m, n), numbers = layer.matrix_shape, sum(p.numel() for p in pivoted.factor_parameters())
    assert numbers == rank * (m + n) - rank**2 < m * n
    dense = pivoted.dense()
    assert type(dense) is type(leaf) and dense.weight.shape == leaf.weight.shape
    close(dense(x), layer(x))
    for twin in (copy.deepcopy(pivoted), pickle.loads(pickle.dumps(pivoted))):
        assert torch.equal(twin(x), pivoted(x)) and twin.rest is not pivoted.rest
    single = copy.deepcopy(pivoted).float()
    assert single.order.dtype is torch.long and single.weight.dtype is torch.float32
    close(single(x.float()).double(), layer(x), 1e-5)
    assert str(rank) in repr(pivoted)


def test_a_pivoted_layer_that_is_tied_to_another_gives_what_that_gives():
    one, other = (PivotedLinear.of(factorized(drawn(nn.Linear(8, 12)), 3)) for _ in range(2))
    other.weight, x = one.weight, torch.randn(4, 8).double()  # as transformers ties
    assert other.rest is one.rest
    close(other(x) - other.bias, one(x) - one.bias)


def test_the_gradient_of_its_input_is_that_of_the_layer():
    layer = factorized(drawn(nn.Linear(8, 12)), 3)
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    (found,) = torch.autograd.grad(PivotedLinear.of(layer)(x).square().sum(), x)
    close(found, expected)


# -- whole models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "marian", "albert", "vit"])
@CONFIGS
def test_the_function_stays_whatever_is_chosen(family, config):
    model, inputs = build(family, dtype=torch.float64)
    fnl_hf.factorize(model, config)
    before = output(model, inputs)
    composed = copy.deepcopy(model)
    assert fnl_hf.for_inference(model.train(), measure=FAST, **inputs) is model and not model.training
    close(output(model, inputs), before)
    assert layers_of(model, PivotedLinear)
    assert all(p.layout != "padded" for p in fnl_hf.factorizations(model) if p.kind in ("qk", "ov"))
    assert not any(layer.middle is not None for layer in model.modules() if isinstance(layer, FactorizedLayer))
    fnl_hf.for_inference(composed, measure=prefer("dense"), **inputs)
    close(output(composed, inputs), before)
    assert not layers_of(composed, FactorizedLinear)
    for each in (model, composed):
        if is_factorized(each):
            close(output(fnl_hf.to_dense(each), inputs), before)
        assert not layers_of(each, fnl_hf.FactorLeaf) and not hasattr(each.config, "quantization_config")


def models():
    torch.manual_seed(0)
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 2}
    grouped = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 50}
    t5 = {"d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
    return {
        "bert": lambda: (tf.BertForMaskedLM(tf.BertConfig(**BERT)), TEXT),
        "gpt2": lambda: (tf.GPT2LMHeadModel(tf.GPT2Config(**gpt2)), TEXT),
        "llama": lambda: (
            tf.LlamaForCausalLM(tf.LlamaConfig(hidden_size=32, intermediate_size=64, **grouped)),
            TEXT,
        ),
        "marian": lambda: (tf.MarianMTModel(tf.MarianConfig(**BART)), SEQ2SEQ),
        "t5": lambda: (tf.T5ForConditionalGeneration(tf.T5Config(**t5, decoder_start_token_id=0)), SEQ2SEQ),
    }


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "marian", "t5"])
@CONFIGS
def test_it_is_saved_and_reloaded_bit_for_bit(name, config, tmp_path):
    model, inputs = models()[name]()
    fnl_hf.factorize(model.eval(), config)
    before = logits(model, inputs)
    fnl_hf.for_inference(model, measure=FAST)  # on made-up inputs
    after = logits(model, inputs)
    assert_close(after, before, rtol=1e-4, atol=1e-5 * before.norm())
    again = reloaded(model, tmp_path)
    assert torch.equal(logits(again, inputs), after)
    assert layers_of(again, PivotedLinear) == layers_of(model, PivotedLinear) != []
    kinds = [[(p.name, p.kind, p.layout) for p in fnl_hf.factorizations(each)] for each in (model, again)]
    assert kinds[0] == kinds[1]
    assert_close(logits(fnl_hf.to_dense(again), inputs), before, rtol=1e-4, atol=1e-5 * before.norm())


def test_what_is_composed_is_saved_as_an_ordinary_layer_with_the_reason(tmp_path):
    model, inputs = build("bert")
    fnl_hf.factorize(model, HALF)
    fnl_hf.for_inference(model, measure=prefer("dense"), **inputs)
    assert [p.kind for p in fnl_hf.factorizations(model)] == ["embedding"]  # which stays
    again = reloaded(model, tmp_path)
    assert torch.equal(output(again, inputs), output(model, inputs))
    for each in (model, again):
        reasons = {skip["name"]: skip["reason"] for skip in fnl_hf.summary(each).skipped}
        assert "composed for inference" in reasons["encoder.layer.0.attention.self.qk"]
        assert "composed for inference" in reasons["encoder.layer.1.output.dense"]


def test_a_model_that_is_composed_as_a_whole_is_an_ordinary_one(tmp_path):
    model, inputs = build("bert")
    fnl_hf.factorize(model, fnl_hf.FNLConfig(attention=(), target_modules="all-linear", rank=0.5))
    fnl_hf.for_inference(model, measure=prefer("dense"))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match="not factorized, and as fast as it can be"):
        fnl_hf.for_inference(model)
    fnl_hf.factorize(model, HALF)  # from the start
    assert not any("composed" in skip["reason"] for skip in fnl_hf.summary(model).skipped)


def test_called_again_it_leaves_what_has_its_form():
    model, inputs = build("bert")
    fnl_hf.factorize(model, HALF)
    fnl_hf.for_inference(model, measure=FAST)
    before, names = output(model, inputs), list(model.state_dict())
    fnl_hf.for_inference(model, measure=FAST)
    assert torch.equal(output(model, inputs), before) and list(model.state_dict()) == names


def test_heads_that_are_not_proven_compact_stay_padded(monkeypatch):
    monkeypatch.setattr("fnl_hf.heads.inference._compacted", lambda model, targets, evidence: targets)
    model, inputs = build("bert", dtype=torch.float64)
    fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=0.5))
    before = output(model, inputs)
    fnl_hf.for_inference(model, measure=FAST)
    assert {p.layout for p in fnl_hf.factorizations(model)} == {"padded"}
    assert torch.equal(output(model, inputs), before)


def test_compact_heads_can_become_ordinary_ones_again():
    model, inputs = build("gpt2", dtype=torch.float64)
    fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=0.5, head_layout="compact"))
    before, widths = output(model, inputs), model.h[0].attn.head_dim
    fnl_hf.for_inference(model, measure=prefer("dense"))
    close(output(model, inputs), before)
    assert model.h[0].attn.head_dim == 2 * widths and not layers_of(model, fnl_hf.FactorLeaf)


def test_tied_layers_and_embeddings_keep_their_factors():
    model, inputs = models()["bert"]()
    fnl_hf.factorize(model.eval(), DEEP)
    before = logits(model, inputs)
    fnl_hf.for_inference(model, measure=FAST)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(table) is FactorizedEmbedding and type(head) is FactorizedLinear
    assert table.stored("weight") is head.stored("weight") and table.middle is head.middle is None
    assert_close(logits(model, inputs), before, rtol=1e-4, atol=1e-5 * before.norm())


def test_convolutions_are_composed_where_that_is_faster():
    config = tf.ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8, layer_type="basic")
    model = tf.ResNetModel(config).double().eval()
    fnl_hf.factorize(model, LAYERS)
    inputs = {"pixel_values": PIXELS["pixel_values"].double().repeat(1, 1, 4, 4)}
    before = output(model, inputs)
    kept = fnl_hf.for_inference(copy.deepcopy(model), measure=prefer("kept"), **inputs)
    assert layers_of(kept, FactorizedConv2d)
    fnl_hf.for_inference(model, measure=prefer("dense"), **inputs)
    assert not layers_of(model, FactorizedConv2d)
    close(output(kept, inputs), before)
    close(output(model, inputs), before)


@pytest.mark.parametrize("config", [HALF, LAYERS], ids=["half", "layers"])
def test_it_exports_for_batches_of_all_sizes_and_compiles(config):
    model = tf.BertModel(tf.BertConfig(**{**BERT, "num_hidden_layers": 1}), add_pooling_layer=False).eval()
    fnl_hf.factorize(model, config)
    fnl_hf.for_inference(model, measure=FAST)
    batch = {"input_ids": {0: torch.export.Dim("batch", min=2, max=64)}}
    with torch.no_grad():
        exported = torch.export.export(model, (), kwargs=TEXT, dynamic_shapes=batch).module()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for each in (TEXT, {"input_ids": TEXT["input_ids"].repeat(9, 1)}):
            assert_close(exported(**each).last_hidden_state, model(**each).last_hidden_state)
        assert_close(compiled(**TEXT).last_hidden_state, model(**TEXT).last_hidden_state)


def test_a_pivoted_head_takes_more_words():
    model = tf.BertForMaskedLM(tf.BertConfig(**BERT, tie_word_embeddings=False)).eval()
    fnl_hf.factorize(model, fnl_hf.FNLConfig(attention=(), target_modules=["decoder"], rank=6))
    fnl_hf.for_inference(model, measure=FAST)
    before = logits(model, TEXT)
    model.resize_token_embeddings(55, mean_resizing=False)
    assert type(model.get_output_embeddings()) is PivotedLinear
    assert_close(logits(model, TEXT)[..., :50], before)


# -- what is refused ---------------------------------------------------------------------------------


def test_decay_refuses_it_and_says_what_to_do(tmp_path):
    model, _ = build("bert")
    fnl_hf.factorize(model, LAYERS)
    fnl_hf.for_inference(model, measure=FAST)
    assert {p.kind for p in fnl_hf.factorizations(model)} == {"embedding"}
    assert "12 linear layers are pivoted" in str(fnl_hf.summary(model))
    with pytest.raises(ValueError, match=r"form that fnl_hf.for_inference gave it.*to_dense"):
        fnl_hf.frobenius_decay_(model, 0.1)
    args = fnl_hf.FNLTrainingArguments(output_dir=tmp_path, report_to="none", use_cpu=True, max_steps=1)
    rows = [{"input_ids": [5, 6], "labels": 0}] * 2
    with pytest.raises(ValueError, match="form that fnl_hf.for_inference gave it"):
        fnl_hf.FNLTrainer(model=model, args=args, train_dataset=rows).train()


def test_what_cannot_be_is_refused():
    model, inputs = build("bert")
    with pytest.raises(ValueError, match="not factorized"):
        fnl_hf.for_inference(model)
    with pytest.raises(TypeError, match="expected a torch.nn.Module"):
        fnl_hf.for_inference("bert")
    fnl_hf.factorize(model, HALF)
    with pytest.raises(TypeError, match="is compiled"):
        fnl_hf.for_inference(torch.compile(model))
    with pytest.raises(ValueError, match="does not run on pixel_values"):
        fnl_hf.for_inference(model, pixel_values=torch.zeros(1, 3, 8, 8))


def test_an_error_leaves_the_model_as_it_was():
    model, inputs = build("bert")
    fnl_hf.factorize(model, HALF)
    before, printed, plan = output(model, inputs), repr(model), model.config.quantization_config.to_dict()
    model.train()

    def fails_at_the_last(runs):
        if "pivoted" in runs:  # heads are compact by then
            raise RuntimeError("no clock")
        return FAST(runs)

    with pytest.raises(RuntimeError, match="no clock"):
        fnl_hf.for_inference(model, measure=fails_at_the_last)
    assert model.training and repr(model) == printed and model.config.quantization_config.to_dict() == plan
    assert torch.equal(output(model.eval(), inputs), before)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pivoted": "yes"}, "pivoted is 'yes', expected true or false"),
        ({"deep": True}, "pivoted is true, expected only of a linear layer"),
    ],
)
def test_a_damaged_plan_is_named(change, message, tmp_path):
    model, _ = build("bert")
    fnl_hf.factorize(model, LAYERS)
    fnl_hf.for_inference(model, measure=FAST).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    entry = next(t for t in config["quantization_config"]["plan"]["targets"] if t.get("pivoted"))
    entry.update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        tf.AutoModel.from_pretrained(tmp_path)


def test_a_checkpoint_without_the_order_of_columns_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model, _ = build("bert")
    fnl_hf.factorize(model, LAYERS)
    fnl_hf.for_inference(model, measure=FAST).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.0.output.dense.order"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks encoder.layer.0.output.dense.order"):
        tf.AutoModel.from_pretrained(tmp_path)


# -- the choice --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "times, form",
    [
        ([{"kept": 1.0, "pivoted": 0.98, "dense": 2.0}], "kept"),  # within noise: as it is
        ([{"kept": 1.0, "pivoted": 0.9, "dense": 2.0}], "pivoted"),
        ([{"kept": 1.1, "pivoted": 1.2, "dense": 1.0}], "dense"),
        ([{"kept": 1.02, "pivoted": 1.2, "dense": 1.0}], "kept"),
        # twice as fast on one call, but slower than dense on the other
        ([{"kept": 1.1, "dense": 1.0}, {"kept": 1.0, "dense": 2.0}], "dense"),
        ([{"kept": 0.9, "pivoted": 0.5, "dense": 1.0}, {"kept": 0.5, "pivoted": 1.1, "dense": 1.0}], "kept"),
    ],
)
def test_nothing_slower_than_dense_is_chosen(times, form):
    assert decided(times) == form


def test_each_kind_of_layer_is_measured_once_per_call():
    model, _ = build("bert")
    fnl_hf.factorize(model, fnl_hf.FNLConfig(attention=(), target_modules="all-linear", rank=0.25))
    measured = []
    fnl_hf.for_inference(model, measure=lambda runs: measured.append(tuple(runs)) or FAST(runs))
    # 2 layers x (4 square, up, down) in 3 kinds, each on batches 1 and 32
    assert measured == [("kept", "pivoted", "dense")] * 6


def test_what_would_be_composed_anyway_does_not_keep_factors_beside_that():
    model, inputs = build("bert")
    fnl_hf.factorize(model, LAYERS)
    measured = set()
    fnl_hf.for_inference(model, measure=lambda runs: measured.add(tuple(runs)) or FAST(runs), **inputs)
    assert measured == {("pivoted", "dense")}


def test_timing_runs_everything_on_one_thread_and_gives_seconds():
    seen = []
    before = torch.get_num_threads()
    times = timed({form: lambda: seen.append(torch.get_num_threads()) for form in ("kept", "dense")})
    assert set(times) == {"kept", "dense"} and min(times.values()) >= 0 and set(seen) == {1}
    assert torch.get_num_threads() == before
