"""200 steps of every optimizer: losses stay finite, and without a data gradient spectra follow their closed form."""

import math

import pytest
import torch
from torch.testing import assert_close

import fnl_hf
from tests.test_trainer import examples, make_model, train

STEPS = 200
OPTIMIZERS = {
    "SGD": {"optim": "sgd", "learning_rate": 0.05},
    "AdamW": {"optim": "adamw_torch", "learning_rate": 1e-3},
    "LAMB": {"fnl_optim": "lamb", "learning_rate": 5e-3, "frobenius_decay": 0.0, "weight_decay": 0.01},
    "FLAMBé": {"fnl_optim": "lamb", "learning_rate": 5e-3},
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model_type"), [("FLAMBé", "marian"), *((name, "bert") for name in OPTIMIZERS)])
def test_200_steps_learn_and_stay_finite(name, model_type, tmp_path):
    model = fnl_hf.factorize(make_model(model_type), fnl_hf.FNLConfig())
    arguments = {"frobenius_decay": 0.01, "max_steps": STEPS, "logging_steps": 20, **OPTIMIZERS[name]}
    trainer = train(model, tmp_path, examples(model_type), max_grad_norm=1.0, **arguments)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 10 and all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 0.1


def spectra(model):
    """Per product, the singular values of its heads, (heads, rank), of balanced factors."""
    return [
        torch.linalg.svdvals(f.matrix().detach())[:, : f.factors()[0].shape[-1]] for f in fnl_hf.factorizations(model)
    ]


def decayed_by_rate(sigma, rate):
    """A step of decay takes σ of balanced factors to σ (1 − ηλσ)²: each of the two loses ηλσ of itself."""
    return sigma * (1 - rate * sigma).square()


def decayed_in_trust_ratio(sigma, rate):
    """FLAMBé without data: both factors move by lr ‖p‖ / ‖∇‖ · ∇, and ‖p‖² = Σσ, ‖∇‖² = Σσ³ over all heads."""
    return sigma * (1 - rate * sigma * (sigma.sum() / sigma.pow(3).sum()).sqrt()).square()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["bert", "marian"])
@pytest.mark.parametrize(
    ("optimizer", "rate", "closed_form"),
    [
        ({"optim": "sgd"}, 1e-3 * 2.0, decayed_by_rate),
        ({"optim": "sgd", "frobenius_decay_mode": "decoupled"}, 1e-3 * 2.0, decayed_by_rate),
        ({"optim": "adamw_torch"}, 1e-3 * 2.0, decayed_by_rate),
        ({"optim": "adamw_torch_fused"}, 1e-3 * 2.0, decayed_by_rate),
        ({"fnl_optim": "lamb"}, 1e-3, decayed_in_trust_ratio),
    ],
)
def test_without_data_spectra_follow_the_closed_form(optimizer, rate, closed_form, model_type, tmp_path):
    model = make_model(model_type).double()
    for name, parameter in model.named_parameters():
        if "bias" not in name and parameter.dim() == 2:
            parameter.data.mul_(30)  # singular values around one
    fnl_hf.factorize(model, fnl_hf.FNLConfig())
    for module in model.modules():  # balance holds for the augmented factors: without biases also for the plain ones
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            module.bias.data.zero_()
    expected = spectra(model)
    rows = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in examples(model_type)]
    before = sum(sigma.square().sum() for sigma in expected)
    train(model, tmp_path, rows, max_steps=STEPS, learning_rate=1e-3, frobenius_decay=2.0, **optimizer)
    for _ in range(STEPS):
        expected = [closed_form(sigma, rate) for sigma in expected]
    for sigma, predicted in zip(spectra(model), expected, strict=True):
        assert_close(sigma, predicted, rtol=1e-6, atol=1e-9)
    assert sum(sigma.square().sum() for sigma in expected) < 0.95 * before
