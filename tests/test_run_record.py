"""A run answers for its own command: its record, the lock of its directory, and what a resumed run reports."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

import fnl_hf
from fnl_hf.tasks.running import record as records
from fnl_hf.tasks.running.locking import LOCK
from tests.processes import launcher
from tests.script_runs import flags, refusal, run_script, same_weights, stopped_before
from tests.test_classification import TINY as TINY_TABLE
from tests.test_classification import bert, reviews, table  # noqa: F401
from tests.test_rules import make_trainer
from tests.test_trainer import make_model

pytestmark = pytest.mark.usefixtures("one_thread")
TRANSLATION, TABLE, MLM = "run_translation.py", "run_classification.py", "run_mlm.py"
TINY = {
    "d_model": 16, "layers": 1, "heads": 2, "ffn_dim": 32, "vocab_size": 600, "max_length": 40, "max_tokens": 300,
    "max_train_samples": 200, "max_eval_samples": 2, "num_beams": 1, "disable_tqdm": True, "max_steps": 4,
    "save_steps": 2, "logging_steps": 2, "average_checkpoints": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        run_script(patch, TRANSLATION, **TINY, output_dir=out)
    return out


def files_of(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != LOCK}


def refused(monkeypatch, capsys, out, **option) -> str:
    """The refusal of an option for a directory, which is left as it was."""
    before = files_of(out)
    error = refusal(monkeypatch, capsys, TRANSLATION, **TINY | {"output_dir": out} | option)
    assert files_of(out) == before
    return error


# -- the record -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, difference",
    [
        ({"head_rank": 0.5}, "--head_rank 1.0, not 0.5"),
        ({"init": "default"}, "--init spectral, not default"),
        ({"attention": "ov"}, "--attention qk ov, not ov"),
        ({"factorize": False}, "--factorize True, not False"),
        ({"frobenius_decay": 0.1}, "--frobenius_decay None, not 0.1"),
        ({"source_lang": "en", "target_lang": "de"}, "--source_lang de, not en; --target_lang en, not de"),
        ({"learning_rate": 1e-4}, "--learning_rate 0.002, not 0.0001"),
        ({"seed": 1}, "--seed 42, not 1"),
        ({"data_seed": 1}, "--data_seed None, not 1"),
        ({"fnl_optim": "lamb"}, "--fnl_optim None, not lamb"),
        ({"optim": "sgd"}, "--optim adamw_torch_fused, not sgd"),
        ({"lr_scheduler_type": "linear"}, "--lr_scheduler_type inverse_sqrt, not linear"),
        ({"lr_scheduler_kwargs": '{"timescale": 9}'}, "--lr_scheduler_kwargs None, not {'timescale': 9}"),
        ({"max_train_samples": 100}, "--max_train_samples 200, not 100"),
        ({"vocab_size": 700}, "--vocab_size 600, not 700"),
        ({"dropout": 0.1}, "--dropout None, not 0.1"),
        ({"source_prefix": "x "}, "--source_prefix , not x "),
        ({"max_steps": 3}, "checkpoint-4 has 4 steps, and this run would have 3"),
    ],
)
def test_another_command_is_refused(monkeypatch, capsys, finished, option, difference):
    error = refused(monkeypatch, capsys, finished, **option)
    assert difference in error and "another --output_dir" in error


@pytest.mark.parametrize(
    "option",
    [
        {"num_beams": 2, "max_eval_samples": 1, "per_device_eval_batch_size": 3},
        {"logging_steps": 1, "save_steps": 3, "save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 1},
        {"dataloader_num_workers": 1, "use_cpu": True, "run_name": "x"},
    ],
)
def test_what_is_not_learned_may_change(monkeypatch, capsys, finished, option):
    run_script(monkeypatch, TRANSLATION, **TINY | {"output_dir": finished} | option)
    assert "training is finished" in capsys.readouterr().out


def test_more_steps_go_on_and_are_recorded(monkeypatch, capsys, tmp_path, finished):
    out = shutil.copytree(finished, tmp_path / "out")
    run_script(monkeypatch, TRANSLATION, **TINY | {"output_dir": out, "max_steps": 6, "eval_strategy": "steps"})
    assert "training resumes there" in capsys.readouterr().out
    assert json.loads((out / "run.json").read_text())["arguments"]["max_steps"] == 6


def test_a_corpus_goes_by_its_content_and_not_by_its_place(monkeypatch, capsys, tmp_path):
    lines = [json.dumps({"translation": {"de": f"Das ist Haus {i}.", "en": f"This is {i}."}}) for i in range(60)]
    for folder, content in (("a", lines), ("b", lines), ("c", [*lines[:-1], lines[0]])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.json").write_text("\n".join(content))
    out, train = tmp_path / "out", "train_file"
    run_script(monkeypatch, TRANSLATION, **TINY, **{train: tmp_path / "a" / "train.json"}, output_dir=out)
    run_script(monkeypatch, TRANSLATION, **TINY, **{train: tmp_path / "b" / "train.json"}, output_dir=out)
    assert "training is finished" in capsys.readouterr().out
    error = refused(monkeypatch, capsys, out, **{train: tmp_path / "c" / "train.json"})
    assert "another training corpus (fingerprint " in error
    assert "another training corpus" in refused(monkeypatch, capsys, out)  # the one that ships


def test_fingerprints(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    large = bytearray(b"abcdefgh" * 1_000_000)
    (folder / "large").write_bytes(large)
    before = records.fingerprint_of_files([folder])
    assert len(before) == 12 and records.fingerprint_of_files([folder]) == before
    for place in (0, len(large) - 1):
        changed = large.copy()
        changed[place] = 0
        (folder / "large").write_bytes(changed)
        assert records.fingerprint_of_files([folder]) != before
    (folder / "large").write_bytes(large + b"x")
    assert records.fingerprint_of_files([folder]) != before
    (folder / "large").write_bytes(large)
    shutil.move(folder, tmp_path / "moved")
    assert records.fingerprint_of_files([tmp_path / "moved"]) == before
    assert records.fingerprint_of_files(()) == records.fingerprint_of_files(()) != before


def test_a_damaged_record_is_one_line(monkeypatch, capsys, tmp_path, finished):
    out = shutil.copytree(finished, tmp_path / "out")
    for content in ("", "{", "[]", '{"arguments": 3}', "[" * 100_000, "null"):
        (out / "run.json").write_text(content)
        error = refused(monkeypatch, capsys, out)
        assert "run.json: not a record that can be read" in error and "--overwrite_output_dir" in error


def test_a_run_from_before_there_were_records_goes_on_with_a_warning(monkeypatch, capsys, tmp_path, finished):
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "run.json").unlink()
    run_script(monkeypatch, TRANSLATION, **TINY | {"output_dir": out, "max_steps": 5})
    printed = capsys.readouterr().out
    assert "was made before runs were recorded" in printed and "training resumes there" in printed
    assert "--seed 42, not 3" in refused(monkeypatch, capsys, out, max_steps=5, seed=3)  # it has one now


def test_other_versions_are_a_warning(monkeypatch, capsys, tmp_path, finished):
    out = shutil.copytree(finished, tmp_path / "out")
    known = json.loads((out / "run.json").read_text())
    known["versions"] |= {"torch": "1.0"}
    del known["arguments"]["seed"]  # of a version that did not know it
    (out / "run.json").write_text(json.dumps(known))
    run_script(monkeypatch, TRANSLATION, **TINY, output_dir=out)
    printed = capsys.readouterr().out
    assert "was started with torch 1.0, now " in printed

    known["versions"]["processes"] = "2"  # whose step was of two batches
    (out / "run.json").write_text(json.dumps(known))
    assert "holds a run of 2 process(es), and these are 1" in refused(monkeypatch, capsys, out, max_steps=5)
    run_script(monkeypatch, TRANSLATION, **TINY, output_dir=out)  # which only scores what is finished


def test_another_start_is_another_run(monkeypatch, capsys, tmp_path, finished):
    """From scratch, from a checkpoint, with the tokenizer of another one: each is refused where another one was."""
    (tmp_path / "text.txt").write_text("The cat sat on the mat. It was a very old cat, and a very old mat.\n" * 30)
    monkeypatch.chdir(tmp_path)
    options = {"train_file": "text.txt", "max_seq_length": 16, "per_device_train_batch_size": 2, "disable_tqdm": True}
    options |= {"max_steps": 1, "warmup_steps": 0}
    base = {"model_name_or_path": tmp_path / "base"}
    run_script(monkeypatch, MLM, **options, output_dir="base")
    run_script(monkeypatch, MLM, **options, **base, output_dir="tuned")
    run_script(monkeypatch, MLM, **options, **base, output_dir="tuned")  # the control: the same command
    assert "training is finished" in capsys.readouterr().out
    (tmp_path / "base" / "predictions.json").write_text("{}")  # scores do not make it another checkpoint
    run_script(monkeypatch, MLM, **options, **base, output_dir="tuned")
    capsys.readouterr()
    shutil.copytree("base", "copy")
    for out, start in (("tuned", {}), ("base", {"model_name_or_path": tmp_path / "copy"})):
        error = refusal(monkeypatch, capsys, MLM, **options, **start, output_dir=out)
        assert "another checkpoint to start from (fingerprint " in error and "none" in error
    error = refusal(monkeypatch, capsys, MLM, **options, tokenizer_name=tmp_path / "copy", output_dir="base")
    assert "another --tokenizer_name (fingerprint none" in error


@pytest.mark.parametrize("places", [(2,), (2, 4)])
def test_a_directory_may_move_with_its_best_checkpoint(monkeypatch, capsys, tmp_path, finished, places):
    """The Trainer stores where the best one lay. The finished run is scored by that one and not by the last."""
    out = shutil.copytree(finished, tmp_path / "moved")
    options = TINY | {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    record = json.loads((out / "run.json").read_text())
    record["arguments"] |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    (out / "run.json").write_text(json.dumps(record))
    state = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())
    for step in places:
        state["best_model_checkpoint"] = f"gone/out/checkpoint-{step}"
        (out / "checkpoint-4" / "trainer_state.json").write_text(json.dumps(state))
        run_script(monkeypatch, TRANSLATION, **options, output_dir=out)
        assert same_weights(out, out / f"checkpoint-{step}")
        assert not same_weights(out, out / f"checkpoint-{6 - step}")


def test_starting_over_removes_the_run_and_nothing_else(monkeypatch, capsys, tmp_path, finished):
    out = shutil.copytree(finished, tmp_path / "out")
    own = ("thesis.tex", "my.model", "tokenizer_notes.json", "predictions.of.mine.md")
    for name in own:
        (out / name).write_text("mine")
    for name in ("all_results.json", "test_translations.tsv", "notes.md"):  # of a further test set
        (out / "test-news").mkdir(exist_ok=True)
        (out / "test-news" / name).write_text("{}")
    (out / "test_translations.tsv").write_text("old")
    (out / "checkpoint-best").mkdir()
    (out / "logs").mkdir()
    broken = {"seed": 1, "overwrite_output_dir": True, "train_file": tmp_path / "none.json"}
    assert "no such file" in refused(monkeypatch, capsys, out, **broken)  # and nothing is removed
    new = TINY | {"seed": 1, "max_steps": 3, "save_steps": 3}
    corpus = tmp_path / "train.json"  # which has no test set: what is there of one is of the old run
    corpus.write_text("\n".join(json.dumps({"translation": {"de": f"Haus {i}.", "en": f"{i}."}}) for i in range(60)))
    new |= {"train_file": corpus}
    run_script(monkeypatch, TRANSLATION, **new, overwrite_output_dir=True, output_dir=out)
    assert "Found" not in capsys.readouterr().out
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-best"]
    assert all((out / name).read_text() == "mine" for name in own) and (out / "logs").is_dir()
    assert [path.name for path in (out / "test-news").iterdir()] == ["notes.md"]
    assert not (out / "test_translations.tsv").exists()
    run_script(monkeypatch, TRANSLATION, **new, output_dir=tmp_path / "fresh")
    assert same_weights(out, tmp_path / "fresh")
    run_script(monkeypatch, TRANSLATION, **new, output_dir=out)
    assert "training is finished" in capsys.readouterr().out


def test_a_run_killed_before_its_first_checkpoint_starts_again(monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    with stopped_before(monkeypatch, step=2):
        run_script(monkeypatch, TRANSLATION, **TINY, output_dir=out)
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == [LOCK, "run.json"]
    run_script(monkeypatch, TRANSLATION, **TINY | {"seed": 3}, output_dir=out)  # nothing yet that another would own
    assert json.loads((out / "run.json").read_text())["arguments"]["seed"] == 3


def test_fine_tuning_goes_by_its_checkpoint(monkeypatch, capsys, tmp_path, bert, reviews):  # noqa: F811
    pytest.importorskip("sklearn")
    base, out = shutil.copytree(bert, tmp_path / "bert"), tmp_path / "out"
    options = {**TINY_TABLE, "train_file": reviews, "validation_file": reviews, "max_steps": 1}
    run_script(monkeypatch, TABLE, **options, model_name_or_path=base, output_dir=out)
    shutil.copytree(base, tmp_path / "moved")
    run_script(monkeypatch, TABLE, **options, model_name_or_path=tmp_path / "moved", output_dir=out)
    assert "training is finished" in capsys.readouterr().out

    def error(**option):
        return refusal(monkeypatch, capsys, TABLE, **options | {"model_name_or_path": base, "output_dir": out} | option)

    assert "--learning_rate " in error(learning_rate=1e-3) and "--per_device_train_batch_size" in error(
        per_device_train_batch_size=3
    )
    other = table(tmp_path / "other.tsv", "sentence|label", "the play was great|1", "the play was poor|0")
    assert "another training corpus" in error(train_file=other)
    # the base itself, evaluated: not where the run's own results are
    assert "holds a run, and its results would be replaced" in error(do_train=False)
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if "encoder" in name)
    save_file(weights | {name: weights[name] + 1}, base / "model.safetensors", metadata={"format": "pt"})
    assert "another checkpoint to start from (fingerprint" in error()


def test_what_is_done_at_all(monkeypatch, capsys, tmp_path, bert, reviews):  # noqa: F811
    pytest.importorskip("sklearn")
    options = {**TINY_TABLE, "model_name_or_path": bert, "train_file": reviews, "validation_file": reviews}
    options |= {"max_steps": 1, "test_file": reviews}
    run_script(monkeypatch, TABLE, **options, do_eval=False, do_predict=False, output_dir=tmp_path / "out")
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert "train_loss" in results and not any(name.startswith(("eval", "test")) for name in results)
    tuned = options | {"model_name_or_path": tmp_path / "out", "do_train": False, "output_dir": tmp_path / "scores"}
    tuned.pop("max_steps")
    run_script(monkeypatch, TABLE, **tuned)
    results = json.loads((tmp_path / "scores" / "all_results.json").read_text())
    assert "train_loss" not in results and {"eval_accuracy", "test_rows"} <= results.keys()
    assert not (tmp_path / "scores" / "run.json").exists() and not list((tmp_path / "scores").glob("*.safetensors"))


# -- the lock -------------------------------------------------------------------------------------------


def test_a_second_run_in_a_directory_is_refused(monkeypatch, capsys, tmp_path, finished):
    out = shutil.copytree(finished, tmp_path / "out")
    with FileLock(out / LOCK):
        assert "another run is going on there" in refused(monkeypatch, capsys, out)
        assert "another run is going on there" in refused(monkeypatch, capsys, out, overwrite_output_dir=True)
    run_script(monkeypatch, TRANSLATION, **TINY, output_dir=out)
    run_script(monkeypatch, TRANSLATION, **TINY, output_dir=out)  # the first has given it up


def test_a_run_that_began_meanwhile_is_seen(monkeypatch, capsys, tmp_path, finished):
    """Two start in a new directory: the other has taken two steps by the time that this one has read its corpus."""
    out = tmp_path / "out"
    begin = fnl_hf.tasks.running.Job._begin

    def meanwhile(job):
        shutil.copytree(finished, out, dirs_exist_ok=True)
        begin(job)

    monkeypatch.setattr(fnl_hf.tasks.running.Job, "_begin", meanwhile)
    error = refusal(monkeypatch, capsys, TRANSLATION, **TINY, output_dir=out)
    assert "another run has begun there meanwhile" in error


def test_the_lock_ends_with_its_process(tmp_path):
    code = "from pathlib import Path; from fnl_hf.tasks.running.locking import lock; import sys, time; "
    code += "print(lock(Path(sys.argv[1])), flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "True\n"
        with pytest.raises(TimeoutError):
            FileLock(tmp_path / LOCK).acquire(timeout=0)
    finally:
        process.kill()
        process.wait()
    FileLock(tmp_path / LOCK).acquire(timeout=0).lock.release()


@pytest.mark.slow
def test_all_processes_of_a_run_decide_alike(monkeypatch, tmp_path, finished):
    out = shutil.copytree(finished, tmp_path / "out")
    script = Path(__file__).parents[1] / "scripts" / TRANSLATION
    record = json.loads((out / "run.json").read_text())
    record["versions"]["processes"] = "2"
    (out / "run.json").write_text(json.dumps(record))
    for option, message in (({"seed": 7}, "holds a run with --seed 42, not 7"), ({}, "training is finished")):
        command = [*launcher(2), script, *flags(**TINY | {"use_cpu": True, "output_dir": out} | option)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=110)
        assert message in done.stdout + done.stderr and (done.returncode == 0) == (option == {})


# -- what a resumed run reports -------------------------------------------------------------------------


@pytest.mark.parametrize("option", [{}, {"factorize_at": 6}])
def test_a_resumed_run_reports_what_an_uninterrupted_one_does(monkeypatch, tmp_path, option):
    """Saved between two lines of the log, twice; every line of the log and the mean loss are the same."""
    options = TINY | {"max_steps": 12, "save_steps": 3, "logging_steps": 5, "seed": 5} | option
    run_script(monkeypatch, TRANSLATION, **options, output_dir=tmp_path / "whole")
    out = tmp_path / "stopped"
    for step in (5, 8):
        with stopped_before(monkeypatch, step):
            run_script(monkeypatch, TRANSLATION, **options, output_dir=out)
    run_script(monkeypatch, TRANSLATION, **options, output_dir=out)
    histories = []
    for folder in (tmp_path / "whole", out):
        history = json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
        losses = json.loads((folder / "all_results.json").read_text())["train_loss"]
        timeless = [{key: value for key, value in row.items() if "second" not in key} for row in history]
        histories.append((losses, [row for row in timeless if "loss" in row]))
    assert len(histories[0][1]) >= 2 and histories[0] == histories[1]


def test_train_loss_is_the_mean_of_the_steps(tmp_path):
    trainer = make_trainer(
        make_model("bert"), tmp_path, max_steps=5, logging_steps=1, save_strategy="steps", save_steps=3
    )
    output = trainer.train()
    mean = sum(row["loss"] for row in trainer.state.log_history if "loss" in row) / 5
    assert output.training_loss == output.metrics["train_loss"] == pytest.approx(mean, rel=1e-6)
    state = tmp_path / "checkpoint-3" / "trainer_state.json"
    again = make_trainer(make_model("bert"), tmp_path, max_steps=5, logging_steps=4)
    resumed = again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.training_loss == pytest.approx(mean, rel=1e-6)

    stored = json.loads(state.read_text())  # as of a Trainer that does not keep the sums
    del stored["stateful_callbacks"]["LossSoFar"]
    state.write_text(json.dumps(stored))
    late = make_trainer(make_model("bert"), tmp_path, max_steps=5, logging_steps=1)
    output = late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    rest = [row["loss"] for row in late.state.log_history if row.get("step", 0) > 3 and "loss" in row]
    assert len(rest) == 2 and output.training_loss == pytest.approx(sum(rest) / 2, rel=1e-6)


# -- one optimizer, two trainers ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, fnl_hf.optim.Lamb])
def test_an_optimizer_of_two_trainers_decays_once(tmp_path, kind):
    """The same weights as by one trainer after another with an optimizer of its own state, whichever trains when."""
    ends = []
    for shared in (False, True):
        model = fnl_hf.factorize(make_model("bert"))
        optimizer, trainers = None, []
        for _ in range(2):
            if optimizer is None or not shared:
                optimizer = kind(model.parameters(), lr=1e-2, weight_decay=0.0)
            schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
            trainer = make_trainer(
                model, tmp_path, frobenius_decay=0.5, frobenius_decay_mode="decoupled", max_steps=1, learning_rate=1e-2
            )
            trainer.optimizer, trainer.lr_scheduler = optimizer, schedule
            trainer.create_optimizer()
            trainers.append(trainer)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        ends.append({name: parameter.detach() - before[name] for name, parameter in model.named_parameters()})
    assert any(change.any() for change in ends[0].values())
    for name, change in ends[0].items():
        torch.testing.assert_close(ends[1][name], change, rtol=0, atol=0)


def test_kinds_that_a_model_lacks_are_told_before_training(tmp_path):
    model = fnl_hf.factorize(make_model("bert"), fnl_hf.FNLConfig(attention=("qk",)))
    trainer = make_trainer(model, tmp_path, frobenius_decay_kinds=["ov"], frobenius_decay=0.0)
    with pytest.raises(ValueError, match="asked for kind 'ov'; the model has"):
        trainer.train()
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.bert.embeddings.word_embeddings.weight.requires_grad = True
    with pytest.raises(ValueError, match="frozen, as adapters freeze them"):
        make_trainer(model, tmp_path, frobenius_decay=0.1).train()
