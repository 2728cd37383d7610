"""``init="functional"``: the closed form and its figures, the quadrature, and where a model has such layers."""

import copy
import json
import math

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import fnl_hf
from fnl_hf.algebra import spectral
from fnl_hf.algebra.functional import approximation, gradient, optimise, rescale, risk, risks
from fnl_hf.algebra.gaussian import ACTIVATIONS, Smooth, arc_cosine
from fnl_hf.cli import main
from fnl_hf.layers.activations import activations, kind_of
from fnl_hf.layers.target import LayerTarget
from tests.families import build
from tests.script_runs import run_script
from tests.test_activation import narrow_data, tiny_tokenizer

ROOTS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}
W = torch.tensor([[1, 2, 0], [0, 1, -1], [3, 0, 4]], dtype=torch.float64)
Y = torch.tensor([[1, 1, 0], [1, 0, -1], [0, 0, 5]], dtype=torch.float64)
# Standard normal W (seed 1): risk / (½ ‖W‖²) of spectral factors, after the row rescale, after L-BFGS
TABLE = {
    (64, 32, 2): (0.750306, 0.717728, 0.716247),
    (64, 32, 8): (0.435503, 0.431649, 0.431598),
    (256, 128, 4): (0.814169, 0.775503, 0.774754),
    (256, 128, 16): (0.604191, 0.594120, 0.594079),
    (256, 128, 64): (0.187489, 0.187345, 0.187320),
    (512, 128, 16): (0.653847, 0.639850, 0.639788),
}


def normal(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spectral_space(matrix, rank):
    return torch.linalg.svd(matrix, full_matrices=False)[2][..., :rank, :]


def sampled(matrix, product, function, count=400_000, root=None):
    """Monte Carlo: (E‖σ(Wx) − σ(Yx)‖², its standard error)."""
    x = normal(count, matrix.shape[1], seed=7)
    x = x if root is None else x @ root
    values = (function(x @ matrix.T) - function(x @ product.T)).square().sum(-1)
    return float(values.mean()), float(values.std()) / count**0.5


# -- the closed form ----------------------------------------------------------------------------------


def test_the_vector():
    one = torch.eye(3, dtype=torch.float64)
    assert float(risk(W, Y, one, "relu")) == pytest.approx(5.5929507000022625, rel=1e-14)
    assert_close(
        risks(W, Y, one, "relu"), torch.tensor([0.48893926086491035, 0.7820044379115416, 4.32200700122581]).double()
    )
    expected = torch.tensor(
        [
            [-0.056738560742328525, -0.954322178392762, 0.0],
            [0.724335552289104, -0.6666666666666666, -0.05766888562243733],
            [-2.3855017059025996, 0.0, 0.8644014002451614],
        ],
        dtype=torch.float64,
    )
    of_left, of_right = gradient(W, Y, one, "relu")
    assert_close(of_left, expected)
    assert_close(of_right, Y.T @ expected)  # of Vᵀ where U = Y
    mean, error = sampled(W, Y, F.relu)
    assert abs(mean - 5.5929507000022625) < 4 * error
    cosines = torch.tensor([-1, 0, 0.5, 1], dtype=torch.float64)
    assert_close(arc_cosine(cosines), torch.tensor([0, 1 / math.pi, 0.6089977810442295, 1]).double())


@pytest.mark.parametrize("size", TABLE, ids=str)
def test_the_table(size):
    *shape, rank = size
    weight = normal(*shape)
    whole = float(weight.square().sum()) / 2
    start = rescale(weight, spectral_space(weight, rank), "relu")
    found = spectral.of_matrix(weight, rank), start, optimise(weight, *start, "relu", steps=200)
    reached = [float(risk(weight, *pair, "relu")) / whole for pair in found]
    assert reached == pytest.approx(TABLE[size], abs=6e-7)
    few = float(risk(weight, *approximation(weight, rank, "relu"), "relu")) / whole
    assert reached[2] - 1e-7 < few < reached[1]
    assert float(risk(weight, *approximation(weight, rank, "relu", steps=0), "relu")) / whole == pytest.approx(
        reached[1], abs=1e-9
    )


def test_the_closed_form_is_the_mean_over_inputs():
    weight = normal(12, 7)
    left, right = normal(12, 3, seed=2), normal(3, 7, seed=3)
    mean, error = sampled(weight, left @ right, F.relu)
    assert abs(mean - float(risk(weight, left, right, "relu"))) < 4 * error


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_finite_differences(activation):
    weight, left, right = 0.4 * normal(6, 5), 0.5 * normal(6, 2, seed=2), 0.5 * normal(2, 5, seed=3)
    assert torch.autograd.gradcheck(
        _Risk.apply, (weight, left.requires_grad_(), right.requires_grad_(), activation), eps=1e-5, atol=1e-7
    )


class _Risk(torch.autograd.Function):
    @staticmethod
    def forward(context, weight, left, right, activation):
        context.given = weight, left, right, activation
        return risk(weight, left, right, activation)

    @staticmethod
    def backward(context, of_value):
        of_left, of_right = gradient(*context.given)
        return None, of_value * of_left, of_value * of_right, None


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_parallel_and_empty_rows_have_finite_gradients(activation):
    weight = normal(5, 4)
    left = torch.stack([weight[0], -2 * weight[1], 0 * weight[2], weight[3], weight[4]])
    weight[3:] = 0
    left[4] = 0
    one = torch.eye(4, dtype=torch.float64)
    of_left, of_right = gradient(weight, left, one, activation)
    assert of_left.isfinite().all() and of_right.isfinite().all()
    assert_close(of_left[0], torch.zeros(4).double(), atol=1e-6, rtol=0)  # there it is best
    assert of_left[4].eq(0).all() and float(risks(weight, left, one, activation)[0]) == pytest.approx(0, abs=1e-10)


# -- rescaling, and what may not change ---------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_the_rescaled_rows_are_the_best_ones_of_the_row_space(activation):
    weight = 0.3 * normal(10, 8)
    space = spectral_space(weight, 3)
    left, right = rescale(weight, space, activation)
    reached = float(risk(weight, left, right, activation))
    of_left, _ = gradient(weight, left, right, activation)
    assert of_left.abs().max() < 1e-5 * weight.norm()
    for seed in range(4):
        other = (left + 0.1 * normal(10, 3, seed=seed)).requires_grad_()
        optimizer = torch.optim.LBFGS([other], max_iter=200, tolerance_change=1e-14, line_search_fn="strong_wolfe")

        def closure(other=other):
            value, other.grad = risk(weight, other, right, activation), gradient(weight, other, right, activation)[0]
            return value.detach()

        optimizer.step(closure)
        assert float(risk(weight, other, right, activation).detach()) >= reached * (1 - 1e-7)


def test_the_rescaled_rows_in_closed_form():
    weight = normal(9, 6)
    space = spectral_space(weight, 2)
    left, right = rescale(weight, space, "relu")
    inside = weight @ space.T
    rho = inside.norm(dim=-1) / weight.norm(dim=-1)
    assert_close(left @ right, inside @ space * (arc_cosine(rho) / rho)[:, None])
    expected = 0.5 * (weight.square().sum(-1) * (1 - arc_cosine(rho).square())).sum()
    assert_close(risk(weight, left, right, "relu"), expected)
    assert (left.norm(dim=-1) > inside.norm(dim=-1)).all()


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_rotations_of_inputs_and_orders_of_rows_change_nothing(activation):
    weight = 0.3 * normal(9, 6)
    rotation = torch.linalg.qr(normal(6, 6, seed=4))[0]
    order = torch.randperm(9)
    left, right = approximation(weight, 2, activation)
    reached = float(risk(weight, left, right, activation))
    turned = approximation((weight @ rotation)[order], 2, activation)
    assert float(risk((weight @ rotation)[order], *turned, activation)) == pytest.approx(reached, rel=1e-6)
    gauge = normal(2, 2, seed=5)
    changed = risk(weight, left @ gauge, torch.linalg.inv(gauge) @ right, activation)
    assert float(changed) == pytest.approx(reached, rel=1e-9)


def test_relu_is_homogeneous():
    weight = normal(9, 6)
    for scale in (1e-4, 1e4):
        left, right = approximation(scale * weight, 2, "relu")
        assert float(risk(scale * weight, left, right, "relu")) / scale**2 == pytest.approx(
            float(risk(weight, *approximation(weight, 2, "relu"), "relu")), rel=1e-6
        )


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_never_worse_than_spectral(activation):
    for seed, rank in ((1, 1), (2, 3), (3, 5)):
        for weight in (normal(7, 6, seed=seed), normal(6, 9, seed=seed) * torch.logspace(0, -3, 9).double()):
            values = [float(risk(weight, *p, activation)) for p in (
                approximation(weight, rank, activation), approximation(weight, rank, activation, steps=0),
                spectral.of_matrix(weight, rank),
            )]  # fmt: skip
            assert values == sorted(values)
    weight = normal(7, 3) @ normal(3, 6)  # of rank three: the function is met
    assert float(risk(weight, *approximation(weight, 3, activation), activation)) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_zeros_batches_and_half_precision(dtype):
    weight = normal(2, 8, 6).to(dtype)
    weight[0, 3] = 0
    left, right = approximation(weight, 2, "relu")
    assert left.shape == (2, 8, 2) and right.shape == (2, 2, 6) and left.dtype == torch.float64
    assert left[0, 3].eq(0).all() and left.isfinite().all() and right.isfinite().all()
    same = approximation(weight.float(), 2, "relu")
    assert_close(left @ right, same[0] @ same[1])  # the row space is none of half precision
    each = [float(risk(one, *approximation(one, 2, "relu"), "relu")) for one in weight]
    assert float(risk(weight, left, right, "relu")) == pytest.approx(sum(each), rel=1e-3)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("rank_of_inputs", [6, 4])
def test_the_covariance_of_inputs(activation, rank_of_inputs):
    weight, x = 0.4 * normal(9, 6), normal(50, rank_of_inputs, seed=3) @ normal(rank_of_inputs, 6, seed=4)
    columns = x.T @ x / 50
    left, right = approximation(weight, 2, activation, columns)
    values, vectors = torch.linalg.eigh(columns)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    reached = float(risk(weight @ root, left, right @ root, activation))
    mean, error = sampled(weight, left @ right, ROOTS[activation], root=root)
    assert abs(mean - reached) < 4 * error
    for other in (approximation(weight, 2, activation), spectral.of_matrix(weight, 2)):
        assert reached < 0.95 * float(risk(weight @ root, other[0], other[1] @ root, activation))


@pytest.mark.parametrize(("rank", "activation"), [(0, "relu"), (6, "relu"), (2, "tanh")])
def test_what_there_is_no_approximation_of(rank, activation):
    with pytest.raises(ValueError, match="expected 1..5" if activation == "relu" else "expected one of .*'gelu'"):
        approximation(normal(8, 6), rank, activation)


# -- quadrature ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_the_quadrature_is_the_mean_over_inputs(activation):
    for scale in (0.1, 0.4, 1.2):
        weight = scale * normal(6, 5)
        left, right = scale**0.5 * normal(6, 2, seed=2), scale**0.5 * normal(2, 5, seed=3)
        mean, error = sampled(weight, left @ right, ROOTS[activation])
        assert abs(mean - float(risk(weight, left, right, activation))) < 4 * error + 1e-3 * mean


def test_the_quadrature_of_relu_is_its_closed_form():
    by_nodes = Smooth(lambda x: (F.relu(x), x.gt(0).to(x), torch.zeros_like(x)), nodes=96)
    p, s = torch.tensor([1.0, 2, 3]).double(), torch.tensor([2.0, 1, 9]).double()
    c = torch.tensor([0.7, -0.5, 5]).double()
    exact, found = ACTIVATIONS["relu"].terms(p, s, c), by_nodes.terms(p, s, c)
    assert_close(found.risk, exact.risk, rtol=1e-2, atol=0)
    assert_close(found.by_product, exact.by_product, rtol=3e-2, atol=0)
    # and what approaches it: softplus(βx)/β
    sharp = Smooth(
        lambda x: (F.softplus(x, 40.0), torch.sigmoid(40 * x), 40 * torch.sigmoid(40 * x) * torch.sigmoid(-40 * x)),
        nodes=160,
    )
    assert_close(sharp.terms(p, s, c).risk, exact.risk, rtol=1e-2, atol=0)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "silu"])
def test_derivatives_of_activations(activation):
    x = torch.linspace(-5, 5, 101, dtype=torch.float64, requires_grad=True)
    function = ROOTS.get(activation, lambda x: x * torch.sigmoid(1.702 * x))
    value = function(x)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    for found, expected in zip(ACTIVATIONS[activation].derivatives(x.detach()), (value, slope, curvature), strict=True):
        assert_close(found, expected.detach())


# -- models: where the layers are ---------------------------------------------------------------------

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}
LLAMA = {**BERT, "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BART = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_ffn_dim": 40,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 40, "vocab_size": 50, "max_position_embeddings": 40,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 1, "num_heads": 4, "vocab_size": 50}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 2}
HEAD = "cls.predictions.transform.dense"

# name -> (how it is made, what is followed, by what)
MODELS = {
    "bert": (
        lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT)),
        ["bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.1.intermediate.dense", HEAD], "gelu",
    ),
    "bert with relu": (
        lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT, hidden_act="relu")),
        ["bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.1.intermediate.dense", HEAD], "relu",
    ),
    "llama": (
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)),
        ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"], "silu",
    ),
    "t5": (
        lambda: tf.T5Model(tf.T5Config(**T5, decoder_start_token_id=0)),
        ["encoder.block.0.layer.1.DenseReluDense.wi", "decoder.block.0.layer.2.DenseReluDense.wi"], "relu",
    ),
    "gated t5": (
        lambda: tf.T5Model(tf.T5Config(**T5, decoder_start_token_id=0, feed_forward_proj="gated-gelu")),
        ["encoder.block.0.layer.1.DenseReluDense.wi_0", "decoder.block.0.layer.2.DenseReluDense.wi_0"], "gelu_tanh",
    ),
    "gpt2": (
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
        ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"], "gelu_tanh",
    ),
    "marian": (
        lambda: tf.MarianMTModel(tf.MarianConfig(**BART, activation_function="relu")),
        ["model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1", "model.decoder.layers.1.fc1"], "relu",
    ),
    "marian with swish": (
        lambda: tf.MarianMTModel(tf.MarianConfig(**BART, activation_function="swish")),
        ["model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1", "model.decoder.layers.1.fc1"], "silu",
    ),
    "clip": (
        lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(
            **{k: BERT[k] for k in list(BERT)[:4]}, image_size=8, patch_size=4
        )),
        ["encoder.layers.0.mlp.fc1", "encoder.layers.1.mlp.fc1"], "quick_gelu",
    ),
}  # fmt: skip


def config(**settings):
    return fnl_hf.FNLConfig(
        init="functional", **{"attention": (), "target_modules": "all-linear", "rank": 0.25} | settings
    )


def followed(model):
    stored = fnl_hf.attachment.attached(model)
    targets = fnl_hf.plan.Plan.of(stored).targets
    return {target.name: target.followed_by for target in targets if target.followed_by}


def test_names_go_by_the_config_of_the_part_that_they_are_in():
    """GIT's text model has GELU, its vision model quick GELU."""
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 1}
    parts = tf.GitConfig(vision_config={**small, "image_size": 8, "patch_size": 4}, vocab_size=50, **small)
    model = tf.GitModel(parts)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    found = activations(model, names, None)
    kinds = {"intermediate.dense": "gelu", "mlp.fc1": "quick_gelu"}
    assert found == {name: kind for name in names for end, kind in kinds.items() if name.endswith(end)}
    assert len(found) == len(kinds)


@pytest.mark.parametrize("name", MODELS)
def test_the_layers_before_an_activation_are_found(name, tmp_path, capsys):
    make, names, kind = MODELS[name]
    model = make().eval()
    dense = copy.deepcopy(model)
    by_name = activations(dense, [n for n, m in dense.named_modules() if hasattr(m, "weight")], None)
    assert by_name == dict.fromkeys(names, kind)  # where no forward can tell
    fnl_hf.factorize(model, config())
    assert followed(model) == dict.fromkeys(names, kind)
    assert f"functional for {kind}: " in capsys.readouterr().err
    spectrals = fnl_hf.factorize(
        copy.deepcopy(dense), fnl_hf.FNLConfig(attention=(), target_modules="all-linear", rank=0.25)
    )
    pairs = zip(fnl_hf.factorizations(model), fnl_hf.factorizations(spectrals), strict=True)
    for ours, other in pairs:
        if ours.name not in names:
            assert torch.equal(ours.matrix(), other.matrix())
            continue
        weight = dense.get_submodule(ours.name).weight.detach()
        weight = weight.T if isinstance(dense.get_submodule(ours.name), tf.pytorch_utils.Conv1D) else weight
        one = torch.eye(weight.shape[1])
        reached, before = (float(risk(weight, p.matrix()[0].detach(), one, kind)) for p in (ours, other))
        assert reached < before
        left, right = (factor[0].detach().double() for factor in ours.factors())
        assert_close(left.T @ left, right @ right.T, rtol=1e-4, atol=1e-6)  # balanced
    summary = str(fnl_hf.summary(model))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert str(fnl_hf.summary(loaded)) == summary and f"functional for {kind}: {names[0].split('.0.')[0]}" in summary
    assert "spectral for all others" in summary
    assert followed(loaded) == followed(model)


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart", "t5"])
def test_at_full_rank_nothing_changes(family):
    model, inputs = build(family)
    other = copy.deepcopy(model)
    fnl_hf.factorize(model, config(rank=1.0, attention=("qk", "ov")))
    settings = {"attention": ("qk", "ov"), "target_modules": "all-linear"}
    fnl_hf.factorize(other, fnl_hf.FNLConfig(**settings))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert "spectral everywhere" in str(fnl_hf.summary(model))


def test_a_layer_counts_only_if_all_its_outputs_go_there():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("always", "once", "both", "summed", "sliced", "squared", "inplace", "reshaped", "unseen"):
                setattr(self, name, nn.Linear(6, 6))
            self.identity, self.relu, self.in_place, self.relu6 = nn.Identity(), nn.ReLU(), nn.ReLU(True), nn.ReLU6()

        def forward(self, x):
            x = torch.relu(self.always(self.relu(self.always(x))))
            x = self.once(F.relu(self.once(x)))
            y = self.both(x)
            x = self.relu(y) + F.silu(y)
            x = F.relu(self.summed(x) + 1)
            x = F.relu(self.sliced(x)[..., :3]).repeat(1, 1, 2)
            x = self.relu6(self.squared(x))
            x = self.in_place(self.inplace(x))
            return self.identity(self.reshaped(x)).flatten(0, 1).relu()

    model = Odd()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    found = activations(model, names, {"x": torch.randn(2, 3, 6)})
    assert found == dict.fromkeys(("always", "inplace", "reshaped"), "relu")
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_what_an_activation_is_shows_in_its_values():
    known = {
        "relu": nn.ReLU(), "gelu": tf.activations.ACT2FN["gelu_python"], "gelu_tanh": tf.activations.ACT2FN["gelu_new"],
        "silu": nn.SiLU(), "quick_gelu": tf.activations.ACT2FN["quick_gelu"], "nothing": nn.Dropout().eval(),
        "other": nn.Tanh(),
    }  # fmt: skip
    assert {name: kind_of(function) for name, function in known.items()} == {name: name for name in known}
    assert kind_of(nn.Linear(3, 3)) == "other"


def test_tied_layers_and_deep_ones():
    model = MODELS["marian"][0]()
    model.model.decoder.layers[1].fc1.weight = model.model.decoder.layers[0].fc1.weight
    fnl_hf.factorize(model, config(form="deep"))
    assert len(followed(model)) == 3
    product = next(p for p in fnl_hf.factorizations(model) if p.name == "model.decoder.layers.0.fc1")
    assert len(product.factors()) == 3
    layers = model.model.decoder.layers
    assert layers[0].fc1.stored("weight") is layers[1].fc1.stored("weight")


def test_half_precision_and_ranks_by_energy():
    model = MODELS["bert with relu"][0]().bfloat16()
    fnl_hf.factorize(model, config(rank={"energy": 0.5}))
    assert all(parameter.isfinite().all() and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert len(followed(model)) == 3


def test_calibration_is_welcome_and_not_needed(capsys):
    model, batches = MODELS["bert with relu"][0]().eval(), narrow_data(None)
    plain = fnl_hf.factorize(copy.deepcopy(model), config())
    by_data = fnl_hf.factorize(copy.deepcopy(model), config(), calibration=batches)
    names = followed(by_data)
    assert names == followed(plain)
    for name in names:
        x = inputs_of(model, batches, name)
        weight = model.get_submodule(name).weight.detach()
        wanted = F.relu(x @ weight.T)
        errors = [
            float((F.relu(x @ m.get_submodule(name).weight.detach().T) - wanted).square().sum())
            for m in (by_data, plain)
        ]
        assert errors[0] < errors[1], name
    for one, other in zip(fnl_hf.factorizations(by_data), fnl_hf.factorizations(plain), strict=True):
        assert (one.name in names) != torch.equal(one.matrix(), other.matrix())
    capsys.readouterr()
    model = MODELS["marian"][0]().eval()
    model.forward = lambda input_ids: model.model.encoder(input_ids)
    fnl_hf.factorize(model, config(), calibration=[{"input_ids": torch.tensor([[5, 6, 7]])}], check=False)
    told = capsys.readouterr().err
    assert "calibration does not reach model.decoder.layers.0.fc1, model.decoder.layers.1.fc1: standard normal" in told


def inputs_of(model, batches, name):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return torch.cat([x.flatten(0, -2) for x in seen])


def test_a_dense_checkpoint_is_factorized_while_loading(tmp_path):
    model = MODELS["llama"][0]()
    model.save_pretrained(tmp_path)
    loaded = tf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config())
    fnl_hf.factorize(model, config())
    assert followed(loaded) == followed(model) and len(followed(model)) == 2
    for one, other in zip(fnl_hf.factorizations(loaded), fnl_hf.factorizations(model), strict=True):
        assert_close(one.matrix(), other.matrix())


def test_heads_alone_stay_spectral_and_it_says_so(capsys):
    model, _ = build("bert")
    fnl_hf.factorize(model, fnl_hf.FNLConfig(init="functional", head_rank=0.5))
    assert "functional: spectral everywhere, since no layer of reduced rank" in capsys.readouterr().err


def test_plans_of_earlier_versions_and_damaged_ones(tmp_path):
    model = MODELS["llama"][0]()
    fnl_hf.factorize(model, config())
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    for target in stored["quantization_config"]["plan"]["targets"]:
        del target["followed_by"]
    path.write_text(json.dumps(stored))
    assert followed(type(model).from_pretrained(tmp_path)) == {}
    flaw = LayerTarget("a", "linear", 2, followed_by="tanh").flaw()
    assert flaw.startswith("followed_by is 'tanh', expected one of ['gelu'")


def test_the_command(tmp_path, capsys):
    model = MODELS["bert with relu"][0]()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path).save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("a b c d e\nb c a\n" * 20)
    command = ["factorize", str(tmp_path / "model"), "--target_modules", "all-linear", "--rank", "0.25"]
    command += ["--attention", "none", "--init", "functional"]
    assert main([*command, str(tmp_path / "plain")]) == 0
    assert main([*command, str(tmp_path / "data"), "--calibration", str(tmp_path / "texts.txt")]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "data")]) == 0
    assert f"functional for relu: bert.encoder.layer.*.intermediate.dense (2), {HEAD}" in capsys.readouterr().out
    weights = [
        next(tf.BertForMaskedLM.from_pretrained(tmp_path / name).bert.encoder.layer[0].intermediate.dense.parameters())
        for name in ("plain", "data")
    ]
    assert not torch.equal(*weights)


def test_the_script_pretrains_a_bert_with_relu_from_functional_factors(monkeypatch, tmp_path):
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten\n" * 60)
    data = {"train_file": tmp_path / "text.txt", "vocab_size": 60, "max_seq_length": 16, "max_steps": 2}
    model = {"model_type": "bert", "size": "tiny", "activation": "relu", "fnl_optim": "none", "learning_rate": 1e-3}
    layers = {"attention": "none", "target_modules": "all-linear", "rank": 0.125, "init": "functional"}
    rest = {"per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none", "output_dir": tmp_path / "out"}
    run_script(monkeypatch, "run_mlm.py", **data, **model, **layers, **rest)
    loaded = tf.BertForMaskedLM.from_pretrained(tmp_path / "out")
    assert followed(loaded) == dict.fromkeys(MODELS["bert"][1], "relu")


def test_the_script_that_measures_distances(monkeypatch, tmp_path, capsys):
    options = {"models": "marian", "ranks": 0.0625, "seeds": [1, 2], "json": tmp_path / "figures.json"}
    run_script(monkeypatch, "benchmark_functional.py", **options)
    (row,) = json.loads((tmp_path / "figures.json").read_text())["rows"]
    for figures in row["seeds"].values():
        lost = [figures[f"layers, {way}"] for way in ("functional", "rescaled", "spectral")]
        assert lost == sorted(lost) and 0.7 < lost[0] < lost[2] < 0.76
        assert figures["model, functional"] < figures["model, spectral"]
    assert "| marian | 0.0625 | 0.74" in capsys.readouterr().out
