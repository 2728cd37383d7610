"""What Frobenius decay and spectral initialisation cost, as ratios measured in one run.

    python scripts/benchmark_decay.py                         # BERT-base, 8 x 128 tokens, about 4 minutes on 2 cores
    python scripts/benchmark_decay.py --tiny                  # seconds, to see that it runs
    python scripts/benchmark_decay.py --json results.json
    python scripts/benchmark_decay.py --layers 0.25 0.5       # of linear layers and the embedding, and of Spectron
    python scripts/benchmark_decay.py --size large --batch 32 --tokens 512 --bf16    # on a GPU

Alternatives measured beside ours, on the same weights: an autograd penalty on the d x d products; a loop over heads;
the products of all layers stacked into one; an SVD of each d x d product; and the bare matrix products that no
implementation can do without, on the weights as they lie and on contiguous copies of each head.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from transformers import BertConfig, BertForMaskedLM

import fnl_hf
from fnl_hf.algebra import chain
from fnl_hf.decay import decay_step
from fnl_hf.initialization import initial_factors
from fnl_hf.layers import hidden_matrices
from fnl_hf.measure import gradient_norms, measurements
from fnl_hf.spectron import Spectron
from fnl_hf.tasks.running import write_json

SIZES = {
    "base": {},
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else str(device)


def timed(function, repeats: int, warmup: int = 1) -> float:
    """Median seconds of a call; of one CPU thread its own, without what other jobs take."""
    on_gpu = torch.cuda.is_available()
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    clock = time.process_time if torch.get_num_threads() == 1 and not on_gpu else time.perf_counter
    times = []
    for _ in range(warmup + repeats):
        synchronize()
        start = clock()
        function()
        synchronize()
        times.append(clock() - start)
    return median(times[warmup:])


def training_step(model, optimizer, batch, tokens, device, bf16):
    """A function that does one whole optimizer step of masked-LM training."""
    ids = torch.randint(5, model.config.vocab_size, (batch, tokens), device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
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


def bare_grams(products, copied: bool):
    """Four batched matrix products per factorization and nothing else: the lower bound."""
    operands = [[factor.detach() for factor in product.tensors()] for product in products]
    if copied:
        operands = [[factor.contiguous() for factor in pair] for pair in operands]

    def grams():
        for left, right in operands:
            left @ (right @ right.mT)
            (left.mT @ left) @ right

    return grams


def stacked_over_layers(products):
    """The closed form in four batched products for all layers of a kind: their factors are copied together first."""
    kinds = [[p for p in products if p.kind == kind] for kind in dict.fromkeys(p.kind for p in products)]

    @torch.no_grad()
    def stacked():
        for same in kinds:
            left, right = (torch.cat(factors) for factors in zip(*(p.tensors() for p in same), strict=True))
            of_left, of_right = left @ (right @ right.mT), (left.mT @ left) @ right
            for i, product in enumerate(same):
                for view, gradient in zip(product.views, (of_left, of_right), strict=True):
                    view.read(view.parameter.grad).add_(gradient.chunk(len(same))[i], alpha=0.01)

    return stacked


def svd_of_each_product(products):
    """Spectral factors by the SVD of every head's dense d x d product."""

    @torch.no_grad()
    def svd():
        for product in products:
            for matrix in product.matrix():
                torch.linalg.svd(matrix)

    return svd


def of_layers(config, rank, options, device) -> dict:
    """What decay and Spectron cost on linear layers and the embedding, at a share of their rank: shares of a step."""
    model = BertForMaskedLM(config).to(device)
    fnl_hf.factorize(model, fnl_hf.FNLConfig(attention=(), target_modules="all", rank=rank))
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    seconds = {
        "optimizer step": timed(training_step(model, adamw, options.batch, options.tokens, device, options.bf16), 3)
    }
    spectron = Spectron(model.parameters(), lambda: fnl_hf.factorizations(model), hidden_matrices(model), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for kind in ("linear", "embedding"):
        seconds[f"coupled decay, {kind}"] = timed(partial(fnl_hf.frobenius_decay_, model, 0.01, [kind]), 7)
    seconds |= {"AdamW's part": timed(adamw.step, 5), "Spectron's part": timed(spectron.step, 5)}
    step = seconds["optimizer step"]
    ratios = {f"{name} / optimizer step": value / step for name, value in list(seconds.items())[1:]}
    print(f"\nlinear layers and the embedding at rank {rank}")
    for name, value in (seconds | ratios).items():
        print(f"{name:52s} {value:12.5f}")
    return {"rank": rank, "seconds": seconds, "ratios": ratios}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--size", choices=SIZES, default="base", help="of BERT")
    parser.add_argument("--bf16", action="store_true", help="autocast the optimizer step to bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=float, nargs="+", metavar="RANK", help="of linear layers and the embedding")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers, a handful of products")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    device = torch.device(options.device)

    torch.manual_seed(0)
    tiny = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = BertConfig(**(tiny if options.tiny else SIZES[options.size]))
    if options.layers is not None:
        found = [of_layers(config, rank, options, device) for rank in options.layers]
        setting = {"model": "tiny" if options.tiny else f"bert-{options.size}", "device": device_name(device)}
        setting |= {"batch": options.batch, "tokens": options.tokens, "bf16": options.bf16}
        setting |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
        if options.json:
            write_json(options.json, {"setting": setting, "layers": found})
        return
    model = fnl_hf.factorize(BertForMaskedLM(config).to(device), fnl_hf.FNLConfig())
    products = fnl_hf.factorizations(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    seconds = {
        "coupled decay": timed(lambda: fnl_hf.frobenius_decay_(model, 0.01), 11),
        "decoupled decay": timed(lambda: decay_step(fnl_hf.factorizations(model), optimizer, 0.01), 11),
        "bare matrix products": timed(bare_grams(products, copied=False), 11),
        "bare matrix products, contiguous": timed(bare_grams(products, copied=True), 11),
        "stacked over layers": timed(stacked_over_layers(products), 11),
        "loop over heads": timed(per_head_loop(products), 5),
        "what is logged": timed(lambda: (measurements(products), gradient_norms(products, 0.01)), 3),
        "autograd through d x d products": timed(autograd_penalty(products), 3),
        "spectral init of all products": timed(
            lambda: [initial_factors(p.form, p.augmented(), p.size()[1], "spectral") for p in products], 3
        ),
        "SVD of each d x d product": timed(svd_of_each_product(products), 1, warmup=0),
    }
    optimizer.zero_grad()
    step = training_step(model, optimizer, options.batch, options.tokens, device, options.bf16)
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
        "what is logged / 500 optimizer steps": seconds["what is logged"] / 500 / seconds["optimizer step"],
        "coupled decay / bare matrix products": seconds["coupled decay"] / seconds["bare matrix products"],
        "decoupled decay / bare matrix products": seconds["decoupled decay"] / seconds["bare matrix products"],
        "coupled decay / bare matrix products, contiguous": seconds["coupled decay"]
        / seconds["bare matrix products, contiguous"],
        "stacked over layers / coupled decay": seconds["stacked over layers"] / seconds["coupled decay"],
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
        print(f"{name:52s} {value:12.5f}")
    if options.json:
        setting = {"model": "tiny" if options.tiny else f"bert-{options.size}", "products": count}
        setting |= {
            "batch": options.batch,
            "tokens": options.tokens,
            "bf16": options.bf16,
            "device": device_name(device),
        }
        setting |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
        write_json(options.json, {"setting": setting, "seconds": seconds, "ratios": ratios})


if __name__ == "__main__":
    main()
