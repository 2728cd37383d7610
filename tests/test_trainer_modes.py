"""Decay under mixed precision, loss scaling, compilation, checkpointing, adapters and retried batch sizes."""

import copy

import pytest
import torch
import transformers as tf
from torch.testing import assert_close

import fnl_hf
from fnl_hf.decay import decayed
from tests.test_trainer import examples, make_model, train

HEADS = fnl_hf.FNLConfig()


def decay_of(start, coefficient):
    """name -> coefficient · gradient of the decay, by autograd through the matrices, in float64."""
    exact = copy.deepcopy(start).double()
    penalty = sum(f.matrix().square().sum() for f in fnl_hf.factorizations(exact)) / 2
    penalty.backward()
    return {n: coefficient * p.grad for n, p in exact.named_parameters() if p.grad is not None and p.grad.any()}


def difference(start, tmp_path, decay, **arguments):
    """name -> what decay changes in one step: two runs that differ in nothing else."""
    runs = []
    for coefficient in (0.0, decay):
        model = copy.deepcopy(start)
        train(model, tmp_path, examples("bert"), frobenius_decay=coefficient, **arguments)
        runs.append(dict(model.named_parameters()))
    return {name: (runs[1][name] - runs[0][name]).detach().double() for name in runs[0]}


def large(model_type="bert"):
    """A factorized model whose products are worth decaying, so that a difference of float32 weights shows them."""
    model = fnl_hf.factorize(make_model(model_type), HEADS)
    for product in fnl_hf.factorizations(model):
        for parameter in product.parameters():
            parameter.data.mul_(30)
    return model


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_under_bf16_autocast_grams_are_float32(optim, tmp_path):
    start, decay = large(), 100.0 if optim == "sgd" else 1.0
    changed = difference(start, tmp_path, decay, optim=optim, learning_rate=0.01, bf16=True)
    for name, term in decay_of(start, -decay * 0.01).items():
        assert (changed[name] - term).norm() < 1e-5 * term.norm(), name  # bfloat16 Grams would be off by 3e-3


def test_decay_ignores_an_autocast_around_it():
    model = large()
    with torch.autocast("cpu", torch.bfloat16):
        fnl_hf.frobenius_decay_(model, 0.1)
    expected = decay_of(model, 0.1)
    for name, parameter in model.named_parameters():
        if name in expected:
            assert_close(parameter.grad.double(), expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "optimizer",
    [{"optim": name} for name in ("sgd", "adamw_torch", "adamw_torch_fused")]
    + [{"fnl_optim": "spectron", "optim": "adamw_torch"}],
)
def test_loss_scaling_changes_nothing_and_a_skipped_step_decays_nothing(optimizer, tmp_path, monkeypatch):
    start, updates = large(), []
    for scale in (None, 1024.0, float("inf")):  # an infinite scale makes infinite gradients: the step is skipped
        model = copy.deepcopy(start)
        if scale:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            create = fnl_hf.FNLTrainer.create_accelerator_and_postprocess

            def with_scaler(trainer, create=create, scaler=scaler):
                create(trainer)
                trainer.accelerator.scaler = scaler

            monkeypatch.setattr(fnl_hf.FNLTrainer, "create_accelerator_and_postprocess", with_scaler)
        train(model, tmp_path, examples("bert"), **optimizer, learning_rate=0.01, frobenius_decay=1.0)
        monkeypatch.undo()
        updates.append(
            {n: (p - q).detach() for (n, p), q in zip(model.named_parameters(), start.parameters(), strict=True)}
        )
    for name, update in updates[0].items():
        assert_close(updates[1][name], update, rtol=1e-4, atol=1e-6, msg=name)
        assert not updates[2][name].any(), name
    assert any(update.any() for update in updates[0].values())


@pytest.mark.parametrize(
    "optimizer", [{"optim": "adamw_torch"}, {"fnl_optim": "lamb"}, {"fnl_optim": "spectron", "optim": "adamw_torch"}]
)
def test_accumulation_under_adaptive_optimizers(optimizer, tmp_path):
    """To 1e-10 in float64, which they amplify rounding in: so the model's loss has to be float64 as well."""
    start, updates = fnl_hf.factorize(make_model("bert"), HEADS).double(), []

    class Float64Loss(tf.BertForMaskedLM):
        def forward(self, labels=None, **inputs):
            outputs = super().forward(**inputs)
            outputs.loss = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
            return outputs

    start.__class__ = Float64Loss
    for batch, accumulate in ((8, 1), (2, 4)):
        model = copy.deepcopy(start)
        train(
            model, tmp_path, examples("bert"), per_device_train_batch_size=batch, learning_rate=1e-3, max_steps=1,
            gradient_accumulation_steps=accumulate, frobenius_decay=0.5, weight_decay=0.1, adam_epsilon=1e-6,
            **optimizer,
        )  # fmt: skip
        updates.append(
            torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), start.parameters(), strict=True)])
        )
    assert (updates[0] - updates[1]).norm() < 1e-10 * updates[0].norm()


@pytest.mark.slow
def test_a_compiled_model_trains_as_an_eager_one(tmp_path):
    start, results = large(), []
    for compiled in (False, True):
        model = copy.deepcopy(start)
        train(model, tmp_path, examples("bert"), frobenius_decay=0.1, torch_compile=compiled, max_steps=2)
        results.append(dict(model.named_parameters()))
    for name, value in results[0].items():
        assert_close(results[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_checkpointed_activations_change_nothing(tmp_path):
    start, results = large(), []
    for checkpointed in (False, True):
        model = copy.deepcopy(start)
        train(model, tmp_path, examples("bert"), frobenius_decay=0.1, gradient_checkpointing=checkpointed)
        results.append(dict(model.named_parameters()))
    for name, value in results[0].items():
        assert_close(results[1][name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_a_batch_size_that_is_tried_again_decays_once(optim, tmp_path):
    """`auto_find_batch_size` starts over when memory runs out: with one decay per step, not one per attempt."""
    start = large()

    class Forgetful(tf.BertForMaskedLM):
        def forward(self, input_ids=None, attention_mask=None, labels=None):
            if input_ids.shape[0] > 4:
                raise RuntimeError("CUDA out of memory.")
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    models = []
    for cls, find in ((tf.BertForMaskedLM, False), (Forgetful, True)):
        model = copy.deepcopy(start)
        model.__class__ = cls
        args = fnl_hf.FNLTrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4 if not find else 6, max_steps=1, optim=optim,
            auto_find_batch_size=find, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
            learning_rate=0.01, frobenius_decay=1.0, train_sampling_strategy="sequential", max_grad_norm=0.0,
        )  # fmt: skip
        trainer = fnl_hf.FNLTrainer(
            model=model, args=args, train_dataset=examples("bert"), data_collator=tf.default_data_collator
        )
        trainer.train()
        models.append(dict(model.named_parameters()))
        assert trainer._train_batch_size <= 5
    if trainer._train_batch_size == 4:
        for name, value in models[0].items():
            assert_close(models[1][name], value, msg=name)
    # Whatever batch it settled on, the optimizer carries one hook and no more.
    hooks = trainer.optimizer.optimizer._optimizer_step_pre_hooks
    assert len(hooks) == (optim == "adamw_torch")


def test_adapters_train_beside_frozen_factors(tmp_path, capsys):
    peft = pytest.importorskip("peft")
    model = fnl_hf.factorize(make_model("bert"), HEADS)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["query", "value"], r=2, modules_to_save=["predictions"])
    )
    with pytest.raises(ValueError, match="no factorization that trains"):
        train(copy.deepcopy(adapted), tmp_path, examples("bert"), frobenius_decay=0.1)
    before = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    train(adapted, tmp_path, examples("bert"), weight_decay=0.1)  # decays what it can: nothing of the products
    printed = capsys.readouterr().err
    assert "4 skipped" in printed and "Frobenius" not in printed
    factors = [n for n in before if "attention" in n and "lora" not in n]
    now = dict(adapted.named_parameters())
    assert all(torch.equal(now[n], before[n]) for n in factors)


def test_of_a_half_frozen_product_the_other_half_decays(tmp_path):
    start = large()
    for name, parameter in start.named_parameters():
        parameter.requires_grad_("key" not in name)
    changed = difference(start, tmp_path, 10.0, learning_rate=0.01)
    for name, term in decay_of(start.requires_grad_(True), -10.0 * 0.01).items():
        expected = torch.zeros_like(term) if "key" in name else term
        assert (changed[name] - expected).norm() <= 1e-4 * term.norm(), name


def test_adapters_deltas_are_no_part_of_a_product():
    peft = pytest.importorskip("peft")
    model = fnl_hf.factorize(make_model("bert"), HEADS)
    norms = [f.squared_norm().item() for f in fnl_hf.factorizations(model)]
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["query", "value"], r=2, init_lora_weights=False)
    )
    for parameter in adapted.parameters():
        parameter.requires_grad_(True)
    products = decayed(adapted)
    assert [f.squared_norm().item() for f in products] == norms
    covered = {id(p) for f in products for p in f.parameters()}
    assert not any("lora" in n and id(p) in covered for n, p in adapted.named_parameters())


# -- refused at start --------------------------------------------------------------------------------


def trainer_with(optimizer, model, tmp_path):
    args = fnl_hf.FNLTrainingArguments(
        output_dir=str(tmp_path), frobenius_decay=0.1, use_cpu=True, report_to="none", max_steps=1
    )
    return fnl_hf.FNLTrainer(model=model, args=args, train_dataset=examples("bert"), optimizers=(optimizer, None))


def test_optimizers_that_do_not_hold_the_factors_are_refused(tmp_path):
    model = fnl_hf.factorize(make_model("bert"), HEADS)
    layerwise = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], weight_decay=0.0)
    with pytest.raises(ValueError, match="does not hold 8 of the 8 trainable factors"):
        trainer_with(layerwise, model, tmp_path).train()


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "LayerWiseDummyOptimizer", "AdaLomo"])
def test_optimizers_of_another_kind_of_step_are_refused(name, tmp_path):
    model = fnl_hf.factorize(make_model("bert"), HEADS)
    optimizer = type(name, (torch.optim.AdamW,), {})(model.parameters(), weight_decay=0.0)
    with pytest.raises(ValueError, match=f"not proven beside {name}"):
        trainer_with(optimizer, model, tmp_path).train()


def test_decay_on_a_quantized_factor_is_refused(tmp_path):
    model = fnl_hf.factorize(make_model("bert"), HEADS)
    key = model.bert.encoder.layer[0].attention.self.key
    key.weight = torch.nn.Parameter(key.weight.data.to(torch.int8), requires_grad=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    with pytest.raises(ValueError, match="a quantized weight"):
        trainer_with(optimizer, model, tmp_path).train()


def test_a_kind_that_the_model_lacks_is_refused(tmp_path):
    model = fnl_hf.factorize(make_model("bert"), fnl_hf.FNLConfig(attention=("ov",)))
    with pytest.raises(ValueError, match="asked for kind 'qk'"):
        train(model, tmp_path, examples("bert"), frobenius_decay=0.1, frobenius_decay_kinds=["qk"])
