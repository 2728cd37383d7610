"""Which attention of which model type is found, factorized and proven, over all of the installed transformers.

    python scripts/attention_coverage.py --json coverage.json         # every model type, about ten minutes
    python scripts/attention_coverage.py bert llama gpt_neox          # some of them, with every product

Each type is built tiny and random from its config and run once. What executes a softmax over scores is recorded by
watching softmax and scaled_dot_product_attention themselves, independently of how our finder looks for it; then every
product is probed (see fnl_hf.probe), at first without telling `factorize` any inputs, then with them.
"""

import argparse
import collections
import contextlib
import json
import logging
import re
import time
import warnings
from pathlib import Path

import torch
from tiny_models import NotBuilt, build, model_types, outputs
from torch import nn

import fnl_hf
from fnl_hf.attention import find_attention
from fnl_hf.planning import plan
from fnl_hf.probe import UNREACHED, Recording
from fnl_hf.tasks.running import write_json


@contextlib.contextmanager
def watching_softmax(model):
    """Yields a set that fills with the names of the modules whose own forward computes attention over scores."""
    executed, stack, handles = set(), [], []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(lambda *_: stack.pop() and None, always_call=True))
    originals = {
        (torch, "softmax"): torch.softmax,
        (torch.Tensor, "softmax"): torch.Tensor.softmax,
        (nn.functional, "softmax"): nn.functional.softmax,
        (nn.functional, "scaled_dot_product_attention"): nn.functional.scaled_dot_product_attention,
    }

    def watched(original):
        def call(tensor, *args, **kwargs):
            if stack and isinstance(tensor, torch.Tensor) and tensor.dim() >= 3:  # routers' softmax has two
                executed.add(stack[-1] if not isinstance(model.get_submodule(stack[-1]), nn.Softmax) else stack[-2])
            return original(tensor, *args, **kwargs)

        return call

    for (owner, name), original in originals.items():
        setattr(owner, name, watched(original))
    try:
        yield executed
    finally:
        for (owner, name), original in originals.items():
            setattr(owner, name, original)
        for handle in handles:
            handle.remove()


def has_queries(module):
    """Whether a module that ran a softmax holds something named like queries, keys or values of its own.

    Routers, deformable attention (whose weights come from one projection) and pooling by a learned score do not.
    """
    names = [name for name, _ in module.named_children()] + [name for name, _ in module.named_parameters(recurse=False)]
    parts = [set(re.split(r"[_\W]+", name.lower())) for name in names]
    return any(words & {"q", "query", "qkv", "queries", "qk"} for words in parts)


def survey(model_type):
    """What we claim of one model type and what the probe says of it, as a JSON-ready dict."""
    model, inputs = build(model_type)
    with watching_softmax(model) as executed:
        outputs(model, inputs)
    sites = find_attention(model)
    row = {"executed": len(executed), "missed": [], "other": [], "wrong": []}
    for name in sorted(executed):
        if not any(name == site.name or name.startswith(f"{site.name}.") for site in sites):
            module = model.get_submodule(name)
            row["missed" if has_queries(module) else "other"].append(f"{type(module).__name__} ({name})")
    everything = fnl_hf.FNLConfig()
    claimed, _ = plan(model, everything)
    proven, skipped = plan(model, everything, inputs)
    recording = Recording(model, inputs, {product.owner for product in claimed})
    for product in claimed:
        declaration = fnl_hf.HeadProduct(product.kind, product.left, product.right, product.left.width, product.rotary)
        verdict = recording.verdict(product.owner, product.name, declaration)
        if not verdict.exact and verdict.reason != UNREACHED:
            row["wrong"].append(str(verdict))
    row["products"] = collections.Counter(product.kind for product in proven)
    row["skipped"] = sorted({f"{entry['kind']}: {entry['reason']}" for entry in skipped})
    unasked = {(product.name, product.kind) for product in claimed}
    row["found without inputs"] = all((product.name, product.kind) in unasked for product in proven)
    return row


def examined(types, quiet):
    """model type -> row, or the reason why it could not be built."""
    rows = {}
    for index, model_type in enumerate(types):
        start = time.time()
        try:
            rows[model_type] = survey(model_type)
        except NotBuilt as error:
            rows[model_type] = {"not built": str(error)}
        except Exception as error:  # a surprise of ours must show in the table, not end it
            rows[model_type] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        rows[model_type]["seconds"] = round(time.time() - start, 2)
        if not quiet:
            print(f"\r{index + 1}/{len(types)} {model_type:40s}", end="", flush=True)
    return rows


def report(rows):
    """The table: per slot, how many types have it exact, skipped with a reason, wrong or missed."""
    attention = {t: r for t, r in rows.items() if r.get("executed")}
    lines = [
        f"{len(rows)} model types, {sum('not built' not in r for r in rows.values())} built and run, "
        f"{len(attention)} with softmax attention, {sum('error' in r for r in rows.values())} errors of ours"
    ]
    for slot in ("qk", "ov"):
        having = [r for r in attention.values() if any(slot in kind for kind in r["products"])]
        rotary = [r for r in having if f"rotary-{slot}" in r["products"]]
        unasked = sum(r["found without inputs"] for r in having)
        lines.append(
            f"{slot}: exact in {len(having)} types"
            + (f" ({len(rotary)} rotary)" if rotary else "")
            + f", of these all found without example inputs in {unasked}"
        )
    clean = [t for t, r in attention.items() if not r["wrong"] and not r["missed"]]
    lines.append(f"every product proven or skipped with a reason in {len(clean)} of {len(attention)} types")
    reasons = collections.Counter(reason.split(" (")[0][:110] for r in attention.values() for reason in r["skipped"])
    lines += [f"  {count:4d} types skip {reason}" for reason, count in reasons.most_common()]
    lines.append(
        f"{sum(bool(r['other']) for r in attention.values())} types run a softmax without queries (routers, …)"
    )
    for key in ("wrong", "missed"):
        lines += [f"{key} {t}: {'; '.join(r[key][:3])}" for t, r in attention.items() if r[key]]
    lines += [f"error {t}: {r['error']}" for t, r in rows.items() if "error" in r]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all of them if none is given")
    parser.add_argument("--json", type=Path, help="write every row there")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = examined(options.types or model_types(), quiet=bool(options.types))
    if options.types:
        print(json.dumps(rows, indent=1))
    print("\n" + report(rows))
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
