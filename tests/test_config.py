"""Settings that do what they say: comparing, selecting by name, ranks by pattern, and plans that are damaged."""

import json

import pytest
import torch
import transformers as tf

import fnl_hf
from fnl_hf.attachment import attached
from fnl_hf.cli import main
from fnl_hf.heads.checks import misfit
from fnl_hf.names import ends_with, matches_end
from fnl_hf.plan import Plan
from tests.families import BERT, build, output

NAMES = [
    "encoder.layer.0.attention.self.qk",
    "encoder.layer.0.attention.ov",
    "encoder.layer.1.attention.self.qk",
    "encoder.layer.1.attention.ov",
]


def ranks(**settings):
    """name -> rank of what becomes of a BERT with heads 8 wide, and its summary."""
    model, _ = build("bert")
    fnl_hf.factorize(model, fnl_hf.FNLConfig(**settings))
    return {f.name: f.size()[1] for f in fnl_hf.factorizations(model)}, fnl_hf.summary(model)


def through_json(config):
    """As transformers stores a config, with sorted keys."""
    return fnl_hf.FNLConfig.from_dict(json.loads(config.to_json_string()))


# -- what is equal -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"head_rank": 1}, {"head_rank": 1.0}),
        ({"rank_pattern": {"a": 1}}, {"rank_pattern": {"a": 1.0}}),
        ({"rank_pattern": {"a": 1, "b": 2}}, {"rank_pattern": {"b": 2, "a": 1}}),
        ({"exclude_modules": "a"}, {"exclude_modules": ["a"]}),
        ({"attention": ("qk",)}, {"attention": ("a.qk",)}),
        ({"head_rank": 0.5}, {"head_rank": 0.25}),
    ],
)
def test_configs_that_ask_for_different_things_differ(one, other):
    one, other = fnl_hf.FNLConfig(**one), fnl_hf.FNLConfig(**other)
    assert one != other
    assert through_json(one) == one and through_json(other) == other and through_json(one) != through_json(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"attention": ("ov", "qk")}, {"attention": ["qk", "ov", "qk"]}),
        ({"attention": "ov"}, {"attention": ("ov",)}),
        ({"attention": ("b.qk", "a.qk", "ov")}, {"attention": ("ov", "a.qk", "b.qk")}),
        ({"attention": ("a.qk", "qk")}, {"attention": "qk"}),
        ({"attention": None}, {"attention": ()}),
        ({"exclude_modules": ["b", "a"]}, {"exclude_modules": ("a", "b", "a")}),
        ({"exclude_modules": []}, {"exclude_modules": None}),
        ({"rank_pattern": {"b": 1, "a": 2}}, {"rank_pattern": [("b", 1), ["a", 2]]}),
    ],
)
def test_configs_that_ask_for_the_same_are_equal(one, other):
    one, other = fnl_hf.FNLConfig(**one), fnl_hf.FNLConfig(**other)
    assert one == other and through_json(one) == other
    assert one != "a config"


def test_a_loaded_checkpoint_is_compared_by_what_was_asked_for(tmp_path):
    model, _ = build("bert")
    fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=1.0, attention=("qk", "ov"))).save_pretrained(tmp_path)
    tf.BertModel.from_pretrained(tmp_path, quantization_config=fnl_hf.FNLConfig(attention=("ov", "qk")))
    for other in ({"head_rank": 1}, {"rank_pattern": {".*": 1.0}}, {"exclude_modules": ["layer.0"]}):
        with pytest.raises(ValueError, match="factorized already, with another config"):
            tf.BertModel.from_pretrained(tmp_path, quantization_config=fnl_hf.FNLConfig(**other))


# -- ranks by pattern --------------------------------------------------------------------------------


def test_a_pattern_matches_a_product_or_its_module_and_the_first_one_counts():
    pattern = {r".*layer\.1\..*qk": 3, r"layer\.1\.attention\.self": 2, r"layer\.0\.attention\.ov": 0.25}
    found, _ = ranks(head_rank=0.5, rank_pattern=pattern)
    assert found == dict(zip(sorted(NAMES), [2, 4, 2, 3], strict=True))


def test_the_order_of_patterns_survives_config_json(tmp_path):
    """z before a: keys of config.json are sorted, and the first match would be another one."""
    pattern = {"zz.*|.*self": 2, ".*": 4}
    model, _ = build("bert")
    config = fnl_hf.FNLConfig(rank_pattern=pattern)
    fnl_hf.factorize(model, config).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["rank_pattern"] == [["zz.*|.*self", 2], [".*", 4]]
    loaded = tf.AutoModel.from_pretrained(tmp_path, quantization_config=config)
    assert list(loaded.config.quantization_config.rank_pattern.items()) == list(pattern.items())
    again, _ = build("bert")
    fnl_hf.factorize(again, through_json(config))
    assert repr(again) == repr(model)


def test_a_dict_of_patterns_as_it_was_stored_before_is_read():
    data = fnl_hf.FNLConfig(rank_pattern={"a": 1}).to_dict() | {"rank_pattern": {"b": 0.5, "a": 1}}
    assert fnl_hf.FNLConfig.from_dict(data).rank_pattern == {"b": 0.5, "a": 1}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("qk|ov", NAMES),  # an alternation is one expression
        (r"^encoder\.layer\.0.*", NAMES[:2]),
        (r"^layer\.0.*", []),  # the start of the name, and not of a part
        (r"layer\.0\.attention\.ov$", NAMES[1:2]),
        (r"(?i)LAYER\.0\.attention\.OV", NAMES[1:2]),  # global flags could not stand inside a larger expression
        (r"(?x) layer\.0\.attention\.ov  # a comment", NAMES[1:2]),
        (r"(?<=layer\.)0\.attention\.ov", NAMES[1:2]),
        (r"layer\.(\d)\.attention\.(self\.)?(qk|ov)", NAMES),
        (r"ayer\.0\.attention\.ov", []),  # from a dot on
        (r"layer\.0\.attention\.o", []),  # to the end
        ("", []),
    ],
)
def test_what_a_pattern_matches(pattern, names):
    fnl_hf.FNLConfig(rank_pattern={pattern: 1})
    assert [name for name in NAMES if matches_end(pattern, [name])] == names
    assert ends_with("a.b.c", "b.c") and ends_with("c", "c") and not ends_with("a.bc", "c")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rank_pattern": {"a)|(b": 1}}, ValueError, "not a regular expression"),
        ({"rank_pattern": {"x{99999999999}": 1}}, ValueError, "not a regular expression"),
        ({"rank_pattern": {1: 1}}, TypeError, "rank_pattern is {1: 1}"),
        ({"rank_pattern": [["a", 1, 2]]}, TypeError, "or such pairs"),
        ({"rank_pattern": ["ab"]}, TypeError, "or such pairs"),
        ({"rank_pattern": "ab"}, TypeError, "or such pairs"),
        ({"rank_pattern": [["a", 1], ["a", 2]]}, ValueError, "'a' twice"),
        ({"rank_pattern": {"a": 0}}, ValueError, r"rank_pattern\['a'\] is 0"),
        ({"rank_pattern": {"a": None}}, TypeError, r"rank_pattern\['a'\] is None"),
        ({"exclude_modules": "("}, ValueError, "exclude_modules has '\\(', not a regular expression"),
        ({"exclude_modules": [1]}, TypeError, "exclude_modules is"),
        ({"exclude_modules": {"a": 1}}, TypeError, "exclude_modules is"),
        ({"attention": 5}, TypeError, "attention is 5"),
        ({"attention": {"qk": 1}}, TypeError, "attention is"),
        ({"attention": ["qk", 5]}, ValueError, "unknown kind 5"),
        ({"attention": ("layer.0.self",)}, ValueError, "unknown kind 'layer.0.self'"),
        ({"attention": (".qk",)}, ValueError, "unknown kind"),
        ({"rank": 1}, ValueError, "none is asked for: give target_modules"),  # rank one
        ({"form": "deep"}, ValueError, "form='deep' is of layers"),
        ({"rank": "half", "target_modules": "all"}, TypeError, "rank is 'half'"),
        ({"rank": 0.0, "target_modules": "all"}, ValueError, "rank is 0.0"),
        ({"rank": {"energy": 1.5}, "target_modules": "all"}, ValueError, "energy 1.5"),
        ({"rank": {"share": 0.5}, "target_modules": "all"}, ValueError, "energy"),
        ({"target_modules": []}, ValueError, "target_modules is empty"),
        ({"target_modules": 5}, TypeError, "target_modules is 5"),
        ({"target_modules": "("}, ValueError, "not a regular expression"),
        ({"target_ratio": 1.5}, ValueError, "target_ratio is 1.5"),
        ({"target_ratio": 0.5, "head_rank": 0.5}, ValueError, "are both given"),
        ({"rank_allocation": "error"}, ValueError, "shares a target_ratio"),
        ({"rank_allocation": "loss", "target_ratio": 0.5}, ValueError, "measures on data"),
        ({"calibration_inputs": "compressed"}, ValueError, "is of init='activation'"),
        ({"calibration_inputs": "both", "init": "activation"}, ValueError, "calibration_inputs"),
        ({"form": "tucker"}, NotImplementedError, "form='tucker' is not built yet"),
        ({"format_version": 0}, ValueError, "format_version 0"),
        ({"format_version": "2"}, ValueError, "format_version '2'"),
        ({"head_layout": ["padded"]}, ValueError, "head_layout"),
    ],
)
def test_what_has_no_meaning_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        fnl_hf.FNLConfig(**settings)
    with pytest.raises(error, match=message):
        fnl_hf.FNLConfig.from_dict(settings)
    with pytest.raises(error, match=message):
        fnl_hf.FNLConfig.from_dict({}, **settings)


# -- included and excluded by name -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "left", "reason"),
    [
        (
            {"exclude_modules": ["layer.0.attention.self"]},
            [2, 3],
            "excluded",
        ),  # its products, wherever they are declared
        ({"exclude_modules": ["layer.0"]}, [2, 3], "excluded"),  # with what is inside
        ({"exclude_modules": ["encoder.layer.0.attention.ov"]}, [0, 2, 3], "excluded"),
        ({"exclude_modules": [NAMES[0], "layer.1.attention.ov"]}, [1, 2], "excluded"),
        ({"exclude_modules": r"encoder\.layer\.0\..*"}, [2, 3], "excluded"),
        ({"exclude_modules": r"(?!encoder\.layer\.0\.).*"}, [0, 1], "excluded"),  # all but
        ({"exclude_modules": r".*\.ov"}, [0, 2], "excluded"),
        ({"attention": ("layer.1.attention.self.qk", "ov")}, [1, 2, 3], "not among"),
        ({"attention": ("layer.0.attention.ov",)}, [1], "not among"),
        ({"attention": ("qk", NAMES[1]), "exclude_modules": ["layer.1"]}, [0, 1], "excluded"),
    ],
)
def test_attention_is_included_and_excluded_by_name(settings, left, reason):
    found, summary = ranks(head_rank=0.5, **settings)
    assert found == {NAMES[i]: 4 for i in left}
    reasons = {skip["reason"] for skip in summary.skipped}
    assert reasons and all(reason in each or "excluded" in each for each in reasons)
    kinds = 2 if settings.get("attention") != ("layer.0.attention.ov",) else 1
    assert len(summary.skipped) == 2 * kinds - len(left)
    assert through_json(fnl_hf.FNLConfig(**settings)) == fnl_hf.FNLConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rank_pattern": {".*": 2, r"layr\.0": 4}}, r"rank_pattern has 'layr\.0'"),
        ({"rank_pattern": {"encoder": 4}}, "rank_pattern has 'encoder'"),
        ({"rank_pattern": {".*qk": 4}, "attention": "ov"}, "rank_pattern has '.*qk'"),
        ({"rank_pattern": {r".*layer\.0.*": 4}, "exclude_modules": ["layer.0"]}, r"rank_pattern has '.*layer"),
        ({"exclude_modules": ["layer.0", "layer.7"]}, "exclude_modules has 'layer.7'"),
        ({"exclude_modules": "layer.0"}, "exclude_modules has 'layer.0'"),  # a regular expression matches all of a name
        ({"attention": ("qk", "layer.7.attention.ov")}, "attention has 'layer.7.attention.ov'"),
        ({"attention": ("layer.0.qk",)}, "attention has 'layer.0.qk'"),
    ],
)
def test_a_name_that_matches_nothing_is_an_error_that_shows_what_there_is(settings, named):
    model, _ = build("bert")
    before, weights = repr(model), [p.clone() for p in model.parameters()]
    with pytest.raises(
        ValueError, match="which matches nothing: there are encoder.layer.[01].attention.(self.qk|ov)"
    ) as e:
        fnl_hf.factorize(model, fnl_hf.FNLConfig(**settings))
    assert named in str(e.value) and "\n" not in str(e.value)
    assert repr(model) == before and not attached(model)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_excluding_everything_says_so():
    with pytest.raises(ValueError, match="has nothing to factorize.*excluded by exclude_modules"):
        ranks(exclude_modules=["encoder"])


def test_rank_one_says_which_products_keep_their_full_rank():
    model = tf.LlamaModel(tf.LlamaConfig(**{k: BERT[k] for k in list(BERT)[:5]}))
    fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=1))
    assert any("2 products keep their full rank (rotary-qk)" in note for note in fnl_hf.summary(model).notes)
    with pytest.raises(ValueError, match="with a rank_pattern, but every product found"):
        fnl_hf.factorize(fnl_hf.to_dense(model), fnl_hf.FNLConfig(attention="qk", rank_pattern={".*": 1}))


def test_names_on_the_command_line(tmp_path, capsys):
    build("bert")[0].save_pretrained(tmp_path / "dense")

    def names(out, *options):
        code = main(["factorize", str(tmp_path / "dense"), str(tmp_path / out), *options])
        return code or [f.name for f in fnl_hf.factorizations(tf.AutoModel.from_pretrained(tmp_path / out))]

    assert names("a", "--exclude_modules", "layer.0") == NAMES[2:]
    assert names("b", "--exclude_modules", r"(?!encoder\.layer\.0\.).*") == NAMES[:2]
    assert names("c", "--attention", "qk", "layer.1.attention.ov") == [NAMES[0], *NAMES[2:]]
    assert (
        names("d", "--rank_pattern", '[["zz|.*qk", 2], [".*", 4]]', "--exclude_modules", "layer.0.attention")
        == (NAMES[2:])
    )
    capsys.readouterr()
    for wrong in (["--exclude_modules", "layer.9"], ["--attention", "kq"], ["--rank_pattern", "[[1, 2]]"]):
        assert names("e", *wrong) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "e").exists()


# -- damaged plans -----------------------------------------------------------------------------------


def plan_of(family, config):
    """A fresh dense model, and the plan that was made for one like it, as JSON."""
    model, _ = build(family)
    fnl_hf.factorize(model, config)
    return build(family)[0], json.loads(json.dumps(attached(model).plan))


def read(plan):
    return Plan.of(fnl_hf.FNLConfig(plan=plan))


GARBAGE = [
    None,
    True,
    0,
    -1,
    7,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "a\nb",
    [],
    [[]],
    {},
    {"x": {}},
    [None],
]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_any_wrong_type_anywhere_in_a_plan_is_one_line(family):
    """Each value of an entry replaced by each garbage: refused when read, or for what the model is not."""
    model, plan = plan_of(family, fnl_hf.FNLConfig(head_rank=0.5, head_layout="compact"))
    refused = 0
    for where in (("targets",), ("targets", 0), ("targets", 1), ("skipped",)):
        whole = plan
        for step in where[:-1]:
            whole = whole[step]
        original = whole[where[-1]]
        places = [(whole, where[-1])]
        if isinstance(original, dict):
            places += [(original, key) for key in original]
            places += [(original[side], key) for side in ("left", "right") for key in original[side]]
            places += [(original["compact"], key) for key in original["compact"]]
        for parent, key in places:
            value = parent[key]
            for garbage in GARBAGE:
                if garbage == value and type(garbage) is type(value):
                    continue
                parent[key] = garbage
                try:
                    targets = read(plan).targets
                    flaws = [flaw for target in targets if (flaw := misfit(target, model))]
                except ValueError as error:
                    flaws = [str(error)]
                    assert "restore the config.json" in flaws[0] or "register_family" in flaws[0]
                assert all("\n" not in flaw for flaw in flaws)
                # What a product cannot know by itself: its partner, and the weights in the file.
                harmless = (key, garbage) in [("skipped", []), ("targets", []), ("compact", {}), ("rank", 7)]
                assert flaws or harmless or key == "compact" and garbage is None, (key, garbage)
                refused += bool(flaws)
            parent[key] = value
    assert refused > 300 and not [misfit(target, model) for target in read(plan).targets if misfit(target, model)]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t[0].update(compact={"num_attention_heads": 4}), "below a module that would be told"),
        (lambda t: t[0].update(compact={"attention_head_size": 2}), "below a module that would be told"),
        (lambda t: t[0].update(compact={}), "below a module that would be told of narrower heads by nothing"),
        (lambda t: t[0].update(compact={"attention_head_size": 4, "training": 1}), "below a module that would"),
        (lambda t: t[1].update(compact={"all_head_size": 16}), "compact is"),
        (lambda t: t[0].update(rank=8), "compact is"),
        (lambda t: t[0]["left"].update(heads=[8], width=4), "4 and 8 wide"),
        (lambda t: [t[0][s].update(heads=[8], width=4) for s in ("left", "right")], "compact is"),
        (lambda t: [t[0][s].update(heads=[2], width=16) for s in ("left", "right")], "whose features are split"),
        (
            lambda t: t[0].update(left=t[0]["right"], right=t[0]["left"]),
            "has no encoder.layer.0.attention.self.key.weight and",
        ),
        (lambda t: t[1].update(left=t[1]["right"], right=t[1]["left"]), "axis is 'out', expected 'in'"),
        (lambda t: t[0]["right"].update(weight="value.weight", bias="value.bias"), "whose features are split"),
        (lambda t: t[0].update(name="encoder.layer.0.attention.self.query"), "not called 'query'"),
        (lambda t: t.append(t[0]), "twice"),
        (lambda t: t[0].update(rotary={"start": 0, "dim": 4}), "rotary is"),
        (lambda t: t[0].update(kind="rotary-qk", rotary={"start": 0, "dim": 8}), "rotary heads keep"),
        (lambda t: t[0].update(kind="rotary-qk", rank=8, rotary={"start": 3, "dim": 2}), "rotated features"),
    ],
)
def test_what_a_plan_may_not_say(edit, message):
    model, plan = plan_of("bert", fnl_hf.FNLConfig(head_rank=0.5, head_layout="compact"))
    edit(plan["targets"])
    try:
        said = [flaw for target in read(plan).targets if (flaw := misfit(target, model))]
    except ValueError as error:
        said = [str(error)]
    assert said and message in said[0]


@pytest.mark.parametrize("which", [0, 1])
def test_half_an_attention_is_not_compact(which):
    model, plan = plan_of("bert", fnl_hf.FNLConfig(head_rank=0.5, head_layout="compact"))
    plan["targets"][which]["compact"] = None
    before = repr(model)
    with pytest.raises(ValueError, match="is compact, and the other product of its attention is not"):
        read(plan).install(model)
    assert repr(model) == before


def test_blocks_of_a_fused_weight_stay_where_they_are():
    """Values taken for keys would have been padded in their place, with shapes that fit."""
    model, plan = plan_of("gpt2", fnl_hf.FNLConfig(head_rank=0.5, attention="qk"))
    assert plan["targets"][0]["right"]["offset"] == 32
    plan["targets"][0]["right"]["offset"] = 64
    assert "whose features are split" in misfit(read(plan).targets[0], model)


def test_products_that_overlap_are_not_narrowed():
    model, plan = plan_of("gpt2", fnl_hf.FNLConfig(head_rank=0.5, attention="qk"))
    plan["targets"][0]["right"]["offset"] = 16
    before = repr(model)
    with pytest.raises(ValueError, match="c_attn cannot be narrower: two products overlap"):
        read(plan).install(model)
    assert repr(model) == before


@pytest.mark.parametrize(
    "architectures",
    [
        5,
        "BertModel",
        [5],
        [None],
        [["BertModel"]],
        {},
        ["logging"],
        ["BertConfig"],
        ["pipeline"],
        ["AutoModel"],
        ["__name__"],
    ],
)
def test_architectures_that_are_no_model_classes_are_one_line(architectures, tmp_path, capsys):
    build("bert")[0].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"architectures": architectures}))
    capsys.readouterr()
    assert main(["inspect", str(tmp_path)]) == 2
    assert "expected the name of a model class" in capsys.readouterr().err


@pytest.mark.parametrize(
    "edit", [{"hidden_size": "x"}, {"num_hidden_layers": None}, {"num_attention_heads": 0}, {"quantization_config": 5},
             {"quantization_config": {"quant_method": "fnl", "plan": 3}},
             {"quantization_config": {"quant_method": "fnl"}}]
)  # fmt: skip
def test_a_config_json_that_makes_no_sense_is_one_line(edit, tmp_path, capsys):
    build("bert")[0].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    capsys.readouterr()
    assert main(["inspect", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("fnl-hf: ") and not any("Traceback" in line for line in lines)
    path.write_text("[]")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "expected the name of a model class" in capsys.readouterr().err


def test_a_damaged_plan_does_not_change_what_loads(tmp_path):
    model, inputs = build("bert")
    fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=0.5)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for side in ("left", "right"):  # in shapes that fit the weights
        config["quantization_config"]["plan"]["targets"][0][side] |= {"heads": [8], "width": 4}
    config["quantization_config"]["plan"]["targets"][0]["rank"] = 2
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"names encoder.layer.0.attention.self.qk, but BertModel has no"):
        tf.AutoModel.from_pretrained(tmp_path)
    assert output(model, inputs) is not None
