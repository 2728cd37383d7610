"""factorize / to_dense on every common family: same function at full rank, best truncation below it."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import fnl_hf
from fnl_hf.heads import find_attention
from fnl_hf.planning import plan
from fnl_hf.proof import Evidence
from tests.families import FAMILIES, build, output


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_finds_both_products_of_every_attention(family):
    model, _ = build(family)
    sites = find_attention(model)
    assert len(sites) == FAMILIES[family][3]
    for site in sites:
        kinds = {slot: [option.kind for option in options] for slot, options in site.options.items()}
        assert kinds["ov"] == ["ov"] and kinds["qk"].count("qk") == 1 and kinds["qk"][0] == "qk"


def test_the_probe_finds_every_product_exact_and_a_wrong_one_not(family):
    model, inputs = build(family)
    proof = fnl_hf.verify(model, **inputs)
    assert proof and len(proof.verdicts) == 2 * FAMILIES[family][3]
    wrong = plan(model, fnl_hf.FNLConfig()).targets[-1]
    shifted = replace(wrong.right, heads=(wrong.right.heads[0] // 2,), width=wrong.right.width * 2)
    left = replace(wrong.left, heads=shifted.heads, width=shifted.width)
    for target, verdict in ((wrong, (0, "")), (replace(wrong, left=left, right=shifted), (None, ""))):
        evidence = Evidence(model, inputs, {target.name})
        assert evidence.chosen([(target.name, target.kind, target.found)]) == verdict  # "": refuted


def test_full_rank_keeps_the_function(family):
    model, inputs = build(family)
    before = output(model, inputs)
    keys = list(model.state_dict())
    assert fnl_hf.factorize(model, fnl_hf.FNLConfig()) is model
    assert relative(output(model, inputs), before) < 1e-5
    assert list(model.state_dict()) == keys
    for product in fnl_hf.factorizations(model):
        if all(view.bias is None for view in product.views):  # balance holds for the bias-augmented factors
            left, right = product.factors()
            assert_close(left.mT @ left, right @ right.mT, rtol=1e-3, atol=1e-4)
            bound = product.form.bound(product.form.decay_grams([left, right]))
            assert_close(bound, product.form.singular_values([left, right]).sum(), rtol=1e-4, atol=0)


def truncate_densely(model, rank_of):
    """Each product replaced by the best rank r of its bias-augmented dense matrix, written at full width."""
    for product in plan(model, fnl_hf.FNLConfig()).targets:
        owner = model.get_submodule(product.owner)
        rank, sides = rank_of(product.left.width), []
        for side in (product.left, product.right):
            weight = owner.get_parameter(side.weight)
            bias = owner.get_parameter(side.bias) if side.bias and side.axis == "out" else None
            sides.append((side, weight, bias))
        (left, wl, bl), (right, wr, br) = sides
        for head in range(left.heads[0]):
            rows = slice(left.offset + head * left.width, left.offset + (head + 1) * left.width)
            cols = slice(right.offset + head * right.width, right.offset + (head + 1) * right.width)
            a = wl.mT if left.transposed else wl  # (out, in)
            b = (wr.mT if right.transposed else wr)[cols]
            a = a[rows].mT if left.axis == "out" else a[:, rows]  # (m, h)
            a = a if bl is None else torch.cat([a, bl[rows][None]])
            b = b if br is None else torch.cat([b, br[cols][:, None]], 1)
            u, s, vt = torch.linalg.svd((a @ b).double())
            a_new, b_new = torch.zeros_like(a), torch.zeros_like(b)
            a_new[:, :rank] = u[:, :rank] * s[:rank].sqrt()
            b_new[:rank] = s[:rank].sqrt()[:, None] * vt[:rank]
            if bl is not None:
                bl[rows] = a_new[-1]
                a_new = a_new[:-1]
            if br is not None:
                br[cols] = b_new[:, -1]
                b_new = b_new[:, :-1]
            wl_view = wl.mT if left.transposed else wl
            if left.axis == "out":
                wl_view[rows] = a_new.mT
            else:
                wl_view[:, rows] = a_new
            (wr.mT if right.transposed else wr)[cols] = b_new


def test_half_rank_is_the_dense_truncation_of_every_product(family):
    model, inputs = build(family)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        truncate_densely(reference, lambda width: width // 2)
    full = output(model, inputs)
    fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=0.5))
    assert relative(output(model, inputs), output(reference, inputs)) < 1e-4
    assert relative(full, output(reference, inputs)) > 1e-3  # or the test would show nothing


def test_to_dense_gives_the_plain_model_of_the_same_function(family):
    model, inputs = build(family)
    types = {name: type(module) for name, module in model.named_modules()}
    shapes = {name: p.shape for name, p in model.named_parameters()}
    fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=0.3))
    reduced = output(model, inputs)
    assert sum(p.numel() for p in model.parameters()) < sum(shape.numel() for shape in shapes.values())
    assert fnl_hf.to_dense(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert relative(output(model, inputs), reduced) < 1e-5
    assert "quantization_config" not in model.config.to_dict()


COMPACT = {"bert", "bart", "mbart", "marian", "m2m_100", "pegasus", "t5", "gpt2", "vit", "clip", "whisper", "wav2vec2"}


def test_compact_heads_are_narrower_and_the_same_function(family):
    model, inputs = build(family)
    padded = fnl_hf.factorize(copy.deepcopy(model), fnl_hf.FNLConfig(head_rank=0.5))
    dense = copy.deepcopy(model)
    fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=0.5, head_layout="compact"))
    layouts = {row["layout"] for row in fnl_hf.summary(model).rows}
    assert layouts == {"compact"} if family in COMPACT else layouts <= {"compact", "padded"}
    assert relative(output(model, inputs), output(padded, inputs)) < 1e-5
    assert relative(output(fnl_hf.to_dense(model), inputs), output(padded, inputs)) < 1e-5
    assert repr(model) == repr(dense)
    numbers = [{k: v for k, v in vars(m).items() if type(v) is int} for m in model.modules()]
    assert numbers == [{k: v for k, v in vars(m).items() if type(v) is int} for m in dense.modules()]


def test_compact_heads_shrink_the_cache():
    model, inputs = build("gpt2")
    fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=3, head_layout="compact"))
    assert model(**inputs, use_cache=True).past_key_values.layers[0].keys.shape == (2, 4, 7, 3)


def test_truncating_a_model_that_was_trained_at_full_rank():
    model, inputs = build("bert")
    direct = fnl_hf.factorize(copy.deepcopy(model), fnl_hf.FNLConfig(head_rank=4))
    fnl_hf.factorize(model, fnl_hf.FNLConfig())
    fnl_hf.factorize(fnl_hf.to_dense(model), fnl_hf.FNLConfig(head_rank=4))
    assert relative(output(model, inputs), output(direct, inputs)) < 1e-5


def test_default_init_leaves_the_factors():
    model, _ = build("bart")
    before = copy.deepcopy(model.state_dict())
    fnl_hf.factorize(model, fnl_hf.FNLConfig(init="default"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_zero_output_projection_still_learns():
    model, inputs = build("bert")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("attention.output.dense.weight"):
                p.zero_()
    before = output(model, inputs)
    fnl_hf.factorize(model, fnl_hf.FNLConfig())
    assert relative(output(model, inputs), before) < 1e-6
    model(**inputs).last_hidden_state.square().sum().backward()
    for name, p in model.named_parameters():
        if name.endswith("attention.output.dense.weight"):
            assert (p.grad.norm(dim=0) > 0).all()


def test_shared_layers_are_one_factorization():
    model, _ = build("albert")
    fnl_hf.factorize(model, fnl_hf.FNLConfig())
    assert [f.kind for f in fnl_hf.factorizations(model)] == ["qk", "ov"]


def test_rank_pattern_and_integer_ranks():
    model, _ = build("bert")
    fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=1, rank_pattern={r"layer\.0\.attention\.self": 0.5}))
    ranks = {f.name: f.factors()[0].shape[-1] for f in fnl_hf.factorizations(model)}
    assert ranks == {
        "encoder.layer.0.attention.ov": 4,
        "encoder.layer.0.attention.self.qk": 4,
        "encoder.layer.1.attention.ov": 1,
        "encoder.layer.1.attention.self.qk": 1,
    }


def test_factors_are_live_views_and_matrix_is_their_product():
    model, _ = build("gpt2")
    fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=0.5, attention=("ov",)))
    (product, *_) = fnl_hf.factorizations(model)
    left, right = product.factors()
    assert left.shape == (4, 32, 4) and right.shape == (4, 4, 32)
    assert_close(product.matrix(), left @ right)
    assert product.squared_norm().item() == pytest.approx((left @ right).square().sum().item(), rel=1e-5)
    with torch.no_grad():
        for parameter in product.parameters():
            parameter.mul_(2.0)
    assert_close(product.factors()[0], left)  # `left` saw the change: it is a view
    copied = copy.deepcopy(model)
    assert {id(p) for f in fnl_hf.factorizations(copied) for p in f.parameters()} <= {
        id(p) for p in copied.parameters()
    }


def test_summary_and_repr_show_the_products():
    model, _ = build("bert")
    fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=0.25))
    text = str(fnl_hf.summary(model))
    assert "encoder.layer.1.attention.self.qk  qk    4      2/8" in text
    assert "(qk): HeadProduct(query.weight x key.weight, 4 heads, rank 2 of 8)" in repr(model)


def test_factorize_says_one_line(capsys):
    model, _ = build("bert")
    fnl_hf.factorize(model, fnl_hf.FNLConfig())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "8 qk in 2 modules" in lines[0]


# -- what is refused ---------------------------------------------------------------------------------


def test_twice_is_an_error_that_names_to_dense():
    model, _ = build("bert")
    fnl_hf.factorize(model, fnl_hf.FNLConfig())
    with pytest.raises(ValueError, match="to_dense"):
        fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=0.5))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused_and_nothing_changes(value):
    model, _ = build("bert")
    model.encoder.layer[1].attention.output.dense.weight.data[0, 0] = value
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.attention\.ov holds NaN or infinite"):
        fnl_hf.factorize(model, fnl_hf.FNLConfig())
    assert repr(model) == repr(before)
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch):
    model, _ = build("bert")
    before = copy.deepcopy(model)
    real, calls = fnl_hf.fitting.initial_factors, []

    def fails_at_the_third(*args, **more):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return real(*args, **more)

    monkeypatch.setattr(fnl_hf.fitting, "initial_factors", fails_at_the_third)
    with pytest.raises(RuntimeError, match="out of memory"):
        fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=0.5))
    assert repr(model) == repr(before)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_a_model_without_attention():
    with pytest.raises(ValueError, match="nothing to factorize; asked for qk and ov: no module has query"):
        fnl_hf.factorize(nn.Sequential(nn.Linear(3, 3)), fnl_hf.FNLConfig())


def test_what_is_not_understood_is_skipped_with_the_reason():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(8, 8) for _ in range(4))

    with pytest.raises(ValueError, match="the number of heads is not to be found"):
        fnl_hf.factorize(nn.Sequential(Odd()), fnl_hf.FNLConfig())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attention": ("qkv",)}, ValueError, "attention names an unknown kind 'qkv'"),
        ({"head_rank": 0}, ValueError, "head_rank is 0, expected an int of at least 1"),
        ({"head_rank": 1.5}, ValueError, r"head_rank is 1.5, expected a float in \(0, 1\]"),
        ({"head_rank": float("nan")}, ValueError, "head_rank is nan"),
        ({"head_rank": "half"}, TypeError, "head_rank is 'half'"),
        ({"head_rank": True}, TypeError, "head_rank is True"),
        ({"rank_pattern": {"(": 1}}, ValueError, "not a regular expression"),
        ({"init": "svd"}, ValueError, "init is 'svd', expected one of"),
        ({"rank": 0.5}, ValueError, "rank=0.5 is of layers, and none is asked for"),
        ({"format_version": 99}, ValueError, "upgrade fnl_hf"),
    ],
)
def test_config_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        fnl_hf.FNLConfig(**arguments)


def test_a_rank_above_the_head_is_refused():
    model, _ = build("bert")
    with pytest.raises(ValueError, match="head rank 9 is above its head_dim 8"):
        fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=9))


def test_config_round_trips_through_json():
    config = fnl_hf.FNLConfig(attention=("ov",), head_rank=1, rank_pattern={"a": 0.5, "b": 2})
    import json

    again = fnl_hf.FNLConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and isinstance(again.head_rank, int)
    with pytest.raises(ValueError, match="FNLConfig does not know headrank"):
        fnl_hf.FNLConfig.from_dict({"headrank": 1})
