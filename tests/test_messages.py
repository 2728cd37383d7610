"""The library's one logger: where it writes, on which process, and how it is silenced."""

import importlib
import logging

import pytest
import transformers

from fnl_hf import messages
from fnl_hf.messages import aligned, logger, say


@pytest.fixture(autouse=True)
def _as_it_starts():
    verbosity, level = transformers.logging.get_verbosity(), logger.level
    transformers.logging.set_verbosity_warning()
    yield
    transformers.logging.set_verbosity(verbosity)
    logger.setLevel(level)


def test_it_starts_at_info_on_standard_error(capsys):
    assert logger is logging.getLogger("fnl_hf") and logger.level == logging.INFO and not logger.propagate
    say("one line")
    logger.debug("not this")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "one line\n")


def test_only_the_main_process_speaks(capsys, monkeypatch):
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        say(f"from {rank}")
    assert capsys.readouterr().err == "from 0\n"


def test_it_follows_transformers_down_and_back(capsys):
    transformers.logging.set_verbosity_error()
    say("silenced")
    logger.warning("silenced too")
    logger.error("an error")
    transformers.logging.set_verbosity(logging.CRITICAL)
    logger.error("silenced as well")
    transformers.logging.set_verbosity_warning()  # its default: no wish for silence
    say("back")
    transformers.logging.set_verbosity_info()
    say("still")
    assert capsys.readouterr().err.splitlines() == ["an error", "back", "still"]


def test_its_level_is_the_users(capsys):
    logging.getLogger("fnl_hf").setLevel(logging.WARNING)
    say("silenced")
    importlib.reload(messages).say("a reload keeps the level")
    logger.warning("a warning")
    assert capsys.readouterr().err == "a warning\n"


def test_a_reload_adds_no_second_handler(capsys):
    importlib.reload(messages).say("once")
    assert capsys.readouterr().err == "once\n"
    assert [handler.name for handler in logger.handlers].count("fnl_hf") == 1  # pytest has handlers of its own here


def test_tables_are_aligned():
    assert aligned([("a", "bcd"), ("efg", "")]) == "a    bcd\nefg"
