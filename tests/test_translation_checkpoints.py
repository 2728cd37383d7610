"""Fine-tuning checkpoints of every kind: languages, prefix, first token, labels, padding, and a run of the script."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq

import fnl_hf
from fnl_hf.tasks.running import InputError, check_same_model
from fnl_hf.tasks.translation import (
    TranslationCollator,
    prefix_of,
    sacrebleu_scores,
    set_first_token,
    set_languages,
    target_ids,
    translate,
    use_languages,
)
from fnl_hf.tasks.translation import corpus as corpora
from fnl_hf.tasks.translation.languages import language_id, languages_of
from tests.script_runs import refusal, run_script
from tests.translation_checkpoints import BUILDERS, save

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pairs():
    return corpora.read_pairs(corpora.shipped_text("train"), 300)


@pytest.fixture(scope="module")
def checkpoint(pairs, tmp_path_factory):
    """The folder of a checkpoint, made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("checkpoints"), {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save(name, (text for pair in pairs for text in pair), root / name)
        return made[name]

    return folder


def prepared(folder: Path, source: str = "de", target: str = "en"):
    """Model, tokenizer and prefix of a checkpoint, as the script has them."""
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    set_languages(tokenizer, source, target)
    prefix = prefix_of(tokenizer, model.config, source, target)
    set_first_token(model, tokenizer, prefix)
    return model.eval(), tokenizer, prefix


# What a checkpoint puts first and last on either side, what forces a language, and what decoding starts from
LAYOUT = {
    "marian": (None, "</s>", None, "</s>", None, "<pad>"),
    "multilingual_marian": (">>eng<<", "</s>", None, "</s>", None, "<pad>"),
    "fsmt": (None, "</s>", None, "</s>", None, "</s>"),
    "t5": (None, "</s>", None, "</s>", None, "<pad>"),
    "mt5": (None, "</s>", None, "</s>", None, "<pad>"),
    "mbart": (None, "de_DE", None, "en_XX", None, "en_XX"),
    "mbart50": ("de_DE", "</s>", "en_XX", "</s>", "en_XX", "</s>"),
    "m2m100": ("__de__", "</s>", "__en__", "</s>", "__en__", "</s>"),
    "nllb": ("deu_Latn", "</s>", "eng_Latn", "</s>", "eng_Latn", "</s>"),
    "bart": ("<s>", "</s>", "<s>", "</s>", None, "</s>"),
    "pegasus": (None, "</s>", None, "</s>", None, "<pad>"),
    "two_berts": ("[CLS]", "[SEP]", "[CLS]", "[SEP]", None, "[CLS]"),
}
PREFIXES = {"multilingual_marian": ">>eng<< ", "t5": "translate German to English: "}


def test_every_kind_is_here():
    assert LAYOUT.keys() == BUILDERS.keys()


@pytest.mark.parametrize("name", BUILDERS)
def test_labels_languages_and_first_tokens(name, checkpoint, pairs):
    model, tokenizer, prefix = prepared(checkpoint(name))
    source, target = pairs[0]
    ids, labels = tokenizer(prefix + source)["input_ids"], target_ids(tokenizer, [target])[0]
    first, last, target_first, target_last, forced, start = LAYOUT[name]

    def token(text):
        known = {"__de__": "de", "__en__": "en"}.get(text)
        return language_id(tokenizer, known) if known else tokenizer.convert_tokens_to_ids(text)

    assert (first is None or ids[0] == token(first)) and ids[-1] == token(last)
    assert (target_first is None or labels[0] == token(target_first)) and labels[-1] == token(target_last)
    assert model.generation_config.forced_bos_token_id == (None if forced is None else token(forced))
    assert model.generation_config.decoder_start_token_id == token(start)
    assert prefix == PREFIXES.get(name, "")
    assert tokenizer.decode(labels, skip_special_tokens=True).replace(" .", ".") == target
    assert tokenizer.unk_token_id not in labels

    features = [{"input_ids": ids, "labels": labels}, {"input_ids": ids[:5], "labels": labels[:3]}]
    batch = TranslationCollator.of(model, tokenizer)(features)
    assert batch["labels"][1].tolist() == labels[:3] + [-100] * (len(labels) - 3)
    assert batch["decoder_input_ids"][0].tolist() == [token(start), *labels[:-1]]
    assert batch["decoder_input_ids"][1][:3].tolist() == [token(start), *labels[:2]]


@pytest.mark.parametrize("name", BUILDERS)
def test_padding_is_in_no_loss(name, checkpoint, pairs):
    """The loss of a padded batch is the mean over the labels of its rows, each computed by itself."""
    model, tokenizer, prefix = prepared(checkpoint(name))
    collate = TranslationCollator.of(model, tokenizer)
    features = [
        {"input_ids": tokenizer(prefix + source)["input_ids"], "labels": target_ids(tokenizer, [target])[0]}
        for source, target in (pairs[0], max(pairs[:50], key=lambda pair: len(pair[1])))
    ]
    batch = collate(features)
    kept = batch["labels"].clone()
    with torch.no_grad():
        loss = model(**batch).loss
        sums = []
        for feature in features:
            alone = collate([feature])
            logits = model(**alone).logits
            sums.append(cross_entropy(logits[0], alone["labels"][0], reduction="sum"))
    count = sum(len(feature["labels"]) for feature in features)
    assert torch.isclose(loss, sum(sums) / count, rtol=1e-4) and torch.equal(batch["labels"], kept)


def test_the_control_stock_collation_of_fsmt_counts_padding(checkpoint, pairs):
    model, tokenizer, _ = prepared(checkpoint("fsmt"))
    features = [{"input_ids": [4, 2], "labels": [5, 6, 7, 2]}, {"input_ids": [4, 2], "labels": [5, 2]}]
    assert (DataCollatorForSeq2Seq(tokenizer, model=model)(features)["labels"] == -100).sum() == 0
    assert (TranslationCollator.of(model, tokenizer)(features)["labels"] == -100).sum() == 2


@pytest.mark.parametrize("name", BUILDERS)
def test_what_is_stored_is_all_that_others_need(name, checkpoint, pairs, tmp_path):
    model, tokenizer, prefix = prepared(checkpoint(name))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, reloaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    source, target = pairs[3]
    assert reloaded(prefix + source)["input_ids"] == tokenizer(prefix + source)["input_ids"]
    assert target_ids(reloaded, [target]) == target_ids(tokenizer, [target])
    assert (getattr(again.config, "prefix", None) or "") == prefix
    for key in ("forced_bos_token_id", "decoder_start_token_id", "pad_token_id", "eos_token_id"):
        assert getattr(again.generation_config, key) == getattr(model.generation_config, key), key


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("nllb", ("de", "en"), ("deu_Latn", "eng_Latn")),
        ("nllb", ("deu", "zh"), ("deu_Latn", "zho_Hans")),
        ("nllb", ("de_DE", "zho_Hant"), ("deu_Latn", "zho_Hant")),
        ("mbart50", ("de", "fr"), ("de_DE", "fr_XX")),
        ("mbart50", ("deu_Latn", "en-XX"), ("de_DE", "en_XX")),
        ("m2m100", ("de", "deu_Latn"), ("de", "de")),
        ("m2m100", ("pt_XX", "eng"), ("pt", "en")),
    ],
)
def test_languages_are_found_by_any_of_their_codes(name, given, expected, checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(name))
    set_languages(tokenizer, *given)
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == expected


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("nllb", ("de", "tlh"), r"--target_lang tlh: no language of .*checkpoint. It has ace_Arab, "),
        ("mbart50", ("xx", "en"), r"--source_lang xx: no language of .* It has af_ZA, ar_AR"),
        ("fsmt", ("en", "de"), "translates de to en, not en to de"),
        ("fsmt", ("de", "fr"), "translates de to en, not de to fr"),
    ],
)
def test_other_languages_are_refused_by_a_list_of_those_it_has(name, given, message, checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(name))
    with pytest.raises(InputError, match=message):
        set_languages(tokenizer, *given)


def test_marian_is_told_its_target_language_before_the_source(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("multilingual_marian"))
    assert not languages_of(tokenizer) and prefix_of(tokenizer, None, "de", "fr") == ">>fra<< "
    with pytest.raises(InputError, match="--target_lang sv: no language of .* It has eng, fra"):
        prefix_of(tokenizer, None, "de", "sv")


@pytest.mark.parametrize(
    ("name", "languages", "expected"),
    [
        ("multilingual_marian", ("de", "fra"), ">>fra<< "),
        ("t5", ("de", "fr"), ""),
        ("t5", ("de", "en"), "translate German to English: "),
    ],
)
def test_a_prefix_that_was_stored_gives_way_to_that_of_other_languages(name, languages, expected, checkpoint):
    """A checkpoint that was fine-tuned for one pair of languages is fine-tuned for another."""
    model, tokenizer, prefix = prepared(checkpoint(name))
    assert model.config.prefix == prefix == PREFIXES[name]
    assert prefix_of(tokenizer, model.config, *languages) == expected
    set_first_token(model, tokenizer, expected)
    assert model.config.prefix == expected
    model.config.prefix = "my own: "
    assert prefix_of(tokenizer, model.config, *languages) == "my own: "


def test_languages_of_a_finished_run(checkpoint):
    """Those that are given, else those that it was fine-tuned for, and not the script's defaults."""
    stored = {"source_lang": "fra_Latn", "target_lang": "spa_Latn"}
    for given, expected in (
        ({}, ("fra_Latn", "spa_Latn")),
        ({"target_lang": "it"}, ("fra_Latn", "ita_Latn")),
        ({"source_lang": "pt", "target_lang": "it"}, ("por_Latn", "ita_Latn")),
    ):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint("nllb"))
        set_languages(tokenizer, *stored.values())
        use_languages(tokenizer, {"source_lang": "de", "target_lang": "en"} | given, given, stored)
        assert (tokenizer.src_lang, tokenizer.tgt_lang) == expected
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("nllb"))
    use_languages(tokenizer, {"source_lang": "de", "target_lang": "en"}, (), {})
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("deu_Latn", "eng_Latn")


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_the_same_command_goes_on_and_then_is_finished(name, checkpoint, pairs, tmp_path, monkeypatch, capsys):
    lines = [json.dumps({"translation": {"de": source, "en": target}}) for source, target in pairs[:40]]
    (tmp_path / "pairs.json").write_text("\n".join(lines))
    options = {"train_file": tmp_path / "pairs.json", "model_name_or_path": checkpoint(name), "max_length": 60}
    options |= {"average_checkpoints": 1, "disable_tqdm": True, "head_rank": 0.5, "output_dir": tmp_path / "out"}
    run_script(monkeypatch, "run_translation.py", **options, max_steps=1)
    for stands in ("training resumes there", "training is finished"):
        run_script(monkeypatch, "run_translation.py", **options, max_steps=2)
        assert stands in capsys.readouterr().out


def test_a_config_of_two_parts_is_compared_part_by_part(checkpoint, tmp_path):
    """What saving writes into the configs of the parts is no difference; the rest is."""
    config = AutoModelForSeq2SeqLM.from_pretrained(checkpoint("two_berts")).config
    config.save_pretrained(tmp_path)
    check_same_model(config, tmp_path)
    changed = json.loads((tmp_path / "config.json").read_text())
    changed["decoder"] |= {"architectures": ["BertLMHeadModel"], "dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    check_same_model(config, tmp_path)
    changed["decoder"]["intermediate_size"] = 97
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(InputError, match=r"another decoder.intermediate_size \(97, not 96\)"):
        check_same_model(config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "head_rank"), [("marian", None), *((name, 0.5) for name in BUILDERS)])
def test_fifty_pairs_are_learned_by_heart(name, head_rank, checkpoint, pairs, tmp_path):
    model, tokenizer, prefix = prepared(checkpoint(name))
    if head_rank:
        fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=head_rank))
    chosen = pairs[:50]
    rows = [
        {"input_ids": tokenizer(prefix + source)["input_ids"], "labels": target_ids(tokenizer, [target])[0]}
        for source, target in chosen
    ]
    args = fnl_hf.FNLSeq2SeqTrainingArguments(
        output_dir=tmp_path, max_steps=280, learning_rate=8e-3, warmup_steps=20, per_device_train_batch_size=50,
        label_smoothing_factor=0.1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        lr_scheduler_type="linear", logging_steps=280,
    )  # fmt: skip
    trainer = fnl_hf.FNLSeq2SeqTrainer(
        model, args, train_dataset=rows, data_collator=TranslationCollator.of(model, tokenizer)
    )
    trainer.train()
    sources = [prefix + source for source, _ in chosen]
    translations = translate(model, tokenizer, sources, num_beams=2, max_length=60, progress=False)
    # BERT's tokenizer does not give back where there was a blank
    references = tokenizer.batch_decode([row["labels"] for row in rows], skip_special_tokens=True)
    assert sacrebleu_scores(translations, [references])["bleu"] > 90, translations[:3]


@pytest.mark.parametrize("name", ["nllb", "mbart", "m2m100", "t5", "fsmt", "multilingual_marian"])
def test_the_script_fine_tunes_and_stores_what_translating_needs(
    name, checkpoint, pairs, tmp_path, monkeypatch, capsys
):
    lines = [json.dumps({"translation": {"de": source, "en": target}}) for source, target in pairs[:40]]
    (tmp_path / "pairs.json").write_text("\n".join(lines))
    out = tmp_path / "out"
    files = {f"{split}_file": tmp_path / "pairs.json" for split in ("train", "validation", "test")}
    options = {"max_steps": 2, "max_eval_samples": 4, "head_rank": 0.5, "average_checkpoints": 1, "disable_tqdm": True}
    start = {"model_name_or_path": checkpoint(name), "max_length": 60, "num_beams": 2}
    run_script(monkeypatch, "run_translation.py", **files, **options, **start, output_dir=out)
    printed = capsys.readouterr().out
    assert "Fine-tuning with learning rate 5e-05, warmup over 5% of the steps, its own dropout." in printed
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    _, wanted, prefix = prepared(checkpoint(name))
    assert (getattr(model.config, "prefix", None) or "") == prefix == PREFIXES.get(name, "")
    assert tokenizer("Ich")["input_ids"] == wanted("Ich")["input_ids"]
    assert target_ids(tokenizer, ["I"]) == target_ids(wanted, ["I"])
    run_script(monkeypatch, "run_translation.py", translate=pairs[0][0], output_dir=out, max_length=60)
    printed = capsys.readouterr().out.rstrip("\n")
    assert model.generation_config.num_beams == 2  # what was asked for is stored
    expected = translate(model, tokenizer, [pairs[0][0]], max_length=60, prefix=prefix, progress=False)
    assert printed.splitlines()[-1:] == expected[0].splitlines()[-1:]


def test_the_script_refuses_a_language_in_one_line(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "pairs.json").write_text('{"translation": {"de": "Ich.", "tlh": "jIH."}}')
    options = {"train_file": tmp_path / "pairs.json", "target_lang": "tlh", "model_name_or_path": checkpoint("nllb")}
    error = refusal(monkeypatch, capsys, "run_translation.py", **options, output_dir=tmp_path / "out")
    assert "--target_lang tlh: no language of" in error and not (tmp_path / "out").exists()
