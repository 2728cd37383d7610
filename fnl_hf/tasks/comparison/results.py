"""What the records of a comparison say: values of a metric, curves, sizes, and which runs are missing."""

from collections import defaultdict
from pathlib import Path

from .recipe import Recipe, Value
from .runs import FAILED, FINISHED, Run


class Results:
    """The records of `runs` as they are on disk now, by variant and stage of `recipe`."""

    def __init__(self, recipe: Recipe, runs: list[Run]):
        self.recipe = recipe
        self.records = {run: run.record() for run in runs}

    def started(self) -> list[str]:
        """Variants of which there is any record."""
        found = {run.variant for run, record in self.records.items() if record is not None}
        return [variant for variant in self.recipe.variants if variant in found]

    def finished(self, variant: str, stage: str) -> list[dict]:
        """Records of the runs that finished, a seed each."""
        return [record for run, record in self.records.items() if _is(run, variant, stage) and _ended(record, FINISHED)]

    def values(self, variant: str, stage: str, metric: str) -> list[float]:
        """The metric at the end of every run that finished and has it: a recipe may name others than before."""
        return [record["metrics"][metric] for record in self.finished(variant, stage) if metric in record["metrics"]]

    def failed(self, variant: str | None = None, stage: str | None = None) -> dict[Run, dict]:
        """Runs that failed, with their records."""
        return {
            run: record for run, record in self.records.items() if _is(run, variant, stage) and _ended(record, FAILED)
        }

    def blocked(self) -> list[Run]:
        """Runs that could not be started, for a failed one that they build on."""
        failed = {(run.variant, run.seed, run.stage.name) for run in self.failed()}
        return [run for run in self._open() if any((run.variant, run.seed, name) in failed for name in run.after)]

    def waiting(self) -> list[Run]:
        """Runs that have not ended, and could."""
        blocked = set(self.blocked())
        return [run for run in self._open() if run not in blocked]

    def parameters(self, variant: str) -> int | None:
        """Numbers in the saved model of the first stage, the mean over seeds; None before it finished."""
        records = self.finished(variant, next(iter(self.recipe.stages)))
        numbers = [record["parameters"] for record in records if record["parameters"] is not None]
        return round(sum(numbers) / len(numbers)) if numbers else None

    def seconds(self, variant: str) -> list[float]:
        """Wall time of all stages together, for every seed that finished them."""
        totals = defaultdict(list)
        for stage in self.recipe.stages:
            for record in self.finished(variant, stage):
                totals[record["seed"]].append(record["wall_seconds"])
        return [sum(times) for times in totals.values() if len(times) == len(self.recipe.stages)]

    def curve(self, variant: str, stage: str, key: str) -> dict[int, list[float]]:
        """step -> what the finished runs logged there under `key`, for the steps that all of them have."""
        logs = [
            {entry["step"]: entry[key] for entry in record["log_history"] if key in entry}
            for record in self.finished(variant, stage)
        ]
        common = set.intersection(*map(set, logs)) if logs else set()
        return {step: [log[step] for log in logs] for step in sorted(common)}

    def summary(self) -> dict:
        """What has finished, small enough to keep: settings, metrics and curves by variant, stage and seed.

        No path of this machine is in it: variables and settings that are paths are cut to their last part.
        """
        variants = {}
        for variant in self.started():
            stages = {}
            for name, stage in self.recipe.stages.items():
                records = self.finished(variant, name)
                if not records:
                    continue
                settings = self.recipe.variants[variant].get(name, {})
                stages[name] = {
                    "settings": _without_paths({key: records[0]["arguments"].get(key) for key in settings}),
                    "metrics": {
                        metric: {str(record["seed"]): record["metrics"].get(metric) for record in records}
                        for metric in stage.metrics
                    },
                    "curve": {key: curve for key in stage.curves if (curve := self.curve(variant, name, key))},
                }
            variants[variant] = {"parameters": self.parameters(variant), "seconds": self.seconds(variant)} | stages
        return {
            "title": self.recipe.title,
            "recipe": self.recipe.path.name,
            "variables": _without_paths(self.recipe.variables),
            "variants": variants,
            "failed": [str(run) for run in self.failed()],
        }

    def _open(self) -> list[Run]:
        return [run for run, record in self.records.items() if not _ended(record, FINISHED, FAILED)]


def _without_paths(values: dict[str, Value]) -> dict[str, Value]:
    def cut(value: Value) -> Value:
        if isinstance(value, list):
            return [Path(word).name for word in value]
        return value and Path(value).name

    return {name: cut(value) for name, value in values.items()}


def _is(run: Run, variant: str | None, stage: str | None) -> bool:
    return variant in (None, run.variant) and stage in (None, run.stage.name)


def _ended(record: dict | None, *how: str) -> bool:
    return record is not None and record["status"] in how
