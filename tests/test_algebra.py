"""Chains against autograd on the dense product and against hand-made integer vectors, in float64."""

import pytest
import torch
from torch.testing import assert_close

from fnl_hf.algebra import chain

U = torch.tensor([[1, 2], [0, 1], [3, -1]], dtype=torch.float64)
V = torch.tensor([[1, 0], [2, 1], [0, -1], [1, 1]], dtype=torch.float64)
M = torch.tensor([[1, 1], [0, 2]], dtype=torch.float64)
W_NUCLEAR = 10.8667784778752

SHAPES = {
    "one": [(3, 5, 4)],
    "two": [(7, 4), (4, 9)],
    "heads": [(3, 7, 4), (3, 4, 9)],
    "three": [(7, 4), (4, 3), (3, 9)],
    "five, batched": [(2, 7, 4), (2, 4, 3), (2, 3, 5), (2, 5, 2), (2, 2, 6)],
    "grouped heads": [(2, 3, 7, 4), (2, 1, 4, 9)],
    "overcomplete": [(5, 8), (8, 3)],
}


def random_chain(name):
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES[name]]


@pytest.mark.parametrize("name", SHAPES)
def test_norm_and_gradients_are_those_of_the_dense_product(name):
    factors = random_chain(name)
    half = chain.product(factors).square().sum() / 2
    expected = torch.autograd.grad(half, factors)
    assert_close(chain.squared_norm(factors) / 2, half, rtol=1e-12, atol=0)
    with torch.no_grad():
        for gradient, exact in zip(chain.decay_gradients(factors), expected, strict=True):
            assert_close(gradient, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "one"])
def test_squared_norm_is_differentiable(name):
    factors = random_chain(name)
    got = torch.autograd.grad(chain.squared_norm(factors) / 2, factors)
    for gradient, exact in zip(got, chain.decay_gradients(factors), strict=True):
        assert_close(gradient, exact.detach(), rtol=1e-11, atol=1e-11)


def test_integer_vectors_of_two_factors():
    assert_close(chain.product((U, V.mT)), torch.tensor([[1, 4, -2, 3], [0, 1, -1, 1], [3, 5, 1, 2]]).double())
    assert chain.squared_norm((U, V.mT)) == 72
    du, dv = chain.decay_gradients((U, V.mT))
    assert du.tolist() == [[12, 9], [3, 3], [15, 6]]
    assert dv.mT.tolist() == [[10, -1], [19, 4], [1, -6], [9, 5]]


def test_integer_vectors_of_three_factors():
    assert chain.squared_norm((U, M, V.mT)) == 198
    du, dm, dv = chain.decay_gradients((U, M, V.mT))
    assert du.tolist() == [[39, 36], [12, 12], [33, 24]]
    assert dm.tolist() == [[84, 54], [27, 30]]
    assert dv.mT.tolist() == [[10, 8], [28, 46], [-8, -30], [18, 38]]


def test_nuclear_norm_bound_and_non_orthogonality_vectors():
    assert chain.singular_values((U, V.mT)).sum().item() == pytest.approx(W_NUCLEAR, abs=1e-12)
    assert chain.bound(chain.decay_grams((U, V.mT))).item() == 12.5
    expected = torch.tensor([0.12038585308576921, 0.5345224838248487], dtype=torch.float64)
    assert_close(chain.non_orthogonality((U, V.mT)), expected)


def test_balance_keeps_the_product_and_makes_the_bound_tight():
    left, right = chain.balance((U, V.mT))
    assert_close(left @ right, U @ V.mT, rtol=1e-12, atol=1e-12)
    assert_close(left.mT @ left, right @ right.mT, rtol=1e-10, atol=1e-12)
    assert chain.bound(chain.decay_grams((left, right))).item() == pytest.approx(W_NUCLEAR, abs=1e-10)
    assert chain.non_orthogonality((left, right)).max() < 1e-10


def test_truncation_error_is_the_discarded_singular_value():
    left, right = chain.balance((U, V.mT), 1)
    assert torch.linalg.matrix_norm(U @ V.mT - left @ right).item() == pytest.approx(2.888142418254567, abs=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e9])
def test_balance_is_the_truncated_svd_of_the_dense_product(rank, condition):
    scales = torch.logspace(0, torch.tensor(condition).log10().neg().item(), 6, dtype=torch.float64)
    left, right = torch.randn(2, 11, 6).double() * scales, torch.randn(2, 6, 9).double()
    u, s, vt = torch.linalg.svd(left @ right)
    best = (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]
    a, b = chain.balance((left, right), rank)
    assert_close(a @ b, best, rtol=0, atol=1e-10 * s.max().item())


def test_balance_of_a_shared_group_is_the_best_shared_basis():
    left, right = torch.randn(2, 3, 7, 4).double(), torch.randn(2, 1, 4, 9).double()
    a, b = chain.balance((left, right), 2)
    assert a.shape == (2, 3, 7, 2) and b.shape == (2, 1, 2, 9)
    u, s, vt = torch.linalg.svd((left @ right).reshape(2, 21, 9))
    best = (u[..., :2] * s[..., None, :2]) @ vt[..., :2, :]
    assert_close(a @ b, best.reshape(2, 3, 7, 9), rtol=0, atol=1e-11)


@pytest.mark.parametrize("dead", ["left", "right", "a direction"])
def test_no_direction_dies_when_the_product_lacks_it(dead):
    left, right = torch.randn(5, 3), torch.randn(3, 6)
    if dead == "left":
        left.zero_()
    elif dead == "right":
        right.zero_()
    else:
        left[:, 2] = left[:, 1]
    a, b = chain.balance((left, right))
    assert_close(a @ b, left @ right, rtol=1e-5, atol=1e-5)
    # The gradient of a generic loss reaches every column through the other factor.
    gradient = torch.randn(5, 6)
    assert ((gradient @ b.mT).norm(dim=0) + (a.mT @ gradient).norm(dim=1) > 1e-3).all()


def test_a_dense_matrix_takes_a_rank_above_its_own():
    matrix = torch.randn(4, 3, dtype=torch.float64)
    left, right = chain.balance([matrix], 7)
    assert left.shape == (4, 7) and right.shape == (7, 3)
    assert_close(left @ right, matrix)
    assert (left[:, 3:] == 0).all() and (right[3:].norm(dim=1) > 0).all()


def test_half_precision_grams_accumulate_in_float32():
    left, right = torch.randn(512, 8).bfloat16(), torch.randn(8, 512).bfloat16()
    exact = chain.squared_norm((left.double(), right.double()))
    assert chain.squared_norm((left, right)).double().item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("rank", [128, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_keeps_small_directions(dtype, rank):
    """As many directions as a head of a large model has, the least 0.01 of the largest: not one of them is noise."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(256, 128, generator=generator))[0] for _ in range(2))
    factors = [(left * torch.logspace(0, -2, 128)).to(dtype), right.mT.to(dtype)]
    u, sigma, vt = torch.linalg.svd(chain.product([factor.double() for factor in factors]), full_matrices=False)
    best = (u[:, :rank] * sigma[:rank]) @ vt[:rank]
    balanced = chain.product([factor.double() for factor in chain.balance(factors, rank)])
    assert (balanced - best).norm() < torch.finfo(dtype).eps * best.norm()


def test_a_rank_beyond_the_factors_is_refused():
    with pytest.raises(ValueError, match=r"rank 3 is outside 1\.\.2"):
        chain.balance((U, V.mT), 3)
