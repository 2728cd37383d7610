"""What the trainer logs about factorizations, against the matrices themselves; and norms recorded and imposed."""

import copy
import json
import math

import pytest
import torch
import transformers as tf
from torch.testing import assert_close

import fnl_hf
from fnl_hf.measure import effective_rank, gradient_norms, measurements, spectra, stable_rank
from fnl_hf.rules.imposed_norms import norms, scale_to_
from tests.test_trainer import examples, make_model, train


def test_measurements_are_those_of_the_matrices():
    model = fnl_hf.factorize(make_model("bert"), fnl_hf.FNLConfig(init="default")).double()
    measured = measurements(fnl_hf.factorizations(model))
    assert list(measured) == ["", "qk", "ov"]
    for kind in ("qk", "ov"):
        products = [f for f in fnl_hf.factorizations(model) if f.kind == kind]
        matrices = torch.cat([f.matrix() for f in products]).detach()
        sigma = torch.linalg.svdvals(matrices)[:, :8]
        share = sigma / sigma.sum(-1, keepdim=True)
        factors = [torch.cat([f.factors()[i] for f in products]).detach() for i in (0, 1)]
        grams = factors[0].mT @ factors[0], factors[1] @ factors[1].mT
        size = torch.linalg.matrix_norm
        expected = {
            "frobenius_norm": matrices.norm(),
            "nuclear_norm": sigma.sum(),
            "nuclear_bound": (factors[0].square().sum() + factors[1].square().sum()) / 2,
            "effective_rank": torch.exp(-(share * share.log()).sum(-1)).mean(),
            "imbalance": (size(grams[0] - grams[1]) / (size(grams[0]) + size(grams[1]))).mean(),
        }
        for name, value in expected.items():
            assert measured[kind][name] == pytest.approx(value.item(), rel=1e-6), name
    assert measured[""]["nuclear_norm"] == pytest.approx(sum(measured[k]["nuclear_norm"] for k in ("qk", "ov")))
    assert measured[""]["frobenius_norm"] == pytest.approx(
        math.hypot(*(measured[k]["frobenius_norm"] for k in ("qk", "ov")))
    )


def test_spectral_factors_are_balanced_and_their_bound_is_tight():
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, vocab_size=50, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    for model in (make_model("t5"), tf.LlamaForCausalLM(config)):
        fnl_hf.factorize(model, fnl_hf.FNLConfig())
        for kind, values in measurements(fnl_hf.factorizations(model)).items():
            assert values["imbalance"] < 1e-5, kind
            assert values["nuclear_bound"] == pytest.approx(values["nuclear_norm"], rel=1e-4), kind


def test_ranks_of_known_spectra():
    sigma = torch.tensor([[3.0, 3, 3], [5, 0, 0], [0, 0, 0], [1, 2, 1]], dtype=torch.float64)
    assert_close(effective_rank(sigma), torch.tensor([3, 1, 1, 2**1.5], dtype=torch.float64))
    assert_close(stable_rank(sigma), torch.tensor([3, 1, 0, 1.5], dtype=torch.float64))


def test_spectra_are_those_of_the_matrices_and_none_where_there_is_no_matrix():
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=1, vocab_size=50, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = fnl_hf.factorize(tf.LlamaForCausalLM(config))
    rows = {row["kind"]: row for row in spectra(model, leading=2)}
    assert [value for key, value in rows["rotary-qk"].items() if key not in ("name", "kind")] == [None] * 4
    (product,) = (f for f in fnl_hf.factorizations(model) if f.kind == "ov")
    sigma = torch.linalg.svdvals(product.matrix().detach())[:, :8].double()  # (groups, rank)
    assert rows["ov"]["nuclear_norm"] == pytest.approx(sigma.sum().item(), rel=1e-5)
    assert rows["ov"]["stable_rank"] == pytest.approx(stable_rank(sigma).mean().item(), rel=1e-5)
    assert rows["ov"]["effective_rank"] == pytest.approx(effective_rank(sigma).mean().item(), rel=1e-5)
    assert rows["ov"]["singular_values"] == pytest.approx(sigma[:, :2].mean(0).tolist(), rel=1e-5)


def test_gradient_norms_are_those_of_autograd():
    model = fnl_hf.factorize(make_model("bert"), fnl_hf.FNLConfig()).double()
    model(**tf.default_data_collator(examples("bert"))).loss.backward()
    products = fnl_hf.factorizations(model)
    covered = [p for f in products for p in f.parameters()]
    of_loss = math.sqrt(sum(p.grad.square().sum().item() for p in covered))
    penalty = sum(f.matrix().square().sum() for f in products) / 2
    of_decay = math.sqrt(sum(g.square().sum().item() for g in torch.autograd.grad(0.1 * penalty, covered)))
    assert gradient_norms(products, 0.1)[""] == pytest.approx((of_decay, of_loss), rel=1e-5)


def test_the_log_holds_them_beside_the_loss(tmp_path):
    model = fnl_hf.factorize(make_model("bert"), fnl_hf.FNLConfig())
    rows = examples("bert") * 4
    trainer = train(model, tmp_path, rows, frobenius_decay=0.2, max_steps=4, logging_steps=2, learning_rate=1e-3)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 2
    expected = measurements(fnl_hf.factorizations(model))
    for kind in ("qk", "ov"):
        for name, value in expected[kind].items():
            assert logged[-1][f"fnl/{kind}/{name}"] == pytest.approx(value, rel=1e-4)
        assert 0 < logged[-1][f"fnl/{kind}/decay_to_loss_gradient"] < math.inf
    penalty = sum(f.squared_norm().item() for f in fnl_hf.factorizations(model)) / 2
    assert logged[-1]["fnl/decay"] == pytest.approx(0.2 * penalty, rel=1e-4)
    silent = train(model, tmp_path, rows, frobenius_decay=0.2, logging_steps=1, log_factorizations=False)
    assert not any(key.startswith("fnl/") for row in silent.state.log_history for key in row)


def test_imposed_norms_are_those_recorded(tmp_path):
    start = fnl_hf.factorize(make_model("bert"), fnl_hf.FNLConfig())
    record = tmp_path / "norms.jsonl"
    common = {"max_steps": 3, "learning_rate": 1e-2, "optim": "adamw_torch", "save_strategy": "no"}

    def run(model, callback, **arguments):
        args = fnl_hf.FNLTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, **common, **arguments
        )
        trainer = fnl_hf.FNLTrainer(model=model, args=args, train_dataset=examples("bert"), callbacks=[callback])
        trainer.train()
        return trainer

    recorded = copy.deepcopy(start)
    run(recorded, fnl_hf.RecordNorms(record), frobenius_decay=10.0)
    assert [json.loads(line)["step"] for line in record.read_text().splitlines()] == [1, 2, 3]
    imposed = copy.deepcopy(start)
    trainer = run(imposed, fnl_hf.ImposeNorms(record), frobenius_decay=0.0, weight_decay=0.1)
    for name, value in norms(fnl_hf.factorizations(recorded)).items():
        assert norms(fnl_hf.factorizations(imposed))[name] == pytest.approx(value, rel=1e-5)
    covered = {p for f in fnl_hf.factorizations(imposed) for p in f.parameters()}
    groups = trainer.optimizer.optimizer.param_groups
    assert not any(covered & set(group["params"]) for group in groups if group["weight_decay"])
    with pytest.raises(ValueError, match="set it to 0.0"):
        run(copy.deepcopy(start), fnl_hf.ImposeNorms(record), frobenius_decay=0.1)
    common["max_steps"] = 5
    with pytest.raises(ValueError, match="step 4 of 5 is missing"):
        run(copy.deepcopy(start), fnl_hf.ImposeNorms(record), frobenius_decay=0.0)
    with pytest.raises(ValueError, match="another model"):
        run(make_model("gpt2"), fnl_hf.ImposeNorms(record), frobenius_decay=0.0)
    with pytest.raises(ValueError, match="record them first"):
        fnl_hf.ImposeNorms(tmp_path / "nothing.jsonl")


def test_the_scale_of_the_papers_vector():
    """The product of norm √72 goes to norm 5 by the factor √(5 / √72) = 0.7676298919 on either side."""
    left = torch.tensor([[1.0, 2], [0, 1], [3, -1]], dtype=torch.float64)
    right = torch.tensor([[1.0, 0], [2, 1], [0, -1], [1, 1]], dtype=torch.float64)
    parameters = torch.nn.Parameter(left.clone()), torch.nn.Parameter(right.T.clone())
    views = tuple(
        fnl_hf.factorization.View(p, lambda w: w, outer) for p, outer in zip(parameters, (-2, -1), strict=True)
    )
    product = fnl_hf.Factorization("layer", "linear", fnl_hf.algebra.chain, views)
    scale_to_(product, 5.0)
    assert_close(parameters[0].data, left * 0.7676298919, rtol=1e-9, atol=0)
    assert product.squared_norm().sqrt().item() == pytest.approx(5.0)
