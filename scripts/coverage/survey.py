"""One row for each model type: what is claimed of its attention, and what holds."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from scripts.coverage.building import NotBuilt, build
from scripts.coverage.forward import outputs
from scripts.coverage.products import attention_names, proven_products
from scripts.coverage.softmax import has_queries, watching_softmax

Row = dict[str, Any]


def survey(model_type: str) -> Row:
    """What we claim of one model type and what the probe says of it, as a JSON-ready dict.

    "executed" counts the modules that compute a softmax over scores. Those of them that are not found as attention are
    in "missed" if they have queries, else in "other" (routers, pooling). For the rest see `proven_products`.

    Raises:
        NotBuilt: there is no tiny model of this type.
    """
    model, inputs = build(model_type)
    with watching_softmax(model) as executed:
        outputs(model, inputs)
    found = attention_names(model)
    row = {"executed": len(executed), "missed": [], "other": []}
    for name in sorted(executed):
        if not any(name == site or name.startswith(f"{site}.") for site in found):
            module = model.get_submodule(name)
            row["missed" if has_queries(module) else "other"].append(f"{type(module).__name__} ({name})")
    return row | proven_products(model, inputs)


def built(model_type: str) -> Row:
    """What stands in for one model type, without looking for attention in it: class, parameters, shapes of inputs.

    Raises:
        NotBuilt: there is no tiny model of this type.
    """
    model, inputs = build(model_type)
    return {
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "inputs": {name: list(getattr(value, "shape", [])) for name, value in inputs.items()},
    }


def rows_of(types: Sequence[str], examine: Callable[[str], Row] = survey) -> dict[str, Row]:
    """Model type -> its row by ``examine``, or why there is none ("not built", "error"), and the seconds that it took.

    Progress goes to standard error.
    """
    rows = {}
    for index, model_type in enumerate(types):
        start = time.time()
        try:
            rows[model_type] = examine(model_type)
        except NotBuilt as error:
            rows[model_type] = {"not built": str(error)}
        except Exception as error:  # a surprise of ours must show in the table, not end it
            rows[model_type] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        rows[model_type]["seconds"] = round(time.time() - start, 2)
        print(f"\r{index + 1}/{len(types)} {model_type:40s}", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    return rows
