"""Spectron: bounded steps, by hand and against loops; which parameter is stepped how; what it keeps."""

import copy

import pytest
import torch
import transformers as tf
from torch import nn
from torch.testing import assert_close

import fnl_hf
from fnl_hf.algebra.polar import orthogonalized, spectral_norms
from fnl_hf.layers import hidden_matrices
from fnl_hf.spectron import OF_DENSE, Spectron, bounded_steps
from tests.families import BART, BERT
from tests.processes import run_job
from tests.test_trainer import examples, make_model

ETA, MU = 0.1, 0.9
LLAMA = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "vocab_size": 50, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
LAYERS = fnl_hf.FNLConfig(attention=(), target_modules="all", rank=0.25)


def exact_polar(matrix):
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def ill_conditioned(*shape, decades=6):
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    return (left * torch.logspace(1, 1 - decades, left.shape[-1], dtype=torch.float64)) @ right


# -- the algebra ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 64, 16), (2, 16, 64), (1, 30, 20), (2, 5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthogonalized_is_nearly_the_polar_factor(shape, dtype):
    matrices = ill_conditioned(*shape, decades=2).to(dtype)
    polar = orthogonalized(matrices)
    values = torch.linalg.svdvals(polar)
    assert polar.dtype == dtype and values.min() > 0.6 and values.max() < 1.21
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)  # the same singular vectors
    between = left.mT @ polar @ right.mT
    assert_close(between, torch.diag_embed(between.diagonal(dim1=-2, dim2=-1)), atol=1e-3, rtol=0)


def test_the_way_through_the_gram_matrix_is_the_same_polynomial():
    tall = torch.randn(2, 40, 20, dtype=torch.float64)
    padded = torch.cat([tall, tall.new_zeros(2, 40, 10)], -1)  # 40 x 30 is iterated on itself
    assert_close(orthogonalized(padded)[..., :20], orthogonalized(tall), atol=1e-12, rtol=0)


def test_entries_of_any_size_and_zeros():
    matrices = torch.randn(1, 12, 6)
    for scale in (1e-25, 1e25):
        assert_close(orthogonalized(matrices * scale), orthogonalized(matrices), atol=1e-5, rtol=0)
    assert torch.equal(orthogonalized(torch.zeros(1, 12, 6)), torch.zeros(1, 12, 6))


def test_spectral_norms_are_tracked():
    matrices = torch.randn(4, 50, 12, dtype=torch.float64)
    exact = torch.linalg.matrix_norm(matrices, 2)
    norms, vectors = spectral_norms(matrices)
    assert_close(norms.flatten(), exact, rtol=1e-2, atol=0)
    for _ in range(20):
        matrices = matrices + 1e-3 * torch.randn_like(matrices)
        norms, vectors = spectral_norms(matrices, vectors)
    exact = torch.linalg.matrix_norm(matrices, 2)
    assert_close(norms.flatten(), exact, rtol=5e-3, atol=0)
    assert (norms.flatten() <= exact * (1 + 1e-12)).all()
    assert torch.equal(spectral_norms(torch.zeros(1, 5, 3))[0], torch.zeros(1, 1, 1))


@pytest.mark.parametrize("decades", [0, 3, 12])
def test_the_product_moves_by_no_more_than_the_bound(decades):
    """With exact polar factors; and by no more than half as much again with those of Newton-Schulz."""
    largest = 0.0
    for seed in range(20):
        torch.manual_seed(seed)
        scale = 10 ** torch.randn(())
        left, right = (ill_conditioned(1, size, 6, decades=decades) * s for size, s in ((30, scale), (20, 1 / scale)))
        gradient = torch.randn(1, 30, 20, dtype=torch.float64)
        sides = gradient @ right, gradient.mT @ left
        norms = [torch.linalg.matrix_norm(side, 2)[..., None, None] for side in (left, right)]
        for polar, most in ((exact_polar, 1.0), (orthogonalized, 1.5)):
            step, other = bounded_steps([polar(side) for side in sides], norms, ETA)
            moved = (left + step) @ (right + other).mT - left @ right.mT
            assert torch.linalg.matrix_norm(moved, 2) <= most * ETA * (1 + 1e-9)
            largest = max(largest, float(torch.linalg.matrix_norm(moved, 2)) / ETA)
    assert largest > 0.3  # the bound is no idle one


# -- steps by hand -------------------------------------------------------------------------------------


def spectron(model, **options):
    return Spectron(
        list(model.parameters()), lambda: fnl_hf.factorizations(model), fnl_hf.layers.hidden_matrices(model),
        **{"lr": 1e-3, "factor_lr": ETA, "momentum": MU, **options},
    )  # fmt: skip


def by_hand(factors, gradients, steps):
    """U and V (m, r), (n, r) after some steps with the same gradients of them, exact norms."""
    momenta = [torch.zeros_like(factor) for factor in factors]
    for _ in range(steps):
        momenta = [MU * m + (1 - MU) * g for m, g in zip(momenta, gradients, strict=True)]
        polar = [orthogonalized((MU * m + (1 - MU) * g)[None])[0] for m, g in zip(momenta, gradients, strict=True)]
        rho = ETA / (sum(torch.linalg.matrix_norm(factor, 2) for factor in factors) + 1)
        factors = [factor - rho * direction for factor, direction in zip(factors, polar, strict=True)]
    return factors


def test_a_linear_layer_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 9)).double()
    fnl_hf.factorize(model, fnl_hf.FNLConfig(attention=(), target_modules=["0"], rank=3))
    (product,) = fnl_hf.factorizations(model)
    optimizer, start = spectron(model), copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for _ in range(3):
        optimizer.step()
    layer, before = model[0], start[0]
    expected = by_hand(
        [before.left.detach(), before.right.detach()], [layer.stored("weight").grad, layer.right.grad], 3
    )
    assert_close(
        [layer.left.detach(), layer.right.detach()], expected, rtol=0, atol=1e-3 * ETA
    )  # norms by power iteration
    polar = orthogonalized(model[1].weight.grad[None])[0]  # the gradient does not change, nor its average's direction
    assert_close(model[1].weight.detach(), start[1].weight.detach() - 3 * OF_DENSE * ETA * polar, rtol=1e-9, atol=1e-12)
    adam = torch.optim.AdamW(start.parameters(), lr=1e-3, weight_decay=0.0)
    for parameter, other in zip(start.parameters(), model.parameters(), strict=True):
        parameter.grad = other.grad
    for _ in range(3):
        adam.step()
    assert_close(layer.bias, start[0].bias, rtol=0, atol=0)
    moved = product.matrix()[0] - before.composed()
    assert torch.linalg.matrix_norm(moved, 2) < 1.5 * 3 * ETA


@pytest.mark.parametrize("narrow", [1.0, 0.5])
def test_heads_are_stepped_each_as_its_own(narrow):
    model = tf.BertModel(tf.BertConfig(**BERT)).double()
    fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=narrow))
    check_products(model, {"qk": 4, "ov": 4})


def test_heads_of_a_group_are_one_stacked_matrix():
    model = tf.MistralForCausalLM(tf.MistralConfig(**LLAMA)).double()
    fnl_hf.factorize(model, fnl_hf.FNLConfig(attention=("ov",)))
    check_products(model, {"ov": 2})


def test_fused_and_transposed_weights():
    config = tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50)
    check_products(fnl_hf.factorize(tf.GPT2Model(config).double()), {"qk": 4, "ov": 4})


def test_convolutions_are_products():
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    check_products(fnl_hf.factorize(tf.ResNetModel(config).double(), LAYERS), {"conv": 1})


def check_products(model, matrices):
    """A step of every product of a model against one matrix at a time."""
    before, optimizer = copy.deepcopy(model), spectron(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    products = fnl_hf.factorizations(model)
    gradients = [
        product.form.batched([view.read(view.parameter.grad) for view in product.views]) for product in products
    ]
    assert {product.family for product in products} == matrices.keys()
    optimizer.step()
    for product, of_factors, old in zip(products, gradients, fnl_hf.factorizations(before), strict=True):
        left, right = old.factors()
        assert len(left) == matrices[product.family]
        for i in range(len(left)):
            factors = [left[i].detach(), right[i].mT.detach()]
            expected = by_hand(factors, [of_factors[0][i], of_factors[1][i].mT], 1)
            now = [product.factors()[0][i], product.factors()[1][i].mT]
            assert_close([factor.detach() for factor in now], expected, rtol=0, atol=1e-3 * ETA)


def methods(model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group["method"] for group in spectron(model).param_groups for p in group["params"]}


def test_what_is_stepped_how():
    model = fnl_hf.factorize(tf.BertForSequenceClassification(tf.BertConfig(**BERT)), LAYERS)
    found = methods(model)
    assert {name.rpartition(".")[2] for name in found if found[name] == "spectron"} == {"weight", "right"}
    assert found["bert.encoder.layer.0.intermediate.dense.right"] == "spectron"
    for name in ("bert.embeddings.word_embeddings.weight", "classifier.weight", "bert.pooler.dense.weight"):
        assert found[name] == "adamw", name
    assert found["bert.encoder.layer.0.intermediate.dense.bias"] == "adamw"
    dense = methods(tf.BertForSequenceClassification(tf.BertConfig(**BERT)))
    assert dense["bert.encoder.layer.1.output.dense.weight"] == "muon" and dense["classifier.weight"] == "adamw"
    assert "spectron" not in dense.values()


def test_what_cannot_be_stepped_as_a_product_is_left_to_adamw():
    deep = fnl_hf.FNLConfig(attention=(), target_modules="all-linear", rank=0.25, form="deep")
    assert "spectron" not in methods(fnl_hf.factorize(tf.BertModel(tf.BertConfig(**BERT)), deep)).values()
    rotary = methods(fnl_hf.factorize(tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA))))
    assert rotary["model.layers.0.self_attn.q_proj.weight"] == "adamw"
    assert rotary["model.layers.0.self_attn.v_proj.weight"] == "spectron"
    assert rotary["model.layers.0.mlp.up_proj.weight"] == "muon"
    # of a fused weight that no other product reads the rest of, nothing; and so of what it is multiplied by
    config = tf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50)
    partly = methods(fnl_hf.factorize(tf.GPT2Model(config), fnl_hf.FNLConfig(attention=("ov",))))
    assert partly["h.0.attn.c_attn.weight"] == partly["h.0.attn.c_proj.weight"] == "adamw"
    frozen = fnl_hf.factorize(tf.BertModel(tf.BertConfig(**BERT)), LAYERS)
    layer = frozen.encoder.layer[0].output.dense
    layer.right.requires_grad_(False)
    held = [p for p in frozen.parameters() if p.requires_grad]
    optimizer = Spectron(held, lambda: fnl_hf.factorizations(frozen))
    by_adamw = {p for group in optimizer.param_groups if group["method"] == "adamw" for p in group["params"]}
    assert layer.stored("weight") in by_adamw


def test_parameters_without_a_gradient_stay():
    model = fnl_hf.factorize(tf.BertModel(tf.BertConfig(**BERT)), LAYERS)
    before, optimizer = copy.deepcopy(model.state_dict()), spectron(model)
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    right = model.encoder.layer[0].output.dense.right
    right.grad = torch.randn_like(right)
    optimizer.step()
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert moved == ["encoder.layer.0.output.dense.right"]


@pytest.mark.parametrize("options", [{"factor_lr": 1.0}, {"factor_lr": -0.1}, {"momentum": 1.0}])
def test_rates_out_of_range(options):
    with pytest.raises(ValueError, match="expected at least 0 and below 1"):
        Spectron([nn.Parameter(torch.zeros(2, 2))], **options)


# -- in training ---------------------------------------------------------------------------------------


def trainer(tmp_path, model, config=None, rows=None, **arguments):
    options = {
        "max_steps": 6, "learning_rate": 1e-2, "factor_learning_rate": ETA, "fnl_optim": "spectron", "save_steps": 3,
        "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "weight_decay": 0.01, "frobenius_decay": 0.5, "logging_steps": 1, **arguments,
    }  # fmt: skip
    args = fnl_hf.FNLTrainingArguments(output_dir=str(tmp_path), **options)
    data = rows or examples("bert") * 2
    return fnl_hf.FNLTrainer(
        model=model, args=args, train_dataset=data, fnl_config=config, data_collator=tf.default_data_collator
    )


@pytest.mark.parametrize("at", [None, "2", "4"])
def test_a_resumed_run_equals_the_uninterrupted_one(at, tmp_path):
    def fresh():
        model = make_model("bert")
        return model if at else fnl_hf.factorize(model, LAYERS)

    config = LAYERS if at else None
    whole = trainer(tmp_path / "whole", fresh(), config, factorize_at=at)
    whole.train()
    resumed = trainer(tmp_path / "resumed", fresh(), config, factorize_at=at)
    resumed.train(str(tmp_path / "whole" / "checkpoint-3"))
    expected = dict(whole.model.named_parameters())
    assert expected.keys() == dict(resumed.model.named_parameters()).keys()
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    (product, *_) = [p for p in fnl_hf.factorizations(whole.model) if p.kind == "linear"]
    state = whole.optimizer.state[product.parameters()[0]]
    assert state.keys() == {"exp_avg", "vector_0"}


def test_decoupled_decay_goes_at_the_rate_of_the_factors(tmp_path):
    """Without a gradient of the loss, products shrink as σ (1 − η λ σ)² and nothing else moves them."""
    model = fnl_hf.factorize(make_model("bert"), fnl_hf.FNLConfig(attention=(), target_modules="all-linear", rank=0.5))
    run = trainer(tmp_path, model, lr_scheduler_type="constant")
    optimizer = run.create_optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    (product, *_) = fnl_hf.factorizations(model)
    sigma = torch.linalg.svdvals(product.matrix().double())
    optimizer.step()
    assert_close(torch.linalg.svdvals(product.matrix().double()), sigma * (1 - ETA * 0.5 * sigma) ** 2)


def test_accumulation_makes_the_same_update(tmp_path):
    models = []
    for name, batch, parts in (("one", 8, 1), ("four", 2, 4)):
        torch.manual_seed(0)
        model = fnl_hf.factorize(make_model("bert"), LAYERS).double()
        trainer(
            tmp_path / name, model, per_device_train_batch_size=batch, gradient_accumulation_steps=parts, max_steps=2,
            train_sampling_strategy="sequential", save_strategy="no",
        ).train()  # fmt: skip
        models.append(model)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_a_dense_run_hands_its_momentum_on(tmp_path):
    """The average of the product's gradient gives those of its factors: G V and Gᵀ U."""
    model = make_model("bert").double()
    run = trainer(tmp_path, model, LAYERS, factorize_at="2", max_steps=3, frobenius_decay=0.0, weight_decay=0.0)
    seen = {}

    def switched(*args, **kwargs):
        weight = run.model.bert.encoder.layer[0].output.dense.weight
        seen["dense"] = run.optimizer.optimizer.state[weight]["exp_avg"].clone()
        checkpoint = type(run)._switch(run, *args, **kwargs)
        layer = run.model.bert.encoder.layer[0].output.dense
        seen["left"] = run.optimizer.state[layer.stored("weight")]["exp_avg"].clone()
        seen["right"] = run.optimizer.state[layer.right]["exp_avg"].clone()
        seen["factors"] = layer.left.detach().clone(), layer.right.detach().clone()
        return checkpoint

    run._switch = switched
    run.train()
    left, right = seen["factors"]
    assert_close(seen["left"].reshape(left.shape), seen["dense"] @ right)
    assert_close(seen["right"], seen["dense"].mT @ left)
    rates = {group["method"]: group["lr"] for group in run.optimizer.param_groups if group["params"]}
    assert rates.keys() == {"adamw", "spectron"}


def test_it_learns(tmp_path):
    for config in (None, LAYERS, fnl_hf.FNLConfig(head_rank=0.5)):
        model = make_model("bert")
        run = trainer(
            tmp_path, fnl_hf.factorize(model, config) if config else model, max_steps=60, save_strategy="no",
            frobenius_decay=0.0,
        )  # fmt: skip
        run.train()
        losses = [row["loss"] for row in run.state.log_history if "loss" in row]
        assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("model_type", ["marian", "t5"])
def test_encoders_with_decoders(model_type, tmp_path):
    model = fnl_hf.factorize(make_model(model_type), LAYERS)
    found = methods(model)
    assert "spectron" in found.values() and "muon" not in found.values()
    run = trainer(tmp_path, model, rows=examples(model_type), max_steps=2, save_strategy="no")
    run.train()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_what_does_not_go_together(tmp_path):
    with pytest.raises(ValueError, match="a rate of 'spectron'"):
        fnl_hf.FNLTrainingArguments(output_dir=str(tmp_path), factor_learning_rate=0.1)
    with pytest.raises(ValueError, match="expected at least 0 and below 1"):
        fnl_hf.FNLTrainingArguments(output_dir=str(tmp_path), fnl_optim="spectron", factor_learning_rate=1.5)
    with pytest.raises(ValueError, match="optim is 'adafactor': leave it at 'adamw_torch_fused'"):
        fnl_hf.FNLTrainingArguments(output_dir=str(tmp_path), fnl_optim="spectron", optim="adafactor")
    for words in ("nesterov=1", "momentum=high", "lr=0.5"):
        run = trainer(tmp_path, make_model("bert"), frobenius_decay=0.0, optim_args=words)
        with pytest.raises(ValueError, match=f"optim_args is '{words}', but fnl_optim='spectron' takes momentum"):
            run.create_optimizer()


def lone_layer(rows=20, columns=12, rank=3):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(columns, rows)).double()
    return fnl_hf.factorize(model, fnl_hf.FNLConfig(attention=(), target_modules=["0"], rank=rank))


def step_on(model, optimizer, target=None, steps=1):
    """Steps of a regression; returns how far the product moved in each, by spectral norm."""
    moved = []
    for seed in range(steps):
        x = torch.randn(32, model[0].in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        before = model[0].composed().detach().clone()
        loss = (model(x) if target is None else model(x) - x @ target.T).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        moved.append(float(torch.linalg.matrix_norm(model[0].composed().detach() - before, 2)))
    return moved


@pytest.mark.parametrize("when", ["before", "later"])
def test_beside_a_frozen_factor_the_other_one_moves(when):
    model = lone_layer()
    if when == "before":
        model[0].right.requires_grad_(False)
    optimizer = spectron(model, factor_lr=0.1)
    if when == "later":
        step_on(model, optimizer)
        model[0].right.requires_grad_(False)
    right, left = model[0].right.clone(), model[0].stored("weight").clone()
    (moved,) = step_on(model, optimizer)
    assert torch.equal(model[0].right, right) and not torch.equal(model[0].stored("weight"), left)
    assert 0.01 < moved <= 0.15


def test_a_factor_that_grows_from_zero_keeps_the_bound():
    model = lone_layer(24, 24, 8)
    with torch.no_grad():
        model[0].stored("weight").zero_()
    target = torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    moved = step_on(model, spectron(model, factor_lr=0.3), target, steps=150)
    assert torch.linalg.matrix_norm(model[0].stored("weight"), 2) > 1
    assert max(moved) <= 1.05 * 0.3  # its norm was 0 when it was first looked at


def test_norms_of_a_matrix_that_was_replaced():
    matrices, vectors = torch.zeros(1, 30, 6), None
    for place in (0, 3):
        matrices = torch.zeros(1, 30, 6)
        matrices[0, 0, place] = 5.0
        norms, vectors = spectral_norms(matrices, vectors)
        assert_close(norms, torch.full((1, 1, 1), 5.0))
    norms, _ = spectral_norms(matrices, torch.zeros(1, 6, 1))
    assert_close(norms, torch.full((1, 1, 1), 5.0))


def test_rates_of_groups():
    model = lone_layer()
    products = lambda: fnl_hf.factorizations(model)  # noqa: E731
    parameters = list(model.parameters())
    for group, rate in (({}, 0.03), ({"lr": 0.0}, 0.0), ({"lr": 5e-4}, 0.015), ({"lr": 5e-4, "factor_lr": 0.2}, 0.2)):
        optimizer = Spectron([{"params": parameters} | group], products, lr=1e-3)
        rates = {g["method"]: g["lr"] for g in optimizer.param_groups}
        assert rates["spectron"] == pytest.approx(rate) and rates["adamw"] == group.get("lr", 1e-3)
    optimizer = Spectron(model.named_parameters(), products)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2, 0]


def test_as_an_optimizer_of_torch():
    model = lone_layer()
    optimizer = spectron(model)
    more = torch.nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [more], "lr": 0.1})
    more.grad = torch.ones(3)
    optimizer.step()
    assert_close(more.detach(), torch.full((3,), 0.9))
    with pytest.raises(TypeError, match="make a new one for the copy"):
        copy.deepcopy(optimizer)
    optimizer = spectron(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    fnl_hf.to_dense(model)
    with pytest.raises(RuntimeError, match="2 parameters that were factors .* are in no product of the model now"):
        optimizer.step()


def test_adapters_are_stepped_by_adamw():
    peft = pytest.importorskip("peft")
    model = fnl_hf.factorize(make_model("bert"), LAYERS)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "dense"], r=2))
    assert not [p for p in hidden_matrices(adapted) if p.requires_grad]


def test_half_precision_weights():
    model = fnl_hf.factorize(tf.BartModel(tf.BartConfig(**BART)), LAYERS).bfloat16()
    optimizer = spectron(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = copy.deepcopy(model)
    for _ in range(3):
        optimizer.step()
    stepped = {p for group in optimizer.param_groups if group["method"] == "spectron" for p in group["params"]}
    for now, old in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.isfinite(now).all() and (now not in stepped or not torch.equal(now, old))
    loaded = spectron(model)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, state in optimizer.state.items():
        assert all(torch.equal(loaded.state[parameter][key], value) for key, value in state.items() if key != "step")


SHARDED = """
import copy, sys, torch
import torch.distributed as dist
import transformers as tf
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close
import fnl_hf
from tests.families import BERT
from tests.test_spectron import LAYERS, spectron

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
gpt2 = tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50)
narrow = tf.BertConfig(**(BERT | dict(hidden_size=24, num_attention_heads=3)))
models = [
    fnl_hf.factorize(tf.BertForMaskedLM(tf.BertConfig(**BERT)), LAYERS),
    fnl_hf.factorize(tf.BertForMaskedLM(narrow), fnl_hf.FNLConfig(head_rank=0.5)),
    fnl_hf.factorize(tf.GPT2LMHeadModel(gpt2)),
    tf.BertForMaskedLM(tf.BertConfig(**BERT)),
]
for model in models:
    model = model.double().eval()
    batches = [torch.randint(5, 50, (2, 6), generator=torch.Generator().manual_seed(r)) for r in (0, 1)]
    reference, sharded = copy.deepcopy(model), copy.deepcopy(model)
    for module in sharded.modules():
        if type(module).__name__ in ("BertLayer", "GPT2Block"):
            fully_shard(module)
    fully_shard(sharded)
    for replica, batch in ((reference, torch.cat(batches)), (sharded, batches[rank])):
        optimizer = spectron(replica, weight_decay=0.1)
        for _ in range(3):
            replica(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    start, got = dict(model.named_parameters()), dict(sharded.named_parameters())
    for name, expected in reference.named_parameters():
        update, actual = (p.detach() - start[name].detach() for p in (expected, got[name].full_tensor()))
        assert_close(actual, update, rtol=1e-4, atol=1e-7, msg=lambda m: f"{name} {m}")
        assert update.abs().max() > 0 or "position" in name, name
    if rank == 0:
        print("proven")
"""


@pytest.mark.slow
def test_sharded_parameters_move_as_whole_ones(tmp_path):
    assert run_job(tmp_path, SHARDED, 2).stdout.count("proven") == 4
