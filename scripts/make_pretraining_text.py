"""Make the data of the small BERT pretraining comparison (scripts/recipes/table4.yaml) from public sources.

    python scripts/make_pretraining_text.py --novels novels.tar.xz --wikitext wikitext-2/train.txt.xz \
        --squad train-v1.1.json.xz --squad_dev dev-v1.1.json.xz --output_dir data/

writes data/text/, a folder for `run_mlm.py --train_file` (the novels, WikiText-2, the contexts of SQuAD's train file),
and data/squad_dev.json, every fourth article of SQuAD's development file.

The novels are those of https://github.com/computationalstylistics/100_english_novels up to 1926; SQuAD's development
contexts are in neither.
"""

import argparse
import json
import tarfile
from pathlib import Path

from fnl_hf.tasks.finetuning.squad import read_squad
from fnl_hf.tasks.running import InputError, one_line, open_text, run_main, write_json, write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--novels", type=Path, required=True, help="tar archive of text files")
    parser.add_argument("--wikitext", type=Path, required=True, help="text file")
    parser.add_argument("--squad", type=Path, required=True, help="train file in the SQuAD layout")
    parser.add_argument("--squad_dev", type=Path, required=True, help="development file in the SQuAD layout")
    parser.add_argument("--every", type=int, default=4, help="take one of so many of its articles")
    parser.add_argument("--output_dir", type=Path, default=Path("data"))
    args = parser.parse_args()

    text = args.output_dir / "text"
    text.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(args.novels) as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(".txt"):
                    novel = archive.extractfile(member).read().decode("utf-8").replace("\r\n", "\n")
                    write_text(text / Path(member.name).name, novel)
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        raise InputError(f"{args.novels}: not a readable archive of UTF-8 texts ({one_line(error)}).") from error
    with open_text(args.wikitext) as lines:
        write_text(text / "wikitext2.txt", lines.read())
    contexts = dict.fromkeys(question.context for question in read_squad(args.squad).questions)
    write_text(text / "squad_contexts.txt", "".join(" ".join(context.split()) + "\n" for context in contexts))

    with open_text(args.squad_dev) as file:
        articles = json.load(file)["data"][:: args.every]
    write_json(args.output_dir / "squad_dev.json", {"version": "1.1", "data": articles})
    questions = len(read_squad(args.output_dir / "squad_dev.json").questions)
    size = sum(path.stat().st_size for path in text.iterdir())
    print(f"{text}: {len(list(text.iterdir()))} files, {size:,} bytes; squad_dev.json: {questions:,} questions")


if __name__ == "__main__":
    run_main(main)
