"""The survey of model types: its command, its file of results, and the tiny models that it is made with."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import scripts.coverage
from scripts.coverage import NotBuilt, build, model_types, outputs
from scripts.coverage.__main__ import main
from scripts.coverage.report import read_rows, summary, write_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results" / "attention_coverage.json"

BERT = {
    "executed": 2, "by default": {"ov": 2, "qk": 2}, "claimed": {"ov": 2, "qk": 2}, "missed": [], "other": [],
    "products": {"ov": 2, "qk": 2}, "seconds": 0.1, "skipped": [], "wrong": [],
}  # fmt: skip


def test_a_type_goes_through_the_command_into_the_file(tmp_path, capsys):
    main(["llama", "bert", "--json", str(tmp_path / "rows.json")])
    stored, rows = read_rows(RESULTS), read_rows(tmp_path / "rows.json")
    assert list(rows) == ["bert", "llama"]
    for name, row in rows.items():
        assert row | {"seconds": 0} == stored[name] | {"seconds": 0}
    printed = capsys.readouterr()
    assert "qk: exact in 2 types (1 rotary); 4 of 4 products are found without example inputs\n" in printed.out
    assert "2/2 bert" in printed.err


def test_only_build_says_what_stands_in_for_a_type(capsys):
    main(["--only_build", "bert"])
    name, row = capsys.readouterr().out.split(" ", 1)
    assert name == "bert" and json.loads(row)["class"] == "BertModel"
    assert json.loads(row)["inputs"]["input_ids"] == [2, 10]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["brt"], "has no model type 'brt'; did you mean bert"),
        (["bert", "--json", "nowhere/rows.json"], "no directory nowhere for --json"),
        (["bert", "--json", "rows.json", "--only_build"], "leave out --only_build"),
    ],
)
def test_bad_arguments_end_in_a_line_before_any_model_is_built(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_every_type_has_a_line_of_its_own_and_the_counts_come_first(tmp_path):
    rows = {"zoo": BERT, "align": {"not built": "model: “too large”", "seconds": 0.2}, "ours": {"error": "E: e"}}
    write_rows(tmp_path / "rows.json", rows, "5.17")
    lines = (tmp_path / "rows.json").read_text().splitlines()
    assert read_rows(tmp_path / "rows.json") == rows
    assert [line.split(":")[0] for line in lines[-5:-2]] == ['"align"', '"ours"', '"zoo"']
    head = json.loads("".join(lines))
    assert head.pop("types") and head == {"transformers": "5.17", **summary(rows)}
    assert (head["model types"], head["built and run"], head["errors"], head["qk exact"]) == (3, 2, 1, 1)


def test_the_stored_results_are_as_the_writer_leaves_them(tmp_path):
    write_rows(tmp_path / "rows.json", read_rows(RESULTS), json.loads(RESULTS.read_text())["transformers"])
    assert (tmp_path / "rows.json").read_text() == RESULTS.read_text()


def test_a_type_that_cannot_be_built_says_at_which_stage():
    with pytest.raises(NotBuilt, match="^config: KeyError: 'no_such_type'") as caught:
        build("no_such_type")
    assert caught.value.stage == "config"


def test_models_and_outputs_are_the_same_every_time():
    (a, inputs), (b, _) = build("bert"), build("bert")
    assert "bert" in model_types()
    assert all(torch.equal(x, y) for x, y in zip(outputs(a, inputs), outputs(b, inputs), strict=True))


def test_modules_are_named_in_the_packages_docstring_and_stay_short():
    modules = {path.stem: path for path in (ROOT / "scripts" / "coverage").glob("[a-z]*.py")}
    assert set(re.findall(r"`(\w+)`", scripts.coverage.__doc__)) == modules.keys()
    assert all(len(path.read_text().splitlines()) < 400 for path in modules.values())


def test_coverage_py_is_not_taken_for_us(monkeypatch):
    """A script's own folder comes first on the path, and libraries (numba) ask whether there is a module `coverage`."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delitem(sys.modules, "coverage", raising=False)
    assert importlib.util.find_spec("coverage").origin == str(ROOT / "scripts" / "coverage" / "__init__.py")
    with pytest.raises(ImportError, match="python -m scripts.coverage"):
        importlib.import_module("coverage")
