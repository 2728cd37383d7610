"""`FNLConfig`: what to factorize, at which rank, how to initialise. Stored in a model's config.json."""

import math
import re
from dataclasses import dataclass, field, fields
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

FORMAT_VERSION = 2  # of the stored plan: 1 had products of heads only
ATTENTION_KINDS = ("qk", "ov")
INITIALIZATIONS = ("spectral", "default")  # the functions are in `initialization`
CALIBRATED = frozenset()  # those of them that look at data
KEEP_THE_PRODUCT = frozenset(INITIALIZATIONS)  # those that leave it as it is at full rank


@dataclass(kw_only=True)
class FNLConfig(QuantizationConfigMixin):
    """Configuration of [`factorize`], and the `quantization_config` of a factorized checkpoint.

    Args:
        attention: Head products that become factorizations: any of "qk" and "ov"; `()` for none.
        head_rank: Per-head rank: a float in (0, 1] is `int(head_rank * head_dim)`, at least 1; an int is the rank
            itself (1 is rank one, 1.0 is full rank).
        head_layout: "padded": factors of rank r that present the old width to the rest of the model. "compact": heads
            that are really narrower, attention and key-value cache included, where a replay of the attention module
            proves that the outputs are the same (both products of one rank, no rotation); padded elsewhere.
        target_modules, exclude_modules, rank, target_ratio: Low-rank layers; not built yet.
        rank_pattern: Regular expression -> rank. The first pattern that matches the end of an attention module's
            name replaces `head_rank` there.
        init: "spectral": balanced factors of each product (the best ones of lower rank). "default": the factors that
            the model has; at lower rank the leading rows of each head.
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
    rank: float | int = 1.0
    rank_pattern: dict[str, float | int] = field(default_factory=dict)
    target_ratio: float | None = None
    init: str = "spectral"
    plan: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self):
        if self.quant_method != "fnl":
            raise ValueError(f"quant_method is {self.quant_method!r}, expected 'fnl'")
        self.attention = (self.attention,) if isinstance(self.attention, str) else tuple(self.attention or ())
        for kind in self.attention:
            if kind not in ATTENTION_KINDS:
                raise ValueError(f"attention names an unknown kind {kind!r}, expected any of {ATTENTION_KINDS} or ()")
        if self.init not in INITIALIZATIONS:
            raise ValueError(f"init is {self.init!r}, expected one of {INITIALIZATIONS}")
        _check_head_rank("head_rank", self.head_rank)
        if not isinstance(self.rank_pattern, dict):
            raise TypeError(f"rank_pattern is {self.rank_pattern!r}, expected a dict of regular expression -> rank")
        for pattern, rank in self.rank_pattern.items():
            _check_head_rank(f"rank_pattern[{pattern!r}]", rank)
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"rank_pattern has {pattern!r}, not a regular expression: {error}") from None
        if self.head_layout not in ("padded", "compact"):
            raise ValueError(f"head_layout is {self.head_layout!r}, expected 'padded' or 'compact'")
        for name, unset in (("target_modules", None), ("exclude_modules", None), ("rank", 1.0), ("target_ratio", None)):
            if getattr(self, name) != unset:
                raise NotImplementedError(f"{name}: low-rank layers are not built yet; leave it at {unset!r}")
        _check_format_version(self.format_version)

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """A config from JSON; a key that it does not know is an error that lists those it does."""
        known = {f.name for f in fields(cls)}
        _check_format_version(config_dict.get("format_version", FORMAT_VERSION))  # before: it explains unknown keys
        if unknown := sorted(set(config_dict) - known):
            raise ValueError(f"FNLConfig does not know {', '.join(unknown)}; its fields are {', '.join(sorted(known))}")
        return super().from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a config given to ``from_pretrained`` adds to the stored one: itself, for the quantizer to compare."""
        return {"requested": self}

    def get(self, name: str, default: Any = None) -> Any:
        """A field as from a dict, which ``from_pretrained(…, config=model.config)`` takes a stored config for."""
        return getattr(self, name, default)

    def head_rank_of(self, name: str, head_dim: int) -> int:
        """The rank asked for in the attention module ``name``, of heads ``head_dim`` wide; it may be above that."""
        rank = next((r for pattern, r in self.rank_pattern.items() if _matches(pattern, name)), self.head_rank)
        return max(1, int(rank * head_dim)) if isinstance(rank, float) else rank


def _matches(pattern: str, name: str) -> bool:
    """PEFT's rule for ``rank_pattern``: the pattern matches the whole name or what follows one of its dots."""
    return re.match(rf"(?:.*\.)?(?:{pattern})$", name) is not None


def _check_format_version(version: int) -> None:
    if type(version) is not int or version > FORMAT_VERSION:
        raise ValueError(
            f"the checkpoint's factorization has format_version {version}, this fnl_hf reads up to {FORMAT_VERSION}: "
            f"upgrade fnl_hf"
        )


def _check_head_rank(name: str, rank: float | int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise TypeError(f"{name} is {rank!r}, expected a float in (0, 1] or an int of at least 1")
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"{name} is {rank}, expected an int of at least 1, or a float in (0, 1]")
    if isinstance(rank, float) and not (math.isfinite(rank) and 0 < rank <= 1):
        raise ValueError(f"{name} is {rank}, expected a float in (0, 1] (1.0 is full rank) or an int of at least 1")
