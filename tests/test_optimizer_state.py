"""Moments carried to new factors: pairs, one factor that becomes two, parameters that views do not cover."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fnl_hf.algebra import chain
from fnl_hf.factorization import Factorization, View
from fnl_hf.optimizer_state import Before, carry_state


def carry(before, after, moments, power):
    """Of a dense matrix W (m, n) that becomes A B: its gradient P gives P Bᵀ and Aᵀ P."""
    left, right = after
    (of_product,) = moments
    return [of_product @ right.mT.pow(power), left.mT.pow(power) @ of_product]


SPLIT = SimpleNamespace(carry=carry)


def whole(parameter, outer=-2):
    return View(parameter, lambda weight: weight, outer)


def rows(parameter, start, size):
    return View(parameter, lambda weight: weight[start : start + size].mT, -2, offset=start)


def as_product(form, *views):
    return Factorization("layer", "linear", form, views)


def parameter(*shape):
    return nn.Parameter(torch.randn(shape, dtype=torch.float64))


def test_one_dense_factor_becomes_two():
    dense, left, right = parameter(5, 4), parameter(5, 2), parameter(2, 4)
    gradient = torch.randn(5, 4, dtype=torch.float64)
    moves = [(Before.of(as_product(chain, whole(dense))), as_product(SPLIT, whole(left), whole(right, -1)))]
    state = {dense: {"step": torch.tensor(7.0), "exp_avg": gradient.clone(), "exp_avg_sq": gradient.square()}}
    carried = carry_state(moves, state)
    assert carried.keys() == {left, right} and int(carried[left]["step"]) == int(carried[right]["step"]) == 7
    assert_close(carried[left]["exp_avg"], (gradient @ right.mT).detach())
    assert_close(carried[right]["exp_avg"], (left.mT @ gradient).detach())
    assert_close(carried[right]["exp_avg_sq"], (left.mT.square() @ gradient.square()).detach())
    assert torch.equal(state[dense]["exp_avg"], gradient)  # the old state is left as it is
    assert carry_state(moves, {}) == {}


def test_a_rank_that_shrinks_or_grows():
    left, right = parameter(5, 3), parameter(3, 4)
    before, of_product = Before.of(as_product(chain, whole(left), whole(right, -1))), torch.randn(5, 4).double()
    state = {
        left: {"momentum_buffer": (of_product @ right.mT).detach()},
        right: {"momentum_buffer": (left.mT @ of_product).detach()},
    }
    for rank in (2, 3):
        new = [nn.Parameter(factor) for factor in chain.balance((left.detach(), right.detach()), rank)]
        carried = carry_state([(before, as_product(chain, whole(new[0]), whole(new[1], -1)))], state)
        assert_close(carried[new[0]]["momentum_buffer"], (of_product @ new[1].mT).detach())
        assert_close(carried[new[1]]["momentum_buffer"], (new[0].mT @ of_product).detach())


@pytest.mark.parametrize("unread", [0, 3])
def test_of_a_narrower_weight_every_row_must_belong_to_a_product(unread):
    """Two heads of 3 rows become heads of 2; where further rows of a fused weight are in no product, it starts anew."""
    old, new = parameter(6 + unread, 4), parameter(4 + unread, 4)
    moves = []
    for head in range(2):
        before = as_product(chain, rows(old, 3 * head, 3), whole(parameter(3, 5), -1))
        after = as_product(chain, rows(new, 2 * head, 2), whole(parameter(2, 5), -1))
        moves.append((Before.of(before), after))
    carried = carry_state(moves, {old: {"momentum_buffer": torch.ones_like(old)}})
    assert carried.keys() == (set() if unread else {new})  # of the right factors nothing was known
    assert unread or carried[new]["momentum_buffer"].all()


def test_what_no_product_reads_of_a_weight_of_the_same_shape_keeps_its_moments():
    fused, other = parameter(6, 4), parameter(2, 3)
    product = as_product(chain, rows(fused, 0, 2), whole(other, -1))
    moments = torch.randn(6, 4, dtype=torch.float64)
    carried = carry_state([(Before.of(product), product)], {fused: {"exp_avg": moments, "step": 3}})
    assert_close(carried[fused]["exp_avg"], moments)  # the same factors: the same moments, and rows 2 to 5 untouched
    assert carried[fused]["step"] == 3 and carried[fused]["exp_avg"] is not moments


@pytest.mark.parametrize(
    "kept",
    [
        {"exp_avg_sq_row": torch.ones(5)},
        {"exp_avg": torch.ones(20, dtype=torch.uint8)},
        {"acc_delta": torch.ones(5, 4)},
    ],
)
def test_a_state_that_cannot_be_carried_starts_anew(kept):
    left, right = parameter(5, 4), parameter(4, 6)
    product = as_product(chain, whole(left), whole(right, -1))
    state = {left: kept, right: {"exp_avg": torch.ones_like(right)}}
    assert carry_state([(Before.of(product), product)], state).keys() == {right}


def test_optimizers_without_momentum_keep_nothing_to_carry():
    left, right = parameter(5, 4), parameter(4, 6)
    product = as_product(chain, whole(left), whole(right, -1))
    state = {left: {"momentum_buffer": None}, right: {}}
    assert carry_state([(Before.of(product), product)], state) == {left: {"momentum_buffer": None}}
