"""Compare variants of a training run: the same task and seeds for all of them, from a recipe.

    python scripts/compare.py scripts/recipes/tiny.yaml                  # a minute: see how it works
    python scripts/compare.py scripts/recipes/translation.yaml --dry_run
    python scripts/compare.py scripts/recipes/warm_start.yaml --only full 'half*' --seeds 1 2 3

Every run leaves one JSON file (arguments, exit status, seconds, metrics, log history) and its output below
--output_dir; from the JSON files come table.md, which is also printed, summary.json (metrics and curves of all runs),
and, where matplotlib is installed, curves.png and parameters.png. The same command

- goes on where it was stopped: finished runs are kept, others go on from their last checkpoint;
- starts failed runs again. A failed run does not stop the others; it is in the table with its error;
- with --table_only, makes table and plots again from what there is.

Where a stored run had other arguments than the recipe gives it now, nothing is run: a table must not mix the two.
--rerun deletes such runs and does them again. The exit status is 0 if all went well, 1 if a run failed, 2 for an error
in the recipe.

A recipe is a YAML or JSON file:

    title: Heads of half their rank
    seeds: [1, 2]
    variables: {steps: 200, data: }       # defaults of --set steps=...; without one it must be given
    shared: {bf16: true}                  # arguments of all stages
    stages:                               # in their order
      pretrain:
        script: run_mlm.py                # relative to the recipe, or in scripts/
        arguments: {train_file: "{data}/text.txt", max_steps: "{steps}"}
        metrics: [eval_loss]              # of all_results.json: columns of the table
        curve: loss                       # of the log history: the plot against steps; several as a list
      squad:
        script: run_qa.py
        arguments: {model_name_or_path: "{pretrain}"}   # the directory of an earlier stage
        metrics: [eval_f1]
    variants:                             # name -> stage -> arguments, which come before those above
      full: {}
      half: {pretrain: {head_rank: 0.5}}
    axes:                                 # and every combination of one choice each, named si-lamb, si-flambe, ...
      init: {si: {pretrain: {init: spectral}}, default: {pretrain: {init: default}}}
      optimizer: {lamb: {pretrain: {frobenius_decay: 0}}, flambe: {pretrain: {frobenius_decay: 0.01}}}

Placeholders are the variables, earlier stages, {seed}, and {comparison}, which is --output_dir. Every command gets an
--output_dir of its own and --seed.
"""

import argparse
import fnmatch
import shlex
import signal
import sys
from pathlib import Path

from fnl_hf.tasks.comparison import FAILED, Recipe, Results, Run, execute, markdown, plot, read_recipe, runs_of
from fnl_hf.tasks.running import InputError, write_json, write_text


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="YAML or JSON file")
    parser.add_argument("--output_dir", type=Path, help="where all of it goes (runs/compare/NAME_OF_THE_RECIPE)")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="values of the recipe's variables")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="run these only; patterns such as 'flambe*' too")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="run these instead of the recipe's")
    parser.add_argument("--dry_run", action="store_true", help="print the commands that would be run")
    parser.add_argument("--table_only", action="store_true", help="run nothing; table and plots of what there is")
    parser.add_argument("--rerun", action="store_true", help="delete and repeat runs whose arguments have changed")
    parser.add_argument("--drop_checkpoints", action="store_true", help="delete those of runs that finish")
    options = parser.parse_args()
    if wrong := [text for text in options.set if "=" not in text]:
        raise InputError(f"--set {wrong[0]}: expected NAME=VALUE.")
    options.set = dict(text.split("=", 1) for text in options.set)
    options.output_dir = options.output_dir or Path("runs/compare") / options.recipe.stem
    return options


def select(runs: list[Run], recipe: Recipe, options: argparse.Namespace) -> list[Run]:
    """The runs that --only and --seeds ask for."""
    for pattern in options.only or ():
        if not fnmatch.filter(recipe.variants, pattern):
            raise InputError(f"--only {pattern}: no such variant in {recipe.path}, only {', '.join(recipe.variants)}.")
    return [
        run
        for run in runs
        if run.seed in (options.seeds or recipe.seeds)
        and (not options.only or any(fnmatch.fnmatchcase(run.variant, pattern) for pattern in options.only))
    ]


def changed_runs(runs: list[Run], selected: list[Run], rerun: bool) -> dict[Run, str]:
    """Stored runs with other arguments than now, and what differs. Raises `InputError` unless --rerun covers them."""
    changed = {run: difference for run in runs if (difference := run.difference())}
    if kept := [run for run in changed if not rerun or run not in selected]:
        raise InputError(
            f"{kept[0].record_path}: the arguments have changed ({changed[kept[0]]}; {len(kept)} such runs). Give "
            "--rerun to delete and repeat them, the old arguments, or another --output_dir."
        )
    return changed


def run_all(runs: list[Run], drop_checkpoints: bool) -> int:
    """Run what is not finished; returns how many failed or could not be started."""
    finished, failures = set(), 0  # finished: directories
    for i, run in enumerate(runs, start=1):
        if run.is_finished():
            finished.add(run.directory)
            continue
        label = f"[{i}/{len(runs)}] {run}"
        missing = [name for name in run.after if run.directory.with_name(name) not in finished]
        if missing:
            print(f"{label}: not run, {missing[0]} has not finished", flush=True)
            failures += 1
            continue
        print(f"{label}: {run.log_path}", flush=True)
        record = execute(run)
        if record["status"] == FAILED:
            print(f"    failed after {record['wall_seconds']:.0f} s: {record['error']}", flush=True)
            failures += 1
            continue
        finished.add(run.directory)
        if drop_checkpoints:
            run.drop_checkpoints()
        scores = ", ".join(f"{metric} {record['metrics'][metric]:.4g}" for metric in run.stage.metrics)
        print(f"    {scores} after {record['wall_seconds']:.0f} s", flush=True)
    return failures


def print_commands(runs: list[Run], changed: dict[Run, str]) -> None:
    for run in runs:
        done = run.is_finished() and run not in changed
        print(f"# {run}" + (": finished" if done else f"\n{shlex.join(run.command())}"))


def report(results: Results, output_dir: Path) -> None:
    """Write and print the table; write the summary; draw the plots."""
    table = markdown(results)
    write_text(output_dir / "table.md", table)
    write_json(output_dir / "summary.json", results.summary())
    print(f"\n{table}\n{output_dir / 'table.md'}\n{output_dir / 'summary.json'}")
    try:
        print(*plot(results, output_dir), sep="\n")
    except ImportError:
        print("No plots: matplotlib is not installed (pip install 'fnl-hf[tasks]').")


def main() -> int:
    options = parse_options()
    recipe = read_recipe(options.recipe, Path(__file__).parent, options.set)
    seeds = dict.fromkeys((*recipe.seeds, *(options.seeds or ())))
    runs = runs_of(recipe, options.output_dir, seeds)
    selected = select(runs, recipe, options)
    changed = changed_runs(runs, selected, options.rerun and not options.table_only)
    if options.dry_run:
        print_commands(selected, changed)
        return 0
    for run, difference in changed.items():
        print(f"{run}: deleted, for {difference}")
        run.discard()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    failures = 0 if options.table_only else run_all(selected, options.drop_checkpoints)
    results = Results(recipe, runs)
    report(results, options.output_dir)
    return int(bool(failures or results.failed()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # an exit that stops the script it runs
    try:
        sys.exit(main())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on here.", file=sys.stderr)
        sys.exit(130)
