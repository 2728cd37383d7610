"""Question answering: the official scores against an oracle, reading, windows, answers; and the script."""

import gzip
import itertools
import json
import lzma
import random
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForQuestionAnswering,
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

import fnl_hf
from fnl_hf.tasks.finetuning import Question, Window, encode_questions, predict_answers, read_squad, squad_scores
from fnl_hf.tasks.finetuning.answers import best_spans
from fnl_hf.tasks.finetuning.scoring import normalize, question_scores
from fnl_hf.tasks.running import InputError
from tests.script_runs import (
    help_of,
    kill_and_repeat,
    leave_half_a_checkpoint,
    refusal,
    run_script,
    same_weights,
    stopped_before,
)

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {"max_seq_length": 48, "doc_stride": 12, "max_question_length": 16, "disable_tqdm": "true", "save_steps": 100}


# -- exact match and F1 ---------------------------------------------------------------------------------

# (prediction, gold answers, exact match and F1 of v1.1, those of v2), worked out by hand
HAND = [
    ("Paris", ["Paris"], (1, 1), (1, 1)),
    ("paris", ["PARIS"], (1, 1), (1, 1)),
    ("in Paris", ["Paris"], (0, 2 / 3), (0, 2 / 3)),
    ("London", ["Paris"], (0, 0), (0, 0)),
    # articles, as words only, and after punctuation
    ("the cat", ["a cat"], (1, 1), (1, 1)),
    ("An apple", ["apple"], (1, 1), (1, 1)),
    ("THE Who", ["who"], (1, 1), (1, 1)),
    ("theatre", ["atre"], (0, 0), (0, 0)),
    ("another", ["other"], (0, 0), (0, 0)),
    ("a the an cat", ["cat"], (1, 1), (1, 1)),
    ("(the) cat", ["cat"], (1, 1), (1, 1)),
    ("t.h.e cat", ["cat"], (1, 1), (1, 1)),
    ("A. Turing", ["Turing"], (1, 1), (1, 1)),
    ("the-cat", ["cat"], (0, 0), (0, 0)),  # becomes thecat
    ("vitamin A", ["vitamin"], (1, 1), (1, 1)),
    # punctuation: ASCII only, and it joins what it stood between
    ("U.S.", ["US"], (1, 1), (1, 1)),
    ("don't", ["dont"], (1, 1), (1, 1)),
    ("$12", ["12"], (1, 1), (1, 1)),
    ("1,000", ["1000"], (1, 1), (1, 1)),
    ("1,000", ["1 000"], (0, 0), (0, 0)),
    ("north-west", ["northwest"], (1, 1), (1, 1)),
    ("north-west", ["north west"], (0, 0), (0, 0)),
    ("snake_case", ["snakecase"], (1, 1), (1, 1)),
    ("Paris!?", ["Paris"], (1, 1), (1, 1)),
    ("“Paris”", ["Paris"], (0, 0), (0, 0)),
    ("1914–1918", ["19141918"], (0, 0), (0, 0)),
    ("€5", ["5"], (0, 0), (0, 0)),
    # white space of any kind
    ("  New \t York\n", ["New York"], (1, 1), (1, 1)),
    ("New\u00a0York", ["New York"], (1, 1), (1, 1)),
    ("New\u2003York", ["New York"], (1, 1), (1, 1)),
    ("New\u200bYork", ["New York"], (0, 0), (0, 0)),
    # unicode
    ("ÉTÉ", ["été"], (1, 1), (1, 1)),
    ("é", ["e\u0301"], (0, 0), (0, 0)),
    ("a\u0301", ["\u0301"], (1, 1), (1, 1)),  # a mark is no letter: the a before it is an article
    ("à", ["\u00e0"], (1, 1), (1, 1)),
    ("Straße", ["STRASSE"], (0, 0), (0, 0)),
    ("北京", ["北京"], (1, 1), (1, 1)),
    ("北 京", ["北京"], (0, 0), (0, 0)),
    ("Ωmega", ["ωMEGA"], (1, 1), (1, 1)),
    # how many words are shared
    ("red green blue", ["red green"], (0, 0.8), (0, 0.8)),
    ("red red red", ["red"], (0, 0.5), (0, 0.5)),
    ("red red", ["red red blue"], (0, 0.8), (0, 0.8)),
    ("blue red", ["red blue"], (0, 1), (0, 1)),
    ("one two three four", ["four five"], (0, 1 / 3), (0, 1 / 3)),
    # several answers: the best of each, not of one
    ("red", ["blue", "red"], (1, 1), (1, 1)),
    ("red green", ["red", "green yellow red", "blue"], (0, 0.8), (0, 0.8)),
    ("b c", ["c b", "b"], (0, 1), (0, 1)),
    ("x", ["y", "z", "x y"], (0, 2 / 3), (0, 2 / 3)),
    # no words on a side
    ("", ["Paris"], (0, 0), (0, 0)),
    ("Paris", ["..."], (0, 0), (0, 0)),
    ("the", ["The"], (1, 0), (1, 1)),
    ("", ["a"], (1, 0), (1, 1)),
    ("?", ["!"], (1, 0), (1, 1)),
    ("", ["the", "Paris"], (1, 0), (0, 0)),
    ("Paris", ["the", "Paris"], (1, 1), (1, 1)),
    ("", [], None, (1, 1)),
    ("an", [], None, (1, 1)),
    ("Paris", [], None, (0, 0)),
]


@pytest.mark.parametrize("prediction, golds, first, second", HAND)
def test_scores_worked_out_by_hand(prediction, golds, first, second):
    if first is not None:
        assert question_scores(prediction, golds) == pytest.approx(first)
    assert question_scores(prediction, golds, version_2=True) == pytest.approx(second)


def test_v1_without_answers_is_not_defined():
    with pytest.raises(ValueError, match="there are none"):
        question_scores("Paris", [])


def oracle_words(text: str) -> list[str]:
    """The normalized words, character by character: no regular expression, no table, no split."""
    kept = [char for char in text.lower() if char not in string.punctuation]
    runs = ["".join(run) for _, run in itertools.groupby(kept, key=lambda char: char.isalnum())]
    spaced = "".join(" " if run in ("a", "an", "the") else run for run in runs)
    return ["".join(run) for blank, run in itertools.groupby(spaced, key=str.isspace) if not blank]


def oracle(prediction: str, golds: list[str], version_2: bool) -> tuple[float, float]:
    """The definition, by striking out words that are in both lists."""
    predicted, answers = oracle_words(prediction), [oracle_words(gold) for gold in golds]
    if version_2:
        answers = [words for words in answers if words] or [[]]
    exact, overlap = [], []
    for words in answers:
        exact.append(1.0 if predicted == words else 0.0)
        left, shared = list(words), 0
        for word in predicted:
            if word in left:
                left.remove(word)
                shared += 1
        if version_2 and (not words or not predicted):
            overlap.append(exact[-1])
        else:
            overlap.append(2 * shared / (len(words) + len(predicted)) if shared else 0.0)
    return max(exact), max(overlap)


PIECES = [
    *("a", "an", "the", "The", "AN", "(the)", "the,", "a.", "cat", "Dog", "état", "ÉTAT", "don't", "U.S.", "a-b"),
    *("...", "—", "“the”", "北京", "a\u0301", "İstanbul", "ß", "_", "a_b", "an\u00a0", "\u2003", "\u200b", "thé"),
    *("1,000", "$5", "", "\n", "\ufb01n", "x\x1cy", "1914–18", "²"),
]


def generated_cases(count: int) -> list[tuple[str, list[str]]]:
    """Predictions with one to four answers: all sorts of pieces, often those of an answer in another order."""
    rng = random.Random(5)

    def text():
        return rng.choice([" ", " ", "  ", ""]).join(rng.choices(PIECES, k=rng.randint(0, 5)))

    cases = []
    for _ in range(count):
        golds = [text() for _ in range(rng.randint(1, 4))]
        words = rng.choice(golds).split()
        words = rng.sample(words, rng.randint(0, len(words))) + rng.choices(PIECES, k=rng.randint(0, 2))
        cases.append((rng.choice([text(), rng.choice(golds), " ".join(words)]), golds))
    return cases


@pytest.mark.parametrize("version_2", [False, True])
def test_scores_are_those_of_the_oracle(version_2):
    cases = generated_cases(1000)
    if version_2:
        cases += [(prediction, []) for prediction, _ in cases[:100]]
    for prediction, golds in cases:
        assert question_scores(prediction, golds, version_2) == pytest.approx(oracle(prediction, golds, version_2))
    seen = {oracle(prediction, golds, version_2) for prediction, golds in cases}
    assert len(seen) > 10 and (1.0, 1.0) in seen and (0.0, 0.0) in seen
    assert version_2 or (1.0, 0.0) in seen


def test_scores_are_those_of_transformers():
    metrics = pytest.importorskip("transformers.data.metrics.squad_metrics")  # until 5.17 or so
    for prediction, golds in generated_cases(500):
        assert normalize(prediction) == metrics.normalize_answer(prediction)
        kept = [gold for gold in golds if metrics.normalize_answer(gold)] or [""]
        exact = max(metrics.compute_exact(gold, prediction) for gold in kept)
        overlap = max(metrics.compute_f1(gold, prediction) for gold in kept)
        assert question_scores(prediction, golds, version_2=True) == pytest.approx((exact, overlap))


def question(id="q", text="Who?", context="The cat sat.", answers=("cat",), start=4) -> Question:
    return Question(id, text, context, tuple(answers), start, answers[0] if answers else "")


def test_scores_of_a_file():
    cases = generated_cases(60)
    questions = [question(str(i), answers=golds) for i, (_, golds) in enumerate(cases)]
    predictions = {str(i): prediction for i, (prediction, _) in enumerate(cases)}
    expected = np.array([oracle(prediction, golds, False) for prediction, golds in cases])
    assert squad_scores(questions, predictions) == pytest.approx(
        {"exact_match": 100 * expected[:, 0].mean(), "f1": 100 * expected[:, 1].mean(), "total": 60}
    )
    # v1.1: a question without a prediction scores 0
    del predictions["3"]
    expected[3] = 0
    assert squad_scores(questions, predictions)["f1"] == pytest.approx(100 * expected[:, 1].mean())


def test_scores_of_a_v2_file_and_of_its_parts():
    questions = [question("a"), question("b", answers=["dog"]), question("c", answers=()), question("d", answers=())]
    answers = {"a": "cat", "b": "", "c": "", "d": "cat"}
    assert squad_scores(questions, answers, version_2=True) == {
        **{"exact_match": 50.0, "f1": 50.0, "total": 4},
        **{"HasAns_exact_match": 50.0, "HasAns_f1": 50.0, "HasAns_total": 2},
        **{"NoAns_exact_match": 50.0, "NoAns_f1": 50.0, "NoAns_total": 2},
    }
    assert "NoAns_f1" not in squad_scores(questions[:2], answers, version_2=True)
    with pytest.raises(KeyError):
        squad_scores(questions, {"a": "cat"}, version_2=True)


# -- reading --------------------------------------------------------------------------------------------


def squad(*paragraphs) -> dict:
    """A file of `(context, [(id, question, [(answer, start)])])`; a start of None is looked up."""
    return {
        "version": "x",
        "data": [
            {
                "title": "t",
                "paragraphs": [
                    {
                        "context": context,
                        "qas": [
                            {
                                "id": name,
                                "question": asked,
                                "answers": [
                                    {"text": text, "answer_start": context.index(text) if start is None else start}
                                    for text, start in answers
                                ],
                            }
                            for name, asked, answers in qas
                        ],
                    }
                ],
            }
            for context, qas in paragraphs
        ],
    }


def write(path: Path, content) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


CAT = "Thé 猫 cat sat on the mat. The cat slept."


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_reading_checks_where_answers_are(tmp_path, suffix):
    content = squad(
        (CAT, [("1", "Who sat?", [("cat", 6), ("The cat", 26)]), ("2", "Who?", [("cat", 7), ("mat", 21)])]),
        ("Short.", [("3", "What?", [("Short", -1), ("Shorter", 0), ("", 0)]), ("4", "Why?", [])]),
    )
    file = read_squad(write(tmp_path / f"x.json{suffix}", content), unique_ids=True)
    assert [(q.id, q.start, q.text) for q in file.questions] == [
        ("1", 6, "cat"),
        ("2", 21, "mat"),
        ("3", None, ""),
        ("4", None, ""),
    ]
    assert [q.answers for q in file.questions[1:]] == [("cat", "mat"), ("Short", "Shorter", ""), ()]
    assert (file.answers, file.misplaced, file.lost, file.unanswerable) == (7, 4, 1, 1)
    assert file.example == "data[0].paragraphs[0].qas[1]: 'cat' is not at character 7, 'at ' is"


def test_impossible_questions_may_lack_answers(tmp_path):
    content = squad((CAT, [("1", "Who?", [])]))
    entry = content["data"][0]["paragraphs"][0]["qas"][0]
    del entry["answers"]
    path = write(tmp_path / "x.json", content)
    with pytest.raises(InputError, match="answers is missing"):
        read_squad(path)
    entry |= {"is_impossible": True, "plausible_answers": [{"text": "cat", "answer_start": 6}]}
    assert read_squad(write(path, content)).questions[0].answers == ()


def changed(change) -> dict:
    content = squad((CAT, [("1", "Who?", [("cat", None)])]), (CAT, [("2", "Who?", [("cat", None), ("mat", None)])]))
    change(content)
    return content


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "not JSON"),
        ('{"data": [', "not JSON"),
        ("[]", "a list, expected an object with the key 'data'"),
        ('{"id": "Paris"}', "data is missing, there is only 'id'"),
        ("{}", "data is missing, there is only nothing"),
        ('{"data": {}}', "data is an object, expected a list"),
        ('{"data": []}', "no questions"),
        ('{"data": [3]}', r"data\[0\] is a whole number, expected an object"),
        ("[" * 200_000, "not JSON"),
        (changed(lambda c: c["data"][1].pop("paragraphs")), r"data\[1\]\.paragraphs is missing, .* only 'title'"),
        (
            changed(lambda c: c["data"][0]["paragraphs"][0].pop("context")),
            r"data\[0\]\.paragraphs\[0\]\.context is missing",
        ),
        (
            changed(lambda c: c["data"][1]["paragraphs"][0]["qas"][0].pop("id")),
            r"data\[1\]\.paragraphs\[0\]\.qas\[0\]\.id is missing",
        ),
        (
            changed(lambda c: c["data"][1]["paragraphs"][0]["qas"][0].update(question=None)),
            r"qas\[0\]\.question is null, expected text",
        ),
        (
            changed(lambda c: c["data"][1]["paragraphs"][0]["qas"][0]["answers"][1].pop("answer_start")),
            r"data\[1\]\.paragraphs\[0\]\.qas\[0\]\.answers\[1\]\.answer_start is missing, there is only 'text'",
        ),
        (
            changed(lambda c: c["data"][1]["paragraphs"][0]["qas"][0]["answers"][0].update(answer_start="4")),
            r"answers\[0\]\.answer_start is text, expected a whole number",
        ),
        (
            changed(lambda c: c["data"][1]["paragraphs"][0]["qas"][0]["answers"][0].update(answer_start=True)),
            r"answers\[0\]\.answer_start is true or false, expected a whole number",
        ),
        (changed(lambda c: c["data"][0]["paragraphs"][0].update(context="\ud83d")), "half a surrogate pair"),
        (changed(lambda c: c["data"][0]["paragraphs"][0]["qas"][0].update(id="2")), "1 ids are .* the first '2'"),
    ],
)
def test_reading_errors_name_the_place(tmp_path, content, message):
    path = write(tmp_path / "x.json", content)
    with pytest.raises(InputError, match=message) as error:
        read_squad(path, unique_ids=True)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    "name, content", [("x.json", b"\xff\xfe{}"), ("x.json.gz", b"{}"), ("x.json.xz", b"\xfd7zXZ\0")]
)
def test_files_that_are_no_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="not a readable UTF-8 text file"):
        read_squad(tmp_path / name)


# -- windows --------------------------------------------------------------------------------------------

NAMES = ["anna", "ben", "carla", "dora", "emil", "frida", "gustav", "hanna"]
PLACES = ["berlin", "paris", "rome", "oslo", "vienna", "lisbon", "prague", "dublin"]


def lives(count: int = 8) -> list:
    """Paragraphs whose questions can be learned: who lives where since when."""
    rng = random.Random(1)
    paragraphs = []
    for i in range(count):
        person, place, year = rng.choice(NAMES).title(), rng.choice(PLACES).title(), str(rng.randint(1950, 2000))
        asked = [("Who lives there?", person), ("Where?", place), ("Since what year?", year)]
        paragraphs.append(
            (
                f"{person} lives in {place} since {year}.",
                [(f"{i}-{question}", question, [(answer, None)]) for question, answer in asked],
            )
        )
    return paragraphs


def wordpiece(lowercase: bool = True) -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = [context for context, _ in lives(40)] + ["Where there? Since what year? Who? Why?", CAT]
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": token for name, token in names.items()},
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=64,
    )


def byte_level() -> PreTrainedTokenizerFast:
    """As RoBERTa's: two separators, no token types, blanks in tokens."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [context for context, _ in lives(40)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    names = {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": token for name, token in names.items()},
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture(scope="module")
def tokenizer():
    return wordpiece()


@pytest.mark.parametrize("make", [wordpiece, byte_level])
def test_labels_of_windows_are_the_answers(make):
    tokenizer = make()
    filler = "Nobody lives elsewhere. " * 20
    asked = [("Thé 猫 " + filler + context, qas) for context, qas in lives(6)]
    questions = []
    for context, qas in asked:
        for name, text, [(answer, _)] in qas:
            questions.append(Question(name, text, context, (answer,), context.index(answer), answer))
    rows, windows = encode_questions(questions, tokenizer, max_length=60, stride=20, max_question_length=16)
    assert len(rows) == len(windows) > 2 * len(questions)
    assert ("token_type_ids" in rows.column_names) == (make is wordpiece)
    found = set()
    for row, window in zip(rows, windows, strict=True):
        question = questions[window.question]
        assert len(row["input_ids"]) <= 60
        start, end = row["start_positions"], row["end_positions"]
        if start == window.null:
            assert end == window.null == 0
            covered = (
                window.offsets[0, 0] <= question.start and question.start + len(question.text) <= window.offsets[-1, 1]
            )
            assert not covered
            continue
        begin, stop = window.offsets[start - window.begin, 0], window.offsets[end - window.begin, 1]
        assert question.context[begin:stop] == question.text
        found.add(window.question)
    assert found == set(range(len(questions)))  # the windows overlap: every answer is whole in one of them
    for index, group in itertools.groupby(windows, key=lambda window: window.question):
        pieces = [window.offsets for window in group]
        assert pieces[0][0, 0] == 0 and pieces[-1][-1, 1] == len(questions[index].context.rstrip())
        # 20 tokens are shared; which blanks are trimmed off a token depends on where it stands
        assert all(abs(left[-20, 1] - right[0, 1]) <= 1 for left, right in itertools.pairwise(pieces))


def test_long_questions_are_cut_and_windows_can_be_left_out(tokenizer):
    long = question(text="where lives anna " * 50, context="Anna lives in Rome. " * 8)
    rows, windows = encode_questions([long, question()], tokenizer, 40, 8, 10, keep_windows=False)
    assert windows == [] and rows[0]["token_type_ids"].index(1) <= 12 and len(rows) > 2
    empty, windows = encode_questions([question(context="", answers=(), start=None)], tokenizer, 40, 8, 10)
    assert len(empty) == 1 and windows[0].offsets.shape == (0, 2)


def test_answers_with_blanks_around_them_and_several_batches(tokenizer, monkeypatch):
    monkeypatch.setattr("fnl_hf.tasks.finetuning.windows._BATCH", 2)
    blank = Question("b", "Who?", CAT, (" cat ",), CAT.index(" cat "), " cat ")
    rows, windows = encode_questions([question(), question(), blank], tokenizer, 40, 8, 10)
    assert [window.question for window in windows] == [0, 1, 2]
    start, end = rows[2]["start_positions"] - windows[2].begin, rows[2]["end_positions"] - windows[2].begin
    assert CAT[windows[2].offsets[start, 0] : windows[2].offsets[end, 1]] == "cat"


@pytest.mark.parametrize("stride, length", [(14, 30), (-1, 30), (0, 16)])
def test_no_room_for_a_stride(tokenizer, stride, length):
    with pytest.raises(InputError, match="Lower --doc_stride or --max_question_length, or raise --max_seq_length"):
        encode_questions([question()], tokenizer, length, stride, 13)


# -- answers --------------------------------------------------------------------------------------------


def words_window(words: list[str], index: int = 0, first: int = 0, begin: int = 3) -> Window:
    """A window of whole words, from the word `first` on."""
    ends = np.cumsum([len(word) + 1 for word in words]) - 1
    offsets = np.stack([ends - [len(word) for word in words], ends], axis=1)
    return Window(index, 0, begin, offsets[first:])


def test_best_spans_are_the_best_of_all():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(12)]
    window = words_window(words)
    text = " ".join(words)
    for n_best, longest in [(1, 30), (5, 3), (20, 4), (200, 12)]:
        starts, ends = rng.normal(size=(2, 20))  # the question before, padding behind
        every = sorted(
            (-(starts[3 + i] + ends[3 + j]), " ".join(words[i : j + 1]))
            for i in range(12)
            for j in range(i, min(12, i + longest))
        )
        spans = best_spans(window, starts, ends, n_best, longest)
        got = sorted((-span.score, text[span.begin : span.end]) for span in spans)
        assert [span for _, span in got] == [span for _, span in every[:n_best]]
        assert [score for score, _ in got] == pytest.approx([score for score, _ in every[:n_best]])


@pytest.mark.parametrize("version_2", [False, True])
def test_blanks_are_no_answer(version_2):
    """Offsets as byte-level tokenizers give them, with a token of blanks alone."""
    asked = [Question("a", "q", "Rome \n\n Paris", ("Paris",))]
    window = Window(0, 0, 1, np.array([[0, 4], [4, 7], [7, 13]], np.int32))
    scores = np.array([[0.0, 1, 5, 2, 0]])  # highest at the blanks
    predictions = predict_answers(asked, [window], scores, scores, version_2=version_2)
    assert predictions.answers["a"].strip() and (not version_2 or predictions.null_odds["a"] < 0)


def logits(length: int, **peaks) -> tuple[np.ndarray, np.ndarray]:
    values = np.zeros((2, length), np.float32)
    for name, (position, value) in peaks.items():
        values[int(name == "end"), position] = value
    return values[0], values[1]


def test_windows_of_a_question_are_merged():
    words = ["anna", "lives", "in", "rome", "and", "not", "in", "oslo"]
    asked = question(context=" ".join(words))
    windows = [words_window(words), words_window(words, first=3)]
    left, right = logits(12, start=(6, 4), end=(6, 3)), logits(12, start=(7, 2), end=(7, 2))
    starts, ends = np.stack([left[0], right[0]]), np.stack([left[1], right[1]])
    predictions = predict_answers([asked], windows, starts, ends, n_best=5)
    assert predictions.answers == {"q": "rome"} and predictions.null_odds == {}
    best = predictions.nbest["q"]
    assert len(best) == 5 and len({entry["text"] for entry in best}) == 5
    assert best[0] | {"probability": 0} == {"text": "rome", "probability": 0, "start_logit": 4.0, "end_logit": 3.0}
    assert sum(entry["probability"] for entry in best) == pytest.approx(1)
    assert best[0]["probability"] / best[1]["probability"] == pytest.approx(
        np.exp(7 - best[1]["start_logit"] - best[1]["end_logit"])
    )


def test_no_answer_is_the_lowest_null_score_against_the_best_answer():
    words = ["anna", "lives", "in", "rome"]
    asked = question(context=" ".join(words))
    windows = [words_window(words), words_window(words)]
    starts = np.array([[1, 0, 0, 0, 0, 0, 5], [9, 0, 0, 0, 0, 0, 0]], np.float32)
    ends = starts.copy()

    def answer(**options):
        return predict_answers([asked], windows, starts, ends, version_2=True, **options)

    assert answer().answers == {"q": "rome"}
    assert answer().null_odds == {"q": 2.0 - 10.0}  # not 18: the first window has the answer
    assert answer(null_threshold=-8.5).answers == {"q": ""}
    assert answer(null_threshold=-8.0).answers == {"q": "rome"}  # more than, not equal
    assert {"text": "", "start_logit": 1.0, "end_logit": 1.0} in [
        {key: value for key, value in entry.items() if key != "probability"} for entry in answer().nbest["q"]
    ]
    nothing = Window(0, 0, 3, np.zeros((0, 2), np.int32))
    for version_2 in (False, True):
        empty = predict_answers([asked], [nothing], starts[:1], ends[:1], version_2=version_2)
        assert empty.answers == {"q": ""} and json.loads(json.dumps(empty.null_odds)) == empty.null_odds


# -- the script -----------------------------------------------------------------------------------------


def run(monkeypatch, **values):
    """Run the script in this process, as from the command line: tiny, but for what `values` say."""
    run_script(monkeypatch, "run_qa.py", **TINY | values)


def save_bert(tokenizer, path: Path, **changes) -> Path:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes, **dropout | changes)
    BertForMaskedLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bert(tokenizer, tmp_path_factory) -> Path:
    return save_bert(tokenizer, tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    train, unanswerable = squad(*lives(8)), squad(*lives(8))
    for i, article in enumerate(unanswerable["data"]):
        entry = article["paragraphs"][0]["qas"][0]
        entry |= {"question": "Why?", "answers": [], "is_impossible": True, "id": f"none-{i}"}
    return {
        "train_file": write(folder / "train.json.xz", train),
        "validation_file": write(folder / "validation.json", squad(*lives(8))),
        "v2": write(folder / "v2.json", unanswerable),
    }


@pytest.mark.parametrize("head_rank", [1.0, 0.5])
def test_a_factorized_language_model_stays_factorized(bert, tmp_path, head_rank):
    model = BertForMaskedLM.from_pretrained(bert)
    fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=head_rank))
    model.save_pretrained(tmp_path)
    answering = AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    before, after = fnl_hf.factorizations(model), fnl_hf.factorizations(answering)
    assert [product.name for product in after] == [product.name for product in before] and len(after) == 4
    assert all(torch.equal(a.matrix(), b.matrix()) for a, b in zip(before, after, strict=True))
    assert all(product.factors()[0].shape[-1] == int(16 * head_rank) for product in after)
    inputs = {"input_ids": torch.arange(5, 15)[None]}
    hidden = (each.eval().bert(**inputs).last_hidden_state for each in (model, answering))
    assert torch.equal(*hidden)


def test_learns_scores_and_reloads(monkeypatch, tmp_path, bert, files, capsys):
    out = tmp_path / "out"
    options = {"model_name_or_path": bert, "train_file": files["train_file"], "output_dir": out}
    options |= {"validation_file": files["validation_file"], "learning_rate": 5e-3, "per_device_train_batch_size": 8}
    options |= {"num_train_epochs": 60, "max_answer_length": 8, "n_best_size": 3}
    run(monkeypatch, **options)
    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_exact_match"] == 100 and results["eval_f1"] == 100 and results["eval_total"] == 24
    assert results["train_questions"] == 24 and results["train_dropped_answers"] == 0
    assert results["run_seconds"] > 0 and results["run_peak_memory_gb"] > 0 and results["eval_loss"] < 1
    predictions = json.loads((out / "predictions.json").read_text())
    nbest = json.loads((out / "nbest_predictions.json").read_text())
    assert all(nbest[name][0]["text"] == text and len(nbest[name]) == 3 for name, text in predictions.items())
    assert not (out / "null_odds.json").exists() and not list(out.rglob("*.partial"))

    # Scoring the file alone gives the same numbers
    capsys.readouterr()
    run(monkeypatch, score=out / "predictions.json", validation_file=files["validation_file"])
    assert json.loads(capsys.readouterr().out) == {"exact_match": 100.0, "f1": 100.0, "total": 24}

    # Once more: nothing is trained again
    run(monkeypatch, **options)
    assert "training is finished" in capsys.readouterr().out
    again = json.loads((out / "all_results.json").read_text())
    assert again["eval_f1"] == 100 and again["train_runtime"] == results["train_runtime"]

    # The fine-tuned model alone, in windows so short that paragraphs need several; rows sorted by length in training
    # do not change the order of answers
    run(
        monkeypatch,
        model_name_or_path=out,
        validation_file=files["validation_file"],
        output_dir=tmp_path / "eval",
        max_seq_length=20,
        doc_stride=6,
        max_question_length=8,
        train_sampling_strategy="group_by_length",
        pad_to_max_length="true",
    )
    short = json.loads((tmp_path / "eval" / "all_results.json").read_text())
    assert short["eval_windows"] > 24 and short["eval_f1"] > 50 and not (tmp_path / "eval" / "config.json").exists()


def test_questions_without_answers(monkeypatch, tmp_path, bert, files):
    out = tmp_path / "out"
    options = {"model_name_or_path": bert, "train_file": files["v2"], "validation_file": files["v2"]}
    options |= {"learning_rate": 3e-3, "per_device_train_batch_size": 8, "num_train_epochs": 60}
    run(monkeypatch, **options, version_2_with_negative="true", output_dir=out)
    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_NoAns_total"] == 8 and results["eval_HasAns_total"] == 16
    assert results["eval_NoAns_f1"] == 100 and results["eval_HasAns_f1"] > 60
    answers, odds = (json.loads((out / f"{name}.json").read_text()) for name in ("predictions", "null_odds"))
    assert all((answers[name] == "") == (odds[name] > 0) for name in answers)

    # A threshold above all odds: everything is answered
    run(
        monkeypatch,
        model_name_or_path=out,
        validation_file=files["v2"],
        version_2_with_negative="true",
        null_score_diff_threshold=1e6,
        output_dir=tmp_path / "eval",
    )
    assert json.loads((tmp_path / "eval" / "all_results.json").read_text())["eval_NoAns_f1"] == 0


def test_misplaced_answers_are_counted_and_not_trained_on(monkeypatch, tmp_path, bert, capsys):
    content = squad(*lives(4))
    entries = [entry for article in content["data"] for entry in article["paragraphs"][0]["qas"]]
    entries[0]["answers"][0]["answer_start"] += 1
    entries[5]["answers"].insert(0, {"text": "Nowhere", "answer_start": 0})
    path = write(tmp_path / "x.json", content)
    out = tmp_path / "out"
    run(monkeypatch, model_name_or_path=bert, train_file=path, validation_file=path, max_steps=1, output_dir=out)
    results = json.loads((out / "all_results.json").read_text())
    assert results["train_dropped_answers"] == results["eval_misplaced_answers"] == 2
    assert results["train_dropped_questions"] == 1 and results["train_questions"] == 11
    assert results["eval_total"] == 12  # the official rule compares texts
    printed = capsys.readouterr().out
    assert "2 of 13 answers are not at their answer_start, and 1 questions have no other" in printed


@pytest.mark.parametrize("case", ["dense", "factorized while fine-tuned", "factorized before"])
def test_a_resumed_run_is_the_uninterrupted_one(monkeypatch, tmp_path, bert, files, case):
    """Stopped with a checkpoint half-written, and resumed: bit for bit the same weights."""
    options = {"train_file": files["train_file"], "max_steps": 16, "save_steps": 5, "dropout": 0.1}
    options |= {"model_name_or_path": bert, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    if case == "factorized while fine-tuned":
        options |= {"factorize": "true", "head_rank": 0.5, "frobenius_decay": 0.01}
    if case == "factorized before":
        model = BertForMaskedLM.from_pretrained(bert)
        fnl_hf.factorize(model, fnl_hf.FNLConfig(head_rank=0.5)).save_pretrained(tmp_path / "mlm")
        options |= {"model_name_or_path": tmp_path / "mlm", "tokenizer_name": bert}
    run(monkeypatch, **options, output_dir=tmp_path / "whole")

    out = tmp_path / "stopped"
    with stopped_before(monkeypatch, step=14):
        run(monkeypatch, **options, output_dir=out)
    leave_half_a_checkpoint(out, whole=10, step=15)
    run(monkeypatch, **options, output_dir=out)
    assert same_weights(out, tmp_path / "whole")
    products = fnl_hf.factorizations(AutoModelForQuestionAnswering.from_pretrained(out))
    assert len(products) == (0 if case == "dense" else 4)


def test_roberta_and_a_second_seed(monkeypatch, tmp_path, files):
    tokenizer = byte_level()
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=66,
        type_vocab_size=1,
    )
    RobertaForMaskedLM(config).save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    paths = {name: files[name] for name in ("train_file", "validation_file")}
    losses = []
    for seed in (1, 1, 2):
        out = tmp_path / f"{seed}-{len(losses)}"
        run(monkeypatch, **paths, model_name_or_path=tmp_path / "roberta", max_steps=2, seed=seed, output_dir=out)
        losses.append(json.loads((out / "all_results.json").read_text())["eval_loss"])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.slow
def test_kill_9_and_the_same_command_again(tmp_path, bert, files):
    out = tmp_path / "out"
    options = TINY | {name: files[name] for name in ("train_file", "validation_file")}
    options |= {"model_name_or_path": bert, "max_steps": 400, "save_steps": 20}
    results = kill_and_repeat("run_qa.py", out, after=40, **options)
    assert (out / "checkpoint-400").is_dir() and "eval_f1" in results


@pytest.mark.parametrize(
    "option, message",
    [
        ({"model_name_or_path": None}, "no checkpoint. Give --model_name_or_path"),
        ({"model_name_or_path": "nowhere"}, "nowhere: "),
        ({"train_file": None}, "it has no qa_outputs.bias. Fine-tune it"),
        ({"train_file": None, "validation_file": None}, "nothing to do"),
        ({"train_file": "no.json"}, "no.json: no such file"),
        ({"train_file": "v2"}, "8 of 24 questions have no answers. Add --version_2_with_negative"),
        ({"validation_file": "v2"}, "8 of 24 questions have no answers. Add --version_2_with_negative"),
        ({"train_file": "empty.json"}, "not JSON"),
        ({"train_file": "misplaced.json"}, "no answer is at its answer_start"),
        ({"validation_file": "twice.json"}, "1 ids are those of several questions"),
        ({"score": "preds.json", "validation_file": None}, "without --validation_file"),
        ({"score": "preds.json"}, "the answer to 'x' is not text"),
        (
            {"score": "none.json", "validation_file": "v2", "version_2_with_negative": "true"},
            "no answer to 24 questions",
        ),
        ({"doc_stride": 40}, "Lower --doc_stride"),
        ({"max_seq_length": 65}, "takes at most 64 tokens"),
        ({"tokenizer_name": "bigger"}, "embeddings of 120 tokens, and the tokenizer has 121"),
        ({"tokenizer_name": "unpadded"}, "no padding token"),
        ({"head_rank": 0.5}, "Add --factorize"),
        ({"factorize_at": 0.5}, "Add --factorize"),
        ({"frobenius_decay": 0.1}, "the model is dense. Add --factorize"),
        ({"factorize": "true", "head_rank": "half"}, "--head_rank half: not a number"),
        ({"factorize": "true", "head_rank": 17}, "head rank 17 is above its head_dim 16"),
        ({"factorize": "true", "model_name_or_path": "factorized"}, "factorized already. Drop --factorize"),
        ({"factorize": "true", "attention": "qk", "frobenius_decay_kinds": "ov"}, "ov: not a kind that is factorized"),
        ({"n_best_size": 0}, "--n_best_size 0: expected at least 1"),
        ({"max_train_samples": 0}, "--max_train_samples 0: expected at least 1"),
        ({"dropout": 1.5}, "--dropout 1.5"),
        ({"eval_strategy": "epoch", "validation_file": None}, "--eval_strategy epoch without --validation_file"),
        ({"factorize": "true", "frobenius_decay": -1}, "frobenius_decay is -1"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    monkeypatch, tmp_path, capsys, bert, files, tokenizer, option, message
):
    given = tmp_path / "given"
    given.mkdir()
    monkeypatch.chdir(given)
    write(given / "empty.json", "")
    write(given / "misplaced.json", squad((CAT, [("1", "Who?", [("cat", 8)])])))
    write(given / "twice.json", squad((CAT, [("1", "Who?", [("cat", None)]), ("1", "Where?", [("mat", None)])])))
    write(given / "preds.json", {"x": 3})
    write(given / "none.json", {})
    if "tokenizer_name" in option:
        other = wordpiece()
        if option["tokenizer_name"] == "bigger":
            other.add_tokens(["猫猫"])
        else:
            other.pad_token = None
        other.save_pretrained(given / option["tokenizer_name"])
    if option.get("model_name_or_path") == "factorized":
        fnl_hf.factorize(BertForMaskedLM.from_pretrained(bert), fnl_hf.FNLConfig()).save_pretrained("factorized")
        tokenizer.save_pretrained("factorized")
    paths = {name: files[name] for name in ("train_file", "validation_file")}
    options = {"model_name_or_path": bert, **paths, "max_steps": 1, "output_dir": "out", **option}
    options |= {name: files["v2"] for name, value in option.items() if value == "v2"}
    assert message in refusal(monkeypatch, capsys, "run_qa.py", **TINY | options)
    assert not (given / "out").exists()


def test_help_shows_commands(monkeypatch, capsys):
    assert "\n    python scripts/run_qa.py --model_name_or_path runs/mlm" in help_of(monkeypatch, capsys, "run_qa.py")


def test_a_comparison_of_compressed_models_answers_questions(monkeypatch, tmp_path, bert, files):
    path = tmp_path / "figures.json"
    options = {"model": bert, "squad": [files["train_file"], files["validation_file"]], "seeds": [1], "decays": [0]}
    options |= {"length": 48, "dense_steps": 1, "steps": 1, "samples": 8, "output_dir": tmp_path / "runs", "json": path}
    run_script(monkeypatch, "compare_compressed.py", **options, arms=["half, activation"], dev_rows=4)
    found = json.loads(path.read_text())["squad"]
    assert found["settings"]["dev"] == 4
    for scores in (found["seeds"]["1"]["dense"], *found["seeds"]["1"]["arms"]["half, activation"]["tuned"].values()):
        assert 0 <= scores["exact_match"] <= scores["f1"] <= 100
