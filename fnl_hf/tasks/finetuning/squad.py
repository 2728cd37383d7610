"""Files in the SQuAD layout: v1.1, v2, and any other of their shape."""

import json
import lzma
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..running import InputError, one_line, open_text, say
from .arguments import QAArguments

_LAYOUT = "Give a file in the SQuAD layout."
_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a paragraph.

    Attributes:
        answers: texts of all gold answers; none where the question has no answer (v2).
        start: character of the context where the first answer that is in its place begins; None without one.
        text: that answer.
    """

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    start: int | None = None
    text: str = ""


@dataclass(frozen=True)
class SquadFile:
    """The questions of a file, and how many of its answers are not where they should be.

    Attributes:
        misplaced: answers whose text is empty or does not begin at their `answer_start`.
        lost: questions all of whose answers are misplaced.
    """

    path: str
    questions: list[Question]
    answers: int
    misplaced: int
    lost: int
    example: str = ""  # the first misplaced answer

    @property
    def unanswerable(self) -> int:
        """Questions without an answer."""
        return sum(not question.answers for question in self.questions)


def read_squad(path: str | Path, unique_ids: bool = False) -> SquadFile:
    """Read a file in the SQuAD layout (.gz and .xz too) and check that every answer is where `answer_start` says.

        {"data": [{"paragraphs": [{"context": "…", "qas": [
            {"id": "…", "question": "…", "answers": [{"text": "…", "answer_start": 0}]}]}]}]}

    Other keys are ignored. `answer_start` counts characters. A question with no answers, or with `is_impossible` and no
    key `answers`, has none.

    Args:
        unique_ids: refuse two questions with one id, whose predictions could not be told apart.

    Raises:
        InputError: no such file, not UTF-8, not JSON, a key that is missing or of another type (the message names its
            path), no questions.
    """
    content = read_json(path)
    questions, total, misplaced, lost, example = [], 0, 0, 0, ""
    for where, article in _items(content, "data", "", path):
        for at, paragraph in _items(article, "paragraphs", where, path):
            context = _value(paragraph, "context", str, at, path)
            for here, entry in _items(paragraph, "qas", at, path):
                answers = _answers(entry, here, path)
                placed = [answer for answer in answers if _is_placed(answer, context)]
                if not example and len(placed) < len(answers):
                    text, start = next(answer for answer in answers if not _is_placed(answer, context))
                    found = context[max(0, start) : max(0, start) + len(text)]
                    example = f"{here}: {text[:40]!r} is not at character {start}, {found[:40]!r} is"
                total, misplaced = total + len(answers), misplaced + len(answers) - len(placed)
                lost += bool(answers) and not placed
                text, start = placed[0] if placed else ("", None)
                questions.append(
                    Question(
                        id=str(_value(entry, "id", (str, int), here, path)),
                        question=_value(entry, "question", str, here, path),
                        context=context,
                        answers=tuple(answer for answer, _ in answers),
                        start=start,
                        text=text,
                    )
                )
    if not questions:
        raise InputError(f"{path}: no questions. Give a file with at least one.")
    twice = [name for name, count in Counter(question.id for question in questions).items() if count > 1]
    if twice and unique_ids:
        raise InputError(
            f"{path}: {len(twice)} ids are those of several questions, the first {twice[0]!r}. Predictions are kept by "
            "id: give every question its own."
        )
    return SquadFile(str(path), questions, total, misplaced, lost, example)


def read_predictions(path: str | Path) -> dict[str, str]:
    """A file of predictions, id -> answer, as `predictions.json` and as the official scripts take it."""
    content = read_json(path)
    if not all(isinstance(answer, str) for answer in content.values()):
        wrong = next(name for name, answer in content.items() if not isinstance(answer, str))
        raise InputError(f"{path}: the answer to {wrong!r} is not text. Expected an object of question id and answer.")
    return content


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `InputError` if there is none."""
    try:
        with open_text(path) as file:
            content = json.loads(file.read().removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({one_line(error)}). Give one JSON object.") from error
    except RecursionError as error:
        raise InputError(f"{path}: not JSON that can be read (nested too deeply).") from error
    except (UnicodeDecodeError, OSError, lzma.LZMAError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a readable UTF-8 text file ({one_line(error)}).") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: {_kind(content)}, expected an object with the key 'data'.")
    return content


def _is_placed(answer: tuple[str, int], context: str) -> bool:
    text, start = answer
    return bool(text.strip()) and start >= 0 and context.startswith(text, start)


def _answers(entry: dict, where: str, path: str | Path) -> list[tuple[str, int]]:
    """Text and start of every answer."""
    if "answers" not in entry and entry.get("is_impossible") is True:
        return []
    return [
        (_value(answer, "text", str, here, path), _value(answer, "answer_start", int, here, path))
        for here, answer in _items(entry, "answers", where, path)
    ]


def _items(entry: dict, key: str, where: str, path: str | Path) -> list[tuple[str, dict]]:
    """The objects in the list `entry[key]`, each with its path in the file."""
    place = f"{where}.{key}".removeprefix(".")
    items = []
    for i, item in enumerate(_value(entry, key, list, where, path)):
        if not isinstance(item, dict):
            raise InputError(f"{path}: {place}[{i}] is {_kind(item)}, expected an object. {_LAYOUT}")
        items.append((f"{place}[{i}]", item))
    return items


def _value(entry: dict, key: str, types: type | tuple[type, ...], where: str, path: str | Path):
    place = f"{where}.{key}".removeprefix(".")
    if key not in entry:
        keys = ", ".join(map(repr, list(entry)[:6])) or "nothing"
        raise InputError(f"{path}: {place} is missing, there is only {keys}. {_LAYOUT}")
    value = entry[key]
    if not isinstance(value, types) or isinstance(value, bool):
        expected = _NAMES[types[0] if isinstance(types, tuple) else types]
        raise InputError(f"{path}: {place} is {_kind(value)}, expected {expected}. {_LAYOUT}")
    if isinstance(value, str) and not _is_unicode(value):
        raise InputError(f"{path}: {place} holds half a surrogate pair, which is no character. Repair the file.")
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    return _NAMES[type(value)]


def _read(path: str, data_args: QAArguments, unique_ids: bool = False) -> SquadFile:
    """A file of questions, and whether it is what the arguments say. Says how many answers are not in their place."""
    file = read_squad(path, unique_ids)
    if file.unanswerable and not data_args.version_2_with_negative:
        raise InputError(
            f"{path}: {file.unanswerable} of {len(file.questions)} questions have no answers. Add "
            "--version_2_with_negative if they cannot be answered; else give a file with answers."
        )
    if file.misplaced:
        say(
            f"{path}: {file.misplaced} of {file.answers} answers are not at their answer_start, and {file.lost} "
            f"questions have no other; the first: {file.example}"
        )
    return file


def training_questions(data_args: QAArguments) -> tuple[list[Question], dict[str, int]]:
    """The questions to train on, and what was left out."""
    file = _read(data_args.train_file, data_args)
    questions = [question for question in file.questions if question.start is not None or not question.answers]
    if not questions:
        raise InputError(f"{file.path}: no answer is at its answer_start, which counts characters from 0.")
    questions = questions[: data_args.max_train_samples]
    counts = {"train_dropped_answers": file.misplaced, "train_dropped_questions": file.lost}
    return questions, {"train_questions": len(questions)} | counts


def validation_questions(data_args: QAArguments) -> tuple[list[Question], dict[str, int]]:
    """The questions to evaluate on. All answers count, wherever they are: the official rule only compares texts."""
    file = _read(data_args.validation_file, data_args, unique_ids=True)
    return file.questions[: data_args.max_eval_samples], {"eval_misplaced_answers": file.misplaced}
