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
from fnl_hf.attachment import attached
from fnl_hf.factorization import View, swap
from fnl_hf.optimizer_state import Before, carry_state
from fnl_hf.plan import FAMILIES, Plan
from fnl_hf.planning import plan
from tests.families import BERT, TEXT, build, output
from tests.formats import make_format_1


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
        with pytest.raises(ValueError, match="of the family 'thin', and registered are heads, layers: import"):
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


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("layout", ["padded", "compact"])
def test_plans_of_format_1_load(family, layout, tmp_path):
    model, inputs = build(family)
    fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=0.5, head_layout=layout))
    model.save_pretrained(tmp_path)
    make_format_1(tmp_path)
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


# -- what other families would break ------------------------------------------------------------------


@dataclass(frozen=True)
class BrokenTarget(ThinTarget):
    family: ClassVar[str] = "broken"

    @classmethod
    def install(cls, model, targets):
        raise RuntimeError("no memory")


def state_of(model):
    return repr(model), copy.deepcopy(model.state_dict()), model.config.to_dict()


def same(model, before):
    text, weights, config = before
    return (
        repr(model) == text
        and model.config.to_dict() == config
        and all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    )


@pytest.fixture
def register():
    """Registers families until the end of a test."""
    before = dict(FAMILIES)
    yield fnl_hf.register_family
    FAMILIES.clear()
    FAMILIES.update(before)


@pytest.mark.parametrize("layout", ["padded", "compact"])
def test_a_family_that_fails_leaves_the_model_as_it_was(register, layout):
    def find(model, config):
        return [BrokenTarget(name, "thin", 5) for name in ("encoder.layer.0.intermediate.dense",)]

    register(find, BrokenTarget)
    model, _ = build("bert")
    before = state_of(model)
    with pytest.raises(RuntimeError, match="no memory"):
        fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=0.5, head_layout=layout))
    assert same(model, before)


def test_factors_that_do_not_fit_their_layer_leave_the_model_as_it_was(register):
    class Three(Thin):
        def factorization(self, name, parent):
            two = super().factorization(name, parent)
            return replace(two, views=(*two.views, two.views[1]))

    @dataclass(frozen=True)
    class ThreeTarget(ThinTarget):
        family: ClassVar[str] = "three"

        @classmethod
        def install(cls, model, targets):
            swap(model, {model.get_submodule(t.name): Three(model.get_submodule(t.name), t.rank) for t in targets})

    register(lambda model, config: [ThreeTarget("encoder.layer.0.intermediate.dense", "thin", 5)], ThreeTarget)
    model, _ = build("bert")
    before = state_of(model)
    with pytest.raises(ValueError, match=r"init='spectral' gives factors of shapes .*, and its layer has"):
        fnl_hf.factorize(model, fnl_hf.FNLConfig())
    assert same(model, before)


def test_two_families_that_want_one_weight_are_an_error_that_names_both(register):
    register(lambda model, config: [ThinTarget("encoder.layer.0.attention.self.query", "thin", 5)], ThinTarget)
    model, _ = build("bert")
    before = state_of(model)
    with pytest.raises(ValueError, match=r"query\.weight is wanted for .*self\.qk \(qk\) and for .*query \(thin\)"):
        fnl_hf.factorize(model, fnl_hf.FNLConfig())
    assert same(model, before)
    register(lambda model, config: find_thin(model, config) * 2, ThinTarget)
    with pytest.raises(ValueError, match=r"intermediate\.dense is to be factorized twice"):
        fnl_hf.factorize(model, fnl_hf.FNLConfig())


def test_targets_of_another_class_than_registered_are_an_error(register):
    register(lambda model, config: [BrokenTarget("encoder.layer.0.intermediate.dense", "thin", 5)], ThinTarget)
    with pytest.raises(TypeError, match="a finder of ThinTarget offers a BrokenTarget"):
        fnl_hf.factorize(build("bert")[0], fnl_hf.FNLConfig())
    with pytest.raises(TypeError, match="expected a function"):
        register(3, ThinTarget)

    @dataclass(frozen=True)
    class Taken(ThinTarget):
        pass

    with pytest.raises(ValueError, match="the tag 'thin' is that of ThinTarget: give Taken a family of its own"):
        register(find_thin, Taken)


def test_verify_of_a_dense_model_is_about_what_can_be_proven(thin):
    model, inputs = build("bert")
    proof = fnl_hf.verify(model, **inputs)
    assert proof and {verdict.kind for verdict in proof.verdicts} == {"qk", "ov"}
    assert fnl_hf.verify(fnl_hf.factorize(model), **inputs)


def test_every_factor_gets_an_optimizer_state_of_its_own(thin):
    model, inputs = build("bert")
    optimizer = torch.optim.AdamW(model.parameters())
    model(**inputs).last_hidden_state.square().sum().backward()
    optimizer.step()
    before = {t.name: Before.of(t.found(model)) for t in plan(model, fnl_hf.FNLConfig(attention=())).targets}
    fnl_hf.factorize(model, fnl_hf.FNLConfig(attention=()))
    moves = [(before[product.name], product) for product in fnl_hf.factorizations(model)]
    carried = carry_state(moves, optimizer.state)
    tensors = [value for kept in carried.values() for value in kept.values() if torch.is_tensor(value)]
    assert len(carried) == 4 and len({value.data_ptr() for value in tensors}) == len(tensors) == 12


def test_a_declared_weight_by_itself_trains_and_is_logged(tmp_path):
    class Lone(fnl_hf.Declares, nn.Linear):
        def factorization(self, name, parent):
            return fnl_hf.Factorization(name, "lone", chain, (View(self.weight, lambda w: w[None], -2),))

    model = tf.BertForMaskedLM(tf.BertConfig(**BERT))
    model.bert.encoder.layer[0].intermediate.dense = Lone(32, 40)
    args = fnl_hf.FNLTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, frobenius_decay=0.1, logging_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in TEXT["input_ids"].tolist()]
    trainer = fnl_hf.FNLTrainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    assert 0 < trainer.state.log_history[0]["fnl/lone/effective_rank"] <= 32
    with pytest.raises(ValueError, match="intermediate.dense declares .* but is no fnl_hf.FactorLeaf"):
        fnl_hf.to_dense(model)


def test_a_leaf_of_two_names_in_one_parent_is_replaced_under_both():
    parent = nn.Module()
    parent.one = parent.other = nn.Linear(2, 2)
    swap(parent, {parent.one: nn.Identity()})
    assert parent.one is parent.other and isinstance(parent.one, nn.Identity)
