"""A second family of targets, registered from outside: a low-rank linear goes through all that heads go through."""

import copy
import json
import pickle
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import pytest
import torch
import transformers as tf
from torch import nn
from torch.testing import assert_close

import fnl_hf
from fnl_hf.algebra import chain
from fnl_hf.factorization import View, swap
from fnl_hf.plan import FAMILIES, Plan, attached
from tests.families import BERT, TEXT, build, output


class Thin(fnl_hf.Declares, fnl_hf.FactorLeaf):
    """y = U V x + b: one factor under the dense layer's key, where its shape does not fit."""

    def __init__(self, linear, rank):
        super().__init__()
        out, inp = linear.weight.shape
        like = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.weight = nn.Parameter(torch.empty(out, rank, **like))
        self.right = nn.Parameter(torch.empty(rank, inp, **like))
        self.bias = linear.bias
        self._is_hf_initialized = True

    def forward(self, x):
        return nn.functional.linear(nn.functional.linear(x, self.right), self.weight, self.bias)

    def factorization(self, name, parent):
        views = tuple(View(p, lambda p: p[None], outer) for p, outer in ((self.weight, -2), (self.right, -1)))
        full_rank = min(self.weight.shape[0], self.right.shape[1])
        return fnl_hf.Factorization(name, "thin", chain, views, full_rank)

    def dense(self):
        linear = nn.Linear(self.right.shape[1], self.weight.shape[0], self.bias is not None)
        linear.weight = nn.Parameter((self.weight @ self.right).detach())
        linear.bias = self.bias
        return linear


@dataclass(frozen=True)
class ThinTarget(fnl_hf.Target):
    family: ClassVar[str] = "thin"

    def found(self, model):
        weight = model.get_submodule(self.name).weight
        return fnl_hf.Factorization(self.name, self.kind, chain, (View(weight, lambda w: w[None], -2),))

    def parameters(self):
        return (f"{self.name}.weight",)

    @classmethod
    def install(cls, model, targets):
        leaves = {target: model.get_submodule(target.name) for target in targets}
        swap(model, {leaf: Thin(leaf, target.rank) for target, leaf in leaves.items()})


def find_thin(model, config):
    return [
        ThinTarget(name, "thin", 5)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(("intermediate.dense", "c_fc"))
    ]


@pytest.fixture
def thin():
    fnl_hf.register_family(find_thin, ThinTarget)
    yield
    del FAMILIES["thin"]


@pytest.fixture(params=[("qk", "ov"), ()], ids=["beside heads", "alone"])
def factorized(thin, request):
    model, inputs = build("bert")
    dense = copy.deepcopy(model)
    return fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=0.5, attention=request.param)), dense, inputs


def test_it_is_found_initialised_and_summed_up(factorized):
    model, dense, _ = factorized
    thin = [f for f in fnl_hf.factorizations(model) if f.kind == "thin"]
    assert [f.name for f in thin] == [f"encoder.layer.{i}.intermediate.dense" for i in range(2)]
    for product in thin:
        weight = dense.get_submodule(product.name).weight
        u, s, vt = torch.linalg.svd(weight.detach())
        assert_close(product.matrix()[0], (u[:, :5] * s[:5]) @ vt[:5], rtol=1e-4, atol=1e-4)
        left, right = product.factors()
        assert_close(left.mT @ left, right @ right.mT, rtol=1e-3, atol=1e-4)
    assert "2 thin in 2 modules (rank 5)" in str(fnl_hf.summary(model))
    row = next(row for row in fnl_hf.summary(model).rows if row["kind"] == "thin")
    assert (row["rank"], row["head_dim"], row["heads"]) == (5, 32, 1)


def test_its_decay_is_the_gradient_of_the_dense_product(factorized):
    model, *_ = factorized
    fnl_hf.frobenius_decay_(model, 0.5, kinds=["thin"])
    for product in fnl_hf.factorizations(model):
        factors = [p.detach().requires_grad_() for p in product.parameters()]
        if product.kind != "thin":
            assert all(p.grad is None for p in product.parameters())
            continue
        (0.5 * (factors[0] @ factors[1]).square().sum() / 2).backward()
        for parameter, factor in zip(product.parameters(), factors, strict=True):
            assert_close(parameter.grad, factor.grad, rtol=1e-4, atol=1e-5)


def test_it_saves_loads_and_goes_back_to_dense(factorized, tmp_path):
    model, _, inputs = factorized
    expected = output(model, inputs)
    model.save_pretrained(tmp_path / "factorized")
    loaded = tf.AutoModel.from_pretrained(tmp_path / "factorized")
    assert repr(loaded) == repr(model) and torch.equal(output(loaded, inputs), expected)
    assert Plan.of(attached(loaded)) == Plan.of(attached(model))
    head = tf.BertForMaskedLM.from_pretrained(tmp_path / "factorized")  # other names: it lies below "bert" there
    assert torch.equal(output(head.bert, inputs), expected)
    assert [f.name for f in fnl_hf.factorizations(head)][-1].startswith("bert.encoder.layer.1")
    dense = fnl_hf.to_dense(loaded)
    assert not fnl_hf.factorizations(dense) and not any(isinstance(m, fnl_hf.FactorLeaf) for m in dense.modules())
    assert_close(output(dense, inputs), expected, rtol=1e-4, atol=1e-5)
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_a_part_that_was_factorized_by_itself_is_saved_with_the_whole(thin, tmp_path):
    model, inputs = build("bert")
    fnl_hf.factorize(model.encoder, fnl_hf.FNLConfig(head_rank=0.5))
    assert [target.name for target in Plan.of(attached(model.encoder)).targets if target.kind == "thin"] == [
        f"layer.{i}.intermediate.dense" for i in range(2)
    ]
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModel.from_pretrained(tmp_path)
    assert repr(loaded) == repr(model) and torch.equal(output(loaded, inputs), output(model, inputs))


def test_a_target_without_a_declaration_is_an_error_of_its_family(thin, monkeypatch):
    monkeypatch.setattr(ThinTarget, "install", classmethod(lambda cls, model, targets: None))
    with pytest.raises(TypeError, match="ThinTarget.install left no declaration at encoder.layer.0"):
        fnl_hf.factorize(build("bert")[0])


def test_plain_transformers_refuses_the_checkpoint(factorized, tmp_path):
    factorized[0].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        tf.AutoModel.from_pretrained(tmp_path)


def test_it_trains_logs_and_decays(thin, tmp_path):
    torch.manual_seed(0)
    model = fnl_hf.factorize(tf.BertForMaskedLM(tf.BertConfig(**BERT)), fnl_hf.FNLConfig())
    before = {f.name: f.squared_norm().item() for f in fnl_hf.factorizations(model)}
    args = fnl_hf.FNLTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, learning_rate=1e-3, frobenius_decay=0.1, logging_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, frobenius_decay_kinds=["thin"],
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in TEXT["input_ids"].tolist()] * 2
    trainer = fnl_hf.FNLTrainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    assert all(f.squared_norm().item() != before[f.name] for f in fnl_hf.factorizations(model))
    logged = trainer.state.log_history[0]
    norm = sum(before[name] for name in before if name.endswith("intermediate.dense")) ** 0.5
    assert logged["fnl/thin/frobenius_norm"] == pytest.approx(norm, rel=0.05)
    assert logged["fnl/thin/effective_rank"] <= 5 and logged["fnl/decay"] > 0


def test_a_warm_start_carries_the_moments_of_the_dense_weight(thin, tmp_path):
    torch.manual_seed(0)
    model = tf.BertForMaskedLM(tf.BertConfig(**BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    args = fnl_hf.FNLTrainingArguments(
        output_dir=str(tmp_path), max_steps=4, factorize_at="2", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in TEXT["input_ids"].tolist()] * 8
    trainer = fnl_hf.FNLTrainer(model=model, args=args, train_dataset=rows, fnl_config=fnl_hf.FNLConfig(head_rank=0.5))
    trainer.train()
    assert sum(f.kind == "thin" for f in fnl_hf.factorizations(model)) == 2
    state = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt")["state"]
    shapes = [tuple(moments["exp_avg"].shape) for moments in state.values()]
    assert shapes.count((40, 5)) == 2 and shapes.count((5, 32)) == 2
    assert all(moments["exp_avg"].abs().sum() > 0 for moments in state.values() if moments["exp_avg"].shape[0] == 5)


def test_a_checkpoint_of_an_unknown_family_is_one_clear_error(factorized, tmp_path):
    factorized[0].save_pretrained(tmp_path)
    family = FAMILIES.pop("thin")
    try:
        with pytest.raises(ValueError, match="of the family 'thin', and registered are heads: import the package"):
            tf.AutoModel.from_pretrained(tmp_path)
    finally:
        FAMILIES["thin"] = family


def test_copies_pickles_and_compiles(factorized):
    model, _, inputs = factorized
    expected = output(model, inputs)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(copied, inputs), expected)
        names = [f.name for f in fnl_hf.factorizations(model)]
        assert [f.name for f in fnl_hf.factorizations(copied)] == names
    torch._dynamo.reset()
    copied.forward = torch.compile(copied.forward, backend="eager", fullgraph=True)
    assert_close(output(copied, inputs), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_is_not_merged_into_it(factorized):
    peft = pytest.importorskip("peft")
    leaf = factorized[0].encoder.layer[0].intermediate.dense
    wrapper = nn.Module()
    wrapper.merge = lambda: None
    wrapper.base_layer = leaf
    with pytest.raises(ValueError, match="call fnl_hf.to_dense"):
        wrapper.merge()
    wrapper.base_layer = nn.Linear(2, 2)
    assert "merge" not in vars(wrapper)
    assert peft


# -- what is the same for every family ---------------------------------------------------------------


def test_tied_parameters_are_one_factorization_whatever_declares_them():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = (Thin(nn.Linear(4, 6), 2) for _ in range(2))
            self.head.weight, self.head.right = self.embedding.weight, self.embedding.right

    model = Tied()
    assert [f.name for f in fnl_hf.factorizations(model)] == ["embedding"]
    for kind, leaf in (("embedding", model.embedding), ("linear", model.head)):
        leaf.factorization = lambda name, parent, leaf=leaf, kind=kind: replace(
            Thin.factorization(leaf, name, parent), kind=kind
        )
    assert [f.kind for f in fnl_hf.factorizations(model)] == ["embedding"]
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.head.right)
    fnl_hf.frobenius_decay_(model, 1.0)
    once = model.head.weight @ model.head.right @ model.head.right.mT
    assert_close(model.head.weight.grad, once.detach())


def test_what_a_family_must_bring():
    with pytest.raises(TypeError, match="expected a subclass of fnl_hf.Target"):
        fnl_hf.register_family(find_thin, Thin)
    with pytest.raises(TypeError, match="Target lacks found, install, parameters"):
        fnl_hf.register_family(find_thin, fnl_hf.Target)


def as_format_1(stored: dict) -> dict:
    """A stored config as it was written before there were families."""
    products = []
    for target in stored["plan"]["targets"]:
        old = {key: value for key, value in target.items() if key not in ("family", "name")}
        products.append({"owner": target["name"].rpartition(".")[0]} | old)
    return {**stored, "format_version": 1, "plan": {"products": products, "skipped": stored["plan"]["skipped"]}}


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("layout", ["padded", "compact"])
def test_plans_of_format_1_load(family, layout, tmp_path):
    model, inputs = build(family)
    fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=0.5, head_layout=layout))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = as_format_1(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = tf.AutoModel.from_pretrained(tmp_path)
    assert repr(loaded) == repr(model) and torch.equal(output(loaded, inputs), output(model, inputs))
    assert loaded.config.quantization_config == model.config.quantization_config  # as it is written today


def test_a_plan_goes_through_json_and_back():
    model, _ = build("gpt2")
    fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=0.5, head_layout="compact"))
    plan = Plan.of(attached(model))
    assert len(plan.targets) == 4
    stored = replace(attached(model), plan=json.loads(json.dumps(plan.to_dict())))
    assert Plan.of(stored) == plan and asdict(plan.targets[0])["compact"]
