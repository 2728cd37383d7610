"""New factors for every target of a plan, by the initialisation and the data that a config asks for."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from .calibration import Calibration
from .config import CALIBRATED, FNLConfig
from .factorization import Factorization
from .initialization import Sides, initial_factors, looks_at, refuse_non_finite
from .messages import progress, say
from .plan import Target
from .successive import successive


def fitted(
    model: nn.Module, targets: Sequence[Target], config: FNLConfig, data: Calibration | None
) -> Iterator[tuple[Target, Sequence[Tensor]]]:
    """(target, its new factors as its layer holds them) for every target of a dense model, which is not changed.

    Raises:
        ValueError: Weights are not finite.
    """
    looking = [target for target in targets if config.init in CALIBRATED or target.followed_by] if data else []
    outputs = data.curvatures(looking) if config.outputs_by_loss() else {}
    of_weights: dict[tuple, Sequence[Tensor]] = {}  # tied layers have one product
    blind: list[str] = []

    def initial(target: Target, product: Factorization, sides: Sides, crosses: Sides) -> Sequence[Tensor]:
        original, key = product.augmented(), (target.rank, *product.weights)
        refuse_non_finite(target.name, original)
        if target in looking and _loses(target, product) and not looks_at(product.form, original, sides):
            blind.append(target.name)
        if key not in of_weights:
            more = {
                "crosses": crosses,
                "outputs": outputs.get(product.weights) or None,
                "followed_by": target.followed_by,
            }
            new = initial_factors(product.form, original, target.rank, config.init, sides, **more)
            of_weights[key] = target.shaped(new)
        return of_weights[key]

    if data is not None and config.calibration_inputs == "compressed":
        yield from successive(model, targets, data, initial)
    else:
        sides = data.of(looking) if looking else {}
        for target in progress(targets, "factors"):
            product = target.found(model)
            yield target, initial(target, product, sides.get(product.weights), None)
    if blind:
        some = ", ".join(blind[:3]) + (f" and {len(blind) - 3} more" if len(blind) > 3 else "")
        instead = "spectral" if config.init in CALIBRATED else "standard normal inputs"
        say(f"fnl_hf: calibration does not reach {some}: {instead} there")


def _loses(target: Target, product: Factorization) -> bool:
    """Whether rank is cut where data could say what is lost."""
    return target.rank < product.full_rank and not product.kind.startswith("rotary")
