"""The table of a comparison, in Markdown: means and spreads, and every run that failed."""

import numpy as np

from .results import Results

CAPTION = (
    "Mean ± sample standard deviation over n seeds; for n=2 the mean and [lowest..highest]. Parameters: numbers in the "
    "saved model of the first stage, the mean over seeds. Seconds: wall time of all stages, the mean over the seeds "
    "that finished them all."
)
_NONE = "–"


def markdown(results: Results) -> str:
    """A document with title, table and caption, and what is missing. A row is a variant that was started."""
    recipe = results.recipe
    columns = [(stage.name, metric) for stage in recipe.stages.values() for metric in stage.metrics]
    several = len(recipe.stages) > 1
    header = ["variant", "parameters"]
    header += [f"{stage} {metric}" if several else metric for stage, metric in columns]
    rows = [[*header, "seconds"], ["---"] * (len(header) + 1)]
    for variant in results.started():
        parameters, seconds = results.parameters(variant), results.seconds(variant)
        rows.append(
            [
                variant,
                f"{parameters:,}" if parameters else _NONE,
                *(_cell(results, variant, stage, metric) for stage, metric in columns),
                f"{np.mean(seconds):.0f}" if seconds else _NONE,
            ]
        )
    table = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"# {recipe.title}", "", *table, "", CAPTION, *_missing(results)]) + "\n"


def with_spread(values: list[float]) -> str:
    """Mean, spread and number of values: two decimals from 10 on, else four."""
    if not values:
        return _NONE
    digits = 2 if max(map(abs, values)) >= 10 else 4
    text = f"{np.mean(values):.{digits}f}"
    if len(values) == 2:
        text += f" [{min(values):.{digits}f}..{max(values):.{digits}f}]"
    elif len(values) > 2:
        text += f" ± {np.std(values, ddof=1):.{digits}f}"
    return f"{text}, n={len(values)}"


def _cell(results: Results, variant: str, stage: str, metric: str) -> str:
    failed = len(results.failed(variant, stage))
    return with_spread(results.values(variant, stage, metric)) + (f", {failed} failed" if failed else "")


def _missing(results: Results) -> list[str]:
    lines = []
    if failed := results.failed():
        lines += ["", "Failed:", ""]
        lines += [
            f"- {run}, exit status {record['exit_status']}: {record['error']} ({run.log_path})"
            for run, record in failed.items()
        ]
    if blocked := results.blocked():
        lines += ["", f"Not run, for what failed before: {'; '.join(map(str, blocked))}."]
    if waiting := results.waiting():
        lines += ["", f"Not finished yet: {len(waiting)} of {len(results.records)} runs, the first is {waiting[0]}."]
    return lines
