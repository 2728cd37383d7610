"""What layers of factors cost in time and memory against their alternatives, as ratios measured in one run.

    python scripts/benchmark_layers.py                              # one CPU thread, about 9 minutes
    python scripts/benchmark_layers.py --tiny                       # seconds, to see that it runs
    python scripts/benchmark_layers.py --only "768 to 3072" --modes training --seconds 20
    python scripts/benchmark_layers.py --json results.json
    pip install --no-deps tensorly tensorly-torch opt-einsum        # to measure tltorch too

Beside ours, at rank 1/8, 1/4, 1/2 and 1 of what the matrix can have: the dense layer; two plain `nn.Linear` (or plain
convolutions) one after the other; a plain composed product, U Vᵀ and then the dense operation; tltorch, its CP linear
layer of the same rank, which is the same function, or its Tucker convolution of as many parameters. They are measured
in training (forward and backward, with the gradient of the input) and in evaluation of many tokens, of 16 and of one.

All alternatives alternate within every round, in a random order, so that a drift of the machine hits all alike; a ratio
is the median over the rounds of the ratios within a round. On one thread the clock is the process's own CPU time, which
leaves out what other jobs take. Memory is counted, not measured: parameters, gradients, and what autograd saves.
"""

import argparse
import math
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fnl_hf.layers import FactorizedConv2d, FactorizedLinear
from fnl_hf.tasks.running import write_json

try:
    import tltorch
except ImportError:
    tltorch = None

# name -> in, out, tokens
LINEAR = {
    "BERT-base 768 to 768": (768, 768, 1024),
    "BERT-base 768 to 3072": (768, 3072, 1024),
    "BERT-base 3072 to 768": (3072, 768, 1024),
    "BERT-base head 768 to 30522": (768, 30522, 154),  # the masked ones of 1,024 tokens
    "transformer_iwslt 512 to 512": (512, 512, 1024),
    "transformer_iwslt 512 to 1024": (512, 1024, 1024),
    "transformer_iwslt 1024 to 512": (1024, 512, 1024),
    "4096 to 4096": (4096, 4096, 512),
}
# name -> in, out, kernel, stride, height and width
CONV = {
    "ResNet-50 3 x 3, 64 to 64 at 56": (64, 64, 3, 1, 56),
    "ResNet-50 1 x 1, 256 to 64 at 56": (256, 64, 1, 1, 56),
    "ResNet-50 3 x 3, 128 to 128 at 28": (128, 128, 3, 1, 28),
    "ResNet-50 3 x 3 by 2, 256 to 256 at 28": (256, 256, 3, 2, 28),
    "ResNet-50 1 x 1, 1024 to 256 at 14": (1024, 256, 1, 1, 14),
    "ResNet-50 3 x 3, 512 to 512 at 7": (512, 512, 3, 1, 7),
}
TINY = {"linear": {"tiny 24 to 32": (24, 32, 40)}, "conv": {"tiny 3 x 3, 8 to 8 at 6": (8, 8, 3, 1, 6)}}
FRACTIONS = (1 / 8, 1 / 4, 1 / 2, 1)
MODES = ("training", "evaluation", "16 tokens", "1 token", "1 image")
IMAGES = 4


class Composed(nn.Module):
    """The product as one would write it: autograd goes through U Vᵀ."""

    def __init__(self, rows: int, columns: int, rank: int, operation: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.left = nn.Parameter(torch.randn(rows, rank) / rank**0.5)
        self.right = nn.Parameter(torch.randn(columns, rank) / columns**0.5)
        self.operation = operation

    def forward(self, input: Tensor) -> Tensor:
        return self.operation(input, self.left @ self.right.T)


class Two(nn.Module):
    """Two layers, one after the other."""

    def __init__(self, down: nn.Module, up: nn.Module):
        super().__init__()
        self.down, self.up = down, up

    def forward(self, input: Tensor) -> Tensor:
        return self.up(self.down(input))


def filled(layer: nn.Module) -> nn.Module:
    """A layer of factors with values."""
    for factor in layer.factor_parameters():
        nn.init.normal_(factor, std=factor.shape[-1] ** -0.5)
    return layer


def linear_modules(columns: int, rows: int, rank: int) -> dict[str, nn.Module]:
    dense, bias = nn.Linear(columns, rows), nn.Parameter(torch.zeros(rows))
    modules = {
        "ours": filled(FactorizedLinear.replacing(dense, rank)),
        "dense": dense,
        "two": Two(nn.Linear(columns, rank, bias=False), nn.Linear(rank, rows)),
        "composed": Composed(rows, columns, rank, lambda input, weight: F.linear(input, weight, bias)),
    }
    modules["composed"].bias = bias
    if tltorch:
        modules["tltorch"] = tltorch.FactorizedLinear((columns,), (rows,), factorization="cp", rank=rank)
    return modules


def conv_modules(inputs: int, outputs: int, kernel: int, stride: int, rank: int) -> dict[str, nn.Module]:
    pad = kernel // 2
    dense = nn.Conv2d(inputs, outputs, kernel, stride, pad, bias=False)
    ours = filled(FactorizedConv2d.replacing(dense, rank))
    down = nn.Conv2d(inputs, rank, (1, kernel), (1, stride), (0, pad), bias=False)
    up = nn.Conv2d(rank, outputs, (kernel, 1), (stride, 1), (pad, 0), bias=False)
    modules = {"ours": ours, "dense": dense, "two": Two(down, up)}
    modules["composed"] = Composed(
        *ours.matrix_shape, rank, lambda input, matrix: F.conv2d(input, ours.as_weight(matrix), None, stride, pad)
    )
    share = rank * sum(ours.matrix_shape) / dense.weight.numel()
    if tltorch and share < 1:
        options = {"kernel_size": kernel, "order": 2, "stride": stride, "padding": pad, "factorization": "tucker"}
        modules["tltorch"] = tltorch.FactorizedConv(inputs, outputs, rank=share, **options)
        nn.init.normal_(modules["tltorch"].weight.core)
        for factor in modules["tltorch"].weight.factors:
            nn.init.normal_(factor)
    return modules


def run(module: nn.Module, input: Tensor, output_grad: Tensor | None) -> None:
    """A forward, and a backward if there is a gradient to start it with."""
    if output_grad is None:
        module(input)
        return
    input.grad = None
    for parameter in module.parameters():
        parameter.grad = None
    module(input).backward(output_grad)


def compare(modules: dict[str, nn.Module], input: Tensor, training: bool, seconds: float, clock) -> dict:
    """Ratios of ours to every other module, of as many rounds as fit into the seconds, and of three at least."""
    for module in modules.values():
        module.train(training)
    with torch.set_grad_enabled(training):
        input = input.clone().requires_grad_(training)
        output_grad = torch.randn_like(modules["dense"](input)) if training else None
        for module in modules.values():
            run(module, input, output_grad)
        start = clock()
        run(modules["dense"], input, output_grad)
        calls = max(1, math.ceil(2e-3 / max(clock() - start, 1e-6)))  # of one measurement
        times, names = {name: [] for name in modules}, list(modules)
        until = time.perf_counter() + seconds
        while len(times["ours"]) < 3 or time.perf_counter() < until:
            random.shuffle(names)
            for name in names:
                start = clock()
                for _ in range(calls):
                    run(modules[name], input, output_grad)
                times[name].append((clock() - start) / calls)
    ours = times.pop("ours")
    ratios = {name: median(map(float.__truediv__, ours, other)) for name, other in times.items()}
    return {"ratios": ratios, "rounds": len(ours), "dense ms": 1e3 * median(times["dense"])}


def memory(module: nn.Module, input: Tensor) -> dict[str, int]:
    """Numbers that training keeps: parameters and gradients, and what the backward needs beside these and the input."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (input, *module.parameters())}
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module.train()(input)  # is kept: what it saves keeps its address
    assert output.requires_grad
    return {"parameters and gradients": 2 * sum(p.numel() for p in module.parameters()), "saved": sum(saved.values())}


def cases(tiny: bool, only: str, fractions: Sequence[float]):
    """(name, rank as a fraction, rank, matrix shape, modules, input of each mode) of every layer."""
    for name, (columns, rows, tokens) in (TINY["linear"] if tiny else LINEAR).items():
        inputs = {"training": tokens, "evaluation": tokens, "16 tokens": 16, "1 token": 1}
        for fraction in fractions if re.search(only, name) else ():
            rank = int(fraction * min(rows, columns))
            shapes = {mode: (count, columns) for mode, count in inputs.items()}
            yield name, fraction, rank, (rows, columns), linear_modules(columns, rows, rank), shapes
    for name, (channels, outputs, kernel, stride, size) in (TINY["conv"] if tiny else CONV).items():
        inputs = {"training": IMAGES, "evaluation": IMAGES, "1 image": 1}
        for fraction in fractions if re.search(only, name) else ():
            rows, columns = outputs * kernel, channels * kernel
            rank = int(fraction * min(rows, columns))
            shapes = {mode: (count, channels, size, size) for mode, count in inputs.items()}
            yield name, fraction, rank, (rows, columns), conv_modules(channels, outputs, kernel, stride, rank), shapes


def table(layers: Sequence[dict]) -> list[str]:
    """A Markdown row for each layer: ratios at all ranks, of ours to dense, to two layers and to tltorch."""
    shown = (("training", "dense"), ("training", "two"), ("training", "tltorch"), ("evaluation", "dense"))
    lines = []
    for name in dict.fromkeys(row["layer"] for row in layers):
        modes = [row["modes"] for row in layers if row["layer"] == name]
        small = next(mode for mode in modes[0] if mode.startswith("1 "))
        cells = [
            " / ".join(
                f"{mode[which]['ratios'][other]:.2f}" if other in mode[which]["ratios"] else "-" for mode in modes
            )
            for which, other in (*shown, (small, "dense"))
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def bounds(layers: Sequence[dict]) -> list[str]:
    """A Markdown row for each bound: how many of the ratios that it is about keep to it, and the largest of them."""
    training = [(row["below break-even"], row["modes"]["training"]["ratios"]) for row in layers]
    evaluation = [result["ratios"] for row in layers for mode, result in row["modes"].items() if mode != "training"]
    most = {
        "training below break-even, by dense": (1.05, [ratios["dense"] for below, ratios in training if below]),
        "training at or above it, by the faster of two layers and composed": (
            1.05,
            [max(ratios["two"], ratios.get("composed", 0)) for below, ratios in training if not below],
        ),
        "evaluation, by dense": (1.05, [ratios["dense"] for ratios in evaluation]),
        "training, by two layers": (1.03, [ratios["two"] for _, ratios in training]),
        "evaluation, by two layers": (1.03, [ratios["two"] for ratios in evaluation]),
    }
    return [
        f"| {name} | {bound} | {sum(ratio <= bound for ratio in ratios)} of {len(ratios)} "
        f"| {median(ratios):.2f} | {max(ratios):.2f} |"
        for name, (bound, ratios) in most.items()
        if ratios
    ]


def numbers(row: dict) -> dict[str, int]:
    """What training keeps of a layer of the results: parameters, gradients, what the backward needs, and the input."""
    return {name: sum(counts.values()) + row["input"] for name, counts in row["memory"].items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a layer, rank and mode; three rounds at least")
    parser.add_argument("--only", default="", help="layers whose name matches this regular expression")
    parser.add_argument("--ranks", type=float, nargs="+", default=FRACTIONS, help="as fractions of the full one")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--tiny", action="store_true", help="two small layers")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    if tltorch is None:
        print("tltorch is not installed, and left out: pip install --no-deps tensorly tensorly-torch opt-einsum")

    setting = {"threads": options.threads, "clock": clock.__name__, "torch": torch.__version__}
    setting["tltorch"] = tltorch and tltorch.__version__
    found = []
    for name, fraction, rank, (rows, columns), modules, shapes in cases(options.tiny, options.only, options.ranks):
        input = torch.randn(shapes["training"], requires_grad=True)
        counts = {name: memory(modules[name], input) for name in ("ours", "dense")}
        row = {"layer": name, "fraction": fraction, "rank": rank, "matrix": [rows, columns], "input": input.numel()}
        row |= {"memory": counts, "modes": {}}
        row["below break-even"] = rank * (rows + columns) < rows * columns
        print(f"\n{name}, rank {rank}: times of ours / others', {counts['ours']['saved']:,} numbers saved")
        for mode in [mode for mode in shapes if mode in options.modes]:
            some = dict(modules)
            if mode != "training" or 3 * rank > 4 * math.prod(shapes[mode]) / columns:  # no use, or far from the faster
                some.pop("composed")
            input = torch.randn(shapes[mode])
            row["modes"][mode] = result = compare(some, input, mode == "training", options.seconds, clock)
            shown = "  ".join(f"{other} {ratio:.3f}" for other, ratio in result["ratios"].items())
            print(f"    {mode:12s} {shown}  ({result['dense ms']:.3f} ms dense, {result['rounds']} rounds)", flush=True)
        found.append(row)
        if options.json:  # after every layer, so that an end before the last one leaves the others
            write_json(options.json, {"setting": setting, "layers": found})
    if set(options.modes) == set(MODES):
        print("", *table(found), "", *bounds(found), sep="\n")


if __name__ == "__main__":
    main()
