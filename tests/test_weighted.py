"""Approximations in the metric of data: against direct minimisation in float64, on moments of any rank."""

import pytest
import torch
from torch.testing import assert_close

from fnl_hf.algebra.weighted import energies_of_product, energies_of_weight, of_product, of_weight, shrunk


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment(*shape, rank=None, seed=0):
    """E[x xᵀ] of vectors that fill a space of a rank."""
    *batch, width = shape
    x = drawn(*batch, 3 * width, rank or width, seed=seed) @ drawn(*batch, rank or width, width, seed=seed + 1)
    return x.mT @ x / (3 * width)


def least(error, start, tries=4):
    """The least error that L-BFGS reaches from several starts near and far."""
    found = []
    for seed in range(tries):
        values = [(s + 0.05 * seed * drawn(*s.shape, seed=seed)).contiguous().requires_grad_() for s in start]
        optimizer = torch.optim.LBFGS(values, max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-14)

        def closure(optimizer=optimizer, values=values):
            optimizer.zero_grad()
            loss = error(*values)
            loss.backward()
            return loss

        optimizer.step(closure)
        found.append(float(error(*values).detach()))
    return min(found)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("deficient", [False, True])
@pytest.mark.parametrize("weighted", ["columns", "rows", "both"])
def test_no_weight_of_the_rank_is_better(shape, deficient, weighted):
    weight, rank = drawn(*shape, seed=3), 3
    columns = moment(shape[1], rank=4 if deficient else None) if weighted != "rows" else None
    rows = drawn(shape[0], seed=5).square() if weighted != "columns" else None
    if rows is not None and deficient:
        rows[:2] = 0

    def error(left, right):
        difference = weight - left @ right
        scaled = difference if rows is None else difference * rows.sqrt()[:, None]
        return scaled.square().sum() if columns is None else ((scaled @ columns) * scaled).sum()

    left, right = of_weight(weight, rank, columns, rows)
    reached = float(error(left, right))
    assert left.shape == (shape[0], rank) and right.shape == (rank, shape[1])
    assert reached <= least(error, (left, right)) * (1 + 1e-7) + 1e-12
    assert_close(float(energies_of_weight(weight, columns, rows)[rank:].sum()), reached, rtol=1e-6, atol=1e-9)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    assert reached < 0.98 * float(error(u[:, :rank] * s[:rank], v[:rank]))  # truncation is another one


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("rank_of_keys", [5, 4])
def test_no_queries_and_keys_of_the_rank_score_better(heads, rank_of_keys):
    """Σ over the heads of a group of E (qᵀk − q'ᵀk')², over all pairs of a query and a key."""
    left, right = drawn(heads, 7, 5, seed=1), drawn(1, 5, 8, seed=2)
    of_queries, of_keys = moment(heads, 5, seed=3), moment(1, 5, rank=rank_of_keys, seed=5)

    def error(a, b):  # q' = aᵀ q, k' = bᵀ k
        difference = torch.eye(5, dtype=torch.float64) - a @ b.mT
        return torch.einsum("hij,hik,hjl,hkl->", of_queries, difference, difference, of_keys.expand(heads, -1, -1))

    new_left, new_right = of_product(left, right, 3, of_queries, of_keys)
    lost = energies_of_product(left, right, of_queries, of_keys)[..., 3:].sum()
    a = torch.linalg.lstsq(left, new_left).solution
    b = torch.linalg.lstsq(right.mT.expand(1, -1, -1), new_right.mT).solution
    assert_close(left @ a, new_left)
    reached = float(error(a, b))
    assert reached <= least(error, (a, b)) * (1 + 1e-7) + 1e-12
    assert_close(float(lost), reached, rtol=1e-6, atol=1e-9)
    assert reached < 0.98 * float(
        error(torch.eye(5, 3, dtype=torch.float64).expand(heads, -1, -1), torch.eye(5, 3, dtype=torch.float64)[None])
    )


def test_no_outputs_and_values_of_the_rank_are_better():
    """Σ over heads of E ‖O z − O' V' …‖², z = V x averaged."""
    left, right, of_values = drawn(2, 7, 5, seed=1), drawn(2, 5, 8, seed=2), moment(2, 5, seed=3)

    def error(new_left, b):
        difference = left - new_left @ b.mT
        return torch.einsum("hmi,hmj,hij->", difference, difference, of_values)

    new_left, new_right = of_product(left, right, 3, None, of_values)
    b = torch.linalg.lstsq(right.mT, new_right.mT).solution
    assert_close(right.mT @ b, new_right.mT)
    assert float(error(new_left, b)) <= least(error, (new_left, b)) * (1 + 1e-7)


def test_outputs_of_a_group_are_the_best_for_its_values():
    left, right, of_values = drawn(2, 3, 7, 5, seed=1), drawn(2, 1, 5, 8, seed=2), moment(2, 3, 5, seed=3)
    new_left, new_right = of_product(left, right, 3, None, of_values)
    b = torch.linalg.lstsq(right.mT, new_right.mT).solution  # (2, 1, 5, 3)
    assert new_left.shape == (2, 3, 7, 3) and new_right.shape == (2, 1, 3, 8)
    residue = (left - new_left @ b.mT) @ of_values @ b
    assert float(residue.abs().max()) < 1e-9  # the gradient with respect to O' is zero


def test_a_product_of_the_same_rank_is_the_product():
    left, right = drawn(2, 7, 5, seed=1), drawn(2, 5, 8, seed=2)
    for metrics in ((moment(2, 5, seed=3), moment(2, 5, seed=4)), (None, moment(2, 5, seed=4))):
        a, b = of_product(left, right, 5, *metrics)
        assert_close(a @ b, left @ right)


def test_shrinkage_is_that_of_the_paper_and_vanishes():
    full, few = moment(6), moment(6, rank=2)
    assert_close(shrunk(full, 10**9)[0], full, rtol=1e-6, atol=1e-6)
    for count in (2, 50):
        p, trace, squares = 6, few.trace(), (few @ few).trace()
        rho = ((1 - 2 / p) * squares + trace**2) / ((count + 1 - 2 / p) * (squares - trace**2 / p))
        rho = min(1.0, float(rho))
        expected = (1 - rho) * few + rho * trace / p * torch.eye(6, dtype=torch.float64)
        assert_close(shrunk(few[None], count)[0][0], expected)
        assert float(torch.linalg.eigvalsh(expected)[0]) > 0
    assert_close(shrunk(torch.eye(3, dtype=torch.float64), 5)[0], torch.eye(3, dtype=torch.float64))
    assert not shrunk(torch.zeros(1, 3, 3, dtype=torch.float64), 5)[0].any()


# -- where other inputs come than those that are approximated ----------------------------------------


def paired(*shape, seed=0, rank=None):
    """x and x̃, (*batch, positions, width): the second a disturbed first, in a space of a rank."""
    *batch, width = shape
    x = drawn(*batch, 4 * width, rank or width, seed=seed) @ drawn(*batch, rank or width, width, seed=seed + 1)
    return x, x @ (torch.eye(width, dtype=torch.float64) + 0.3 * drawn(width, width, seed=seed + 2)) + (
        0 if rank else 0.5 * drawn(*batch, 4 * width, width, seed=seed + 3)
    )


def second(a, b):
    return a.mT @ b / a.shape[-2]


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("rank_of_inputs", [None, 5])
def test_no_weight_of_the_rank_makes_more_of_other_inputs(shape, rank_of_inputs):
    weight, rank = drawn(*shape, seed=3), 3
    x, given = paired(shape[1], rank=rank_of_inputs)

    def error(left, right):
        return (x @ weight.mT - given @ (left @ right).mT).square().sum(-1).mean()

    left, right = of_weight(weight, rank, second(given, given), cross=second(x, given))
    reached = float(error(left, right))
    assert reached <= least(error, (left, right)) * (1 + 1e-7) + 1e-12
    assert reached < 0.98 * float(error(*of_weight(weight, rank, second(given, given))))  # the control
    assert reached < 0.98 * float(error(*of_weight(weight, rank, second(x, x))))


@pytest.mark.parametrize("heads", [1, 3])
def test_no_queries_and_keys_of_the_rank_score_better_from_others(heads):
    left, right = drawn(heads, 7, 5, seed=1), drawn(1, 5, 8, seed=2)
    (q, q_given), (k, k_given) = paired(heads, 5, seed=3), paired(1, 5, seed=7)
    scores = q @ k.mT  # all pairs of a query and a key

    def error(a, b):
        return (scores - (q_given @ a) @ (k_given @ b).mT).square().mean((-2, -1)).sum()

    sides = second(q_given, q_given), second(k_given, k_given)
    new_left, new_right = of_product(left, right, 3, *sides, second(q, q_given), second(k, k_given))
    a = torch.linalg.lstsq(left, new_left).solution
    b = torch.linalg.lstsq(right.mT, new_right.mT).solution
    reached = float(error(a, b))
    assert reached <= least(error, (a, b)) * (1 + 1e-7)
    plain = of_product(left, right, 3, *sides)
    others = torch.linalg.lstsq(left, plain[0]).solution, torch.linalg.lstsq(right.mT, plain[1].mT).solution
    assert reached < 0.98 * float(error(*others))


def test_no_outputs_and_values_of_the_rank_make_more_of_others():
    left, right = drawn(2, 7, 5, seed=1), drawn(2, 5, 8, seed=2)
    z, given = paired(2, 5, seed=3)

    def error(new_left, b):
        return (z @ left.mT - (given @ b) @ new_left.mT).square().sum(-1).mean(-1).sum()

    new_left, new_right = of_product(left, right, 3, None, second(given, given), None, second(z, given))
    b = torch.linalg.lstsq(right.mT, new_right.mT).solution
    assert float(error(new_left, b)) <= least(error, (new_left, b)) * (1 + 1e-7)


def test_where_the_inputs_are_the_same_nothing_changes():
    weight, x = drawn(6, 9, seed=3), paired(9)[0]
    plain, same = of_weight(weight, 3, second(x, x)), of_weight(weight, 3, second(x, x), cross=second(x, x))
    assert_close(plain[0] @ plain[1], same[0] @ same[1])
    drawn_to = shrunk(second(x, x), 20, second(x, x))
    assert_close(*drawn_to)


# -- where errors of what is put out do not count alike ----------------------------------------------


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_no_weight_of_the_rank_costs_less(shape):
    weight, columns, curvature = drawn(*shape, seed=3), moment(shape[1]), moment(shape[0], seed=8)

    def cost(left, right):
        difference = weight - left @ right
        return ((curvature @ difference @ columns) * difference).sum()

    left, right = of_weight(weight, 3, columns, outputs=curvature)
    reached = float(cost(left, right))
    assert reached <= least(cost, (left, right)) * (1 + 1e-7)
    assert_close(float(energies_of_weight(weight, columns, outputs=curvature)[3:].sum()), reached)
    assert reached < 0.98 * float(cost(*of_weight(weight, 3, columns)))


def test_no_table_of_the_rank_costs_less():
    table, counts, curvature = drawn(9, 6, seed=3), drawn(9, seed=5).square(), moment(6, seed=8)

    def cost(left, right):
        difference = table - left @ right
        return ((difference @ curvature) * difference * counts[:, None]).sum()

    left, right = of_weight(table, 3, None, counts, outputs=curvature)
    assert float(cost(left, right)) <= least(cost, (left, right)) * (1 + 1e-7)
    assert_close(float(energies_of_weight(table, None, counts, curvature)[3:].sum()), float(cost(left, right)))


def test_heads_of_a_group_count_by_their_weights():
    left, right, weights = drawn(3, 7, 5, seed=1), drawn(1, 5, 8, seed=2), torch.tensor([5.0, 0.1, 1.0]).double()
    of_queries, of_keys = moment(3, 5, seed=3), moment(1, 5, seed=5)

    def error(a, b):
        difference = torch.eye(5, dtype=torch.float64) - a @ b.mT
        each = torch.einsum("hij,hik,hjl,hkl->h", of_queries, difference, difference, of_keys.expand(3, -1, -1))
        return (weights * each).sum()

    new_left, new_right = of_product(left, right, 3, of_queries, of_keys, weights=weights)
    a = torch.linalg.lstsq(left, new_left).solution
    b = torch.linalg.lstsq(right.mT, new_right.mT).solution
    assert float(error(a, b)) <= least(error, (a, b)) * (1 + 1e-7)
    saved = energies_of_product(left, right, of_queries, of_keys, weights)
    assert_close(float(saved[..., 3:].sum()), float(error(a, b)))
