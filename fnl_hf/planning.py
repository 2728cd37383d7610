"""What `factorize` would do to a model: finders offer, the proof chooses, the families settle ranks."""

from collections.abc import Mapping, Sequence

from torch import nn

from .config import FNLConfig
from .heads import HeadTarget, find_heads
from .plan import FAMILIES, Candidate, Plan, Skip, Target, register_family
from .proof import Evidence

register_family(find_heads, HeadTarget)


def plan(model: nn.Module, config: FNLConfig, inputs: Mapping | None = None) -> Plan:
    """The targets of a dense model with their ranks, and what is skipped.

    Where structure does not decide (fused layouts, rotary positions), or everywhere if ``inputs`` are given, the first
    option of a candidate that is proven exact is taken.

    Raises:
        ProbeError: The model does not run on ``inputs``.
        ValueError: The config's ranks do not fit the model.
    """
    candidates = [Candidate.of(found, family) for family in FAMILIES.values() for found in family.finder(model, config)]
    owners = {option.name.rpartition(".")[0] for candidate in candidates for option in candidate.options}
    evidence = Evidence(model, inputs, owners)
    targets, skipped = [], []
    for candidate in candidates:
        target, reason = _chosen(candidate, evidence)
        if target is None:
            skipped.append(Skip(candidate.name, candidate.kind, reason))
        else:
            targets.append(target)
    _refuse_claimed_twice(targets)
    settled = []
    for family in FAMILIES.values():
        if of_family := [target for target in targets if type(target) is family.target]:
            settled += family.target.settle(model, config, of_family, evidence)
    return Plan(tuple(settled), tuple(skipped))


def _refuse_claimed_twice(targets: Sequence[Target]) -> None:
    """Raise a ValueError where two families, or one of them twice, want the same thing."""
    names, owners = set(), {}
    for target in targets:
        if target.name in names:
            raise ValueError(f"{target.name} is to be factorized twice: let one finder offer it, once")
        names.add(target.name)
        for path in target.parameters():
            other = owners.setdefault(path, target)
            if type(other) is not type(target):
                raise ValueError(
                    f"{path} is wanted for {other.name} ({other.kind}) and for {target.name} ({target.kind}): leave "
                    "one of them out"
                )


def _chosen(candidate: Candidate, evidence: Evidence) -> tuple[Target | None, str | None]:
    """The first option that is exact, or why there is none."""
    if candidate.options and candidate.options[0].found(evidence.model).lone:  # a weight by itself: nothing to prove
        return candidate.options[0], None
    if candidate.certain and evidence.inputs is None:
        return candidate.options[0], None
    verdict = None
    for option in candidate.options if evidence.recording else ():
        verdict = evidence.recording.verdict(option.name, option.kind, option.found)
        if verdict.exact:
            return option, None
    if verdict is None:
        obstacle = evidence.obstacle if candidate.options else ""
        return None, "; ".join(filter(None, (candidate.doubt, obstacle)))
    reason = verdict.reason or candidate.doubt
    return None, reason or "something stands between its projections: the output does not follow them"


def nothing_found(model: nn.Module, config: FNLConfig, plan: Plan) -> str:
    """Why a plan is empty, in words for the user."""
    wanted = " and ".join(config.attention) or "nothing (attention=())"
    reasons = "; ".join(sorted({f"{skip.kind}: {skip.reason}" for skip in plan.skipped}))
    why = (
        f"skipped {reasons}" if reasons else "no module has query, key, value and output projections that fit together"
    )
    return f"{type(model).__name__} has no product to factorize; asked for {wanted}: {why}"
