"""Configs of factorized models as earlier versions wrote them."""

import json
from pathlib import Path


def as_format_1(stored: dict) -> dict:
    """A stored config as it was written before there were families."""
    products = []
    for target in stored["plan"]["targets"]:
        old = {key: value for key, value in target.items() if key not in ("family", "name")}
        products.append({"owner": target["name"].rpartition(".")[0]} | old)
    return {**stored, "format_version": 1, "plan": {"products": products, "skipped": stored["plan"]["skipped"]}}


def make_format_1(directory: Path) -> None:
    """Rewrite the config of a checkpoint."""
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = as_format_1(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))
