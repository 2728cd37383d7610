"""The plots of a comparison: curves against steps, and metrics against parameters."""

from pathlib import Path

import numpy as np

from .results import Results

_PANEL = (6.0, 4.5)  # inches


def plot(results: Results, folder: str | Path) -> list[Path]:
    """Draw what has finished: `curves.png`, a panel a curve, and `parameters.png`, a panel a metric.

    Lines and points are means over seeds, bands and bars go from the lowest to the highest.

    Returns:
        the files; none where nothing has finished.

    Raises:
        ImportError: matplotlib is not installed (`pip install 'fnl-hf[tasks]'`).
    """
    from matplotlib import colormaps  # an optional dependency
    from matplotlib.figure import Figure

    recipe, folder = results.recipe, Path(folder)
    variants = results.started()
    palette = colormaps["tab10" if len(variants) <= 10 else "tab20"].colors
    colors = {variant: palette[i % len(palette)] for i, variant in enumerate(variants)}

    def draw(name: str, panels: list[tuple], draw_variant) -> Path | None:
        figure = Figure(figsize=(_PANEL[0] * len(panels), _PANEL[1]), layout="constrained")
        drawn = set()
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            drawn |= {variant for variant in variants if draw_variant(axes, variant, *panel)}
            axes.grid(alpha=0.3)
        if not drawn:
            return None
        lines = [figure.axes[0].plot([], [], color=colors[v], label=v)[0] for v in variants if v in drawn]
        figure.legend(handles=lines, loc="outside right upper", fontsize="small")
        figure.suptitle(recipe.title)
        figure.savefig(folder / name, dpi=120)
        return folder / name

    def curve(axes, variant, stage, key):
        axes.set(xlabel="step", ylabel=f"{stage} {key}")
        points = results.curve(variant, stage, key)
        if not points:
            return False
        steps, values = list(points), points.values()
        axes.fill_between(steps, [*map(min, values)], [*map(max, values)], color=colors[variant], alpha=0.2, lw=0)
        axes.plot(steps, [*map(np.mean, values)], color=colors[variant], marker="." if len(steps) < 3 else None)
        return True

    def against_parameters(axes, variant, stage, metric):
        axes.set(xlabel="parameters", ylabel=f"{stage} {metric}")
        values, parameters = results.values(variant, stage, metric), results.parameters(variant)
        if not values or not parameters:
            return False
        middle = np.mean(values)
        bars = [[middle - min(values)], [max(values) - middle]]
        axes.errorbar([parameters], [middle], yerr=bars, fmt="o", capsize=3, color=colors[variant])
        return True

    stages = recipe.stages.values()
    files = (
        draw("curves.png", [(stage.name, key) for stage in stages for key in stage.curves], curve),
        draw(
            "parameters.png", [(stage.name, metric) for stage in stages for metric in stage.metrics], against_parameters
        ),
    )
    return [file for file in files if file]
