"""Starting a run, waiting for it, and writing down what came of it."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from safetensors import safe_open

from ..running import complete_checkpoints
from .runs import FAILED, FINISHED, INTERRUPTED, RUNNING, Run

_ERROR = re.compile(r"error:|[\w.]*(Error|Exception|Interrupt)\b")
_TAIL = 65536  # bytes of a log in which the error is looked for
_PATIENCE = 60  # seconds that a script gets to end after SIGTERM


def execute(run: Run) -> dict:
    """Start the script, or start it again; it goes on from its own checkpoints.

    The record is written before and after, so that a comparison that is killed knows what it had started. A directory
    without a complete checkpoint is emptied first: nothing in it is worth going on from, and the scripts refuse to
    mix a new run with what an old one left.

    Returns:
        the record. Its "wall_seconds" are the sum over "attempts"; of one that was killed together with the
        comparison, the time until the last line of its log.

    Raises:
        InputError: the same run is going on in another process.
    """
    with run.locked_log() as log:
        before = run.record() or {"status": None, "attempts": 0, "wall_seconds": 0.0}
        spent = before["wall_seconds"]
        if before["status"] == RUNNING:
            spent += max(0.0, run.log_path.stat().st_mtime - before["started"])
        if before["status"] and run.directory.exists() and not complete_checkpoints(run.directory):
            shutil.rmtree(run.directory)
        record = {
            "variant": run.variant,
            "seed": run.seed,
            "stage": run.stage.name,
            **run.settings,
            "command": run.command(),
            "status": RUNNING,
            "exit_status": None,
            "error": None,
            "attempts": before["attempts"] + 1,
            "started": time.time(),  # seconds since the epoch
            "wall_seconds": round(spent, 2),
        }
        run.write(record)
        offset, started = log.tell(), time.monotonic()
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # else the last line of the log need not be the error
        process = subprocess.Popen(
            record["command"], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            record["exit_status"] = process.wait()
            record |= _outcome(run, process.returncode, offset)
        except BaseException:
            _stop(process)
            record |= {"status": INTERRUPTED, "exit_status": process.returncode}
            raise
        finally:
            record["wall_seconds"] = round(spent + time.monotonic() - started, 2)
            run.write(record)
    return record


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _outcome(run: Run, exit_status: int, offset: int) -> dict:
    """Status, error, and results of a run that ended."""
    if exit_status < 0:
        name = signal.Signals(-exit_status).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return {"status": FAILED, "error": f"killed by {name}{hint}; {_last_error(run.log_path, offset)}"}
    if exit_status > 0:
        return {"status": FAILED, "error": _last_error(run.log_path, offset)}
    try:
        metrics = json.loads((run.directory / "all_results.json").read_text(encoding="utf-8"))
        numbers = {name for name, value in metrics.items() if isinstance(value, (int, float))}
        missing = [name for name in run.stage.metrics if name not in numbers]
        problem = f"all_results.json holds no number {missing[0]}" if missing else None
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        metrics, problem = {}, f"all_results.json cannot be read ({error})"
    return {
        "status": FAILED if problem else FINISHED,
        "error": problem,
        "parameters": _stored_numbers(run.directory),
        "metrics": metrics,
        "log_history": _log_history(run.directory),
    }


def _last_error(log: Path, offset: int) -> str:
    """The last line after `offset` that looks like an error's message, or the last line at all."""
    with open(log, "rb") as file:
        file.seek(max(offset, log.stat().st_size - _TAIL))
        text = file.read().decode("utf-8", errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    return next(filter(_ERROR.match, reversed(lines)), lines[-1] if lines else "no output")


def _stored_numbers(directory: Path) -> int | None:
    """Elements of all tensors in the saved model; those that are tied count once."""
    count = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return count or None


def _log_history(directory: Path) -> list[dict]:
    """What the Trainer logged: of the end of the run if it saved that, else until its last checkpoint."""
    for folder in (directory, *reversed(complete_checkpoints(directory))):
        path = folder / "trainer_state.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))["log_history"]
    return []
