"""Parallel corpora as they are: reading them, what training skips, the store of token ids, and words without end."""

import gzip
import itertools
import json
import lzma
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertTokenizerLegacy

from fnl_hf.tasks import pretraining
from fnl_hf.tasks.running import InputError, bounded_lines, learning, open_text, parse_json
from fnl_hf.tasks.translation import DataArguments, encode, prepare_pairs, prepare_vocabulary, tokenize_pairs
from fnl_hf.tasks.translation import corpus as corpora
from fnl_hf.tasks.translation.tokenizer import train_tokenizer
from tests.script_runs import refusal, run_script

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [("Schöne Grüße.", "Kind regards."), ("Bis bald!", "See you!"), ("Ja, das ist es.", "Yes, that is it.")]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((text for pair in PAIRS * 20 for text in pair), vocab_size=400)


def json_line(pair) -> str:
    return json.dumps({"translation": dict(zip(("de", "en"), pair, strict=True))})


def json_text(path: Path, pairs) -> corpora.ParallelText:
    path.write_text("".join(json_line(pair) + "\n" for pair in pairs))
    return corpora.split_text("train", "de", "en", file=path)


def arguments(**values) -> DataArguments:
    return DataArguments(**{"max_length": 40} | values)


# -- reading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_marks_line_ends_and_compression_are_read_alike(tmp_path, suffix, mark, end):
    opener = {"": open, ".gz": gzip.open, ".xz": lzma.open}[suffix]
    sources, targets = zip(*PAIRS, strict=True)
    contents = {"x.de": sources, "x.en": targets, "x.json": [*map(json_line, PAIRS), "", ""]}
    for name, lines in contents.items():
        with opener(tmp_path / (name + suffix), "wt", encoding="utf-8", newline="") as file:
            file.write(mark + end.join(lines))
    both = tmp_path / f"x.de{suffix}", tmp_path / f"x.en{suffix}"
    assert list(corpora.split_text("train", "de", "en", source=both[0], target=both[1])) == PAIRS
    assert list(corpora.split_text("train", "de", "en", file=tmp_path / f"x.json{suffix}")) == PAIRS
    with open_text(both[0]) as file:
        assert file.read(6) == "Schöne"


def test_pairs_are_read_one_at_a_time_and_blank_lines_stay(tmp_path):
    def lines():
        yield "a"
        yield ""
        raise AssertionError("read ahead")

    text = corpora.ParallelText((tmp_path / "x", tmp_path / "y"), ("x", "y"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "bounded_lines", lambda path: lines())
        assert corpora.read_pairs(text, 2) == [("a", "a"), ("", "")]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no sentence pairs"),
        ('{"translation": {"de": "Ja.", "fr": "Oui."}}', "line 1: no language 'en', only de, fr. Set --source_lang"),
        ('{"translation": {"de": "Ja.", "en": null}}', "line 1: .* is not text"),
        ('{"translation": ["Ja.", "Yes."]}', "line 1: expected"),
        ('{"de": "Ja."}', "line 1: expected"),
        ("Ja.\tYes.", "line 1: expected"),
        (json_line(PAIRS[0]) + '\n{"translation": {"de": "\\ud83d", "en": "x"}}', "line 2: .*a lone surrogate"),
        ("[" * 100_000, "line 1: .*nested too deeply"),
        (json_line(PAIRS[0]).encode() + b"\n\xff\xfe", "line 2: not a readable UTF-8"),
    ],
)
def test_json_lines_errors(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        corpora.read_pairs(corpora.split_text("train", "de", "en", file=path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_whole_characters_in_escapes_are_no_lone_surrogates():
    assert parse_json('"\\ud83d\\ude00 \\\\ud83d"') == "😀 \\ud83d"


def test_a_compressed_table_of_the_user_is_not_the_shipped_one(tmp_path):
    (tmp_path / "my.tsv.xz").write_bytes(lzma.compress(b"Haus\tmaison\n"))
    with pytest.raises(InputError, match="my.tsv.xz, line 1: expected"):
        list(corpora.split_text("train", "de", "fr", file=str(tmp_path / "my.tsv.xz")))


def test_what_cannot_be_read_twice_is_not_called_missing():
    with pytest.raises(InputError, match="/dev/null: not a regular file"):
        corpora.split_text("train", "de", "en", file="/dev/null")


def test_text_file_errors(tmp_path):
    for name, content in {
        "three": b"a\nb\nc\n",
        "two": b"a\nb\n",
        "latin": b"a\nb\n" * 9000 + b"Gr\xfc\xdfe\n",
    }.items():
        (tmp_path / name).write_bytes(content)
    for first, second, counts in (("three", "two", "has 3 lines and .* has 2"), ("two", "three", "has 2 .* has 3")):
        with pytest.raises(InputError, match=counts):
            list(corpora.split_text("train", "x", "y", source=tmp_path / first, target=tmp_path / second))
    with pytest.raises(InputError, match="latin, line 18001: not a readable UTF-8 .* Convert it"):
        list(bounded_lines(tmp_path / "latin"))
    with pytest.raises(InputError, match="no such file"):
        corpora.split_text("train", "x", "y", source=tmp_path / "none", target=tmp_path / "two")
    with pytest.raises(InputError, match="a folder, where a file is expected"):
        corpora.split_text("train", "x", "y", file=tmp_path)
    with pytest.raises(InputError, match="go together"):
        corpora.split_text("test", "de", "en", source="only.de")


@pytest.mark.parametrize("compress, suffix", [(gzip.compress, ".gz"), (lzma.compress, ".xz")])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"none" + data])
def test_a_damaged_archive_is_one_line(tmp_path, compress, suffix, damage):
    path = tmp_path / f"x.de{suffix}"
    path.write_bytes(damage(compress(os.urandom(2000).hex().encode())))
    with pytest.raises(InputError, match="after line 0: not a readable UTF-8 text file .* damaged") as error:
        list(bounded_lines(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


# -- what training skips --------------------------------------------------------------------------------


def test_training_skips_empty_and_long_pairs_and_says_so(tmp_path, tokenizer, capsys):
    long = "ja " * 60
    odd = [("", "Nothing."), ("Nichts.", ""), (long, "Long."), ("Lang.", long), ("", "")]
    text = json_text(tmp_path / "x.json", [*PAIRS, *odd, *PAIRS])
    store = prepare_pairs(text, tokenizer, arguments(), tmp_path / "prepared")
    assert "5 of 11 training pairs skipped: 3 empty, 2 longer than 40 tokens" in capsys.readouterr().out
    assert store.counts == {"read": 11, "kept": 6, "empty": 3, "long": 2}
    expected = [(tokenizer(source)["input_ids"], tokenizer(target)["input_ids"]) for source, target in PAIRS]
    assert [(item["input_ids"], item["labels"]) for item in map(store.__getitem__, range(6))] == expected * 2
    assert store.lengths.tolist() == [[len(ids) for ids in pair] for pair in expected * 2]
    prepare_pairs(text, tokenizer, arguments(), tmp_path / "prepared")
    assert "5 of 11 training pairs skipped" in capsys.readouterr().out  # of an earlier run too

    first = prepare_pairs(text, tokenizer, arguments(max_train_samples=4), tmp_path / "prepared")
    assert len(first) == 4 and first.counts == {"read": 9, "kept": 4, "empty": 3, "long": 2}
    capsys.readouterr()
    clean = prepare_pairs(json_text(tmp_path / "y.json", PAIRS), tokenizer, arguments(), tmp_path / "prepared")
    assert len(clean) == 3 and not capsys.readouterr().out


@pytest.mark.parametrize(
    "pairs, message",
    [
        ([("Ja.", ""), ("", "No.")], "no pair is left \\(2 of 2 training pairs skipped: 2 empty\\)"),
        ([("ja " * 60, "Yes.")], "no pair is left .*1 longer than 40 tokens.* raise --max_length"),
        ([], "no sentence pairs"),
    ],
)
def test_a_corpus_of_which_nothing_is_left_is_refused(tmp_path, tokenizer, pairs, message):
    text = json_text(tmp_path / "x.json", pairs)
    with pytest.raises(InputError, match=message):
        prepare_pairs(text, tokenizer, arguments(), tmp_path / "prepared")
    assert [path.suffix for path in (tmp_path / "prepared").iterdir()] == [".lock"]
    if not any(all(pair) for pair in pairs):
        with pytest.raises(InputError, match="no pair has text on both sides"):
            prepare_vocabulary(text, 400, arguments(), tmp_path / "prepared")


def test_evaluation_keeps_every_pair_and_tells_what_it_cuts(tokenizer, capsys):
    pairs = [*PAIRS, ("", ""), ("Nichts.", ""), ("ja " * 60, "yes " * 60), ("Lang.", "yes " * 60)]
    data = encode(pairs, tokenizer, arguments())
    assert "2 of 7 validation targets are cut to 40 tokens" in capsys.readouterr().out
    assert len(data) == 7 and max(map(len, data["labels"])) == max(map(len, data["input_ids"])) == 40
    assert all(ids[-1] == tokenizer.eos_token_id for ids in data["labels"])
    encode(pairs[:5], tokenizer, arguments())
    assert not capsys.readouterr().out


# -- the store ------------------------------------------------------------------------------------------


def test_pairs_are_tokenized_once_and_anew_when_anything_changes(tmp_path, tokenizer, monkeypatch):
    directory, calls = tmp_path / "prepared", []
    write = "fnl_hf.tasks.translation.encoding.write_pairs"
    original = prepare_pairs.__globals__["write_pairs"]
    monkeypatch.setattr(write, lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    text = json_text(tmp_path / "x.json", PAIRS)
    prepare_pairs(text, tokenizer, arguments(), directory)
    tokenizer("Ja.", truncation=True, max_length=3)  # what a tokenizer did last does not count
    prepare_pairs(text, tokenizer, arguments(), directory)
    tokenizer.save_pretrained(tmp_path / "saved")
    prepare_pairs(text, AutoTokenizer.from_pretrained(tmp_path / "saved"), arguments(), directory)
    assert len(calls) == 1
    backwards = corpora.split_text("train", "en", "de", file=tmp_path / "x.json")
    prefixed = prepare_pairs(text, tokenizer, arguments(source_prefix="x: "), directory)
    assert prefixed[0]["input_ids"] == tokenizer("x: " + PAIRS[0][0])["input_ids"]
    assert (
        prepare_pairs(backwards, tokenizer, arguments(), directory)[0]["labels"] == tokenizer(PAIRS[0][0])["input_ids"]
    )
    prepare_pairs(text, tokenizer, arguments(max_length=30), directory)
    prepare_pairs(text, train_tokenizer(PAIRS[0], 290), arguments(), directory)
    monkeypatch.setattr(type(tokenizer), "tgt_lang", "de_DE", raising=False)
    prepare_pairs(text, tokenizer, arguments(), directory)
    assert len(calls) == 6
    json_text(tmp_path / "x.json", PAIRS[:2])
    assert len(prepare_pairs(text, tokenizer, arguments(), directory)) == 2


def test_tokenizers_in_python_take_several_processes_and_give_the_same(tmp_path):
    letters = sorted({char for pair in PAIRS for text in pair for char in text.lower() if char.strip()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + char for char in letters)]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    slow = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    assert not slow.is_fast
    pairs = [(source + " " + target[:i], target) for i in range(12) for source, target in PAIRS] * 60 + [("", "x")]
    store = prepare_pairs(json_text(tmp_path / "x.json", pairs), slow, arguments(max_length=60), tmp_path / "prepared")
    assert store.counts == {"read": len(pairs), "kept": len(pairs) - 1, "empty": 1, "long": 0}
    expected = tokenize_pairs(slow, *zip(*pairs[:-1], strict=True))
    for i in (0, 999, 1000, len(store) - 1):
        assert [store[i]["input_ids"], store[i]["labels"]] == [side[i] for side in expected]


MEMORY = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from fnl_hf.tasks.translation import DataArguments, TokenBatchSampler, prepare_pairs
from fnl_hf.tasks.translation.corpus import ParallelText
from fnl_hf.tasks.translation.tokenizer import train_tokenizer

folder, count = Path(sys.argv[1]), int(sys.argv[2])
lines = [f"satz nummer {{i}} ist da" for i in range(10_000)]
for name in ("x", "y"):
    with open(folder / name, "w") as file:
        for start in range(0, count, 10_000):
            file.write("\\n".join(lines[: count - start]) + "\\n")
tokenizer = train_tokenizer(lines, 600)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store = prepare_pairs(ParallelText((folder / "x", folder / "y"), ("x", "y")), tokenizer, DataArguments(), folder / "p")
sampler = TokenBatchSampler(store.lengths, 4096, seed=0)
assert sum(map(len, sampler)) == len(store) == count
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def memory_of(folder: Path, count: int) -> tuple[int, int]:
    """KB that preparing `count` short pairs and planning an epoch add to a process, and all that it holds at most."""
    script = folder / "job.py"
    script.write_text(MEMORY.format(root=str(Path(__file__).parents[1])))
    command = [sys.executable, str(script), str(folder), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    added, total = map(int, done.stdout.split())
    return added, total


@pytest.mark.slow
def test_five_million_pairs_would_fit_into_two_gigabytes(tmp_path):
    """By what 300,000 more pairs add to the peak."""
    small, total = memory_of(tmp_path, 50_000)
    large, _ = memory_of(tmp_path, 350_000)
    per_pair = max(0, large - small) / 300_000  # KB
    assert total + 5_000_000 * per_pair < 2_000_000


# -- words without end ----------------------------------------------------------------------------------

ENDLESS = "abcdefghij" * 300_000


@pytest.mark.parametrize("kind", ["translation", "wordpiece", "bpe"])
def test_a_line_of_three_million_characters_without_blanks_is_learned_from_in_seconds(kind):
    def learn(texts, size=400):
        if kind == "translation":
            return train_tokenizer(texts, size)
        return pretraining.train_tokenizer(lambda: texts, kind, size)

    texts = [text for pair in PAIRS * 20 for text in pair]
    started = time.monotonic()
    learned = learn([*texts, ENDLESS])
    assert len(learned(ENDLESS, verbose=False)["input_ids"]) >= 3
    assert time.monotonic() - started < 30
    # What has no such word is learned and split as without the limit
    usual = learn([*texts, "a" * 900]).backend_tokenizer.to_str()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "_LONGEST_WORD", 1_000_000)
        assert learn([*texts, "a" * 900]).backend_tokenizer.to_str() == usual
    assert "FixedLength" not in usual


def test_a_pair_with_an_endless_word_is_skipped_as_too_long(tmp_path, monkeypatch, capsys):
    (tmp_path / "x.json").write_text("".join(json_line(pair) + "\n" for pair in [*PAIRS * 10, (ENDLESS, "Long.")]))
    options = {"train_file": tmp_path / "x.json", "validation_file": tmp_path / "x.json", "vocab_size": 400}
    model = {"d_model": 16, "layers": 1, "heads": 2, "ffn_dim": 32, "max_length": 40, "disable_tqdm": True}
    started = time.monotonic()
    run_script(monkeypatch, "run_translation.py", **options, **model, max_steps=2, output_dir=tmp_path / "out")
    assert "1 of 31 training pairs skipped: 1 longer than 40 tokens" in capsys.readouterr().out
    assert time.monotonic() - started < 60


def test_the_script_refuses_what_it_cannot_read_before_it_trains(tmp_path, monkeypatch, capsys):
    (tmp_path / "x.json").write_text(json_line(PAIRS[0]))
    (tmp_path / "y.json.gz").write_bytes(gzip.compress(json_line(PAIRS[0]).encode())[:20])
    files = itertools.product(["train_file", "validation_file", "test_file"], [tmp_path / "y.json.gz"])
    for name, path in files:
        options = {"train_file": tmp_path / "x.json"} | {name: path}
        error = refusal(monkeypatch, capsys, "run_translation.py", **options, output_dir=tmp_path / "out")
        assert f"{path}, after line 0: not a readable UTF-8 text file" in error
    assert not (tmp_path / "out").exists()
