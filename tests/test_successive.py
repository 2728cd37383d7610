"""Factors by the inputs of the compressed model: blocks that walk as the model does, and errors that get smaller."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import AlbertConfig, AlbertModel, LlamaConfig, LlamaForCausalLM

import fnl_hf
from fnl_hf.blocks import block_lists, calls_of
from fnl_hf.budget import losses_per_energy
from fnl_hf.calibration import evaluated
from tests.families import build
from tests.test_activation import bert, narrow_data


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 60}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def hidden(model, batch):
    with torch.no_grad():
        return model(**batch)[0]


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart", "t5", "marian"])
def test_a_walk_gives_what_the_model_gives(family):
    model, inputs = build(family)
    chains = block_lists(model, inputs)
    assert len(chains) == (2 if family in ("bart", "t5", "marian") else 1)
    for chain in chains:
        calls, seen = calls_of(model, chain, inputs), []
        handle = model.get_submodule(chain[-1]).register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
        with torch.no_grad(), evaluated(model):
            model(**inputs)
            for index in range(len(chain)):
                calls.hidden = calls.run(model, chain, index)
        handle.remove()
        assert_close(calls.hidden, seen[0][0] if isinstance(seen[0], tuple) else seen[0])


def test_a_cache_of_keys_is_not_filled_twice():
    model, batch = llama(), {"input_ids": torch.arange(3, 12)[None]}
    (chain,) = block_lists(model, batch)
    calls = calls_of(model, chain, batch)
    first, again = calls.run(model, chain, 0), calls.run(model, chain, 0)
    assert torch.equal(first, again) and model.config.use_cache


def test_shared_blocks_are_no_chain():
    model = AlbertModel(
        AlbertConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=20, vocab_size=30)
    )
    batch = {"input_ids": torch.arange(3, 12)[None]}
    assert block_lists(model, batch) == []
    config = fnl_hf.FNLConfig(head_rank=0.5, init="activation", calibration_inputs="compressed")
    fnl_hf.factorize(model, config, calibration=[batch])


@pytest.mark.parametrize("family", ["bert", "llama", "bart", "t5", "gpt2"])
def test_hidden_states_are_nearer_to_the_dense_model_s(family):
    if family in ("bert", "llama"):
        model, batches = (bert() if family == "bert" else llama()), narrow_data(None, count=12)
    else:
        model, inputs = build(family)
        generator = torch.Generator().manual_seed(0)
        batches = [
            {name: torch.randint(3, 12, (4, 12), generator=generator) for name in inputs if "ids" in name}
            for _ in range(12)
        ]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    model = model.eval()
    settings = {"target_modules": "all-linear", "head_rank": 0.5, "rank": 0.3, "init": "activation"}

    def error(inputs):
        small = copy.deepcopy(model)
        fnl_hf.factorize(small, fnl_hf.FNLConfig(calibration_inputs=inputs, **settings), calibration=batches)
        return sum(float((hidden(small, b) - hidden(model, b)).square().mean()) for b in batches)

    assert error("compressed") < 0.97 * error("dense")


def test_the_model_is_left_as_it_was_by_an_error():
    model, batches = bert(), narrow_data(None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = torch.nan
    config = fnl_hf.FNLConfig(target_modules="all-linear", rank=4, init="activation", calibration_inputs="compressed")
    with pytest.raises(ValueError, match="NaN"):
        fnl_hf.factorize(model, config, calibration=batches)
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = before["bert.encoder.layer.1.output.dense.weight"][
        0, 0
    ]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# -- ranks by the loss that a cut costs --------------------------------------------------------------


def test_a_layer_that_does_not_matter_gets_the_least_rank():
    model, batches = bert(), narrow_data(None)
    with torch.no_grad():  # nothing of it reaches the output, though its weights are as large as others
        model.bert.encoder.layer[1].output.LayerNorm.weight.fill_(0.0)
        model.bert.encoder.layer[1].output.LayerNorm.bias.normal_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"target_modules": "all-linear", "attention": (), "target_ratio": 0.8, "init": "activation"}
    ranks = {}
    for allocation in ("error", "loss"):
        small = copy.deepcopy(model)
        fnl_hf.factorize(small, fnl_hf.FNLConfig(rank_allocation=allocation, **settings), calibration=batches)
        ranks[allocation] = {p.name: p.size()[1] for p in fnl_hf.factorizations(small)}
        size = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
        assert 0.75 < size <= 0.8
    dead = [name for name in ranks["loss"] if ".layer." in name]
    assert all(ranks["loss"][name] <= 2 for name in dead) and any(ranks["error"][name] > 2 for name in dead)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_measuring_losses_leaves_the_weights_alone(monkeypatch):
    model, batches = bert(), narrow_data(None)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fails(model, shares, data):
        weights = losses_per_energy(model, shares, data)
        assert all(weight > 0 for weight in weights)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        raise RuntimeError("seen")

    monkeypatch.setattr("fnl_hf.budget.losses_per_energy", fails)
    config = fnl_hf.FNLConfig(target_ratio=0.5, rank_allocation="loss", init="activation")
    with pytest.raises(RuntimeError, match="seen"):
        fnl_hf.factorize(model, config, calibration=batches)
