"""What the tests of the training scripts share: running them, stopping them, and what they answer to bad input."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import launcher

SCRIPTS = Path(__file__).parent.parent / "scripts"
_PROCESS = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def flags(**values) -> list[str]:
    """Command-line arguments; a list gives several values, None leaves the argument out."""
    return [
        str(word)
        for name, value in values.items()
        if value is not None
        for word in (f"--{name}", *(value if isinstance(value, list) else [value]))
    ]


def run_script(monkeypatch, name: str, *words, **values) -> None:
    """Run a script in this process, as from the command line."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, words), *flags(**values)])
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")


@contextmanager
def stopped_before(monkeypatch, step: int):
    """The training within stops where it would take `step`."""

    class Stopped(Exception):
        pass

    def stop(self, args, state, control, **kwargs):
        if state.global_step == step - 1:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("transformers.trainer_callback.DefaultFlowCallback.on_step_begin", stop)
        yield


def leave_half_a_checkpoint(out: Path, whole: int, step: int) -> None:
    """Put beside the checkpoint of step `whole` one as if killed while `step`'s was written."""
    half = shutil.copytree(out / f"checkpoint-{whole}", out / f"checkpoint-{step}")
    (half / "trainer_state.json").unlink()
    (half / "model.safetensors").write_bytes(b"")


def same_weights(one: Path, other: Path) -> bool:
    """Whether two output directories hold the same weights, bit for bit."""
    a, b = (load_file(path / "model.safetensors") for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refusal(monkeypatch, capsys, name: str, **values) -> str:
    """The one line in which a script refuses its arguments, without `error: `."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run_script(monkeypatch, name, **values)
    assert exit.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error.removeprefix("error: ")


def help_of(monkeypatch, capsys, name: str) -> str:
    with pytest.raises(SystemExit) as exit:
        run_script(monkeypatch, name, "--help")
    assert exit.value.code == 0
    return capsys.readouterr().out


def kill_and_repeat(name: str, out: Path, after: int, **values) -> dict:
    """Kill a script by SIGKILL once the checkpoint of step `after` is there, give the same command again.

    Returns:
        its results.
    """
    command = [sys.executable, SCRIPTS / name, *flags(**values, output_dir=out)]
    environment = os.environ | _PROCESS
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not (out / f"checkpoint-{after}" / "trainer_state.json").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "all_results.json").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "training resumes there" in done.stdout
    return json.loads((out / "all_results.json").read_text())


def run_on_two_processes(name: str, **values) -> str:
    """Run a script by torchrun, two processes on the CPU; returns what they printed."""
    command = [*launcher(2), SCRIPTS / name, *flags(**values)]
    done = subprocess.run(command, env=os.environ | _PROCESS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
