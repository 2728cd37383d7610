"""Train a small language model from scratch, of Llama's architecture, to compress it with `benchmark_compression.py`.

    python scripts/make_language_model.py wikitext-2/train.txt.xz runs/language
    python scripts/make_language_model.py wikitext-2/train.txt.xz runs/language --steps 2000 --batch 32

A byte-level BPE of the text, four layers of width 256 with grouped heads, output and embedding tied; Muon for the
matrices of layers, AdamW for the rest (`fnl_optim="spectron"`). The same seed gives the same model on the same machine.
"""

import argparse
import tempfile
from pathlib import Path

import transformers as tf
from torch.utils.data import Dataset

import fnl_hf
from fnl_hf.tasks.pretraining.tokenizer import train_tokenizer
from fnl_hf.tasks.running import bounded_lines, run_main
from fnl_hf.texts import blocks

LENGTH = 128  # tokens of a block


class Blocks(Dataset):
    """Blocks of tokens, which are their own labels."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def new_llama(tokenizer) -> tf.LlamaForCausalLM:
    """The model before training."""
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tf.LlamaForCausalLM(config)


def train(model, rows, options: argparse.Namespace) -> None:
    """Train in place, without a trace on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        args = fnl_hf.FNLTrainingArguments(
            output_dir=folder,
            seed=options.seed,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            fnl_optim="spectron",
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            save_strategy="no",
            logging_steps=50,
            report_to="none",
            disable_tqdm=True,
        )
        fnl_hf.FNLTrainer(model, args, train_dataset=Blocks(rows)).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a text in each line; compressed or not")
    parser.add_argument("out", type=Path, help="where the model goes")
    parser.add_argument("--vocab_size", type=int, default=4000, help="tokens (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="of training (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help=f"blocks of {LENGTH} tokens (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=4e-3, help="of AdamW's part (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    options = parser.parse_args()
    tf.set_seed(options.seed)

    def lines():
        return (line for line in bounded_lines(options.text) if line)

    tokenizer = train_tokenizer(lines, "bpe", options.vocab_size, token_types=False, max_length=LENGTH)
    rows = blocks(options.text, tokenizer, LENGTH)
    model = new_llama(tokenizer)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size:,} parameters, {rows.numel():,} tokens", flush=True)
    train(model, rows, options)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    run_main(main)
