"""The translation wing: shipped corpus, readers and their errors, tokenizer, batches, scoring; and the script."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq

import fnl_hf
from fnl_hf.tasks.running import (
    InputError,
    average_checkpoints_,
    is_finished,
    last_complete_checkpoint,
    read_lines,
)
from fnl_hf.tasks.translation import corpus as corpora
from fnl_hf.tasks.translation import (
    hub_metric,
    new_marian,
    sacrebleu_scores,
    translate,
)
from fnl_hf.tasks.translation.tokenizer import train_tokenizer
from tests.formats import make_format_1
from tests.script_runs import (
    kill_and_repeat,
    leave_half_a_checkpoint,
    refusal,
    run_script,
    same_weights,
    stopped_before,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"d_model": 16, "layers": 1, "heads": 2, "ffn_dim": 32, "max_length": 40}
TINY = {
    **SMALL,
    "vocab_size": 600,
    "max_tokens": 600,
    "num_beams": 2,
    "max_train_samples": 400,
    "max_eval_samples": 8,
    "logging_steps": 4,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def shipped():
    return {split: corpora.read_pairs(corpora.shipped_text(split)) for split in corpora.SPLITS}


@pytest.fixture(scope="module")
def tokenizer(shipped):
    return train_tokenizer((text for pair in shipped["train"][:2000] for text in pair), vocab_size=600)


# -- the corpus that ships ------------------------------------------------------------------------------


def test_the_shipped_corpus_has_its_size_and_is_clean(shipped):
    assert {split: len(pairs) for split, pairs in shipped.items()} == {
        "train": 38000,
        "validation": 1000,
        "test": 1000,
    }
    data = Path(corpora.__file__).parent / "data"
    assert sum(path.stat().st_size for path in data.glob("*.xz")) <= 1_200_000
    for pairs in shipped.values():
        assert all(corpora.is_clean(*pair) and pair == tuple(map(corpora.normalize, pair)) for pair in pairs)


@pytest.mark.parametrize("side", [0, 1])
def test_no_sentence_is_in_two_splits_or_twice_in_one(shipped, side):
    marks = [corpora.fingerprint(pair[side]) for pairs in shipped.values() for pair in pairs]
    assert len(set(marks)) == len(marks)


def test_the_shipped_corpus_goes_both_ways_and_no_other(shipped):
    german, english = shipped["test"][0]
    assert corpora.read_pairs(corpora.shipped_text("test", "en", "de"), 1) == [(english, german)]
    with pytest.raises(InputError, match="de and en, not fr and en"):
        corpora.shipped_text("test", "fr", "en")


@pytest.mark.parametrize(
    "german, english, clean",
    [
        ("Ich weiß es nicht.", "I don't know it.", True),
        ("Hast du das gesehen?", "Did you see it.", False),  # marks differ
        ("Ja, das ist es.", "Yes, this is what I have always been looking for.", False),  # lengths differ
        ("Das ist 北京.", "This is Beijing.", False),
        ("Komm her.", "Come here.", False),  # too short
        ("das geht nicht.", "This does not work.", False),
    ],
)
def test_cleaning(german, english, clean):
    assert corpora.is_clean(german, english) is clean


def test_normalizing_and_one_to_one():
    assert corpora.normalize("Gru\u0308n\u00a0 ist\u00ad es.\u200b") == "Grün ist es."
    pairs = [("Geh weg.", "Go away."), ("Geh weg!", "Leave."), ("Hau ab.", "go away"), ("Bleib.", "Stay.")]
    assert corpora.one_to_one(pairs) == [("Geh weg.", "Go away."), ("Bleib.", "Stay.")]


def test_the_corpus_script_rebuilds_the_same_files_from_an_export(monkeypatch, tmp_path):
    words = ["Haus", "Baum", "Hund", "Katze", "Tisch", "Stuhl"]
    rows = [f"This is the {a} and {b}.\tDas ist {a} und {b}.\tCC-BY" for a in words for b in words]
    (tmp_path / "deu.txt").write_text("\n".join(rows), encoding="utf-8")
    for name in ("a", "b"):
        sizes = {"train": 20, "validation": 5, "test": 5}
        run_script(monkeypatch, "make_tatoeba_corpus.py", tmp_path / "deu.txt", output_dir=tmp_path / name, **sizes)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [f"tatoeba-de-en.{split}.tsv.xz" for split in ("test", "train", "validation")]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    assert len(read_lines(tmp_path / "a" / files[1])) == 20


# -- tokenizer ------------------------------------------------------------------------------------------


def test_tokenizer_gives_every_text_back_and_reloads(tokenizer, shipped, tmp_path):
    texts = [text for pair in shipped["test"][:200] for text in pair]
    texts += ['Tom\'s "Größe" – 北京, 😀 <0x41> ▁', "don't"]
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for tok in (tokenizer, reloaded):
        ids = tok(texts)["input_ids"]
        assert all(row[-1] == tok.eos_token_id and tok.unk_token_id not in row for row in ids)
        assert [text.replace("▁", " ").strip() for text in texts] == [
            text.strip() for text in tok.batch_decode(ids, skip_special_tokens=True)
        ]
        assert ids == tok(text_target=texts)["input_ids"]
    assert len(reloaded) == 600 and reloaded.pad_token_id == 0
    assert reloaded.model_max_length == tokenizer.model_max_length


def test_tokenizer_collates_for_marian(tokenizer):
    model = new_marian(tokenizer, **SMALL, dropout=0.1)
    rows = [tokenizer(source, text_target=target) for source, target in [("Ja.", "Yes, it is."), ("Gut so.", "Ok.")]]
    batch = DataCollatorForSeq2Seq(tokenizer, model=model)(rows)
    assert batch["decoder_input_ids"][:, 0].tolist() == [tokenizer.pad_token_id] * 2
    assert torch.equal(batch["decoder_input_ids"][0, 1:], batch["labels"][0, :-1])
    assert batch["attention_mask"].shape == batch["input_ids"].shape


# -- scoring --------------------------------------------------------------------------------------------


def test_translations_keep_the_order_and_do_not_depend_on_the_batch(tokenizer, shipped):
    torch.manual_seed(0)
    model = new_marian(tokenizer, **SMALL, dropout=0.1)
    sentences = [source for source, _ in shipped["test"][:6]]
    together = translate(model, tokenizer, sentences, num_beams=1, max_length=12, progress=False)
    alone = [translate(model, tokenizer, [s], num_beams=1, max_length=12, progress=False)[0] for s in sentences]
    assert together == alone
    assert translate(model, tokenizer, [], progress=False) == []


def test_sacrebleu_scores():
    scores = sacrebleu_scores(["The house is green today."], [["The house is green today."]])
    assert scores["bleu"] == pytest.approx(100) and scores["chrf"] == pytest.approx(100)
    assert "tok:13a" in scores["bleu_signature"] and "nc:6" in scores["chrf_signature"]
    assert all("version:" in scores[f"{name}_signature"] for name in ("bleu", "chrf"))
    assert sacrebleu_scores(["no"], [["The house is green today."]])["bleu"] < 1


def test_metric_errors_are_one_line(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_module_anywhere\n")
    with pytest.raises(InputError, match="cannot be loaded") as error:
        hub_metric(str(tmp_path / "broken.py"))
    assert "\n" not in str(error.value)


# -- resuming -------------------------------------------------------------------------------------------


def test_half_written_checkpoints_are_passed_over(tmp_path):
    assert last_complete_checkpoint(tmp_path / "none") is None
    assert last_complete_checkpoint(tmp_path) is None
    for step, state in [(90, '{"global_step": 90, "max_steps": 200}'), (100, '{"global_st'), (110, None)]:
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-90"
    assert [is_finished(tmp_path / "checkpoint-90", steps) for steps in (-1, 90, 200)] == [False, True, False]
    shutil.rmtree(tmp_path / "checkpoint-90")
    assert last_complete_checkpoint(tmp_path) is None  # what is left is half-written: start again
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="holds thesis.tex, but no checkpoint"):
        last_complete_checkpoint(tmp_path)


def test_averaging_checkpoints(tokenizer, tmp_path):
    models = [new_marian(tokenizer, **SMALL, dropout=0.1) for _ in range(3)]
    for model, name in zip(models, "abc", strict=True):
        model.save_pretrained(tmp_path / name)
    average_checkpoints_(models[2], [tmp_path / "a", tmp_path / "b"])
    a, b, mean = (model.state_dict() for model in models)
    assert all(torch.allclose(mean[name], (a[name] + b[name]) / 2) for name in mean)


# -- the script -----------------------------------------------------------------------------------------


def run(monkeypatch, **values):
    """Run the script in this process, as from the command line: tiny, but for what `values` say."""
    sizes = ("d_model", "layers", "heads", "ffn_dim", "vocab_size") if "model_name_or_path" in values else ()
    tiny = {name: value for name, value in TINY.items() if name not in sizes}  # a checkpoint has its own
    run_script(monkeypatch, "run_translation.py", **tiny | values)


def test_train_score_reload_and_translate(monkeypatch, tmp_path, capsys):
    metric = tmp_path / "same_length.py"
    metric.write_text(
        "import datasets\n"
        "import evaluate\n"
        "class SameLength(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        text = datasets.Value('string')\n"
        "        features = datasets.Features({'predictions': text, 'references': text})\n"
        "        return evaluate.MetricInfo(description='', citation='', features=features)\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'share': sum(len(p) == len(r) for p, r in zip(predictions, references)) / len(references)}\n"
    )
    out = tmp_path / "out"
    run(monkeypatch, max_steps=6, save_steps=3, metric=metric, output_dir=out)
    printed = capsys.readouterr().out
    assert printed.count("translation  ") == 5 and "BLEU" in printed and "tok:13a" in printed

    results = json.loads((out / "all_results.json").read_text())
    assert results["test_samples"] == 8 and 0 <= results["test_bleu"] <= 100
    assert "tok:13a" in results["test_bleu_signature"]
    assert 0 <= results["test_same_length_share"] <= 1
    assert results["train_loss"] > 0 and results["eval_loss"] > 0
    assert len((out / "generated_predictions.txt").read_text().splitlines()) == 8
    assert not list(out.rglob("*.partial"))

    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    saved = load_file(out / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in saved.items())
    sentence = "Ich habe keine Zeit."
    expected = translate(model, tokenizer, [sentence], num_beams=2, max_length=40, progress=False)
    run(monkeypatch, translate=sentence, output_dir=out)
    assert capsys.readouterr().out.splitlines()[-1:] == expected[0].splitlines()[-1:]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(sentence.encode() + b"\n")))
    run(monkeypatch, translate="-", output_dir=out)
    assert capsys.readouterr().out.splitlines()[-1:] == expected[0].splitlines()[-1:]

    options = TINY | {"max_steps": 7, "output_dir": out, "ffn_dim": 48}
    error = refusal(monkeypatch, capsys, "run_translation.py", **options)
    assert "holds a run with --ffn_dim 32, not 48. Give another --output_dir" in error

    # Once more: nothing is trained again, and the scores are those of before
    run(monkeypatch, max_steps=6, save_steps=3, output_dir=out)
    assert "training is finished" in capsys.readouterr().out
    assert json.loads((out / "all_results.json").read_text())["test_bleu"] == results["test_bleu"]


def test_own_files_and_fine_tuning(monkeypatch, tmp_path, tokenizer, shipped):
    model = new_marian(tokenizer, **SMALL, dropout=0.1)
    model.save_pretrained(tmp_path / "pretrained")
    tokenizer.save_pretrained(tmp_path / "pretrained")
    pairs = shipped["train"][:50]
    (tmp_path / "train.x").write_text("\n".join(source for source, _ in pairs))
    (tmp_path / "train.y").write_text("\n".join(target for _, target in pairs))
    lines = [json.dumps({"translation": {"xx": source, "yy": target}}) for source, target in pairs[:5]]
    (tmp_path / "test.json").write_text("\n".join(lines))
    out = tmp_path / "out"
    files = {
        "train_source": tmp_path / "train.x",
        "train_target": tmp_path / "train.y",
        "test_file": tmp_path / "test.json",
    }
    options = {"source_lang": "xx", "target_lang": "yy", "source_prefix": "x: ", "attention": "ov", "max_steps": 2}
    run(monkeypatch, **files, **options, model_name_or_path=tmp_path / "pretrained", output_dir=out)
    results = json.loads((out / "all_results.json").read_text())
    assert results["test_samples"] == 5 and "eval_loss" not in results  # no validation files were given
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tokenizer.get_vocab()


def test_more_epochs_go_on_and_a_factorized_checkpoint_stays_so(monkeypatch, tmp_path, capsys):
    options = {"max_train_samples": 60, "max_eval_samples": 2, "save_steps": 100, "average_checkpoints": 1}
    run(monkeypatch, **options, num_train_epochs=1, head_rank=2, output_dir=tmp_path / "out")
    first = json.loads((tmp_path / "out" / "all_results.json").read_text())["epoch"]
    run(monkeypatch, **options, num_train_epochs=2, head_rank=2, output_dir=tmp_path / "out")
    assert "training resumes there" in capsys.readouterr().out
    assert first == 1 and json.loads((tmp_path / "out" / "all_results.json").read_text())["epoch"] == 2
    more = {"model_name_or_path": tmp_path / "out", "max_steps": 1, "frobenius_decay": 0.01}
    run(monkeypatch, **options, **more, output_dir=tmp_path / "more")
    assert "is factorized already" in capsys.readouterr().out
    products = fnl_hf.factorizations(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "more"))
    assert {product.factors()[0].shape[-1] for product in products} == {2}


def test_a_run_that_an_earlier_version_started_resumes(monkeypatch, tmp_path, capsys):
    options = {
        "max_train_samples": 60,
        "max_eval_samples": 2,
        "save_steps": 2,
        "average_checkpoints": 1,
        "head_rank": 2,
    }
    run(monkeypatch, **options, max_steps=2, output_dir=tmp_path)
    make_format_1(tmp_path / "checkpoint-2")
    run(monkeypatch, **options, max_steps=4, output_dir=tmp_path)
    assert "training resumes there" in capsys.readouterr().out
    assert (tmp_path / "checkpoint-4").is_dir()


def test_no_sentence_is_too_long_to_translate(tokenizer):
    model = new_marian(tokenizer, **SMALL | {"max_length": 12}, dropout=0.0)
    [translation] = translate(model, tokenizer, ["Ich habe keine Zeit. " * 9], num_beams=2, progress=False)
    assert isinstance(translation, str)


@pytest.mark.parametrize("head_rank", ["1.0", "0.5"])
def test_a_resumed_run_is_the_uninterrupted_one(monkeypatch, tmp_path, head_rank):
    """Stopped in its second epoch, with a checkpoint half-written, and resumed: bit for bit the same weights."""
    options = {
        "head_rank": head_rank,
        "max_steps": 32,
        "save_steps": 10,
        "max_train_samples": 160,
        "max_eval_samples": 1,
    }
    run(monkeypatch, **options, output_dir=tmp_path / "whole")

    out = tmp_path / "stopped"
    with stopped_before(monkeypatch, step=25):
        run(monkeypatch, **options, output_dir=out)
    leave_half_a_checkpoint(out, whole=20, step=30)
    assert 1 < json.loads((out / "checkpoint-20" / "trainer_state.json").read_text())["epoch"] < 2
    run(monkeypatch, **options, output_dir=out)
    assert same_weights(out, tmp_path / "whole")


@pytest.mark.slow
def test_kill_9_and_the_same_command_again(tmp_path):
    out = tmp_path / "out"
    results = kill_and_repeat("run_translation.py", out, after=40, **TINY, max_steps=300, save_steps=20)
    assert (out / "checkpoint-300").is_dir() and "test_bleu" in results


@pytest.mark.parametrize(
    "option, message",
    [
        ({"train_file": "no.json"}, "no.json: no such file"),
        ({"train_source": "x.de"}, "go together"),
        ({"test_file": "no.json"}, "without training pairs"),
        ({"source_lang": "fr"}, "has the languages de and en"),
        ({"source_lang": "en"}, "both 'en'"),
        ({"head_rank": "half"}, "--head_rank half: not a number"),
        ({"head_rank": 0}, "head_rank is 0"),
        ({"head_rank": 9}, "head rank 9 is above its head_dim 8"),
        ({"attention": ["qk", "kq"]}, "unknown kind 'kq'"),
        ({"heads": 3}, "divisible"),
        ({"frobenius_decay_kinds": "ov", "attention": "qk"}, "ov: not a kind that is factorized"),
        ({"save_strategy": "no"}, "Add --average_checkpoints 1"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 100}, "Add --average_checkpoints 1"),
        ({"max_steps": 0}, "nothing to train"),
        ({"factorize": False, "frobenius_decay": 0.1}, "the model is dense. Add --factorize"),
        ({"model_name_or_path": "nowhere"}, "nowhere: "),
        ({"lr_scheduler_type": "zigzag"}, "zigzag"),
        ({"max_tokens": 10}, "Raise --max_tokens"),
        ({"translate": "Ja."}, "no finished run"),
        ({"metric": "no/such/metric"}, "--metric no/such/metric"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(monkeypatch, tmp_path, capsys, option, message):
    monkeypatch.chdir(tmp_path)
    options = {"max_steps": 1, "output_dir": "out"} | option
    options |= {} if "model_name_or_path" in option else {name: TINY[name] for name in TINY.keys() - options}
    assert message in refusal(monkeypatch, capsys, "run_translation.py", **options)
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.partial"))
