"""Scoring translations: the search, BLEU and chrF in validation, finished runs, references, averaged checkpoints."""

import copy
import io
import json
import shutil
import sys
import weakref
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DataCollatorForSeq2Seq

import fnl_hf.tasks.translation as wing
from fnl_hf.tasks.running import InputError, average_checkpoints_, checkpoints, given_lines, is_finished
from fnl_hf.tasks.translation import (
    DataArguments,
    new_marian,
    read_references,
    sacrebleu_scores,
    store_search,
    train_tokenizer,
    translate,
    write_translations,
)
from fnl_hf.tasks.translation.corpus import read_pairs, shipped_text
from tests.script_runs import refusal, run_on_two_processes, run_script, same_weights, stopped_before

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"d_model": 16, "layers": 1, "heads": 2, "ffn_dim": 32, "max_length": 40}
TINY = {
    **SMALL,
    "vocab_size": 600,
    "max_tokens": 300,
    "num_beams": 2,
    "max_train_samples": 100,
    "max_eval_samples": 6,
    "logging_steps": 100,
    "disable_tqdm": True,
}
BEST = {
    "predict_with_generate": True,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
    "metric_for_best_model": "bleu",
    "load_best_model_at_end": True,
    "average_checkpoints": 1,
}


@pytest.fixture(scope="module")
def pairs():
    return read_pairs(shipped_text("test"), 12)


@pytest.fixture(scope="module")
def tokenizer(pairs):
    texts = [text for pair in read_pairs(shipped_text("train"), 2000) for text in pair]
    return train_tokenizer(texts, vocab_size=600)


@pytest.fixture
def model(tokenizer):
    return new_marian(tokenizer, **SMALL, dropout=0.1)


@pytest.fixture
def calls(model, monkeypatch):
    """What `translate` asks of `model.generate`: keywords, in their order."""
    asked, generate = [], model.generate

    def record(**options):
        asked.append(options)
        return generate(**options)

    monkeypatch.setattr(model, "generate", record)
    return asked


def run(monkeypatch, **values):
    run_script(monkeypatch, "run_translation.py", **TINY | values)


def results(out: Path, split: str = "all") -> dict:
    return json.loads((out / f"{split}_results.json").read_text())


def steps(out: Path) -> list[int]:
    return [int(path.name.removeprefix("checkpoint-")) for path in checkpoints.complete_checkpoints(out)]


# -- the search -----------------------------------------------------------------------------------------


def test_what_is_not_given_is_left_to_the_checkpoint(model, tokenizer, calls):
    translate(model, tokenizer, ["Ja."], progress=False)
    assert not {"num_beams", "length_penalty", "min_length"} & calls[0].keys()
    translate(model, tokenizer, ["Ja."], num_beams=3, length_penalty=0.6, min_length=4, progress=False)
    assert {name: calls[1][name] for name in ("num_beams", "length_penalty", "min_length")} == {
        "num_beams": 3,
        "length_penalty": 0.6,
        "min_length": 5,  # with the token that decoding starts from
    }


def test_a_minimum_of_tokens_is_kept_to(model, tokenizer, monkeypatch):
    model.final_logits_bias[0, tokenizer.eos_token_id] = 100.0  # this model ends at once
    outputs, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **options: outputs.append(generate(**options)) or outputs[-1])
    for least in (None, 3, 39):  # the last is more than twice the input and ten
        translate(model, tokenizer, ["Ja."], num_beams=2, min_length=least, max_length=40, progress=False)
    ends = [(ids[0] == tokenizer.eos_token_id).nonzero()[0].item() for ids in outputs]
    assert ends == [1, 4, 39]  # the start, the tokens, the end; forced where there is no more room


def test_batches_are_bounded_by_tokens_times_beams(model, tokenizer, pairs, calls):
    sources = [source for source, _ in pairs]
    lengths = sorted((len(ids) for ids in tokenizer(sources)["input_ids"]), reverse=True)
    bounds = (400, 1)
    translations = [
        translate(model, tokenizer, sources, num_beams=2, max_length=20, max_tokens=bound, progress=False)
        for bound in bounds
    ]
    shapes = [call["input_ids"].shape for call in calls]
    first = shapes[: next(i for i, total in enumerate(_sums(shapes)) if total == len(sources)) + 1]
    assert all(2 * rows * columns <= 400 for rows, columns in first) and 1 < len(first) < len(sources)
    assert first[0][1] == min(lengths[0], 20)  # longest first
    assert [rows for rows, _ in shapes[len(first) :]] == [1] * len(sources)  # none is left out, however long
    assert len(translations[0]) == len(translations[1]) == len(sources)


def _sums(shapes):
    total = 0
    for rows, _ in shapes:
        total += rows
        yield total


def test_blank_sentences_stay_blank_and_take_no_prefix(model, tokenizer, calls):
    sentences = ["", "Ja.", " \t", "Nein."]
    translations = translate(model, tokenizer, sentences, prefix="x: ", num_beams=2, progress=False)
    assert translations[0] == translations[2] == "" and len(translations) == 4
    assert sum(len(call["input_ids"]) for call in calls) == 2
    assert translate(model, tokenizer, ["", " "], progress=False) == ["", ""]
    alone = translate(model, tokenizer, ["x: Ja."], num_beams=2, progress=False)
    assert translations[1] == alone[0]


def test_a_translation_is_one_line(model, tokenizer, monkeypatch):
    newline, letter = (tokenizer.convert_tokens_to_ids(token) for token in ("<0x0A>", "<0x61>"))
    output = torch.tensor([[tokenizer.pad_token_id, letter, newline, letter, tokenizer.eos_token_id]])
    monkeypatch.setattr(model, "generate", lambda **options: output)
    assert translate(model, tokenizer, ["Ja."], progress=False) == ["a a"]


# -- what is translated ---------------------------------------------------------------------------------


def standard_input(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_standard_input_is_read_as_files_are(monkeypatch):
    standard_input(monkeypatch, "\ufeffEins.\r\n\nDrei\u2028und mehr.".encode())
    assert given_lines(["-"]) == ["Eins.", "", "Drei\u2028und mehr."]
    standard_input(monkeypatch, b"")
    assert given_lines(["-"]) == []
    standard_input(monkeypatch, b"Gr\xfc\xdfe.\n")
    with pytest.raises(InputError, match="standard input is not UTF-8") as error:
        given_lines(["-"])
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="the command line is not UTF-8"):
        given_lines(["Gr\udcfcn."])


# -- references and scores ------------------------------------------------------------------------------


def test_a_second_reference_counts_and_may_be_missing():
    translations = ["The house is green today.", "I like the small red car."]
    one = [["A building was blue then.", "I like the small red car."]]
    two = [*one, ["The house is green today.", None]]
    first, both = (sacrebleu_scores(translations, references) for references in (one, two))
    assert first["bleu"] < both["bleu"] == pytest.approx(100) and first["chrf"] < both["chrf"]
    assert "nrefs:1" in first["bleu_signature"] and "nrefs:var" in both["bleu_signature"]


def test_the_search_that_is_stored_can_be_saved(model, tmp_path, monkeypatch):
    """A checkpoint has settings of several beams; a search without them is asked for."""
    monkeypatch.setattr(model, "generation_config", copy.deepcopy(model.generation_config))
    stored = model.generation_config
    beams = {"num_beams": 4, "length_penalty": 0.8, "early_stopping": True, "num_return_sequences": 3}
    stored.update(**beams, min_new_tokens=2)
    changed = copy.deepcopy(stored)
    changed.num_beams, changed.num_return_sequences = 1, 1
    with pytest.raises(ValueError, match="num_beams"):  # the control
        changed.save_pretrained(tmp_path / "control")
    store_search(model, DataArguments(num_beams=2, min_length=5))
    assert (stored.length_penalty, stored.early_stopping, stored.num_return_sequences) == (0.8, True, 1)
    assert (stored.min_length, stored.min_new_tokens) == (6, None)
    store_search(model, DataArguments(num_beams=1))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).generation_config
    assert again.num_beams == 1 and not again.early_stopping


def test_new_tokens_of_a_checkpoint_do_not_pass_its_positions(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model, "generation_config", copy.deepcopy(model.generation_config))
    model.generation_config.update(max_new_tokens=4000, min_new_tokens=3)
    generate, tokens = model.generate, []

    def noted(**options):
        tokens.append(generate(**options))
        return tokens[-1]

    monkeypatch.setattr(model, "generate", noted)
    translate(model, tokenizer, ["Ja."], num_beams=1, max_length=20, progress=False)
    assert 3 < tokens[0].shape[1] <= 20


def test_an_endless_word_is_cut_before_it_is_tokenized(model, tokenizer, monkeypatch):
    call, given = type(tokenizer).__call__, []

    def noted(self, texts, **options):
        given.extend(texts)
        return call(self, texts, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", noted)
    translate(model, tokenizer, ["ab" * 1_000_000], num_beams=1, max_length=20, progress=False)
    assert [len(text) for text in given] == [32 * 20]


def test_the_tokens_of_bleu_are_those_of_the_language():
    scores = [sacrebleu_scores(["我很高兴。"], [["我很高兴。"]], lang) for lang in ("zh", "zh_CN", "de")]
    assert ["tok:zh" in each["bleu_signature"] for each in scores] == [True, True, False]
    assert [each["bleu"] == pytest.approx(100) for each in scores] == [True, True, False]


def reference_files(folder: Path) -> dict:
    files = {"s": "Eins.\n\nZwei.\nDrei.\n", "t": "One.\n\nTwo.\nThree.\n", "u": "1.\n\n\n3.\n", "v": "1.\n2.\n3.\n"}
    for name, content in files.items():
        (folder / name).write_text(content)
    return {name: str(folder / name) for name in files}


def test_references_go_with_the_lines_that_the_corpus_kept(tmp_path):
    path = reference_files(tmp_path)
    data_args = DataArguments(test_source=path["s"], test_target=[path["t"], path["u"]])
    assert data_args.test_target == path["t"]
    kept = [("Eins.", "One."), ("Zwei.", "Two."), ("Drei.", "Three.")]
    assert read_references(data_args, kept) == [["One.", "Two.", "Three."], ["1.", None, "3."]]
    assert read_references(data_args, kept[:2]) == [["One.", "Two."], ["1.", None]]
    assert read_references(DataArguments(), kept) == [["One.", "Two.", "Three."]]
    with pytest.raises(InputError, match="has 4 lines and .*v has 3"):
        read_references(DataArguments(test_source=path["s"], test_target=[path["t"], path["v"]]), kept)


def test_the_table_of_translations_has_one_row_a_sentence(tmp_path):
    write_translations(tmp_path / "x.tsv", ["Ja.\tGut."], [["Yes."]], ["Yes,\tfine."])
    assert (tmp_path / "x.tsv").read_text() == "source\treference\ttranslation\nJa. Gut.\tYes.\tYes, fine.\n"
    write_translations(tmp_path / "x.tsv", ["Ja."], [["Yes."], [None]], ["Y."])
    header, row = (tmp_path / "x.tsv").read_text().splitlines()
    write_translations(tmp_path / "y.tsv", ["Ja.\r\nGut."], [["Yes.\u2028\nFine."]], ["Y."])  # JSON lines may
    assert (tmp_path / "y.tsv").read_text().splitlines()[1:] == ["Ja. Gut.\tYes.  Fine.\tY."]
    assert header == "source\treference_1\treference_2\ttranslation" and row == "Ja.\tYes.\t\tY."


# -- averaging ------------------------------------------------------------------------------------------


def stored(folder: Path, states: list[dict]) -> list[Path]:
    paths = [folder / f"checkpoint-{i}" for i in range(len(states))]
    for path, state in zip(paths, states, strict=True):
        path.mkdir()
        save_file(state, path / "model.safetensors")
    return paths


class Counting(torch.nn.Module):
    """A weight, and a buffer that counts."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
        self.register_buffer("seen", torch.tensor(0))


def test_the_sum_is_more_precise_than_the_weights_and_counts_are_the_last(tmp_path):
    values = [1.0, 1 / 256, 1 / 256, 1 / 256, 1 / 256]  # in bfloat16, 1 + 1/256 is 1
    states = [
        {"weight": torch.full((3,), value, dtype=torch.bfloat16), "seen": torch.tensor(i)}
        for i, value in enumerate(values)
    ]
    model = Counting()
    average_checkpoints_(model, stored(tmp_path, states))
    assert model.weight[0].item() == torch.tensor(sum(values) / 5, dtype=torch.bfloat16).item()
    assert model.seen.item() == 4


def test_shards_are_averaged(model, tokenizer, tmp_path):
    models = [model, *(new_marian(tokenizer, **SMALL, dropout=0.1) for _ in range(2))]
    for one, name in zip(models, "abc", strict=True):
        one.save_pretrained(tmp_path / name, max_shard_size="10KB")
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    average_checkpoints_(models[2], [tmp_path / "a", tmp_path / "b"])
    a, b, mean = (each.state_dict() for each in models)
    assert all(torch.allclose(mean[name], (a[name] + b[name]) / 2) for name in mean)


def test_other_weights_are_refused(tmp_path):
    good = {"weight": torch.zeros(3, dtype=torch.bfloat16), "seen": torch.tensor(0)}
    others = [{**good, "weight": torch.zeros(4)}, {"seen": good["seen"]}, {**good, "more": torch.zeros(1)}]
    paths = stored(tmp_path, [good, *others])
    for path, name in zip(paths[1:], ("weight", "weight", "more"), strict=True):
        with pytest.raises(InputError, match=f"{path} cannot be averaged .*: its {name}") as error:
            average_checkpoints_(Counting(), [paths[0], path])
        assert "\n" not in str(error.value)


def test_averaging_holds_one_sum_and_one_tensor(model, tmp_path, monkeypatch):
    """However many checkpoints: of all that is read, two tensors live at once (the next is read, then the last let go);
    the sum is of one model's size."""
    for i in range(4):
        model.save_pretrained(tmp_path / str(i))
    alive, most, reads = set(), 0, count()

    class Watched:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            self.open = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.open.keys()

        def get_tensor(self, name):
            nonlocal most
            tensor, number = self.open.get_tensor(name), next(reads)
            alive.add(number)
            weakref.finalize(tensor, alive.discard, number)
            most = max(most, len(alive))
            return tensor

    monkeypatch.setattr(checkpoints, "safe_open", Watched)
    average_checkpoints_(model, [tmp_path / str(i) for i in range(4)])
    assert next(reads) == 4 * len(load_file(tmp_path / "0" / "model.safetensors")) and most == 2


# -- validation -----------------------------------------------------------------------------------------


def scripted_bleu(monkeypatch, values) -> None:
    """The script's BLEU is, evaluation after evaluation, one of `values`."""
    values = iter(values)

    def scores(translations, references, target_lang):
        return {"bleu": next(values), "bleu_signature": "scripted", "chrf": 0.0, "chrf_signature": "scripted"}

    monkeypatch.setattr(wing, "sacrebleu_scores", scores)


def test_validation_has_the_scores_of_the_test(monkeypatch, tmp_path, pairs):
    lines = [json.dumps({"translation": {"de": source, "en": target}}) for source, target in pairs[:6]]
    (tmp_path / "x.json").write_text("\n".join(lines))
    files = {f"{split}_file": tmp_path / "x.json" for split in ("train", "validation", "test")}
    # the weights are those of the start, so that translations are not all empty
    options = {"learning_rate": 1e-9, "max_steps": 1, "average_checkpoints": 1, "predict_with_generate": True}
    run(monkeypatch, **files, **options, output_dir=tmp_path / "out")
    found = results(tmp_path / "out")
    for name in ("bleu", "bleu_signature", "chrf", "chrf_signature"):
        assert found[f"eval_{name}"] == found[f"test_{name}"]
    assert found["test_chrf"] > 0 and found["eval_loss"] > 0 and found["test_samples_per_second"] > 0
    rows = (tmp_path / "out" / "test_translations.tsv").read_text().splitlines()
    translations = (tmp_path / "out" / "generated_predictions.txt").read_text().splitlines()
    assert rows[1:] == ["\t".join((*pair, text)) for pair, text in zip(pairs[:6], translations, strict=True)]


def test_only_the_evaluation_of_the_trainers_own_dataset_has_scores(model, tokenizer, pairs, tmp_path):
    rows = wing.encode(pairs, tokenizer, DataArguments(max_length=40))
    args = wing.TranslationArguments(output_dir=str(tmp_path), predict_with_generate=True, report_to="none")
    trainer = wing.TranslationTrainer(
        model=model,
        args=args,
        eval_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        score_validation=lambda model: {"bleu": 7.0, "bleu_signature": "x"},
    )
    own = trainer.evaluate()
    assert own["eval_bleu"] == 7.0 and own["eval_bleu_signature"] == "x" and own["eval_loss"] > 0
    assert "eval_bleu" in trainer.state.log_history[-1] and "eval_bleu_signature" not in trainer.state.log_history[-1]
    assert not [name for name in trainer.evaluate(rows) if "bleu" in name]
    assert not [name for name in trainer.predict(rows, max_length=8).metrics if "bleu" in name]


def test_the_best_by_bleu_is_kept_and_patience_ends_the_run(monkeypatch, tmp_path, capsys):
    options = BEST | {"early_stopping_patience": 2, "max_steps": 9}
    scripted_bleu(monkeypatch, [1.0, 5.0, 2.0, 3.0, 5.0, 5.0])  # steps 1 to 4, validation at the end, test
    run(monkeypatch, **options, output_dir=tmp_path / "out")
    assert max(steps(tmp_path / "out")) == 4
    assert same_weights(tmp_path / "out", tmp_path / "out" / "checkpoint-2")
    assert is_finished(tmp_path / "out" / "checkpoint-4", 9, patience=2)
    assert not is_finished(tmp_path / "out" / "checkpoint-4", 9, patience=3)

    # Once more: nothing is trained, and the best is scored. With more patience the run goes on, and goes on counting
    scripted_bleu(monkeypatch, [5.0, 5.0])
    run(monkeypatch, **options, output_dir=tmp_path / "out")
    assert "training is finished" in capsys.readouterr().out and max(steps(tmp_path / "out")) == 4
    scripted_bleu(monkeypatch, [4.0, 5.0, 5.0])
    run(monkeypatch, **options | {"early_stopping_patience": 3}, output_dir=tmp_path / "out")
    assert "training resumes there" in capsys.readouterr().out and max(steps(tmp_path / "out")) == 5
    assert same_weights(tmp_path / "out", tmp_path / "out" / "checkpoint-2")


def test_patience_goes_on_counting_after_a_kill(monkeypatch, tmp_path):
    options = BEST | {"early_stopping_patience": 3, "max_steps": 9, "output_dir": tmp_path}
    scripted_bleu(monkeypatch, [5.0, 1.0, 1.0])
    with stopped_before(monkeypatch, step=4):
        run(monkeypatch, **options)
    scripted_bleu(monkeypatch, [1.0, 5.0, 5.0])
    run(monkeypatch, **options)
    assert max(steps(tmp_path)) == 4


def test_patience_may_come_later_and_its_last_step_is_saved(monkeypatch, tmp_path):
    options = BEST | {"save_steps": 2, "output_dir": tmp_path}
    scripted_bleu(monkeypatch, [5.0, 1.0, 5.0, 5.0])
    run(monkeypatch, **options, max_steps=2)
    scripted_bleu(monkeypatch, [1.0, 5.0, 5.0])
    run(monkeypatch, **options, max_steps=9, early_stopping_patience=1)
    assert steps(tmp_path)[-1] == 3  # no multiple of save_steps


# -- finished runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a finished run, and what its command line was."""
    with pytest.MonkeyPatch.context() as patch:
        out = tmp_path_factory.mktemp("finished")
        options = {"learning_rate": 1e-9, "max_steps": 2, "output_dir": out}
        run(patch, **options)
    return out, options


def contents(out: Path) -> dict:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_fewer_checkpoints_than_asked_for_are_told(monkeypatch, finished, capsys):
    out, options = finished
    run(monkeypatch, **options)
    assert "averaging 1 checkpoints, 5 were asked for" in capsys.readouterr().out


def test_a_finished_run_is_scored_without_training(monkeypatch, finished, pairs, tmp_path):
    out, options = finished
    before = contents(out)
    run(monkeypatch, do_train=False, output_dir=out)
    own = results(out / "test-shipped")
    assert {name: own[name] for name in ("test_bleu", "test_chrf")} == {
        name: results(out)[name] for name in ("test_bleu", "test_chrf")
    }

    for name, side in (("news.2014.de", 0), ("news.a", 1), ("news.b", 1)):
        (tmp_path / name).write_text("".join(f"{pair[side]}\n" for pair in pairs))
    files = {"test_source": tmp_path / "news.2014.de", "test_target": [tmp_path / "news.a", tmp_path / "news.b"]}
    # The rest of the command may be what it was, also where its corpus is gone
    again = options | {"train_file": "gone.json", "eval_strategy": "steps", "eval_steps": 1}
    run(monkeypatch, **again, **files, do_train=False, num_beams=1)
    found = results(out / "test-news.2014")
    assert found["test_references"] == 2 and "nrefs:2" in found["test_bleu_signature"]
    assert found["test_samples"] == TINY["max_eval_samples"]
    assert not any(name.startswith("train") for name in found)
    header = (out / "test-news.2014" / "test_translations.tsv").read_text().splitlines()[0]
    assert header == "source\treference_1\treference_2\ttranslation"
    after = contents(out)
    assert {path: after[path] for path in before} == before
    assert all(path.parent.name in ("test-shipped", "test-news.2014") for path in after.keys() - before.keys())


@pytest.mark.parametrize(
    "option, message",
    [
        ({"head_rank": 0.5}, "holds a run with --head_rank 1.0, not 0.5. Leave that out."),
        ({"learning_rate": 1.0}, "holds a run with --learning_rate 1e-09, not 1.0"),
        ({"source_lang": "en", "target_lang": "de"}, "_lang"),
        ({"target_lang": "fr"}, "--target_lang fr: the model was trained with en. Leave it out"),
        ({"model_name_or_path": "elsewhere"}, "--model_name_or_path elsewhere: nothing is trained"),
    ],
)
@pytest.mark.parametrize("use", [{"do_train": False}, {"translate": "Ja."}])
def test_a_finished_run_answers_for_no_other(monkeypatch, finished, capsys, tmp_path, use, option, message):
    out, _ = finished
    files = reference_files(tmp_path)
    given = {"test_source": files["s"], "test_target": files["t"], "output_dir": out} | use | option
    before = contents(out)
    assert message in refusal(monkeypatch, capsys, "run_translation.py", **given)
    assert contents(out) == before


def test_a_finished_run_knows_its_languages(monkeypatch, finished, tmp_path, capsys):
    out, _ = finished
    run_dir = shutil.copytree(out, tmp_path / "out")
    record = json.loads((run_dir / "run.json").read_text())
    record["arguments"] |= {"source_lang": "fr", "target_lang": "ja"}
    (run_dir / "run.json").write_text(json.dumps(record))
    (tmp_path / "news.json").write_text('{"translation": {"fr": "Oui.", "ja": "Yes.", "de": "Ja.", "en": "No."}}')
    monkeypatch.setitem(sys.modules, "MeCab", None)  # BLEU's tokens for Japanese, where they are not installed
    given = {"do_train": False, "test_file": tmp_path / "news.json", "output_dir": run_dir}
    assert "pip install sacrebleu[ja]" in refusal(monkeypatch, capsys, "run_translation.py", **given)


def test_blank_lines_of_standard_input_are_translated_as_blank(monkeypatch, finished, capsys):
    out, _ = finished
    capsys.readouterr()
    standard_input(monkeypatch, b"\nJa.\n\n")
    run(monkeypatch, translate="-", output_dir=out)
    lines = capsys.readouterr().out.removesuffix("\n").split("\n")
    assert len(lines) == 3 and lines[0] == lines[2] == ""
    standard_input(monkeypatch, b"Gr\xfcn.\n")
    error = refusal(monkeypatch, capsys, "run_translation.py", **TINY, translate="-", output_dir=out)
    assert "standard input is not UTF-8" in error


# -- refused --------------------------------------------------------------------------------------------

EVALUATED = {"eval_strategy": "steps", "eval_steps": 100, "load_best_model_at_end": True, "average_checkpoints": 1}


@pytest.mark.parametrize(
    "option, message",
    [
        ({"num_beams": 0}, "--num_beams 0: expected at least 1"),
        ({"min_length": -1}, "--min_length -1: expected at least 0"),
        ({"min_length": 41}, "--min_length 41 is above --max_length 40"),
        ({"eval_max_tokens": 0}, "--eval_max_tokens 0: expected at least 1"),
        ({"length_penalty": "nan"}, "--length_penalty nan: expected"),
        ({"length_penalty": 0.6, "num_beams": 1}, "--length_penalty chooses among beams"),
        ({"generation_num_beams": 4}, "Give --num_beams"),
        ({"generation_max_length": 20}, "Give --max_length"),
        ({"generation_config": "x"}, "--generation_config: the checkpoint has its own"),
        (EVALUATED | {"metric_for_best_model": "bleu"}, "Add --predict_with_generate"),
        (EVALUATED | {"metric_for_best_model": "bleurt"}, "bleurt: an evaluation gives bleu, chrf, loss"),
        (EVALUATED | {"early_stopping_patience": 0}, "--early_stopping_patience 0: expected at least 1"),
        (EVALUATED | {"early_stopping_patience": 1, "factorize_at": "0.5"}, "before --factorize_at"),
        ({"early_stopping_patience": 3}, "Add --load_best_model_at_end"),
        ({"early_stopping_patience": 3, "eval_strategy": "steps"}, "Add --load_best_model_at_end"),
        ({"early_stopping_patience": 3, **EVALUATED, "eval_strategy": "no"}, "eval strategy"),
        ({"do_train": False}, "no finished run"),
        ({"do_train": False, "test_source": "gone.de", "test_target": "gone.en"}, "gone.de: no such file"),
    ],
)
def test_wrong_combinations_are_one_line_before_training(monkeypatch, tmp_path, capsys, option, message):
    monkeypatch.chdir(tmp_path)
    options = TINY | {"max_steps": 1, "output_dir": "out"} | option
    assert message in refusal(monkeypatch, capsys, "run_translation.py", **options)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_wrong_files_are_one_line_before_training(monkeypatch, tmp_path, capsys):
    path = reference_files(tmp_path)
    train = {"train_source": path["s"], "train_target": path["t"], "output_dir": tmp_path / "out"}
    unequal = TINY | train | {"test_source": path["s"], "test_target": [path["t"], path["v"]]}
    assert "has 4 lines and" in refusal(monkeypatch, capsys, "run_translation.py", **unequal)
    error = refusal(monkeypatch, capsys, "run_translation.py", **TINY | train, predict_with_generate=True)
    assert "--predict_with_generate scores a validation set" in error
    monkeypatch.setitem(sys.modules, "MeCab", None)  # as where it is not installed
    japanese = TINY | train | {"target_lang": "ja"}
    assert "pip install sacrebleu[ja]" in refusal(monkeypatch, capsys, "run_translation.py", **japanese)
    assert not (tmp_path / "out").exists()


# -- two processes --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_share_the_translating_and_agree_on_the_best(monkeypatch, tmp_path):
    options = TINY | BEST | {"learning_rate": 1e-9, "early_stopping_patience": 2, "max_steps": 9}
    options |= {"max_eval_samples": 20, "eval_max_tokens": 200, "use_cpu": True}
    printed = run_on_two_processes("run_translation.py", **options, output_dir=tmp_path / "two")
    assert printed.count("chrF ") == 1
    run(monkeypatch, **options, output_dir=tmp_path / "one")
    two, one = results(tmp_path / "two"), results(tmp_path / "one")
    for name in ("eval_bleu", "eval_chrf", "test_bleu", "test_chrf"):
        assert two[name] == pytest.approx(one[name])
    predictions = [(tmp_path / name / "generated_predictions.txt").read_text() for name in ("one", "two")]
    assert predictions[0] == predictions[1] and len(predictions[0].splitlines()) == 20
    assert steps(tmp_path / "two") == steps(tmp_path / "one") and max(steps(tmp_path / "one")) == 3
