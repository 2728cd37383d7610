"""The rows of all types in numbers, in words, and in a file."""

import collections
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Rows = Mapping[str, Mapping[str, Any]]


def summary(rows: Rows) -> dict[str, int]:
    """How many model types there are, of which so many could be built, have attention, exact products, …"""
    attention = with_attention(rows).values()
    numbers = {
        "model types": len(rows),
        "built and run": sum("not built" not in row for row in rows.values()),
        "with softmax attention": len(attention),
        "errors": sum("error" in row for row in rows.values()),
    }
    for slot in ("qk", "ov"):
        having = [row for row in attention if any(slot in kind for kind in row["products"])]
        numbers[f"{slot} exact"] = len(having)
        numbers[f"{slot} rotary"] = sum(f"rotary-{slot}" in row["products"] for row in having)
        for key in ("products", "by default"):
            counts = (count for row in having for kind, count in row[key].items() if slot in kind)
            numbers[f"{slot} {key}"] = sum(counts)
    numbers["proven or skipped with a reason"] = sum(not row["wrong"] and not row["missed"] for row in attention)
    numbers["softmax without queries"] = sum(bool(row["other"]) for row in attention)
    return numbers


def with_attention(rows: Rows) -> Rows:
    """The types that compute a softmax over scores."""
    return {name: row for name, row in rows.items() if row.get("executed")}


def table(rows: Rows) -> str:
    """The summary in words, the reasons for what is skipped, and every type with a wrong or missed product."""
    attention, count = with_attention(rows), summary(rows)
    lines = [
        f"{count['model types']} model types, {count['built and run']} built and run, "
        f"{count['with softmax attention']} with softmax attention, {count['errors']} errors of ours"
    ]
    for slot in ("qk", "ov"):
        rotary = f" ({count[f'{slot} rotary']} rotary)" if count[f"{slot} rotary"] else ""
        lines.append(
            f"{slot}: exact in {count[f'{slot} exact']} types{rotary}; {count[f'{slot} by default']} of "
            f"{count[f'{slot} products']} products are found without example inputs"
        )
    lines.append(
        f"every product proven or skipped with a reason in {count['proven or skipped with a reason']} "
        f"of {count['with softmax attention']} types"
    )
    reasons = collections.Counter(reason.split(" (")[0][:110] for r in attention.values() for reason in r["skipped"])
    lines += [f"  {number:4d} types skip {reason}" for reason, number in reasons.most_common()]
    lines.append(f"{count['softmax without queries']} types run a softmax without queries (routers, …)")
    for key in ("wrong", "missed"):
        lines += [f"{key} {name}: {'; '.join(row[key][:3])}" for name, row in attention.items() if row[key]]
    lines += [f"error {name}: {row['error']}" for name, row in rows.items() if "error" in row]
    return "\n".join(lines)


def write_rows(path: Path, rows: Rows, transformers_version: str) -> None:
    """A JSON object: the version, the summary, then "types" with one line for each, in the order of their names."""
    head = {"transformers": transformers_version, **summary(rows)}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    types = ",\n".join(f"{json.dumps(name)}: {json.dumps(rows[name], sort_keys=True)}" for name in sorted(rows))
    path.write_text("\n".join(["{", *lines, '"types": {', types, "}", "}", ""]), encoding="utf-8")


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """What `write_rows` wrote: model type -> row."""
    return json.loads(path.read_text(encoding="utf-8"))["types"]
