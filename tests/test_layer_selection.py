"""Which layers a config asks for, which stay dense and why, and the ranks that they get."""

import copy
import re

import pytest
import torch
import transformers as tf
from torch import nn

import fnl_hf
from tests.families import BERT, VISION, build

pytestmark = pytest.mark.usefixtures("one_thread")


def config(**fields):
    return fnl_hf.FNLConfig(**{"attention": (), **fields})


def selected(model, **fields):
    """Names and ranks of the factorizations that a config makes in a copy of a model."""
    products = fnl_hf.factorizations(fnl_hf.factorize(copy.deepcopy(model), config(**fields)))
    return {product.name: product.size()[1] for product in products}


def skipped(model, **fields):
    """name -> why it is not factorized."""
    factorized = fnl_hf.factorize(copy.deepcopy(model), config(**fields))
    return {skip["name"]: skip["reason"] for skip in map(_as_dict, fnl_hf.summary(factorized).skipped)}


def _as_dict(skip):
    return skip if isinstance(skip, dict) else {"name": skip.name, "reason": skip.reason}


@pytest.fixture(scope="module")
def bert():
    return build("bert")[0]


FEED_FORWARD = [f"encoder.layer.{i}.{part}.dense" for i in (0, 1) for part in ("intermediate", "output")]
ATTENTION = [
    f"encoder.layer.{i}.attention.{part}"
    for i in (0, 1)
    for part in ("self.query", "self.key", "self.value", "output.dense")
]


# -- names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("all-linear", [*ATTENTION, *FEED_FORWARD]),
        ("all", ["embeddings.word_embeddings", *ATTENTION, *FEED_FORWARD]),
        (["intermediate.dense"], FEED_FORWARD[::2]),
        (["query", "layer.1.output.dense"], [ATTENTION[0], ATTENTION[4], FEED_FORWARD[3]]),
        (["pooler.dense", "position_embeddings"], ["pooler.dense", "embeddings.position_embeddings"]),
        (["all-linear", "pooler.dense"], [*ATTENTION, *FEED_FORWARD, "pooler.dense"]),
        (["all-linear", "word_embeddings"], [*ATTENTION, *FEED_FORWARD, "embeddings.word_embeddings"]),
        (r"encoder\.layer\.0\..*dense", [*ATTENTION[3:4], *FEED_FORWARD[:2]]),
        (r".*(key|pooler\.dense)", [ATTENTION[1], ATTENTION[5], "pooler.dense"]),
    ],
)
def test_target_modules_as_peft_understands_them(bert, wanted, names):
    assert set(selected(bert, target_modules=wanted, rank=4)) == set(names)


@pytest.mark.parametrize(
    "wanted", [["dense"], ["query", "layer.1.output.dense"], r".*\.(query|word_embeddings)", "encoder.*dense"]
)
def test_names_mean_what_they_mean_to_peft(bert, wanted):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(bert), LoraConfig(target_modules=wanted))
    theirs = {
        name.removeprefix("base_model.model.") for name, module in adapted.named_modules() if hasattr(module, "lora_A")
    }
    assert set(selected(bert, target_modules=wanted, rank=4)) == theirs and theirs


def test_exclusions_win_and_are_shown(bert):
    for exclusion in (["intermediate", "query"], r"(.*\.intermediate\.dense|.*query)"):
        names = selected(bert, target_modules="all-linear", exclude_modules=exclusion)
        assert not [name for name in names if "intermediate" in name or "query" in name] and len(names) == 8
        reasons = skipped(bert, target_modules="all-linear", exclude_modules=exclusion)
        assert "exclude" in reasons[FEED_FORWARD[0]] and "exclude" in reasons[ATTENTION[0]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["dense", "no_such"]}, r"target_modules has 'no_such', which matches no layer"),
        ({"target_modules": "no_such.*"}, r"target_modules has 'no_such\.\*', which matches no layer"),
        (
            {"target_modules": ["LayerNorm"]},
            r"target_modules has 'LayerNorm', which names .*, a LayerNorm: only linear",
        ),
        ({"target_modules": "all-linear", "exclude_modules": ["no_such"]}, "exclude_modules.*no_such"),
        ({"target_modules": "all-linear", "rank_pattern": {"no_such": 3}}, "rank_pattern.*no_such"),
    ],
)
def test_names_that_match_nothing_are_errors(bert, fields, message):
    before = repr(bert)
    with pytest.raises(ValueError, match=message):
        fnl_hf.factorize(bert, config(**fields))
    assert repr(bert) == before


@pytest.mark.parametrize(
    ("wanted", "error"), [([], ValueError), ("(", ValueError), (3, TypeError), ([3], TypeError), ([""], TypeError)]
)
def test_target_modules_without_a_meaning(wanted, error):
    with pytest.raises(error, match="target_modules"):
        fnl_hf.FNLConfig(target_modules=wanted)


# -- what stays dense unless it is named ---------------------------------------------------------------


def _random(cls, settings, **more):
    return cls(settings, **more).eval()


KEPT = {
    "classifier": (
        lambda: _random(tf.BertForSequenceClassification, tf.BertConfig(**BERT)),
        ["classifier", "bert.pooler.dense"],
    ),
    "untied head": (
        lambda: _random(tf.BertForMaskedLM, tf.BertConfig(**BERT, tie_word_embeddings=False)),
        ["cls.predictions.decoder"],
    ),
    "answers": (lambda: _random(tf.BertForQuestionAnswering, tf.BertConfig(**BERT)), ["qa_outputs"]),
    "first convolution": (
        lambda: _random(tf.ViTForImageClassification, tf.ViTConfig(**VISION)),
        ["vit.embeddings.patch_embeddings.projection", "classifier"],
    ),
    "router": (
        lambda: _random(
            tf.SwitchTransformersModel,
            tf.SwitchTransformersConfig(
                d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=4, vocab_size=30,
                num_experts=3, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
            ),
        ),
        ["encoder.block.1.layer.1.mlp.router.classifier"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_what_stays_dense_unless_it_is_named(case):
    make, names = KEPT[case]
    model = make()
    swept, reasons = selected(model, target_modules="all"), skipped(model, target_modules="all")
    for name in names:
        assert name not in swept and reasons[name].startswith("stays dense unless it is named in target_modules")
    assert set(names) <= set(selected(model, target_modules=["all", *names], rank=2))
    assert set(names) == set(selected(model, target_modules=names, rank=2))


def test_a_tied_head_goes_with_the_embedding_alone():
    model = _random(tf.BertForMaskedLM, tf.BertConfig(**BERT))
    table, head = "bert.embeddings.word_embeddings", "cls.predictions.decoder"
    assert table not in selected(model, target_modules="all-linear")
    assert "the embedding that it is tied to" in skipped(model, target_modules="all-linear")[head]
    for wanted in ("all", [table], [head], ["all-linear", "word_embeddings"]):
        names = selected(model, target_modules=wanted)
        assert table in names and head not in names  # one factorization
        factorized = fnl_hf.factorize(copy.deepcopy(model), config(target_modules=wanted))
        assert all("Factorized" in type(factorized.get_submodule(name)).__name__ for name in (table, head))


# -- what cannot be ------------------------------------------------------------------------------------


class OwnLinear(nn.Linear):
    def forward(self, input):
        return super().forward(input).relu()


class OwnEmbedding(nn.Embedding):
    def forward(self, input):
        return super().forward(input) + 1


class OwnConv(nn.Conv2d):
    pass


REFUSED = {
    "groups": (lambda: nn.Conv2d(4, 4, 3, groups=2), "2 groups of channels"),
    "depthwise": (lambda: nn.Conv1d(4, 4, 3, groups=4), "4 groups of channels"),
    "max_norm": (lambda: nn.Embedding(9, 4, max_norm=1.0), "max_norm is of rows of the table"),
    "scale_grad_by_freq": (lambda: nn.Embedding(9, 4, scale_grad_by_freq=True), "scale_grad_by_freq is of rows"),
    "sparse": (lambda: nn.Embedding(9, 4, sparse=True), "sparse is of rows of the table"),
    "own linear": (lambda: OwnLinear(5, 4), "OwnLinear is a class of its own"),
    "own embedding": (lambda: OwnEmbedding(9, 4), "OwnEmbedding is a class of its own"),
    "own convolution": (lambda: OwnConv(3, 4, 3), "OwnConv is a class of its own"),
    "one row": (lambda: nn.Linear(8, 1), "its matrix is a single row or column"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_product_is_skipped_with_the_reason(case):
    make, reason = REFUSED[case]
    leaf = make()
    model = nn.ModuleDict({"first": nn.Conv2d(3, 4, 2), "odd": leaf, "plain": nn.Linear(6, 5)})
    for wanted in ("all", ["odd", "plain"]):
        assert set(selected(model, target_modules=wanted)) == {"plain"}
        assert reason in skipped(model, target_modules=wanted)["odd"]
    with pytest.raises(ValueError, match=re.escape(reason)):
        fnl_hf.factorize(model, config(target_modules=["odd"]))
    assert model["odd"] is leaf


# -- heads and layers ----------------------------------------------------------------------------------


def test_attention_leaves_are_left_to_their_heads(bert):
    names = selected(bert, attention=("qk", "ov"), target_modules="all-linear")
    assert not set(ATTENTION) & set(names) and set(FEED_FORWARD) <= set(names)
    assert {name.rpartition(".")[2] for name in names} == {"qk", "ov", "dense"}
    names = selected(bert, attention=("qk",), target_modules="all-linear")
    assert {ATTENTION[2], ATTENTION[3]} <= set(names) and ATTENTION[0] not in names


@pytest.mark.parametrize("wanted", [["query"], ["all-linear", "value"], r".*\.attention\.output\.dense"])
def test_a_leaf_named_for_both_is_an_error(bert, wanted):
    with pytest.raises(
        ValueError, match=r"is wanted for .*\.(qk|ov) \((qk|ov)\) and for .* \(linear\): leave one of them"
    ):
        fnl_hf.factorize(copy.deepcopy(bert), fnl_hf.FNLConfig(target_modules=wanted))


# -- ranks -------------------------------------------------------------------------------------------


def test_ranks_are_taken_as_given(bert):
    name = FEED_FORWARD[0]  # 40 x 32
    for rank, expected in (
        (1, 1), (1.0, 32), (0.5, 16), (0.25, 8), (0.2, 6), (0.001, 1), (7, 7), (32, 32), (50, 50), (1.5, 48), (2.0, 64),
    ):  # fmt: skip
        assert selected(bert, target_modules=[name], rank=rank) == {name: expected}
    pattern = {r"layer\.0\.intermediate\.dense": 3, r".*intermediate.*": 0.5, "dense": 2.0}
    ranks = selected(bert, target_modules=["dense"], rank_pattern=pattern)
    assert [ranks[name] for name in FEED_FORWARD] == [3, 64, 16, 64] and ranks["pooler.dense"] == 64


def test_layers_that_save_nothing_are_named(bert):
    model = fnl_hf.factorize(copy.deepcopy(bert), config(target_modules=FEED_FORWARD[:2], rank=18))
    text = str(fnl_hf.summary(model))
    assert f"2 layers save neither parameters nor FLOPs at their rank: {FEED_FORWARD[0]}, {FEED_FORWARD[1]}" in text
    model = fnl_hf.factorize(copy.deepcopy(bert), config(target_modules=FEED_FORWARD[:2], rank=17))
    assert "save neither" not in str(fnl_hf.summary(model))


@pytest.mark.parametrize("rank", [0, -1, 0.0, float("nan"), float("inf")])
def test_ranks_without_a_meaning(rank):
    with pytest.raises(ValueError, match=f"rank is {rank}"):
        fnl_hf.FNLConfig(rank=rank)
    for wrong in ({"energy": 0}, {"energy": 1.5}, {"energi": 0.5}, {"energy": True}, {}):
        with pytest.raises(ValueError, match="energy"):
            fnl_hf.FNLConfig(rank=wrong)


def _with_spectrum(model, decay):
    """Every matrix with singular values decay ** i."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                u, s, vt = torch.linalg.svd(torch.randn_like(p), full_matrices=False)
                p.copy_(u * decay ** torch.arange(len(s)) @ vt)
    return model


def test_energy(bert):
    model = _with_spectrum(copy.deepcopy(bert), 0.8)
    for share in (0.3, 0.9, 0.99):
        energies = 0.64 ** torch.arange(32.0)
        expected = int((energies.cumsum(0) / energies.sum() < share).sum()) + 1
        ranks = selected(model, target_modules="all-linear", rank={"energy": share})
        assert set(ranks.values()) == {expected}
    # One that needs a rank at break-even or above stays dense, and says so; one with a rank of its own does not.
    flat = _with_spectrum(copy.deepcopy(bert), 0.8)
    with torch.no_grad():
        flat.encoder.layer[0].output.dense.weight.copy_(torch.eye(32, 40))
    reasons = skipped(flat, target_modules="all-linear", rank={"energy": 0.9})
    assert reasons["encoder.layer.0.output.dense"] == "dense: of rank 29 it would not be smaller"
    pattern = {r"layer\.0\.output\.dense": 31}
    assert (
        selected(flat, target_modules="all-linear", rank={"energy": 0.9}, rank_pattern=pattern)[FEED_FORWARD[1]] == 31
    )


def _count(model):
    return sum(p.numel() for p in model.parameters())


HEADS = ("qk", "ov")


@pytest.mark.parametrize("allocation", ["uniform", "error"])
@pytest.mark.parametrize(
    ("family", "attention", "form"),
    [
        ("bert", HEADS, "matrix"),
        ("bert", (), "deep"),
        ("gpt2", HEADS, "matrix"),
        ("t5", (), "matrix"),
        ("albert", HEADS, "matrix"),
    ],
)
def test_a_ratio_is_reached_from_below(family, attention, form, allocation):
    model = build(family)[0]
    for ratio in (0.65, 0.95):
        factorized = copy.deepcopy(model)
        fields = config(attention=attention, target_ratio=ratio, rank_allocation=allocation, form=form)
        fnl_hf.factorize(factorized, fields)
        reached = _count(factorized) / _count(model)
        # What one rank more in every layer takes is the rounding.
        products = fnl_hf.factorizations(factorized)
        step = sum(sum(map(torch.numel, p.factors())) / p.size()[1] for p in products) / _count(model)
        assert ratio - (step if form == "matrix" else 2 * step) <= reached <= ratio, (ratio, reached)
        kinds = {p.kind for p in fnl_hf.factorizations(factorized)}
        assert ({"qk", "ov"} <= kinds) == bool(attention)
        again = {p.name: p.size()[1] for p in fnl_hf.factorizations(factorized)}
        if attention and ratio < 0.9:  # heads share the budget
            assert any(rank < 8 for name, rank in again.items() if name.endswith((".qk", ".ov")))


@pytest.mark.parametrize("allocation", ["uniform", "error"])
def test_a_ratio_out_of_reach_is_an_error_that_says_what_is_possible(bert, allocation):
    fields = {"target_modules": ["dense"], "rank_allocation": allocation}
    with pytest.raises(ValueError, match=r"target_ratio is 0.1, but .* keeps (0\.\d+) of its parameters") as error:
        fnl_hf.factorize(copy.deepcopy(bert), config(target_ratio=0.1, **fields))
    possible = float(re.search(r"keeps (0\.\d+) of", str(error.value))[1])
    factorized = fnl_hf.factorize(copy.deepcopy(bert), config(target_ratio=possible + 0.002, **fields))
    assert _count(factorized) / _count(bert) == pytest.approx(possible, abs=0.02)


@pytest.mark.parametrize("fields", [{"rank": 0.5}, {"head_rank": 0.5}, {"rank": {"energy": 0.9}}, {"rank": 1}])
def test_a_ratio_and_ranks_exclude_each_other(fields):
    with pytest.raises(ValueError, match="target_ratio and .* are both given"):
        fnl_hf.FNLConfig(target_ratio=0.5, **fields)


@pytest.mark.parametrize("ratio", [0, 1, 1.0, -0.5, 2.0])
def test_ratios_without_a_meaning(ratio):
    with pytest.raises(ValueError, match=r"target_ratio is .*, expected a float in \(0, 1\)"):
        fnl_hf.FNLConfig(target_ratio=ratio)
    with pytest.raises(ValueError, match="shares a target_ratio: give one"):
        fnl_hf.FNLConfig(rank_allocation="error")


def test_a_rank_of_its_own_is_not_the_budgets(bert):
    pattern = {r"layer\.0\.intermediate\.dense": 5}
    ranks = selected(bert, target_modules="all-linear", target_ratio=0.7, rank_pattern=pattern)
    assert ranks[FEED_FORWARD[0]] == 5 and 5 not in {ranks[name] for name in FEED_FORWARD[1:]}


def test_allocation_by_error_keeps_more_where_there_is_more(bert):
    """Layers whose spectra fall off fast give their ranks to those whose do not; the total error is then smaller."""
    model = _with_spectrum(copy.deepcopy(bert), 0.97)
    with torch.no_grad():
        for i in (0, 1):
            dense = model.encoder.layer[i].intermediate.dense.weight
            u, s, vt = torch.linalg.svd(dense, full_matrices=False)
            dense.copy_(u * 0.4 ** torch.arange(32.0) @ vt)
    errors = {}
    for allocation in ("uniform", "error"):
        fields = {"target_modules": "all-linear", "target_ratio": 0.6, "rank_allocation": allocation}
        ranks = selected(model, **fields)
        factorized = fnl_hf.factorize(copy.deepcopy(model), config(**fields))
        errors[allocation] = sum(
            ((p.matrix()[0] - model.get_submodule(p.name).weight).norm() / model.get_submodule(p.name).weight.norm())
            ** 2
            for p in fnl_hf.factorizations(factorized)
        )
        if allocation == "error":
            fast = [ranks[name] for name in FEED_FORWARD[::2]]
            assert max(fast) < min(ranks[name] for name in FEED_FORWARD[1::2])
        else:
            assert ranks[FEED_FORWARD[0]] == ranks[FEED_FORWARD[1]]
    assert errors["error"] < 0.95 * errors["uniform"]


def test_a_config_with_layers_round_trips_through_json():
    import json

    for fields in (
        {"target_modules": "all-linear", "rank": 1}, {"target_modules": ["b", "a"], "rank": 1.0},
        {"target_modules": "all", "rank": {"energy": 0.9}}, {"target_ratio": 0.5, "rank_allocation": "error"},
        {"target_modules": ["all-linear", "x"], "form": "deep", "rank": 1.5, "rank_pattern": {"b": 2, "a": 0.5}},
    ):  # fmt: skip
        given = fnl_hf.FNLConfig(**fields)
        again = fnl_hf.FNLConfig.from_dict(json.loads(json.dumps(given.to_dict())))
        assert again == given and type(again.rank) is type(given.rank)
    assert fnl_hf.FNLConfig(rank=1, target_modules="all") != fnl_hf.FNLConfig(rank=1.0, target_modules="all")
