"""Two gloo processes on the CPU against one: the same update, with unequal numbers of labels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

JOB = """
import sys, torch
sys.path.insert(0, {root!r})
import fnl_hf
from tests.test_trainer import examples, make_model
from transformers import default_data_collator

model_type, optim, mode, out = sys.argv[1:5]
batch, accumulate, at = int(sys.argv[5]), int(sys.argv[6]), sys.argv[7]
config = fnl_hf.FNLConfig(head_rank=1.0 if at == "start" else 0.5)
model = make_model(model_type).double()
if at == "start":
    fnl_hf.factorize(model, config)
optimizer = {{"fnl_optim" if optim == "spectron" else "optim": optim}}
args = fnl_hf.FNLTrainingArguments(
    output_dir=out + ".run", per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, max_steps=3,
    learning_rate=0.05, **optimizer, lr_scheduler_type="constant", report_to="none", use_cpu=True, save_strategy="no",
    disable_tqdm=True, frobenius_decay=0.05, frobenius_decay_mode=mode, max_grad_norm=1.0, weight_decay=0.01,
    train_sampling_strategy="sequential", factorize_at=None if at == "start" else at,
)
rows = examples(model_type)
trainer = fnl_hf.FNLTrainer(
    model=model, args=args, train_dataset=rows * 3, data_collator=default_data_collator,
    fnl_config=None if at == "start" else config,
)
trainer.train()
if trainer.is_world_process_zero():
    torch.save({{name: parameter.detach() for name, parameter in model.named_parameters()}}, out)
trainer.accelerator.end_training()
"""


def run(tmp_path, name, processes, *arguments):
    script = tmp_path / "job.py"
    script.write_text(JOB.format(root=str(ROOT)))
    out = tmp_path / f"{name}.pt"
    launcher = [sys.executable, str(script)]
    if processes > 1:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
            str(script),
        ]
    model_type, optim, mode, at, batch, accumulate = map(str, arguments)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, model_type, optim, mode, str(out), batch, accumulate, at]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("fnl_hf: what is decayed") == (1 if at == "start" else 2)  # not once per process
    return torch.load(out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "optim", "mode", "at"),
    [
        ("marian", "sgd", "coupled", "start"),
        ("gpt2", "sgd", "decoupled", "start"),
        ("bert", "adamw_torch", "decoupled", "start"),
        ("bert", "adamw_torch", "decoupled", "1"),  # all processes switch together
        ("bert", "spectron", "decoupled", "1"),
    ],
)
def test_two_processes_make_the_update_of_one(model_type, optim, mode, at, tmp_path):
    one = run(tmp_path, "one", 1, model_type, optim, mode, at, 8, 1)
    two = run(tmp_path, "two", 2, model_type, optim, mode, at, 2, 2)
    assert one.keys() == two.keys()
    size = torch.cat([value.flatten() for value in one.values()]).norm()
    difference = torch.cat([(one[name] - two[name]).flatten() for name in one]).norm()
    assert difference < 1e-7 * size
