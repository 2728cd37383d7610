"""What a script says to its user."""

import os


def say(message: str) -> None:
    """Print a line, once per job and not once per process."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)
