"""The wing of the scripts: what it needs, and what it may know."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fnl_hf
from tests.script_runs import SCRIPTS

PACKAGE = Path(fnl_hf.__file__).parent
WINGS = sorted(path.name for path in (PACKAGE / "tasks").iterdir() if (path / "__init__.py").exists())


def imported(path: Path) -> set[str]:
    """The modules that a module of the package imports, with their whole names."""
    package = ["fnl_hf", *path.relative_to(PACKAGE).parent.parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = [*package[: len(package) - node.level + 1]] if node.level else []
            origin = ".".join(filter(None, [*origin, node.module]))
            names |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
    return names


def test_nothing_in_the_library_imports_the_wing():
    for path in PACKAGE.rglob("*.py"):
        if "tasks" not in path.relative_to(PACKAGE).parts:
            assert not any(name.startswith("fnl_hf.tasks") for name in imported(path)), path


@pytest.mark.parametrize("wing", WINGS)
def test_a_task_knows_public_names_and_what_tasks_share(wing):
    allowed = {"fnl_hf", *(f"fnl_hf.{name}" for name in fnl_hf.__all__)}
    for path in (PACKAGE / "tasks" / wing).glob("*.py"):
        for name in (name for name in imported(path) if name.startswith("fnl_hf")):
            shared = ("fnl_hf.texts", "fnl_hf.tasks.running", f"fnl_hf.tasks.{wing}")
            assert name in allowed or name.startswith(shared), f"{path}: {name}"


def test_without_the_extra_scripts_end_in_one_line():
    """The library itself comes in, and what the scripts need more is named."""
    scripts = sorted(path for path in SCRIPTS.glob("*.py") if path.name.startswith(("run_", "make_", "benchmark_mlm")))
    code = (
        "import runpy, sys\n"
        "sys.modules['datasets'] = sys.modules['sacrebleu'] = None\n"
        "import fnl_hf\n"
        "for script in sys.argv[1:]:\n"
        "    try:\n"
        "        runpy.run_path(script, run_name='__main__')\n"
        "    except ImportError as error:\n"
        "        last = error\n"
        "        assert type(error).__name__ == 'MissingExtra', (script, error)\n"
        "raise last\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *scripts], capture_output=True, text=True)
    expected = "error: datasets, sacrebleu: not installed. Scripts need more: pip install 'fnl-hf[tasks]'."
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, expected), done.stderr
