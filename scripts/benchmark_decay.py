"""What Frobenius decay and spectral initialisation cost, as ratios measured in one run.

    python scripts/benchmark_decay.py                         # BERT-base, 8 x 128 tokens, about 3 minutes on 2 cores
    python scripts/benchmark_decay.py --tiny                  # seconds, to see that it runs
    python scripts/benchmark_decay.py --json results.json

Alternatives measured beside ours, on the same weights: an autograd penalty on the d x d products; a loop over heads;
the bare Gram products that no implementation can do without; an SVD of each d x d product.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from transformers import BertConfig, BertForMaskedLM

import fnl_hf
from fnl_hf.algebra import chain
from fnl_hf.decay import decay_step
from fnl_hf.initialization import initial_factors


def timed(function, repeats: int, warmup: int = 1) -> float:
    """Median seconds of a call."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for _ in range(warmup + repeats):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - start)
    return median(times[warmup:])


def training_step(model, optimizer, batch, tokens, device):
    """A function that does one whole optimizer step of masked-LM training."""
    ids = torch.randint(5, model.config.vocab_size, (batch, tokens), device=device)

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def autograd_penalty(products):
    """The penalty as one would write it: ½ Σ ‖matrix‖², backward through every d x d product."""

    def penalty():
        for product in products:  # one at a time: all products at once would need gigabytes
            (product.matrix().square().sum() / 2).backward()

    return penalty


def per_head_loop(products):
    """The closed form, one head after the other, as the paper's code does per module."""

    @torch.no_grad()
    def loop():
        for product in products:
            gradients = product.views[0].parameter.grad, product.views[1].parameter.grad
            targets = [view.read(gradient) for view, gradient in zip(product.views, gradients, strict=True)]
            for left, right, *grads in zip(*product.tensors(), *targets, strict=True):
                grads[0].add_(left @ (right @ right.mT), alpha=0.01)
                grads[1].add_((left.mT @ left) @ right, alpha=0.01)

    return loop


def bare_grams(products):
    """Four batched matrix products per factorization on contiguous operands and nothing else: the lower bound."""
    operands = [tuple(factor.detach().contiguous() for factor in product.tensors()) for product in products]

    def grams():
        for left, right in operands:
            left @ (right @ right.mT)
            (left.mT @ left) @ right

    return grams


def svd_of_each_product(products):
    """Spectral factors by the SVD of every head's dense d x d product."""

    @torch.no_grad()
    def svd():
        for product in products:
            for matrix in product.matrix():
                torch.linalg.svd(matrix)

    return svd


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers, a handful of products")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    device = torch.device(options.device)

    torch.manual_seed(0)
    size = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128} if options.tiny else {}
    config = BertConfig(num_hidden_layers=2 if options.tiny else options.layers, **size)
    model = fnl_hf.factorize(BertForMaskedLM(config).to(device), fnl_hf.FNLConfig())
    products = fnl_hf.factorizations(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    seconds = {
        "coupled decay": timed(lambda: fnl_hf.frobenius_decay_(model, 0.01), 11),
        "decoupled decay": timed(lambda: decay_step(fnl_hf.factorizations(model), optimizer, 0.01), 11),
        "bare Gram products": timed(bare_grams(products), 11),
        "loop over heads": timed(per_head_loop(products), 5),
        "autograd through d x d products": timed(autograd_penalty(products), 3),
        "spectral init of all products": timed(
            lambda: [initial_factors(product, product.tensors()[0].shape[-1], "spectral") for product in products], 3
        ),
        "SVD of each d x d product": timed(svd_of_each_product(products), 1, warmup=0),
    }
    optimizer.zero_grad()
    step = training_step(model, optimizer, options.batch, options.tokens, device)
    seconds["optimizer step"] = timed(step, 3)

    heads, rows = (8, (256, 16)) if options.tiny else (2048, (4096, 128))
    batch = 8 if options.tiny else 32
    left, right = torch.randn(batch, *rows, device=device), torch.randn(batch, *rows[::-1], device=device)
    seconds[f"spectral init of {heads} products of {rows[0]} x {rows[1]}"] = timed(
        lambda: [chain.balance((left, right)) for _ in range(heads // batch)], 1, warmup=0
    )

    ratios = {
        "coupled decay / optimizer step": seconds["coupled decay"] / seconds["optimizer step"],
        "decoupled decay / optimizer step": seconds["decoupled decay"] / seconds["optimizer step"],
        "coupled decay / bare Gram products": seconds["coupled decay"] / seconds["bare Gram products"],
        "loop over heads / coupled decay": seconds["loop over heads"] / seconds["coupled decay"],
        "autograd penalty / coupled decay": seconds["autograd through d x d products"] / seconds["coupled decay"],
        "SVD of each product / spectral init": seconds["SVD of each d x d product"]
        / seconds["spectral init of all products"],
    }
    count = sum(product.tensors()[0].shape[0] for product in products)
    print(f"{count} products, {options.batch} x {options.tokens} tokens, {device}, {torch.get_num_threads()} threads")
    for name, value in seconds.items():
        print(f"{name:52s} {value * 1e3:12.1f} ms")
    for name, value in ratios.items():
        print(f"{name:52s} {value:12.4f}")
    if options.json:
        setting = {"products": count, "batch": options.batch, "tokens": options.tokens, "device": str(device)}
        setting |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
        options.json.write_text(json.dumps({"setting": setting, "seconds": seconds, "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
