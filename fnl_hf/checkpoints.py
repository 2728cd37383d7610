"""Directories of checkpoints: loading the model in one, and writing another with all that lies beside it."""

import json
import re
import shutil
import tempfile
from pathlib import Path

import transformers
from safetensors import SafetensorError
from torch import nn

from .attachment import attached
from .factorization import FactorLeaf
from .loading import written_whole
from .overview import summary

WEIGHTS = r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf)|.*\.index\.json"
LOGS = r"trainer_state\.json|run\.json|\w+_results\.json|events\.out\.tfevents.*"
OUTPUTS = r"\w*predictions\.(txt|tsv|json)|test_translations\.tsv|null_odds\.json"  # of scripts
CODE = r"\..*|.*\.py|__pycache__"  # never trusted; and what is hidden
# save_pretrained writes the config, and `_card` the README.md
NOT_CARRIED = rf"config\.json|README\.md|{WEIGHTS}|{LOGS}|{OUTPUTS}|{CODE}"
CARD_START, CARD_END = "<!-- fnl_hf -->", "<!-- /fnl_hf -->"


def load_model(directory: Path) -> transformers.PreTrainedModel:
    """The model in a directory, of the class that its config.json names, in the dtype that it is stored in."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{directory} holds no config.json: give the directory of a saved model") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{directory / 'config.json'} is not JSON: {error}") from None
    names = config.get("architectures") if isinstance(config, dict) else None
    named = isinstance(names, list) and names and isinstance(names[0], str)
    model_class = getattr(transformers, names[0], None) if named else None
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ValueError(
            f"{directory / 'config.json'} has architectures {names!r}, expected the name of a model class of "
            "transformers"
        )
    try:
        return model_class.from_pretrained(directory, dtype="auto", local_files_only=True)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, SafetensorError):
        raise
    except Exception as error:  # transformers checks few of the values in a config.json
        raise ValueError(f"{directory} does not load as {names[0]}: {type(error).__name__}: {error}") from error


def refuse_unwritable(out: Path, source: Path) -> None:
    """Before any work is done.

    Raises:
        ValueError: Something would be written over (OUT is a link, a file, or a folder that holds some), OUT lies in
            the folder that it is made of, or no folder can be made there.
    """
    if out.is_symlink():
        raise ValueError(f"{out} is a symbolic link: give the directory that it points to, or another OUT")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty directory: give another OUT, or remove it")
    if source.resolve() in out.resolve().parents:
        raise ValueError(f"{out} lies in {source}, which it would be made of: give another OUT")
    there = next(path for path in out.absolute().parents if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"{out} cannot be made ({there}: {error.strerror}): give another OUT") from error


def write_checkpoint(model: transformers.PreTrainedModel, source: Path, out: Path) -> list[str]:
    """Save a model in ``out`` with what lies beside the one that it was made of, whole or not at all.

    Returns:
        Folders of the source that were not carried along: they hold weights or logs of their own.
    """
    with written_whole(out) as folder:
        model.save_pretrained(folder)
        left = carry(source, folder)
        card = _card(model, source / "README.md", out.name)
        if card:
            (folder / "README.md").write_text(card, encoding="utf-8")
    return left


def carry(source: Path, folder: Path) -> list[str]:
    """Copy what lies beside a model, and is not there yet: tokenizer, generation, pooling; returns what has weights."""
    left = []
    for path in sorted(source.iterdir()):
        target = folder / path.name
        if path.is_file() and not target.exists() and not re.fullmatch(NOT_CARRIED, path.name):
            shutil.copy2(path, target)
        if path.is_dir() and not path.is_symlink() and not re.fullmatch(CODE, path.name):
            if any(re.fullmatch(f"{WEIGHTS}|{LOGS}", inside.name) for inside in path.rglob("*")):
                left.append(path.name)
            elif not target.exists():
                shutil.copytree(path, target, ignore=_not_carried)
    return left


def _not_carried(folder: str, names: list[str]) -> list[str]:
    """What stays behind of a folder without weights, such as 1_Pooling: code, and links to other folders."""
    paths = [Path(folder, name) for name in names]
    return [path.name for path in paths if re.fullmatch(CODE, path.name) or (path.is_symlink() and path.is_dir())]


def _card(model: nn.Module, source: Path, title: str) -> str:
    """The card of the source without its section about factorization, and the model's own section if it has one."""
    text = source.read_text(encoding="utf-8") if source.is_file() else ""
    text = re.sub(f"{CARD_START}.*{CARD_END}\n?", "", text, flags=re.DOTALL).strip()
    if not attached(model):
        return f"{text}\n" if text else ""
    text = text or f"---\nlibrary_name: transformers\ntags:\n- fnl_hf\n---\n\n# {title}"
    return f"{text}\n\n{model_card(model)}"


def model_card(model: nn.Module) -> str:
    """The section of a README.md that says what a factorized checkpoint is and what it takes to load it."""
    products, name = summary(model), type(model).__name__
    in_layers = any(isinstance(module, FactorLeaf) for module in model.modules())
    if in_layers:
        needs = (
            "Its weights are stored as factors, so it loads with `fnl_hf` only: without the import, "
            "transformers raises an error about mismatched sizes. `fnl-hf to-dense DIR OUT` makes an ordinary "
            "checkpoint of the same function."
        )
    else:
        needs = (
            "It is stored at full rank: without the import, transformers warns about an unknown quantization type "
            "and loads the same function, only not factorized."
        )
    return "\n".join(
        [
            CARD_START,
            "## Factorized weights",
            "",
            f"{products.headline().removeprefix('fnl_hf: ').capitalize()}. {needs}",
            "",
            "```python",
            "import fnl_hf  # pip install fnl-hf",
            f"from transformers import {name}",
            "",
            f'model = {name}.from_pretrained("path/to/this/checkpoint")',
            "```",
            CARD_END,
            "",
        ]
    )
