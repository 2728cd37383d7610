"""Training that starts dense and factorizes on its way: the switch itself, and resuming around it."""

import copy
import shutil

import pytest
import torch
import transformers as tf
from torch.testing import assert_close

import fnl_hf
from fnl_hf.algebra import chain, rotary
from fnl_hf.measure import mean_stable_rank
from fnl_hf.warm_start import WarmStart, parse_switch, switch
from tests.test_trainer import examples, make_model

HALF = fnl_hf.FNLConfig(head_rank=0.5)


def make_trainer(model, out, config=HALF, rows=None, **arguments):
    arguments = {
        "per_device_train_batch_size": 4, "max_steps": 8, "learning_rate": 1e-2, "optim": "adamw_torch",
        "report_to": "none", "use_cpu": True, "save_steps": 2, "disable_tqdm": True, "logging_steps": 2,
        "factorize_at": "3", "frobenius_decay": 0.1, "weight_decay": 0.05, **arguments,
    }  # fmt: skip
    args = fnl_hf.FNLTrainingArguments(output_dir=str(out), **arguments)
    rows = (examples("bert") if rows is None else rows) * 2
    return fnl_hf.FNLTrainer(model=model, args=args, train_dataset=rows, fnl_config=config)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("config", [HALF, fnl_hf.FNLConfig()])
@pytest.mark.parametrize("optimizer", [{}, {"optim": "sgd"}, {"fnl_optim": "lamb"}, {"optim": "adafactor"}])
def test_a_run_resumed_around_the_switch_equals_the_uninterrupted_one(config, optimizer, tmp_path):
    start = make_model("bert")
    whole = copy.deepcopy(start)
    trainer = make_trainer(whole, tmp_path / "run", config, **optimizer)
    trainer.train()
    assert trainer.state.global_step == 8 and len(fnl_hf.factorizations(whole)) == 4
    saved = {step: tmp_path / "run" / f"checkpoint-{step}" for step in (2, 3, 4)}  # before, at, after the switch
    for step, checkpoint in saved.items():
        elsewhere = tmp_path / f"from{step}" / checkpoint.name
        shutil.copytree(checkpoint, elsewhere)
        resumed = copy.deepcopy(start)
        make_trainer(resumed, elsewhere.parent, config, **optimizer).train(resume_from_checkpoint=str(elsewhere))
        for name, value in weights(whole).items():
            assert_close(weights(resumed)[name], value, rtol=0, atol=0, msg=f"{step} {name}")


def test_the_switch_at_full_rank_changes_neither_loss_nor_schedule(tmp_path):
    """A rate so low that weights stand still: losses before and after the switch are those of the dense run."""
    losses = {}
    for at in (None, "4"):
        arguments = {"learning_rate": 1e-9, "logging_steps": 1, "frobenius_decay": None, "factorize_at": at}
        trainer = make_trainer(make_model("bert"), tmp_path / str(at), fnl_hf.FNLConfig() if at else None, **arguments)
        trainer.train()
        losses[at] = [(row["loss"], row["learning_rate"]) for row in trainer.state.log_history if "loss" in row]
    assert len(losses["4"]) == 8
    for (loss, rate), (other, other_rate) in zip(losses[None], losses["4"], strict=True):
        assert loss == pytest.approx(other, rel=1e-5) and rate == other_rate


def test_groups_and_counts_go_on(tmp_path):
    trainer = make_trainer(make_model("bert"), tmp_path)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert {int(state["step"]) for state in optimizer.state.values()} == {8}
    covered = {p for f in fnl_hf.factorizations(trainer.model) for p in f.parameters()}
    assert all(not covered & set(group["params"]) for group in optimizer.param_groups if group["weight_decay"])
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [2, 3, 4, 6, 8]


def test_moments_of_gradients_are_carried_exactly():
    """The gradient at the factors of a truncated product follows from the gradient at its heads."""
    left, right = torch.randn(3, 7, 4, dtype=torch.float64), torch.randn(3, 4, 6, dtype=torch.float64)
    new = chain.balance((left, right), 2)
    of_product = torch.randn(3, 7, 6, dtype=torch.float64)
    moments = of_product @ right.mT, left.mT @ of_product
    carried = chain.carry((left, right), new, moments, 1)
    assert_close(carried[0], of_product @ new[1].mT)
    assert_close(carried[1], new[0].mT @ of_product)
    squares = chain.carry((left, right), new, [m.square() for m in moments], 2)
    assert all((s >= 0).all() and s.shape == c.shape for s, c in zip(squares, carried, strict=True))


def test_moments_of_a_group_are_carried_exactly():
    left, right = torch.randn(2, 3, 7, 4, dtype=torch.float64), torch.randn(2, 1, 4, 6, dtype=torch.float64)
    new = chain.balance((left, right), 2)
    of_product = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    moments = of_product @ right.mT, (left.mT @ of_product).sum(1, keepdim=True)
    carried = chain.carry((left, right), new, moments, 1)
    assert_close(carried[0], of_product @ new[1].mT)
    assert_close(carried[1], (new[0].mT @ of_product).sum(1, keepdim=True))


def test_moments_of_rotary_planes_are_carried_exactly():
    planes = [torch.randn(2, 1, 3, 2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def score(queries, keys):  # any function of the planes' products
        return ((queries.flatten(-2)[..., None] * keys.flatten(-2)[..., None, :]).sin()).sum()

    new = [plane.detach().requires_grad_() for plane in rotary.balance(planes)]
    old_gradients = torch.autograd.grad(score(*planes), planes)
    new_gradients = torch.autograd.grad(score(*new), new)
    for carried, expected in zip(rotary.carry(planes, new, old_gradients, 1), new_gradients, strict=True):
        assert_close(carried.detach(), expected)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "marian"])
def test_momentum_after_the_switch_is_that_of_the_factors(model_type):
    """Full rank, so that the factors' gradient at the same function is known: it must be what the state becomes."""
    model = make_model(model_type).double()
    batch = tf.default_data_collator(examples(model_type))
    model(**batch).loss.backward()
    state = {n: {"momentum_buffer": p.grad.clone()} for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    carried = switch(model, fnl_hf.FNLConfig(), state)
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(carried[name]["momentum_buffer"], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_stable_rank_is_that_of_the_matrices():
    model = fnl_hf.factorize(make_model("bert"), fnl_hf.FNLConfig())
    for product in fnl_hf.factorizations(model):
        sigma = torch.linalg.svdvals(product.matrix().detach())
        expected = (sigma.square().sum(-1) / sigma[:, 0].square()).mean()
        assert mean_stable_rank(product) == pytest.approx(float(expected), rel=1e-4)


def test_stable_waits_for_the_ranks_and_no_longer_than_half_the_run(tmp_path):
    still = make_trainer(make_model("bert"), tmp_path / "still", factorize_at="stable", learning_rate=1e-9)
    still.train()  # nothing moves: settled at the second look
    assert sum("loss" in row for row in still.state.log_history if row["step"] == 2) == 1
    assert fnl_hf.factorizations(still.model) and (tmp_path / "still" / "checkpoint-2" / "config.json").exists()
    assert "quantization_config" in (tmp_path / "still" / "checkpoint-2" / "config.json").read_text()
    wild = make_trainer(
        make_model("bert"), tmp_path / "wild", factorize_at="stable", learning_rate=0.5, frobenius_decay=0.0
    )
    wild.train()
    assert "quantization_config" not in (tmp_path / "wild" / "checkpoint-2" / "config.json").read_text()
    assert "quantization_config" in (tmp_path / "wild" / "checkpoint-4" / "config.json").read_text()


def test_a_resumed_run_looks_back_to_the_last_stable_ranks():
    warm = WarmStart("stable", HALF)
    warm.stable_ranks = [1.5, 2.5]
    state = tf.TrainerState(stateful_callbacks=[warm], max_steps=80)
    again = WarmStart("stable", HALF)
    again.on_train_begin(None, state, None, model=make_model("bert"))
    assert again.stable_ranks == [1.5, 2.5]


def test_without_checkpoints_none_is_left(tmp_path):
    trainer = make_trainer(make_model("bert"), tmp_path, save_strategy="no")
    trainer.train()
    assert fnl_hf.factorizations(trainer.model) and not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("at", ["0", "1.5", "soon", "-3", "nan"])
def test_a_switch_that_has_no_meaning_is_refused(at):
    with pytest.raises(ValueError, match="expected a step such as 300"):
        parse_switch(at)


def test_what_cannot_work_is_said_at_start(tmp_path):
    with pytest.raises(ValueError, match="without fnl_config"):
        make_trainer(make_model("bert"), tmp_path, None)
    with pytest.raises(ValueError, match="without factorize_at"):
        make_trainer(make_model("bert"), tmp_path, factorize_at=None)
    with pytest.raises(ValueError, match="the run has 8 steps"):
        make_trainer(make_model("bert"), tmp_path, factorize_at="8").train()
    with pytest.raises(ValueError, match="factorized already"):
        make_trainer(fnl_hf.factorize(make_model("bert")), tmp_path).train()
    with pytest.raises(ValueError, match="save_only_model"):
        make_trainer(make_model("bert"), tmp_path, save_only_model=True)
    with pytest.raises(ValueError, match="head rank 500 is above"):
        make_trainer(make_model("bert"), tmp_path, fnl_hf.FNLConfig(head_rank=500)).train()
