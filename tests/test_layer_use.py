"""How models and their users read, write and wrap what lies around a layer of factors."""

import copy

import pytest
import torch
import transformers as tf
from torch import nn
from torch.testing import assert_close

import fnl_hf
from tests.families import BERT

LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def llama():
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)).eval()


def layers(model, **fields):
    return fnl_hf.factorize(
        model, fnl_hf.FNLConfig(**{"attention": (), "target_modules": "all", "rank": 0.5, **fields})
    )


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("rank", [0.75, 1.0])
def test_weights_that_are_averaged_behind_autograd_are_seen(rank):
    model = layers(llama(), rank=rank)
    logits(model)  # composes, and keeps
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    assert torch.equal(logits(model), logits(copy.deepcopy(model)))


def test_what_is_written_into_any_part_of_a_weight_raises():
    table = layers(llama()).get_input_embeddings()
    writes = [
        lambda: table.weight.data[5].zero_(),
        lambda: table.weight.data[5:8].normal_(),
        lambda: table.weight.data.T.mul_(2.0),
        lambda: table.weight.detach().mul_(2),
        lambda: nn.init.normal_(table.weight[5]),
        lambda: table.weight[6].copy_(torch.ones(32)),
        lambda: table.weight.view(-1)[:3].fill_(0),
    ]
    for write in writes:
        with torch.no_grad(), pytest.raises(ValueError, match="would be lost"):
            write()
    rows = table.weight[3:6]
    (2 * rows).sum().backward()
    assert type(rows + 1) is type(rows.clone()) is torch.Tensor and table.right.grad.norm() > 0
    with pytest.raises(ValueError, match="register the hook on factors"):
        table.weight.register_hook(print)


def test_a_weight_is_frozen_and_copied_as_one():
    table = layers(llama()).get_input_embeddings()
    table.weight.requires_grad = False
    assert not any(parameter.requires_grad for parameter in table.parameters())
    copied = copy.deepcopy(table.weight)
    assert type(copied) is nn.Parameter and torch.equal(copied, table.composed())


def test_an_embedding_keeps_its_precision_under_autocast():
    model = layers(llama())
    with torch.autocast("cpu", torch.bfloat16):
        assert model.get_input_embeddings()(IDS).dtype == torch.float32
        states = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert {state.dtype for state in states[:-1]} == {torch.float32}


@pytest.mark.parametrize("init", ["spectral", "default", "spectral-ones", "orthogonal", "xavier", "kaiming"])
def test_the_row_of_padding_stays_zero(init):
    model = layers(tf.BertModel(tf.BertConfig(**BERT)), init=init)
    table = model.get_input_embeddings().weight
    assert not table[0].any() and table[1].any()


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (32, 32)])
@pytest.mark.parametrize("fields", [{"rank": 0.5}, {"rank": 3.0}, {"form": "deep"}, {"init": "default"}])
@pytest.mark.parametrize("dead", ["all", "half"])
def test_zeros_can_learn(shape, fields, dead):
    """A matrix of zeros, as some models start with, and one of few directions: no gradient is zero for good."""
    layer = nn.Linear(shape[1], shape[0])
    with torch.no_grad():
        layer.weight.mul_(0.0) if dead == "all" else layer.weight.copy_(layer.weight[:, :4] @ torch.randn(4, shape[1]))
    model = layers(nn.Sequential(layer), target_modules=["0"], **fields)
    x, target = torch.randn(200, shape[1]), torch.randn(200, shape[0])
    (product,) = fnl_hf.factorizations(model)
    before = product.matrix().detach()
    model(x).sub(target).square().sum().backward()
    for parameter in model.parameters():
        parameter.data.sub_(1e-3 * parameter.grad)
    moved = torch.linalg.svdvals(product.matrix()[0] - before[0])
    rank = min(product.size()[1], *shape)
    assert (moved[:rank] > 1e-6 * moved[0]).all()


def test_one_rank_for_what_is_tied():
    for pattern in ({"lm_head": 8}, {"embed_tokens": 8}):
        for fields in ({}, {"target_ratio": 0.5, "rank": 1.0}):
            model = layers(llama(), rank_pattern=pattern, **fields)
            assert model.lm_head.rank == model.get_input_embeddings().rank == 8


def test_a_table_that_is_the_target_of_a_tie_is_resized():
    sizes = {f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers",)}
    config = tf.ProphetNetConfig(
        hidden_size=32, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=50, max_position_embeddings=40,
        num_encoder_attention_heads=2, num_decoder_attention_heads=2,
        **{f"num_{name}": size for name, size in sizes.items()},
    )  # fmt: skip
    model = layers(tf.ProphetNetForCausalLM(config).eval())
    before = logits(model)
    model.resize_token_embeddings(53)
    after = logits(model)
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == after.shape[-1] == 53
    assert_close(after[..., :50], before)


def test_layers_whose_forward_was_replaced_are_left_alone():
    from accelerate import dispatch_model

    model = dispatch_model(llama(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    before = logits(model)
    with pytest.raises(ValueError, match="its forward was replaced, as accelerate's hooks do"):
        layers(model, rank=1)
    assert torch.equal(logits(model), before)


def test_adapters_of_scaled_embeddings():
    peft = pytest.importorskip("peft")
    outputs = []
    for factorized in (False, True):
        torch.manual_seed(0)
        config = tf.Gemma3TextConfig(**LLAMA, head_dim=8, sliding_window=8)
        model = tf.Gemma3ForCausalLM(config).eval()
        if factorized:
            layers(model, rank=1.0)
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["embed_tokens"], r=4)).eval()
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
        outputs.append(logits(model))
    assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_models_are_traced():
    model = layers(tf.BertModel(tf.BertConfig(**BERT)).eval(), rank=1.0)
    traced = torch.jit.trace(model, (IDS,), strict=False)
    assert_close(traced(IDS)["last_hidden_state"], model(IDS).last_hidden_state)


def test_a_half_that_stays_ordinary_is_said_while_loading(tmp_path):
    config = tf.MBartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=40, decoder_ffn_dim=40, vocab_size=50,
    )  # fmt: skip
    layers(tf.MBartForCausalLM(config)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be that of an ordinary layer, too: factorize both"):
        tf.MBartForConditionalGeneration.from_pretrained(tmp_path)
