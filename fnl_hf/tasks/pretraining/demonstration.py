"""The novels that ship with the package, and sentences that are not in them."""

from importlib import resources
from pathlib import Path

SENTENCES = (
    "The old captain looked at me and [MASK] nothing.",
    "She put her hand upon [MASK] shoulder.",
    "It was one [MASK] the finest days of that summer.",
    "They went [MASK] the garden together after dinner.",
    "I do not [MASK] what you mean.",
)


def shipped_file(split: str) -> Path:
    """The text of "train" or "validation": two novels, one paragraph a line, a blank line between the novels."""
    return Path(str(resources.files(__package__) / "data" / f"novels.{split}.txt.xz"))
