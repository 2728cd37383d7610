"""One run in a directory: a lock that ends with its process, in whatever way that ends."""

from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"
_held: list[FileLock] = []  # by this process: one, for as long as its run lasts


def is_locked_by_runs(directory: Path) -> bool:
    """Whether there is or was a run in a directory that locks it."""
    return (directory / LOCK).exists()


def lock(directory: Path) -> bool:
    """Keep a directory, which is made if there is none, for this process until `unlock`.

    Returns:
        False if another process keeps it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    own = FileLock(directory / LOCK)
    if any(each.lock_file == own.lock_file for each in _held):
        return True
    try:
        own.acquire(timeout=0)
    except Timeout:
        return False
    _held.append(own)
    return True


def unlock() -> None:
    """Give up what `lock` holds."""
    while _held:
        _held.pop().release(force=True)
