"""Second moments of what multiplies factors: against a direct construction, without padding, and hooks that go away."""

from dataclasses import replace

import pytest
import torch
import transformers as tf
from torch import nn
from torch.testing import assert_close

import fnl_hf
from fnl_hf import config, initialization
from fnl_hf.moments import moments
from fnl_hf.planning import plan
from tests.families import SEQ2SEQ, build

PADDED = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])


def outputs_of(model, name, batch, end="output"):
    """What a module takes or puts out, (sequences, positions, features), in float64."""
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda m, args, out: seen.append(args[0] if end == "input" else out))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0].double()


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_moments_are_those_of_each_head_without_padding(family):
    model, inputs = build(family)
    model.train()
    before = hooks(model)
    batches = [{**inputs, "attention_mask": PADDED}, {"input_ids": inputs["input_ids"].flip(0)[:, :3]}]
    targets = plan(model, fnl_hf.FNLConfig()).targets
    found = moments(model, targets, batches)
    assert model.training and hooks(model) == before and set(found) == {t.name for t in targets}
    model.eval()
    leaf = {"bert": "encoder.layer.1.attention.self.key", "gpt2": "h.1.attn.c_attn"}[family]
    kept = [batch.get("attention_mask", torch.ones(2, 3)).bool() for batch in batches]
    keys = torch.cat([outputs_of(model, leaf, batch)[mask] for batch, mask in zip(batches, kept, strict=True)])
    keys = keys[:, slice(32, 64) if family == "gpt2" else slice(None)].unflatten(-1, (4, 8))
    expected = torch.einsum("nhi,nhj->hij", keys, keys) / len(keys)
    (name,) = (t.name for t in targets if t.kind == "qk" and ".1." in t.name)
    assert len(keys) == 12 + 6 and found[name][1].dtype == torch.float64
    assert_close(found[name][1], expected, rtol=1e-5, atol=1e-7)
    out = {"bert": "encoder.layer.0.attention.output.dense", "gpt2": "h.0.attn.c_proj"}[family]
    context = torch.cat([outputs_of(model, out, b, "input")[mask] for b, mask in zip(batches, kept, strict=True)])
    context = context.unflatten(-1, (4, 8))
    (name,) = (t.name for t in targets if t.kind == "ov" and ".0." in t.name)
    assert_close(found[name][0], torch.einsum("nhi,nhj->hij", context, context) / 18, rtol=1e-5, atol=1e-7)
    assert found[name][1] is None


@pytest.mark.parametrize("target_length", [4, 7])
def test_source_and_target_have_masks_of_their_own(target_length):
    model, inputs = build("bart")
    decoder = torch.randint(3, 40, (2, target_length))
    kept = torch.ones(2, target_length, dtype=torch.long)
    kept[0, -2:] = 0
    batch = {**inputs, "decoder_input_ids": decoder, "attention_mask": PADDED, "decoder_attention_mask": kept}
    found = moments(model, plan(model, fnl_hf.FNLConfig()).targets, [batch])
    for name, mask in (("encoder.layers.0.self_attn", PADDED), ("decoder.layers.1.self_attn", kept)):
        counts = mask if target_length != PADDED.shape[1] else PADDED * kept  # equally long: neither is padding
        heads = model.get_submodule(name).num_heads
        keys = outputs_of(model, f"{name}.k_proj", batch)[counts.bool()].unflatten(-1, (heads, -1))
        assert_close(found[f"{name}.qk"][1], torch.einsum("nhi,nhj->hij", keys, keys) / len(keys), rtol=1e-5, atol=1e-7)


def test_labels_show_the_padding_of_the_target():
    model, _ = build("bart")
    labels = torch.tensor([[4, 5, -100, -100], [4, 5, 6, 7]])
    batch = {**SEQ2SEQ, "labels": labels}
    masked = moments(_TakesLabels(model), _below(plan(model, fnl_hf.FNLConfig()).targets), [batch])
    explicit = {**SEQ2SEQ, "decoder_attention_mask": labels.ne(-100)}
    expected = moments(_TakesLabels(model), _below(plan(model, fnl_hf.FNLConfig()).targets), [explicit])
    name = "model.decoder.layers.0.encoder_attn.qk"
    assert_close(masked[name][0], expected[name][0], rtol=1e-5, atol=1e-7)
    assert masked[name][0].shape == (2, 16, 16)


def test_labels_of_other_models_are_no_padding():
    model, inputs = build("bert")
    labels = torch.full((2, 7), -100)
    labels[:, 3] = 5
    targets = plan(model, fnl_hf.FNLConfig()).targets
    expected = moments(model, targets, [inputs])
    model.forward_without = model.forward
    model.forward = lambda labels=None, **kwargs: model.forward_without(**kwargs)
    found = moments(model, targets, [{**inputs, "labels": labels}])
    assert all(torch.equal(found[name][0], expected[name][0]) for name in expected)


def test_time_first_modules_have_their_padding_left_out_too():
    model, inputs = build("fsmt")
    found = moments(model, plan(model, fnl_hf.FNLConfig()).targets, [{**inputs, "attention_mask": PADDED}])
    keys = outputs_of(model, "encoder.layers.0.self_attn.k_proj", {**inputs, "attention_mask": PADDED})
    keys = keys.transpose(0, 1)[PADDED.bool()].unflatten(-1, (4, 8))
    assert_close(
        found["encoder.layers.0.self_attn.qk"][1],
        torch.einsum("nhi,nhj->hij", keys, keys) / len(keys),
        rtol=1e-5,
        atol=1e-7,
    )


def test_positions_that_no_mask_has_are_an_error_where_there_is_padding():
    model, inputs = build("bert")
    targets = plan(model, fnl_hf.FNLConfig()).targets
    key = model.encoder.layer[0].attention.self.key
    key.register_forward_pre_hook(lambda module, args: (torch.cat([args[0], args[0][:, :1]], 1),))  # as to a window
    with pytest.raises(ValueError, match=r"self\.key has positions of shape \(2, 8\), which no mask has"):
        moments(model, targets, [{**inputs, "attention_mask": PADDED}])


class _TakesLabels(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, labels=None, decoder_attention_mask=None, **inputs):
        return self.model(**inputs)


def _below(targets):
    return [replace(target, name=f"model.{target.name}") for target in targets]


def test_hooks_and_modes_come_back_whatever_happens():
    model, inputs = build("bert")
    model.train()
    targets = plan(model, fnl_hf.FNLConfig()).targets
    before = hooks(model)

    def batches():
        yield inputs
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        moments(model, targets, batches())
    assert hooks(model) == before and model.training
    with pytest.raises(TypeError, match=r"is a str, expected a dict of inputs \(calibration is one batch: pass a list"):
        moments(model, targets, inputs)
    with pytest.raises(TypeError, match="is a tuple, expected a dict of inputs$"):
        moments(model, targets, [(1, 2)])
    with pytest.raises(ValueError, match="calibration holds no batches"):
        moments(model, targets, [])
    assert hooks(model) == before and model.training


def test_what_the_batches_do_not_reach_has_no_moment():
    model, inputs = build("bart")
    targets = plan(model, fnl_hf.FNLConfig()).targets
    whole = nn.Module()
    whole.model, whole.forward = model, lambda input_ids: model.encoder(input_ids)
    found = moments(whole, _below(targets), [{"input_ids": inputs["input_ids"]}])
    assert found["model.decoder.layers.0.self_attn.qk"] == (None, None)
    assert found["model.encoder.layers.0.self_attn.qk"][0].shape == (4, 8, 8)


def test_an_initialisation_that_looks_at_data_gets_them(monkeypatch):
    seen = {}

    def peeking(form, factors, rank, sides):
        seen[factors[0].shape] = sides
        return form.balance(factors, rank)

    monkeypatch.setitem(initialization.INITIALIZATIONS, "peeking", peeking)
    monkeypatch.setattr(config, "INITIALIZATIONS", ("peeking",))
    for module in ("patching", "fitting"):
        monkeypatch.setattr(f"fnl_hf.{module}.CALIBRATED", frozenset({"peeking"}))
    model, inputs = build("bert")
    cfg = fnl_hf.FNLConfig(init="peeking", attention=("qk",))
    with pytest.raises(ValueError, match="init='peeking' looks at data: pass factorize.*calibration="):
        fnl_hf.factorize(model, cfg)
    assert not fnl_hf.factorizations(model)
    fnl_hf.factorize(model, cfg, calibration=iter([inputs]))
    ((left, right),) = seen.values()
    assert left.shape == right.shape == (4, 8, 8) and not torch.equal(left, right)


def test_calibration_for_an_initialisation_that_takes_none_is_refused():
    model, inputs = build("bert")
    with pytest.raises(ValueError, match="init='spectral' does not look at data: drop calibration"):
        fnl_hf.factorize(model, fnl_hf.FNLConfig(), calibration=[inputs])


def test_the_names_in_the_config_are_those_of_the_functions():
    assert tuple(initialization.INITIALIZATIONS) == config.INITIALIZATIONS
    assert config.INITIALIZATIONS and set(config.INITIALIZATIONS) >= config.CALIBRATED


@pytest.mark.parametrize("settings", [{}, {"calibration_outputs": "loss"}])
def test_the_model_keeps_its_mode_and_draws(settings):
    model, inputs = build("bert")
    model.train()
    config = fnl_hf.FNLConfig(init="activation", target_modules="all", target_ratio=0.9, **settings)
    state = torch.get_rng_state()
    fnl_hf.factorize(model, config, calibration=[inputs])
    assert model.training and torch.equal(state, torch.get_rng_state())


def test_as_many_texts_as_tokens_are_not_mistaken_for_time_first():
    """XLNet puts time first inside: a square mask fits both ways round."""
    model = tf.XLNetModel(tf.XLNetConfig(vocab_size=50, d_model=32, n_layer=2, n_head=4, d_inner=40)).eval()
    ids, mask = torch.randint(5, 50, (8, 8)), torch.ones(8, 8, dtype=torch.long)
    for row in range(8):
        mask[row, : row // 2] = 0  # from the left
    found = []
    for filler in (0, 7):
        batch = {"input_ids": torch.where(mask.bool(), ids, filler), "attention_mask": mask}
        targets = plan(model, fnl_hf.FNLConfig(attention=(), target_modules="all-linear")).targets
        found.append(moments(model, targets, [batch]))
    for name, (moment,) in found[0].items():
        assert_close(moment, found[1][name][0], rtol=1e-4, atol=1e-6)


def test_choices_are_sequences():
    model = tf.BertForMultipleChoice(build("bert")[0].config).eval()
    ids, mask = torch.randint(5, 50, (6, 3, 9)), torch.ones(6, 3, 9, dtype=torch.long)
    mask[..., 5:] = 0
    targets = plan(model, fnl_hf.FNLConfig(attention=(), target_modules="all-linear")).targets
    found = [
        moments(model, targets, [{"input_ids": torch.where(mask.bool(), ids, filler), "attention_mask": mask}])
        for filler in (0, 7)
    ]
    for name, (moment,) in found[0].items():
        assert_close(moment, found[1][name][0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("outputs", ["alike", "loss"])
def test_labels_of_a_classifier_are_no_mask(outputs):
    model = tf.BartForSequenceClassification(build("bart")[0].config).eval()
    batch = {"input_ids": torch.randint(5, 40, (2, 7)), "labels": torch.tensor([0, 1])}
    batch["input_ids"][:, -1] = model.config.eos_token_id
    batch["input_ids"][:, :-1].clamp_(min=5)
    config = fnl_hf.FNLConfig(init="activation", target_modules="all", target_ratio=0.9, calibration_outputs=outputs)
    before = sum(parameter.numel() for parameter in model.parameters())
    fnl_hf.factorize(model, config, calibration=[batch])
    assert fnl_hf.factorizations(model)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 0.9 * before


def test_one_text_as_a_tokenizer_or_a_dataset_gives_it_is_a_batch():
    ids, config = [[5, 6, 7], [8, 9, 10]], fnl_hf.FNLConfig(init="activation", head_rank=0.5)
    forms = (
        [{"input_ids": torch.tensor(ids)}],
        [{"input_ids": ids}],
        [{"input_ids": row, "attention_mask": [1, 1, 1]} for row in ids],
        [{"input_ids": torch.tensor(row)} for row in ids],
    )
    found = []
    for batches in forms:
        model, _ = build("bert")
        fnl_hf.factorize(model, config, calibration=batches)
        found.append(torch.cat([product.matrix().flatten() for product in fnl_hf.factorizations(model)]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-5)


def test_padding_of_masks_for_each_query_is_left_out():
    """(rows, 1, queries, keys), as True and False or as what is added to scores."""
    ids = torch.randint(5, 40, (2, 6))
    seen = torch.ones(2, 6, dtype=torch.bool)
    seen[1, 4:] = False
    wide = seen[:, None, None, :].expand(2, 1, 6, 6)
    other = torch.where(seen, ids, 3)
    real = ids.clone()
    real[0, 0] = 3

    def factors(ids, mask):
        model, _ = build("bert")
        config = fnl_hf.FNLConfig(init="activation", target_modules="all", rank=0.5, calibration_outputs="loss")
        fnl_hf.factorize(model, config, calibration=[{"input_ids": ids, "attention_mask": mask}])
        return torch.cat([factor.flatten() for product in fnl_hf.factorizations(model) for factor in product.factors()])

    for mask in (seen.long(), wide, torch.zeros(wide.shape).masked_fill(~wide, torch.finfo(torch.float32).min)):
        assert torch.equal(factors(ids, mask), factors(other, mask))
        assert not torch.equal(factors(ids, mask), factors(real, mask))


@pytest.mark.parametrize("outputs", ["alike", "loss"])
def test_what_nothing_depends_on_is_not_given_up(outputs):
    """A new head of zeros feels nothing of the encoder."""
    model = tf.BertForSequenceClassification(build("bert")[0].config).eval()
    torch.nn.init.zeros_(model.classifier.weight)
    batch = {"input_ids": torch.randint(5, 40, (2, 7))}
    config = fnl_hf.FNLConfig(init="activation", target_modules="all-linear", rank=0.5, calibration_outputs=outputs)
    fnl_hf.factorize(model, config, calibration=[batch])
    assert all(product.matrix().norm() > 0 for product in fnl_hf.factorizations(model))
    budget = fnl_hf.FNLConfig(init="activation", target_ratio=0.8, rank_allocation="loss")
    fnl_hf.factorize(fnl_hf.to_dense(model), budget, calibration=[batch])


def test_convolutions_alone_share_ranks_by_their_errors():
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    images = {"pixel_values": torch.randn(2, 3, 32, 32)}
    sizes = []
    for allocation in ("loss", "error"):
        torch.manual_seed(0)
        model = tf.ResNetModel(config).eval()
        budget = fnl_hf.FNLConfig(init="activation", target_ratio=0.6, rank_allocation=allocation)
        fnl_hf.factorize(model, budget, calibration=[images])
        sizes.append([product.size() for product in fnl_hf.factorizations(model)])
    assert sizes[0] == sizes[1] and sizes[0]


def test_weights_that_are_no_numbers_are_named():
    for name in ("encoder.layer.0.output.dense", "encoder.layer.1.output.dense"):
        model, inputs = build("bert")
        model.get_submodule(name).weight.data[0, 0] = float("nan")
        config = fnl_hf.FNLConfig(init="activation", target_ratio=0.8, rank_allocation="loss")
        with pytest.raises(ValueError, match=f"{name} holds NaN or infinite weights"):
            fnl_hf.factorize(model, config, calibration=[inputs])


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ("texts.txt", TypeError, "calibration is 'texts.txt', expected batches.*text_batches"),
        (3, TypeError, "calibration is 3, expected batches"),
        ([{"input_ids": [[1, 2, 3], [4]]}], ValueError, r"BertModel does not run on a batch .*\(input_ids list"),
        (
            [{"input_ids": torch.tensor([[99]])}],
            ValueError,
            r"does not run on a batch of the calibration \(input_ids \(1, 1",
        ),
    ],
)
def test_what_is_no_batch_is_refused(batches, error, message):
    model, _ = build("bert")
    with pytest.raises(error, match=message):
        fnl_hf.factorize(model, fnl_hf.FNLConfig(init="activation", head_rank=0.5), calibration=batches)
    assert not fnl_hf.factorizations(model)
