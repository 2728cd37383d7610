"""Two gloo processes on the CPU against one: the same update, with unequal numbers of labels."""

import json

import pytest
import torch

from tests.processes import run_job

CASES = {
    "coupled": ("marian", "sgd", "coupled", "start"),
    "decoupled": ("gpt2", "sgd", "decoupled", "start"),
    "adamw": ("bert", "adamw_torch", "decoupled", "start"),
    "adamw-switch": ("bert", "adamw_torch", "decoupled", "1"),  # all processes switch together
    "spectron-switch": ("bert", "spectron", "decoupled", "1"),
}

JOB = """
import json, sys, torch
import fnl_hf
from tests.test_trainer import examples, make_model
from transformers import default_data_collator

batch, accumulate, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
for case, (model_type, optim, mode, at) in json.loads(sys.argv[4]).items():
    config = fnl_hf.FNLConfig(head_rank=1.0 if at == "start" else 0.5)
    model = make_model(model_type).double()
    if at == "start":
        fnl_hf.factorize(model, config)
    optimizer = {"fnl_optim" if optim == "spectron" else "optim": optim}
    args = fnl_hf.FNLTrainingArguments(
        output_dir=f"{out}/{case}", per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        max_steps=3, learning_rate=0.05, **optimizer, lr_scheduler_type="constant", report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, frobenius_decay=0.05, frobenius_decay_mode=mode, max_grad_norm=1.0,
        weight_decay=0.01, train_sampling_strategy="sequential", factorize_at=None if at == "start" else at,
    )
    trainer = fnl_hf.FNLTrainer(
        model=model, args=args, train_dataset=examples(model_type) * 3, data_collator=default_data_collator,
        fnl_config=None if at == "start" else config,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save({n: parameter.detach() for n, parameter in model.named_parameters()}, f"{out}/{case}.pt")
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Processes -> the directory where all cases, trained by so many of them, left their weights."""
    root = tmp_path_factory.mktemp("distributed")
    for processes, batch, accumulate in ((1, 8, 1), (2, 2, 2)):
        (root / str(processes)).mkdir()
        done = run_job(root, JOB, processes, batch, accumulate, root / str(processes), json.dumps(CASES))
        switches = sum(at != "start" for *_, at in CASES.values())
        assert done.stderr.count("fnl_hf: what is decayed") == len(CASES) + switches  # not once per process
    return {processes: root / str(processes) for processes in (1, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_the_update_of_one(trained, case):
    one, two = (torch.load(trained[processes] / f"{case}.pt") for processes in (1, 2))
    assert one.keys() == two.keys()
    size = torch.cat([value.flatten() for value in one.values()]).norm()
    difference = torch.cat([(one[name] - two[name]).flatten() for name in one]).norm()
    assert difference < 1e-7 * size
