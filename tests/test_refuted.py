"""Ordinary models that once made a claim of the proofs false, each beside a control that is still factorized."""

from dataclasses import dataclass

import pytest
import torch
import transformers as tf
from torch import nn

import fnl_hf
from tests.families import BERT, TEXT
from tests.families import output as first_output
from tests.test_proof import HALF, randomised, relative, shared_with

LLAMA = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 50,
}  # fmt: skip


def kinds(model: nn.Module) -> list[str]:
    return sorted(product.kind for product in fnl_hf.factorizations(model))


@pytest.mark.parametrize("clip", [0.05, 4.0, None])
def test_projections_that_are_clipped_are_no_products(clip):
    """At the size of random weights nothing reaches the bound; at that of trained ones it does."""
    model = randomised(tf.OlmoModel(tf.OlmoConfig(**LLAMA, clip_qkv=clip)))
    before = first_output(model, TEXT)
    if clip:
        with pytest.raises(ValueError, match="something stands between its projections"):
            fnl_hf.factorize(model)
        return
    fnl_hf.factorize(model)
    assert kinds(model) == ["ov", "ov", "rotary-qk", "rotary-qk"]
    assert relative(first_output(model, TEXT), before) < 1e-4


def test_a_model_that_changes_its_attention_in_a_forward_stays_as_it_was():
    """BigBird takes full attention for good once it has seen a short text, as the one that a plan is made with."""
    sizes = {**BERT, "max_position_embeddings": 64}
    config = tf.BigBirdConfig(**sizes, block_size=4, num_random_blocks=1, sep_token_id=3)
    model = randomised(tf.BigBirdModel(config))
    with pytest.raises(ValueError, match="multiple of block size"):
        fnl_hf.factorize(model)
    assert model.attention_type == model.config.attention_type == "block_sparse"
    fnl_hf.factorize(model, verify={"input_ids": torch.randint(0, 50, (2, 48))})
    assert kinds(model) == ["ov", "ov", "qk", "qk"] and model.attention_type == "block_sparse"
    model(**TEXT)
    assert model.attention_type == "original_full"


@pytest.mark.parametrize("fields", [{}, {"head_rank": 0.5}, {"target_modules": "all-linear", "init": "functional"}])
def test_what_a_first_forward_installs_is_installed_once(fields):
    """Transformers hooks the layers whose hidden states it hands out in the first forward, and notes that it has."""
    model = tf.BertModel(tf.BertConfig(**BERT, output_hidden_states=True)).eval()
    fnl_hf.factorize(model, fnl_hf.FNLConfig(**fields))
    assert len(model(**TEXT).hidden_states) == 1 + model.config.num_hidden_layers
    fnl_hf.to_dense(model)
    assert len(model(**TEXT).hidden_states) == 1 + model.config.num_hidden_layers


class ByNumber(tf.BertModel):
    """Its second layer reads its queries once more."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state + self.encoder.layer[1].attention.self.query.bias
        return outputs


def test_a_product_that_the_whole_model_reads_elsewhere_is_left_dense_below_full_rank_too():
    model = randomised(ByNumber(tf.BertConfig(**BERT)))
    fnl_hf.factorize(model, HALF)
    assert sorted(product.name for product in fnl_hf.factorizations(model)) == [
        "encoder.layer.0.attention.ov",
        "encoder.layer.0.attention.self.qk",
        "encoder.layer.1.attention.ov",
    ]


def test_tied_weights_with_biases_of_their_own_are_no_one_product():
    model = randomised(tf.BertModel(tf.BertConfig(**BERT)))
    first, second = (layer.attention.self for layer in model.encoder.layer)
    second.query.weight, second.key.weight = first.query.weight, first.key.weight
    before = first_output(model, TEXT)
    fnl_hf.factorize(model, HALF)
    assert kinds(model) == ["ov", "ov"] and len(shared_with(model)) == 2
    assert first.query.weight is second.query.weight and first.query.bias is not second.query.bias
    assert relative(first_output(fnl_hf.to_dense(model), TEXT), before) < 1  # still a model, only of lower rank


def test_a_checkpoint_is_refused_by_a_class_that_holds_none_of_it(tmp_path):
    model = fnl_hf.factorize(randomised(tf.BertForMaskedLM(tf.BertConfig(**BERT))), HALF)
    model.save_pretrained(tmp_path)
    assert kinds(tf.BertModel.from_pretrained(tmp_path)) == kinds(model)  # a part of it loads
    with pytest.raises(ValueError, match="holds none of the products of this checkpoint.*load it as BertForMaskedLM"):
        tf.GPT2Model.from_pretrained(tmp_path)


@dataclass
class Answer:
    attended: torch.Tensor
    scores: torch.Tensor


class Answering(nn.Module):
    """Attention that answers with a plain dataclass."""

    def __init__(self, hidden=16, heads=2):
        super().__init__()
        self.num_heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(hidden, hidden) for _ in range(4))

    def forward(self, hidden_states):
        q, k, v = (
            each(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return Answer(self.out_proj((scores @ v).transpose(1, 2).flatten(2)), scores)


def test_outputs_in_a_dataclass_are_seen():
    model, x = nn.Sequential(Answering()), torch.randn(2, 5, 16)
    before = model(x)
    fnl_hf.factorize(model)
    after = model(x)
    assert kinds(model) == ["ov", "qk"]
    assert relative(after.attended, before.attended) < 1e-5 and relative(after.scores, before.scores) < 1e-5


def test_what_is_no_model_is_named():
    with pytest.raises(TypeError, match="str"):
        fnl_hf.factorize("bert-base-uncased")
    model = fnl_hf.factorize(randomised(tf.BertModel(tf.BertConfig(**BERT))))
    with pytest.raises(TypeError, match="str"):
        fnl_hf.factorize(nn.Sequential(Answering()), "half")
    with pytest.raises(TypeError, match="verify is a Tensor, expected a dict"):
        fnl_hf.factorize(nn.Sequential(Answering()), verify=torch.ones(2, 5, 16))
    with pytest.raises((TypeError, ValueError), match="inputs"):
        fnl_hf.verify(model)


class Consuming(tf.BertModel):
    """Writes into what it is given, as SAM 3 replaces the features in the list that it gets."""

    def forward(self, layers=None, **kwargs):
        layers[0] = layers[0] + 1
        return super().forward(inputs_embeds=layers[0], **kwargs)


def test_a_model_that_writes_into_its_inputs_gets_copies_of_them():
    model, given = randomised(Consuming(tf.BertConfig(**BERT))), [torch.randn(1, 7, 32)]
    kept = given[0].clone()
    fnl_hf.factorize(model, verify={"layers": given})
    assert kinds(model) == ["ov", "ov", "qk", "qk"]
    assert fnl_hf.verify(model, layers=given) and torch.equal(given[0], kept)


DEEP = {
    "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 100,
    "num_labels": 1, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("cls", [tf.LlamaForSequenceClassification, tf.LlamaForCausalLM])
@pytest.mark.parametrize("seed", range(4))
def test_rounding_in_half_precision_is_no_change(cls, seed):
    """A score is one number, the small difference of large ones; a loss is in float32 whatever it is made of."""
    torch.manual_seed(seed)
    model, ids = cls(tf.LlamaConfig(**DEEP)).bfloat16().eval(), torch.randint(5, 99, (1, 9))
    inputs = {"input_ids": ids} | ({"labels": ids} if cls is tf.LlamaForCausalLM else {})
    fnl_hf.factorize(model, verify=inputs)
    assert len(fnl_hf.factorizations(model)) == 12


class Varying(tf.BertModel):
    """Gives as many tensors as it likes, or one as long as it likes; reads a weight of its attention elsewhere."""

    apart = False

    def forward(self, *args, **kwargs):
        hidden = super().forward(*args, **kwargs).last_hidden_state
        hidden = (hidden @ self.encoder.layer[0].attention.self.value.weight)[0]
        kept = hidden[hidden[:, 0] > hidden[:, 0].mean()]
        return tuple(kept) if self.apart else (kept,)


@pytest.mark.parametrize("apart", [False, True])
def test_outputs_of_another_shape_are_other_outputs(apart):
    model = randomised(Varying(tf.BertConfig(**BERT)))
    model.apart = apart
    before = model(**TEXT)
    fnl_hf.factorize(model, verify=TEXT)
    assert kinds(model) == ["ov", "qk", "qk"]
    for one, other in zip(model(**TEXT), before, strict=True):
        assert relative(one, other) < 1e-4
