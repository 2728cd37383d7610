"""Make the German-English corpus that ships in fnl_hf/tasks/translation/data from a ManyThings export of Tatoeba.

    python scripts/make_tatoeba_corpus.py deu.txt                  # from https://www.manythings.org/anki (deu-eng.zip)
    python scripts/make_tatoeba_corpus.py deu.txt.xz --train 20000 --output_dir smaller

The shipped files come from the export of 2018-05-13 with the defaults below; see ATTRIBUTION.md beside them.
"""

import argparse
import random
from pathlib import Path

import fnl_hf.tasks.translation
from fnl_hf.tasks.running import InputError, read_lines, run_main, write_text
from fnl_hf.tasks.translation.corpus import SPLITS, is_clean, normalize, one_to_one, sample_splits


def read_export(path: str) -> list[tuple[str, str]]:
    """(German, English) pairs of an export with lines `English<TAB>German[<TAB>attribution]`."""
    rows = [line.split("\t") for line in read_lines(path)]
    if not all(len(row) >= 2 for row in rows):
        raise InputError(f"{path}: expected English<TAB>German on every line. Give deu.txt of deu-eng.zip.")
    return [(normalize(german), normalize(english)) for english, german, *_ in rows]


def write_split(path: Path, pairs: list[tuple[str, str]]) -> None:
    """Write `German<TAB>English` lines, xz-compressed, all or nothing."""
    text = "".join(f"{german}\t{english}\n" for german, english in pairs)
    write_text(path, text)
    print(f"{path.name}: {len(pairs)} pairs, {path.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", help="deu.txt of the ManyThings export, plain, .gz or .xz")
    parser.add_argument("--output_dir", type=Path, default=Path(fnl_hf.tasks.translation.__file__).parent / "data")
    parser.add_argument("--train", type=int, default=38000)
    parser.add_argument("--validation", type=int, default=1000)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    raw = read_export(args.export)
    clean = [pair for pair in raw if is_clean(*pair)]
    random.Random(args.seed).shuffle(clean)  # of several translations of a sentence, keep a random one
    unique = one_to_one(clean)
    print(f"{len(raw)} pairs, {len(clean)} of them clean, {len(unique)} with both sides new")
    splits = sample_splits(unique, {split: getattr(args, split) for split in SPLITS}, args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, pairs in splits.items():
        write_split(args.output_dir / f"tatoeba-de-en.{split}.tsv.xz", pairs)


if __name__ == "__main__":
    run_main(main)
