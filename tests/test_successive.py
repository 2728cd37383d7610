"""Factors by the inputs of the compressed model: blocks that walk as the model does, and errors that get smaller."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import fnl_hf
from fnl_hf.blocks import block_lists, calls_of
from fnl_hf.curvature import curvatures
from fnl_hf.distillation import Teacher
from fnl_hf.moments import evaluated
from fnl_hf.planning import plan
from tests.families import BERT, build
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
    assert len(chains) == (2 if family in ("bart", "t5", "marian") else 1), chains
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
    name = "bert.encoder.layer.1.output.dense.weight"
    model.state_dict()[name][0, 0] = before[name][0, 0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# -- errors by what they cost the model --------------------------------------------------------------


def test_a_layer_that_does_not_matter_gets_the_least_rank():
    model, batches = bert(), narrow_data(None)
    dead = "bert.encoder.layer.1.intermediate.dense"
    with torch.no_grad():  # nothing of it reaches the output, though its weights are as large as others
        model.bert.encoder.layer[1].output.dense.weight.fill_(0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"target_modules": "all-linear", "attention": (), "target_ratio": 0.8, "init": "activation"}
    ranks = {}
    for allocation in ("error", "loss"):
        small = copy.deepcopy(model)
        fnl_hf.factorize(small, fnl_hf.FNLConfig(rank_allocation=allocation, **settings), calibration=batches)
        ranks[allocation] = {p.name: p.size()[1] for p in fnl_hf.factorizations(small)}
        size = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
        assert 0.75 < size <= 0.8
    assert ranks["loss"][dead] <= 3 < ranks["error"][dead]
    assert {p.name: p.matrix().norm() for p in fnl_hf.factorizations(small)}[dead] > 0  # it may learn to matter
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def small_change(model, name, batches, scale):
    """By how much the distance of a model's outputs grows under errors of what a module puts out, and what they are."""
    generator = torch.Generator().manual_seed(1)
    teacher, errors, grown = Teacher(model), [], 0.0

    def disturb(module, args, output):
        errors.append(scale * torch.randn(output.shape, generator=generator) * torch.linspace(0, 2, output.shape[-1]))
        return output + errors[-1]

    for batch in batches:
        wanted = teacher.outputs(batch)
        handle = model.get_submodule(name).register_forward_hook(disturb)
        with torch.no_grad():
            grown += float(teacher.distance(model(**batch), wanted, batch) * teacher.count(batch))
        handle.remove()
    return grown, torch.cat([error.flatten(0, -2) for error in errors])


@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize(
    "name", ["encoder.layer.0.intermediate.dense", "encoder.layer.1.output.dense", "embeddings.word_embeddings"]
)
def test_curvature_foretells_what_an_error_costs(headless, name):
    """½ Σ Δyᵀ G Δy against the distance that the errors make, both summed over positions."""
    model = bert()
    model, name = (model.bert, name) if headless else (model, f"bert.{name}")
    batches = [batch | {"attention_mask": torch.ones_like(batch["input_ids"])} for batch in narrow_data(None, count=60)]
    targets = [t for t in plan(model, fnl_hf.FNLConfig(attention=(), target_modules="all")).targets if t.name == name]
    curvature = curvatures(model.requires_grad_(False), targets, batches)[name][0]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    cost, errors = small_change(model, name, batches, 1e-2)
    foretold = 0.5 * float(((errors.double() @ curvature) * errors).sum())
    foretold *= 2 if headless else 1  # the distance of hidden states is a square, not half of one
    assert 0.75 < foretold / cost < 1.33, (foretold, cost)


def test_errors_of_scores_count_by_their_heads():
    """A head whose values nothing reads loses its rank to the others' errors in one weight of all."""
    model, batches = bert(), narrow_data(None)
    attention = model.bert.encoder.layer[0].attention
    with torch.no_grad():
        attention.output.dense.weight[:, :8] = 0
    (target,) = plan(model, fnl_hf.FNLConfig(attention=("layer.0.attention.self.qk",))).targets
    curvature = curvatures(model, [target], batches)[target.name]
    traces = curvature.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert curvature.shape == (4, 8, 8) and traces[0] < 1e-3 * traces[1:].min()


@pytest.mark.parametrize("labels, few", [(2, True), (50, False)])
def test_what_few_outputs_do_not_feel_keeps_some_worth(labels, few):
    """Learning on would have to do without it."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**BERT, num_labels=labels)).eval()
    config = fnl_hf.FNLConfig(attention=(), target_modules=["layer.1.output.dense"])
    target = plan(model, config).targets
    (curvature,) = curvatures(model, target, narrow_data(None, count=60))[target[0].name]
    values = torch.linalg.eigvalsh(curvature)
    assert (values[0] > 0.099 * values.mean()) == few


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart", "t5", "llama"])
def test_every_family_is_compressed_by_the_loss(family):
    model, inputs = (llama(), {"input_ids": torch.arange(3, 12)[None]}) if family == "llama" else build(family)
    config = fnl_hf.FNLConfig(target_ratio=0.7, rank_allocation="loss", init="activation")
    before = sum(p.numel() for p in model.parameters())
    fnl_hf.factorize(model.eval(), config, calibration=[inputs])
    assert sum(p.numel() for p in model.parameters()) <= 0.7 * before
    assert hidden(model, inputs).isfinite().all()
