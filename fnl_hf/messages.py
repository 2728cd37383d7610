"""What the library says once to its user: on the main process only."""

import os


def say(message: str) -> None:
    """Print a line, once per job and not once per process."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)
