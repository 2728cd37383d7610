"""Runs of a recipe: one stage of one variant with one seed, where it is kept, and what its record says."""

import fcntl
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..running import InputError, complete_checkpoints, write_json
from .recipe import Recipe, Stage, Value, fill, placeholders

FINISHED, FAILED, INTERRUPTED, RUNNING = "finished", "failed", "interrupted", "running"


@dataclass(frozen=True, eq=False)  # a key of dicts by identity
class Run:
    """One call of a training script.

    Its record is the JSON file `VARIANT/seed-N/STAGE.json` of the comparison's directory, its output `STAGE.log`
    beside it, and the script's own output directory `STAGE/`.
    """

    root: Path  # the comparison's directory
    variant: str
    seed: int
    stage: Stage
    arguments: dict[str, Value]  # with placeholders of directories: earlier stages, the comparison
    after: dict[str, dict]  # earlier stages that this one builds on -> their script and arguments

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}, {self.stage.name}"

    @property
    def directory(self) -> Path:
        return self.root / self.variant / f"seed-{self.seed}" / self.stage.name

    @property
    def record_path(self) -> Path:
        return self.directory.with_name(f"{self.stage.name}.json")

    @property
    def log_path(self) -> Path:
        return self.directory.with_name(f"{self.stage.name}.log")

    @property
    def settings(self) -> dict:
        """What decides the outcome; `arguments` name earlier stages, not their paths, so that `root` may be moved."""
        return {"script": self.stage.script.name, "arguments": self.arguments, "after": self.after}

    def command(self) -> list[str]:
        """The command line, as words."""
        paths = {"comparison": str(self.root)} | {name: str(self.directory.with_name(name)) for name in self.after}
        words = [sys.executable, str(self.stage.script)]
        given = {"output_dir": str(self.directory), "seed": str(self.seed)}
        for name, value in (self.arguments | given).items():
            value = fill(value, paths)
            words += [f"--{name}", *(value if isinstance(value, list) else [value])]
        return words

    def record(self) -> dict | None:
        """What is known of this run; None before its first start."""
        try:
            return json.loads(self.record_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def write(self, record: dict) -> None:
        """Replace the record, as a whole or not at all."""
        write_json(self.record_path, record)

    def is_finished(self) -> bool:
        record = self.record()
        return record is not None and record["status"] == FINISHED

    def difference(self) -> str | None:
        """The first setting in which a stored run differs from this one; None if there is none, or nothing stored."""
        record = self.record()
        if record is None:
            return None
        before = record["after"] | {self.stage.name: record}
        now = self.after | {self.stage.name: self.settings}
        for name in now:  # an earlier stage that is not among them any more was named by an argument
            if name not in before:
                return f"it did not build on {name}"
            if before[name]["script"] != now[name]["script"]:
                return f"{name} ran {before[name]['script']}, not {now[name]['script']}"
            old, new = before[name]["arguments"], now[name]["arguments"]
            for argument in dict.fromkeys((*new, *old)):
                if old.get(argument) != new.get(argument):
                    return f"{name} ran {_shown(argument, old)}, now {_shown(argument, new)}"
        return None

    def drop_checkpoints(self) -> None:
        """Delete what the script would resume from; its model and results stay."""
        for path in complete_checkpoints(self.directory):
            shutil.rmtree(path)

    @contextmanager
    def locked_log(self) -> Iterator[BinaryIO]:
        """The log, open for appending and locked.

        A script that writes to it inherits the lock, which is held as long as the script lives: even without us.

        Raises:
            InputError: the same run is going on in another process.
        """
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log_path, "ab") as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"{self} is running in another process ({self.log_path}). Wait for it, or end it."
                ) from error
            yield log

    def discard(self) -> None:
        """Delete all that is stored of this run. Raises `InputError` if it is going on in another process."""
        with self.locked_log():
            shutil.rmtree(self.directory, ignore_errors=True)
            for path in (self.log_path, self.record_path):  # the record last: until then it stays a known run
                path.unlink(missing_ok=True)


def runs_of(recipe: Recipe, root: str | Path, seeds: Iterable[int]) -> list[Run]:
    """All runs, one seed after the other, so that all variants have a first result early."""
    runs = []
    for seed in seeds:
        for variant in recipe.variants:
            settings: dict[str, dict] = {}
            needs: dict[str, list[str]] = {}
            for name, stage in recipe.stages.items():
                arguments = recipe.arguments(variant, name, seed)
                used = [earlier for earlier in placeholders(arguments) if earlier in settings]
                needs[name] = list(dict.fromkeys(n for earlier in used for n in (*needs[earlier], earlier)))
                settings[name] = {"script": stage.script.name, "arguments": arguments}
                after = {earlier: settings[earlier] for earlier in needs[name]}
                runs.append(Run(Path(root), variant, seed, stage, arguments, after))
    return runs


def _shown(argument: str, arguments: dict[str, Value]) -> str:
    if argument not in arguments:
        return f"without --{argument}"
    value = arguments[argument]
    return f"--{argument} {' '.join(value) if isinstance(value, list) else value}"
