"""How much a model's outputs depend on what each of its layers puts out: second moments of gradients.

With G = E[g gᵀ] for the gradients g of the loss by what a layer puts out, an error Δy there costs ½ Δyᵀ G Δy: one of
the two factors of the loss's curvature by the layer's weight that K-FAC takes it for (Martens and Grosse, *Optimizing
Neural Networks with Kronecker-factored Approximate Curvature*, 2015). The loss is the distance of the outputs from what
they are (`fnl_hf.distillation`), so no labels are needed: its gradients vanish, and those of random probes, whose
second moments are its curvature, stand for them.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .distillation import Teacher
from .moments import Moment, checked, evaluated, masks_of, plus, run
from .plan import Target

WIDE = 4096  # features, of which all pairs would take more than 128 MiB
EVEN = 0.1  # of a curvature, alike in all directions, where the outputs are few


class _Curvature(Moment):
    """The second moment of gradients, or its diagonal."""

    diagonal = False

    def add(self, module: nn.Module, value: Tensor, masks: Sequence[Tensor]) -> None:
        self.diagonal = self.activation.read is None or value.shape[-1] > WIDE
        if not self.diagonal:
            return super().add(module, value, masks)
        kept = self.kept(value, masks).flatten(0, -2).float()
        self.total = plus(self.total, kept.square().sum(0)[None])
        self.positions += len(kept)

    def mean(self, shrink: bool) -> tuple[Tensor | None, None]:
        if self.diagonal and self.positions:
            return self.total / self.positions, None
        return super().mean(shrink)


def curvatures(
    model: nn.Module, targets: Sequence[Target], batches: Iterable[Mapping[str, object]]
) -> dict[str, Tensor | None]:
    """Run batches through a dense model and back, and collect G of what each target puts out.

    The model is left as it was: no gradients of its parameters are made.

    Few outputs, such as those of a classifier, feel few directions, and hardly any where they are sure. What the others
    hold would be given up, and learning anything new would have to do without: so `EVEN` of G is spread over all of
    them where there are fewer outputs than G is wide, everywhere.

    Returns:
        Name of a target -> G, (*batch, width, width), of its rows (of queries for queries and keys), float64, drawn to
        a multiple of the identity where positions are few; its diagonal (1, width) where an output is wider than
        `WIDE`, as over a vocabulary, or its weight is a table too; None where no output is known, or no batch reaches
        it, and of all if the model's outputs depend on none.
    """
    moments = {target.name: _Curvature(output) for target in targets if (output := target.output()) is not None}
    teacher, generator = Teacher(model), torch.Generator().manual_seed(0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluated(model))
        stack.enter_context(_with_graph(model))
        for batch in checked(model, batches, "curvature"):
            masks, seen = list(masks_of(model, batch)), []
            with _recorded(model, moments.values(), seen):
                probe = teacher.probe(run(model, batch), batch, generator)
            if not seen:  # such as of convolutions alone
                continue
            gradients = torch.autograd.grad(probe, [value for *_, value in seen], allow_unused=True)
            for (moment, module, _), gradient in zip(seen, gradients, strict=True):
                if gradient is not None:
                    with torch.no_grad():
                        moment.add(module, gradient, masks)
    means = {name: moment.mean(True)[0] for name, moment in moments.items()}
    found = {name: mean for name, mean in means.items() if mean is not None}
    if not any(bool(mean.any()) for mean in found.values()):  # such as under a new head of zeros
        found = {}
    if found and teacher.numbers < min(mean.shape[-1] for mean in found.values()):
        found = {name: _evened(mean) for name, mean in found.items()}
    return {target.name: found.get(target.name) for target in targets}


def _evened(curvature: Tensor) -> Tensor:
    """`EVEN` of its trace, or of the sum of a diagonal, spread over all directions."""
    kept = (1 - EVEN) * curvature
    if curvature.shape[-2] == 1 < curvature.shape[-1]:
        return kept + EVEN * curvature.mean(-1, keepdim=True)
    means = curvature.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None].expand(curvature.shape[:-1])
    return kept + EVEN * torch.diag_embed(means)


@contextlib.contextmanager
def _recorded(model: nn.Module, moments: Iterable[Moment], seen: list) -> Iterator[None]:
    """Within, (moment, module, its output with the graph behind it) is added to a list at every call."""
    with contextlib.ExitStack() as stack:
        for moment in moments:

            def take(module: nn.Module, value: Tensor, moment: Moment) -> None:
                seen.append((moment, module, value))

            stack.callback(moment.hook(model, partial(take, moment=moment), detached=False).remove)
        yield


@contextlib.contextmanager
def _with_graph(model: nn.Module) -> Iterator[None]:
    """Within, forwards have graphs, though all of the model may be frozen."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    able = [parameter for parameter in frozen if parameter.is_floating_point()]
    try:
        for parameter in able:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in able:
            parameter.requires_grad_(False)
