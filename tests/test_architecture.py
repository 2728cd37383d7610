"""The floors of the package: nobody imports upward, no circles, small modules, and only `heads` knows heads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fnl_hf"
# Who may know whom: a module or folder imports from its own floor and from those below.
FLOORS = [
    {"algebra", "config", "messages", "names"},
    {"factorization", "outputs", "calls", "leaves"},
    {"replay", "examples", "sharding"},
    {"proof"},
    {"trial"},
    {"plan"},
    {
        "initialization",
        "calibration",
        "moments",
        "curvature",
        "blocks",
        "distillation",
        "attachment",
        "saving",
        "selection",
        "heads",
        "layers",
        "ties",
    },
    {
        "budget",
        "planning",
        "patching",
        "successive",
        "fitting",
        "inference",
        "checking",
        "optimizer_state",
        "ranks",
        "optim",
        "spectron",
        "decay",
        "measure",
        "divergence",
    },
    {"loading", "rules", "texts"},
    {"training_arguments", "warm_start", "loss", "trainer", "overview"},
    {"checkpoints", "compression"},
    {"cli"},
    {""},  # the package itself: its public names
    {"tasks"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def place(module):
    """The name in FLOORS of a module: "heads" of "fnl_hf.heads.leaf"; "" of the package itself."""
    return (module.split(".") + [""])[1]


def imports(module, top_level=False):
    """The modules of the package that a module imports when it is run; with ``top_level``, when it is imported."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for_types = {
        inner
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    nodes = TREES[module].body if top_level else ast.walk(TREES[module])
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node not in for_types:
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {name if (name := f"{origin}.{alias.name}") in FILES else origin for alias in node.names}
    return found & FILES.keys() - {module}


def test_every_module_has_a_floor():
    assert {place(module) for module in FILES} == FLOOR.keys()


@pytest.mark.parametrize("module", FILES)
def test_nobody_imports_upward(module):
    assert not {name for name in imports(module) if FLOOR[place(name)] > FLOOR[place(module)]}


def test_there_are_no_circles():
    done = set()

    def visit(module, above):
        assert module not in above, [*above, module]
        if module not in done:
            for other in imports(module, top_level=True):
                visit(other, [*above, module])
            done.add(module)

    for module in FILES:
        visit(module, [])
    assert done == FILES.keys()


@pytest.mark.parametrize("module", FILES)
def test_modules_are_small_and_quiet(module):
    text = FILES[module].read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    assert "METHODS" not in text  # a file that readers do not have
    calls = [node.func for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)]
    prints = any(isinstance(function, ast.Name) and function.id == "print" for function in calls)
    assert not prints or place(module) in ("cli", "tasks")


def test_only_heads_know_what_heads_are():
    for module in FILES:
        assert ".__class__ = " not in FILES[module].read_text(encoding="utf-8")
        if place(module) in ("heads", ""):
            continue
        for node in ast.walk(TREES[module]):
            name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
            assert name not in ("HeadProduct", "HeadLinear", "HeadSlice"), module
            assert name != "HeadTarget" or place(module) == "planning", module  # registers the family


def test_importing_changes_nothing_outside():
    """The quantizer plug-in apart: no hook on every module, no level or handler of other loggers, no random state."""
    program = """
import logging, torch, transformers, transformers.trainer, transformers.quantizers.auto as auto
from torch.nn.modules import module
def outside():
    root = logging.getLogger()
    return (len(module._global_module_registration_hooks), torch.get_num_threads(), torch.initial_seed(),
            root.level, len(root.handlers), transformers.logging.get_verbosity(), torch.get_default_dtype(),
            transformers.PreTrainedModel.save_pretrained)
before = outside()
import fnl_hf
assert before == outside(), (before, outside())
assert "fnl" in auto.AUTO_QUANTIZER_MAPPING
model = transformers.BertModel(transformers.BertConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9))
fnl_hf.factorize(model)
assert outside()[0] == before[0]  # full rank: no leaf of ours
for rank in (1, 2):
    fnl_hf.factorize(fnl_hf.to_dense(model), fnl_hf.FNLConfig(head_rank=rank))
    assert outside()[0] == before[0] + 1
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, cwd=PACKAGE.parent)
