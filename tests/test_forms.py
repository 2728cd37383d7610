"""Every form through the same laws, in float64: what ``fnl_hf.algebra.Form`` states, against autograd and plain SVDs.

A new form joins by its cases in CASES, and, if it has no matrix, by what takes the product's place in ``contents``.
"""

import inspect
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fnl_hf.algebra import Form, chain, rotary


class Case(NamedTuple):
    form: ModuleType
    shapes: list[tuple[int, ...]]
    size: tuple[int, int]  # matrices, rank


CASES = {
    "one": Case(chain, [(6, 4)], (1, 4)),
    "one, heads": Case(chain, [(3, 5, 7)], (3, 5)),
    "two": Case(chain, [(7, 4), (4, 9)], (1, 4)),
    "two, heads": Case(chain, [(3, 7, 4), (3, 4, 9)], (3, 4)),
    "two, grouped": Case(chain, [(2, 3, 7, 4), (2, 1, 4, 9)], (6, 4)),
    "two, overcomplete": Case(chain, [(5, 8), (8, 3)], (1, 8)),
    "three": Case(chain, [(7, 4), (4, 3), (3, 9)], (1, 3)),
    "three, square": Case(chain, [(2, 7, 4), (2, 4, 4), (2, 4, 9)], (2, 4)),
    "three, grouped": Case(chain, [(2, 3, 5, 4), (2, 1, 4, 3), (2, 1, 3, 6)], (6, 3)),
    "five, narrowest in the middle": Case(chain, [(6, 5), (5, 2), (2, 4), (4, 3), (3, 7)], (1, 2)),
    "five, batched": Case(chain, [(2, 7, 4), (2, 4, 3), (2, 3, 5), (2, 5, 2), (2, 2, 6)], (2, 2)),
    "planes": Case(rotary, [(2, 1, 4, 2, 6), (2, 1, 4, 2, 5)], (2, 8)),
    "planes in two chunks": Case(rotary, [(2, 2, 2, 2, 6), (2, 2, 2, 2, 6)], (2, 8)),
    "planes, partial": Case(rotary, [(2, 1, 2, 2, 6), (2, 1, 2, 2, 5), (2, 6, 3), (2, 3, 5)], (2, 7)),
    "planes, grouped": Case(rotary, [(2, 3, 1, 4, 2, 6), (2, 1, 1, 4, 2, 6)], (6, 8)),
    "planes, grouped and partial": Case(
        rotary, [(2, 3, 1, 2, 2, 6), (2, 1, 1, 2, 2, 6), (2, 3, 6, 3), (2, 1, 3, 6)], (6, 7)
    ),
}
CHAINS = [name for name, case in CASES.items() if case.form is chain]
WITH_SIDES = [name for name, case in CASES.items() if len(case.shapes) > 1]

every_case = pytest.mark.parametrize("name", CASES)
every_chain = pytest.mark.parametrize("name", CHAINS)
every_case_with_sides = pytest.mark.parametrize("name", WITH_SIDES)


def make(name: str, seed: int = 0, dtype=torch.float64) -> tuple[ModuleType, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = CASES[name].shapes
    return CASES[name].form, [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def contents(form: ModuleType, factors) -> list[Tensor]:
    """What the model sees of the factors, scaled so that its squares sum to ``squared_norm``.

    A matrix, or for rotary planes QᵀR(θ)K = cos θ QᵀK + sin θ QᵀJK, hence QᵀK and QᵀJK of every plane.
    """
    if form.has_matrix:
        return [form.product(factors)]
    queries, keys, *rest = factors
    quarter = torch.tensor([[0, -1], [1, 0]]).to(keys)
    planes = [queries.mT @ keys / 2**0.5, queries.mT @ quarter @ keys / 2**0.5]
    return planes + ([rest[0] @ rest[1]] if rest else [])


def full_rank(name: str) -> int:
    """The largest rank that the product can have, in a stacked group too."""
    form, factors = make(name)
    seen = form.batched(factors)
    return min(CASES[name].size[1], seen[0].shape[-2], seen[-1].shape[-1])


def assert_same(got, expected, tolerance=1e-10):
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, rtol=tolerance, atol=tolerance)


def distance(got, expected) -> float:
    return sum((one - other).square().sum().item() for one, other in zip(got, expected, strict=True)) ** 0.5


def leaves(grams):
    if isinstance(grams, Tensor):
        yield grams
    elif grams is not None:
        for part in grams:
            yield from leaves(part)


# ---------------------------------------------------------------------------------------------------- the protocol


@pytest.mark.parametrize("form", [chain, rotary])
def test_a_form_has_every_member_with_its_signature(form):
    assert isinstance(form.has_matrix, bool) and form.__doc__
    assert set(Form.__annotations__) == {"has_matrix"}
    members = {name: member for name, member in vars(Form).items() if inspect.isfunction(member) and name[0] != "_"}
    assert len(members) == 16
    for name, member in members.items():
        stated = list(inspect.signature(member).parameters.values())[1:]  # without self
        given = list(inspect.signature(getattr(form, name)).parameters.values())
        assert [(p.name, p.kind, p.default) for p in given] == [(p.name, p.kind, p.default) for p in stated], name
        assert member.__doc__ and getattr(form, name).__doc__, name


def test_every_form_is_under_these_laws():
    import fnl_hf.algebra

    forms = {module for module in vars(fnl_hf.algebra).values() if hasattr(module, "has_matrix")} - {Form}
    assert forms == {case.form for case in CASES.values()}


# ---------------------------------------------------------------------------------------------------- norm and decay


@every_case
def test_norm_and_decay_are_those_of_autograd(name):
    form, factors = make(name)
    leaf = [factor.requires_grad_() for factor in factors]
    half = sum(part.square().sum() for part in contents(form, leaf)) / 2
    expected = torch.autograd.grad(half, leaf)
    assert_close(form.squared_norm(leaf) / 2, half, rtol=1e-12, atol=0)
    assert_same(torch.autograd.grad(form.squared_norm(leaf) / 2, leaf), expected)
    with torch.no_grad():
        assert_same(form.decay_gradients(factors), expected)
        assert_same(form.decay_gradients(factors, form.decay_grams(factors)), expected)
        assert all(g.data_ptr() != f.data_ptr() for g, f in zip(form.decay_gradients(factors), factors, strict=True))


@every_case
def test_added_decay_is_the_gradients(name):
    form, factors = make(name)
    gradients, grams = form.decay_gradients(factors), form.decay_grams(factors)
    scales = [0.5 + i for i in range(len(factors))]
    targets = [torch.ones_like(factor) for factor in factors]
    targets[-1] = None
    form.add_decay_(factors, targets, scales, grams)
    assert_same(targets[:-1], [1 + s * g for s, g in zip(scales, gradients, strict=True)][:-1])
    # Into the factors themselves, strided as in a fused weight: every gradient is that of the old factors.
    moved = [torch.stack([factor, factor], -1)[..., 0] for factor in factors]
    form.add_decay_(moved, moved, [-s for s in scales], grams)
    assert_same(moved, [f - s * g for f, s, g in zip(factors, scales, gradients, strict=True)])


@every_case
def test_a_stable_decoupled_step_never_raises_the_norm(name):
    for seed in range(10):
        form, factors = make(name, seed)
        grams, gradients = form.decay_grams(factors), form.decay_gradients(factors)
        exact = form.stiffness(grams, exact=True)
        assert exact <= form.stiffness(grams) * (1 + 1e-12)
        for gradient, factor in zip(gradients, factors, strict=True):
            assert gradient.norm() <= exact * factor.norm() * (1 + 1e-12)
        before = form.squared_norm(factors)
        for share in (0.01, 0.5, 0.999):
            step = [f - share / exact * g for f, g in zip(factors, gradients, strict=True)]
            assert form.squared_norm(step) < before
        wild = [f - 300 / exact * g for f, g in zip(factors, gradients, strict=True)]
        assert form.squared_norm(wild) > before  # the control


def test_the_steps_of_a_longer_chain_compound():
    """Three factors that each step shrinks, and whose product doubles its norm: stiffness counts the factors in."""
    factors = [[[0, 0], [-1, -4]], [[4, -2], [4, 3]], [[-2, -3], [3, 4]]]
    factors = [torch.tensor(factor, dtype=torch.float64) for factor in factors]
    grams, gradients = chain.decay_grams(factors), chain.decay_gradients(factors)
    for share, grows in ((1.98, True), (0.999, False)):
        step = [f - share / chain.stiffness(grams, True) * g for f, g in zip(factors, gradients, strict=True)]
        assert all(new.norm() < old.norm() for new, old in zip(step, factors, strict=True))
        assert (chain.squared_norm(step) > 2 * chain.squared_norm(factors)) == grows


# ---------------------------------------------------------------------------------------------------- gauges


@every_case_with_sides
def test_nothing_that_is_measured_sees_a_gauge(name):
    form, factors = make(name)
    changed = form.change_basis(factors, torch.Generator().manual_seed(1))
    assert all(distance([new], [old]) > 0.1 for new, old in zip(changed, factors, strict=True))
    assert [new.shape for new in changed] == [old.shape for old in factors]
    assert_same(contents(form, changed), contents(form, factors))
    assert_close(form.squared_norm(changed), form.squared_norm(factors), rtol=1e-11, atol=0)
    assert_close(form.singular_values(changed), form.singular_values(factors), rtol=1e-9, atol=1e-9)
    spectra = [form.spectrum(form.decay_grams(f)) for f in (changed, factors)]
    assert_close(*spectra, rtol=1e-6, atol=1e-6)
    # The control: the factors' own squares, which weight decay falls on, do see it.
    sizes = [sum(f.square().sum() for f in side) for side in (changed, factors)]
    assert abs(sizes[0] - sizes[1]) > 0.01 * sizes[1]


@every_case_with_sides
@pytest.mark.parametrize("side", ["left", "right"])
def test_one_side_of_a_gauge_moves_the_product(name, side):
    form, factors = make(name)
    changed = form.change_basis(factors, torch.Generator().manual_seed(1), (side,))
    assert distance(contents(form, changed), contents(form, factors)) > 0.1
    assert (form.squared_norm(changed) / form.squared_norm(factors) - 1).abs() > 1e-3
    # The last factor has nothing on its right, and the first nothing on its left; both sides draw the same gauges.
    untouched = len(factors) - 1 if side == "left" else 0
    assert torch.equal(changed[untouched], factors[untouched])
    both = form.change_basis(factors, torch.Generator().manual_seed(1))
    same = 0 if side == "left" else len(factors) - 1
    assert torch.equal(changed[same], both[same])


@every_case
def test_the_sides_of_a_gauge_are_named(name):
    form, factors = make(name)
    assert_same(form.change_basis(factors, torch.Generator(), ()), factors, 0)
    for wrong in (("left", "up"), "left"):
        with pytest.raises(ValueError, match="expected a selection of"):
            form.change_basis(factors, torch.Generator(), wrong)


def test_one_factor_has_no_gauge():
    _, factors = make("one, heads")
    for sides in (("left", "right"), ("left",), ("right",)):
        assert_same(chain.change_basis(factors, torch.Generator(), sides), factors, 0)


# ---------------------------------------------------------------------------------------------------- spectra, balance


@every_case
def test_singular_values_are_those_of_the_product(name):
    form, factors = make(name)
    sigma = form.singular_values(factors)
    assert (sigma.diff(dim=-1) <= 0).all() and (sigma >= 0).all()
    assert_close(sigma.square().sum(), form.squared_norm(factors), rtol=1e-11, atol=0)
    if form.has_matrix:
        exact = torch.linalg.svdvals(form.product(form.batched(factors)))[:, : full_rank(name)]  # (B, rank)
        exact = torch.nn.functional.pad(exact, (0, CASES[name].size[1] - full_rank(name)))
        assert_close(sigma.reshape(exact.shape), exact, rtol=1e-11, atol=1e-11)
    if len(factors) > 1:
        of_grams = form.spectrum(form.decay_grams(factors))
        assert of_grams.shape == sigma.shape == (*factors[-1].shape[: sigma.dim() - 1], sigma.shape[-1])
        assert_close(of_grams, sigma, rtol=1e-6, atol=1e-6)
        assert form.bound(form.decay_grams(factors)) >= sigma.sum()
        imbalance = form.imbalance(form.decay_grams(factors))
        assert imbalance.shape == sigma.shape[:-1] and ((imbalance > 0.01) & (imbalance <= 1)).all()


@every_case
def test_balance_keeps_the_product_and_makes_its_sides_equal(name):
    form, factors = make(name)
    sigma = form.singular_values(factors).sum()
    if len(factors) > 1:  # the control
        assert form.bound(form.decay_grams(factors)) > 1.01 * sigma
    balanced = form.balance(factors, full_rank(name))
    grams = form.decay_grams(balanced)
    assert_same(contents(form, balanced), contents(form, factors))
    assert form.imbalance(grams).max() < 1e-9
    assert_close(form.bound(grams), sigma, rtol=1e-9, atol=0)
    again = form.balance(balanced)
    assert_same(contents(form, again), contents(form, factors))
    for new, old in zip(again, balanced, strict=True):  # up to signs of singular vectors
        assert_close(new.abs(), old.abs(), rtol=1e-7, atol=1e-7)
    # One balanced point whatever the basis that one starts from.
    elsewhere = form.balance(form.change_basis(factors, torch.Generator().manual_seed(2)), full_rank(name))
    assert_close(form.stiffness(form.decay_grams(elsewhere), True), form.stiffness(grams, True), rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", ["planes, partial", "planes, grouped and partial"])
@pytest.mark.parametrize("part", ["planes", "rest"])
def test_imbalance_of_a_partly_rotated_head_sees_both_parts(name, part):
    _, factors = make(name)
    balanced = rotary.balance(factors)
    unbalanced = [*factors[:2], *balanced[2:]] if part == "planes" else [*balanced[:2], *factors[2:]]
    assert (rotary.imbalance(rotary.decay_grams(unbalanced)) > 0.01).all()
    assert rotary.imbalance(rotary.decay_grams(balanced)).max() < 1e-9


@every_case
def test_balance_without_a_rank_keeps_the_product(name):
    form, factors = make(name)
    balanced = form.balance(factors)
    assert_same(contents(form, balanced), contents(form, factors))
    assert form.size(balanced) == CASES[name].size
    assert all(new.dtype == factors[0].dtype for new in balanced)


@every_chain
def test_the_error_of_a_truncation_is_the_tail_of_the_spectrum(name):
    _, factors = make(name)
    matrix, sigma = chain.product(factors), chain.singular_values(factors)
    for rank in range(1, full_rank(name) + 1):
        truncated = chain.balance(factors, rank)
        assert chain.size(truncated)[1] == rank
        error = (chain.product(truncated) - matrix).norm()
        assert_close(error, sigma[..., rank:].norm(), rtol=1e-8, atol=1e-10)
        if rank < full_rank(name):  # the control
            assert (chain.product(chain.leading(factors, rank)) - matrix).norm() > 1.01 * error


@pytest.mark.parametrize("name", ["three", "three, grouped", "five, batched"])
def test_balanced_longer_chains_have_identities_inside(name):
    _, factors = make(name)
    balanced = chain.balance(factors, 2)
    batch = factors[-1].shape[:-2]
    for inner in balanced[1:-1]:
        assert torch.equal(inner, torch.eye(2, dtype=torch.float64).expand(*batch, 2, 2))
    outer = chain.balance([chain.product(factors[:-1]), factors[-1]], 2)
    assert_same([balanced[0] @ balanced[-1]], [outer[0] @ outer[1]])


@pytest.mark.parametrize("name", ["two, overcomplete", "one, heads"])
def test_surplus_rank_is_zero_on_the_left_only(name):
    _, factors = make(name)
    left, right = chain.balance(factors, 8)
    assert_same([left @ right], [chain.product(factors)])
    assert (left[..., full_rank(name) :] == 0).all()
    assert (right.norm(dim=-1) > 0).all()


# ---------------------------------------------------------------------------------------------------- other members


@every_case
def test_batched_and_size_say_how_many_matrices_there_are(name):
    form, factors = make(name)
    matrices, rank = form.size(factors)
    assert (matrices, rank) == CASES[name].size
    seen = form.batched(factors)
    assert [one.untyped_storage().data_ptr() for one in seen] == [f.untyped_storage().data_ptr() for f in factors]
    assert_close(form.squared_norm(seen), form.squared_norm(factors))
    if form.has_matrix:
        product = form.product(factors).flatten(0, -3) if factors[0].dim() > 2 else form.product(factors)[None]
        assert len(product) == matrices and torch.linalg.matrix_rank(product).max() == full_rank(name)
        assert {factor.dim() for factor in seen} == {3}
        assert_close(form.product(seen).flatten(0, 1), product.flatten(0, 1))
    else:
        with pytest.raises(ValueError, match="no single matrix"):
            form.product(factors)


@every_case
def test_leading_factors_are_copies_of_the_first_features(name):
    form, factors = make(name)
    whole = form.leading(factors, CASES[name].size[1])
    assert all(new.data_ptr() != old.data_ptr() for new, old in zip(whole, factors, strict=False))
    if not form.has_matrix:
        assert_same(whole, factors, 0)
        return
    left, *inner, right = form.leading(factors, 2)
    assert torch.equal(left, factors[0][..., :2])
    assert {f.shape[-1] for f in (left, *inner)} == {2}
    if len(factors) > 1:
        assert torch.equal(right, factors[-1][..., :2, :])
        with pytest.raises(ValueError, match=r"outside 1\.\."):
            form.leading(factors, CASES[name].size[1] + 1)
    with pytest.raises(ValueError, match="rank 0 is"):
        form.leading(factors, 0)


def test_a_dense_matrix_is_cut_as_itself_times_the_identity():
    _, (matrix,) = make("one, heads")
    for rank in (2, 7, 9):
        left, right = chain.leading([matrix], rank)
        assert left.shape == (3, 5, rank) and right.shape == (3, rank, 7)
        cut = matrix.clone()
        cut[..., rank:] = 0
        assert torch.equal(left @ right, cut)
        assert (right.norm(dim=-1) == 1).all()


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_accumulate_in_float32_and_factors_keep_their_dtype(name, dtype):
    form, factors = make(name, dtype=dtype)
    exact = [factor.double() for factor in factors]
    grams = form.decay_grams(factors)
    assert all(gram.dtype == torch.float32 for gram in leaves(grams))
    assert all(gram.dtype == torch.float64 for gram in leaves(form.decay_grams(exact)))
    assert_close(form.squared_norm(factors).double(), form.squared_norm(exact), rtol=3e-6, atol=0)
    for made in (
        form.decay_gradients(factors),
        form.balance(factors),
        form.leading(factors, 1),
        form.change_basis(factors, torch.Generator()),
        form.carry(factors, form.balance(factors), factors, 1),
    ):
        assert {tensor.dtype for tensor in made} == {dtype}
    assert form.singular_values(factors).dtype in (torch.float32, torch.float64)
    if len(factors) > 1:
        assert form.spectrum(grams).dtype == torch.float64
        assert_close(form.spectrum(grams).sum(), form.singular_values(exact).sum(), rtol=2e-3, atol=0)


# ---------------------------------------------------------------------------------------------------- carried moments


def replacements(name: str):
    """What may take the place of a case's factors: (what it is, the new factors)."""
    form, factors = make(name)
    yield "balanced", form.balance(factors)
    if len(factors) > 1:
        yield "in another basis", form.change_basis(factors, torch.Generator().manual_seed(3))
    if form.has_matrix:
        yield "truncated", form.balance(factors, 2)
    if len(factors) <= 2:
        yield "leading", form.leading(factors, 2)
    if len(factors) == 1:
        (matrix,) = factors
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype).expand(*matrix.shape[:-2], -1, -1)
        yield "the same", [matrix.clone()]
        yield "three factors", [matrix, 2 * identity, identity]


def gradients(form, factors, weights) -> list[Tensor]:
    """Of a random linear function of the contents, at any factors."""
    leaf = [factor.detach().requires_grad_() for factor in factors]
    loss = sum((weight * part).sum() for weight, part in zip(weights, contents(form, leaf), strict=True))
    return list(torch.autograd.grad(loss, leaf))


@every_case
def test_carried_gradients_are_those_at_the_new_factors(name):
    form, factors = make(name)
    generator = torch.Generator().manual_seed(4)
    weights = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in contents(form, factors)]
    before = gradients(form, factors, weights)
    for what, after in replacements(name):
        expected = gradients(form, after, weights)
        carried = form.carry(factors, after, before, 1)
        for got, exact in zip(carried, expected, strict=True):
            assert_close(got, exact, rtol=1e-8, atol=1e-8, msg=lambda text, what=what: f"{what}: {text}")
        if what == "in another basis":  # the control: left as they were, they would be wrong
            assert distance(before, expected) > 0.1 * distance(expected, [0 * e for e in expected])


@every_case
def test_carried_squares_take_the_squares_of_the_same_maps(name):
    form, factors = make(name)
    generator = torch.Generator().manual_seed(5)
    moments = [torch.rand(factor.shape, generator=generator, dtype=torch.float64) for factor in factors]
    for what, after in replacements(name):
        expected = [torch.zeros_like(new) for new in after]
        for i, factor in enumerate(factors):
            for j in range(factor.numel()):  # column by column of the linear map that carries gradients
                unit = [torch.zeros_like(other) for other in factors]
                unit[i].view(-1)[j] = 1
                column = form.carry(factors, after, unit, 1)
                for entry, of_new in zip(expected, column, strict=True):
                    entry += moments[i].view(-1)[j] * of_new.square()
        carried = form.carry(factors, after, moments, 2)
        for got, exact in zip(carried, expected, strict=True):
            assert (got >= 0).all()
            assert_close(got, exact, rtol=1e-9, atol=1e-9, msg=lambda text, what=what: f"{what}: {text}")


# ---------------------------------------------------------------------------------------------------- what is refused


def test_a_dense_matrix_has_no_sides_to_measure():
    _, factors = make("one")
    grams = chain.decay_grams(factors)
    assert grams == [(None, None)] and chain.stiffness(grams) == 1
    for measure in (chain.spectrum, chain.bound, chain.imbalance):
        with pytest.raises(ValueError, match="one factor is a dense matrix, .* take its singular_values"):
            measure(grams)
    with pytest.raises(ValueError, match="rank 0 is less than 1"):
        chain.balance(factors, 0)


def test_moments_of_other_numbers_of_factors_are_refused():
    _, factors = make("three")
    with pytest.raises(ValueError, match="moments of 3 factors do not determine those of 2 others"):
        chain.carry(factors, chain.balance([chain.product(factors)], 2), factors, 1)


def test_batches_that_share_in_another_way_are_refused():
    shared_on_the_left = [torch.randn(2, 1, 5, 3), torch.randn(2, 4, 3, 6)]
    with pytest.raises(ValueError, match="share the factor on the right"):
        chain.balance(shared_on_the_left)
    shared_at_the_end = [torch.randn(2, 4, 5, 3), torch.randn(2, 4, 3, 3), torch.randn(2, 1, 3, 6)]
    for function in (chain.batched, chain.balance, chain.singular_values):
        with pytest.raises(ValueError, match="the factors after the first have batches"):
            function(shared_at_the_end)


def test_what_lies_unlike_its_neighbours_still_decays_as_autograd_says():
    """Norm and gradients take any batches that broadcast, also those that no other function does."""
    factors = [torch.randn(2, 4, 5, 3), torch.randn(2, 1, 3, 3), torch.randn(2, 4, 3, 6)]
    factors = [factor.double().requires_grad_() for factor in factors]
    expected = torch.autograd.grad(chain.product(factors).square().sum() / 2, factors)
    with torch.no_grad():
        assert_same(chain.decay_gradients(factors), expected)
