"""`for_inference`: every layer of a factorized model in the equal form that is the fastest for the shapes at hand."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from .attachment import attached, detach, note_skipped, show
from .checking import kept_on_error, refuse_wrapped
from .factorization import is_factorized
from .messages import say
from .outputs import without_cache
from .patching import to_dense
from .plan import FAMILIES, Plan
from .saving import forget_plans, save_under_any_names, save_under_own_names
from .trial import Measure, Trial, timed


def for_inference(model: nn.Module, measure: Measure = timed, **example_inputs: Any) -> nn.Module:
    """Give every layer of a factorized model its fastest form of the same function, and return the model.

    In place, and all or nothing: an error leaves the model as it was. The model is in evaluation mode then. What is
    measured is each kind of layer by itself, on the calls that it gets. It stays as it is unless another form is
    clearly faster, and becomes an ordinary layer where nothing else is as fast as that on all of them:

    - Linear layers: factor by factor, by their own columns (`PivotedLinear`), or the composed weight. Convolutions:
      two, or the composed one. The middle of what is deep is merged into its left factor.
    - Narrow heads: really narrower ones, where a replay of the attention module proves that it computes the same with
      them; padded ones; ordinary projections.
    - Embeddings, and layers that share their factors with others, keep theirs.

    The result saves, loads and becomes dense as every factorized model does. What is pivoted has no factors to train,
    so `FNLTrainer` and ``frobenius_decay_`` refuse it.

    Args:
        measure: {form: what runs it} -> {form: seconds}; the best of interleaved runs if not given.
        example_inputs: what the model's forward takes, by keyword, in the sizes that matter. Made-up ones of batches 1
            and 32, of 63 tokens, if there are none. Layers that no inputs reach stay as they are.

    Raises:
        TypeError: The model is wrapped (compiled, parallel, adapted).
        ValueError: The model is not factorized, or (ProbeError) does not run on the inputs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"for_inference got a {type(model).__name__} as model, expected a torch.nn.Module")
    refuse_wrapped(model)
    stored = attached(model)
    if stored is None:
        raise ValueError(
            f"{type(model).__name__} is not factorized, and as fast as it can be here: call "
            "fnl_hf.factorize(model, config) first; what for_inference composed as a whole is an ordinary model"
        )
    targets, skipped = Plan.of(stored).targets, []
    with kept_on_error(model), without_cache(model):  # a call is made again and again
        trial = Trial(model, example_inputs or None, measure, _dense_copy)
        model.eval()
        for family in FAMILIES.values():
            if of_family := [target for target in targets if type(target) is family.target]:
                skipped += family.target.quicken(model, of_family, trial)
        save_under_any_names(model)
        save_under_own_names(model)  # if there still are factors
        if is_factorized(model):
            note_skipped(model, skipped)
            show(model)
        else:
            forget_plans(model)
            detach(model)
    chosen = ", ".join(f"{count} {form}" for form, count in trial.chosen.most_common())
    say(f"fnl_hf: for inference: {chosen or 'nothing to choose'} (layers and attention modules)")
    return model


def _dense_copy(model: nn.Module) -> nn.Module:
    """A dense model that shares with this one all parameters of ordinary layers."""
    shared: Mapping[int, nn.Parameter] = {id(parameter): parameter for parameter in model.parameters()}
    return to_dense(copy.deepcopy(model, dict(shared)))
