"""What is claimed, shared or wrapped wrongly must be left alone: real classes, and attention that users write."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import fnl_hf
from fnl_hf.calls import Call
from fnl_hf.checking import kept_on_error
from fnl_hf.planning import REFUTED
from fnl_hf.proof import Evidence
from fnl_hf.replay import fingerprint
from scripts.coverage import build as build_type
from scripts.coverage import outputs
from tests.families import BERT, TEXT, build, output

HALF = fnl_hf.FNLConfig(head_rank=0.5)
COMPACT = fnl_hf.FNLConfig(head_rank=0.5, head_layout="compact")


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def randomised(model, std=0.3):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + (parameter.dim() == 1) * 0.5)
    return model.eval()


def first_output(model, inputs):
    with torch.no_grad():
        torch.manual_seed(0)
        return model(**inputs)[0]


# -- attention that users write ----------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention with a place for whatever somebody may put between its projections."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.num_heads, self.width = heads, width // heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def heads(self, x):
        return x.unflatten(-1, (self.num_heads, self.width)).transpose(1, 2)

    def queries(self, q):
        return q

    def values(self, v):
        return v

    def weights(self, q, k):
        return (q @ k.mT / math.sqrt(self.width)).softmax(-1)

    def context(self, c):
        return c

    def forward(self, hidden_states):
        q, k, v = (self.heads(proj(hidden_states)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        c = self.weights(self.queries(q), self.queries(k)) @ self.values(v)
        return self.out_proj(self.context(c.transpose(1, 2).flatten(-2)))


class Normalized(Attention):
    def queries(self, q):
        return F.normalize(q, dim=-1)


class Linear(Attention):
    """Linear attention with elu + 1."""

    def weights(self, q, k):
        scores = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
        return scores / scores.sum(-1, keepdim=True)


class Turned(Attention):
    """A rotation in a helper of another name, of features that lie next to each other or half a head apart."""

    def queries(self, q):
        angle = torch.arange(q.shape[-2], dtype=q.dtype)[:, None] * 10 ** -torch.arange(self.width // 2, dtype=q.dtype)
        x, y = q.chunk(2, -1)
        return torch.cat([x * angle.cos() - y * angle.sin(), y * angle.cos() + x * angle.sin()], -1)


class Gelu(Attention):
    def values(self, v):
        return F.gelu(v)


class Silu(Attention):
    def context(self, c):
        return F.silu(c)


class NormedContext(Attention):
    def context(self, c):
        return F.layer_norm(c, (c.shape[-1],))


class Scaled(Attention):
    """Scores of another scale, with a bias: still the product."""

    def weights(self, q, k):
        bias = torch.arange(k.shape[-2], dtype=k.dtype)
        return (q @ k.mT / self.width + bias).softmax(-1)


class Mixed(Attention):
    """A fixed matrix between queries and keys."""

    def queries(self, q):
        return q @ torch.linspace(-1, 1, self.width**2, dtype=q.dtype).view(self.width, self.width).sin()


OWN = {
    Attention: {"qk", "ov"}, Normalized: {"ov"}, Linear: {"ov"}, Turned: {"rotary-qk", "ov"}, Gelu: {"qk"},
    Silu: {"qk"}, NormedContext: {"qk"}, Scaled: {"qk", "ov"}, Mixed: {"ov"},
}  # fmt: skip


@pytest.mark.parametrize("cls", OWN, ids=lambda cls: cls.__name__)
def test_attention_that_users_write_is_claimed_where_it_is_a_product(cls):
    torch.manual_seed(0)
    model = nn.Sequential(cls(), cls()).eval()
    x = torch.randn(2, 5, 16)
    before = model(x)
    fnl_hf.factorize(model)  # no inputs: its signature is enough
    assert {product.kind for product in fnl_hf.factorizations(model)} == OWN[cls]
    assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert {skip["kind"] for skip in fnl_hf.summary(model).skipped} == {"qk", "ov"} - {
        kind.removeprefix("rotary-") for kind in OWN[cls]
    }


@pytest.mark.parametrize("cls", [Normalized, Gelu], ids=lambda cls: cls.__name__)
def test_what_is_wrong_at_full_rank_would_have_changed_the_function(cls):
    """The control: these products, claimed by force, change the outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(cls()).eval()
    x = torch.randn(2, 5, 16)
    before = model(x)
    slot = "qk" if cls is Normalized else "ov"
    (target,) = [o for s in fnl_hf.heads.find_attention(model) for o in s.options[slot] if o.kind == slot]
    product = target.found(model)
    product.write(product.form.balance(product.augmented()))
    assert relative(model(x), before) > 1e-2


# -- real classes ------------------------------------------------------------------------------------


def llama(**changes):
    config = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "vocab_size": 50, "pad_token_id": 0} | changes
    return randomised(tf.LlamaModel(tf.LlamaConfig(**config)))


@pytest.mark.parametrize("name", ["Yoso", "Mra"])
def test_attention_by_hashing_and_by_blocks_is_left_alone(name):
    sizes = {**BERT, "max_position_embeddings": 64, "hash_code_len": 4, "num_hash": 4, "block_per_row": 2}
    model = getattr(tf, f"{name}Model")(getattr(tf, f"{name}Config")(**sizes)).eval()
    with pytest.raises(ValueError, match="has nothing to factorize"):
        fnl_hf.factorize(model)
    assert not fnl_hf.verify(model, input_ids=torch.randint(5, 50, (1, 32)))


def test_queries_that_also_meet_boxes_are_left_alone():
    model, inputs = build_type("bros")
    with pytest.raises(ValueError, match="has nothing to factorize"):  # nothing reaches it that could be made up
        fnl_hf.factorize(model)
    fnl_hf.factorize(model, verify=inputs)
    assert {product.kind for product in fnl_hf.factorizations(model)} == {"ov"}


def test_zero_output_projections_prove_as_much_as_any():
    for model in (llama(), randomised(tf.BertModel(tf.BertConfig(**BERT)))):
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "attention.output.dense.weight")):
                nn.init.zeros_(parameter)
        kinds = {"rotary-qk", "ov"} if isinstance(model, tf.LlamaModel) else {"qk", "ov"}
        fnl_hf.factorize(model, verify=TEXT)
        assert {product.kind for product in fnl_hf.factorizations(model)} == kinds
        assert len(fnl_hf.factorizations(model)) == 2 * model.config.num_hidden_layers


def test_weights_that_a_kernel_reads_past_their_layers_keep_their_rank():
    sizes = {k: BERT[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    config = tf.WavLMConfig(
        **sizes, conv_dim=(16, 16), conv_stride=(4, 4), conv_kernel=(4, 4), num_conv_pos_embedding_groups=4,
        num_conv_pos_embeddings=4,
    )  # fmt: skip
    model, inputs = randomised(tf.WavLMModel(config)), {"input_values": torch.randn(1, 400)}
    before = first_output(model, inputs)
    with pytest.raises(ValueError, match="every product found .* keeps its full rank"):
        fnl_hf.factorize(model, HALF)
    assert torch.equal(first_output(model, inputs), before)
    fnl_hf.factorize(model)
    assert relative(first_output(model, inputs), before) < 1e-5


def test_cross_attention_that_made_up_inputs_do_not_reach_is_right_when_compact():
    config = tf.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    model = randomised(tf.BertModel(config))
    inputs = {**TEXT, "encoder_hidden_states": torch.randn(2, 5, 32)}
    padded, compact = copy.deepcopy(model), model
    fnl_hf.factorize(padded, HALF)
    fnl_hf.factorize(compact, COMPACT)
    assert len(fnl_hf.factorizations(compact)) == 8
    assert relative(first_output(compact, inputs), first_output(padded, inputs)) < 1e-5
    assert {row["layout"] for row in fnl_hf.summary(compact).rows} == {"compact"}
    assert relative(first_output(fnl_hf.to_dense(compact), inputs), first_output(padded, inputs)) < 1e-5


def test_a_stage_of_one_token_proves_nothing_by_itself():
    config = tf.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16,
        mlp_ratios=[1, 1, 1, 1], image_size=32,
    )  # fmt: skip
    model, small = randomised(tf.SegformerModel(config)), {"pixel_values": torch.randn(1, 3, 32, 32)}
    large = {"pixel_values": torch.randn(1, 3, 128, 128)}
    padded, compact = copy.deepcopy(model), model
    fnl_hf.factorize(padded, HALF, verify=small)
    fnl_hf.factorize(compact, COMPACT, verify=small)
    assert len(fnl_hf.factorizations(padded)) == len(fnl_hf.factorizations(compact)) == 8
    assert relative(first_output(compact, large), first_output(padded, large)) < 1e-5


@pytest.mark.parametrize("family", ["trocr", "blip_text_model", "detr", "glpn", "pp_formulanet_text"])
def test_compact_heads_run_and_give_what_padded_ones_give(family):
    model, inputs = build_type(family)
    padded = copy.deepcopy(model)
    fnl_hf.factorize(padded, HALF)
    fnl_hf.factorize(model, COMPACT)
    for ours, theirs in zip(outputs(model, inputs), outputs(padded, inputs), strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# -- what is remembered ------------------------------------------------------------------------------


def test_equal_layers_are_proven_once_and_different_ones_apart(monkeypatch):
    model, stages = llama(num_hidden_layers=6), []
    real = fnl_hf.replay.Stage.__init__
    monkeypatch.setattr(
        fnl_hf.replay.Stage, "__init__", lambda self, name, *rest: (stages.append(name), real(self, name, *rest))[1]
    )
    fnl_hf.factorize(model)
    assert len(fnl_hf.factorizations(model)) == 12 and len(stages) == 1
    layers = llama().layers
    assert fingerprint(layers[0].self_attn) == fingerprint(layers[2].self_attn)  # but for the number of the layer
    layers[2].self_attn.rotates = False
    assert fingerprint(layers[0].self_attn) != fingerprint(layers[2].self_attn)
    layers[1].self_attn.k_proj.weight = layers[1].self_attn.v_proj.weight
    assert fingerprint(layers[0].self_attn) != fingerprint(layers[1].self_attn)


class Numbered(Attention):
    """Normalises its queries in every other layer, as its number or its options tell."""

    def __init__(self, number, options):
        super().__init__()
        self.layer_idx, self.options = (None, {"norm": bool(number % 2)}) if options else (number, None)

    def queries(self, q):
        normalised = self.options["norm"] if self.options else self.layer_idx % 2
        return F.normalize(q, dim=-1) if normalised else q


@pytest.mark.parametrize("options", [False, True])
def test_layers_that_differ_by_their_number_or_options_are_proven_apart(options):
    model = nn.Sequential(*[Numbered(number, options) for number in range(4)])
    x = torch.randn(2, 5, 16)
    before = model(x)
    fnl_hf.factorize(model)  # without a forward of the whole, which nobody knows the inputs of
    assert [product.name for product in fnl_hf.factorizations(model) if product.kind == "qk"] == ["0.qk", "2.qk"]
    assert relative(model(x), before) < 1e-5


def test_calls_with_rotations_of_another_width_are_different_ones():
    """Of layers of one class one may turn all of a head, and the next a part of it."""
    x = torch.randn(1, 6, 32)
    full, part, longer = (Call((x,), {"cos": torch.ones(1, n, width)}) for n, width in ((6, 8), (6, 4), (9, 8)))
    assert full.described() == longer.described() != part.described()


def test_layers_that_rotate_and_layers_that_do_not():
    config = tf.SmolLM3Config(
        hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, no_rope_layers=[1, 0, 1, 0], pad_token_id=0,
    )  # fmt: skip
    model = randomised(tf.SmolLM3Model(config))
    before = first_output(model, TEXT)
    fnl_hf.factorize(model)
    kinds = [product.kind for product in fnl_hf.factorizations(model) if product.kind != "ov"]
    assert kinds == ["rotary-qk", "qk", "rotary-qk", "qk"]
    assert relative(first_output(model, TEXT), before) < 1e-5


# -- what is shared ----------------------------------------------------------------------------------


def shared_with(model):
    return {skip["name"]: skip["reason"] for skip in fnl_hf.summary(model).skipped if "shared" in skip["reason"]}


@pytest.mark.parametrize("what", ["query", "key", "value"])
@pytest.mark.parametrize("how", ["module", "weight"])
@pytest.mark.parametrize("config", [fnl_hf.FNLConfig(), HALF], ids=["full", "half"])
def test_a_projection_that_two_layers_share_is_left_alone(what, how, config):
    model = randomised(tf.BertModel(tf.BertConfig(**BERT | {"num_hidden_layers": 3})))
    first, _, last = (layer.attention.self for layer in model.encoder.layer)
    if how == "module":
        setattr(last, what, getattr(first, what))
    else:
        getattr(last, what).weight = getattr(first, what).weight
    before = first_output(model, TEXT)
    whole = fnl_hf.factorize(copy.deepcopy(model), config)
    slot = "ov" if what == "value" else "qk"
    names = [product.name for product in fnl_hf.factorizations(whole) if product.kind == slot]
    assert len(names) == 1 and names[0].startswith("encoder.layer.1")
    assert len(shared_with(whole)) == 2 and len(fnl_hf.factorizations(whole)) == 4
    if config is not HALF:
        assert relative(first_output(whole, TEXT), before) < 1e-5
    assert fnl_hf.verify(whole, **TEXT)
    ties = {id(p) for p in (getattr(first, what).weight, getattr(last, what).weight)}
    assert len(ties) == 1  # of the model that was copied: nobody untied it


def test_queries_tied_to_keys_are_left_alone():
    model = randomised(tf.BertModel(tf.BertConfig(**BERT)))
    for layer in model.encoder.layer:
        layer.attention.self.key.weight = layer.attention.self.query.weight
    before = first_output(model, TEXT)
    fnl_hf.factorize(model)
    assert {product.kind for product in fnl_hf.factorizations(model)} == {"ov"}
    assert all("its factors are one weight" in reason for reason in shared_with(model).values())
    assert len(shared_with(model)) == 2
    assert relative(first_output(model, TEXT), before) < 1e-5


@pytest.mark.parametrize("config", [fnl_hf.FNLConfig(), HALF], ids=["full", "half"])
def test_attention_that_is_shared_as_a_whole_changes_together(config, tmp_path):
    model = randomised(tf.BertModel(tf.BertConfig(**BERT)))
    first, last = model.encoder.layer
    last.attention = first.attention  # one module, reached by two names
    fnl_hf.factorize(model, config)
    assert [product.kind for product in fnl_hf.factorizations(model)] == ["qk", "ov"]
    assert model.encoder.layer[1].attention is model.encoder.layer[0].attention
    tied = randomised(tf.BertModel(tf.BertConfig(**BERT)))
    for (name, one), (_, other) in zip(*(layer.attention.named_modules() for layer in tied.encoder.layer), strict=True):
        for each in list(one._parameters):  # two modules, whose every weight is one
            if "LayerNorm" not in name:
                other._parameters[each] = one._parameters[each]
    before = first_output(tied, TEXT)
    size = sum(p.numel() for p in tied.parameters())
    fnl_hf.factorize(tied, config)
    assert len(fnl_hf.factorizations(tied)) == 2  # decayed once
    ours = [layer.attention.self.query for layer in tied.encoder.layer]
    assert ours[0].weight is ours[1].weight and ours[0].bias is ours[1].bias
    if config is HALF:
        assert sum(p.numel() for p in tied.parameters()) < size
        reduced = first_output(tied, TEXT)
        fnl_hf.to_dense(tied)
        assert relative(first_output(tied, TEXT), reduced) < 1e-5
        assert tied.encoder.layer[0].attention.self.query.weight is tied.encoder.layer[1].attention.self.query.weight
        assert sum(p.numel() for p in tied.parameters()) == size
    else:
        assert relative(first_output(tied, TEXT), before) < 1e-5


def test_a_projection_that_something_else_reads_is_left_alone():
    model = randomised(tf.BertModel(tf.BertConfig(**BERT)))
    model.pooler.dense.weight = model.encoder.layer[0].attention.self.value.weight
    before = model(**TEXT).pooler_output
    fnl_hf.factorize(model)
    assert shared_with(model) == {"encoder.layer.0.attention.ov": "shared with pooler.dense"}
    assert_close(model(**TEXT).pooler_output, before, rtol=1e-4, atol=1e-5)


def test_verify_looks_at_the_whole_model():
    """A product that holds in its module, while something else in the model reads one of its factors."""
    model = fnl_hf.factorize(randomised(tf.BertModel(tf.BertConfig(**BERT))))
    assert fnl_hf.verify(model, **TEXT)
    model.pooler.dense.weight = model.encoder.layer[0].attention.self.value.weight
    proof = fnl_hf.verify(model, **TEXT)
    assert not proof
    assert [verdict.name for verdict in proof.verdicts if not verdict.exact] == ["encoder.layer.0.attention.ov"]


def test_verify_takes_three_forwards_and_leaves_the_model_as_it_was():
    model, inputs = build("bert")
    fnl_hf.factorize(model)
    before = copy.deepcopy(model.state_dict())
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    model.train()
    state = torch.get_rng_state()
    assert fnl_hf.verify(model, **inputs)
    assert len(calls) == 3 and model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_verify_names_what_fails_and_what_is_not_reached():
    model = fnl_hf.factorize(randomised(tf.BertModel(tf.BertConfig(**BERT))))
    wrong = model.encoder.layer[1].attention.self
    forward = wrong.query.forward
    wrong.query.forward = lambda x: forward(x).relu()  # after the fact: its function is no product any more
    proof = fnl_hf.verify(model, **TEXT)
    assert [v.name for v in proof.verdicts if not v.exact] == ["encoder.layer.1.attention.self.qk"] and "NOT" in str(
        proof
    )
    decoder = randomised(tf.BertModel(tf.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)))
    proof = fnl_hf.verify(fnl_hf.factorize(decoder), **TEXT)
    assert {v.name.split(".")[3] for v in proof.verdicts if not v.exact} == {"crossattention"}
    assert "these inputs do not reach it" in str(proof)


# -- all or nothing ----------------------------------------------------------------------------------


class Sneaky(tf.BertModel):
    """Reads a weight of its attention elsewhere, by name."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        value = self.encoder.layer[0].attention.self.value
        outputs.last_hidden_state = outputs.last_hidden_state @ value.weight
        return outputs


def test_a_product_that_another_module_reads_is_left_dense():
    model = randomised(Sneaky(tf.BertConfig(**BERT)))
    before = first_output(model, TEXT)
    plan = fnl_hf.planning.plan(model, fnl_hf.FNLConfig())
    assert [(skip.kind, skip.reason) for skip in plan.skipped] == [("ov", REFUTED)]
    fnl_hf.factorize(model)
    assert len(fnl_hf.factorizations(model)) == 3 and relative(first_output(model, TEXT), before) < 1e-4


@pytest.mark.parametrize("init", ["default", "spectral"])
def test_it_is_left_dense_where_its_factors_stay_what_they_are(init):
    """The check after writing would show nothing of a product in its old basis: of balanced factors, say."""
    balanced = fnl_hf.to_dense(fnl_hf.factorize(randomised(tf.BertModel(tf.BertConfig(**BERT)))))
    model = Sneaky(tf.BertConfig(**BERT))
    model.load_state_dict(balanced.state_dict(), strict=False)
    before = first_output(model, TEXT)
    fnl_hf.factorize(model, fnl_hf.FNLConfig(init=init))
    assert len(fnl_hf.factorizations(model)) == 3 and relative(first_output(model, TEXT), before) < 1e-4


def test_it_is_left_dense_where_a_family_takes_less_than_the_full_rank(monkeypatch):
    """Then the check after writing does not run, and planning has to look at the whole model."""
    real = fnl_hf.heads.HeadTarget.found
    monkeypatch.setattr(fnl_hf.heads.HeadTarget, "found", lambda *args: replace(real(*args), full_rank=None))
    model = randomised(Sneaky(tf.BertConfig(**BERT)))
    before = first_output(model, TEXT)
    fnl_hf.factorize(model)
    assert len(fnl_hf.factorizations(model)) == 3 and relative(first_output(model, TEXT), before) < 1e-4


@pytest.mark.parametrize("fill", [float("-inf"), float("nan"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("config", [fnl_hf.FNLConfig(), HALF])
def test_it_is_left_dense_where_a_mask_would_hide_the_change(fill, config):
    class Masked(Sneaky):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.last_hidden_state[..., :4] = fill
            return outputs

    model = randomised(Masked(tf.BertConfig(**BERT)))
    before = first_output(model, TEXT)
    fnl_hf.factorize(model, config)
    assert len(fnl_hf.factorizations(model)) == 3 and fnl_hf.verify(model, **TEXT)
    if config.is_full_rank():
        assert relative(first_output(model, TEXT)[..., 4:], before[..., 4:]) < 1e-4


def test_a_model_that_would_change_is_restored(monkeypatch):
    monkeypatch.setattr("fnl_hf.planning.refuted_by_the_whole", lambda *_: set())
    model = randomised(Sneaky(tf.BertConfig(**BERT)))
    state, before, text = copy.deepcopy(model.state_dict()), first_output(model, TEXT), repr(model)
    with pytest.raises(ValueError, match=r"Sneaky gives other outputs than before .*shape \(1, 9, 32\) differs"):
        fnl_hf.factorize(model)
    assert repr(model) == text and "quantization_config" not in model.config.to_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(first_output(model, TEXT), before)
    fnl_hf.factorize(model, check=False)
    assert relative(first_output(model, TEXT), before) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_check_allows_for_rounding(dtype):
    model, inputs = build("bert", dtype=dtype)
    fnl_hf.factorize(model)
    assert len(fnl_hf.factorizations(model)) == 4


def test_an_interruption_restores_structure_and_values():
    model = nn.Sequential(Attention(), nn.Linear(16, 2))
    state, text = copy.deepcopy(model.state_dict()), repr(model)
    (target, _) = fnl_hf.planning.plan(model, fnl_hf.FNLConfig()).targets
    with pytest.raises(KeyboardInterrupt), kept_on_error(model) as written:
        product = target.found(model)
        written.append((product, [factor.detach().clone() for factor in product.augmented()]))
        model[1], model.extra, model[0].num_heads = nn.Identity(), nn.Linear(2, 2), 5
        nn.init.zeros_(target.found(model).views[0].parameter)
        raise KeyboardInterrupt
    assert repr(model) == text and model[0].num_heads == 2 and "extra" not in vars(model)["_modules"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Drifting(tf.BertModel):
    """Gives something else in every forward."""

    forwards = 0

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        Drifting.forwards += 1
        outputs.last_hidden_state = outputs.last_hidden_state * 2.0**Drifting.forwards
        return outputs


@pytest.mark.parametrize("tied", [False, True])
def test_factors_that_are_tied_are_restored_too(tied, monkeypatch):
    """They are written once for each name: what is kept of the second is what the first one got."""
    monkeypatch.setattr("fnl_hf.checking.rounding_alone", lambda *_: 0.0)  # which is as large in a model that drifts
    model = randomised(Drifting(tf.BertConfig(**BERT)))
    one, other = (layer.attention for layer in model.encoder.layer)
    for name in ("self.query", "self.key", "self.value", "output.dense"):
        if tied:
            other.get_submodule(name).weight = one.get_submodule(name).weight
            other.get_submodule(name).bias = one.get_submodule(name).bias
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="gives other outputs than before"):
        fnl_hf.factorize(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_biases_that_are_cut_when_layers_are_installed_are_restored(monkeypatch):
    model = randomised(tf.DebertaModel(tf.DebertaConfig(**BERT)))
    state = copy.deepcopy(model.state_dict())
    monkeypatch.setattr("fnl_hf.patching.attach", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fnl_hf.factorize(model, HALF)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_proof_that_runs_out_of_memory_leaves_the_model_as_it_was(monkeypatch):
    model = fnl_hf.factorize(randomised(tf.BertModel(tf.BertConfig(**BERT))))
    state, real, calls = copy.deepcopy(model.state_dict()), fnl_hf.algebra.chain.change_basis, []

    def change_basis(*args):
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        return real(*args)

    monkeypatch.setattr("fnl_hf.algebra.chain.change_basis", change_basis)
    with pytest.raises(torch.OutOfMemoryError):
        fnl_hf.verify(model, **TEXT)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Merging(nn.Linear):
    """A layer with an adapter, as those of loralib are: evaluation mode merges it into the weight."""

    def __init__(self, width_in, width_out):
        super().__init__(width_in, width_out)
        self.down, self.up = nn.Parameter(torch.randn(2, width_in)), nn.Parameter(torch.randn(width_out, 2))
        self.merged, self.seen = False, []

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.up.data @ self.down.data
            self.merged = not mode
        return self

    def forward(self, x):
        self.seen.append(len(x))
        return super().forward(x) + (0 if self.merged else x @ self.down.mT @ self.up.mT)


@pytest.mark.parametrize("config", [fnl_hf.FNLConfig(), HALF])
def test_a_training_model_stays_one(config):
    """Its adapters unmerged, its scripted modules and its declarations in training mode, its lists as they were."""
    model = randomised(tf.BertModel(tf.BertConfig(**BERT)))
    for layer in model.encoder.layer:
        layer.intermediate.dense = Merging(32, 40)
    model.pooler.dense = torch.jit.script(nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5)))
    model.train()
    kept = [layer.intermediate.dense.weight.clone() for layer in model.encoder.layer]
    fnl_hf.factorize(model, config)
    assert len(fnl_hf.factorizations(model)) == 4
    assert all(module.training for module in model.modules())
    for layer, weight in zip(model.encoder.layer, kept, strict=True):
        assert torch.equal(layer.intermediate.dense.weight, weight) and not layer.intermediate.dense.seen
    fnl_hf.to_dense(model)
    fnl_hf.factorize(model.eval(), config)
    assert not any(module.training for module in model.modules())


def test_no_accelerator_is_seeded(monkeypatch):
    monkeypatch.setattr("torch.cuda.manual_seed_all", lambda seed: 1 / 0)
    fnl_hf.verify(fnl_hf.factorize(randomised(tf.BertModel(tf.BertConfig(**BERT)))), **TEXT)


def test_nobody_touches_the_random_generator():
    model, inputs = build("bert")
    state = torch.get_rng_state()
    fnl_hf.factorize(model, COMPACT, verify=inputs)
    fnl_hf.verify(model, **inputs)
    fnl_hf.summary(model)
    fnl_hf.to_dense(model)
    fnl_hf.factorize(model)
    assert torch.equal(torch.get_rng_state(), state)


WRAPPED = {
    "compiled": (lambda model: torch.compile(model), "is compiled: factorize what torch.compile was given"),
    "DataParallel": (lambda model: nn.DataParallel(model), "wrapped in DataParallel.*factorize model.module"),
    "inside": (lambda model: nn.Sequential(nn.DataParallel(model)), "^0 is wrapped in DataParallel"),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrapped_models_are_refused(wrapper):
    wrap, message = WRAPPED[wrapper]
    with pytest.raises(TypeError, match=message):
        fnl_hf.factorize(wrap(build("bert")[0]))


def test_models_with_adapters_are_refused():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(build("bert")[0], peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(TypeError, match="a layer with an adapter: factorize the model before"):
        fnl_hf.factorize(wrapped)
    with pytest.raises(TypeError, match="a layer with an adapter: factorize the model before"):
        fnl_hf.factorize(wrapped.base_model.model)
    fnl_hf.factorize(wrapped.unload())


def test_weights_that_are_not_in_memory_are_refused():
    with torch.device("meta"):
        model = tf.BertModel(tf.BertConfig(**BERT))
    with pytest.raises(ValueError, match="is on the meta device, so its values are not in memory"):
        fnl_hf.factorize(model)


def test_hooks_move_to_the_leaf_in_its_place_and_back():
    model, inputs = build("bert")
    seen = []
    handle = model.encoder.layer[0].attention.self.query.register_forward_hook(lambda *_: seen.append(1))
    fnl_hf.factorize(model, HALF)
    seen.clear()
    output(model, inputs)
    assert len(seen) == 1
    fnl_hf.to_dense(model)
    output(model, inputs)
    assert len(seen) == 2
    handle.remove()
    output(model, inputs)
    assert len(seen) == 2


class Gated(nn.Linear):
    """A linear layer with a state of its own, in which nothing shows yet."""

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return super().forward(x) * (1 + self.gate)


class Counting(nn.Linear):
    """And one with a plain attribute."""

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.calls = 0


@pytest.mark.parametrize("cls", [Gated, Counting])
def test_linear_layers_with_a_state_of_their_own_are_not_narrowed(cls):
    model = nn.Sequential(Attention())
    model[0].q_proj = cls(16, 16)
    fnl_hf.factorize(model, HALF)
    assert type(model[0].q_proj) is cls
    ranks = {product.kind: product.size()[1] for product in fnl_hf.factorizations(model)}
    assert ranks == {"qk": 8, "ov": 4}


def test_the_reason_says_what_to_pass():
    class Odd(Attention):
        def forward(self, hidden_states, secret):
            return super().forward(hidden_states) + secret.sum()

    model = nn.Sequential(Odd())
    with pytest.raises(ValueError, match=r"does not replay alone .*pass verify=example inputs"):
        fnl_hf.factorize(model)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Odd()

        def forward(self, x):
            return self.attention(x, torch.ones(2))

    model = Model()
    fnl_hf.factorize(model, verify={"x": torch.randn(1, 5, 16)})
    assert len(fnl_hf.factorizations(model)) == 2
    evidence = Evidence(model, {"x": torch.randn(1, 3, 16)}, {"attention.qk"})
    assert evidence.chosen([("attention.qk", "qk", lambda root: fnl_hf.factorizations(model)[0])])[0] is None


def test_verify_replays_equal_layers_once():
    """What a declaration was installed for has the name of its layer in it, which is no difference."""
    model, inputs = build("bert")
    fnl_hf.factorize(model, fnl_hf.FNLConfig())
    layers = [layer.attention for layer in model.encoder.layer]
    assert len(layers) == 2 and fingerprint(layers[0]) == fingerprint(layers[1])
    verdicts = fnl_hf.verify(model, **inputs)
    assert verdicts and len(verdicts.verdicts) == 4
