"""What `factorize` would do to a model: finders offer, the proof chooses, what is shared is left, ranks are settled."""

from collections.abc import Mapping, Sequence

from torch import nn

from .budget import with_ranks
from .calibration import Calibration
from .config import FNLConfig
from .heads import HeadTarget, find_heads
from .layers import LayerTarget, find_layers
from .names import matches_end
from .plan import FAMILIES, Candidate, Plan, Skip, Target, register_family
from .proof import Evidence, refuted_by_the_whole
from .selection import names_of, selected
from .ties import reads_one_weight_twice, without_shared

register_family(find_heads, HeadTarget)
register_family(find_layers, LayerTarget)

REFUTED = "the model changes with its basis, though a replay of its module does not: something else reads its factors"


def plan(model: nn.Module, config: FNLConfig, inputs: Mapping | None = None) -> Plan:
    """The targets of a dense model with their ranks, and what is skipped.

    Of what a finder offers in a place, the first option that is proven exact is taken. What cannot be proven, or
    shares its parameters with something else, is skipped.

    Raises:
        ProbeError: The model does not run on ``inputs``.
        ValueError: The config's ranks do not fit the model, or a name or pattern of it matches nothing.
    """
    return plan_with_evidence(model, config, inputs)[0]


def plan_with_evidence(
    model: nn.Module,
    config: FNLConfig,
    inputs: Mapping | None = None,
    whole: bool = True,
    calibration: Calibration | None = None,
) -> tuple[Plan, Evidence]:
    """``plan``, and what it was proven by.

    Args:
        whole: Leave out what a change of basis in the whole model refutes.
        calibration: What ranks by energy look at, beside the weights.
    """
    found = [Candidate.of(offered, family) for family in FAMILIES.values() for offered in family.finder(model, config)]
    candidates, skipped = selected(found, config)
    options = [option for candidate in candidates for option in candidate.options]
    leaves = {path.rpartition(".")[0] for option in options for path in option.parameters()}
    evidence = Evidence(model, inputs, {option.name for option in options}, leaves)
    chosen = []
    for candidate in candidates:
        target, reason = _chosen(candidate, evidence)
        if target is None:
            skipped.append(Skip(candidate.name, candidate.kind, reason))
        else:
            chosen.append((candidate, target))
    targets = _without_yielding(chosen, config)
    _refuse_claimed_twice(targets)
    targets, shared = without_shared(model, targets)
    products = [target.found for target in targets if not target.found(model).lone] if whole else []
    refuted = refuted_by_the_whole(evidence, products)
    skipped += [Skip(target.name, target.kind, REFUTED) for target in targets if target.name in refuted]
    targets, dense = with_ranks(model, config, [t for t in targets if t.name not in refuted], evidence, calibration)
    skipped += dense
    settled = []
    for family in FAMILIES.values():
        if of_family := [target for target in targets if type(target) is family.target]:
            settled += family.target.settle(model, config, of_family, evidence)
    return Plan(tuple(settled), (*skipped, *shared)), evidence


def _without_yielding(chosen: Sequence[tuple[Candidate, Target]], config: FNLConfig) -> list[Target]:
    """The targets but for those that give way to a target of another family.

    Raises:
        ValueError: A rank is given to nothing but what gives way.
    """
    firm = {path: target for candidate, target in chosen if not candidate.yields for path in target.parameters()}

    def gives_way(candidate: Candidate, target: Target) -> bool:
        others = (firm[path] for path in target.parameters() if path in firm)
        return candidate.yields and any(type(other) is not type(target) for other in others)

    kept = [(candidate, target) for candidate, target in chosen if not gives_way(candidate, target)]
    for pattern in config.rank_pattern if len(kept) < len(chosen) else ():
        matched = [pair for pair in chosen if matches_end(pattern, names_of(pair[0]))]
        if matched and not any(pair in kept for pair in matched):
            raise ValueError(
                f"rank_pattern has '{pattern}', which matches only layers whose heads are products, such as "
                f"{matched[0][1].name}: give the rank to the product, or set attention=()"
            )
    return [target for _, target in kept]


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


def _chosen(candidate: Candidate, evidence: Evidence) -> tuple[Target | None, str]:
    """The first option that is exact, or why there is none."""
    if not candidate.options:
        return None, candidate.doubt
    if candidate.certain or candidate.options[0].found(evidence.model).lone:  # a weight by itself: nothing to prove
        return candidate.options[0], ""
    if reads_one_weight_twice(candidate.options[0].found(evidence.model)):
        return None, f"shared with {candidate.options[0].name} itself: its factors are one weight"
    index, reason = evidence.chosen(
        [(option.name, option.kind, option.found) for option in candidate.options],
        recorded_only=candidate.optional,
    )
    if index is not None:
        return candidate.options[index], ""
    if not reason:  # it runs, and every option is refuted
        return None, candidate.doubt or "something stands between its projections: the output does not follow them"
    return None, "; ".join(filter(None, (candidate.doubt, reason)))


def nothing_found(model: nn.Module, config: FNLConfig, plan: Plan) -> str:
    """Why a plan is empty, in words for the user."""
    wanted = [*config.attention, *config.layers_wanted()]
    if not wanted:
        raise ValueError(
            "attention is () and target_modules None, which asks for nothing: name heads (qk, ov) or layers "
            "(all-linear)"
        )
    asked = " and ".join(wanted)
    reasons = "; ".join(sorted({f"{skip.kind}: {skip.reason}" for skip in plan.skipped}))
    why = f"skipped {reasons}" if reasons else "no module fits"
    if not reasons and config.attention:
        why = "no module has query, key, value and output projections that fit together"
    return f"{type(model).__name__} has nothing to factorize; asked for {asked}: {why}"
