"""What a run was started with, kept beside its checkpoints: a later call in its directory answers for the same.

`run.json` holds the arguments, the versions, and fingerprints of the corpus, the checkpoint it starts from, and the
tokenizer. What decides the result must be the same in a later call; names that may change are listed, all others may
not.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from .errors import InputError
from .results import write_json

NAME = "run.json"
NONE = "none"  # the fingerprint of what a run does without
_REMEDY = "Give another --output_dir, or --overwrite_output_dir to start over."
_BLOCK, _BLOCKS = 1 << 16, 32  # bytes of a file's sample, and samples of a file
_PACKAGES = ("fnl-hf", "torch", "transformers")
_PROCESSES = "processes"

# What a script writes of its translations, answers and scores
_SCORES = (
    *(f"{split}_results.json" for split in ("all", "train", "eval", "test", "run")), "generated_predictions.txt",
    "test_translations.tsv", "predictions.json", "nbest_predictions.json", "null_odds.json", "predictions.tsv",
    "test_predictions.tsv",
)  # fmt: skip
# What a run and its Trainer write into the output directory, and what a new start removes of it
RESULTS = (
    NAME, *_SCORES, "trainer_state.json", "training_args.bin", "config.json", "generation_config.json",
    "model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json",
    "vocab.txt", "vocab-src.json", "vocab-tgt.json", "merges.txt", "source.spm", "target.spm", "spiece.model",
    "spm.model", "sentencepiece.model", "sentencepiece.bpe.model", "tokenizer.model",
)  # fmt: skip

# Of the arguments of the Trainer: how long, on what, and what is looked at, but not what is learned. A checkpoint
# and a tokenizer go by their fingerprints
_FREE = """
output_dir overwrite_output_dir do_train do_eval do_predict max_steps num_train_epochs log_level log_level_replica
log_on_each_node log_factorizations logging_strategy logging_steps logging_first_step logging_nan_inf_filter
include_num_input_tokens_seen disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
trackio_static_space_id skip_memory_metrics debug eval_strategy eval_steps eval_delay eval_on_start
eval_accumulation_steps eval_do_concat_batches eval_use_gather_object per_device_eval_batch_size
prediction_loss_only batch_eval_metrics include_for_metrics bf16_full_eval fp16_full_eval predict_with_generate
generation_max_length generation_num_beams generation_config save_strategy save_steps save_total_limit
save_on_each_node save_only_model enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id
hub_strategy hub_always_push hub_revision restore_callback_states_from_checkpoint resume_from_checkpoint
auto_find_batch_size use_cpu local_rank accelerator_config parallelism_config ddp_find_unused_parameters
ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed
full_determinism dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns tf32
torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps use_cache activation_checkpointing
activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs use_liger_kernel
liger_kernel_config model_name_or_path tokenizer_name
"""
MAY_CHANGE = frozenset(_FREE.split())


def arguments_of(*groups: Any) -> dict[str, Any]:
    """name -> value of all arguments in dataclasses, as JSON gives them back."""
    values = {}
    for group in groups:
        known = group.to_dict() if isinstance(group, TrainingArguments) else asdict(group)
        values |= {each.name: known[each.name] for each in fields(group) if each.init}
    return json.loads(json.dumps(values, default=str))


def versions(processes: int) -> dict[str, str]:
    """What a run goes by beside its arguments: of packages, and the number of processes."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a source tree that is not installed
            found[package] = "unknown"
    return found | {_PROCESSES: str(processes)}


def read_record(output_dir: Path) -> dict[str, dict] | None:
    """The record of the run in a directory; None if there is none. Raises `InputError` for one that is damaged."""
    path = output_dir / NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(record[key], dict) for key in ("arguments", "inputs", "versions")):
            raise TypeError("not of a run")
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{path}: not a record that can be read ({type(error).__name__}). {_REMEDY}") from error
    return record


def write_record(output_dir: Path, arguments: dict, inputs: dict, versions: dict) -> None:
    """Keep what a run was started with: arguments, fingerprints of its inputs and versions of what it runs on."""
    write_json(output_dir / NAME, {"arguments": arguments, "inputs": inputs, "versions": versions})


def check_arguments_recorded(
    output_dir: Path, record: dict, given: dict, may_change: Iterable[str], remedy: str = _REMEDY
) -> None:
    """Raises `InputError` where a call has other arguments than the run in its directory.

    Arguments that only one of the two versions knows are passed over.
    """
    stored = record["arguments"]
    others = [
        f"--{name} {_shown(stored[name])}, not {_shown(given[name])}"
        for name in given
        if name in stored and name not in may_change and stored[name] != given[name]
    ]
    if others:
        raise InputError(f"--output_dir {output_dir} holds a run with {'; '.join(others[:5])}. {remedy}")


def check_used(output_dir: Path, given: Mapping[str, Any], may_change: Iterable[str]) -> dict[str, Any]:
    """Raises `InputError` where a call that only uses a finished run is given arguments that are not the run's.

    Args:
        given: the arguments that the user gave, and no defaults.

    Returns:
        the run's arguments; none if it has no record.
    """
    record = read_record(output_dir) or {"arguments": {}, "inputs": {}}
    if (path := given.get("model_name_or_path")) is not None:
        own = path == record["arguments"].get("model_name_or_path") or Path(path).resolve() == output_dir.resolve()
        if not own and fingerprint_of_checkpoint(path) != record["inputs"].get("checkpoint to start from"):
            raise InputError(
                f"--model_name_or_path {path}: nothing is trained, and it is --output_dir that is used. Give {path} as "
                "--output_dir, or leave it out."
            )
    check_arguments_recorded(output_dir, record, dict(given), {*MAY_CHANGE, *may_change}, "Leave that out.")
    return record["arguments"]


def check_inputs_recorded(output_dir: Path, record: dict, given: Mapping[str, str]) -> None:
    """Raises `InputError` where a call has another corpus, checkpoint or tokenizer than the run in its directory."""
    for name, digest in given.items():
        if (known := record["inputs"].get(name, NONE)) != digest:
            raise InputError(
                f"--output_dir {output_dir} holds a run with another {name} (fingerprint {known}, not {digest}). "
                f"{_REMEDY}"
            )


def check_processes_recorded(output_dir: Path, record: dict, processes: int) -> None:
    """Raises `InputError` for another number of processes than that of a run: each of them has batches of its own."""
    known = record["versions"].get(_PROCESSES, str(processes))
    if known != str(processes):
        raise InputError(
            f"--output_dir {output_dir} holds a run of {known} process(es), and these are {processes}: a step would be "
            f"another one. Start {known}, or give another --output_dir."
        )


def version_changes(record: dict, now: Mapping[str, str]) -> list[str]:
    """What differs in the packages of a run and of this call, such as "torch 2.9, now 2.10"."""
    stored = record["versions"]
    differ = [name for name in now if name != _PROCESSES and stored.get(name, now[name]) != now[name]]
    return [f"{name} {stored[name]}, now {now[name]}" for name in differ]


def fingerprint_of_files(paths: Iterable[str | Path]) -> str:
    """Twelve hexadecimal digits of the content of files and folders, wherever they are; the same for none.

    Of a large file: its size, its begin and its end, and samples from in between.
    """
    digest = hashlib.sha256()
    for path in map(Path, paths):
        inside = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
        for file in inside:
            size = file.stat().st_size
            digest.update(f"{file.relative_to(path) if path.is_dir() else ''} {size}\n".encode())
            with open(file, "rb") as content:
                for i in range(_BLOCKS):
                    content.seek(i * _BLOCK if size <= _BLOCK * _BLOCKS else (size - _BLOCK) * i // (_BLOCKS - 1))
                    digest.update(content.read(_BLOCK))
    return digest.hexdigest()[:12]


def fingerprint_of_checkpoint(path: str) -> str:
    """Of the weights, the config and the tokenizer in a checkpoint's directory; of the name, if it is on the hub.

    The scores of a run there do not count: to score it once more does not make it another checkpoint.
    """
    folder = Path(path)
    files = sorted(each for each in folder.glob("*") if each.is_file()) if folder.is_dir() else []
    kept = [each for each in files if not each.name.startswith((".", "training_args", "trainer_state"))]
    kept = [each for each in kept if each.suffix in (".safetensors", ".bin", ".json", ".txt", ".model", ".spm")]
    kept = [each for each in kept if each.name not in (NAME, *_SCORES)]
    return fingerprint_of_files(kept) if kept else hashlib.sha256(path.encode()).hexdigest()[:12]


def fingerprint_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what decides how text becomes tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    if backend is not None:  # without what every call sets anew
        about = {
            key: part for key, part in json.loads(backend.to_str()).items() if key not in ("truncation", "padding")
        }
        vocabulary = json.dumps(about, sort_keys=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:12]


def remove_run(output_dir: Path) -> None:
    """Remove the checkpoints and results of the run in a directory, and nothing else that is there."""
    for path in output_dir.glob("checkpoint-*"):
        if path.is_dir() and path.name.removeprefix("checkpoint-").isdigit():
            shutil.rmtree(path)
    for folder in (output_dir, *filter(Path.is_dir, output_dir.glob("test-*"))):  # further test sets are scored there
        names = RESULTS if folder == output_dir else _SCORES
        for path in folder.iterdir():
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in names):
                path.unlink()


def _shown(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
