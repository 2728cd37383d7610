"""The floors of the package: nobody imports upward, no circles, small modules, and only `heads` knows heads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fnl_hf"
# Who may know whom: a module imports from its own floor and those below. Of a package, the folder counts.
FLOORS = [
    {"algebra", "config", "messages"},
    {"factorization"},
    {"proof", "saving", "sharding"},
    {"plan"},
    {"initialization", "calibration", "heads"},
    {"planning", "optimizer_state"},
    {"patching", "decay", "optim"},
    {"loading", "measure"},
    {"rules"},
    {"training_arguments", "warm_start"},
    {"trainer", "overview"},
    {"cli"},
    {"tasks"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}


def place(path):
    """The name in FLOORS of a module's file; "" for the package's own __init__."""
    top = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if top == "__init__" else top


def imported(path):
    """Names in FLOORS of what a module imports from the package, those for type checkers apart."""
    typing_only = {
        id(inner)
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(TREES[path]):
        if not isinstance(node, ast.ImportFrom) or id(node) in typing_only:
            continue
        if node.level:
            parents = path.relative_to(PACKAGE).parts[: depth - node.level]
            parts = [*parents, *(node.module or "").split(".")]
            parts = [part for part in parts if part] or [alias.name for alias in node.names]
        elif (node.module or "").split(".")[0] == "fnl_hf":
            parts = node.module.split(".")[1:] or [alias.name for alias in node.names]
        else:
            continue
        yield from parts[:1] if parents_or_module(parts) else parts


def parents_or_module(parts):
    return parts[0] in FLOOR


def test_every_module_has_a_floor():
    assert {place(path) for path in MODULES} - {""} == set(FLOOR)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nobody_imports_upward(path):
    here = place(path)
    if not here:
        return
    for name in imported(path):
        assert name in FLOOR, f"{path} imports {name}"
        assert FLOOR[name] < FLOOR[here] or (name == here or FLOOR[name] == FLOOR[here]), f"{here} imports {name}"


def test_there_are_no_circles():
    """Within a floor and within a folder too: every module imports alone, in a new process."""
    names = [
        ".".join(("fnl_hf", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for path in MODULES
    ]
    graph = {}
    for path, name in zip(MODULES, names, strict=True):
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        edges = set()
        for node in TREES[path].body:
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*base, *([node.module] if node.module else [])])
                edges |= {f"{module}.{alias.name}" if f"{module}.{alias.name}" in names else module for alias in node.names}
        graph[name] = edges & set(names) - {name}

    def circle(name, above):
        if name in above:
            return [*above[above.index(name) :], name]
        if name not in seen:
            seen.add(name)
            for other in graph[name]:
                if found := circle(other, [*above, name]):
                    return found
        return None

    seen = set()
    for name in names:
        assert circle(name, []) is None


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_are_small_and_quiet(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    assert "METHODS" not in text  # a file that readers do not have
    calls = {node.func.id for node in ast.walk(TREES[path]) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert "print" not in calls or place(path) in ("cli", "tasks")


def test_only_heads_know_what_heads_are():
    for path in MODULES:
        if place(path) in ("heads", ""):
            continue
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
                assert not {"HeadProduct", "HeadLinear", "HeadTarget"} & set(ast.unparse(node).replace(")", " ").split())
            if isinstance(node, ast.Name | ast.Attribute):
                assert ast.unparse(node).rpartition(".")[2] not in ("HeadProduct", "HeadLinear", "HeadSlice")
        assert "__class__ =" not in path.read_text(encoding="utf-8")


def test_importing_changes_nothing_outside():
    """The quantizer plug-in apart: no hook on every module, no logger of others touched, no thread count set."""
    program = """
import logging, torch, transformers, transformers.trainer, transformers.quantizers.auto as auto
from torch.nn.modules import module
before = [len(module._global_module_registration_hooks), torch.get_num_threads(), torch.initial_seed()]
before += [logging.getLogger().level, len(logging.getLogger().handlers), transformers.logging.get_verbosity()]
import fnl_hf
after = [len(module._global_module_registration_hooks), torch.get_num_threads(), torch.initial_seed()]
after += [logging.getLogger().level, len(logging.getLogger().handlers), transformers.logging.get_verbosity()]
assert before == after, (before, after)
assert "fnl" in auto.AUTO_QUANTIZER_MAPPING
model = transformers.BertModel(transformers.BertConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9))
fnl_hf.factorize(model)
assert len(module._global_module_registration_hooks) == before[0]  # full rank: no leaf of ours
fnl_hf.factorize(fnl_hf.to_dense(model), fnl_hf.FNLConfig(head_rank=1))
assert len(module._global_module_registration_hooks) == before[0] + 1
fnl_hf.factorize(fnl_hf.to_dense(model), fnl_hf.FNLConfig(head_rank=2))
assert len(module._global_module_registration_hooks) == before[0] + 1
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, cwd=PACKAGE.parent)
