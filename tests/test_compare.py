"""Comparisons: recipes and their errors, chains of runs, going on after a stop, failures, table and plots."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fnl_hf.tasks.comparison import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    RUNNING,
    Results,
    markdown,
    plot,
    read_recipe,
    runs_of,
)
from fnl_hf.tasks.comparison.table import with_spread
from fnl_hf.tasks.running import InputError
from tests.script_runs import SCRIPTS, run_script

RECIPES = SCRIPTS / "recipes"

# Writes what a training script would, from the numbers in its arguments; waits as long as a file is there
FAKE = """
import argparse, json, os, signal, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
for name in ("output_dir", "start", "note", "fail", "hold"):
    parser.add_argument(f"--{name}", default="")
for name in ("seed", "gain"):
    parser.add_argument(f"--{name}", type=float, default=0)
parser.add_argument("--words", nargs="*")
args = parser.parse_args()
out = Path(args.output_dir)
earlier = json.loads((Path(args.start) / "all_results.json").read_text())["eval_score"] if args.start else 0
out.mkdir(parents=True, exist_ok=True)
found = sorted(path.name for path in out.iterdir())
(out / "leftover").touch()
print("found", found, flush=True)
if args.fail and (args.fail == "always" or Path(args.fail).exists()):
    sys.stderr.write("step 1\\rstep 2\\rValueError: the data are\\n  beyond repair\\n")
    sys.exit(3)
limit = time.monotonic() + 60
while args.hold and Path(args.hold).exists() and time.monotonic() < limit:
    time.sleep(0.02)
score = earlier + args.gain + args.seed
history = [{"step": step, "loss": score / step} for step in (1, 2, 4)]
(out / "checkpoint-4").mkdir(exist_ok=True)
state = {"global_step": 4, "max_steps": 4, "log_history": history}
(out / "checkpoint-4" / "trainer_state.json").write_text(json.dumps(state))
(out / "all_results.json").write_text(json.dumps({"eval_score": score, "eval_text": "x"}))
"""

RECIPE = {
    "title": "Two tasks",
    "seeds": [1, 2],
    "variables": {"gain": 10},
    "shared": {"words": ["a b", "{seed}"]},
    "stages": {
        "first": {"script": "fake.py", "arguments": {"gain": "{gain}"}, "metrics": "eval_score"},
        "second": {"script": "fake.py", "arguments": {"start": "{first}"}, "metrics": ["eval_score"]},
    },
    "variants": {"low": {}, "high": {"first": {"gain": 20}, "second": {"gain": 0.5}}},
}


@pytest.fixture
def make(tmp_path):
    """A function that writes a recipe beside the fake script and returns its path."""
    (tmp_path / "fake.py").write_text(FAKE)

    def write(**changes) -> Path:
        path = tmp_path / "recipe.json"
        path.write_text(json.dumps(RECIPE | changes))
        return path

    return write


def compare(monkeypatch, *words) -> int:
    """Run the script in this process; returns its exit status."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as exit:
            run_script(monkeypatch, "compare.py", *words)
    finally:
        signal.signal(signal.SIGTERM, handler)
    return exit.value.code


def record(out: Path, variant: str, seed: int, stage: str) -> dict:
    return json.loads((out / variant / f"seed-{seed}" / f"{stage}.json").read_text())


def with_stage(**changes) -> dict:
    """The recipe's stages, the first of them with other entries."""
    return {"stages": RECIPE["stages"] | {"first": RECIPE["stages"]["first"] | changes}}


# -- recipes ------------------------------------------------------------------------------------------


def test_yaml_and_json_are_the_same_recipe_and_values_are_text(make, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "title: Two tasks\nseeds: [1, 2]\nvariables: {gain: 10}\nshared: {words: [a b, '{seed}']}\n"
        "stages:\n"
        "  first: {script: fake.py, arguments: {gain: '{gain}'}, metrics: eval_score}\n"
        "  second: {script: fake.py, arguments: {start: '{first}'}, metrics: [eval_score]}\n"
        "variants: {low: {}, high: {first: {gain: 20}, second: {gain: 0.5}}}\n"
    )
    from_json, from_yaml = read_recipe(make(), SCRIPTS), read_recipe(tmp_path / "recipe.yaml", SCRIPTS)
    for name in ("title", "seeds", "variables", "stages", "variants"):
        assert getattr(from_json, name) == getattr(from_yaml, name)
    shared = {"a": True, "b": False, "c": 1e-3, "d": 1.0, "e": 1, "f": "no"}
    assert read_recipe(make(shared=shared), SCRIPTS).stages["first"].arguments == {
        "a": "true",
        "b": "false",
        "c": "0.001",
        "d": "1.0",
        "e": "1",
        "f": "no",
        "gain": "{gain}",
    }
    (tmp_path / "words.yaml").write_text(
        "seeds: 3\nstages: {a: {script: fake.py, metrics: x}}\nvariants: {v: {a: {\n"
        "  save: no, rate: 1e-3, rank: 1.0, empty: ''}}}"
    )
    assert read_recipe(tmp_path / "words.yaml", SCRIPTS).arguments("v", "a", 3) == {
        "save": "no",
        "rate": "1e-3",
        "rank": "1.0",
        "empty": "",
    }


def test_commands_chain_stages_and_fill_in_placeholders(make, tmp_path):
    recipe = read_recipe(make(shared={"note": '{"x": {}}-{gain}-{comparison}'}), SCRIPTS, {"gain": "7"})
    runs = runs_of(recipe, tmp_path / "out", [1, 2])
    assert [str(run) for run in runs[:5]] == [
        "low, seed 1, first",
        "low, seed 1, second",
        "high, seed 1, first",
        "high, seed 1, second",
        "low, seed 2, first",
    ]
    fake, low = str(tmp_path / "fake.py"), tmp_path / "out" / "low" / "seed-1"
    given = ["--output_dir", str(low / "first"), "--seed", "1"]
    assert runs[0].command()[1:] == [fake, "--note", f'{{"x": {{}}}}-7-{tmp_path}/out', "--gain", "7", *given]
    assert runs[1].command()[4:6] == ["--start", str(low / "first")]
    assert runs[2].arguments["gain"] == "20"
    assert [list(run.after) for run in runs[:2]] == [[], ["first"]]


def test_axes_are_multiplied(make):
    axes = {
        "rank": {"full": "", "half": {"first": {"gain": 5}}},
        "start": {"early": {}, "late": {"first": {"note": "x"}, "second": {"note": "y"}}},
    }
    recipe = read_recipe(make(variants={"plain": {}}, axes=axes), SCRIPTS)
    assert list(recipe.variants) == ["plain", "full-early", "full-late", "half-early", "half-late"]
    assert recipe.variants["half-late"] == {"first": {"gain": "5", "note": "x"}, "second": {"note": "y"}}


def test_null_takes_an_argument_away(make, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "seeds: [1]\nstages:\n  first: {script: fake.py, arguments: {gain: 1}, metrics: x}\n"
        "variants: {all: {}, none: {first: {gain: null}}, empty: {first: {gain: }}, text: {first: {gain: 'null'}}}\n"
    )
    make()  # the script beside it
    recipe = read_recipe(tmp_path / "recipe.yaml", SCRIPTS)
    given = {variant: recipe.arguments(variant, "first", 1).get("gain") for variant in recipe.variants}
    assert given == {"all": "1", "none": None, "empty": "", "text": "null"}
    recipe = read_recipe(make(variants={"none": {"first": {"gain": None}}}), SCRIPTS)
    assert "gain" not in recipe.arguments("none", "first", 1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"variant": {}}, "unknown key 'variant', expected any of axes, seeds"),
        ({"seeds": []}, "no seeds. Add"),
        ({"seeds": [1, "two"]}, "different whole numbers"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"stages": {}}, "no stages. Add"),
        ({"stages": []}, "no stages. Add"),
        ({"stages": "first"}, "stages: expected `name: value` entries, got 'first'"),
        (with_stage(metric="x"), "stages.first: unknown key 'metric', expected any of arguments, curve"),
        (with_stage(metrics=[]), "stages.first: no metrics"),
        (with_stage(script=""), "stages.first: no script"),
        (with_stage(script="run_no.py"), "no script run_no.py in .* or .*scripts"),
        (
            with_stage(arguments={"gain": "{gane}"}),
            r"low, first: no {gane}, only {seed}, {comparison}, {gain}. Other names",
        ),
        (with_stage(arguments={"start": "{second}"}), "no {second} yet .a later stage"),
        (with_stage(arguments={"start": "{first}"}), "no {first} yet"),
        (with_stage(arguments={"words": ["{x}"]}), "no {x}, only"),
        (with_stage(arguments={"gain": {"x": 1}}), "arguments.gain: a mapping, expected text. Quote placeholders"),
        (with_stage(arguments={"gain": [["x"]]}), "arguments.gain: a list, expected text"),
        ({"shared": {"--gain": 1}}, "'--gain' is not the name of an argument. Write it without dashes"),
        ({"shared": {"seed": 1}}, "shared: seed is given by the comparison"),
        ({"variants": {"low": {"output_dir": {}}}}, "variants.low: no stage 'output_dir', only first, second"),
        ({"variants": {"low": {"first": {"output_dir": "x"}}}}, "low.first: output_dir is given by the comparison"),
        ({"variants": {}}, "no variants. Add"),
        ({"variants": {"a/b": {}}}, "'a/b' cannot be the name of a variant"),
        ({"stages": RECIPE["stages"] | {"a.b": RECIPE["stages"]["first"]}}, "'a.b' cannot be the name of a stage"),
        ({"variants": {"a": {}}, "axes": {"x": {"a": {}}}}, "two variants are named a"),
        ({"variables": {"gain": 1, "first": 2}}, "{first} would have two meanings"),
        ({"variables": {"gain": None}}, "the variable gain has no value. Give --set gain="),
    ],
)
def test_recipe_errors_are_one_line(make, changes, message):
    path = make(**changes)
    with pytest.raises(InputError, match=message) as error:
        read_recipe(path, SCRIPTS)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.json", '{"seeds": [1], "seeds": [2]}', "'seeds' is given twice"),
        ("x.yaml", "variants:\n  a: {}\n  a: {}\n", "'a' is given twice"),
        ("x.json", '{"seeds": ', "not a recipe in .json"),
        ("x.yaml", "a: [", "not a recipe in .yaml"),
        ("x.yaml", "just words", "expected `name: value` entries"),
        ("x.yaml", b"\xff\xff\x00", "not a recipe"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        read_recipe(tmp_path / name, SCRIPTS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--set", "gain"], "--set gain: expected NAME=VALUE"),
        (["--set", "gian=1"], "--set gian: no such variable in .*, only gain"),
        (["--only", "low", "mid"], "--only mid: no such variant in .*, only low, high"),
    ],
)
def test_option_errors(make, monkeypatch, tmp_path, capsys, words, message):
    assert compare(monkeypatch, make(), "--output_dir", tmp_path / "out", *words) == 2
    assert re.search(message, capsys.readouterr().err)
    assert compare(monkeypatch, tmp_path / "none.yaml") == 2
    assert "none.yaml: no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_recipe_in_the_help_is_one(tmp_path):
    help = (SCRIPTS / "compare.py").read_text().split("A recipe is a YAML or JSON file:")[1].split("\nPlaceholders")[0]
    for script in ("run_mlm.py", "run_qa.py"):
        (tmp_path / script).touch()
    (tmp_path / "help.yaml").write_text(help)
    recipe = read_recipe(tmp_path / "help.yaml", SCRIPTS, {"data": "d"})
    assert list(recipe.variants) == ["full", "half", "si-lamb", "si-flambe", "default-lamb", "default-flambe"]
    assert recipe.arguments("si-lamb", "pretrain", 1)["train_file"] == "d/text.txt"


# -- running ------------------------------------------------------------------------------------------


def test_a_comparison_from_start_to_table(make, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    assert compare(monkeypatch, make(), "--output_dir", out, "--dry_run") == 0
    printed = capsys.readouterr().out
    assert printed.count("fake.py --words 'a b' 1 --gain") == 2 and not out.exists()

    assert compare(monkeypatch, make(), "--output_dir", out, "--seeds", 1, "--only", "l*") == 0
    printed = capsys.readouterr().out
    assert "Not finished yet: 6 of 8 runs, the first is high, seed 1, first." in printed and "| high" not in printed
    before = record(out, "low", 1, "first")
    assert compare(monkeypatch, make(), "--output_dir", out) == 0
    printed = capsys.readouterr().out
    assert "low, seed 1" not in printed and "[4/8] high, seed 1, second" in printed
    assert record(out, "low", 1, "first") == before
    assert before["status"] == FINISHED and before["exit_status"] == 0 and before["attempts"] == 1
    assert before["arguments"] == {"words": ["a b", "1"], "gain": "10"} and before["after"] == {}
    assert before["metrics"]["eval_score"] == 11 and before["log_history"][0] == {"step": 1, "loss": 11}
    assert 0 < before["wall_seconds"] < 30
    second = record(out, "high", 2, "second")
    assert second["arguments"]["start"] == "{first}"
    assert second["after"] == {"first": {"script": "fake.py", "arguments": {"words": ["a b", "2"], "gain": "20"}}}
    assert second["metrics"]["eval_score"] == 22 + 0.5 + 2

    table = (out / "table.md").read_text()
    assert table in printed
    assert "| variant | parameters | first eval_score | second eval_score | seconds |" in table
    assert "| low | – | 11.50 [11.00..12.00], n=2 | 13.00 [12.00..14.00], n=2 |" in table
    assert "| high | – | 21.50 [21.00..22.00], n=2 | 23.50 [22.50..24.50], n=2 |" in table

    (out / "table.md").unlink()
    assert compare(monkeypatch, make(), "--output_dir", out, "--table_only", "--seeds", 3) == 0
    again = (out / "table.md").read_text()
    assert str(out) not in (out / "summary.json").read_text()
    assert again.startswith(table.rstrip()) and "Not finished yet: 4 of 12 runs" in again

    moved = out.rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert compare(monkeypatch, make(), "--output_dir", moved) == 0
    assert "] low, seed 1, first" not in capsys.readouterr().out


def test_checkpoints_of_finished_runs_are_dropped_where_asked(make, monkeypatch, tmp_path):
    for more in ([], ["--drop_checkpoints"]):
        out = tmp_path / f"out{len(more)}"
        assert compare(monkeypatch, make(seeds=[1], variants={"low": {}}), "--output_dir", out, *more) == 0
        assert len(list(out.rglob("checkpoint-4"))) == 2 * (not more)
        assert len(list(out.rglob("all_results.json"))) == 2


def test_a_failed_run_is_reported_and_the_others_go_on(make, monkeypatch, tmp_path, capsys):
    out, broken = tmp_path / "out", tmp_path / "broken"
    broken.touch()
    variants = {"bad": {"first": {"fail": str(broken)}}, "good": {}}
    path = make(variants=variants, seeds=[1])
    assert compare(monkeypatch, path, "--output_dir", out) == 1
    table = (out / "table.md").read_text()
    assert "| bad | – | –, 1 failed | – | – |" in table and "| good | – | 11.00, n=1 |" in table
    assert f"- bad, seed 1, first, exit status 3: ValueError: the data are ({out}/bad/seed-1/first.log)" in table
    assert "Not run, for what failed before: bad, seed 1, second." in table
    assert "bad, seed 1, second: not run, first has not finished" in capsys.readouterr().out
    assert record(out, "bad", 1, "first")["status"] == FAILED
    assert compare(monkeypatch, path, "--output_dir", out, "--table_only") == 1

    # It is tried again, in an empty directory: there is no checkpoint to go on from
    broken.unlink()
    assert compare(monkeypatch, path, "--output_dir", out) == 0
    log = (out / "bad" / "seed-1" / "first.log").read_text()
    assert log.count("found []") == 2
    again = record(out, "bad", 1, "first")
    assert again["attempts"] == 2 and again["error"] is None and again["wall_seconds"] > 0
    assert "failed" not in (out / "table.md").read_text()


def test_a_run_that_fails_late_goes_on_from_its_checkpoint(make, monkeypatch, tmp_path):
    out = tmp_path / "out"
    path = make(**with_stage(metrics=["eval_f1"]), seeds=[1], variants={"low": {}})
    assert compare(monkeypatch, path, "--output_dir", out) == 1
    assert record(out, "low", 1, "first")["error"] == "all_results.json holds no number eval_f1"
    assert compare(monkeypatch, make(seeds=[1], variants={"low": {}}), "--output_dir", out) == 0
    assert "found ['all_results.json', 'checkpoint-4', 'leftover']" in (out / "low/seed-1/first.log").read_text()


def test_an_argument_that_a_variant_drops_is_null_in_the_summary(make, monkeypatch, tmp_path):
    path = make(seeds=[1], variants={"usual": {"first": {"gain": 20}}, "none": {"first": {"gain": None}}})
    assert compare(monkeypatch, path, "--output_dir", tmp_path / "out") == 0
    variants = json.loads((tmp_path / "out" / "summary.json").read_text())["variants"]
    assert [variants[name]["first"]["settings"] for name in ("usual", "none")] == [{"gain": "20"}, {"gain": None}]


def test_changed_arguments_are_an_error_or_run_again(make, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--output_dir", out, "--seeds", 1]
    assert compare(monkeypatch, make(), *options) == 0
    table = (out / "table.md").read_text()
    capsys.readouterr()
    for more in ([], ["--table_only"], ["--table_only", "--rerun"], ["--dry_run"], ["--only", "high"]):
        assert compare(monkeypatch, make(), *options, "--set", "gain=11", *more) == 2
        error = capsys.readouterr().err
        assert "low/seed-1/first.json: the arguments have changed (first ran --gain 10, now --gain 11; 2 such" in error
    assert (out / "table.md").read_text() == table

    # Of the variant "high" nothing has changed; "low" is done again with the stage that builds on it
    assert compare(monkeypatch, make(), *options, "--set", "gain=11", "--rerun", "--dry_run") == 0
    assert capsys.readouterr().out.count(": finished") == 2
    assert compare(monkeypatch, make(), *options, "--set", "gain=11", "--rerun") == 0
    printed = capsys.readouterr().out
    assert (
        "low, seed 1, second: deleted, for first ran --gain 10, now --gain 11" in printed and "high, s" not in printed
    )
    assert record(out, "low", 1, "second")["metrics"]["eval_score"] == 13

    (tmp_path / "other.py").write_text(FAKE)
    for changes, message in (
        (with_stage(script="other.py"), "first ran fake.py, not other.py"),
        ({"shared": {}}, "first ran --words a b 1, now without --words"),
        ({"shared": RECIPE["shared"] | {"note": "x"}}, "first ran without --note, now --note x"),
        (
            {"stages": RECIPE["stages"] | {"second": RECIPE["stages"]["first"]}},
            "second ran without --gain, now --gain 11",
        ),
        (
            {"stages": {"zero": RECIPE["stages"]["first"]} | with_stage(arguments={"start": "{zero}"})["stages"]},
            "on zero",
        ),
    ):
        assert compare(monkeypatch, make(**changes), *options, "--set", "gain=11") == 2
        assert message in capsys.readouterr().err


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def held(make, tmp_path):
    """A recipe with one chain whose first run waits until the file is deleted, and that file."""
    hold = tmp_path / "hold"
    hold.touch()
    yield make(**with_stage(arguments={"hold": str(hold)}), seeds=[1], variants={"low": {}}), hold
    hold.unlink(missing_ok=True)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_comparison_stops_its_script_and_goes_on_later(
    held, monkeypatch, tmp_path, capsys, request, number, status
):
    (path, hold), out = held, tmp_path / "out"
    if number == signal.SIGINT:  # ignored where the tests themselves run in the background of a shell
        before = signal.signal(number, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(number, before))

    def stop():
        wait_for((out / "low/seed-1/first/leftover").exists)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    assert compare(monkeypatch, path, "--output_dir", out) == status
    thread.join()
    stopped = record(out, "low", 1, "first")
    assert stopped["status"] == INTERRUPTED and 0 < stopped["wall_seconds"] < 60 and stopped["exit_status"] != 0
    assert compare(monkeypatch, path, "--output_dir", out, "--table_only") == 0
    assert "Not finished yet: 2 of 2 runs" in (out / "table.md").read_text()
    hold.unlink()
    assert compare(monkeypatch, path, "--output_dir", out) == 0
    again = record(out, "low", 1, "first")
    assert again["attempts"] == 2 and again["wall_seconds"] > stopped["wall_seconds"]


@pytest.mark.slow
def test_after_kill_9_the_script_that_lives_on_is_not_started_twice(held, make, monkeypatch, tmp_path, capsys):
    (path, hold), out = held, tmp_path / "out"
    recipe = path.read_text()
    command = [sys.executable, str(SCRIPTS / "compare.py"), str(path), "--output_dir", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_for((out / "low/seed-1/first/leftover").exists)
    finally:
        process.kill()
        process.wait()
    assert record(out, "low", 1, "first")["status"] == RUNNING
    assert compare(monkeypatch, path, "--output_dir", out) == 2
    assert "low, seed 1, first is running in another process" in capsys.readouterr().err
    changed = ["--output_dir", out, "--set", "gain=11", "--rerun"]
    assert compare(monkeypatch, make(**json.loads(path.read_text()) | {"shared": {}}), *changed) == 2
    assert "low, seed 1, first is running in another process" in capsys.readouterr().err
    path.write_text(recipe)
    assert record(out, "low", 1, "first")["attempts"] == 1
    hold.unlink()
    wait_for(lambda: compare(monkeypatch, path, "--output_dir", out) == 0)
    again = record(out, "low", 1, "first")
    assert again["status"] == FINISHED and again["attempts"] == 2
    assert again["log_history"] and 0 < again["wall_seconds"] < 60


def test_a_script_that_is_killed_is_a_failure(make, monkeypatch, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "kill.py").write_text("import os\nprint('step 7', flush=True)\nos.kill(os.getpid(), 9)\n")
    path = make(**with_stage(script="kill.py"), seeds=[1], variants={"low": {}})
    assert compare(monkeypatch, path, "--output_dir", out) == 1
    text = "exit status -9: killed by SIGKILL (out of memory?); step 7"
    assert f"- low, seed 1, first, {text}" in (out / "table.md").read_text()


# -- table and plots ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, text",
    [
        ([], "–"),
        ([31.934], "31.93, n=1"),
        ([0.5, 0.25], "0.3750 [0.2500..0.5000], n=2"),
        ([10.0, 11.0, 12.0], "11.00 ± 1.00, n=3"),  # the sample's standard deviation
        ([float("nan"), 1.0, 2.0], "nan ± nan, n=3"),
    ],
)
def test_mean_and_spread(values, text):
    assert with_spread(values) == text


@pytest.fixture
def finished(make, tmp_path):
    """A comparison of two variants whose records are written by hand: three seeds, one of which failed."""
    path = make(seeds=[1, 2, 3], **with_stage(curve=["loss", "rank"]))
    recipe = read_recipe(path, SCRIPTS)
    runs = runs_of(recipe, tmp_path / "out", recipe.seeds)
    for run in runs:
        run.directory.mkdir(parents=True)
        failed = run.variant == "low" and run.seed == 3
        history = [{"step": step, "loss": run.seed / step} for step in range(1, 4 + run.seed)]
        history += [{"step": 4, "rank": 7}] if run.variant == "high" and run.stage.name == "first" else []
        result = (
            {"error": "boom", "exit_status": 1} if failed else {"parameters": 1000 * run.seed, "log_history": history}
        )
        run.write(
            {"seed": run.seed, **run.settings, "wall_seconds": 1.5, "metrics": {"eval_score": run.seed}}
            | {"status": FAILED if failed else FINISHED}
            | result
        )
    return Results(recipe, runs), tmp_path / "out"


def test_results_are_those_of_the_records(finished):
    results, _ = finished
    assert results.values("low", "first", "eval_score") == [1, 2] and results.parameters("low") == 1500
    assert results.curve("low", "first", "loss") == {1: [1, 2], 2: [1 / 2, 1], 3: [1 / 3, 2 / 3], 4: [1 / 4, 2 / 4]}
    assert results.seconds("low") == [3.0, 3.0]
    summary = results.summary()
    first = summary["variants"]["low"]["first"]
    assert first["metrics"] == {"eval_score": {"1": 1, "2": 2}} and summary["failed"][0] == "low, seed 3, first"
    assert first["curve"] == {"loss": results.curve("low", "first", "loss")}
    assert summary["variants"]["high"]["first"]["curve"]["rank"] == {4: [7, 7, 7]}
    table = markdown(results)
    assert (
        "| low | 1,500 | 1.5000 [1.0000..2.0000], n=2, 1 failed | 1.5000 [1.0000..2.0000], n=2, 1 failed | 3 |" in table
    )
    assert "| high | 2,000 | 2.0000 ± 1.0000, n=3 | 2.0000 ± 1.0000, n=3 | 3 |" in table
    assert "Not finished" not in table


def test_plots_show_what_has_finished(finished, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (drawn.append(self), save(self, *args, **kw)))
    results, out = finished
    assert [path.name for path in plot(results, out)] == ["curves.png", "parameters.png"]
    curves, parameters = drawn
    assert [axes.get_ylabel() for axes in curves.axes] == ["first loss", "first rank", "second loss"]
    line = next(line for line in curves.axes[0].lines if len(line.get_xdata()) == 4)
    assert list(line.get_xdata()) == [1, 2, 3, 4] and list(line.get_ydata()) == [1.5, 0.75, 0.5, 0.375]
    assert [text.get_text() for text in curves.legends[0].get_texts()] == ["low", "high"]
    assert [axes.get_ylabel() for axes in parameters.axes] == ["first eval_score", "second eval_score"]
    empty = Results(results.recipe, [])
    assert plot(empty, out / "low") == [] and not list((out / "low").glob("*.png"))


def test_without_matplotlib_there_is_a_table(make, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert compare(monkeypatch, make(), "--output_dir", tmp_path / "out", "--table_only") == 0
    assert "No plots: matplotlib is not installed" in capsys.readouterr().out


def test_parameters_are_counted_in_the_saved_model(make, monkeypatch, tmp_path):
    save_file({"a": torch.ones(3, 4), "b": torch.ones(5)}, tmp_path / "saved")
    (tmp_path / "saving.py").write_text(FAKE + f"(out / 'model.safetensors').symlink_to({str(tmp_path / 'saved')!r})\n")
    path = make(**with_stage(script="saving.py"), seeds=[1], variants={"low": {}})
    assert compare(monkeypatch, path, "--output_dir", tmp_path / "out") == 0
    assert record(tmp_path / "out", "low", 1, "first")["parameters"] == 17
    assert "| low | 17 |" in (tmp_path / "out" / "table.md").read_text()


# -- the recipes that ship ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RECIPES.iterdir()), ids=lambda path: path.stem)
def test_scripts_know_the_arguments_of_the_shipped_recipes(path, monkeypatch, capsys, tmp_path):
    given = dict.fromkeys(re.findall(r"^  (\w+):(?: *#.*)?$", variables_of(path), flags=re.MULTILINE), "x")
    recipe = read_recipe(path, SCRIPTS, given)
    runs = runs_of(recipe, tmp_path, recipe.seeds)
    for script in {stage.script for stage in recipe.stages.values()}:
        monkeypatch.setattr(sys, "argv", [script.name, "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(script), run_name="__main__")
        known = set(re.findall(r"--(\w+)", capsys.readouterr().out))
        parse = next(value for name, value in runpy.run_path(str(script)).items() if name.startswith("parse_"))
        for run in runs:
            if run.stage.script == script:
                assert run.arguments.keys() <= known, run
                monkeypatch.setattr(sys, "argv", run.command()[1:])
                parse(None)  # arguments that go together


def variables_of(path: Path) -> str:
    return re.search(r"^variables:(.*?)^\w", path.read_text(), flags=re.MULTILINE | re.DOTALL)[1]


def test_the_shipped_recipes_have_the_variants_that_they_promise():
    translation = read_recipe(RECIPES / "translation.yaml", SCRIPTS)
    warm_start = read_recipe(RECIPES / "warm_start.yaml", SCRIPTS)
    assert len(translation.variants) == 16 and len(warm_start.variants) == 7
    assert (
        translation.arguments("fd_ov-half-default", "translation", 1).items()
        >= {
            "frobenius_decay_kinds": ["ov"],
            "frobenius_decay": "0.01",
            "head_rank": "0.5",
            "init": "default",
        }.items()
    )
    assert translation.arguments("wd-full-si", "translation", 1)["frobenius_decay"] == "0"
    assert warm_start.arguments("quarter-after_half", "translation", 1)["factorize_at"] == "0.5"


@pytest.mark.slow
def test_the_tiny_recipe(tmp_path):
    """The real script, one seed, in 8 steps."""
    out = tmp_path / "out"
    options = ["--output_dir", str(out), "--seeds", "1", "--set", "steps=8"]
    command = [sys.executable, str(SCRIPTS / "compare.py"), str(RECIPES / "tiny.yaml"), *options]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    full, half = (record(out, variant, 1, "translation") for variant in ("full", "half"))
    assert full["parameters"] > half["parameters"] > 0
    assert [entry["step"] for entry in full["log_history"] if "eval_loss" in entry] == [2, 4, 6, 8]
    table = (out / "table.md").read_text()
    for variant, run in (("full", full), ("half", half)):
        assert f"| {variant} | {run['parameters']:,} | " in table and f"{run['metrics']['eval_loss']:.4f}, n=1" in table
    assert "Not finished yet: 2 of 4 runs" in table
