"""Which attention of which model type is found, factorized and proven, over all of the installed transformers.

From the root of the repository:

    python -m scripts.coverage                                  # every model type, about ten minutes
    python -m scripts.coverage --json scripts/results/attention_coverage.json
    python -m scripts.coverage bert llama gpt_neox              # some of them, with every row
    python -m scripts.coverage --only_build bert align          # class, parameters and inputs of the tiny models

Each type is built tiny and random from its config and run once, on inputs guessed from its forward. What executes a
softmax over scores is recorded by watching softmax and scaled_dot_product_attention themselves, independently of how
fnl_hf looks for attention; then every product is probed (see fnl_hf.verify), at first without telling `factorize` any
inputs, then with them. Nothing is downloaded.

Printed are the counts, the reasons for skipping a product, and every type with a wrong or missed one. --json writes
the counts and a line for each type:

    executed              modules that compute a softmax over scores
    products              number of proven products by kind
    by default            how many of these are found without example inputs
    claimed               what is found without, where the model does not execute it too
    skipped               why a product is left as it is
    wrong                 products claimed without inputs that a change of basis of the whole model refutes
    missed, other         softmax in modules that are not found: with queries, and without (routers, pooling)
    not built, error      instead of these: why there is no tiny model; an exception of ours
"""

import argparse
import contextlib
import difflib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import transformers

from scripts.coverage.configs import model_types
from scripts.coverage.report import table, write_rows
from scripts.coverage.survey import built, rows_of


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m scripts.coverage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="*", metavar="type", help="model types; all of them if none is given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts and every row there")
    parser.add_argument("--only_build", action="store_true", help="build and run the models and print what they are")
    options = parser.parse_args(arguments)
    known = model_types()
    for name in options.types:
        if name not in known:
            near = difflib.get_close_matches(name, known)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            parser.error(f"transformers {transformers.__version__} has no model type {name!r}{hint}")
    if options.json and options.only_build:
        parser.error("--json is for the survey: leave out --only_build")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"no directory {options.json.parent} for --json")
    return options


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hundreds of random models have nothing to warn of."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    types = options.types or model_types()
    with quiet():
        rows = rows_of(types, built) if options.only_build else rows_of(types)
    if options.types or options.only_build:
        print(*(f"{name} {json.dumps(row)}" for name, row in rows.items()), sep="\n")
    if not options.only_build:
        print(table(rows))
    if options.json:
        write_rows(options.json, rows, transformers.__version__)


if __name__ == "__main__":
    main()
