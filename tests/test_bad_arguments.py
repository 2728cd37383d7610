"""What is wrong with the arguments of a training script: told in one line, before anything is trained or written."""

import json
import resource
import signal
from pathlib import Path

import pytest
import torch
import yaml

from fnl_hf.tasks.finetuning import parse_table_arguments
from fnl_hf.tasks.pretraining import parse_arguments as parse_mlm
from fnl_hf.tasks.running import InputError, make_config, parse
from fnl_hf.tasks.translation import ModelArguments
from fnl_hf.tasks.translation import parse_arguments as parse_translation
from tests.script_runs import help_of, refusal, run_script

pytestmark = pytest.mark.usefixtures("one_thread")
MLM, QA, TABLE, TRANSLATION = "run_mlm.py", "run_qa.py", "run_classification.py", "run_translation.py"
NEEDED = {  # files that are never opened
    MLM: {},
    TRANSLATION: {},
    QA: {"model_name_or_path": "nowhere", "train_file": "no.json", "validation_file": "no.json"},
    TABLE: {"model_name_or_path": "nowhere", "train_file": "no.tsv", "validation_file": "no.tsv"},
}
ALL = tuple(NEEDED)
TINY = {
    "d_model": 16, "layers": 1, "heads": 2, "ffn_dim": 32, "vocab_size": 600, "max_length": 40, "max_tokens": 300,
    "max_train_samples": 100, "max_eval_samples": 2, "num_beams": 1, "disable_tqdm": True, "max_steps": 2,
    "average_checkpoints": 1,
}  # fmt: skip


def refused(monkeypatch, tmp_path, capsys, script, **option) -> str:
    """The one line in which a script refuses an option, having written nothing but text made ready."""
    monkeypatch.chdir(tmp_path)

    def files() -> list[Path]:
        return sorted(path for path in tmp_path.rglob("*") if path.is_file() and "prepared" not in path.parts)

    before = files()
    error = refusal(monkeypatch, capsys, script, **NEEDED[script] | {"output_dir": "out"} | option)
    assert files() == before and not list(tmp_path.rglob("*.partial"))
    return error


@pytest.mark.parametrize("script", ALL)
@pytest.mark.parametrize(
    "option, message",
    [
        ({"learning_rate": "nan"}, "--learning_rate nan: expected a finite number"),
        ({"learning_rate": "inf"}, "--learning_rate inf: expected a finite number"),
        ({"learning_rate": -1e-3}, "--learning_rate -0.001: expected at least 0"),
        ({"weight_decay": -0.1}, "--weight_decay -0.1: expected at least 0"),
        ({"frobenius_decay": -0.1}, "frobenius_decay is -0.1"),
        ({"max_grad_norm": -1}, "--max_grad_norm -1: expected at least 0"),
        ({"max_eval_samples": 0}, "--max_eval_samples 0: expected at least 1"),
        ({"per_device_eval_batch_size": 0}, "--per_device_eval_batch_size 0: expected at least 1"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0: expected at least 1"),
        ({"logging_steps": -5}, "--logging_steps -5: expected above 0"),
        ({"save_steps": 0}, "--save_steps 0: expected above 0"),
        ({"save_steps": -1}, "--save_steps -1: expected above 0"),
        ({"seed": -1}, "--seed -1: expected at least 0 and below"),
        ({"seed": 2**32}, "--seed 4294967296: expected at least 0 and below"),
        ({"dropout": 1.0}, "--dropout 1: expected at least 0 and below 1"),
        ({"dropout": -0.1}, "--dropout -0.1: expected at least 0 and below 1"),
        ({"adam_beta2": 1.5}, "--adam_beta2 1.5: expected at least 0 and below 1"),
        ({"max_steps": -3}, "--max_steps -3"),
        ({"num_train_epochs": -1}, "--num_train_epochs -1: expected at least 0"),
        ({"report_to": "wandbb"}, "--report_to wandbb: not known or not installed"),
        ({"optim_args": "momentum"}, "--optim_args momentum: expected names and values such as"),
        ({"low_rank": 0.25, "rank": 0.5}, "--low_rank 0.25 and --rank: the one says what the other does"),
        ({"low_rank": 1.5}, "--low_rank 1.5: expected above 0 and at most 1"),
        ({"low_rank": 0.25, "head_rank": 0.5}, "--head_rank 0.5 is of heads, which --low_rank leaves to their linear"),
        ({"factor_learning_rate": 0.1}, "a rate of 'spectron'"),
        ({"rank_adaptation": "tdlrt"}, "--rank_adaptation: invalid choice: 'tdlrt' (choose from 'dlrt', 'none')"),
        ({"rank_adaptation": "dlrt", "rank_tolerance": 1.5}, "rank_tolerance is 1.5, expected at least 0 and below 1"),
        ({"rank_interval": 5}, "rank_interval is 5, but rank_adaptation is None"),
        ({"metric_for_best_model": "blue"}, "--metric_for_best_model blue: an evaluation gives"),
        ({"max_steps": "many"}, "--max_steps: invalid int value: 'many'. See --help"),
        ({"optim": "adamm"}, "--optim: "),
        ({"no_such_thing": 3}, "--no_such_thing 3: no such argument. See --help"),
        ({"lr_scheduler_kwargs": "{broken"}, "Expecting property name"),
        ({"auto_find_batch_size": True}, "--auto_find_batch_size: the steps"),
        ({"ignore_data_skip": True}, "--ignore_data_skip: a run that is resumed goes on"),
        ({"deepspeed": "x.json"}, "eepspeed"),
        ({"output_dir": "file"}, "file is a file. Give a directory"),
        ({"output_dir": "file/below"}, "file is a file. Give a directory"),
    ],
)
def test_of_every_script(monkeypatch, tmp_path, capsys, script, option, message):
    (tmp_path / "file").write_text("")
    if script == TABLE and "output_dir" in option:  # which reads its tables first
        (tmp_path / "no.tsv").write_text("sentence\tlabel\na\t0\nb\t1\n")
    assert message in refused(monkeypatch, tmp_path, capsys, script, **option)


@pytest.mark.parametrize(
    "script, option, message",
    [
        (MLM, {"max_seq_length": 0}, "--max_seq_length 0: expected at least 1"),
        (MLM, {"per_device_train_batch_size": 0}, "--per_device_train_batch_size 0: expected at least 1"),
        (MLM, {"vocab_size": -1}, "--vocab_size -1: expected at least 1"),
        (MLM, {"top": 0}, "--top 0: expected at least 1"),
        (MLM, {"mlm_probability": "nan"}, "--mlm_probability nan: expected a finite number"),
        (MLM, {"do_train": False}, "--do_train: this script trains"),
        (MLM, {"do_predict": True}, "--do_predict: "),
        (MLM, {"do_eval": True, "validation_split_percentage": 0, "train_file": "x"}, "--do_eval without validation"),
        (MLM, {"train_sampling_strategy": "group_by_length"}, "--train_sampling_strategy: blocks come in"),
        (MLM, {"dataloader_drop_last": True}, "--dataloader_drop_last: a run is made of whole batches"),
        (MLM, {"model_name_or_path": "x", "size": "base"}, "--size: the checkpoint has its own"),
        (MLM, {"model_name_or_path": "x", "dropout": 0.1}, "--dropout: the checkpoint has its own"),
        (MLM, {"tokenizer_name": "x", "vocab_size": 600}, "--vocab_size: the tokenizer is given"),
        (MLM, {"tokenizer_type": "bpe", "lowercase": True}, "--lowercase: of wordpiece only"),
        (MLM, {"phase2_seq_length": 64}, "--phase2_seq_length: of the second phase. Give --phase2_steps"),
        (MLM, {"optim_args": "eps=1e-3"}, "LAMB takes its betas and epsilon from"),
        (QA, {"max_train_samples": -1}, "--max_train_samples -1: expected at least 1"),
        (QA, {"max_seq_length": -4}, "--max_seq_length -4: expected at least 1"),
        (QA, {"n_best_size": 0}, "--n_best_size 0: expected at least 1"),
        (QA, {"doc_stride": -1}, "--doc_stride -1: expected at least 0"),
        (QA, {"null_score_diff_threshold": 1}, "Add --version_2_with_negative"),
        (QA, {"do_predict": True}, "--do_predict: answers are written for the --validation_file"),
        (QA, {"do_train": True, "train_file": None}, "--do_train without --train_file"),
        (QA, {"do_eval": True, "validation_file": None}, "--do_eval without --validation_file"),
        (QA, {"do_eval": False, "do_train": False}, "nothing to do. Drop --do_train false"),
        (QA, {"train_file": None, "dropout": 0.1}, "--dropout: nothing is trained. Give --train_file"),
        (QA, {"num_train_epochs": 0}, "--num_train_epochs 0: nothing to train"),
        (QA, {"metric_for_best_model": "HasAns_f1"}, "an evaluation gives exact_match, f1, loss"),
        (TABLE, {"do_predict": True}, "--do_predict without --test_file"),
        (TABLE, {"max_train_samples": 0}, "--max_train_samples 0: expected at least 1"),
        (TABLE, {"metric_for_best_model": "f2"}, "an evaluation gives accuracy, f1, f1_macro, loss, matthews"),
        (TRANSLATION, {"max_train_samples": 0}, "--max_train_samples 0: expected at least 1"),
        (TRANSLATION, {"factorize": False, "target_modules": "all"}, "--target_modules is of the factorization, and"),
        (
            TRANSLATION,
            {"factorize": False, "low_rank": 0.5},
            "--low_rank is of the factorization, and --no_factorize",
        ),
        (TRANSLATION, {"num_beams": 0}, "--num_beams 0: expected at least 1"),
        (TRANSLATION, {"max_length": 0}, "--max_length 0: expected at least 1"),
        (TRANSLATION, {"max_tokens": -5}, "--max_tokens -5: expected at least 1"),
        (TRANSLATION, {"layers": 0}, "--layers 0: expected at least 1"),
        (TRANSLATION, {"vocab_size": 259}, "--vocab_size 259: expected above 259"),
        (TRANSLATION, {"vocab_size": -1}, "--vocab_size -1: expected above 259"),
        (TRANSLATION, {"average_checkpoints": 0}, "--average_checkpoints 0: expected at least 1"),
        (TRANSLATION, {"average_checkpoints": 9}, "--average_checkpoints 9 of the 5 that are kept"),
        (TRANSLATION, {"rank_adaptation": "dlrt", "average_checkpoints": 3}, "--average_checkpoints 3 with --rank_ada"),
        (TRANSLATION, {"per_device_train_batch_size": 8}, "bounded by its tokens. Give --max_tokens"),
        (TRANSLATION, {"train_sampling_strategy": "random"}, "--train_sampling_strategy: batches are of similar"),
        (TRANSLATION, {"model_name_or_path": "x", "d_model": 64}, "--d_model: the checkpoint has its own"),
        (TRANSLATION, {"model_name_or_path": "x", "vocab_size": 3000}, "--vocab_size: the checkpoint has its own"),
    ],
)
def test_of_one_script(monkeypatch, tmp_path, capsys, script, option, message):
    assert message in refused(monkeypatch, tmp_path, capsys, script, **option)


@pytest.mark.parametrize(
    "option, message",
    [
        ({"vocab_size": 300}, "--vocab_size 300: "),
        ({"optim": "sgd", "optim_args": "momentum=fast"}, "could not convert"),
        ({"optim": "rmsprop", "optim_args": "colour=3"}, "colour=3: nothing that rmsprop takes"),
        ({"learning_rate": 0, "lr_scheduler_type": "polynomial"}, "lr_end"),
        ({"lr_scheduler_type": "polynomial", "warmup_steps": 2}, "--warmup_steps 2 are all of the 2 steps"),
        ({"frobenius_decay_kinds": "ov", "attention": "qk"}, "ov: not a kind that is factorized"),
        ({"eval_on_start": True, "train_file": "pairs.json"}, "--eval_on_start: there is nothing to evaluate on"),
    ],
)
def test_what_only_the_model_tells_is_told_before_training(monkeypatch, tmp_path, capsys, option, message):
    lines = [json.dumps({"translation": {"de": f"Haus {i}.", "en": f"house {i}."}}) for i in range(40)]
    (tmp_path / "pairs.json").write_text("\n".join(lines))
    assert message in refused(monkeypatch, tmp_path, capsys, TRANSLATION, **TINY | option)


@pytest.mark.parametrize("parse", [parse_translation, parse_mlm, parse_table_arguments])
def test_low_rank_stands_for_others(monkeypatch, tmp_path, parse):
    (tmp_path / "a.tsv").write_text("sentence\tlabel\na\t0\n")
    checkpoint = ["--model_name_or_path", str(tmp_path), "--train_file", str(tmp_path / "a.tsv")]
    checkpoint = checkpoint if parse is parse_table_arguments else []
    words = ["run.py", "--low_rank", "0.25", *checkpoint, "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", words)
    model_args, *_, args = parse("")
    config = make_config(model_args)
    assert (config.attention, config.target_modules, config.rank) == ((), "all-linear", 0.25)
    assert args.fnl_optim == (None if checkpoint else "spectron")
    assert args.learning_rate == {parse_translation: 4e-3, parse_mlm: 1e-3}.get(parse, args.learning_rate)
    monkeypatch.setattr("sys.argv", [*words, "--attention", "ov", "--fnl_optim", "nag", "--learning_rate", "0.2"])
    model_args, *_, args = parse("")
    assert make_config(model_args).attention == ("ov",) and (args.fnl_optim, args.learning_rate) == ("nag", 0.2)
    if not checkpoint:
        monkeypatch.setattr("sys.argv", [*words, "--factor_learning_rate", "0.06"])
        assert parse("")[-1].factor_learning_rate == 0.06  # of the optimizer that it stands for
        monkeypatch.setattr("sys.argv", [*words, "--fnl_optim", "none"])
        assert parse("")[-1].fnl_optim is None


def test_one_step_of_masked_lm(monkeypatch, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("The cat sat on the mat. It was a very old cat, and a very old mat.\n" * 30)
    options = {"train_file": "text.txt", "vocab_size": 100, "max_seq_length": 16, "per_device_train_batch_size": 2}
    monkeypatch.chdir(tmp_path)
    error = refusal(monkeypatch, capsys, MLM, **options, max_steps=1, output_dir="out")
    assert "--warmup_steps 0.1 are all of the 1 steps" in error and not (tmp_path / "out" / "run.json").exists()
    run_script(monkeypatch, MLM, **options, max_steps=1, warmup_steps=0, disable_tqdm=True, output_dir="out")


def test_a_full_disk_is_one_line(monkeypatch, tmp_path, capsys):
    """No file may grow beyond a limit, which is what the system tells as it tells a full disk."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # as Python starts
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        error = refusal(monkeypatch, capsys, TRANSLATION, **TINY, output_dir=tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be read or written" in error and "the same command goes on" in error


def test_diverging_training_names_the_weights_and_the_step(monkeypatch, tmp_path, capsys):
    step = torch.optim.Optimizer.profile_hook_step

    def spoil(self, *args, **kwargs):
        for parameter in self.param_groups[0]["params"][:1]:
            parameter.grad.fill_(torch.nan)

    with monkeypatch.context() as patch:
        patch.setattr("transformers.trainer.Trainer._clip_grad_norm", lambda self, model: spoil(self.optimizer))
        options = TINY | {"max_steps": 6, "max_grad_norm": 1, "output_dir": tmp_path / "out"}
        error = refusal(monkeypatch, capsys, TRANSLATION, **options)
    assert error.startswith("weights of model.") and "are not finite at step 1: training has diverged" in error
    assert torch.optim.Optimizer.profile_hook_step is step


# -- files of arguments, and help -----------------------------------------------------------------------


@pytest.mark.parametrize("script", ALL)
@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_a_file_of_arguments_is_read_as_the_command_line_is(monkeypatch, tmp_path, capsys, script, suffix):
    monkeypatch.chdir(tmp_path)
    options = NEEDED[script] | {"learning_rate": 1e-4, "seed": -7, "output_dir": "out", "bf16_full_eval": False}
    text = json.dumps(options | {"report_to": []}) if suffix == ".json" else yaml.safe_dump(options)
    (tmp_path / f"args{suffix}").write_text(text, encoding="utf-8-sig")

    def answer(*words, **values):
        with pytest.raises(SystemExit) as exit:
            run_script(monkeypatch, script, *words, **values)
        assert exit.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "--seed -7: expected at least 0" in answer(f"args{suffix}")
    assert "--seed -8: expected at least 0" in answer(f"args{suffix}", seed=-8)  # the command line counts
    content = options | {"seed": 1, "learning_rat": 1}
    (tmp_path / f"args{suffix}").write_text(json.dumps(content))
    assert f"args{suffix}: no such argument 'learning_rat'. See --help" in answer(f"args{suffix}")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.json", None, "x.json: not a JSON or YAML file of arguments ("),
        ("x.json", "{", "x.json: not a JSON or YAML file of arguments ("),
        ("x.yaml", "a: [", "x.yaml: not a JSON or YAML file of arguments ("),
        ("x.json", "[1]", "x.json: expected names and values"),
        ("x.json", '{"seed": null}', "x.json: seed has no value"),
        ("x.json", '{"attention": ["qk", "kq"], "seed": "one"}', "--seed: invalid int value: 'one'"),
        ("x.json", "[" * 100_000, "x.json: not a JSON or YAML file of arguments ("),
    ],
)
def test_files_that_hold_no_arguments(monkeypatch, tmp_path, capsys, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit):
        run_script(monkeypatch, TRANSLATION, name)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_values_of_a_file(monkeypatch, tmp_path):
    """Lists, numbers that YAML takes for text, false, null where that is the default."""
    text = "attention: [ov]\nfactorize: false\ndropout: 1e-1\nmodel_name_or_path: null\nhead_rank: 0.5\n"
    (tmp_path / "x.yaml").write_text(text)
    monkeypatch.setattr("sys.argv", ["run.py", str(tmp_path / "x.yaml"), "--layers", "3"])
    [model_args] = parse((ModelArguments,), "")
    assert (model_args.attention, model_args.factorize, model_args.dropout) == (["ov"], False, 0.1)
    assert (model_args.head_rank, model_args.layers, model_args.model_name_or_path) == ("0.5", 3, None)
    assert model_args.given == {"attention", "factorize", "dropout", "head_rank", "layers"}
    monkeypatch.setattr("sys.argv", ["run.py", "--layers", "1"])
    with pytest.raises(InputError, match="--layers: use --depth"):
        parse((ModelArguments,), "", useless={"layers": "use --depth"})


@pytest.mark.parametrize("script", ALL)
def test_help_opens_with_the_examples(monkeypatch, capsys, script):
    text = help_of(monkeypatch, capsys, script)
    example = text.index(f"\n    python scripts/{script}")
    assert not text.startswith("usage") and example < text.index("\nusage: ") < text.index("--output_dir OUTPUT_DIR")
    assert text[:example].count("\n") < 12
