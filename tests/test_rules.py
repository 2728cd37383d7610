"""Rules of one's own in a training run: when each method is called, and with what."""

import copy
import json

import pytest
import torch
import transformers as tf
from accelerate.optimizer import AcceleratedOptimizer
from torch.testing import assert_close
from transformers.trainer_callback import ExportableState

import fnl_hf
from fnl_hf.rules import FrobeniusDecay, LogFactorizations, Rule
from fnl_hf.rules.imposed_norms import norms, scale_to_
from fnl_hf.rules.loss_so_far import LossSoFar
from tests.test_trainer import examples, make_model

ARGUMENTS = {
    "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 0.1, "optim": "sgd", "report_to": "none",
    "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 0.0, "logging_steps": 2,
    "lr_scheduler_type": "constant", "frobenius_decay": 0.0, "train_sampling_strategy": "sequential",
}  # fmt: skip


def make_trainer(model, tmp_path, callbacks=(), **arguments):
    args = fnl_hf.FNLTrainingArguments(output_dir=str(tmp_path), **ARGUMENTS | arguments)
    return fnl_hf.FNLTrainer(model, args, train_dataset=examples("bert") * 2, callbacks=list(callbacks))


class Notebook(Rule):
    """Writes down what is called, and with which gradients; shrinks one weight's gradient."""

    def __init__(self):
        self.calls = []

    def weight(self):
        return self.run.model.bert.encoder.layer[0].intermediate.dense.weight

    def bind(self, run):
        super().bind(run)
        self.calls.append("bind")

    def attach(self, optimizer):
        assert isinstance(optimizer, torch.optim.SGD) and not isinstance(optimizer, AcceleratedOptimizer)
        self.calls.append("attach")

    def on_train_begin(self, args, state, control, **kwargs):
        self.calls.append("on_train_begin")

    def after_backward(self, scale, logged):
        self.gradient, self.before = self.weight().grad.clone(), self.weight().detach().clone()
        self.weight().grad.zero_()
        self.calls.append(("after_backward", scale, logged))

    def after_step(self):
        assert torch.equal(self.weight(), self.before)  # its gradient was zero when the optimizer stepped
        self.calls.append(("after_step", self.run.state.global_step))

    def covered(self):
        return {self.weight()}

    def logs(self):
        return {"steps_seen": sum("after_step" in call for call in self.calls)}


def test_a_rule_of_ones_own_takes_part_in_every_step(tmp_path):
    rule = Notebook()
    trainer = make_trainer(
        fnl_hf.factorize(make_model("bert")), tmp_path, [rule], gradient_accumulation_steps=2, weight_decay=0.1
    )
    assert [type(rule) for rule in trainer.rules] == [LogFactorizations, FrobeniusDecay, LossSoFar, Notebook]
    trainer.train()
    assert rule.calls == [
        "bind", "attach", "on_train_begin",
        ("after_backward", 1.0, False), ("after_step", 1),
        ("after_backward", 1.0, True), ("after_step", 2),
    ]  # fmt: skip
    assert rule.gradient.any()
    assert [row["steps_seen"] for row in trainer.state.log_history if "loss" in row] == [2]
    groups = trainer.optimizer.optimizer.param_groups
    assert [rule.weight() in set(group["params"]) for group in groups if group["weight_decay"]] == [False]
    assert all(set(group["params"]) for group in groups)


class Remembering(fnl_hf.Rule, ExportableState):
    """Has a state of its own in checkpoints, from which transformers makes it anew."""

    def state(self):
        return {"args": {}, "attributes": {"steps": getattr(self, "steps", 0)}}

    def after_backward(self, scale, logged):
        assert self.run.model is not None
        self.steps = getattr(self, "steps", 0) + 1


def test_a_rule_that_a_checkpoint_restores_is_bound(tmp_path):
    def run(steps, resume=None):
        options = {"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": True}
        trainer = make_trainer(make_model("bert"), tmp_path, [Remembering()], max_steps=steps, **options)
        trainer.train(resume_from_checkpoint=resume)
        return next(rule for rule in trainer.rules if isinstance(rule, Remembering))

    run(2)
    assert run(4, str(tmp_path / "checkpoint-2")).steps == 4


def test_a_rule_in_a_trainer_that_knows_none_is_refused(tmp_path):
    args = fnl_hf.FNLTrainingArguments(output_dir=str(tmp_path), **ARGUMENTS)
    trainer = tf.Trainer(make_model("bert"), args, train_dataset=examples("bert"), callbacks=[Remembering()])
    with pytest.raises(ValueError, match="Remembering is a rule, which only FNLTrainer"):
        trainer.train()


def test_a_rule_that_joins_later_is_bound_and_attached(tmp_path):
    trainer, late = make_trainer(fnl_hf.factorize(make_model("bert")), tmp_path), Notebook()
    trainer.train()
    trainer.add_callback(late)
    assert late.run is trainer and late.calls == ["bind", "attach"] and trainer.rules[-1] is late
    trainer.train()
    assert late.calls.count("attach") == 1 and ("after_step", 2) in late.calls
    trainer.remove_callback(late)
    assert late not in trainer.rules


def test_ones_own_frobenius_decay_takes_the_place_of_the_trainers(tmp_path):
    class Half(FrobeniusDecay):
        def coefficient_now(self):
            return super().coefficient_now() / 2

    start, trained = fnl_hf.factorize(make_model("bert")), []
    for callbacks, decay in (((), 5.0), ((Half,), 10.0)):  # a class is made an instance, as everywhere
        model = copy.deepcopy(start)
        trainer = make_trainer(model, tmp_path, callbacks, frobenius_decay=decay)
        trainer.train()
        trained.append(dict(model.named_parameters()))
        assert sum(isinstance(rule, FrobeniusDecay) for rule in trainer.rules) == 1
    assert trainer.frobenius_coefficient == 10.0
    for name, value in trained[0].items():
        assert_close(trained[1][name], value, rtol=0, atol=0, msg=name)


def test_norms_are_recorded_by_the_stock_trainer_too(tmp_path):
    names = {field for field in ARGUMENTS if not field.startswith("frobenius")}
    args = tf.TrainingArguments(output_dir=str(tmp_path), **{name: ARGUMENTS[name] for name in names})
    record, model = tmp_path / "norms.jsonl", fnl_hf.factorize(make_model("bert"))
    tf.Trainer(model, args, train_dataset=examples("bert"), callbacks=[fnl_hf.RecordNorms(record)]).train()
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and rows[-1]["norms"] == norms(fnl_hf.factorizations(model))


@pytest.mark.parametrize("model_type", ["bert", "llama", "phi"])
def test_norms_are_imposed_whatever_the_form(model_type):
    """Rotary planes, and beside them an unrotated rest: four tensors, but two of them in each product."""
    small = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "vocab_size": 50}
    small |= {"num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 2}
    configs = {"llama": (tf.LlamaForCausalLM, tf.LlamaConfig), "phi": (tf.PhiForCausalLM, tf.PhiConfig)}
    if model_type == "bert":
        model = make_model("bert")
    else:
        cls, config = configs[model_type]
        model = cls(config(**small, **({"partial_rotary_factor": 0.5} if model_type == "phi" else {})))
    products = fnl_hf.factorizations(fnl_hf.factorize(model))
    assert len(products) >= 2
    for product in products:
        scale_to_(product, 5.0)
        assert product.squared_norm().sqrt().item() == pytest.approx(5.0, rel=1e-5)
