"""What a script leaves behind: metrics, files, and what the run took."""

import json
import lzma
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .errors import InputError, one_line


def resources_used(started: float) -> dict[str, float]:
    """Seconds since `started`, and the most memory that this process (and its accelerator) held."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    used = {
        "run_seconds": round(time.monotonic() - started, 2),
        "run_peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3),
    }
    if torch.cuda.is_available():
        used["run_peak_gpu_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return used


def write_json(path: Path, content: Any) -> None:
    """Write a file as a whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file as a whole or not at all, compressed as well as can be if it is an `.xz`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, content = path.with_suffix(".partial"), text.encode("utf-8")
    partial.write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME) if path.suffix == ".xz" else content)
    os.replace(partial, path)


def check_writable(directory: Path) -> None:
    """Raises `InputError` if no files can be written in a directory that may not be there yet."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"--output_dir {directory}: {existing} is a file. Give a directory.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {directory}: no permission to write in {existing}. Give another directory.")


_OF_FILES = ("PytorchStreamWriter", "inline_container", "unexpected pos", "(os error")


@contextmanager
def disk_errors() -> Iterator[None]:
    """Weights that cannot be written, as on a full disk, are an `InputError`."""
    try:
        yield
    except Exception as error:
        # torch tells of its files with a RuntimeError, tokenizers with a plain Exception
        if not isinstance(error, (OSError, SafetensorError)) and not any(word in str(error) for word in _OF_FILES):
            raise
        raise InputError(
            f"a file cannot be read or written ({one_line(error)}). Make room or give access; the same command goes on "
            "from the last checkpoint."
        ) from error
