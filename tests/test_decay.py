"""Frobenius decay through a model's own parameters, coupled and decoupled."""

import pytest
import torch
import transformers as tf
from torch.testing import assert_close

import fnl_hf
from fnl_hf.decay import decay_step, decay_terms
from fnl_hf.heads import HeadProduct, HeadSlice
from fnl_hf.optim import NAG, Lamb
from tests.families import BERT, FAMILIES, build

# An integer vector: d = 3, two heads of width 2.
Q = [[1, 0, 2], [0, 1, 1], [1, 1, 0], [2, 0, -1]]
K = [[1, 1, 0], [0, 1, -1], [1, 0, 1], [0, 2, 1]]
V = [[1, 0, 0], [1, 1, 1], [0, 1, 2], [1, 0, 1]]
O = [[1, 0, 1, 1], [0, 2, 1, 0], [1, 1, 0, 1]]

# Optimizer vectors: W = U Vᵀ as one "head", gradient of the data loss G V and Gᵀ U, lr 0.1, λ 0.01.
U2 = torch.tensor([[1, 2], [0, 1], [3, -1]], dtype=torch.float64)
V2 = torch.tensor([[1, 0], [2, 1], [0, -1], [1, 1]], dtype=torch.float64)
G = torch.tensor([[1, 0, -1, 2], [0, 1, 1, 0], [2, -1, 0, 1]], dtype=torch.float64)


class OneProduct(torch.nn.Module):
    """U Vᵀ declared as an O/V product of one head."""

    def __init__(self):
        super().__init__()
        self.u, self.v = torch.nn.Linear(2, 3, bias=False).double(), torch.nn.Linear(4, 2, bias=False).double()
        self.u.weight.data, self.v.weight.data = U2.clone(), V2.mT.contiguous()
        self.u.weight.grad, self.v.weight.grad = G @ V2, (G.mT @ U2).mT.contiguous()
        self.ov = HeadProduct(
            "ov", HeadSlice("u.weight", None, "in", (1,), 2), HeadSlice("v.weight", None, "out", (1,), 2), head_dim=2
        )


def test_integer_vectors_of_multi_head_attention():
    from torch import nn

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = 2
            for name, values in (("q", Q), ("k", K), ("v", V), ("o", O)):
                rows, columns = len(values), len(values[0])
                leaf = nn.Linear(columns, rows, bias=False).double()
                leaf.weight.data = torch.tensor(values, dtype=torch.float64)
                setattr(self, name, leaf)

        def forward(self, hidden_states):
            q, k, v = (p(hidden_states).unflatten(-1, (2, 2)).transpose(1, 2) for p in (self.q, self.k, self.v))
            return self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(-2))

    model = fnl_hf.factorize(Attention(), fnl_hf.FNLConfig(init="default"))
    assert {f.kind: f.squared_norm().item() for f in fnl_hf.factorizations(model)} == {"qk": 51, "ov": 37}
    fnl_hf.frobenius_decay_(model, 1.0)
    assert model.q.weight.grad.tolist() == [[2, 1, 5], [1, 2, 4], [4, 2, -1], [11, 1, -5]]
    assert model.k.weight.grad.tolist() == [[5, 7, -2], [2, 4, -2], [2, 4, 4], [2, 10, 7]]
    assert model.v.weight.grad.tolist() == [[3, 1, 1], [6, 5, 5], [1, 2, 5], [2, 1, 4]]
    assert model.o.weight.grad.tolist() == [[1, 1, 7, 4], [2, 6, 5, 2], [2, 4, 2, 2]]


@pytest.mark.parametrize("head_rank", [1.0, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_dense_penalty(family, head_rank):
    model, _ = build(family, seed=1, dtype=torch.float64)
    fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=head_rank))
    penalty = sum(f.matrix().square().sum() for f in fnl_hf.factorizations(model)) / 2
    penalty.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    before = {name: torch.randn_like(p) for name, p in model.named_parameters() if name in expected}
    for name, p in model.named_parameters():
        p.grad = before[name].clone() if name in before else None
    fnl_hf.frobenius_decay_(model, 0.25)
    for name, p in model.named_parameters():
        if name in expected:
            added = p.grad - before[name]
            assert (added - 0.25 * expected[name]).norm() <= 1e-10 * (0.25 * expected[name]).norm()
        else:
            assert p.grad is None


def test_frozen_factors_are_left_alone():
    model, _ = build("bert")
    fnl_hf.factorize(model, fnl_hf.FNLConfig())
    layer = model.encoder.layer[0].attention.self
    layer.query.weight.requires_grad_(False)
    fnl_hf.frobenius_decay_(model, 0.1)
    assert layer.query.weight.grad is None and layer.key.weight.grad is not None


def test_kinds_select():
    model, _ = build("bert")
    fnl_hf.factorize(model, fnl_hf.FNLConfig())
    fnl_hf.frobenius_decay_(model, 0.1, kinds=["ov"])
    attention = model.encoder.layer[0].attention
    assert attention.self.query.weight.grad is None and attention.self.value.weight.grad is not None
    with pytest.raises(ValueError, match=r"kind 'conv'; the model has \['ov', 'qk'\]"):
        fnl_hf.frobenius_decay_(model, 0.1, kinds=["conv"])


@pytest.mark.parametrize("coefficient", [-0.1, float("nan"), float("inf")])
def test_bad_coefficients(coefficient):
    with pytest.raises(ValueError, match="expected a finite number of at least 0"):
        fnl_hf.frobenius_decay_(OneProduct(), coefficient)


def test_coupled_sgd_vector():
    model = OneProduct()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fnl_hf.frobenius_decay_(model, 0.01)
    optimizer.step()
    expected = torch.tensor([[0.688, 1.691], [-0.203, 0.997], [2.885, -1.006]], dtype=torch.float64)
    assert_close(model.u.weight.data, expected, rtol=0, atol=1e-12)
    expected = torch.tensor([[0.29, 0.001], [2.281, 0.796], [0.099, -0.894], [0.491, 0.695]], dtype=torch.float64)
    assert_close(model.v.weight.data.mT, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_decoupled_adamw_vector(fused):
    model = OneProduct()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, eps=1e-6, weight_decay=0.0, fused=fused)
    optimizer.register_step_pre_hook(lambda opt, *_: decay_step(fnl_hf.factorizations(model), opt, 0.01))
    optimizer.step()
    expected = [
        [0.8880000333333222, 1.8910000333333223], [-0.102999950000025, 0.997], [2.8850000998999997, -1.006],
    ]  # fmt: skip
    assert_close(model.u.weight.data, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
    expected = [
        [0.8900000142857123, 0.001], [2.0809999666666776, 0.896000049999975],
        [0.0989999000001, -0.8940000999999], [0.891000019999996, 0.8950000333333222],
    ]  # fmt: skip
    assert_close(model.v.weight.data.mT, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def test_flambe_and_lamb_vectors():
    expected = [
        [0.7961613413392211, 1.8016213070354812], [-0.1874587312388811, 0.9945400343037399],
        [2.79070149697537, -1.0109199313925201],
    ]  # fmt: skip
    model = OneProduct()
    flambe = Lamb(model.parameters(), lr=0.1, eps=1e-6)
    flambe.frobenius = lambda: decay_terms(fnl_hf.factorizations(model), 0.01)
    flambe.step()
    assert_close(model.u.weight.data, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
    expected = [
        [0.8782121547575726, 0.001107162373263913], [2.089680115328977, 0.884855168538644],
        [0.10960896423700078, -0.8826408991501519], [0.8793193234574765, 0.8837479877126893],
    ]  # fmt: skip
    assert_close(model.v.weight.data.mT, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
    expected = [
        [0.8010020815589, 1.7990318044884348], [-0.1970276085327111, 0.9980297229295348],
        [2.797061658769599, -0.9980297229295348],
    ]  # fmt: skip
    model = OneProduct()
    Lamb(model.parameters(), lr=0.1, eps=1e-6, weight_decay=0.01).step()
    assert_close(model.u.weight.data, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def test_nag_is_torchs_nesterov_at_a_constant_rate_and_rescales_its_velocity():
    start, gradients = torch.randn(4).double(), torch.randn(5, 4).double()
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    nag = NAG([ours], lr=0.1, momentum=0.9)
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, nesterov=True)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        nag.step()
        sgd.step()
    assert_close(ours, theirs)
    velocity = nag.state[ours]["velocity"].clone()
    nag.param_groups[0]["lr"], ours.grad = 0.05, torch.zeros(4).double()
    nag.step()
    assert_close(nag.state[ours]["velocity"], 0.9 * 0.5 * velocity)


def test_balanced_singular_values_shrink_by_the_closed_form():
    model = OneProduct()
    (product,) = fnl_hf.factorizations(model)
    left, right = product.form.balance(product.factors())
    model.u.weight.data, model.v.weight.data = left[0], right[0]
    (product,) = fnl_hf.factorizations(model)
    sigma = product.form.singular_values(product.factors())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    decay_step([product], optimizer, 0.01)
    assert_close(product.form.singular_values(product.factors()), sigma * (1 - 0.01 * sigma) ** 2)


def test_a_step_that_fp16_scaling_skips_decays_nothing():
    model = OneProduct()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = model.u.weight.detach().clone()
    optimizer.found_inf = torch.tensor(1.0)
    decay_step(fnl_hf.factorizations(model), optimizer, 0.01)
    assert torch.equal(model.u.weight, before)
    optimizer.found_inf = torch.tensor(0.0)
    decay_step(fnl_hf.factorizations(model), optimizer, 0.01)
    assert not torch.equal(model.u.weight, before)


def test_an_unstable_step_is_refused_before_it_happens():
    model = OneProduct()
    before = model.u.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="lower frobenius_decay or learning_rate"):
        decay_step(fnl_hf.factorizations(model), torch.optim.SGD(model.parameters(), lr=1.0), 0.2)
    assert torch.equal(model.u.weight, before)


def test_a_weight_in_two_products_steps_from_its_old_value():
    """Keys that serve as values too (one parameter, two products): both terms are of the factors before the step."""
    model = fnl_hf.factorize(tf.BertModel(tf.BertConfig(**BERT)), fnl_hf.FNLConfig(init="default")).double()
    layer = model.encoder.layer[0].attention.self
    layer.value.weight = layer.key.weight
    for parameter in model.parameters():
        parameter.data.mul_(5)
    products = fnl_hf.factorizations(model)
    penalty = sum(f.matrix().square().sum() for f in products) / 2
    parameters = list({p: None for f in products for p in f.parameters()})
    gradients = torch.autograd.grad(penalty, parameters)
    expected = [(p - 0.01 * 0.5 * g).detach() for p, g in zip(parameters, gradients, strict=True)]
    decay_step(products, torch.optim.SGD(model.parameters(), lr=0.01), 0.5)
    for parameter, value in zip(parameters, expected, strict=True):
        assert_close(parameter.detach(), value, rtol=1e-10, atol=1e-12)
