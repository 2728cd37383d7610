"""Rank-adaptive training: its mathematics in float64, and what becomes of a training run."""

import copy
import json
import shutil

import pytest
import torch
import transformers as tf
from torch.testing import assert_close

import fnl_hf
from fnl_hf.algebra import dlrt
from fnl_hf.ranks import adaptive
from fnl_hf.rules import RankAdaptation, Rule
from tests.processes import run_job
from tests.test_trainer import examples, make_model

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = fnl_hf.FNLConfig(attention=(), target_modules="all", rank=0.25)
ARGUMENTS = {
    "per_device_train_batch_size": 4, "max_steps": 14, "learning_rate": 1e-2, "optim": "adamw_torch",
    "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
    "rank_adaptation": "dlrt", "rank_interval": 4, "rank_tolerance": 0.3, "train_sampling_strategy": "sequential",
}  # fmt: skip


def basis(rows, rank, dtype=torch.float64):
    return torch.linalg.qr(torch.randn(rows, rank, dtype=torch.float64))[0].to(dtype)


def factors(rows=9, columns=7, rank=3, sigma=None, dtype=torch.float64):
    sigma = torch.rand(rank) + 0.5 if sigma is None else torch.tensor(sigma)
    return basis(rows, rank, dtype), torch.diag(sigma.sort(descending=True)[0].to(dtype)), basis(columns, rank, dtype)


def matrix(left, core, right):
    return left @ core @ right.mT


def projected(left, right, gradient):
    """Onto the tangent space of the matrices of this rank."""
    rows, columns = left @ left.mT, right @ right.mT
    return rows @ gradient + gradient @ columns - rows @ gradient @ columns


def error(basis):
    basis = basis.detach()
    return float((basis.mT @ basis - torch.eye(basis.shape[-1], dtype=basis.dtype)).abs().max())


# -- the mathematics ---------------------------------------------------------------------------------


def test_the_integer_vector():
    given = [[0.6], [0.8], [0]], [[2]], [[1], [0]], [[1, 0], [0, 1], [2, -1]]
    left, core, right, gradient = (torch.tensor(values, dtype=torch.float64) for values in given)
    stepped = dlrt.step(left, core, right, gradient, 0.5)
    expected = [[0.7, -0.0689655172], [1.6, -0.4482758621], [-1, 0.5344827586]]
    assert_close(matrix(*stepped), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
    sigma = torch.tensor([2.1152566293, 0.2589762585], dtype=torch.float64)
    assert_close(stepped[1], torch.diag(sigma), rtol=0, atol=1e-9)
    cut = dlrt.step(left, core, right, gradient, 0.5, rank_min=1, rank_max=1)
    expected = [[0.6529496548, -0.2131180500], [1.5781862775, -0.5151085990], [-1.0613801067, 0.3464267987]]
    assert cut[1].shape == (1, 1)
    assert_close(matrix(*cut), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_gradient_of_the_rank_makes_an_exact_step():
    old = factors()
    gradient = torch.randn(9, 3, dtype=torch.float64) @ torch.randn(3, 7, dtype=torch.float64)
    assert_close(matrix(*dlrt.step(*old, gradient, 0.3)), matrix(*old) - 0.3 * gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(16, 12), (12, 16)])
def test_the_step_of_a_matrix_of_full_rank_is_that_of_the_whole_gradient(shape):
    """One basis is complete; the other one has to turn all the same."""
    old, gradient = factors(*shape, 12), torch.randn(shape, dtype=torch.float64)
    whole = matrix(*old) - 0.3 * gradient
    assert_close(matrix(*dlrt.step(*old, gradient, 0.3)), whole, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(whole - matrix(*old)) == 12


def test_the_step_is_that_of_the_projected_gradient_and_descends():
    old, gradient = factors(20, 16, 4), torch.randn(20, 16, dtype=torch.float64)
    tangent, errors = projected(old[0], old[2], gradient), []
    for rate in (1e-2, 1e-3, 1e-4):
        moved = (matrix(*old) - matrix(*dlrt.step(*old, gradient, rate, rank_min=4, rank_max=4))) / rate
        errors.append(float((moved - tangent).norm() / tangent.norm()))
        whole = (matrix(*old) - matrix(*dlrt.step(*old, gradient, rate))) / rate
        assert (gradient * whole).sum() >= tangent.square().sum() * (1 - 1e-9)
    assert errors[0] > 5 * errors[1] > 25 * errors[2]  # of first order


def test_augmenting_keeps_the_matrix_and_both_old_bases_in_front():
    for shape, rank, wide in (((9, 7), 3, 6), ((9, 7), 5, 9), ((7, 9), 7, 9), ((4, 12), 3, 6)):
        old, gradient = factors(*shape, rank), torch.randn(shape, dtype=torch.float64)
        new = dlrt.augment(*old, gradient @ old[2], gradient.mT @ old[0])
        assert new[1].shape == (wide, wide)
        assert_close(matrix(*new), matrix(*old), rtol=0, atol=1e-12)
        for side, span in ((0, gradient @ old[2]), (2, gradient.mT @ old[0])):
            assert_close(new[side][:, :rank], old[side], rtol=0, atol=1e-12)
            whole = min(wide, shape[side // 2])  # zeros stand beside a complete basis
            assert error(new[side][:, :whole]) < 1e-13 and not new[side][:, whole:].any()
            outside = span - new[side] @ (new[side].mT @ span)
            assert outside.norm() < 1e-12 * span.norm()
        cut = dlrt.truncate(*new, 0.0, 99)
        assert cut[1].shape == (min(wide, *shape),) * 2 and error(cut[0]) < 1e-13 and error(cut[2]) < 1e-13
        assert_close(matrix(*cut), matrix(*old), rtol=0, atol=1e-12)


def test_where_there_is_no_room_for_all_directions_the_leading_ones_are_added():
    left, core, right = factors(9, 7, 5)
    outside = torch.linalg.svd(torch.eye(9, dtype=torch.float64) - left @ left.mT)[0][:, :3]
    grad_k = outside @ torch.diag(torch.tensor([1.0, 9.0, 5.0]).double()) @ basis(5, 3).mT
    new, _, _ = dlrt.augment(left, core, right, grad_k, torch.randn(7, 5, dtype=torch.float64), 7)
    assert_close((outside.mT @ new[:, 5:]).abs(), torch.tensor([[0.0, 0], [1, 0], [0, 1]]).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("smallest", [1e-1, 1e-4, 1e-8, 1e-12, 0.0])
def test_gradients_of_factors_give_those_of_both_sides(smallest):
    """Whatever the singular values: of a zero one, what ∂S knows."""
    left, core, right = (p.requires_grad_() for p in factors(sigma=[1.0, 0.5, smallest]))
    gradient = torch.randn(9, 7, dtype=torch.float64)
    (gradient * matrix(left, core, right)).sum().backward()
    values, gradients = [
        [t.detach() for t in each] for each in ((left, core, right), (left.grad, core.grad, right.grad))
    ]
    grad_k, grad_l = dlrt.side_gradients(values, gradients)
    known = slice(None) if smallest else slice(2)
    assert_close(grad_k[:, known], (gradient @ values[2])[:, known], rtol=1e-10, atol=1e-10)
    assert_close(grad_l[:, known], (gradient.mT @ values[0])[:, known], rtol=1e-10, atol=1e-10)
    assert_close(values[0].mT @ grad_k, values[0].mT @ gradient @ values[2], rtol=1e-10, atol=1e-10)
    new = dlrt.augment(*values, grad_k, grad_l)
    if smallest:
        of_core = dlrt.tangent_gradient(values, new, grad_k, grad_l, gradients[1])
        expected = new[0].mT @ projected(values[0], values[2], gradient) @ new[2]
        assert_close(of_core, expected, rtol=1e-9, atol=1e-9)
        assert_close(of_core[:3], (new[0].mT @ gradient @ new[2])[:3], rtol=1e-9, atol=1e-9)  # all but one block


def test_small_singular_values_slow_nothing_down():
    """Facts (c) and (d): factors by themselves stall, and dividing by the core explodes."""
    target = basis(8, 2) @ torch.diag(torch.tensor([4.0, 2.0]).double()) @ basis(6, 2).mT
    left, _, right = factors(8, 6, 2)
    reached, stalled, naive = [], [], []
    for smallest in (1e-1, 1e-4, 1e-8, 1e-12):
        core = torch.diag(torch.tensor([1.0, smallest]).double())
        both, dense = (left, core, right), matrix(left, core, right)
        first, second = left @ core.sqrt(), right @ core.sqrt()
        outside = (dense - target) - left @ left.mT @ (dense - target)
        naive.append(float((outside @ right @ torch.linalg.inv(core)).norm()))
        for _ in range(60):
            both = dlrt.step(*both, matrix(*both) - target, 0.05, rank_min=2, rank_max=2)
            dense = dense - 0.05 * (dense - target)
            rest = first @ second.mT - target
            first, second = first - 0.05 * rest @ second, second - 0.05 * rest.mT @ first
        reached.append(float((matrix(*both) - target).square().sum() / 2))
        stalled.append(float((first @ second.mT - target).square().sum() / 2))
        full = float((dense - target).square().sum() / 2)
        assert reached[-1] < 3 * full < 0.1
    assert max(reached) < 1.05 * min(reached)
    assert stalled[-1] > 10 * reached[-1] and naive[-1] > 1e10 * naive[0]


@pytest.mark.parametrize("start", [1, 2, 6])
def test_the_rank_of_a_target_is_found(start):
    target = basis(20, 3) @ torch.diag(torch.tensor([3.0, 2.0, 1.0]).double()) @ basis(16, 3).mT
    target = target + 0.02 / 16 * torch.randn(20, 16, dtype=torch.float64)
    left, core, right = factors(20, 16, start)
    for _ in range(30):
        gradient = matrix(left, core, right) - target
        left, core, right = dlrt.augment(left, core, right, gradient @ right, gradient.mT @ left)
        for _ in range(10):
            core = core - 0.3 * left.mT @ (matrix(left, core, right) - target) @ right
        left, core, right = dlrt.truncate(left, core, right, 0.01)
    assert core.shape == (3, 3) and error(left) < 1e-14 and error(right) < 1e-14
    best = torch.linalg.svdvals(target)[3:].norm()
    assert (matrix(left, core, right) - target).norm() < 1.01 * best


@pytest.mark.parametrize("steps", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_bases_stay_orthonormal_in_float32(steps):
    both, target = factors(16, 12, 3, dtype=torch.float32), torch.randn(16, 12)
    for _ in range(steps):
        gradient = matrix(*both) - target + 0.1 * torch.randn(16, 12)
        both = dlrt.step(*both, gradient, 0.05, rank_min=3, rank_max=3)
    assert error(both[0]) < 1e-5 and error(both[2]) < 1e-5


def test_heads_share_one_rank():
    heads = [dlrt.orthonormal(*(torch.randn(4, size, 3, dtype=torch.float64) for size in (9, 7)))]
    left, core, right = heads[0]
    gradient = torch.randn(4, 9, 7, dtype=torch.float64)
    new = dlrt.augment(left, core, right, gradient @ right, gradient.mT @ left)
    assert new[1].shape == (4, 6, 6)
    cut = dlrt.truncate(*new, 0.4)
    each = [dlrt.truncate(*(t[i] for t in new), 0.0, cut[1].shape[-1], cut[1].shape[-1]) for i in range(4)]
    assert_close(matrix(*cut), torch.stack([matrix(*one) for one in each]))
    lost = (matrix(*new) - matrix(*cut)).norm()
    assert lost <= 0.4 * matrix(*new).norm()
    assert_close(matrix(*dlrt.step(left, core, right, gradient, 0.1)).shape, gradient.shape)


# -- the mistakes of the released codes --------------------------------------------------------------


def test_d1_the_right_basis_is_that_of_the_svd():
    """They multiply by Vh where its transpose is right."""
    left, right, core = basis(9, 4), basis(7, 4), torch.randn(4, 4, dtype=torch.float64)
    sigma = torch.linalg.svdvals(core)
    for rank in (1, 2, 3, 4):
        cut = dlrt.truncate(left, core, right, 0.0, rank, rank)
        assert_close((matrix(left, core, right) - matrix(*cut)).norm(), sigma[rank:].norm(), rtol=1e-10, atol=1e-10)


def test_d2_the_tail_holds_the_last_singular_value():
    sigma = torch.tensor([1.0, 0.6, 0.3, 0.3]).double()
    share = float(torch.tensor([0.3, 0.3]).norm() / sigma.norm())
    assert dlrt.kept_rank(sigma, share * 1.001) == 2
    assert dlrt.kept_rank(sigma, share * 0.999) == 3  # without the last one 0.3 alone would have been cut
    assert dlrt.kept_rank(sigma, 0.3 / float(sigma.norm()) * 0.999) == 4


def test_d3_where_nothing_can_be_cut_the_augmented_rank_stays():
    sigma = torch.ones(8).double()
    assert dlrt.kept_rank(sigma, 0.1) == 8  # not the 4 that there were before
    assert dlrt.kept_rank(sigma, 0.1, rank_max=5) == 5
    assert dlrt.kept_rank(torch.tensor([1.0, 1e-9, 1e-9]), 0.1) == 2  # rank_min
    assert dlrt.kept_rank(torch.tensor([1.0, 1e-9, 1e-9]), 0.1, rank_min=1) == 1
    assert dlrt.kept_rank(torch.zeros(4), 0.1) == 2 and dlrt.kept_rank(torch.ones(1), 0.1) == 1


@pytest.mark.parametrize("optimizer", [{"optim": "sgd", "optim_args": "momentum=0.9"}, {"fnl_optim": "nag"}, {}])
def test_d4_momentum_goes_along(optimizer, tmp_path):
    """Where bases change, what an optimizer keeps of the core is what it would have kept in the new ones."""
    trainer, seen = make_trainer(make_model("bert"), tmp_path, **optimizer), []

    class Watch(RankAdaptation):
        def _put(self, each, left, core, right):
            old, kept = each.factors(), dict(self._optimizer.state.get(each.core) or {})
            super()._put(each, left, core, right)
            if kept:
                key = next(key for key in ("momentum_buffer", "velocity", "exp_avg") if key in kept)
                before, after = kept[key], self._optimizer.state[each.core][key]
                of_count = 1.0
                if "step" in kept and core.shape[-1] > old[1].shape[-1] and kept["step"] > 10:
                    of_count = float((1 - 0.9 ** kept["step"]) / (1 - 0.9**10))
                inside = left.mT @ (old[0] @ before @ old[2].mT) @ right
                assert_close(after * of_count, inside.view_as(after), rtol=1e-4, atol=1e-6)
                seen.append(float(after.norm()))

    trainer.callback_handler.callbacks[0] = Watch()
    trainer.train()
    assert len(seen) > 60 and min(seen) > 0


def test_d4_squares_stay_of_a_size_with_their_moments():
    """√v carried and squared, as the authors do, cancels: some entry's step would be enormous."""
    torch.manual_seed(1)
    gradients = torch.randn(50, 8, 8, dtype=torch.float64)
    mean, square = gradients.mean(0), gradients.square().mean(0)
    rows, columns = basis(8, 8).mT, basis(8, 8)
    ratio = dlrt.transported(mean, rows, columns, 1) / dlrt.transported(square, rows, columns, 2).sqrt()
    theirs = dlrt.transported(mean, rows, columns, 1) / (rows @ square.sqrt() @ columns)
    assert ratio.abs().max() < 1.5 * (mean / square.sqrt()).abs().max() < theirs.abs().max() / 5


def test_d5_a_fixed_rank_is_a_case_like_any_other(tmp_path):
    trainer = make_trainer(make_model("bert"), tmp_path, rank_min=3, rank_max=3, rank_interval=1, max_steps=5)
    trainer.train()
    assert set(ranks(trainer.model).values()) == {3}
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_d6_nothing_jumps_but_by_what_is_cut(tmp_path):
    """The function after augmenting is that before; after a cut it has moved by no more than the tolerance."""
    batch, moved = tf.default_data_collator(examples("bert")), []

    class Watch(RankAdaptation):
        def _put(self, each, left, core, right):
            before, was, old = self.run.model(**batch).logits.detach(), matrix(*each.factors()), each.rank
            super()._put(each, left, core, right)
            change = (matrix(*each.factors()) - was).norm() / was.norm()
            difference = (self.run.model(**batch).logits.detach() - before).abs().max()
            moved.append((float(change), float(difference)))
            if core.shape[-1] > old:
                assert difference < 1e-5 and change < 1e-6

    trainer = make_trainer(make_model("bert"), tmp_path, rank_min=7, max_steps=5)
    trainer.callback_handler.callbacks[0] = Watch()
    trainer.train()
    assert len(moved) == 28 and 1e-3 < max(change for change, _ in moved) <= 0.3


@pytest.mark.parametrize(
    "optimizer",
    [
        {}, {"optim": "sgd"}, {"optim": "adafactor"}, {"fnl_optim": "lamb"}, {"fnl_optim": "nag"},
        {"optim": "adamw_torch_fused"}, {"optim": "rmsprop"}, {"bf16": True}, {"gradient_checkpointing": True},
    ],
)  # fmt: skip
def test_d7_every_optimizer_of_a_trainer_takes_part(optimizer, tmp_path):
    rate = {"learning_rate": 0.5} if {"sgd", "nag"} & set(optimizer.values()) else {}
    trainer = make_trainer(make_model("bert"), tmp_path, **optimizer | rate)
    trainer.train()
    assert len(set(ranks(trainer.model).values())) > 1
    assert losses(trainer)[-1] < losses(trainer)[0]
    for layer in adaptive(trainer.model):
        left, _, right = layer.factors()
        assert error(left.double()) < 1e-5 and error(right.double()) < 1e-5
        assert layer.core in trainer.optimizer.state or trainer.args.optim == "sgd"


# -- a training run ----------------------------------------------------------------------------------


def make_trainer(model, out, config=LAYERS, rows=None, callbacks=(), **arguments):
    if not fnl_hf.factorizations(model) and config is not None:
        fnl_hf.factorize(model, config)
    args = fnl_hf.FNLTrainingArguments(output_dir=str(out), **ARGUMENTS | arguments)
    rows = (examples(model.config.model_type) if rows is None else rows) * 4
    return fnl_hf.FNLTrainer(model, args, train_dataset=rows, eval_dataset=rows[:8], callbacks=list(callbacks))


def ranks(model):
    return {each.name: each.rank for each in adaptive(model)}


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


class Phases(Rule):
    """The widths of one layer after every step, and what the model says."""

    def __init__(self):
        self.widths = []

    def after_step(self):
        self.widths.append(adaptive(self.run.model)[1].rank)


def test_ranks_grow_are_trained_and_are_cut(tmp_path):
    phases = Phases()
    trainer = make_trainer(make_model("bert"), tmp_path, callbacks=[phases])
    model = trainer.model
    trainer.train()
    key = "dlrt/rank/bert.encoder.layer.0.attention.self.query"
    settled = {row["step"]: row[key] for row in trainer.state.log_history if key in row}
    assert list(settled) == [1, 4, 8, 12] and settled[1] == 8  # once for every change
    expected = [16, 16, 16] + [settled[4]] + [2 * settled[4]] * 3 + [settled[8]] + [2 * settled[8]] * 3
    assert phases.widths == expected + [settled[12]] * 3
    assert 2 <= settled[12] < 8  # the last cycle, of two steps, trains the cores at these ranks
    found, logged = ranks(model), {}
    for row in trainer.state.log_history:
        logged |= {name: row[f"dlrt/rank/{name}"] for name in found if f"dlrt/rank/{name}" in row}
    last = next(row for row in reversed(trainer.state.log_history) if "dlrt/rank" in row)
    assert logged == found and not any(name.startswith("dlrt/rank/") for name in last)
    assert last["dlrt/rank"] == pytest.approx(sum(found.values()) / len(found), rel=1e-5)
    sizes = {each.name: _shape(each) for each in adaptive(model)}
    parameters = sum(found[name] * (rows + columns) for name, (rows, columns) in sizes.items())
    assert last["dlrt/compression"] == pytest.approx(parameters / sum(m * n for m, n in sizes.values()), rel=1e-5)
    phases = [row["dlrt/augmented"] for row in trainer.state.log_history[:-1]]
    assert phases == [1, 1, 1, 0] * 3 + [0, 0]


def test_ranks_keep_their_bounds(tmp_path):
    """Without a tolerance nothing but bounds is cut: rank_max, or half of what a matrix can have."""
    for bounds, expected in (({}, 16), ({"rank_max": 5}, 5), ({"rank_max": 100}, 32)):
        trainer = make_trainer(make_model("bert"), tmp_path, rank_tolerance=0.0, **bounds)
        trainer.train()
        assert set(ranks(trainer.model).values()) == {expected}


@pytest.mark.parametrize("model_type, interval", [("bert", 4), ("bert", 1), ("marian", 4), ("gpt2", 4)])
def test_a_run_resumed_in_any_phase_equals_the_uninterrupted_one(model_type, interval, tmp_path):
    """Marian shares one embedding between encoder, decoder and head: its cores are tied too."""
    start = fnl_hf.factorize(make_model(model_type), LAYERS)
    saving = {"save_strategy": "steps", "save_steps": 1, "frobenius_decay": 0.1, "weight_decay": 0.05, "max_steps": 10}
    whole = copy.deepcopy(start)
    trainer = make_trainer(whole, tmp_path / "run", rank_interval=interval, **saving)
    trainer.train()
    for step in (2, 4, 9) if interval == 4 else (1, 9):
        elsewhere = tmp_path / f"from{step}" / f"checkpoint-{step}"
        shutil.copytree(tmp_path / "run" / elsewhere.name, elsewhere)
        resumed = copy.deepcopy(start)
        other = make_trainer(resumed, elsewhere.parent, rank_interval=interval, **saving)
        other.train(resume_from_checkpoint=str(elsewhere))
        assert losses(other) == losses(trainer) and ranks(resumed) == ranks(whole)
        for (name, value), same in zip(whole.named_parameters(), resumed.parameters(), strict=True):
            assert_close(same, value, rtol=0, atol=0, msg=f"{step} {name}")
        state = json.loads((elsewhere / "trainer_state.json").read_text())["stateful_callbacks"]["RankAdaptation"]
        assert state["attributes"]["augmented"] == (step % 4 != 0 and step < 8 and interval == 4)


def test_a_checkpoint_between_augmenting_and_cutting_is_the_augmented_model(tmp_path):
    trainer = make_trainer(make_model("marian"), tmp_path, max_steps=8, save_strategy="steps", save_steps=2)
    seen = {}

    class Look(tf.TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            batch = tf.default_data_collator(examples("marian"))
            model.eval()
            seen[state.global_step] = ranks(model), model(**batch).logits.detach()
            model.train()

    trainer.add_callback(Look())
    trainer.train()
    batch = tf.default_data_collator(examples("marian"))
    for step, (widths, logits) in seen.items():
        loaded = tf.MarianMTModel.from_pretrained(tmp_path / f"checkpoint-{step}").eval()
        assert ranks(loaded) == widths
        assert_close(loaded(**batch).logits, logits, rtol=0, atol=0)
    assert seen[2][0] != seen[4][0]


def test_generation_in_the_middle_of_a_run_is_that_of_the_dense_model(tmp_path):
    inputs, done = examples("marian")[0]["input_ids"][None], []

    class Generate(Rule):
        def after_step(self):
            model = self.run.model.eval()
            dense = fnl_hf.to_dense(copy.deepcopy(model))
            options = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
            assert torch.equal(model.generate(inputs, **options), dense.generate(inputs, **options))
            assert_close(model(inputs, decoder_input_ids=inputs).logits, dense(inputs, decoder_input_ids=inputs).logits)
            model.train()
            done.append(1)

    make_trainer(make_model("marian"), tmp_path, max_steps=6, rank_interval=2, callbacks=[Generate()]).train()
    assert len(done) == 6


@pytest.mark.parametrize("model_type", ["bert", "marian", "gpt2"])
@pytest.mark.parametrize("steps", [4, 2])
def test_fixed_ranks_are_ordinary_layers_of_the_same_function(model_type, steps, tmp_path):
    """Trained on, saved and loaded as any; also where the run was left between augmenting and cutting."""

    class Stop(tf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == steps

    model = make_model(model_type)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    make_trainer(model, tmp_path, callbacks=[Stop()]).train()
    batch, widths = tf.default_data_collator(examples(model_type)), ranks(model)
    logits = model.eval()(**batch).logits
    assert fnl_hf.fix_ranks(model) is model
    assert_close(model(**batch).logits, logits, rtol=1e-4, atol=1e-5)
    assert ranks(model) == widths
    for product in fnl_hf.factorizations(model):
        left, right = product.factors()
        assert_close(left.mT @ left, right @ right.mT, rtol=1e-4, atol=1e-5)
    assert trainable <= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(each.bases[1].requires_grad and each.core is None for each in adaptive(model))
    model.save_pretrained(tmp_path / "fixed")
    loaded = type(model).from_pretrained(tmp_path / "fixed").eval()
    assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)
    trainer = make_trainer(loaded, tmp_path / "on", rank_adaptation=None, rank_interval=100, rank_tolerance=0.1)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    dense = fnl_hf.to_dense(model)
    assert_close(dense(**batch).logits, logits, rtol=1e-4, atol=1e-5)


def test_accumulation_gives_the_same_update(tmp_path):
    """One batch of 8 against four of 2 and eight of 1, with unequal numbers of labels."""
    start, results = fnl_hf.factorize(make_model("bert"), LAYERS).double(), []
    for batch, accumulate in ((8, 1), (2, 4), (1, 8)):
        model = copy.deepcopy(start)
        arguments = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate, "max_steps": 6}
        make_trainer(model, tmp_path, optim="sgd", learning_rate=0.1, rank_interval=2, **arguments).train()
        results.append((ranks(model), [each.product.matrix().detach() for each in adaptive(model)]))
    for other in results[1:]:
        assert other[0] == results[0][0]
        for one, same in zip(results[0][1], other[1], strict=True):
            assert (one - same).norm() < 1e-5 * one.norm()


class Still(Rule):
    """Makes the gradient of the loss nothing before decay joins it."""

    def after_backward(self, scale, logged):
        for parameter in self.run.model.parameters():
            if parameter.grad is not None and parameter.dim() > 1:
                parameter.grad.mul_(1e-12)


def train_by_decay_alone(model, out, rate, mode, decay):
    """Four steps of two cycles, without a cut that matters."""
    arguments = {"frobenius_decay": 0.0, "frobenius_decay_mode": mode, "optim": "sgd", "max_grad_norm": 0.0} | decay
    arguments |= {"lr_scheduler_type": "constant", "max_steps": 4, "rank_interval": 2, "rank_tolerance": 1e-9}
    trainer = make_trainer(model, out, learning_rate=rate, **arguments)
    trainer.callback_handler.callbacks.insert(1, Still())
    trainer.train()


@pytest.mark.parametrize("decay", [{"weight_decay": 0.5}, {"frobenius_decay": 0.5}])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_decay_shrinks_the_core_alone(decay, mode, tmp_path):
    """A rate so low that the loss moves nothing: the product shrinks by (1 − rate · λ) a step, bases not at all."""
    rate = 0.01
    model = fnl_hf.factorize(make_model("bert"), LAYERS).double()
    before = [each.product.matrix().detach() for each in adaptive(model)]

    train_by_decay_alone(model, tmp_path, rate, mode, decay)
    for each, was in zip(adaptive(model), before, strict=True):
        assert_close(each.product.matrix().detach(), was * (1 - rate * 0.5) ** 4, rtol=1e-7, atol=1e-9)
        left, _, right = each.factors()
        assert error(left) < 1e-12 and error(right) < 1e-12


def test_gradients_that_are_not_finite_augment_nothing(tmp_path):
    """As in the steps that fp16's loss scaling skips: the next step tries again."""
    phases = Phases()
    trainer = make_trainer(make_model("bert"), tmp_path, callbacks=[phases], max_steps=9)

    class Overflow(Rule):
        """First of all: it stands for the backward."""

        def after_backward(self, scale, logged):
            if self.run.state.global_step == 0:
                for parameter in self.run.model.parameters():
                    parameter.grad = None if parameter.grad is None else torch.full_like(parameter, torch.inf)

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 0:
                for parameter in self.run.model.parameters():
                    parameter.grad = None

    trainer.callback_handler.callbacks.insert(0, Overflow())
    trainer.train()
    assert phases.widths[:3] == [8, 16, 16] and phases.widths[3] < 16


def test_adam_takes_new_entries_no_further_than_old_ones(tmp_path):
    """After many steps squares that start from zero would make steps of 6.5 times the rate."""
    steps = []

    class Watch(Rule):
        def after_backward(self, scale, logged):
            self.before = [each.core.detach().clone() for each in adaptive(self.run.model)]

        def after_step(self):
            if self.run.state.global_step in range(61, 75):  # within the cycle: the cut comes at 80
                after = [each.core.detach() for each in adaptive(self.run.model)]
                steps.append(max(float((a - b).abs().max()) for a, b in zip(after, self.before, strict=True)))

    arguments = {"rank_interval": 20, "max_steps": 100, "rank_min": 8, "lr_scheduler_type": "constant"}
    make_trainer(make_model("bert"), tmp_path, callbacks=[Watch()], learning_rate=1e-3, **arguments).train()
    assert len(steps) == 14 and max(steps) < 1.5e-3


def test_the_best_model_comes_back_with_its_ranks(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 3}
    trainer = make_trainer(make_model("bert"), tmp_path, save_strategy="steps", max_steps=12, **best)
    trainer.evaluate = lambda *args, **kwargs: {"eval_loss": abs(trainer.state.global_step - 3.0)}
    trainer._evaluate = lambda *args, **kwargs: {"eval_loss": abs(trainer.state.global_step - 3.0)}
    trainer.train()
    saved = tf.BertForMaskedLM.from_pretrained(tmp_path / "checkpoint-3")
    assert ranks(trainer.model) == ranks(saved) and max(ranks(saved).values()) == 16


def test_a_run_that_goes_on_adapts_again(tmp_path):
    trainer = make_trainer(make_model("bert"), tmp_path)
    trainer.train()
    before = ranks(trainer.model)
    trainer.train()
    assert ranks(trainer.model) != before
    held = {parameter for group in trainer.optimizer.param_groups for parameter in group["params"]}
    for each in adaptive(trainer.model):
        assert each.core in held and held.isdisjoint(each.bases)
        assert all(basis.requires_grad for basis in each.bases)  # for whoever trains it next


def test_a_state_that_transformers_restores_goes_on(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "restore_callback_states_from_checkpoint": True}
    start, trained = fnl_hf.factorize(make_model("bert"), LAYERS), []
    for resume in (None, str(tmp_path / "checkpoint-6")):
        model = copy.deepcopy(start)
        trainer = make_trainer(model, tmp_path, max_steps=10, frobenius_decay_mode="coupled", **options)
        trainer.train(resume_from_checkpoint=resume)
        trained.append(model)
    assert ranks(trained[0]) == ranks(trained[1])
    for value, same in zip(*(model.parameters() for model in trained), strict=True):
        assert_close(same, value, rtol=1e-4, atol=1e-5)


def test_convolutions_adapt(tmp_path):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_channels": 3, "num_labels": 3}
    model = tf.ResNetForImageClassification(tf.ResNetConfig(**sizes, layer_type="basic"))
    rows = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 3} for i in range(8)]
    trainer = make_trainer(model, tmp_path, rows=rows, rank_tolerance=0.5)
    trainer.train()
    assert len(set(ranks(model).values())) > 1 and any(size[0] != size[1] for size in map(_shape, adaptive(model)))
    images, logits = rows[0]["pixel_values"][None], model.eval()(rows[0]["pixel_values"][None]).logits
    assert_close(fnl_hf.fix_ranks(model)(images).logits, logits, rtol=1e-4, atol=1e-5)


def _shape(each):
    left, _, right = each.factors()
    return left.shape[-2], right.shape[-2]


def test_a_deep_layer_adapts_too(tmp_path):
    config = fnl_hf.FNLConfig(attention=(), target_modules="all-linear", rank=0.25, form="deep")
    trainer = make_trainer(make_model("bert"), tmp_path, config)
    trainer.train()
    assert len(set(ranks(trainer.model).values())) > 1


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"rank_adaptation": "tdlrt"}, NotImplementedError, "rank_adaptation='tdlrt'.*use 'dlrt'"),
        ({"rank_adaptation": "svd"}, ValueError, "rank_adaptation is 'svd', expected one of"),
        ({"rank_tolerance": 1.0}, ValueError, "rank_tolerance is 1.0, expected at least 0 and below 1"),
        ({"rank_tolerance": -0.1}, ValueError, "rank_tolerance is -0.1, expected at least 0 and below 1"),
        ({"rank_tolerance": float("nan")}, ValueError, "rank_tolerance is nan"),
        ({"rank_interval": 0}, ValueError, "rank_interval is 0, expected an int of at least 1"),
        ({"rank_interval": 2.5}, ValueError, "rank_interval is 2.5, expected an int"),
        ({"rank_min": 0}, ValueError, "rank_min is 0, expected an int of at least 1"),
        ({"rank_max": 0}, ValueError, "rank_max is 0, expected an int of at least 1"),
        ({"rank_max": 3, "rank_min": 4}, ValueError, "rank_max is 3, below rank_min 4"),
        ({"fnl_optim": "spectron"}, ValueError, "does not work with fnl_optim='spectron'"),
        ({"factorize_at": "3"}, ValueError, "does not work with factorize_at='3'"),
        ({"rank_adaptation": None, "rank_interval": 4}, ValueError, "rank_interval is 4, but rank_adaptation is None"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments, error, message, tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "rank_adaptation": "dlrt"} | arguments
    with pytest.raises(error, match=message):
        fnl_hf.FNLTrainingArguments(**options)


def test_models_that_cannot_adapt_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing in it is factorized: call fnl_hf.factorize"):
        make_trainer(make_model("bert"), tmp_path, config=None)
    with pytest.raises(
        ValueError,
        match="attention.self.qk and 3 more keep their rank, since heads have their full width.*head_rank=0.25",
    ):
        make_trainer(make_model("bert"), tmp_path, config=fnl_hf.FNLConfig())
    with pytest.raises(ValueError, match="is of torch.bfloat16, in which no basis stays orthonormal.*bf16=True"):
        make_trainer(fnl_hf.factorize(make_model("bert"), LAYERS).bfloat16(), tmp_path)
    frozen = fnl_hf.factorize(make_model("bert"), LAYERS).requires_grad_(False)
    with pytest.raises(ValueError, match="not all factors train"):
        make_trainer(frozen, tmp_path)
    with pytest.raises(ValueError, match="BertForMaskedLM is not factorized: there are no ranks to fix"):
        fnl_hf.fix_ranks(make_model("bert"))


def test_what_cannot_be_right_is_refused(tmp_path):
    model = fnl_hf.factorize(make_model("bert"), LAYERS)
    with pytest.raises(ValueError, match="does not work with torch_compile"):
        make_trainer(model, tmp_path, torch_compile=True)
    args = fnl_hf.FNLTrainingArguments(output_dir=str(tmp_path), **ARGUMENTS)
    optimizer = torch.optim.AdamW(model.parameters())
    given = fnl_hf.FNLTrainer(model, args, train_dataset=examples("bert"), optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="does not hold the core of .*: let `train` of a new trainer make"):
        given.train()
    with pytest.warns(UserWarning, match="rank_interval is 100, but the run has 2 steps: no rank will change"):
        make_trainer(make_model("bert"), tmp_path, rank_interval=100, max_steps=2).train()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    fixed = {"rank_adaptation": None, "rank_interval": 100, "rank_tolerance": 0.1}
    make_trainer(make_model("bert"), tmp_path, max_steps=2, save_strategy="steps", save_steps=2, **fixed).train()
    with pytest.raises(ValueError, match="does not hold bert.embeddings.word_embeddings as U S Vᵀ"):
        make_trainer(make_model("bert"), tmp_path).train(resume_from_checkpoint=True)


# -- two processes -----------------------------------------------------------------------------------

JOB = """
import sys, torch
import fnl_hf
from tests.test_dlrt import ARGUMENTS, LAYERS, adaptive
from tests.test_trainer import examples, make_model

batch, accumulate, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
for optim, rate in (("sgd", 0.1), ("adamw_torch", 1e-3)):
    model = fnl_hf.factorize(make_model("bert").double(), LAYERS)
    options = ARGUMENTS | {"optim": optim, "learning_rate": rate, "max_steps": 5, "rank_interval": 2}
    options |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
    args = fnl_hf.FNLTrainingArguments(output_dir=out, **options | {"frobenius_decay": 0.05})
    trainer = fnl_hf.FNLTrainer(model, args, train_dataset=examples("bert") * 3)
    trainer.train()
    whole = {each.name: each.product.matrix().detach() for each in adaptive(model)}
    whole |= {name: p.detach() for name, p in model.named_parameters() if p.dim() == 1}
    torch.save(whole, f"{out}/{optim}-{trainer.args.process_index}.pt")
    ranks = {each.name: each.rank for each in adaptive(model)}
    torch.save(ranks, f"{out}/{optim}-ranks-{trainer.args.process_index}.pt")
"""


@pytest.mark.slow
def test_two_processes_have_the_ranks_and_make_the_update_of_one(tmp_path):
    for processes, batch, accumulate in ((1, 8, 1), (2, 2, 2)):
        out = tmp_path / str(processes)
        out.mkdir()
        run_job(tmp_path, JOB, processes, batch, accumulate, out)
    for optim in ("sgd", "adamw_torch"):
        one, *both = (torch.load(tmp_path / place / f"{optim}-{i}.pt") for place, i in (("1", 0), ("2", 0), ("2", 1)))
        counts = [torch.load(tmp_path / place / f"{optim}-ranks-{i}.pt") for place, i in (("1", 0), ("2", 0), ("2", 1))]
        assert counts[0] == counts[1] == counts[2] and len(set(counts[0].values())) > 1
        for name in one:
            assert_close(both[0][name], both[1][name], rtol=0, atol=0, msg=name)
        size = torch.cat([value.flatten() for value in one.values()]).norm()
        difference = torch.cat([(one[name] - both[0][name]).flatten() for name in one]).norm()
        assert difference < 1e-6 * size
