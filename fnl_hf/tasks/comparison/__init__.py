"""What `scripts/compare.py` is made of: recipes, their runs and records, the table and the plots."""

from .plots import plot
from .recipe import Recipe, Stage, read_recipe
from .results import Results
from .runner import execute
from .runs import FAILED, FINISHED, INTERRUPTED, RUNNING, Run, runs_of
from .table import markdown

__all__ = [
    "FAILED",
    "FINISHED",
    "INTERRUPTED",
    "RUNNING",
    "Recipe",
    "Results",
    "Run",
    "Stage",
    "execute",
    "markdown",
    "plot",
    "read_recipe",
    "runs_of",
]
