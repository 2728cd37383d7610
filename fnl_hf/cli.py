"""The command line on checkpoint directories: `fnl-hf factorize`, `compress`, `to-dense`, `fix-ranks`, `inspect`."""

import argparse
import contextlib
import copy
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import transformers
from safetensors import SafetensorError

from .attachment import attached
from .checkpoints import load_model, refuse_unwritable, write_checkpoint
from .config import (
    ALLOCATIONS,
    ATTENTION_KINDS,
    CALIBRATABLE,
    CALIBRATED,
    FORMS,
    INITIALIZATIONS,
    WILDCARDS,
    FNLConfig,
)
from .measure import spectra
from .overview import Summary, summary
from .patching import factorize, to_dense
from .ranks import fix_ranks
from .texts import encoded_texts, text_batches

TEXTS = """texts as the model will see them: one in each line (.txt), JSON lines (.json), tables (.tsv, .csv; GLUE's
columns are known, and numbers are no texts), or in the layout of SQuAD (.json); unpacks .gz and .xz"""
EXAMPLES = """examples:
  fnl-hf factorize my-bert my-bert-half --head_rank 0.5
  fnl-hf factorize my-bert my-bert-small --target_ratio 0.5
  fnl-hf factorize my-bert my-bert-thin --target_modules all-linear --rank 0.25
  fnl-hf compress my-bert my-bert-half --target_ratio 0.5 --calibration texts.txt --teach 500
  fnl-hf inspect my-bert-half
  fnl-hf to-dense my-bert-half my-bert-dense
  fnl-hf fix-ranks runs/bert/checkpoint-1500 my-bert-adapted

The model class comes from `architectures` in DIR/config.json. Tokenizer, processor and generation files are carried
along, and folders that hold no weights (1_Pooling). OUT is written as a whole or not at all, and never over files that
are there.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 2 after one line on stderr that says what is wrong, or 130 of Ctrl-C.

    Who reads its output may stop at any time (``fnl-hf inspect DIR | head``): that is no error.
    """
    try:
        options = _parser().parse_args(arguments)
        with _quiet_transformers():
            options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        pass
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, SafetensorError) as error:
        print(f"fnl-hf: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfnl-hf: interrupted, nothing was written", file=sys.stderr)
        return 130
    finally:
        _leave_closed_pipe()
    return 0


def _leave_closed_pipe() -> None:
    """Python flushes once more when it ends, and would complain then."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Errors only and no progress bars; fnl_hf's own log follows. For whoever calls ``main`` all is as before then."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        (transformers.logging.enable_progress_bar if bars else transformers.logging.disable_progress_bar)()


# -- commands ----------------------------------------------------------------------------------------


def _factorize(options: argparse.Namespace) -> None:
    config = FNLConfig(
        attention=() if options.attention == ["none"] else options.attention,
        head_rank=options.head_rank,
        head_layout=options.head_layout,
        target_modules=_modules(options.target_modules),
        rank=options.rank,
        target_ratio=options.target_ratio,
        rank_allocation=options.rank_allocation,
        form=options.form,
        rank_pattern=options.rank_pattern,
        exclude_modules=_modules(options.exclude_modules),
        init=options.init,
        calibration_inputs=options.calibration_inputs,
        calibration_outputs=options.calibration_outputs,
    )
    refuse_unwritable(options.out, options.dir)
    _check_calibration(options)
    model = load_model(options.dir)
    batches = None
    if options.calibration:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.dir)
        batches = text_batches(options.calibration, tokenizer, model, options.calibration_samples)
        config.calibrated_on = _words_for(options, batches)
    model = factorize(model, config, calibration=batches)
    _write(model, options)
    print(summary(model).headline())


def _words_for(options: argparse.Namespace, batches: list[dict]) -> str:
    """What the config says of the texts: their file's name, and how many of them."""
    return f"{sum(len(batch['input_ids']) for batch in batches)} texts of {options.calibration.name}"


def _compress(options: argparse.Namespace) -> None:
    from .compression import report, teach  # which takes the trainers along

    config = FNLConfig(
        target_modules="all",
        target_ratio=options.target_ratio,
        rank_allocation=options.rank_allocation,
        init="activation",
    )
    options.init = config.init
    refuse_unwritable(options.out, options.dir)
    _check_calibration(options)
    if options.teach < 0:
        raise ValueError(f"--teach {options.teach}: expected a number of steps, or 0 for none")
    dense = load_model(options.dir)
    if attached(dense):
        raise ValueError(
            f"{options.dir} is factorized already: fnl-hf to-dense {options.dir} DENSE makes it dense first"
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.dir)
    transformers.logging.enable_progress_bar()  # of what takes long; `main` puts it back
    batches = text_batches(options.calibration, tokenizer, dense, options.calibration_samples)
    config.calibrated_on = _words_for(options, batches)
    model = factorize(copy.deepcopy(dense), config, calibration=batches)
    taught = None
    if options.teach:
        taught = copy.deepcopy(model)
        teach(taught, dense, encoded_texts(options.calibration, tokenizer, dense), tokenizer, options.teach)
    found = report(dense, model, batches, taught)
    _write(taught if found.learned() else model, options)
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)


def _check_calibration(options: argparse.Namespace) -> None:
    takes = CALIBRATED | CALIBRATABLE
    if options.calibration is None and options.init in CALIBRATED:
        raise ValueError(f"--init {options.init} looks at data: give --calibration FILE, with a text in each line")
    if options.calibration is not None and options.init not in takes:
        raise ValueError(f"--calibration is for --init {' or '.join(sorted(takes))}, not {options.init}: drop it")
    if options.calibration is not None and options.calibration.is_dir():
        raise ValueError(f"--calibration {options.calibration} is a folder: give a file in it")
    if options.calibration is not None and not options.calibration.is_file():
        raise ValueError(f"--calibration {options.calibration}: no such file")
    if options.calibration_samples < 1:
        raise ValueError(f"--calibration_samples {options.calibration_samples}: expected at least 1")


def _to_dense(options: argparse.Namespace) -> None:
    refuse_unwritable(options.out, options.dir)
    model = to_dense(load_model(options.dir))
    _write(model, options)
    print(f"fnl_hf: {options.out} is an ordinary checkpoint of {model.num_parameters():,} parameters")


def _fix_ranks(options: argparse.Namespace) -> None:
    refuse_unwritable(options.out, options.dir)
    model = fix_ranks(load_model(options.dir), options.rank_tolerance, options.rank_max)
    _write(model, options)
    print(f"fnl_hf: {options.out} has the ranks that it was trained to, in ordinary factors")


def _write(model: transformers.PreTrainedModel, options: argparse.Namespace) -> None:
    if left := write_checkpoint(model, options.dir, options.out):
        print(f"fnl_hf: {', '.join(left)} not carried along: weights or logs of their own")


def _inspect(options: argparse.Namespace) -> None:
    model = load_model(options.dir)
    found, rows = summary(model), spectra(model)
    if options.json:
        document = json.loads(found.to_json())
        document["rows"] = [row | measured for row, measured in zip(document["rows"], rows, strict=True)]
        print(json.dumps(document, indent=2))
    else:
        print(_table(found, rows))


def _table(found: Summary, rows: list[dict]) -> str:
    """The summary, and below it a line per product with what its spectrum says."""
    lines = [str(found)]
    if rows:
        width = max(len(row["name"]) for row in rows)
        lines += ["", f"{'spectrum'.ljust(width)}  nuclear norm  stable rank  effective rank  leading singular values"]
    for row in rows:
        if row["nuclear_norm"] is None:
            lines.append(f"{row['name'].ljust(width)}  rotary: no single matrix")
            continue
        values = " ".join(f"{value:.3g}" for value in row["singular_values"])
        lines.append(
            f"{row['name'].ljust(width)}  {row['nuclear_norm']:12.4g}  {row['stable_rank']:11.2f}  "
            f"{row['effective_rank']:14.2f}  {values}"
        )
    return "\n".join(lines)


# -- options -----------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fnl-hf",
        description="Factorize, measure and densify Hugging Face checkpoints.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _command(commands, "factorize", _factorize, "make the weights of a dense checkpoint products of factors")
    command.add_argument("out", metavar="OUT", type=Path, help="directory to write")
    command.add_argument(
        "--attention", nargs="*", default=ATTENTION_KINDS, metavar="KIND",
        help="""products of heads: qk, ov (default: both), or only some by the ends of their names, as in
        layer.0.attention.ov; none: no heads""",
    )  # fmt: skip
    command.add_argument(
        "--head_rank", type=_rank, default=1.0, metavar="RANK",
        help="rank per head: 0.5 is half of head_dim, 8 is eight, 1 is rank one, 1.0 is full rank (default)",
    )  # fmt: skip
    command.add_argument(
        "--head_layout", default="padded", choices=("padded", "compact"), help="how reduced heads are stored"
    )
    command.add_argument(
        "--target_modules", nargs="+", metavar="NAME",
        help="""layers made low-rank: all-linear, all (embeddings and convolutions too), ends of their names, or one
        regular expression""",
    )  # fmt: skip
    command.add_argument(
        "--rank", type=_layer_rank, default=1.0, metavar="RANK",
        help="rank of layers: 0.25 is a quarter, 64 the rank itself, energy=0.9 what keeps that share of energy",
    )  # fmt: skip
    command.add_argument(
        "--target_ratio", type=float, metavar="RATIO",
        help="in place of both ranks: parameters of the whole model after / before, such as 0.5",
    )  # fmt: skip
    command.add_argument(
        "--rank_allocation", default="uniform", choices=ALLOCATIONS, help="how the ratio is shared (default: uniform)"
    )
    command.add_argument("--form", default="matrix", choices=FORMS, help="of layers: U V^T, or U M V^T (deep)")
    command.add_argument(
        "--init", default="spectral", choices=INITIALIZATIONS,
        help="""initialisation of the factors; activation needs texts (--calibration), functional, which is for layers
        that an activation follows, can do without""",
    )  # fmt: skip
    command.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help=f"for --init activation or functional: {TEXTS}",
    )  # fmt: skip
    command.add_argument(
        "--calibration_samples", type=int, default=512, metavar="N", help="lines of it, drawn at random (default: 512)"
    )
    command.add_argument(
        "--calibration_inputs", default="dense", choices=("dense", "compressed"),
        help="""inputs of each product: as the dense model gives them (default), or as what stands before it will once
        it is compressed (takes longer)""",
    )  # fmt: skip
    command.add_argument(
        "--calibration_outputs", choices=("alike", "loss"),
        help="""how errors of what a product puts out count: alike, or by how much the model's outputs depend on them;
        not given: as --rank_allocation goes by them""",
    )  # fmt: skip
    command.add_argument(
        "--rank_pattern", type=_rank_pattern, default={}, metavar="JSON",
        help="""ranks by regular expression on names of products or attention modules, the first match counts:
        '{"layer.0.attention.self": 4}' or '[["layer.0.attention.ov", 4], [".*ov", 0.5]]'""",
    )  # fmt: skip
    command.add_argument(
        "--exclude_modules", nargs="+", metavar="NAME",
        help="""what stays as it is: names of modules or products, or their ends (layer.0.attention), or one regular
        expression, such as 'decoder\\..*'""",
    )  # fmt: skip

    command = _command(commands, "compress", _compress, "make a smaller model of a trained one, by texts")
    command.add_argument("out", metavar="OUT", type=Path, help="directory to write")
    command.add_argument(
        "--target_ratio", type=float, default=0.5, metavar="RATIO",
        help="parameters of the whole model after / before (default: 0.5)",
    )  # fmt: skip
    command.add_argument(
        "--calibration", type=Path, required=True, metavar="FILE",
        help=TEXTS,
    )  # fmt: skip
    command.add_argument(
        "--calibration_samples", type=int, default=512, metavar="N", help="lines of it, drawn at random (default: 512)"
    )
    command.add_argument(
        "--rank_allocation", default="loss", choices=ALLOCATIONS,
        help="how ranks are shared: by what they cost the model (loss, default), by energies of the data, or uniform",
    )  # fmt: skip
    command.add_argument(
        "--teach", type=int, default=0, metavar="STEPS",
        help="then let it learn from the dense model for so many steps, on all texts of the file (default: 0)",
    )  # fmt: skip
    command.add_argument("--json", action="store_true", help="print JSON, not a table")

    command = _command(commands, "to-dense", _to_dense, "make an ordinary checkpoint of the same function")
    command.add_argument("out", metavar="OUT", type=Path, help="directory to write")

    command = _command(
        commands, "fix-ranks", _fix_ranks, "make ordinary factors of what was trained with rank_adaptation (U S V^T)"
    )
    command.add_argument("out", metavar="OUT", type=Path, help="directory to write")
    command.add_argument(
        "--rank_tolerance", type=float, default=0.0, metavar="SHARE",
        help="cut before what is together this share of a product's norm, as the end of a cycle does (default: 0)",
    )  # fmt: skip
    command.add_argument("--rank_max", type=int, metavar="RANK", help="and to this rank at most")

    command = _command(commands, "inspect", _inspect, "show what is factorized, what is not and why, and the spectra")
    command.add_argument("--json", action="store_true", help="print JSON, not tables")
    return parser


def _command(commands, name: str, run, summary: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    command.add_argument("dir", metavar="DIR", type=Path, help="directory of a checkpoint")
    command.set_defaults(run=run)
    return command


def _rank(text: str) -> float | int:
    """An int stays an int: 1 is rank one, 1.0 is full rank."""
    for number in (int, float):
        with contextlib.suppress(ValueError):
            if not math.isnan(value := number(text)):
                return value
    raise argparse.ArgumentTypeError(f"{text!r} is no number: give a fraction such as 0.5, or a rank such as 16")


def _layer_rank(text: str) -> float | int | dict[str, float]:
    return {"energy": float(_rank(text.removeprefix("energy=")))} if text.startswith("energy=") else _rank(text)


def _rank_pattern(text: str) -> dict | list:
    try:
        pattern = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(pattern, (dict, list)):
        raise argparse.ArgumentTypeError(f"{text!r} is no object of regular expression -> rank, and no list of pairs")
    return pattern


def _modules(names: list[str] | None) -> None | str | list[str]:
    """A list of names; one that could be none, having other characters than names have, is a regular expression."""
    wildcard = names and names[0] in WILDCARDS
    return names[0] if names and len(names) == 1 and (wildcard or not re.fullmatch(r"[\w.-]+", names[0])) else names


if __name__ == "__main__":
    sys.exit(main())
