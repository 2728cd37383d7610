"""Make the text that ships in fnl_hf/tasks/pretraining/data from two novels in plain text.

    python scripts/make_mlm_demo.py Stevenson_Treasure_1883.txt Burnett_Lord_1886.txt

The shipped files come from these two of https://github.com/computationalstylistics/100_english_novels; see
ATTRIBUTION.md beside them.
"""

import argparse
from pathlib import Path

import fnl_hf.tasks.pretraining
from fnl_hf.tasks.pretraining.text import bounded_lines
from fnl_hf.tasks.running import run_main, write_text


def paragraphs(path: str) -> list[str]:
    """The lines of a novel that have letters, with single blanks."""
    lines = [" ".join(line.split()) for line in bounded_lines(Path(path), 1_000_000)]
    return [line for line in lines if any(char.isalpha() for char in line)]


def write_split(path: Path, novels: list[list[str]]) -> None:
    """Write one paragraph a line and a blank line between novels, xz-compressed, all or nothing."""
    text = "\n".join("".join(f"{line}\n" for line in novel) for novel in novels)
    write_text(path, text)
    print(f"{path.name}: {len(text.split())} words, {path.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("novels", nargs="+", help="plain text, one paragraph a line")
    parser.add_argument("--output_dir", type=Path, default=Path(fnl_hf.tasks.pretraining.__file__).parent / "data")
    parser.add_argument("--validation", type=float, default=0.05, help="share of every novel, from its end")
    args = parser.parse_args()

    splits = {"train": [], "validation": []}
    for path in args.novels:
        lines = paragraphs(path)
        cut = round(len(lines) * (1 - args.validation))
        splits["train"].append(lines[:cut])
        splits["validation"].append(lines[cut:])
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, novels in splits.items():
        write_split(args.output_dir / f"novels.{split}.txt.xz", novels)


if __name__ == "__main__":
    run_main(main)
