"""Runs whose ranks adapt and that are not as others: stopped, partly reached, started again, or at their bounds."""

import copy
import json
from functools import reduce

import pytest
import torch
import transformers as tf
from torch import nn
from torch.testing import assert_close
from transformers import TrainerCallback

import fnl_hf
from fnl_hf.ranks import adaptive
from fnl_hf.rules import RankAdaptation
from tests.script_runs import run_script
from tests.test_dlrt import ARGUMENTS, LAYERS, make_trainer, ranks
from tests.test_run_record import TINY, TRANSLATION
from tests.test_trainer import examples, make_model

pytestmark = pytest.mark.usefixtures("one_thread")


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action(control)


def stop(control):
    control.should_training_stop = True


def interrupt(control):
    raise KeyboardInterrupt


def weights(model):
    """name -> the matrix of a layer, (m, n)."""
    products = fnl_hf.factorizations(model)
    return {product.name: reduce(torch.matmul, product.factors())[0].detach() for product in products}


def test_what_a_run_reports_is_the_model_that_it_leaves(tmp_path):
    """Stopped between growing and cutting, it has the ranks that it has."""
    trainer = make_trainer(make_model("bert"), tmp_path, callbacks=[At(6, stop)])
    metrics = trainer.train().metrics
    found = ranks(trainer.model)
    assert metrics["dlrt_rank"] == pytest.approx(sum(found.values()) / len(found))
    fnl_hf.fix_ranks(trainer.model)
    shapes = {name: matrix.shape for name, matrix in weights(trainer.model).items()}
    kept = sum(product.size()[1] * sum(shapes[product.name]) for product in fnl_hf.factorizations(trainer.model))
    dense = sum(rows * columns for rows, columns in shapes.values())
    assert metrics["dlrt_compression"] == pytest.approx(kept / dense)


def test_after_an_interrupt_everything_trains_as_before(tmp_path):
    trainer = make_trainer(make_model("bert"), tmp_path, callbacks=[At(6, interrupt)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_a_trainer_whose_model_was_given_other_factors_says_so(tmp_path):
    trainer = make_trainer(make_model("bert"), tmp_path)
    trainer.train()
    fnl_hf.fix_ranks(trainer.model)
    before = weights(trainer.model)
    with pytest.raises(ValueError, match="does not hold the core of .*: let `train` of a new trainer"):
        trainer.train()
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert_close(weights(trainer.model), before, rtol=0, atol=0)
    again = make_trainer(trainer.model, tmp_path, config=None)
    again.train()
    assert any(not torch.allclose(value, before[name]) for name, value in weights(trainer.model).items())


class Idle(nn.Module):
    """A model beside a layer that is never called."""

    def __init__(self, model):
        super().__init__()
        self.model, self.idle, self.config = model, nn.Linear(24, 32), model.config

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


def test_a_layer_that_no_step_reaches_stays_as_it_is(tmp_path):
    model = Idle(make_model("bert"))
    fnl_hf.factorize(model, fnl_hf.FNLConfig(attention=(), target_modules=["idle", "query"], rank=0.25))
    before = weights(model)
    options = {"weight_decay": 0.5, "frobenius_decay": 0.0, "max_steps": 6, "remove_unused_columns": False}
    args = fnl_hf.FNLTrainingArguments(output_dir=str(tmp_path), **ARGUMENTS | options)
    fnl_hf.FNLTrainer(model, args, train_dataset=examples("bert")).train()
    after = weights(model)
    moved = {name for name, value in after.items() if not torch.allclose(value, before[name], rtol=0, atol=1e-6)}
    assert moved == before.keys() - {"idle"} and moved


def test_steps_that_reach_nothing_grow_nothing(tmp_path):
    """LayerDrop may skip the only layer that adapts."""
    config = tf.BartConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_layerdrop=1.0,
        max_position_embeddings=32, decoder_start_token_id=2,
    )  # fmt: skip
    model = tf.BartForConditionalGeneration(config)
    layer = fnl_hf.FNLConfig(attention=(), target_modules=["encoder.layers.0.fc1"], rank=0.25)
    fnl_hf.factorize(model, layer)
    before = weights(model)
    ids = torch.arange(5, 11)
    args = fnl_hf.FNLTrainingArguments(output_dir=str(tmp_path), **ARGUMENTS | {"max_steps": 6})
    trainer = fnl_hf.FNLTrainer(model, args, train_dataset=[{"input_ids": ids, "labels": ids}] * 8)
    trainer.train()
    assert_close(weights(model), before, rtol=0, atol=1e-6)
    assert set(ranks(model).values()) == {4}


@pytest.mark.parametrize("bounds, expected", [({"rank_min": 20}, 20), ({"rank_min": 40}, 32)])
def test_the_lowest_rank_is_kept_where_a_matrix_can_have_it(bounds, expected, tmp_path):
    trainer = make_trainer(make_model("bert"), tmp_path, rank_tolerance=0.9, **bounds)
    trainer.train()
    assert set(ranks(trainer.model).values()) == {expected}
    with pytest.raises(ValueError, match="rank_min is 2.0, expected an int of at least 1"):
        make_trainer(make_model("bert"), tmp_path, rank_min=2.0)


def test_layers_of_full_rank_leave_their_column_space_and_resume(tmp_path):
    """Their bases have columns of zeros while they are grown: also in a checkpoint."""
    start = fnl_hf.factorize(make_model("bert").double(), fnl_hf.FNLConfig(**LAYERS.to_dict() | {"rank": 1.0}))
    options = {"rank_max": 100, "rank_tolerance": 0.0, "max_steps": 10, "save_strategy": "steps", "save_steps": 1}
    whole = copy.deepcopy(start)
    make_trainer(whole, tmp_path, **options).train()
    assert set(ranks(whole).values()) == {32}
    name = "bert.encoder.layer.0.intermediate.dense"
    before, now = weights(start)[name], weights(whole)[name]
    rows, columns = before.shape
    assert rows > columns == 32
    left = torch.linalg.qr(before)[0]
    assert (now - left @ (left.mT @ now)).norm() > 1e-2 * now.norm()
    loaded = tf.BertForMaskedLM.from_pretrained(tmp_path / "checkpoint-2", dtype=torch.float64)
    assert {product.name: product.size()[1] for product in fnl_hf.factorizations(loaded)}[name] == rows
    resumed = copy.deepcopy(start)
    make_trainer(resumed, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (key, value), same in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert_close(same, value, rtol=0, atol=0, msg=key)


def test_a_first_step_that_loss_scaling_skips(tmp_path):
    """The fused optimizer has a state by then, and has counted no step."""
    trainer = make_trainer(make_model("bert"), tmp_path, optim="adamw_torch_fused", max_steps=6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-110)
    trainer.accelerator.scaler = scaler
    trainer.train()
    assert scaler.get_scale() < 2.0**100  # it has skipped one
    assert all(value.isfinite().all() for value in weights(trainer.model).values())


def test_processes_without_anything_beside_the_factors_are_told(tmp_path, monkeypatch):
    model = fnl_hf.factorize(make_model("bert"), LAYERS)
    factors = {parameter for product in fnl_hf.factorizations(model) for parameter in product.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in factors)
    trainer = make_trainer(model, tmp_path, config=None)
    monkeypatch.setattr(RankAdaptation, "_processes", 2)
    with pytest.raises(ValueError, match="several processes needs a parameter that trains beside the factors"):
        trainer.train()
    assert all(basis.requires_grad for each in adaptive(model) for basis in each.bases)


def test_a_model_from_within_a_cycle_is_told_and_can_be_cut(tmp_path, capfd):
    trainer = make_trainer(make_model("bert"), tmp_path, callbacks=[At(6, stop)], rank_max=10)
    trainer.train()
    assert "fnl_hf.fix_ranks(model, rank_tolerance=0.3) cuts them" in capfd.readouterr().err
    grown, whole = ranks(trainer.model), weights(trainer.model)
    assert max(grown.values()) > 10
    fnl_hf.fix_ranks(trainer.model, rank_tolerance=0.2, rank_max=10)
    for product in fnl_hf.factorizations(trainer.model):
        sigma = torch.linalg.svdvals(whole[product.name].double())
        tails = sigma.square().flip(0).cumsum(0).flip(0).sqrt()
        fits = int((tails > 0.2 * tails[0]).sum())
        assert product.size()[1] == min(fits, 10) and product.layout == ""
        cut = weights(trainer.model)[product.name]
        assert_close((cut - whole[product.name]).norm(), tails[product.size()[1]].float(), rtol=1e-3, atol=1e-5)
    for wrong in ({"rank_tolerance": 1.0}, {"rank_max": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*, expected"):
            fnl_hf.fix_ranks(trainer.model, **wrong)


def test_the_start_says_what_can_only_sink(tmp_path, capfd):
    make_trainer(make_model("bert"), tmp_path, config=fnl_hf.FNLConfig(head_rank=0.5), max_steps=6).train()
    printed = capfd.readouterr().err
    assert "adapt every 4 steps at a tolerance of 0.3, up to 4; 4 of them cannot grow beyond where they are" in printed
    assert "bases" in printed and "frozen" not in printed


def test_a_checkpoint_whose_ranks_adapted_is_refused_without_it(tmp_path):
    make_trainer(make_model("bert"), tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    fixed = {"rank_adaptation": None, "rank_interval": 100, "rank_tolerance": 0.1}
    with pytest.raises(ValueError, match="is of a run with rank_adaptation='dlrt', and here it is None"):
        make_trainer(make_model("bert"), tmp_path, **fixed).train(resume_from_checkpoint=True)


def test_a_script_saves_ordinary_factors_and_starts_again_from_what_it_has(monkeypatch, tmp_path, capsys):
    options = TINY | {"head_rank": 0.25, "rank_adaptation": "dlrt", "rank_interval": 2, "save_steps": 3, "max_steps": 7}
    for stands in (None, "training is finished"):
        run_script(monkeypatch, TRANSLATION, **options, output_dir=tmp_path / "out")
        assert stands is None or stands in capsys.readouterr().out
        results = json.loads((tmp_path / "out" / "all_results.json").read_text())
        saved = tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
        products = fnl_hf.factorizations(saved)
        assert products and all(product.layout != "deep" for product in products)
    assert results["dlrt_rank"] == pytest.approx(sum(product.size()[1] for product in products) / len(products))
