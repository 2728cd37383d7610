"""Arguments that say what of a model is factorized, and how: the base of every script's model arguments."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fnl_hf import FNLConfig, FNLTrainingArguments

from .errors import InputError, one_line_errors


@dataclass
class FactorizationArguments:
    """What of a model is factorized, and how: the base of every script's model arguments.

    Scripts that train new models factorize them unless told otherwise. Those that only start from checkpoints set
    `factorize` to False: what is factorized in a checkpoint stays so without being asked for.

    Attributes:
        given: names of all arguments, of any group, that the user gave.
    """

    factorize: bool = field(default=True, metadata={"help": "Factorize the model, as the arguments below say."})
    low_rank: float | None = field(
        default=None,
        metadata={
            "help": "For all linear layers inside the model this share of their rank: --attention none "
            "--target_modules all-linear --rank SHARE, and of a new model --fnl_optim spectron, unless these are given."
        },
    )
    attention: list[str] = field(
        default_factory=lambda: ["qk", "ov"], metadata={"help": "Products of attention's heads: qk, ov or both; none."}
    )
    head_rank: str = field(
        default="1.0", metadata={"help": "Rank of every head: a fraction of its width (0.5), or a whole number (16)."}
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers made low-rank: all-linear, all (embeddings and convolutions too), or ends of their names. "
            "Attention's projections are among them with --attention none."
        },
    )
    exclude_modules: list[str] | None = field(
        default=None, metadata={"help": "Ends of the names of modules that stay as they are."}
    )
    rank: str = field(
        default="1.0",
        metadata={
            "help": "Rank of layers: a fraction (0.25; above 1: overcomplete), a whole number (64), or energy=0.9: the "
            "least that keeps this share of the squared singular values."
        },
    )
    target_ratio: float | None = field(
        default=None,
        metadata={"help": "In place of both ranks: parameters of the whole model after / before, such as 0.5."},
    )
    rank_allocation: str = field(
        default="uniform", metadata={"help": "How target_ratio is shared: uniform, or error (by singular values)."}
    )
    form: str = field(default="matrix", metadata={"help": "Of layers: matrix (U V^T) or deep (U M V^T)."})
    init: str = field(
        default="spectral",
        metadata={
            "help": "Initialisation of the factors: spectral or default; of layers also functional (for those that an "
            "activation follows), and spectral-ones, orthogonal, xavier or kaiming, to compare."
        },
    )
    given: frozenset[str] = field(default=frozenset(), init=False, repr=False)


def parse_rank(text: str, name: str = "head_rank") -> float | int | dict[str, float]:
    """ "0.5" is a fraction, "16" the rank itself ("1" is rank one, "1.0" full rank); of layers "energy=0.9" too."""
    if name == "rank" and text.startswith("energy="):
        with one_line_errors(ValueError):
            return {"energy": float(text.removeprefix("energy="))}
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    or_energy = ", or energy=0.9" if name == "rank" else ""
    raise InputError(
        f"--{name} {text}: not a number. Give a fraction such as 0.5 or a whole rank such as 16{or_energy}."
    )


def make_config(arguments: FactorizationArguments) -> FNLConfig | None:
    """The factorization that the arguments ask for; None for none. Raises `InputError` if there is no such one."""
    if not arguments.factorize:
        return None
    ranks = {name: parse_rank(getattr(arguments, name), name) for name in ("head_rank", "rank")}
    names = arguments.target_modules
    if arguments.init == "activation":
        raise InputError(
            "--init activation looks at what a trained model sees: fnl-hf factorize DIR OUT --init activation "
            "--calibration FILE makes such a checkpoint, to be given as --model_name_or_path."
        )
    with one_line_errors(ValueError, NotImplementedError):
        return FNLConfig(
            attention=() if arguments.attention == ["none"] else tuple(arguments.attention),
            target_modules=names[0] if names in (["all"], ["all-linear"]) else names,
            exclude_modules=arguments.exclude_modules,
            target_ratio=arguments.target_ratio,
            rank_allocation=arguments.rank_allocation,
            form=arguments.form,
            init=arguments.init,
            **ranks,
        )


def low_rank_words(given: Mapping[str, Any]) -> list[str]:
    """``--low_rank`` as the words that it stands for, to come before those that are given.

    A checkpoint is fine-tuned by its usual optimizer: Spectron's rate is one of new weights.

    Raises:
        InputError: An argument that says otherwise.
    """
    if (share := given.get("low_rank")) is None:
        return []
    if "attention" not in given and "head_rank" in given:
        raise InputError(
            f"--head_rank {given['head_rank']} is of heads, which --low_rank leaves to their linear layers. Add "
            "--attention qk ov, or drop it."
        )
    if both := sorted(given.keys() & {"rank", "target_ratio"}):
        raise InputError(
            f"--low_rank {share:g} and --{both[0]}: the one says what the other does. Drop one of the two."
        )
    preset = ["--factorize", "true", "--attention", "none", "--target_modules", "all-linear", "--rank", str(share)]
    return preset if given.get("model_name_or_path") else [*preset, "--fnl_optim", "spectron"]


def check_factorization(model_args: FactorizationArguments, args: FNLTrainingArguments) -> None:
    """Raises `InputError` where an argument is of a factorization that is not asked for."""
    usual = type(model_args)()
    if not model_args.factorize:
        why = (
            "and --no_factorize is given. Drop one of the two"
            if usual.factorize
            else "of a dense checkpoint. Add --factorize"
        )
        for name in (each.name for each in fields(FactorizationArguments) if each.init and each.name != "factorize"):
            if getattr(model_args, name) != getattr(usual, name):
                raise InputError(f"--{name} is of the factorization, {why}.")
    if args.factorize_at and not model_args.factorize:
        remedy = "Drop --no_factorize." if usual.factorize else "Add --factorize."
        raise InputError(f"--factorize_at {args.factorize_at} is when to factorize. {remedy}")
    if not model_args.factorize and not usual.factorize:
        return  # a factorized checkpoint has its own kinds
    layers = model_args.target_modules is not None or model_args.target_ratio is not None
    kinds = [*(k for k in model_args.attention if k != "none"), *(("linear", "embedding", "conv") if layers else ())]
    if unknown := set(args.frobenius_decay_kinds or ()) - set(kinds):
        raise InputError(
            f"--frobenius_decay_kinds {min(unknown)}: not a kind that is factorized. Give any of "
            f"{', '.join(kinds)}, or change --attention or --target_modules."
        )
