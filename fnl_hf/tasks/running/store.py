"""What is made from a corpus once and kept on disk: tokenizers, and token ids in memory maps."""

import array
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
from filelock import FileLock
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .errors import InputError, one_line
from .results import disk_errors

_FORMAT = 2  # of the files below; raise it when they change


class TokenStore:
    """The token ids of many texts, one behind another, memory-mapped.

    Attributes:
        tokens: (tokens,) ids of all texts, with what stands between them.
        ends: (texts,) where each text ends.
    """

    def __init__(self, directory: Path):
        self.directory = directory

    def __reduce__(self):  # workers map the file again
        return TokenStore, (self.directory,)

    @cached_property
    def tokens(self) -> np.ndarray:
        (path,) = self.directory.glob("tokens.*")  # the suffix is the type of the ids
        return np.memmap(path, path.suffix[1:], "r")

    @cached_property
    def ends(self) -> np.ndarray:
        return np.load(self.directory / "ends.npy", mmap_mode="r")


class TokenWriter:
    """Writes the files of a `TokenStore` into a new directory; use it in a `with` statement.

    Attributes:
        total: tokens that were written.
    """

    def __init__(self, directory: Path, tokenizer: PreTrainedTokenizerBase):
        directory.mkdir(parents=True)
        self.directory, self.total, self._ends = directory, 0, array.array("q")
        self.kind = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)

    def __enter__(self) -> "TokenWriter":
        self._file = open(self.directory / f"tokens.{self.kind.name}", "wb")  # noqa: SIM115 (closed in __exit__)
        return self

    def __exit__(self, *error) -> None:
        self._file.close()
        np.save(self.directory / "ends.npy", np.array(self._ends, np.int64))

    def write(self, ids: Sequence[int]) -> None:
        """Go on with a text."""
        self._file.write(np.array(ids, self.kind))
        self.total += len(ids)

    def end(self) -> None:
        """A text ends here."""
        self._ends.append(self.total)

    def write_texts(self, texts: Sequence[Sequence[int]]) -> None:
        """Write whole texts."""
        ends = self.total + np.cumsum([len(ids) for ids in texts], dtype=np.int64)
        self.write(list(itertools.chain.from_iterable(texts)))
        self._ends.frombytes(ends.tobytes())


def prepared_directory(prepared_dir: str | None, output_dir: str) -> Path:
    """Where a script keeps what it prepared: --prepared_dir, or `prepared` beside the output directory."""
    return Path(prepared_dir) if prepared_dir else Path(output_dir).parent / "prepared"


def fingerprint(files: Iterable[Path], **options) -> str:
    """Twelve hexadecimal digits that change with the files of a corpus (path, size, time) and with what is done."""
    inside = itertools.chain.from_iterable(sorted(path.rglob("*")) if path.is_dir() else [path] for path in files)
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in inside]
    about = {"format": _FORMAT, "files": stats, **options}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all that decides how text is stored."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        with tempfile.TemporaryDirectory() as directory:
            with suppress(NotImplementedError):
                tokenizer.save_vocabulary(directory)  # merges and scores, which the vocabulary does not tell
            files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(directory).iterdir())]
        about = json.dumps([sorted(tokenizer.get_vocab().items()), files])
    else:
        backend.no_truncation()  # every call sets both anew: they are left from the last
        backend.no_padding()
        about = backend.to_str()
    return hashlib.sha256(f"{about} {tokenizer.sep_token_id}".encode()).hexdigest()


def prepare_tokenizer(directory: Path, make: Callable[[], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """The tokenizer in `directory`, made there if there is none."""

    def write(partial: Path) -> None:
        tokenizer = make()
        with disk_errors():
            tokenizer.save_pretrained(partial)

    once(directory, write)
    return AutoTokenizer.from_pretrained(directory)


def once(directory: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a directory beside `directory`, and rename it when it is complete.

    What an interrupted call left is removed by the next one, which starts again. A second process waits for the first
    and finds its work done.

    Raises:
        InputError: what `write` raises, or nothing can be written there.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(directory.with_suffix(".lock")):
            if directory.is_dir():
                return
            partial = directory.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                write(partial)
                os.replace(partial, directory)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"{directory.parent}: nothing can be prepared there ({one_line(error)}). Give another --prepared_dir."
        ) from error
