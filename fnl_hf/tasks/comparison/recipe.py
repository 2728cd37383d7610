"""Recipes: which training scripts run in which order, with which arguments, for which variants."""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..running import InputError, one_line, open_text

# A value of an argument, as on the command line; a list gives several words, None is an argument that is not given
Value = str | list[str] | None
# stage -> argument -> value
Overrides = dict[str, dict[str, Value]]

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_WORD = re.compile(r"\w+")  # a name that a placeholder can have
_DIRECTORY = re.compile(r"\w[\w.+-]*")
_ARGUMENT = re.compile(r"[A-Za-z]\w*")
_GIVEN = ("output_dir", "seed")  # arguments that every run gets from the comparison
_BUILT_IN = ("seed", "comparison")  # placeholders of every recipe: a run's seed, the comparison's directory


@dataclass(frozen=True)
class Stage:
    """One training script with its arguments, before those of a variant."""

    name: str
    script: Path
    arguments: dict[str, Value]
    metrics: tuple[str, ...]  # keys of all_results.json, the columns of the table
    curves: tuple[str, ...]  # keys of the log history that are plotted against steps


@dataclass(frozen=True)
class Recipe:
    """A comparison: stages in their order, variants of their arguments, seeds."""

    path: Path
    title: str
    seeds: tuple[int, ...]
    variables: dict[str, str]
    stages: dict[str, Stage]
    variants: dict[str, Overrides]

    def arguments(self, variant: str, stage: str, seed: int) -> dict[str, Value]:
        """The arguments of one run. Variables and the seed are filled in; placeholders of directories are kept."""
        merged = self.stages[stage].arguments | self.variants[variant].get(stage, {})
        values = self.variables | {"seed": str(seed)}
        return {name: fill(value, values) for name, value in merged.items() if value is not None}


def read_recipe(path: str | Path, scripts: str | Path, variables: dict[str, str] | None = None) -> Recipe:
    """A recipe from a YAML or JSON file (`scripts/compare.py --help` lists its keys).

    Every value is text, as it would be on the command line: `no`, `1e-3` and `1.0` stay what they are in the file. An
    argument whose value is `null` is not given: so a variant drops what its stage gives to the others.

    Args:
        scripts: directory of scripts that are not found relative to the recipe.
        variables: values for the recipe's variables, instead of its own.

    Raises:
        InputError: no such file or script, not YAML or JSON, a key that recipes do not have or that is given twice, a
            variable without value, a placeholder that is neither a variable, an earlier stage, `{seed}` nor
            `{comparison}`.
    """
    path = Path(path)
    content = _mapping(_load(path), path, "recipe")
    _check_keys(content, {"title", "seeds", "variables", "shared", "stages", "variants", "axes"}, str(path))
    for key in ("seeds", "stages"):
        if not content.get(key):
            raise InputError(f"{path}: no {key}. Add `{key}:`.")
    own = _mapping(content.get("variables", {}), path, "variables")
    shared = _arguments(content.get("shared", {}), path, "shared")
    stages = {
        name: _stage(name, entry, shared, path, Path(scripts))
        for name, entry in _mapping(content["stages"], path, "stages").items()
    }
    recipe = Recipe(
        path=path,
        title=_text(content.get("title", path.stem), path, "title"),
        seeds=_seeds(content["seeds"], path),
        variables=_fill_in(own, variables or {}, path),
        stages=stages,
        variants=_variants(content, stages, path),
    )
    _check_names(recipe)
    _check_placeholders(recipe)
    return recipe


def fill(value: Value, values: dict[str, str]) -> Value:
    """`value` with `{name}` replaced for every name in `values`; other braces are kept."""
    if value is None:
        return None
    if isinstance(value, list):
        return [fill(word, values) for word in value]
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), value)


def placeholders(arguments: dict[str, Value]) -> list[str]:
    """Names of all placeholders in arguments, in their order."""
    words = itertools.chain.from_iterable(v if isinstance(v, list) else [v or ""] for v in arguments.values())
    return [name for word in words for name in _PLACEHOLDER.findall(word)]


# -- reading ------------------------------------------------------------------------------------------


class _GivenTwice(Exception):
    pass


def _unique(pairs: list) -> dict:
    names = [str(name) for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise _GivenTwice(f"the key {name!r} is given twice. Which of them counts?")
    return {str(name): value for name, value in pairs}


class _TextLoader(yaml.BaseLoader):
    """YAML in which every scalar but null is text and no key comes twice."""

    def construct_scalar(self, node):
        return None if node.style is None and node.value in ("null", "~") else super().construct_scalar(node)

    def construct_mapping(self, node, deep=False):
        return _unique(self.construct_pairs(node, deep=True))


_JSON_AS_TEXT = {"parse_int": str, "parse_float": str, "parse_constant": str, "object_pairs_hook": _unique}


def _load(path: Path):
    """The content of a recipe: dicts, lists and text only."""
    try:
        with open_text(path) as file:
            if path.suffix == ".json":
                return _as_text(json.load(file, **_JSON_AS_TEXT))
            return yaml.load(file, _TextLoader)
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a recipe in {path.suffix or 'YAML'} ({one_line(error)}).") from error
    except _GivenTwice as error:
        raise InputError(f"{path}: {error}") from error


def _as_text(value):
    """JSON's true and false as words of a command line."""
    if isinstance(value, dict):
        return {name: _as_text(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_as_text(entry) for entry in value]
    return {True: "true", False: "false"}.get(value, value) if not isinstance(value, str) else value


# -- checking -----------------------------------------------------------------------------------------


def _mapping(value, path: Path, where: str) -> dict:
    if value in ("", None):  # an empty entry in YAML
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{path}: {where}: expected `name: value` entries, got {value!r}.")
    return value


def _text(value, path: Path, where: str) -> str:
    if isinstance(value, dict):
        raise InputError(f'{path}: {where}: a mapping, expected text. Quote placeholders: "{{name}}".')
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{path}: {where}: a list, expected text.")
    return value


def _check_keys(entry: dict, known: set[str], where: str) -> None:
    if unknown := sorted(entry.keys() - known):
        raise InputError(f"{where}: unknown key {unknown[0]!r}, expected any of {', '.join(sorted(known))}.")


def _arguments(entry, path: Path, where: str) -> dict[str, Value]:
    arguments = {}
    for name, value in _mapping(entry, path, where).items():
        if not _ARGUMENT.fullmatch(name):
            raise InputError(f"{path}: {where}: {name!r} is not the name of an argument. Write it without dashes.")
        if name in _GIVEN:
            raise InputError(f"{path}: {where}: {name} is given by the comparison. Drop it.")
        inner = f"{where}.{name}"
        if isinstance(value, list):
            value = [_text(word, path, inner) for word in value]
        arguments[name] = value if value is None or isinstance(value, list) else _text(value, path, inner)
    return arguments


def _stage(name: str, entry, shared: dict[str, Value], path: Path, scripts: Path) -> Stage:
    where = f"stages.{name}"
    entry = _mapping(entry, path, where)
    _check_keys(entry, {"script", "arguments", "metrics", "curve"}, f"{path}: {where}")
    for key in ("script", "metrics"):
        if not entry.get(key):
            raise InputError(f"{path}: {where}: no {key}. Add `{key}:`.")
    script = _text(entry["script"], path, f"{where}.script")
    found = next((folder / script for folder in (path.parent, scripts) if (folder / script).is_file()), None)
    if found is None:
        raise InputError(f"{path}: {where}: no script {script} in {path.parent} or {scripts}.")

    def texts(key: str, default=None) -> tuple[str, ...]:
        values = entry.get(key, default)
        values = values if isinstance(values, list) else [values]
        return tuple(_text(value, path, f"{where}.{key}") for value in values)

    return Stage(
        name=name,
        script=found,
        arguments=shared | _arguments(entry.get("arguments", {}), path, f"{where}.arguments"),
        metrics=texts("metrics"),
        curves=texts("curve", "loss"),
    )


def _overrides(entry, stages: dict[str, Stage], path: Path, where: str) -> Overrides:
    entry = _mapping(entry, path, where)
    if unknown := sorted(entry.keys() - stages.keys()):
        raise InputError(f"{path}: {where}: no stage {unknown[0]!r}, only {', '.join(stages)}.")
    return {stage: _arguments(values, path, f"{where}.{stage}") for stage, values in entry.items()}


def _variants(content: dict, stages: dict[str, Stage], path: Path) -> dict[str, Overrides]:
    """Those listed, and every combination of one choice from each axis."""
    variants = {
        name: _overrides(entry, stages, path, f"variants.{name}")
        for name, entry in _mapping(content.get("variants", {}), path, "variants").items()
    }
    axes = [
        [
            (choice, _overrides(entry, stages, path, f"axes.{axis}.{choice}"))
            for choice, entry in _mapping(choices, path, f"axes.{axis}").items()
        ]
        for axis, choices in _mapping(content.get("axes", {}), path, "axes").items()
    ]
    for combination in itertools.product(*axes) if axes else ():
        name = "-".join(choice for choice, _ in combination)
        if name in variants:
            raise InputError(f"{path}: two variants are named {name}. Rename one.")
        variants[name] = {
            stage: {key: value for _, entry in combination for key, value in entry.get(stage, {}).items()}
            for stage in stages
        }
    if not variants:
        raise InputError(f"{path}: no variants. Add `variants:`, or `axes:` for all their combinations.")
    return variants


def _seeds(value, path: Path) -> tuple[int, ...]:
    words = value if isinstance(value, list) else [value]
    if not all(isinstance(word, str) and word.isdecimal() for word in words) or len(set(words)) != len(words):
        raise InputError(f"{path}: seeds: {value!r}, expected different whole numbers such as [1, 2].")
    return tuple(int(word) for word in words)


def _fill_in(own: dict, given: dict[str, str], path: Path) -> dict[str, str]:
    """The recipe's variables with the values given instead."""
    if unknown := sorted(given.keys() - own.keys()):
        known = f"only {', '.join(own)}" if own else "none at all"
        raise InputError(f"--set {unknown[0]}: no such variable in {path}, {known}.")
    variables = {name: given.get(name, _text(value, path, f"variables.{name}")) for name, value in own.items()}
    if empty := [name for name, value in variables.items() if not value]:
        raise InputError(f"{path}: the variable {empty[0]} has no value. Give --set {empty[0]}=...")
    return variables


def _check_names(recipe: Recipe) -> None:
    for kind, names, allowed, pattern in (
        ("variable", recipe.variables, "letters, digits and '_'", _WORD),
        ("stage", recipe.stages, "letters, digits and '_'", _WORD),
        ("variant", recipe.variants, "letters, digits, '.', '+', '-' and '_': it names a directory", _DIRECTORY),
    ):
        for name in names:
            if not pattern.fullmatch(name):
                raise InputError(f"{recipe.path}: {name!r} cannot be the name of a {kind}. Use {allowed}.")
    names = [*_BUILT_IN, *recipe.stages, *recipe.variables]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{recipe.path}: {{{twice[0]}}} would have two meanings. Rename the variable or the stage.")


def _check_placeholders(recipe: Recipe) -> None:
    for variant in recipe.variants:
        known = [*_BUILT_IN, *recipe.variables]
        for name, stage in recipe.stages.items():
            used = placeholders(stage.arguments | recipe.variants[variant].get(name, {}))
            if unknown := [placeholder for placeholder in used if placeholder not in known]:
                later = " yet (a later stage)" if unknown[0] in recipe.stages else ""
                listed = ", ".join(f"{{{each}}}" for each in known)
                raise InputError(
                    f"{recipe.path}: {variant}, {name}: no {{{unknown[0]}}}{later}, only {listed}. Other names are "
                    "declared under `variables:`."
                )
            known.append(name)
