"""`FNLConfig`: what to factorize, at which rank, how to initialise. Stored in a model's config.json."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .names import and_above, ends_with, matches_end

FORMAT_VERSION = 2  # of the stored plan: 1 had products of heads only
ATTENTION_KINDS = ("qk", "ov")
# See `initialization`
INITIALIZATIONS = (
    "spectral",
    "activation",
    "functional",
    "default",
    "spectral-ones",
    "orthogonal",
    "xavier",
    "kaiming",
)
CALIBRATED = frozenset({"activation"})  # those that look at data
CALIBRATABLE = frozenset({"functional"})  # those that may
LOOK_AHEAD = frozenset({"functional"})  # those that look at the activation that follows a layer
FORMS = ("matrix", "deep")
NOT_BUILT_FORMS = ("tucker", "tucker2", "tensor-train")
ALLOCATIONS = ("uniform", "error", "loss")
WILDCARDS = ("all-linear", "all")


@dataclass(kw_only=True, eq=False)
class FNLConfig(QuantizationConfigMixin):
    r"""Configuration of [`factorize`], and the `quantization_config` of a factorized checkpoint.

    Two configs are equal if they ask for the same: `head_rank=1` (rank one) and `1.0` (full rank) differ, the order of
    `attention` and of a list in `exclude_modules` does not count, that of `rank_pattern` does.

    Args:
        attention: Head products that become factorizations: any of "qk" and "ov"; `()` for none. To include only some
            by name, give the ends of their printed names instead, from a dot on, as in
            `("layer.0.attention.self.qk", "ov")`: "qk" is the end of every Q/K product's name. To include what lies
            below a module, exclude the rest: `exclude_modules=r"(?!encoder\.layer\.[01]\.).*"`.
        head_rank: Per-head rank: a float in (0, 1] is `int(head_rank * head_dim)`, at least 1; an int is the rank
            itself (1 is rank one, 1.0 is full rank).
        head_layout: "padded": factors of rank r that present the old width to the rest of the model. "compact": heads
            that are really narrower, attention and key-value cache included, where a replay of the attention module
            proves that the outputs are the same (both products of one rank, no rotation); padded elsewhere.
        target_modules: Layers made low-rank, each by itself, as PEFT selects them. `None`: none. "all-linear": linear
            layers; "all": embeddings and convolutions too. A list holds ends of names, from a dot on, and may hold
            "all-linear" or "all" as well; another string is a regular expression for whole names. Not named, outputs,
            classifiers, poolers, routers, the first convolution and tables that are not the model's input embeddings
            stay dense, and attention projections whose heads are products are left to those.
        exclude_modules: What stays as it is, and appears among the skipped. A list holds names: of modules (and what
            is inside them) or of products, whole or from one of their dots on. A string is a regular expression, to
            match the whole of a product's printed name or of its attention module's.
        rank: Rank of layers: a float is `max(1, round(rank * min(m, n)))` of the matrix (m, n), above 1 overcomplete;
            an int is the rank itself. `{"energy": 0.9}`: the least that keeps this share of the squared singular
            values. A rank that is given is taken as given; one by energy leaves a layer dense where it saves nothing.
        rank_pattern: Ranks that replace `head_rank` and `rank`, as a dict or as (regular expression, rank) pairs: the
            first that matches counts. It matches the printed name of a product ("encoder.layer.0.attention.self.qk") or
            a layer, or that of its attention module, from the start or from one of the dots on, and to the end.
        target_ratio: In place of `rank` and `head_rank`: parameters of the whole model after / before, in (0, 1). All
            that is selected shares the budget, heads included; with `target_modules=None` that is "all". A layer that
            would save nothing stays dense.
        rank_allocation: How `target_ratio` is shared. "uniform": one fraction of every rank. "error": the largest
            singular values (of what the weights make of the data of a calibration, if there is one), each relative to
            the energy of its layer, per parameter that they cost. "loss": those that cost the model most, by the
            curvature of its loss: see `calibration_outputs`.
        form: Of layers: "matrix", U V^T, or "deep", U M V^T with a square M that starts as the identity.
        init: "spectral": balanced factors of each product (the best ones of lower rank). "activation": the best ones
            on the data of `factorize(..., calibration=...)`, for trained models. "functional", for new models: of
            linear layers that ReLU, GELU or SiLU follows those that best approximate this function of their output,
            for standard normal inputs or with the moments of `calibration`; spectral ones of all else. "default": of
            heads the factors that the model has, at lower rank the leading rows of each head; of layers factors drawn
            anew, with the variance of the weights for their product. For comparison, of layers only: "spectral-ones"
            (spectral, with singular values of one), "orthogonal", "xavier" and "kaiming" factors; heads are then as in
            "default".
        calibration_inputs: Of "activation": what it takes for the inputs of a product. "dense": those that the dense
            model gives it on the data. "compressed": those that it will get from what stands before it, compressed
            already, from which it then approximates what the dense model computes; block by block, in five times the
            time.
        calibration_outputs: Of "activation": how errors of what a product puts out count. "alike", or by the "loss":
            how much the outputs of the whole model depend on them, which takes a backward. `None`: by the loss if
            `rank_allocation` goes by it.
        calibrated_on: What the data of a calibration was, in words for whoever reads the config.
        plan: What became of it in one model, a `fnl_hf.plan.Plan` as JSON, written by `factorize` and read when a
            checkpoint is loaded. Not for users.
        format_version: Of the plan.

    Raises:
        ValueError, TypeError: A field has no meaning; the message names what was given and what is expected.
        NotImplementedError: A field whose work is not built yet.
    """

    quant_method: str = "fnl"
    attention: tuple[str, ...] = ATTENTION_KINDS
    head_rank: float | int = 1.0
    head_layout: str = "padded"
    target_modules: None | str | list[str] = None
    exclude_modules: None | str | list[str] = None
    rank: float | int | dict[str, float] = 1.0
    rank_pattern: Mapping[str, float | int] | Iterable[tuple[str, float | int]] = field(default_factory=dict)
    target_ratio: float | None = None
    rank_allocation: str = "uniform"
    form: str = "matrix"
    init: str = "spectral"
    calibration_inputs: str = "dense"
    calibration_outputs: str | None = None
    calibrated_on: str | None = None
    plan: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self):
        if self.quant_method != "fnl":
            raise ValueError(f"quant_method is {self.quant_method!r}, expected 'fnl'")
        self.attention = _attention(self.attention)
        _check_choice("init", self.init, INITIALIZATIONS)
        _check_choice("form", self.form, FORMS, NOT_BUILT_FORMS)
        _check_choice("rank_allocation", self.rank_allocation, ALLOCATIONS)
        _check_choice("head_layout", self.head_layout, ("padded", "compact"))
        _check_head_rank("head_rank", self.head_rank)
        self.target_modules = _target_modules(self.target_modules)
        _check_rank("rank", self.rank)
        self.rank_pattern = _rank_pattern(self.rank_pattern)
        self.exclude_modules = _exclude_modules(self.exclude_modules)
        self._check_target_ratio()
        _check_choice("calibration_inputs", self.calibration_inputs, ("dense", "compressed"))
        if self.calibration_inputs == "compressed" and self.init != "activation":
            raise ValueError(f"calibration_inputs='compressed' is of init='activation', and init is {self.init!r}")
        _check_choice("calibration_outputs", self.calibration_outputs, (None, "alike", "loss"))
        if self.rank_allocation == "loss" and self.calibration_outputs == "alike":
            raise ValueError("rank_allocation='loss' and calibration_outputs='alike' exclude each other: drop one")
        if self.calibration_outputs == "loss" and self.init != "activation":
            raise ValueError(f"calibration_outputs='loss' is of init='activation', and init is {self.init!r}")
        if self.rank_allocation == "loss" and self.init != "activation":
            raise ValueError(
                f"rank_allocation='loss' measures on data, and init={self.init!r} takes none: give init='activation' "
                "and factorize(..., calibration=batches of model inputs)"
            )
        changed = self.form != "matrix" or not isinstance(self.rank, float) or self.rank != 1.0
        if changed and not self.layers_wanted():
            name = "rank" if self.form == "matrix" else "form"
            raise ValueError(
                f"{name}={getattr(self, name)!r} is of layers, and none is asked for: give target_modules, such as "
                "'all-linear' (head_rank is the rank of attention's heads)"
            )
        _check_format_version(self.format_version)

    def _check_target_ratio(self) -> None:
        ratio = self.target_ratio
        if ratio is None:
            if self.rank_allocation != "uniform":
                raise ValueError(f"rank_allocation is {self.rank_allocation!r}, which shares a target_ratio: give one")
            return
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
            raise TypeError(f"target_ratio is {ratio!r}, expected a float in (0, 1): parameters after / before")
        if not 0 < ratio < 1:
            raise ValueError(f"target_ratio is {ratio}, expected a float in (0, 1): parameters after / before")
        for name in ("rank", "head_rank"):
            value = getattr(self, name)
            if not isinstance(value, float) or value != 1.0:
                raise ValueError(f"target_ratio and {name}={value!r} are both given: the ratio decides the ranks")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FNLConfig) and self._canonical() == other._canonical()

    def _canonical(self) -> str:
        """As JSON, in which 1 and 1.0 differ and a tuple is a list."""
        stored = self.to_dict()
        return json.dumps({f.name: stored[f.name] for f in fields(self)}, sort_keys=True, default=repr)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data. Transformers sorts the keys of what it writes, so `rank_pattern` is a list of pairs."""
        return super().to_dict() | {"rank_pattern": [[pattern, rank] for pattern, rank in self.rank_pattern.items()]}

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """A config from JSON; a key that it does not know is an error that lists those it does."""
        known = {f.name for f in fields(cls)}
        _check_format_version(config_dict.get("format_version", FORMAT_VERSION))  # before: it explains unknown keys
        if unknown := sorted(map(str, set(config_dict) - known)):
            raise ValueError(f"FNLConfig does not know {', '.join(unknown)}; its fields are {', '.join(sorted(known))}")
        given = {name: kwargs.pop(name) for name in known & kwargs.keys()}
        return super().from_dict({**config_dict, **given}, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a config given to ``from_pretrained`` adds to the stored one: itself, for the quantizer to compare."""
        return {"requested": self}

    def get(self, name: str, default: Any = None) -> Any:
        """A field as from a dict, which ``from_pretrained(…, config=model.config)`` takes a stored config for."""
        return getattr(self, name, default)

    # -- what it says about names -----------------------------------------------------------------------

    def head_rank_of(self, names: Iterable[str], head_dim: int) -> int:
        """The rank asked for in a product of heads ``head_dim`` wide; it may be above that.

        Args:
            names: the product's and its attention module's.
        """
        names = list(names)
        ranks = (rank for pattern, rank in self.rank_pattern.items() if matches_end(pattern, names))
        rank = next(ranks, self.head_rank)
        return max(1, int(rank * head_dim)) if isinstance(rank, float) else rank

    def rank_of(self, names: Sequence[str], rows: int, columns: int) -> int:
        """The rank asked for in a layer of these names, of a (rows, columns) matrix; the full one if energy decides."""
        ranks = (rank for pattern, rank in self.rank_pattern.items() if matches_end(pattern, names))
        rank, full = next(ranks, 1.0 if self.target_ratio is not None else self.rank), min(rows, columns)
        if isinstance(rank, dict):
            return full
        return max(1, round(rank * full)) if isinstance(rank, float) else rank

    def is_fixed(self, names: Iterable[str]) -> bool:
        """Whether ``rank_pattern`` gives what has one of these names its rank, so that no budget decides."""
        names = list(names)
        return any(matches_end(pattern, names) for pattern in self.rank_pattern)

    @property
    def energy(self) -> float | None:
        """The share of the squared singular values that layers keep; None where ``rank`` says it otherwise."""
        return self.rank["energy"] if isinstance(self.rank, dict) and self.target_ratio is None else None

    def outputs_by_loss(self) -> bool:
        """Whether errors count by how much the model's outputs depend on them."""
        return "loss" in (self.calibration_outputs, self.rank_allocation)

    def is_full_rank(self) -> bool:
        """Whether every product keeps its rank, whatever model it lies in."""
        full = [self.head_rank] + ([self.rank] if self.target_modules is not None else [])
        ranks_are_full = all(isinstance(rank, float) and rank == 1.0 for rank in full)
        return ranks_are_full and not self.rank_pattern and self.target_ratio is None

    def layers_wanted(self) -> tuple[str, ...]:
        """The entries of ``target_modules``: one if it is a wildcard or a regular expression."""
        given = self.target_modules
        if given is None:
            return ("all",) if self.target_ratio is not None else ()
        return (given,) if isinstance(given, str) else tuple(given)

    def attention_kinds(self) -> tuple[str, ...]:
        """Which kinds of products are asked for, in all of a model or in some places."""
        return tuple(kind for kind in ATTENTION_KINDS if any(_kind(name) == kind for name in self.attention))

    def attention_names(self) -> tuple[str, ...]:
        """The entries of ``attention`` that are ends of names, rather than kinds."""
        return tuple(name for name in self.attention if name not in ATTENTION_KINDS)

    def exclusions(self) -> tuple[str, ...]:
        """The entries of ``exclude_modules``: one if it is a regular expression."""
        given = self.exclude_modules
        return () if given is None else (given,) if isinstance(given, str) else tuple(given)

    def excludes(self, entry: str, names: Iterable[str]) -> bool:
        """Whether an entry of ``exclude_modules`` means what has one of these names."""
        if isinstance(self.exclude_modules, str):
            return any(re.fullmatch(entry, name) for name in names)
        return any(ends_with(end, entry) for name in names for end in and_above(name))


# -- checks ------------------------------------------------------------------------------------------


def _check_choice(name: str, given: Any, known: tuple[str, ...], not_built: tuple[str, ...] = ()) -> None:
    if isinstance(given, str) and given in not_built:
        raise NotImplementedError(f"{name}={given!r} is not built yet; give one of {known}")
    if given not in known:
        raise ValueError(f"{name} is {given!r}, expected one of {known}")


def _target_modules(given: Any) -> None | str | list[str]:
    if given is None or given in WILDCARDS:
        return given
    if isinstance(given, str):
        _check_expression("target_modules", given)
        return given
    if not isinstance(given, (list, tuple, set, frozenset)) or not all(isinstance(n, str) and n for n in given):
        raise TypeError(f"target_modules is {given!r}, expected one of {WILDCARDS}, ends of names, or an expression")
    if not given:
        raise ValueError("target_modules is empty: give None for no layers, or name some")
    return sorted(set(given))


def _check_rank(name: str, rank: Any) -> None:
    """Of layers: above 1 as well."""
    if isinstance(rank, Mapping):
        energy = rank.get("energy")
        if set(rank) != {"energy"} or isinstance(energy, bool) or not isinstance(energy, (int, float)):
            raise ValueError(f'{name} is {rank!r}, expected a number or {{"energy": a share in (0, 1]}}')
        if not 0 < energy <= 1:
            raise ValueError(f"{name} keeps the energy {energy}, expected a share in (0, 1]")
        return
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise TypeError(f'{name} is {rank!r}, expected a float above 0, an int of at least 1, or {{"energy": 0.9}}')
    if not math.isfinite(rank) or rank <= 0:
        raise ValueError(f"{name} is {rank}, expected a float above 0 or an int of at least 1")


def _kind(entry: str) -> str:
    """The kind of product that an entry of ``attention`` is about: its last part."""
    return entry.rpartition(".")[2]


def _attention(given: Any) -> tuple[str, ...]:
    """In one order and without repetition: an order means nothing here."""
    entries = (given,) if isinstance(given, str) else () if given is None else given
    if isinstance(entries, Mapping) or not isinstance(entries, Iterable):
        raise TypeError(f"attention is {given!r}, expected any of {ATTENTION_KINDS} or ()")
    entries = list(entries)
    for entry in entries:
        if not isinstance(entry, str) or _kind(entry) not in ATTENTION_KINDS or entry.startswith("."):
            raise ValueError(
                f"attention names an unknown kind {entry!r}, expected any of {ATTENTION_KINDS}, ends of the names of "
                f"such products, or ()"
            )
    kinds = [kind for kind in ATTENTION_KINDS if kind in entries]
    # What a kind covers is covered.
    return (*kinds, *sorted({entry for entry in entries if _kind(entry) not in kinds}))


def _rank_pattern(given: Any) -> dict[str, float | int]:
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, (list, tuple)) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs
    ):
        raise TypeError(f"rank_pattern is {given!r}, expected a dict of regular expression -> rank, or such pairs")
    patterns: dict[str, float | int] = {}
    for pattern, rank in pairs:
        if isinstance(rank, Mapping):
            raise TypeError(f"rank_pattern[{pattern!r}] is {rank!r}, expected a number")
        _check_rank(f"rank_pattern[{pattern!r}]", rank)
        _check_expression("rank_pattern", pattern)
        if pattern in patterns:
            raise ValueError(f"rank_pattern has {pattern!r} twice, and only the first would count")
        patterns[pattern] = rank
    return patterns


def _exclude_modules(given: Any) -> None | str | list[str]:
    if isinstance(given, str):
        _check_expression("exclude_modules", given)
        return given
    if given is None:
        return None
    if not isinstance(given, (list, tuple, set, frozenset)) or not all(isinstance(n, str) and n for n in given):
        raise TypeError(f"exclude_modules is {given!r}, expected a regular expression, or a list of names")
    return sorted(set(given)) or None


def _check_expression(field_name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{field_name} has {pattern!r}, not a regular expression: {error}") from None


def _check_format_version(version: int) -> None:
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"the checkpoint's factorization has format_version {version!r}, this fnl_hf reads up to {FORMAT_VERSION}: "
            f"upgrade fnl_hf"
        )


def _check_head_rank(name: str, rank: float | int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise TypeError(f"{name} is {rank!r}, expected a float in (0, 1] or an int of at least 1")
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"{name} is {rank}, expected an int of at least 1, or a float in (0, 1]")
    if isinstance(rank, float) and not (math.isfinite(rank) and 0 < rank <= 1):
        raise ValueError(f"{name} is {rank}, expected a float in (0, 1] (1.0 is full rank) or an int of at least 1")
