"""Jobs in processes of their own: one, or two by torchrun with gloo on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

# What a job has to show is written by now. A thread of gloo that still holds tensors may abort an interpreter that
# shuts down, and a process that leaves early the one that still listens.
END = """
import os, sys
import torch.distributed
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


def launcher(processes: int) -> list[str]:
    """The words before a script that so many processes run."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(torchrun if processes > 1 else [])]


def run_job(folder: Path, job: str, processes: int, *arguments) -> subprocess.CompletedProcess:
    """Run the source text `job`, which imports what it needs, with these arguments; fail as it fails."""
    script = folder / "job.py"
    script.write_text(job + END)
    command = [*launcher(processes), str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done
