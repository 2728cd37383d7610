"""Rank-adaptive training of head products: one rank for all heads of a layer, the same function in every form."""

import copy
import logging
import shutil

import pytest
import torch
import transformers as tf
from torch.testing import assert_close

import fnl_hf
from fnl_hf.algebra import dlrt
from fnl_hf.heads import HeadLinear
from fnl_hf.ranks import adaptive, keeping_their_rank
from fnl_hf.rules import RankAdaptation, Rule
from tests.families import TEXT, build, output
from tests.processes import run_job
from tests.test_dlrt import losses, make_trainer, projected, ranks, train_by_decay_alone
from tests.test_trainer import examples, make_model

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS = fnl_hf.FNLConfig(head_rank=3)
MIXED = fnl_hf.FNLConfig(head_rank=4, target_modules=r".*(shared|fc\d|c_fc|intermediate\.dense)", rank=0.25)
LLAMA = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 40, "vocab_size": 50, "max_position_embeddings": 40, "attention_bias": True,
}  # fmt: skip


def built(family, config=HEADS):
    """(model, inputs): factorized, in float64."""
    if family == "llama":
        torch.manual_seed(0)
        model, inputs = tf.LlamaModel(tf.LlamaConfig(**LLAMA, attn_implementation="eager")).double().eval(), TEXT
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    else:
        model, inputs = build(family, dtype=torch.float64)
    return fnl_hf.factorize(model, config), inputs


def matrices(each):
    """(heads, m, n), biases included."""
    left, core, right = each.factors()
    return (left if core is None else left @ core) @ right.mT


def same_parameters(one, other):
    for (name, value), same in zip(one.named_parameters(), other.parameters(), strict=True):
        assert_close(value, same, rtol=0, atol=0, msg=name)


def grow(model, inputs):
    """All bases by the gradients of some function of the model, as in the first step of a cycle."""
    found = adaptive(model)
    for each in found:
        each.make_orthonormal()
        each.freeze(False)
    model.zero_grad()
    values = model(**inputs)
    (torch.randn(values[0].shape, generator=torch.Generator().manual_seed(1)).double() * values[0]).sum().backward()
    rule, gradients = RankAdaptation(), [each.gradients() for each in found]
    for each, some in zip(found, gradients, strict=True):
        rule._augment(each, some)
        each.freeze()
    return found


# -- the function ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [3, 5])
@pytest.mark.parametrize("family", ["bert", "bart", "gpt2", "t5", "llama"])
def test_the_function_stays(family, rank, tmp_path):
    """At the start, in wider bases, in the dense model, in what is loaded, and once ranks are fixed.

    Heads are 8 wide (of T5 6): from rank 5 they grow to their full width, where fixed heads lie in ordinary layers.
    """
    model, inputs = built(family, fnl_hf.FNLConfig(head_rank=rank))
    expected, found = output(model, inputs), adaptive(model)
    assert len(found) == len(fnl_hf.factorizations(model)) - (2 if family == "llama" else 0)
    for each in found:
        each.make_orthonormal()
        for basis in each.factors()[::2]:
            assert_close(basis.mT @ basis, torch.eye(rank).double().expand(len(basis), -1, -1))
    assert_close(output(model, inputs), expected, rtol=1e-10, atol=1e-12)
    grow(model, inputs)
    width = {each.name: each.product.full_rank for each in found}
    assert ranks(model) == {name: min(2 * rank, width[name]) for name in width}
    assert_close(output(model, inputs), expected, rtol=1e-10, atol=1e-12)
    dense = fnl_hf.to_dense(copy.deepcopy(model))
    assert not any(isinstance(module, HeadLinear) for module in dense.modules())
    assert_close(output(dense, inputs), expected, rtol=1e-10, atol=1e-12)
    assert all(p.requires_grad for p in dense.parameters())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    same_parameters(loaded, model)
    assert ranks(loaded) == ranks(model) and all(each.core is not None for each in adaptive(loaded))
    assert_close(output(loaded, inputs), expected, rtol=1e-4, atol=1e-5)  # rotary positions in float32
    fnl_hf.fix_ranks(model)
    assert_close(output(model, inputs), expected, rtol=1e-10, atol=1e-12)
    narrow = any(2 * rank < each for each in width.values())
    assert any(isinstance(module, HeadLinear) for module in model.modules()) == narrow
    for product in fnl_hf.factorizations(model):
        if product.kind != "rotary-qk":
            left, *middle, right = product.augmented()
            left, right = product.form.batched([left, right])
            assert not middle and product.size()[1] == min(2 * rank, width[product.name])
            left, right = left[..., :rank], right[:, :rank]  # the others are zero on the left
            assert_close(left.mT @ left, right @ right.mT, rtol=1e-8, atol=1e-8)
    model.save_pretrained(tmp_path / "fixed")
    loaded = type(model).from_pretrained(tmp_path / "fixed", dtype=torch.float64).eval()
    same_parameters(loaded, model)
    assert all(p.requires_grad for p in model.parameters())


def test_inference_and_proof_know_cores():
    """The cores are merged for inference; `verify` changes the bases on both sides of them."""
    for family, rank in (("bert", 2), ("gpt2", 2), ("gpt2", 5)):  # the last to the full width
        model, inputs = built(family, fnl_hf.FNLConfig(head_rank=rank))
        grow(model, inputs)
        proof = fnl_hf.verify(model, **inputs)
        assert proof and len(proof.verdicts) == 4, proof
        expected = output(model, inputs)
        quick = fnl_hf.for_inference(copy.deepcopy(model), measure=_kept, **inputs)
        assert_close(output(quick, inputs), expected, rtol=1e-10, atol=1e-12)
        assert not any("core" in name for name, _ in quick.named_parameters())
        assert {product.size()[1] for product in fnl_hf.factorizations(quick)} == {min(2 * rank, 8)}


def _kept(forms):
    return {form: 0.0 if form == "kept" else 1.0 for form in forms}


# -- the mathematics ---------------------------------------------------------------------------------


def with_ones(x):
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def direct_bert(attention, x, of_scores, of_values):
    """Self-attention by one matrix per head, biases in their last row and column: (H, d + 1, d + 1), (H, d, d + 1)."""
    x = with_ones(x)
    scores = torch.einsum("btm,hmn,bsn->bhts", x, of_scores, x) / 8**0.5
    values = torch.einsum("hmn,bsn->bhsm", of_values, x)
    return torch.einsum("bhts,bhsm->btm", scores.softmax(-1), values) + attention.output.dense.bias


def direct_llama(attention, x, of_values):
    """(groups, 2 d, d + 1): the two heads of a group stacked, as they share their values."""
    positions = torch.arange(x.shape[1])[None]
    rotary = tf.models.llama.modeling_llama.LlamaRotaryEmbedding(attention.config)(x, positions)
    _, weights = attention(x, position_embeddings=rotary, attention_mask=None)
    values = torch.einsum("gmn,bsn->gbsm", of_values, with_ones(x)).unflatten(-1, (2, -1))
    by_group = weights.detach().unflatten(1, (2, 2))
    return torch.einsum("bgjts,gbsjm->btm", by_group, values) + attention.o_proj.bias


def case(family):
    """(what adapts, x -> the attention's output by its layers, the same by dense matrices)."""
    model, _ = built(family)
    if family == "bert":
        attention = model.encoder.layer[0].attention
        return (
            [each for each in adaptive(model) if "layer.0" in each.name],
            lambda x: attention.output.dense(attention.self(x)[0]),
            lambda x, *dense: direct_bert(attention, x, *dense),
        )
    attention = model.layers[0].self_attn
    positions = torch.arange(5)[None]

    def layers(x):
        rotary = tf.models.llama.modeling_llama.LlamaRotaryEmbedding(attention.config)(x, positions)
        return attention(x, position_embeddings=rotary, attention_mask=None)[0]

    return (
        [each for each in adaptive(model) if "layers.0" in each.name],
        layers,
        lambda x, *dense: direct_llama(attention, x, *dense),
    )


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_step_is_that_of_the_projected_gradient_of_dense_heads(family):
    products, layers, direct = case(family)
    for each in products:
        each.make_orthonormal()
        each.freeze(False)
    torch.manual_seed(2)
    x, weight = torch.randn(2, 5, 32).double(), torch.randn(2, 5, 32).double()
    dense = [matrices(each).requires_grad_() for each in products]
    assert_close(layers(x), direct(x, *dense), rtol=1e-10, atol=1e-12)
    (direct(x, *dense) * weight).sum().backward()
    (layers(x) * weight).sum().backward()
    gradients, rule = [each.gradients() for each in products], RankAdaptation()
    for each, matrix, some in zip(products, dense, gradients, strict=True):
        left, core, right = each.factors()
        left, core, right = left.clone(), core.clone(), right.clone()
        assert_close(some[0], matrix.grad @ right @ core.mT, rtol=1e-9, atol=1e-11)
        assert_close(some[1], left.mT @ matrix.grad @ right, rtol=1e-9, atol=1e-11)
        assert_close(some[2], matrix.grad.mT @ left @ core, rtol=1e-9, atol=1e-11)
        rule._augment(each, some)
        wide_left, _, wide_right = each.factors()
        of_core = each.core.grad.view(len(left), 6, 6)
        tangent = projected(left, right, matrix.grad)
        assert_close(of_core, wide_left.mT @ tangent @ wide_right, rtol=1e-9, atol=1e-11)
        for basis, span in ((wide_left, matrix.grad @ right), (wide_right, matrix.grad.mT @ left)):
            assert_close(basis @ (basis.mT @ span), span, rtol=1e-9, atol=1e-11)
        with torch.no_grad():
            each.core.sub_(each.core.grad, alpha=0.1)
        inside = wide_left @ wide_left.mT @ tangent @ wide_right @ wide_right.mT
        assert_close(matrices(each), matrix - 0.1 * inside, rtol=1e-9, atol=1e-11)
    # and the gradient of the augmented core, in the steps that follow
    dense = [matrices(each).requires_grad_() for each in products]
    (direct(x, *dense) * weight).sum().backward()
    for each in products:
        each.freeze()
        each.core.grad = None
    (layers(x) * weight).sum().backward()
    for each, matrix in zip(products, dense, strict=True):
        left, _, right = each.factors()
        assert_close(each.core.grad.view(len(left), 6, 6), left.mT @ matrix.grad @ right, rtol=1e-9, atol=1e-11)
        assert all(basis.grad is None for basis in each.bases)


@pytest.mark.parametrize("tolerance", [0.05, 0.3, 0.6])
def test_a_cut_is_the_best_approximation_of_all_heads_by_one_rank(tolerance):
    model, inputs = built("gpt2", fnl_hf.FNLConfig(head_rank=4))
    torch.manual_seed(3)
    rule, seen = RankAdaptation(), set()
    for each in grow(model, inputs):
        with torch.no_grad():
            each.core.copy_(torch.randn_like(each.core) * 2.0 ** -torch.arange(8).double())
        dense = matrices(each)
        left, sigma, right = torch.linalg.svd(dense, full_matrices=False)
        tails = [sigma[:, rank:].norm() / sigma.norm() for rank in range(sigma.shape[1] + 1)]
        best = next(rank for rank, tail in enumerate(tails) if tail <= tolerance)
        rule._put(each, *rule._cut(each, tolerance, 1, 8))
        assert each.rank == best
        expected = left[..., :best] * sigma[:, None, :best] @ right[:, :best]
        assert_close(matrices(each), expected, rtol=1e-9, atol=1e-10)
        seen.add(best)
    assert max(seen) < 8
    assert ranks(model) == {product.name: product.size()[1] for product in fnl_hf.factorizations(model)}


def test_grown_bases_of_heads_keep_within_their_width():
    old = dlrt.orthonormal(*(torch.randn(4, size, 5, dtype=torch.float64) for size in (9, 12)))
    gradient = torch.randn(4, 9, 12, dtype=torch.float64)
    grad_k, grad_l = gradient @ old[2], gradient.mT @ old[0]
    wide = dlrt.augment(*old, grad_k, grad_l, 7)
    whole = dlrt.augment(*old, grad_k, grad_l)
    assert wide[1].shape == (4, 7, 7) and whole[1].shape == (4, 10, 10)
    assert_close(wide[0] @ wide[1] @ wide[2].mT, old[0] @ old[1] @ old[2].mT, rtol=0, atol=1e-12)
    assert dlrt.augment(*old, grad_k, grad_l, 5)[1].shape == (4, 5, 5)


# -- a training run ----------------------------------------------------------------------------------


def llama():
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA))


def start(model_type, config=HEADS):
    return fnl_hf.factorize(llama() if model_type == "llama" else make_model(model_type), config)


def test_ranks_grow_are_trained_and_are_cut(tmp_path):
    widths, name = [], "bert.encoder.layer.0.attention.self.qk"

    class Phases(Rule):
        def after_step(self):
            widths.append(ranks(self.run.model)[name])

    trainer = make_trainer(start("bert"), tmp_path, callbacks=[Phases()])
    trainer.train()
    key, found, logged, settled = f"dlrt/rank/{name}", ranks(trainer.model), {}, {}
    for row in trainer.state.log_history:  # a rank is logged when it is new
        logged |= row
        settled[row["step"]] = logged[key]
    assert settled[1] == settled[3] == 3
    wide = [min(8, 2 * settled[step]) for step in (1, 4, 8)]
    expected = [[wide[i]] * 3 + [settled[step]] for i, step in enumerate((4, 8, 12))]
    assert widths == sum(expected, []) + [settled[12]] * 2
    assert {one: logged[f"dlrt/rank/{one}"] for one in found} == found
    assert {one: logged[f"dlrt/compression/{one}"] for one in found} == {one: found[one] / 8 for one in found}
    assert logged["dlrt/compression"] == pytest.approx(sum(found.values()) / 8 / len(found), rel=1e-5)
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_ranks_keep_their_bounds(tmp_path):
    """Without a tolerance only bounds cut: half the width of a head, or one less than it, so that bases can turn."""
    for bounds, expected in (({}, 4), ({"rank_max": 5}, 5), ({"rank_max": 100}, 7)):
        trainer = make_trainer(start("bert"), tmp_path, rank_tolerance=0.0, max_steps=10, **bounds)
        trainer.train()
        assert set(ranks(trainer.model).values()) == {expected}


@pytest.mark.parametrize(
    "model_type, config, interval",
    [("bert", HEADS, 1), ("gpt2", HEADS, 4), ("marian", MIXED, 4), ("llama", HEADS, 4)],
)
def test_a_run_resumed_in_any_phase_equals_the_uninterrupted_one(model_type, config, interval, tmp_path):
    begin, rows = start(model_type, config), examples("gpt2" if model_type == "llama" else model_type)
    saving = {"save_strategy": "steps", "save_steps": 1, "frobenius_decay": 0.1, "weight_decay": 0.05, "max_steps": 10}
    whole = copy.deepcopy(begin)
    trainer = make_trainer(whole, tmp_path / "run", rank_interval=interval, rows=rows, **saving)
    trainer.train()
    for step in (2, 4, 9) if interval == 4 else (1, 9):
        elsewhere = tmp_path / f"from{step}" / f"checkpoint-{step}"
        shutil.copytree(tmp_path / "run" / elsewhere.name, elsewhere)
        resumed = copy.deepcopy(begin)
        other = make_trainer(resumed, elsewhere.parent, rank_interval=interval, rows=rows, **saving)
        other.train(resume_from_checkpoint=str(elsewhere))
        assert losses(other) == losses(trainer) and ranks(resumed) == ranks(whole)
        same_parameters(resumed, whole)
    assert len(set(ranks(whole).values())) > 1 or interval == 1


@pytest.mark.parametrize("model_type", ["marian", "gpt2"])
def test_a_checkpoint_and_generation_in_the_middle_of_a_run(model_type, tmp_path):
    """Any step loads as the model that it is, and generates what its dense model generates."""
    seen, batch = {}, tf.default_data_collator(examples(model_type))

    class Look(Rule):
        def on_save(self, args, state, control, **kwargs):
            model = self.run.model.eval()
            seen[state.global_step] = ranks(model), model(**batch).logits.detach()
            dense = fnl_hf.to_dense(copy.deepcopy(model))
            options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
            prompt = batch["input_ids"][:1]
            assert torch.equal(model.generate(prompt, **options), dense.generate(prompt, **options))
            model.train()

    config = MIXED if model_type == "marian" else HEADS
    saving = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(start(model_type, config), tmp_path, callbacks=[Look()], **saving)
    trainer.train()
    for step, (widths, logits) in seen.items():
        loaded = type(trainer.model).from_pretrained(tmp_path / f"checkpoint-{step}").eval()
        assert ranks(loaded) == widths
        assert_close(loaded(**batch).logits, logits, rtol=0, atol=0)
    assert list(seen) == [2, 4, 6, 8] and seen[2][0] != seen[4][0]


@pytest.mark.parametrize(
    "options",
    [
        {}, {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.5}, {"fnl_optim": "lamb"},
        {"optim": "adafactor"}, {"bf16": True}, {"gradient_checkpointing": True},
    ],
)  # fmt: skip
def test_optimizers_carry_what_they_know_of_cores(options, tmp_path):
    trainer, seen = make_trainer(start("gpt2"), tmp_path, rank_min=1, **options), []

    class Watch(RankAdaptation):
        def _put(self, each, left, core, right):
            old, kept = [factor.clone() for factor in each.factors()], dict(self._optimizer.state.get(each.core) or {})
            super()._put(each, left, core, right)
            key = next((key for key in ("momentum_buffer", "exp_avg") if key in kept), None)
            if key and kept[key].shape == old[1].shape:
                after, of_count = self._optimizer.state[each.core][key], 1.0
                if "step" in kept and core.shape[-1] > old[1].shape[-1] and kept["step"] > 10:
                    of_count = float((1 - 0.9 ** kept["step"]) / (1 - 0.9**10))
                inside = left.mT @ (old[0] @ kept[key] @ old[2].mT) @ right
                assert_close(after * of_count, inside, rtol=1e-4, atol=1e-6)
                seen.append(float(after.norm()))

    trainer.callback_handler.callbacks[0] = Watch()
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainer.train()  # goes on with cores that the last cycle has left full: they are turned at the same rank
    assert "adafactor" in options.values() or (len(seen) > 15 and min(seen) > 0)
    for each in adaptive(trainer.model):
        assert each.core in trainer.optimizer.state
        for basis in each.factors()[::2]:
            off = basis.mT @ basis - torch.eye(basis.shape[-1])
            assert off.abs().max() < 1e-5


def test_accumulation_gives_the_same_update(tmp_path):
    begin, results = start("bert").double(), []
    for batch, accumulate in ((8, 1), (2, 4)):
        model = copy.deepcopy(begin)
        arguments = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate, "max_steps": 6}
        make_trainer(model, tmp_path, optim="sgd", learning_rate=0.1, rank_interval=2, **arguments).train()
        results.append((ranks(model), [matrices(each) for each in adaptive(model)]))
    assert results[0][0] == results[1][0]
    for one, same in zip(results[0][1], results[1][1], strict=True):
        assert (one - same).norm() < 1e-5 * one.norm()


@pytest.mark.parametrize("decay", [{"weight_decay": 0.5}, {"frobenius_decay": 0.5}])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_decay_shrinks_the_core_alone(decay, mode, tmp_path):
    """A rate so low that the loss moves nothing: products shrink by (1 − rate · λ) a step, bases not at all."""
    model = start("t5").double()
    before = [matrices(each) for each in adaptive(model)]

    train_by_decay_alone(model, tmp_path, 0.01, mode, decay)
    for each, was in zip(adaptive(model), before, strict=True):
        assert_close(matrices(each), was * (1 - 0.01 * 0.5) ** 4, rtol=1e-7, atol=1e-9)


# -- what keeps its rank, and what is refused --------------------------------------------------------


def test_rotary_heads_keep_their_rank_and_train(tmp_path, caplog):
    model = start("llama")
    queries = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    trainer = make_trainer(model, tmp_path, rows=examples("gpt2"))
    with caplog.at_level(logging.INFO, "fnl_hf"):
        trainer.train()
    assert set(ranks(model)) == {f"model.layers.{i}.self_attn.ov" for i in range(2)}
    assert "model.layers.0.self_attn.qk and 1 more keep their rank, since rotary positions" in caplog.text
    after = model.model.layers[0].self_attn.q_proj.weight
    assert after.requires_grad and not torch.equal(after, queries)


def test_heads_that_share_a_weight_with_others_keep_their_rank():
    """Bases are frozen while cores train, and a weight is frozen as a whole."""
    model = fnl_hf.factorize(make_model("gpt2"), fnl_hf.FNLConfig(attention=("ov",), head_rank=3))
    with pytest.raises(ValueError, match="ov and 1 more keep .*one weight holds these heads and others.*rank=0.25"):
        adaptive(model)
    sizes = {"num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 40}
    deberta = tf.DebertaModel(tf.DebertaConfig(**sizes, vocab_size=50))
    fnl_hf.factorize(deberta, fnl_hf.FNLConfig(attention=("ov",), head_rank=3))
    assert set(keeping_their_rank(deberta).values()) == {fnl_hf.heads.adaptive.OWN_BIAS}
    bert = start("bert")
    bert.bert.encoder.layer[0].attention.self.key.weight.requires_grad_(False)
    assert keeping_their_rank(bert) == {"bert.encoder.layer.0.attention.self.qk": fnl_hf.heads.adaptive.FROZEN}
    bert = start("bert")
    one, two = (layer.attention.self for layer in bert.bert.encoder.layer)
    two.key.weight = one.key.weight
    assert set(keeping_their_rank(bert).values()) == {fnl_hf.heads.adaptive.SHARED} and len(adaptive(bert)) == 2


def test_what_cannot_be_is_refused(tmp_path):
    compact = fnl_hf.factorize(make_model("gpt2"), fnl_hf.FNLConfig(head_rank=4, head_layout="compact"))
    with pytest.raises(ValueError, match=r'h.0.attn.qk are compact.*head_layout="padded"'):
        make_trainer(compact, tmp_path)
    with pytest.raises(ValueError, match="qk and 1 more keep their rank, since rotary .*ov and 1 more .*full width"):
        make_trainer(start("llama", fnl_hf.FNLConfig()), tmp_path, rows=examples("gpt2"))
    make_trainer(start("bert"), tmp_path, max_steps=4, save_strategy="steps", save_steps=4, rank_interval=2).train()
    stored = tf.BertForMaskedLM.from_pretrained(tmp_path / "checkpoint-4").config.quantization_config
    targets = [entry for entry in stored.plan["targets"] if entry["family"] == "heads"]
    assert all(entry["deep"] for entry in targets)
    for wrong, message in (
        ({"deep": 1}, "deep is 1, expected true or false"),
        ({"compact": {}, "rank": 2}, "deep is true, expected only of heads that are neither rotated nor compact"),
    ):
        plan = {**stored.plan, "targets": [targets[0] | wrong, *targets[1:]]}
        with pytest.raises(ValueError, match=message):
            fnl_hf.plan.Plan.of(fnl_hf.FNLConfig(plan=plan))


# -- two processes -----------------------------------------------------------------------------------

JOB = """
import sys, torch
import fnl_hf
from tests.test_dlrt import ARGUMENTS
from tests.test_dlrt_heads import MIXED, adaptive, matrices
from tests.test_trainer import examples, make_model

batch, accumulate, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
for kind in ("bert", "gpt2"):
    model = fnl_hf.factorize(make_model(kind).double(), MIXED)
    options = ARGUMENTS | {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 5, "rank_interval": 2}
    options |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
    args = fnl_hf.FNLTrainingArguments(output_dir=out, **options | {"frobenius_decay": 0.05})
    trainer = fnl_hf.FNLTrainer(model, args, train_dataset=examples(kind) * 3)
    trainer.train()
    whole = {each.name: matrices(each) for each in adaptive(model)}
    whole |= {name: p.detach() for name, p in model.named_parameters() if "norm" in name.lower()}
    ranks = {each.name: each.rank for each in adaptive(model)}
    torch.save((ranks, whole), f"{out}/{kind}-{trainer.args.process_index}.pt")
"""


@pytest.mark.slow
def test_two_processes_have_the_ranks_and_make_the_update_of_one(tmp_path):
    for processes, batch, accumulate in ((1, 8, 1), (2, 2, 2)):
        out = tmp_path / str(processes)
        out.mkdir()
        run_job(tmp_path, JOB, processes, batch, accumulate, out)
    for kind in ("bert", "gpt2"):
        places = (("1", 0), ("2", 0), ("2", 1))
        (counts, one), *both = (torch.load(tmp_path / place / f"{kind}-{i}.pt") for place, i in places)
        assert counts == both[0][0] == both[1][0] and len(set(counts.values())) > 1
        for name in one:
            assert_close(both[0][1][name], both[1][1][name], rtol=0, atol=0, msg=name)
        size = torch.cat([value.flatten() for value in one.values()]).norm()
        difference = torch.cat([(one[name] - both[0][1][name]).flatten() for name in one]).norm()
        assert difference < 1e-6 * size
