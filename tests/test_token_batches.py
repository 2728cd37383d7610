"""Batches by tokens: their bound, padding and order, the rate in the log, and two processes against one."""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from transformers import DataCollatorForSeq2Seq

from fnl_hf.tasks.running import InputError
from fnl_hf.tasks.translation import (
    DataArguments,
    ParallelText,
    TokenBatchSampler,
    TranslationArguments,
    TranslationTrainer,
    new_marian,
    prepare_pairs,
    prepare_vocabulary,
    steps_of_epochs,
)
from fnl_hf.tasks.translation.corpus import shipped_text
from tests.processes import run_job

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
SMALL = {"d_model": 16, "layers": 1, "heads": 2, "ffn_dim": 32, "dropout": 0.0, "max_length": 40}


def lengths_of(count: int) -> np.ndarray:
    rng = random.Random(0)
    return np.array([(rng.randint(2, 30), rng.randint(2, 30)) for _ in range(count)])


def padded(lengths: np.ndarray, batch: list[int]) -> int:
    return len(batch) * int(lengths[batch].max(0).sum())


def padding(lengths: np.ndarray, sampler: TokenBatchSampler) -> float:
    """The share of padding in all batches."""
    return 1 - lengths.sum() / sum(padded(lengths, batch) for batch in sampler)


# -- the plan -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [60, 200, 4096])
def test_batches_keep_to_their_tokens_and_cover_everything_once(max_tokens):
    lengths = lengths_of(1000)
    sampler = TokenBatchSampler(lengths, max_tokens, seed=3)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert sorted(i for batch in batches for i in batch) == list(range(1000))
        assert all(padded(lengths, batch) <= max_tokens for batch in batches)
        odd = [batch for batch in batches if len(batch) > 8 and len(batch) % 8]
        assert len(odd) <= 1  # the last of the plan
    assert max(map(len, batches)) >= 8 or max_tokens == 60


def test_a_batch_is_as_large_as_its_bound_and_eights_allow():
    sampler = TokenBatchSampler([(5, 5)] * 50, max_tokens=239, seed=0)  # room for 23
    assert sorted(map(len, sampler)) == [16, 16, 18]  # the last is whole
    sampler = TokenBatchSampler([(5, 5)] * 20, max_tokens=70, seed=0)  # room for 7
    assert sorted(map(len, sampler)) == [6, 7, 7]


def test_batches_depend_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = TokenBatchSampler(lengths_of(3000), max_tokens=400, seed=seed)
        sampler.set_epoch(epoch)
        torch.rand(1), random.random(), np.random.rand()
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)
    assert {frozenset(batch) for batch in order(1, 2)} != {frozenset(batch) for batch in order(1, 3)}


def test_batches_are_dealt_to_processes_and_skipped_on_resume():
    sampler = TokenBatchSampler(lengths_of(300), max_tokens=400, seed=1)
    batches = list(sampler)
    shards = [BatchSamplerShard(sampler, num_processes=2, process_index=rank) for rank in range(2)]
    dealt = [list(shard) for shard in shards]
    assert len(dealt[0]) == len(dealt[1]) == len(shards[0]) == -(-len(batches) // 2)
    for step in range(len(batches) // 2):
        assert [dealt[0][step], dealt[1][step]] == batches[2 * step : 2 * step + 2]
    assert list(SkipBatchSampler(shards[1], skip_batches=3)) == dealt[1][3:]


def test_a_pair_above_the_batch_size_is_refused():
    with pytest.raises(InputError, match="34 tokens, and a batch at most 33. Raise --max_tokens"):
        TokenBatchSampler([(3, 31)], max_tokens=33, seed=0)
    assert list(TokenBatchSampler([(3, 31)], max_tokens=34, seed=0)) == [[0]]


def test_a_large_plan_is_made_in_seconds():
    rng = np.random.default_rng(0)
    source = rng.poisson(25, 1_000_000) + 2
    lengths = np.stack([source, source + rng.poisson(3, len(source))], axis=1)
    sampler = TokenBatchSampler(lengths, 4096, seed=0)
    assert sum(map(len, sampler)) == len(lengths)
    assert padding(lengths, sampler) < 0.02


def test_steps_of_epochs_counts_processes_and_accumulation():
    data = SimpleNamespace(lengths=lengths_of(300))
    batches = len(TokenBatchSampler(data.lengths, 400, seed=0))
    args = SimpleNamespace(max_tokens=400, seed=0, data_seed=None, num_train_epochs=2.5)
    for world, accumulate in ((1, 1), (2, 1), (1, 3)):
        args.world_size, args.gradient_accumulation_steps = world, accumulate
        assert steps_of_epochs(data, args) == -(-5 * -(-batches // (world * accumulate)) // 2)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs Multi30k and IWSLT'14")
@pytest.mark.parametrize("folder", ["multi30k-en-de", "iwslt14-de-en"])
def test_six_percent_of_real_batches_are_padding_at_most(tmp_path, folder):
    text = ParallelText((DATA / folder / "train.de.gz", DATA / folder / "train.en.gz"), ("de", "en"))
    data_args = DataArguments(max_train_samples=29_000)
    tokenizer = prepare_vocabulary(text, 8000, data_args, tmp_path)
    lengths = prepare_pairs(text, tokenizer, data_args, tmp_path).lengths
    assert padding(lengths, TokenBatchSampler(lengths, 4096, seed=0)) < 0.06


# -- training -------------------------------------------------------------------------------------------


def trainer_of(directory: Path, **values) -> TranslationTrainer:
    """A tiny model in training on the shipped corpus, in double precision."""
    data_args = DataArguments(max_train_samples=400, max_length=40)
    text = shipped_text("train")
    tokenizer = prepare_vocabulary(text, 600, data_args, directory)
    torch.manual_seed(0)
    model = new_marian(tokenizer, **SMALL).double()
    options = {"max_tokens": 500, "max_steps": 6, "warmup_steps": 2, "logging_steps": 1, "save_strategy": "no"}
    options |= {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "frobenius_decay": 0.0}
    return TranslationTrainer(
        model=model,
        args=TranslationArguments(output_dir=str(directory / "out"), **options | values),
        train_dataset=prepare_pairs(text, tokenizer, data_args, directory),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
    )


def test_the_log_has_the_rate_of_target_tokens(tmp_path, monkeypatch):
    seconds = iter(range(100))
    monkeypatch.setattr("fnl_hf.tasks.translation.batching.time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    trainer = trainer_of(tmp_path, logging_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    rates = [entry["tokens_per_second"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(rates) == 3
    batches = list(trainer.get_train_dataloader().batch_sampler)
    labels = [int(trainer.train_dataset.lengths[batch, 1].sum()) for batch in batches[:12]]
    assert rates == [sum(labels[i : i + 4]) for i in (0, 4, 8)]  # the clock goes a second from one line to the next


def losses_of_job() -> None:
    """What the test below runs in processes of their own: train, and write the losses."""
    directory, accumulate = Path(sys.argv[1]), int(sys.argv[2])
    trainer = trainer_of(directory, gradient_accumulation_steps=accumulate)
    trainer.train()
    if trainer.is_world_process_zero():
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        (directory / f"losses-{accumulate}.json").write_text(json.dumps(history))


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_with_twice_the_batch(tmp_path):
    for processes, accumulate in ((2, 1), (1, 2)):
        job = "from tests.test_token_batches import losses_of_job\nlosses_of_job()\n"
        run_job(tmp_path, job, processes, tmp_path, accumulate)
    two, one = (json.loads((tmp_path / f"losses-{accumulate}.json").read_text()) for accumulate in (1, 2))
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)  # logged in single precision
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-6)
        assert a["tokens_per_second"] > 0 and b["tokens_per_second"] > 0
