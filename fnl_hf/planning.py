"""What `factorize` would do to a model: finders offer, the proof chooses, the families settle ranks."""

from collections.abc import Mapping

from torch import nn

from .config import FNLConfig
from .heads import HeadTarget, find_heads
from .plan import FAMILIES, Candidate, Plan, Skip, Target, register_family
from .proof import Evidence
from .selection import selected

register_family(find_heads, HeadTarget)


def plan(model: nn.Module, config: FNLConfig, inputs: Mapping | None = None) -> Plan:
    """The targets of a dense model with their ranks, and what is skipped.

    Where structure does not decide (fused layouts, rotary positions), or everywhere if ``inputs`` are given, the first
    option of a candidate that is proven exact is taken.

    Raises:
        ProbeError: The model does not run on ``inputs``.
        ValueError: The config's ranks do not fit the model, or a name or pattern of it matches nothing.
    """
    found = [Candidate.of(offered) for family in FAMILIES.values() for offered in family.finder(model, config)]
    candidates, skipped = selected(found, config)
    owners = {option.name.rpartition(".")[0] for candidate in candidates for option in candidate.options}
    evidence = Evidence(model, inputs, owners)
    targets = []
    for candidate in candidates:
        target, reason = _chosen(candidate, evidence)
        if target is None:
            skipped.append(Skip(candidate.name, candidate.kind, reason))
        else:
            targets.append(target)
    settled = []
    for family in FAMILIES.values():
        if of_family := [target for target in targets if type(target) is family.target]:
            settled += family.target.settle(model, config, of_family, evidence)
    return Plan(tuple(settled), tuple(skipped))


def _chosen(candidate: Candidate, evidence: Evidence) -> tuple[Target | None, str | None]:
    """The first option that is exact, or why there is none."""
    if candidate.certain and evidence.inputs is None:
        return candidate.options[0], None
    verdict = None
    for option in candidate.options if evidence.recording else ():
        if option.found(evidence.model).lone:  # a weight by itself: there is nothing to prove
            return option, None
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
