"""Reading settings from configs whose classes name them differently."""

from typing import Any

from transformers import PreTrainedConfig


def read(config: PreTrainedConfig, name: str) -> Any:
    """A config's value, None if it has none; heterogeneous configs raise on attributes that differ per layer."""
    try:
        return config._getattr_without_heterogeneous_validation(name, None)
    except Exception:
        return getattr(config, name, None)


def nearest(config: PreTrainedConfig, *names: str, default: Any = None) -> Any:
    """First of these attributes that the config or one of its sub-configs has, nearest first."""
    queue = [config]
    while queue:
        current = queue.pop(0)
        for name in names:
            value = read(current, name)
            if value is not None:
                return value
        queue += [v for v in vars(current).values() if isinstance(v, PreTrainedConfig)]
    return default


def first(value: Any) -> Any:
    """The first entry of a list or tuple; anything else as it is."""
    return value[0] if isinstance(value, (list, tuple)) else value
