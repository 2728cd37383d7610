"""The rotary form and grouped heads: against Monte Carlo over phases, autograd, and scores that must not move."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaModel

import fnl_hf
from fnl_hf.algebra import rotary
from fnl_hf.heads import HeadProduct, HeadSlice, RotaryLayout
from tests.families import output

IDS = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 2]])}


def llama(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(**{
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "intermediate_size": 40, "vocab_size": 50, "attention_bias": True, "bos_token_id": 0, "eos_token_id": 1,
        **changes,
    })  # fmt: skip
    model = LlamaModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.to(dtype)


def one_head(layout, d=6, width=8, groups=((1,), (1,))):
    """A module with one rotary product of random factors, float64."""
    module = torch.nn.Module()
    for name, heads in (("q", groups[0]), ("k", groups[1])):
        setattr(module, name, torch.nn.Linear(d, width * math.prod(heads), bias=False).double())
    slices = [
        HeadSlice(f"{name}.weight", None, "out", heads, width) for name, heads in zip(("q", "k"), groups, strict=True)
    ]
    module.qk = HeadProduct("rotary-qk", *slices, width, layout)
    return module


def rotation(layout, width, phases):
    """The block rotation of a head, (width, width), for one random phase per plane."""
    matrix = torch.eye(width, dtype=torch.float64)
    index = layout.planes(torch.arange(width)[:, None])[..., 0].reshape(-1, 2)  # (planes, 2)
    for (i, j), phase in zip(index.tolist(), phases.tolist(), strict=True):
        matrix[i, i] = matrix[j, j] = math.cos(phase)
        matrix[i, j], matrix[j, i] = -math.sin(phase), math.sin(phase)
    return matrix


LAYOUTS = {
    "half-split": RotaryLayout(0, 8),
    "interleaved": RotaryLayout(0, 8, interleaved=True),
    "partial": RotaryLayout(0, 4),
    "partial, at the end": RotaryLayout(4, 4, interleaved=True),
    "two chunks": RotaryLayout(0, 8, chunks=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_squared_norm_is_the_average_over_phases(name):
    layout, module = LAYOUTS[name], one_head(LAYOUTS[name])
    (product,) = fnl_hf.factorizations(module)
    q, k = module.q.weight.detach(), module.k.weight.detach()
    samples = []
    for phases in torch.rand(4000, layout.dim // 2).double() * 2 * math.pi:
        samples.append((q.mT @ rotation(layout, 8, phases) @ k).square().sum())
    samples = torch.stack(samples)
    error = samples.std() / len(samples) ** 0.5
    assert (product.squared_norm() - samples.mean()).abs() < 4 * error + 1e-12
    assert error < 0.02 * samples.mean()


@pytest.mark.parametrize("groups", [((2,), (2,)), ((2, 3), (2, 1))])
@pytest.mark.parametrize("name", LAYOUTS)
def test_decay_gradients_are_those_of_the_closed_form(name, groups):
    module = one_head(LAYOUTS[name], groups=groups)
    (product,) = fnl_hf.factorizations(module)
    (product.squared_norm() / 2).backward()
    expected = [module.q.weight.grad.clone(), module.k.weight.grad.clone()]
    module.zero_grad()
    fnl_hf.frobenius_decay_(module, 1.0)
    for parameter, gradient in zip((module.q.weight, module.k.weight), expected, strict=True):
        assert_close(parameter.grad, gradient, rtol=1e-11, atol=1e-13)


def test_planes_share_nothing_and_have_no_matrix():
    (product,) = fnl_hf.factorizations(one_head(RotaryLayout(0, 4), groups=((2, 3), (2, 1))))
    assert [tuple(t.shape) for t in product.factors()] == [
        (2, 3, 1, 2, 2, 6),
        (2, 1, 1, 2, 2, 6),
        (2, 3, 6, 4),
        (2, 1, 4, 6),
    ]
    with pytest.raises(ValueError, match="no single matrix"):
        product.matrix()


def test_balance_makes_planes_equal_and_keeps_the_scores():
    model = llama()
    before = output(model, IDS)
    fnl_hf.factorize(model, fnl_hf.FNLConfig())
    assert {f.kind for f in fnl_hf.factorizations(model)} == {"rotary-qk", "ov"}
    assert_close(output(model, IDS), before, rtol=1e-4, atol=1e-5)
    product = next(f for f in fnl_hf.factorizations(model) if f.kind == "rotary-qk")
    of_queries, of_keys, _ = rotary.decay_grams(product.augmented())
    assert_close(of_queries, of_keys, rtol=1e-4, atol=1e-6)


def test_grouped_values_reduce_to_the_best_shared_basis():
    model = llama(torch.float64)
    reference = llama(torch.float64)
    for layer in reference.layers:
        attention = layer.self_attn
        for group in range(2):
            v = slice(group * 8, group * 8 + 8)
            o = attention.o_proj.weight.data.unflatten(1, (2, 2, 8))[:, group]  # (out, heads of the group, width)
            value = torch.cat([attention.v_proj.weight.data[v], attention.v_proj.bias.data[v, None]], 1)
            stacked = torch.cat([o[:, 0], o[:, 1]])  # (2 out, width)
            u, s, vt = torch.linalg.svd(stacked @ value, full_matrices=False)
            basis = torch.zeros_like(value)
            basis[:3] = vt[:3]
            outer = torch.zeros_like(stacked)
            outer[:, :3] = u[:, :3] * s[:3]
            attention.v_proj.weight.data[v], attention.v_proj.bias.data[v] = basis[:, :-1], basis[:, -1]
            o[:, 0], o[:, 1] = outer.chunk(2)
    fnl_hf.factorize(model, fnl_hf.FNLConfig(attention=("ov",), head_rank=3))
    assert_close(output(model, IDS), output(reference, IDS), rtol=1e-8, atol=1e-9)
    assert model.layers[0].self_attn.v_proj.weight.shape == (6, 32)


def test_reduced_rank_leaves_rotary_heads_alone_and_says_so():
    model = llama()
    fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=0.5))
    ranks = {row["kind"]: row["rank"] for row in fnl_hf.summary(model).rows}
    assert ranks == {"rotary-qk": 8, "ov": 4}
    assert "2 products keep their full rank (rotary-qk)" in str(fnl_hf.summary(model))
    with pytest.raises(ValueError, match=r"every product found \(rotary-qk\) keeps its full rank"):
        fnl_hf.factorize(llama(), fnl_hf.FNLConfig(attention=("qk",), head_rank=0.5))


def test_rotary_decay_through_a_model_equals_autograd():
    model = fnl_hf.factorize(llama(torch.float64), fnl_hf.FNLConfig())
    (sum(f.squared_norm() for f in fnl_hf.factorizations(model)) / 2).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    fnl_hf.frobenius_decay_(model, 1.0)
    assert len(expected) == 8
    for name, p in model.named_parameters():
        if name in expected:
            assert (p.grad - expected[name]).norm() <= 1e-10 * expected[name].norm()


def test_without_rotation_the_same_module_has_a_plain_product():
    """SmolLM3 and others rotate in some layers only: the layer decides, not the class."""
    model = llama()
    no_rotation = lambda x, position_ids: (torch.ones(1, 7, 8), torch.zeros(1, 7, 8))  # noqa: E731
    model.rotary_emb.forward = no_rotation
    fnl_hf.factorize(model, fnl_hf.FNLConfig(attention=("qk",)), verify=IDS)
    assert {f.kind for f in fnl_hf.factorizations(model)} == {"qk"}
    left, right = fnl_hf.factorizations(model)[0].factors()
    assert left.shape == (2, 64, 8) and right.shape == (2, 8, 32)
