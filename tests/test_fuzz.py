"""Plans, configs and shapes at random: a clear error in one line, or the right result, never a changed function."""

import copy
import json
import warnings

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fnl_hf

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 20, "vocab_size": 24}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 2]])
FUZZ = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), print_blob=False
)
ERRORS = (ValueError, TypeError, RuntimeError, NotImplementedError)


def make(family, width=16, heads=4, groups=4, layers=1, bias=True):
    """A tiny model with every parameter drawn at random, and its inputs."""
    torch.manual_seed(0)
    sizes = SMALL | {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers}
    inputs = {"input_ids": IDS}
    if family == "bert":
        model = tf.BertModel(tf.BertConfig(**sizes, max_position_embeddings=8))
    elif family == "gpt2":
        config = tf.GPT2Config(n_embd=width, n_layer=layers, n_head=heads, vocab_size=24, n_positions=8, n_inner=20)
        config.bos_token_id = config.eos_token_id = 2
        model = tf.GPT2Model(config)
    elif family == "llama":
        config = tf.LlamaConfig(**sizes, num_key_value_heads=groups, attention_bias=bias, max_position_embeddings=8)
        model = tf.LlamaModel(config)
    else:
        model = tf.T5Model(
            tf.T5Config(
                d_model=width, d_kv=max(1, width // heads), d_ff=20, num_layers=layers, num_heads=heads, vocab_size=24
            )
        )
        inputs["decoder_input_ids"] = IDS[:, :4]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4)
    return model.eval(), inputs


@torch.no_grad()
def output(model, inputs):
    return model(**inputs).last_hidden_state


def same(a, b):
    return a.shape == b.shape and bool((a - b).norm() <= 1e-4 * b.norm())


def is_clear(error):
    """Ours are one line; transformers' own, about sizes that do not match, ends a report of its loading."""
    text = str(error)
    return text.strip() and ("\n" not in text.strip() or "ignore_mismatched_sizes" in text)


@pytest.fixture(scope="module", autouse=True)
def quietly():
    verbosity = tf.logging.get_verbosity()
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    tf.logging.set_verbosity(verbosity)
    tf.logging.enable_progress_bar()


# -- plans -------------------------------------------------------------------------------------------

CHECKPOINTS = {
    f"{family}-{name}": (family, config)
    for family in ("bert", "gpt2", "llama", "t5")
    for name, config in {
        "full": {},
        "half": {"head_rank": 0.5},
        "compact": {"head_rank": 0.5, "head_layout": "compact"},
        "qk": {"head_rank": 0.5, "attention": "qk"},
        "ov": {"head_rank": 1, "attention": "ov"},
    }.items()
    if (family, name) != ("llama", "qk")  # keeps its full rank
}
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.just(10**30), st.floats(), st.text(max_size=4),
    st.sampled_from(["in", "out", "qk", "ov", "rotary-qk", "heads", "query.weight", [], {}, [[]], [4]]),
    st.dictionaries(st.text(max_size=3), st.integers(0, 9), max_size=2),
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """name -> (directory, class, inputs, output, the stored config)."""
    made = {}
    for name, (family, config) in CHECKPOINTS.items():
        model, inputs = make(family)
        fnl_hf.factorize(model, fnl_hf.FNLConfig(**config), verify=inputs)
        directory = tmp_path_factory.mktemp(name)
        model.save_pretrained(directory)
        stored = json.loads((directory / "config.json").read_text())
        made[name] = directory, type(model), inputs, output(model, inputs), stored
    return made


def places(value, path=()):
    """The path of every value inside another."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def mutated(data, plan):
    """One change at a random place of a plan."""
    path = data.draw(st.sampled_from(sorted(places(plan), key=str)))
    parent = plan
    for step in path[:-1]:
        parent = parent[step]
    key, value = path[-1], parent[path[-1]]
    ways = ["value", "drop", "beside"] + ["other place"] * 4 + ["number"] * 8 * (type(value) is int)
    way = data.draw(st.sampled_from(ways))
    if way == "value":
        parent[key] = data.draw(VALUES)
    elif way == "number":
        parent[key] = data.draw(st.sampled_from([value + 1, value - 1, value * 2, value // 2, -value, float(value)]))
    elif way == "drop":
        del parent[key]
    elif way == "beside" and isinstance(parent, dict):
        parent[data.draw(st.sampled_from(["head_dim", "num_heads", "is_causal", "forward", "x"]))] = copy.deepcopy(
            value
        )
    elif way == "beside":
        parent.append(copy.deepcopy(value))
    else:  # what stands elsewhere under the same name, so that sides, products and names are swapped
        others = [p for p in sorted(places(plan), key=str) if p[-1] == key and p[: len(path)] != path != p]
        other = plan
        for step in data.draw(st.sampled_from(others)) if others else path:
            other = other[step]
        parent[key] = copy.deepcopy(other)


@settings(FUZZ, max_examples=420)
@given(data=st.data(), name=st.sampled_from(sorted(CHECKPOINTS)), changes=st.integers(1, 2))
def test_a_mutated_plan_is_an_error_or_the_same_function(checkpoints, data, name, changes):
    directory, model_class, inputs, expected, stored = checkpoints[name]
    config = copy.deepcopy(stored)
    for _ in range(changes):
        mutated(data, config["quantization_config"]["plan"])
        if not config["quantization_config"]["plan"]:
            return
    (directory / "config.json").write_text(json.dumps(config))
    numbers = {n: _numbers(m) for n, m in make(name.partition("-")[0])[0].named_modules()}
    try:
        model = model_class.from_pretrained(directory)
        found = output(model, inputs)
    except ERRORS as error:
        assert is_clear(error), error
        return
    assert same(found, expected)
    fnl_hf.to_dense(model) if fnl_hf.factorizations(model) else None
    assert same(output(model, inputs), expected)
    assert {n: _numbers(m) for n, m in model.named_modules()} == numbers


def _numbers(module):
    return {name: value for name, value in vars(module).items() if type(value) is int}


# -- configs and shapes ------------------------------------------------------------------------------

PATTERNS = [".*", r".*\.0\..*", ".*qk|.*ov", "(?i).*ATT.*", r".*[01]\..*", ".*qk", ".*ov"]
WRONG = [r"^h\.0.*", "(", "0", "nothing", "a)|(b"]
RANKS = st.one_of(st.integers(1, 3), st.floats(0.05, 1.0), st.sampled_from([1, 1.0, 0.5, 2]))
RANKS = st.one_of(RANKS, RANKS, RANKS, st.integers(-1, 9), st.sampled_from([True, "1", None, 0.0, 1.2]))
FIELDS = {
    "attention": st.one_of(
        st.lists(st.sampled_from(["qk", "ov"]), min_size=1, max_size=3),
        st.lists(
            st.sampled_from(["qk", "ov", "self_attn.ov", "attn.qk", "self.qk", "SelfAttention.ov", "x"]), max_size=2
        ),
    ),
    "head_rank": RANKS,
    "head_layout": st.sampled_from(["padded", "compact"]),
    "rank_pattern": st.one_of(
        st.dictionaries(st.sampled_from(PATTERNS), RANKS, max_size=2),
        st.lists(st.tuples(st.sampled_from(PATTERNS + WRONG), st.integers(1, 4)), max_size=2),
    ),
    "exclude_modules": st.one_of(
        st.sampled_from([None, r".*\.0\..*", ".*qk", ".*ov", *WRONG]),
        st.lists(st.sampled_from(["qk", "ov", "0", "layer.0", "h.0.attn", "self_attn", "x"]), max_size=1),
    ),
    "init": st.sampled_from(["spectral", "spectral", "default", "svd"]),
}


@settings(FUZZ, max_examples=160)
@given(
    family=st.sampled_from(["bert", "gpt2", "llama", "t5"]),
    width=st.integers(1, 8),
    heads=st.sampled_from([1, 2, 3, 4]),
    groups=st.sampled_from([1, 2, 4]),
    layers=st.sampled_from([1, 2]),
    bias=st.booleans(),
    chosen=st.lists(st.sampled_from(sorted(FIELDS)), unique=True, max_size=3),
    data=st.data(),
)
def test_any_config_and_shape_is_an_error_or_the_right_result(
    tmp_path_factory, family, width, heads, groups, layers, bias, chosen, data
):
    """Right is: at full rank the function of the dense model; at any rank the same through a file and made dense."""
    groups = groups if heads % groups == 0 else heads
    width = 2 * width if family == "llama" else width
    dense, inputs = make(family, width * heads, heads, groups, layers, bias)
    model, before = copy.deepcopy(dense), output(dense, inputs)
    try:
        config = fnl_hf.FNLConfig(**{name: data.draw(FIELDS[name]) for name in chosen})
        fnl_hf.factorize(model, config, verify=inputs)
    except ERRORS as error:
        assert is_clear(error), error
        assert repr(model) == repr(dense) and same(output(model, inputs), before)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), dense.parameters(), strict=True))
        return
    found = output(model, inputs)
    sizes = {product.name: (product.size()[1], product.full_rank) for product in fnl_hf.factorizations(model)}
    if all(rank == full for rank, full in sizes.values()):
        assert same(found, before)
    directory = tmp_path_factory.mktemp("any")
    model.save_pretrained(directory)
    loaded = type(model).from_pretrained(directory, quantization_config=config)
    assert loaded.config.quantization_config == model.config.quantization_config
    assert same(output(loaded, inputs), found) and repr(loaded) == repr(model)
    assert same(output(fnl_hf.to_dense(loaded), inputs), found) and repr(loaded) == repr(dense)
