"""The pretraining wing: text and its errors, tokenizers, stores, blocks, masks, presets; and the script."""

import gzip
import io
import json
import lzma
import math
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import fnl_hf
from fnl_hf.tasks.pretraining import (
    SENTENCES,
    Blocks,
    FixedMasks,
    Masking,
    MLMArguments,
    MLMTrainer,
    Run,
    TokenStore,
    corpus_files,
    fingerprint,
    new_model,
    predict_masked,
    prepare_store,
    prepare_tokenizer,
    read_corpus,
    shipped_file,
    tokenizer_digest,
    train_tokenizer,
)
from fnl_hf.tasks.pretraining.model import MODEL_TYPES, SIZES
from fnl_hf.tasks.pretraining.preparation import write_store
from fnl_hf.tasks.pretraining.text import END, bounded_lines
from fnl_hf.tasks.pretraining.tokenizer import word_beginnings
from fnl_hf.tasks.running import InputError, last_complete_checkpoint, longest_input
from tests.script_runs import kill_and_repeat, refusal, run_on_two_processes, run_script, same_weights, stopped_before

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = ["The cat sat on the mat, and the dog sat on the log.", "A dog is no cat.", "Mats and logs are not dogs."] * 30
TINY = {
    "vocab_size": 200,
    "max_seq_length": 16,
    "per_device_train_batch_size": 4,
    "logging_steps": 4,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(lambda: TEXT, "wordpiece", 60)


def store_of(directory, lines, tokenizer) -> TokenStore:
    write_store(directory, lines, tokenizer)
    return TokenStore(directory)


# -- the text that ships --------------------------------------------------------------------------------


def words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def test_the_shipped_text_is_small_has_two_novels_and_not_the_sentences():
    assert sum(path.stat().st_size for path in shipped_file("train").parent.iterdir()) <= 300_000
    for split, lines, count in (("train", 2665, 120_000), ("validation", 140, 7_000)):
        read = list(read_corpus([shipped_file(split)], documents="blank_line"))
        assert read.count(END) == 2 and len(read) == lines + 2
        text = words(" ".join(line for line in read if line is not END))
        assert abs(len(text.split()) - count) < 0.05 * count
        for sentence in SENTENCES:
            before, after = map(words, sentence.split("[MASK]"))
            assert not re.search(rf"\b{before} \w+ {after}\b", text)


def test_the_demo_script_rebuilds_the_same_files(monkeypatch, tmp_path):
    novels = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for novel in novels:
        novel.write_bytes("\ufeffTITLE\r\n\r\n* * *\r\n".encode() + b"Some  words here.\r\n" * 38 + b"The end.")
    for name in ("one", "two"):
        run_script(monkeypatch, "make_mlm_demo.py", *novels, output_dir=tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["novels.train.txt.xz", "novels.validation.txt.xz"]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    train = list(bounded_lines(tmp_path / "one" / files[0], 100))
    assert train == (["TITLE", *["Some words here."] * 37, ""] * 2)[:-1]


# -- reading --------------------------------------------------------------------------------------------


def test_the_text_of_the_comparison_is_made_from_archives(monkeypatch, tmp_path, capsys):
    (tmp_path / "Novel_1900.txt").write_bytes(b"One line.\r\nAnother.\r\n")
    with tarfile.open(tmp_path / "novels.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "Novel_1900.txt", "novels/Novel_1900.txt")
    (tmp_path / "wiki.txt.xz").write_bytes(lzma.compress(b" = Title = \n"))
    answer = {"text": "cat", "answer_start": 4}
    articles = [
        {"paragraphs": [{"context": "The cat\nsat.", "qas": [{"id": f"{i}", "question": "Who?", "answers": [answer]}]}]}
        for i in range(5)
    ]
    (tmp_path / "squad.json").write_text(json.dumps({"data": articles}))
    sources = {"novels": tmp_path / "novels.tar.xz", "wikitext": tmp_path / "wiki.txt.xz"}
    sources |= {"squad": tmp_path / "squad.json", "squad_dev": tmp_path / "squad.json"}
    run_script(monkeypatch, "make_pretraining_text.py", **sources, output_dir=tmp_path / "data")
    texts = {path.name: path.read_bytes() for path in (tmp_path / "data" / "text").iterdir()}
    assert texts == {
        "Novel_1900.txt": b"One line.\nAnother.\n",
        "squad_contexts.txt": b"The cat sat.\n",  # once, on a line
        "wikitext2.txt": b" = Title = \n",
    }
    assert json.loads((tmp_path / "data" / "squad_dev.json").read_text())["data"] == [articles[0], articles[4]]
    broken = sources | {"novels": tmp_path / "squad.json", "output_dir": tmp_path / "none"}
    assert "not a readable archive" in refusal(monkeypatch, capsys, "make_pretraining_text.py", **broken)


def write_all_kinds(folder: Path, texts: list[str]) -> list[Path]:
    """The same documents as text, JSON lines, parquet, arrow and a saved dataset."""
    folder.mkdir()
    with gzip.open(folder / "a.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\ufeff" + "\r\n\r\n".join(texts))
    with lzma.open(folder / "b.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    table = Dataset.from_dict({"text": texts})
    table.to_parquet(str(folder / "c.parquet"))
    table.save_to_disk(str(folder / "saved"))
    (folder / "saved" / "data-00000-of-00001.arrow").rename(folder / "d.arrow")
    table.save_to_disk(str(folder / "saved"))
    (folder / "notes.pdf").write_bytes(b"%PDF")
    return [folder / name for name in ("a.txt.gz", "b.jsonl.xz", "c.parquet", "d.arrow", "saved")]


def test_all_kinds_of_files_give_the_same_lines_and_documents(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = ["Grüße.\n\n  Zweite Zeile. ", "Ende!"]
    expected = ["Grüße.", "Zweite Zeile.", END, "Ende!", END]
    text, *others = write_all_kinds(tmp_path / "corpus", texts)
    for path in others:
        assert list(read_corpus(corpus_files([path]))) == expected
    assert list(read_corpus([text])) == [line for line in expected[:-1] if line] + [END]  # a file is one document
    lines = list(read_corpus([text], documents="blank_line"))
    assert [line for line in lines if line] == [line for line in expected if line]
    assert list(read_corpus(corpus_files([tmp_path / "corpus"]))).count("Ende!") == 5


def test_a_line_at_the_limit_is_read_and_one_above_it_is_not(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("ab\n" + "x" * 10 + "\n" + "y" * 10)
    assert list(bounded_lines(path, 10)) == ["ab", "x" * 10, "y" * 10]
    with pytest.raises(InputError, match="line 2: longer than 9 characters. .* --max_line_length"):
        list(bounded_lines(path, 9))


def test_a_line_longer_than_memory_is_refused_before_it_is_read(tmp_path):
    """256 MB of one line, compressed: reading it all would show."""
    import resource

    path = tmp_path / "long.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(16):
            file.write(b"x" * (1 << 24))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="longer than 16000000 characters"):
        list(read_corpus([path]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # KB


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.jsonl", b'{"text": "a"}\n{"txt": "a"}', 'line 2: expected {"text"'),
        ("x.jsonl", b'{"text": "a"}\n{"text": 3}', "line 2: 'text' is 3, not text"),
        ("x.json", b"[1]", "line 1: expected"),
        ("x.json", b"{\n", "line 1: expected"),
        ("x.jsonl", b'{"text": "a \\ud800"}', "a lone surrogate"),
        ("x.jsonl", b"[" * 100_000, "nested too deeply"),
        ("x.txt", b"fine\n\xff\xfe", "line 2: not a readable UTF-8"),
        ("x.txt.gz", b"not gzip", "not a readable UTF-8"),
        ("x.txt.xz", b"not xz", "not a readable UTF-8"),
        ("x.parquet", b"not parquet", "datasets cannot read it"),
        ("x.arrow", b"not arrow", "datasets cannot read it"),
        ("folder/x.pdf", b"", "no text in this folder"),
    ],
)
def test_reading_errors(tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        list(read_corpus(corpus_files([tmp_path / Path(name).parts[0]])))
    assert message in str(error.value) and "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_tables_errors(tmp_path):
    Dataset.from_dict({"body": ["a"]}).to_parquet(str(tmp_path / "a.parquet"))
    Dataset.from_dict({"text": ["a", None]}).save_to_disk(str(tmp_path / "b"))
    with pytest.raises(InputError, match="no column 'text', only body. Set --text_column"):
        list(read_corpus([tmp_path / "a.parquet"]))
    with pytest.raises(InputError, match="row 2: 'text' is None, not text"):
        list(read_corpus([tmp_path / "b"]))
    with pytest.raises(InputError, match="no such file"):
        corpus_files([tmp_path / "none"])


# -- tokenizers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert"])
def test_a_trained_tokenizer_reloads_beside_any_model_and_is_the_same_again(tmp_path, kind, model_type):
    token_types = model_type == "bert"
    made = [train_tokenizer(lambda: TEXT, kind, 300, token_types=token_types) for _ in range(2)]
    assert tokenizer_digest(made[0]) == tokenizer_digest(made[1])
    made[0].save_pretrained(tmp_path)
    new_model(model_type, "tiny", made[0]).save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_digest(reloaded) == tokenizer_digest(made[0]) and len(reloaded) <= 300
    encoded = reloaded(["A cat, a mat.", "Größe 北京 😀"], ["A log.", "No."], padding=True)
    assert dict(encoded) == dict(made[0](["A cat, a mat.", "Größe 北京 😀"], ["A log.", "No."], padding=True))
    assert ("token_type_ids" in encoded) == token_types
    for ids in encoded["input_ids"]:
        assert ids[0] == reloaded.cls_token_id and ids.count(reloaded.sep_token_id) == (2 if token_types else 3)
    if kind == "bpe":
        assert (
            reloaded.decode(reloaded("Größe 北京 😀", add_special_tokens=False)["input_ids"]).strip() == "Größe 北京 😀"
        )
        with pytest.raises(InputError, match="alphabet alone are 261"):
            train_tokenizer(lambda: TEXT, "bpe", 261)


def test_a_mask_in_bpe_text_takes_its_blank():
    bpe = train_tokenizer(lambda: TEXT, "bpe", 300)
    ids = bpe(f"The cat {bpe.mask_token} on", add_special_tokens=False)["input_ids"]
    assert [token.strip("Ġ") for token in bpe.convert_ids_to_tokens(ids)] == ["The", "cat", bpe.mask_token, "on"]


def test_word_beginnings(tokenizer):
    bpe = train_tokenizer(lambda: TEXT, "bpe", 300)
    for tok, tokens, expected in (
        (tokenizer, ["s", "##a", ",", "##t", "."], [True, False, True, False, True]),
        (bpe, ["Ġthe", "s", ",", "Ġ", "."], [True, False, False, True, False]),
    ):
        ids = tok.convert_tokens_to_ids(tokens)
        assert tok.convert_ids_to_tokens(ids) == tokens and [word_beginnings(tok)[i] for i in ids] == expected


def test_word_beginnings_are_told_by_most_of_the_vocabulary(tokenizer):
    odd = train_tokenizer(lambda: [*TEXT, "▁▂ Ġgant"], "wordpiece", 70)  # signs of the other kind in a text
    assert any(token.startswith(("▁", "Ġ")) for token in odd.get_vocab())
    ids = odd.convert_tokens_to_ids(["s", "##a", "##t"])
    assert [word_beginnings(odd)[i] for i in ids] == [True, False, False]
    plain = Tokenizer(models.WordLevel({"[UNK]": 0, "cat": 1}, unk_token="[UNK]"))
    with pytest.raises(InputError, match="--whole_word_mask: the tokenizer marks neither"):
        word_beginnings(PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]"))


# -- stores and blocks ----------------------------------------------------------------------------------


def test_a_store_holds_every_document_and_its_separator(tmp_path, tokenizer):
    lines = ["a cat", "a dog", END, END, "no log.", END]
    store = store_of(tmp_path / "store", lines, tokenizer)
    sep = tokenizer.sep_token_id
    first = tokenizer("a cat a dog", add_special_tokens=False)["input_ids"]
    second = tokenizer("no log.", add_special_tokens=False)["input_ids"]
    assert store.tokens.tolist() == [*first, sep, *second, sep] and store.tokens.dtype == np.uint16
    assert store.ends.tolist() == [len(first), len(first) + 1 + len(second)]


def test_words_of_two_lines_stay_two_words(tmp_path):
    """RoBERTa's tokenizer, unlike ours, takes a line's first word for the rest of the word before."""
    roberta = train_tokenizer(lambda: TEXT, "bpe", 300)
    roberta.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert roberta.tokenize("a") == ["a"] and roberta.tokenize(" a") == ["Ġa"]
    store = store_of(tmp_path / "store", ["a cat", "a dog", END], roberta)
    assert store.tokens[:-1].tolist() == roberta(" a cat a dog", add_special_tokens=False)["input_ids"]


def test_long_lines_are_tokenized_in_pieces_without_a_seam(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("fnl_hf.tasks.pretraining.preparation._PIECE", 11)
    monkeypatch.setattr("fnl_hf.tasks.pretraining.preparation._BATCH", 40)
    for name, tok in (("wp", tokenizer), ("bpe", train_tokenizer(lambda: TEXT, "bpe", 300))):
        line = "the cat sat on the mat and the dog is no cat"
        store = store_of(tmp_path / name, [line, END], tok)
        assert store.tokens[:-1].tolist() == tok(line, add_special_tokens=False)["input_ids"]


def test_blocks_are_full_or_respect_documents(tmp_path, tokenizer):
    store = store_of(tmp_path / "store", [TEXT[0], END, TEXT[1], END, TEXT[0], TEXT[2], END], tokenizer)
    tokens = np.asarray(store.tokens)
    full = Blocks(store, 8, tokenizer)
    assert len(full) == len(tokens) // 6
    assert np.array_equal(np.concatenate([block[1:-1] for block in full]), tokens[: len(full) * 6])
    assert all(block[0] == tokenizer.cls_token_id and block[-1] == tokenizer.sep_token_id for block in full)

    own = Blocks(store, 8, tokenizer, respect_documents=True)
    assert np.array_equal(
        np.concatenate([block[1:-1] for block in own]), tokens[tokens != tokenizer.sep_token_id]
    )  # nothing is lost
    sizes = np.diff([0, *(store.ends + 1)]) - 1
    assert len(own) == sum(-(-size // 6) for size in sizes)
    with pytest.raises(InputError, match="are not one block of 500. .* lower --max_seq_length"):
        Blocks(store, 500, tokenizer)

    cut = 20  # held out: the parts share nothing and lose nothing
    parts = [Blocks(store, 8, tokenizer, True, end=cut), Blocks(store, 8, tokenizer, True, start=cut)]
    both = np.concatenate([block[1:-1] for part in parts for block in part])
    assert np.array_equal(both, tokens[tokens != tokenizer.sep_token_id])


class FakeBlocks(list):
    padded = False


def test_a_run_shuffles_every_pass_anew_and_depends_on_seed_and_position_alone():
    short, long = FakeBlocks(range(10)), FakeBlocks(range(100, 104))
    run = Run([short, long], [25, 6], seed=1)
    order = [run[p]["input_ids"] for p in range(len(run))]
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10)) and order[:10] != order[10:20]
    assert all(i < 10 for i in order[:25]) and sorted(order[25:29]) == list(long)
    assert [run[p]["input_ids"] for p in reversed(range(31))] == order[::-1]
    assert [run[p]["position"] for p in (0, 30)] == [0, 30]
    assert [Run([short], [25], seed=2)[p]["input_ids"] for p in range(10)] != order[:10]
    assert run.passes == 2.5 + 1.5


# -- preparing ------------------------------------------------------------------------------------------


def test_interrupted_preparation_starts_again_cleanly(tmp_path, tokenizer):
    def read():
        yield from ["A cat.", END]
        if interrupted:
            raise KeyboardInterrupt
        yield from ["A log.", END]

    directory = tmp_path / "prepared" / "key"
    interrupted = True
    with pytest.raises(KeyboardInterrupt):
        prepare_store(directory, read, tokenizer)
    assert [path.name for path in directory.parent.iterdir()] == ["key.lock"]
    directory.with_suffix(".partial").mkdir()  # as if killed: nothing could be removed
    (directory.with_suffix(".partial") / "tokens.uint32").write_bytes(b"half")
    interrupted = False
    store = prepare_store(directory, read, tokenizer)
    expected = tokenizer("A cat.")["input_ids"][1:] + tokenizer("A log.")["input_ids"][1:]
    assert store.tokens.tolist() == expected
    assert sorted(path.name for path in directory.parent.iterdir()) == ["key", "key.lock"]

    def unused():
        raise AssertionError("read again")

    assert prepare_store(directory, unused, tokenizer).tokens.tolist() == expected
    with pytest.raises(InputError, match="the validation files hold no text"):
        prepare_store(tmp_path / "none", lambda: [END, END], tokenizer, "validation")
    saved = prepare_tokenizer(tmp_path / "tokenizer", lambda: tokenizer)
    assert (
        tokenizer_digest(saved)
        == tokenizer_digest(tokenizer)
        == tokenizer_digest(prepare_tokenizer(tmp_path / "tokenizer", unused))
    )


def test_a_fingerprint_changes_with_files_and_options(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("a")
    first = fingerprint([path], documents="file")
    assert first == fingerprint([path], documents="file")
    assert first != fingerprint([path], documents="blank_line")
    path.write_text("ab")
    assert first != fingerprint([path], documents="file")


# -- masks ----------------------------------------------------------------------------------------------


def many_examples(tokenizer, rows=400, length=32):
    ids = np.random.default_rng(0).integers(5, len(tokenizer), (rows, length))
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    return [{"position": i, "input_ids": row} for i, row in enumerate(ids)]


@pytest.mark.parametrize("whole_words", [False, True])
def test_fifteen_percent_are_labels_and_of_these_80_10_10(tokenizer, whole_words):
    examples = many_examples(tokenizer)
    batch = Masking(tokenizer, whole_words=whole_words)(examples)
    ids = torch.tensor(np.stack([example["input_ids"] for example in examples]))
    chosen = batch["labels"] != -100
    assert not chosen[:, [0, -1]].any()
    assert torch.equal(batch["labels"][chosen], ids[chosen])
    assert torch.equal(batch["input_ids"][~chosen], ids[~chosen])
    assert chosen[:, 1:-1].float().mean() == pytest.approx(0.15, abs=0.015)
    new = batch["input_ids"][chosen]
    masked = (new == tokenizer.mask_token_id).float().mean()
    kept = (new == ids[chosen]).float().mean()
    assert masked == pytest.approx(0.8, abs=0.03)
    assert kept == pytest.approx(0.1, abs=0.03)
    if whole_words:
        begins = torch.tensor(word_beginnings(tokenizer))[ids]
        begins[:, 1] = True  # the first token of a block, whatever it is
        assert torch.equal(chosen[:, 2:-1][~begins[:, 2:-1]], chosen[:, 1:-2][~begins[:, 2:-1]])


def test_masks_are_a_function_of_seed_and_position_alone(tokenizer):
    examples = many_examples(tokenizer, rows=4)

    def labels(seed, position):
        torch.rand(3)  # another state of torch's generator
        state = torch.get_rng_state()
        batch = Masking(tokenizer, seed=seed)([{**examples[0], "position": position}, *examples[1:]])
        assert torch.equal(torch.get_rng_state(), state)
        return batch["labels"].tolist()

    assert labels(1, 8) == labels(1, 8)
    assert labels(1, 8) != labels(1, 12)
    assert labels(1, 8) != labels(2, 8)


def test_short_examples_are_padded_and_their_padding_is_no_label(tokenizer):
    rows = [np.array([2, *[7] * n, 3]) for n in (3, 20)]
    batch = Masking(tokenizer, probability=0.99, pad=True)([{"position": 0, "input_ids": row} for row in rows])
    assert batch["attention_mask"].sum(1).tolist() == [5, 22] and batch["labels"].shape == (2, 22)
    assert (batch["labels"][0, 4:] == -100).all() and (batch["labels"][1] != -100).sum() > 15


def test_validation_masks_are_fixed_and_its_loss_is_the_mean_over_labels(tmp_path, tokenizer):
    store = store_of(tmp_path / "store", [*TEXT, END], tokenizer)
    fixed = FixedMasks(Blocks(store, 16, tokenizer), tokenizer, limit=11)
    assert len(fixed) == 11 and all(torch.equal(fixed[3][name], fixed[3][name]) for name in fixed[3])
    model = new_model("bert", "tiny", tokenizer, dropout=0.0)
    batch = {name: torch.stack([example[name] for example in fixed]) for name in fixed[0]}
    with torch.no_grad():
        expected = model.eval()(**batch).loss.item()
    assert fixed.labels == batch["labels"].ne(-100).sum()
    for size, at_masks in ((3, True), (3, False), (8, True)):
        args = MLMArguments(
            output_dir=str(tmp_path), per_device_eval_batch_size=size, head_at_masks=at_masks, disable_tqdm=True,
            report_to="none",
        )  # fmt: skip
        trainer = MLMTrainer(model, args, data_collator=Masking(tokenizer, seed=size), eval_dataset=fixed)
        for multiple in (1, 2 * size):  # as for one process and for two
            fixed.fill_up(multiple)
            assert len(fixed) % multiple == 0
            assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    other = FixedMasks(fixed.blocks, tokenizer, limit=3)
    batch = {name: torch.stack([example[name] for example in other]) for name in other[0]}
    with torch.no_grad():
        expected = model(**batch).loss.item()
    assert trainer.evaluate(other)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    torch.nn.init.constant_(model.cls.predictions.bias, torch.nan)
    assert math.isnan(trainer.evaluate()["eval_loss"])  # a run that diverged is no perfect one


# -- models and their trainer ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_type, size, shape",
    [
        ("bert", "tiny", (2, 128, 2, 512)),
        ("bert", "mini", (4, 256, 4, 1024)),
        ("bert", "small", (4, 512, 8, 2048)),
        ("bert", "medium", (8, 512, 8, 2048)),
        ("bert", "base", (12, 768, 12, 3072)),
        ("roberta", "large", (24, 1024, 16, 4096)),
        ("electra", "small", (12, 256, 4, 1024)),
        ("modernbert", "base", (22, 768, 12, 1152)),
        ("modernbert", "large", (28, 1024, 16, 2624)),
        ("modernbert", "mini", (4, 256, 4, 384)),
    ],
)
def test_presets(tokenizer, model_type, size, shape):
    with torch.device("meta"):
        model = new_model(model_type, size, tokenizer)
    config = model.config
    assert shape == (
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
    )
    assert longest_input(model.config) == (8192 if model_type == "modernbert" else 512)


def test_bert_base_has_the_published_parameters():
    """110 million with pooler; 109.5 million as a masked language model with 30,522 tokens."""
    with torch.device("meta"):
        expected = BertForMaskedLM(BertConfig()).num_parameters()

        class Published:
            pad_token_id, cls_token_id, sep_token_id, bos_token_id, eos_token_id = 0, 101, 102, None, None

            def __len__(self):
                return 30522

        assert new_model("bert", "base", Published()).num_parameters() == expected
    assert set(SIZES) == {"tiny", "mini", "small", "medium", "base", "large"}


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_type_takes_a_full_block_and_the_head_at_masks_gives_the_same_step(tmp_path, model_type, kind):
    tok = train_tokenizer(lambda: TEXT, kind, 300)
    model = new_model(model_type, "tiny", tok, dropout=0.0)
    fnl_hf.factorize(model, fnl_hf.FNLConfig())
    ids = np.random.default_rng(0).integers(
        5, len(tok), (2, longest_input(model.config) if model_type != "modernbert" else 300)
    )
    batch = Masking(tok)([{"position": 0, "input_ids": row} for row in ids])
    losses, gradients = [], []
    for at_masks in (False, True):
        args = MLMArguments(output_dir=str(tmp_path), head_at_masks=at_masks, report_to="none")
        trainer = MLMTrainer(model, args, data_collator=Masking(tok))
        model.zero_grad()
        labels = batch["labels"].ne(-100).sum()
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=labels)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6)


def test_predictions_are_the_likeliest_of_every_mask(tokenizer):
    model = new_model("bert", "tiny", tokenizer, dropout=0.1)
    guesses = predict_masked(model, tokenizer, "The [MASK] sat on the [MASK].", top=3)
    assert len(guesses) == 2 and all(len(row) == 3 for row in guesses)
    ids = tokenizer("The [MASK] sat on the [MASK].", return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**ids).logits[0, 2]
    logits[tokenizer.all_special_ids] = -torch.inf
    assert guesses[0][0][0] == tokenizer.decode([int(logits.argmax())])
    assert guesses[0][0][1] == pytest.approx(logits.softmax(0).max().item())
    with pytest.raises(InputError, match="nothing to predict. Write"):
        predict_masked(model, tokenizer, "The cat.")
    with pytest.raises(InputError, match="more than the 512"):
        predict_masked(model, tokenizer, "[MASK] " * 600)


# -- the script -----------------------------------------------------------------------------------------


def run(monkeypatch, **values):
    """Run the script in this process, as from the command line: tiny, but for what `values` say."""
    usual = TINY | {"vocab_size": None} if "model_name_or_path" in values else TINY  # a checkpoint has its own
    run_script(monkeypatch, "run_mlm.py", **usual | values)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(TEXT))
    return path


def test_train_evaluate_reload_and_predict(monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    run(monkeypatch, max_steps=4, output_dir=out, max_eval_samples=20)
    printed = capsys.readouterr().out
    assert all(f"{sentence}\n  " in printed for sentence in SENTENCES)
    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_perplexity"] == pytest.approx(math.exp(results["eval_loss"]))
    assert results["train_loss"] > 0 and results["eval_labels"] > 20
    assert results["run_seconds"] > 0 and results["run_peak_memory_gb"] > 0.05

    model, tokenizer = AutoModelForMaskedLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert fnl_hf.factorizations(model)
    [expected] = predict_masked(model, tokenizer, "The [MASK] sat.", top=2)
    run(monkeypatch, predict="The [MASK] sat.", top=2, output_dir=out)
    line = "  ".join(f"{token} {probability:.3f}" for token, probability in expected)
    assert capsys.readouterr().out.splitlines()[-2:] == ["The [MASK] sat.", f"  {line}"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The [MASK] sat.\n")))
    run(monkeypatch, predict="-", top=2, output_dir=out)
    assert capsys.readouterr().out.splitlines()[-1] == f"  {line}"

    # Once more: nothing is trained again, and the loss is that of before, also in other batches
    run(monkeypatch, max_steps=4, output_dir=out, max_eval_samples=20, per_device_eval_batch_size=7)
    assert "training is finished" in capsys.readouterr().out
    again = json.loads((out / "all_results.json").read_text())
    assert again["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-5)

    # Another variant on the same text: nothing is tokenized again, and the labels are the same
    run(monkeypatch, max_steps=2, output_dir=tmp_path / "half", head_rank=0.5, seed=3, max_eval_samples=20)
    assert len(list((tmp_path / "prepared").glob("*.lock"))) == 3  # tokenizer, train, validation
    other = json.loads((tmp_path / "half" / "all_results.json").read_text())
    assert other["eval_labels"] == results["eval_labels"]


@pytest.mark.parametrize(
    "options",
    [
        {"phase2_steps": 4, "phase2_seq_length": 40, "dropout": 0.1},
        {"head_rank": 0.5, "whole_word_mask": True, "gradient_accumulation_steps": 2, "respect_documents": True},
        {"model_type": "bert", "dataloader_num_workers": 1, "dropout": 0.1},
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(monkeypatch, tmp_path, corpus, options):
    """Stopped, in the first phase and in the second, and resumed: bit for bit the same weights."""
    options = {"max_steps": 12, "save_steps": 3, "train_file": corpus, "vocab_size": 300, **options}
    run(monkeypatch, **options, output_dir=tmp_path / "whole")
    out = tmp_path / "stopped"
    for step in (6, 11) if "phase2_steps" in options else (9,):
        with stopped_before(monkeypatch, step):
            run(monkeypatch, **options, output_dir=out)
    run(monkeypatch, **options, output_dir=out)
    assert same_weights(out, tmp_path / "whole")


def test_a_finished_run_keeps_its_best_model(monkeypatch, tmp_path, corpus):
    options = {"train_file": corpus, "output_dir": tmp_path / "out", "max_steps": 6, "warmup_steps": 0}
    options |= {"save_steps": 2, "eval_steps": 2, "eval_strategy": "steps", "load_best_model_at_end": True}
    options |= {"learning_rate": 0.5, "save_total_limit": 5}  # so that the first is the best
    run(monkeypatch, **options)
    state = json.loads((tmp_path / "out" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith("checkpoint-2")
    assert same_weights(tmp_path / "out", tmp_path / "out" / "checkpoint-2")
    run(monkeypatch, **options)
    assert same_weights(tmp_path / "out", tmp_path / "out" / "checkpoint-2")


def test_continuing_a_checkpoint_and_epochs(monkeypatch, tmp_path, corpus, capsys):
    tokenizer = train_tokenizer(lambda: TEXT, "bpe", 300, token_types=False)
    model = new_model("roberta", "tiny", tokenizer, dropout=0.0)
    model.save_pretrained(tmp_path / "pretrained")
    tokenizer.save_pretrained(tmp_path / "pretrained")
    options = {"train_file": corpus, "learning_rate": 2e-7, "fnl_optim": "none", "warmup_steps": 0}
    run(
        monkeypatch, **options, model_name_or_path=tmp_path / "pretrained", attention="ov", max_steps=-1,
        num_train_epochs=1, output_dir=tmp_path / "out",
    )  # fmt: skip
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert 1 <= results["train_passes"] < 1.2
    continued = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    ids = tokenizer("A cat.", return_tensors="pt")
    with torch.no_grad():  # spectral factors keep the products: the same function
        assert torch.allclose(model.eval()(**ids).logits, continued(**ids).logits, atol=1e-3)

    run(monkeypatch, **options, model_name_or_path=tmp_path / "out", max_steps=2, output_dir=tmp_path / "more")
    assert "is factorized already" in capsys.readouterr().out
    assert {p.kind for p in fnl_hf.factorizations(AutoModelForMaskedLM.from_pretrained(tmp_path / "more"))} == {"ov"}


def test_a_run_resumes_with_its_own_tokenizer_and_not_as_another_model(monkeypatch, tmp_path, corpus, capsys):
    options = {"train_file": corpus, "save_steps": 1, "output_dir": tmp_path / "out"}
    run(monkeypatch, **options, max_steps=2)
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    (tmp_path / "out" / "run.json").unlink()  # as of an earlier version
    run(monkeypatch, **options, vocab_size=100, max_steps=3)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == vocabulary
    (tmp_path / "out" / "run.json").unlink()
    dense = TINY | options | {"factorize": False, "max_steps": 4}
    assert "of a factorized model, and this one is dense" in refusal(monkeypatch, capsys, "run_mlm.py", **dense)
    error = refusal(monkeypatch, capsys, "run_mlm.py", **TINY, **options, dropout=0.2, max_steps=4)
    assert "another attention_dropout (0.0, not 0.2)" in error


def test_folders_of_logs_are_not_in_the_way_of_a_run(tmp_path):
    (tmp_path / "runs").mkdir()
    assert last_complete_checkpoint(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds config.json, but no checkpoint"):
        last_complete_checkpoint(tmp_path)


def make_bad_inputs(folder: Path) -> None:
    """What the parametrization below names."""
    tokenizer = train_tokenizer(lambda: TEXT, "wordpiece", 60)
    new_model("bert", "tiny", tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    train_tokenizer(lambda: [*TEXT, "Quiz xyz fjvp"], "wordpiece", 90).save_pretrained(folder / "larger")
    train_tokenizer(lambda: TEXT[:1], "bpe", 262).save_pretrained(folder / "bpe")
    tokenizer.mask_token = None
    tokenizer.save_pretrained(folder / "maskless")
    (folder / "good.txt").write_text("\n".join(TEXT))
    (folder / "empty.txt").write_text("\n \n\n")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "long.txt").write_text("x" * 200)
    (folder / "short.txt").write_text("One.")


@pytest.mark.parametrize(
    "option, message",
    [
        ({"train_file": "no.txt"}, "no.txt: no such file"),
        ({"train_file": "empty.txt"}, "the training files hold no text"),
        ({"train_file": "good.txt", "validation_file": "empty.txt"}, "the validation files hold no text"),
        ({"train_file": "binary.txt"}, "binary.txt, line 1: not a readable UTF-8"),
        ({"train_file": "long.txt", "max_line_length": 100}, "long.txt, line 1: longer than 100 characters"),
        ({"train_file": "short.txt"}, "not one block of 16"),
        ({"validation_file": "good.txt"}, "without --train_file"),
        ({"validation_split_percentage": 100}, "--validation_split_percentage 100"),
        ({"mlm_probability": 0}, "--mlm_probability 0"),
        ({"max_seq_length": 2}, "above 2"),
        ({"phase2_steps": 9}, "--phase2_steps 9"),
        ({"max_steps": 0}, "nothing to train"),
        ({"max_eval_samples": 0}, "--max_eval_samples 0"),
        ({"optim": "sgd"}, "--optim sgd and --fnl_optim lamb. Add --fnl_optim none"),
        ({"save_strategy": "epoch"}, "--save_strategy epoch: a run is one epoch"),
        ({"resume_from_checkpoint": "x"}, "--resume_from_checkpoint: a run resumes from the last"),
        ({"auto_find_batch_size": True}, "--auto_find_batch_size: the steps"),
        ({"save_only_model": True}, "--save_only_model: a run resumes"),
        ({"factorize": False, "frobenius_decay": 0.1}, "the model is dense. Add --factorize"),
        ({"factorize": False, "factorize_at": 0.5}, "Drop --no_factorize"),
        (
            {"train_file": "good.txt", "tokenizer_type": "bpe"},
            "--vocab_size 200: special tokens and alphabet alone are 261",
        ),
        ({"model_name_or_path": "model", "tokenizer_name": "larger"}, "has embeddings of"),
        ({"model_name_or_path": "model", "tokenizer_name": "bpe"}, "has embeddings of"),
        ({"model_name_or_path": "model", "tokenizer_name": "maskless"}, "has no mask token"),
        ({"model_name_or_path": "model", "max_seq_length": 600}, "takes at most 512 tokens, and 600 are asked for"),
        ({"model_name_or_path": "nowhere"}, "nowhere: "),
        ({"head_rank": "half"}, "--head_rank half: not a number"),
        ({"head_rank": 65}, "head rank 65 is above its head_dim 64"),
        ({"attention": ["qk", "kq"]}, "unknown kind 'kq'"),
        ({"frobenius_decay_kinds": "ov", "attention": "qk"}, "ov: not a kind that is factorized"),
        ({"lr_scheduler_type": "zigzag"}, "zigzag"),
        ({"predict": "A [MASK]."}, "no finished run"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(monkeypatch, tmp_path, capsys, option, message):
    monkeypatch.chdir(tmp_path)
    make_bad_inputs(tmp_path)
    options = TINY | {"max_steps": 1, "output_dir": "out"} | option
    options["vocab_size"] = None if "model_name_or_path" in option else TINY["vocab_size"]  # a checkpoint has its own
    assert message in refusal(monkeypatch, capsys, "run_mlm.py", **options)
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.partial"))


@pytest.mark.slow
def test_kill_9_and_the_same_command_again(tmp_path):
    results = kill_and_repeat("run_mlm.py", tmp_path / "out", after=80, **TINY, max_steps=400, save_steps=40)
    assert "eval_loss" in results


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(monkeypatch, tmp_path):
    out = tmp_path / "out"
    options = TINY | {"max_steps": 4, "max_eval_samples": 21, "use_cpu": True, "output_dir": out}
    output = run_on_two_processes("run_mlm.py", **options)
    assert output.count("tokens in the vocabulary") == 1  # what is said is said once
    results = json.loads((out / "all_results.json").read_text())
    run(monkeypatch, **options)  # finds the run finished, and evaluates it
    alone = json.loads((out / "all_results.json").read_text())
    assert alone["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-5)
    assert alone["eval_labels"] == results["eval_labels"] and alone["train_loss"] == results["train_loss"]
