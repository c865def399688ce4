"""How fast single layers are: Kronecker products and tensor trains against dense layers and other packages.

speed.py runs this and writes the report.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from timing import milliseconds, side_by_side
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.decomposers import Group, Target
from compresskit.decomposers.kronecker import KroneckerLinear
from compresskit.decomposers.registry import get

Pair = tuple[int, int]
#: Kronecker layers of BERT_BASE as the paper prints them: A and B. The mirror swaps them.
SHAPES: dict[str, tuple[Pair, Pair]] = {
    "_8 attention": ((384, 384), (2, 2)),
    "_8 FFN": ((8, 2), (384, 384)),
    "_21 attention": ((384, 48), (2, 16)),
    "_21 FFN": ((16, 2), (192, 384)),
}
TOKENS = (16, 128, 512, 2048, 4096)
#: Numbers of tokens for which other packages are measured too.
PEERS = (128, 2048)
#: Dense parameters / parameters of the tensor train.
RATIO = 19


def peers(a: Tensor, b: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """The same product as other packages compute it; those that are not installed are left out."""
    (m1, n1), (m2, n2) = a.shape, b.shape
    found: dict[str, Callable[[Tensor], Tensor]] = {
        # As the paper's authors (kronecker-kd) contract, written anew; both orders, whichever einsum would choose.
        "einsum, A first": lambda x: torch.einsum("til,ml->tim", _einsum_a(x, a, n2), b).reshape(-1, m1 * m2),
        "einsum, B first": lambda x: torch.einsum("tjl,ij->til", _einsum_b(x, b, n1), a).reshape(-1, m1 * m2),
        "matmuls, A first": lambda x: ((a @ x.view(-1, n1, n2)) @ b.T).reshape(-1, m1 * m2),
        "matmuls, B first": lambda x: (a @ (x.view(-1, n1, n2) @ b.T)).reshape(-1, m1 * m2),
    }
    if operators := _module("linear_operator.operators"):
        product = operators.KroneckerProductLinearOperator(
            operators.DenseLinearOperator(a), operators.DenseLinearOperator(b)
        )
        found["linear_operator"] = lambda x: (product @ x.T).T
    if lokr := _module("peft.tuners.lokr.layer"):
        found["peft LoKr"] = lambda x: F.linear(x, lokr.make_kron(a, b))
    if fastkron := _module("pyfastkron.fastkrontorch"):
        factors = [a.T.contiguous(), b.T.contiguous()]
        found["pyfastkron"] = lambda x: fastkron.gemkm(x, factors)
    return found


class Module(nn.Module):
    """A function as a layer: what torch does around a layer's forward is the same for all that are compared."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _einsum_a(x: Tensor, a: Tensor, n2: int) -> Tensor:
    return torch.einsum("tjl,ij->til", x.view(len(x), -1, n2), a)


def _einsum_b(x: Tensor, b: Tensor, n1: int) -> Tensor:
    return torch.einsum("tjk,lk->tjl", x.view(len(x), n1, -1), b)


@cache
def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # some of them fail in their own ways beside another torch
        print(f"{name}: left out ({error})")
        return None


def layers(rounds: int) -> list[dict[str, Any]]:
    """Every shape and its mirror: forward, and forward with backward."""
    rows = []
    for name, printed in SHAPES.items():
        for mirrored in (False, True):
            shape_a, shape_b = printed[::-1] if mirrored else printed
            layer = KroneckerLinear(shape_a, shape_b, terms=1, bias=False)
            nn.init.normal_(layer.a)
            nn.init.normal_(layer.b)
            a, b, weight = layer.a.detach()[0], layer.b.detach()[0], layer.dense_weight().detach()
            for threads in (1, 2):
                torch.set_num_threads(threads)
                for tokens in TOKENS:
                    shape = f"{_text(shape_a)} (x) {_text(shape_b)}"
                    row = {"name": name, "mirrored": mirrored, "shape": shape, "tokens": tokens, "threads": threads}
                    x = torch.randn(tokens, weight.shape[1])
                    others = peers(a, b) if tokens in PEERS and threads == 1 else {}
                    rows.append({**row, "pass": "forward", **_forward(layer, weight, others, x, rounds)})
                    if tokens in PEERS and threads == 1:
                        rows.append({**row, "pass": "training", **_training(layer, weight, x, rounds)})
            print(rows[-1]["name"], rows[-1]["shape"], flush=True)
    return rows


def _forward(
    layer: KroneckerLinear, weight: Tensor, others: dict[str, Callable[[Tensor], Tensor]], x: Tensor, rounds: int
) -> dict[str, Any]:
    with torch.inference_mode():
        expected = F.linear(x, weight)
        runs: dict[str, Callable[[], object]] = {"dense": partial(Module(lambda x: F.linear(x, weight)), x)}
        for name, other in {"ours": layer, **{name: Module(other) for name, other in others.items()}}.items():
            try:
                error = float((other(x) - expected).norm() / expected.norm())
            except Exception as problem:
                print(f"{name}: left out ({problem})")
                continue
            if error > 1e-5:
                raise SystemExit(f"{name}: off by {error:.1e}")
            runs[name] = partial(other, x)
        square, rows = torch.randn(768, 768), torch.randn(2048, 768)
        times = side_by_side({**runs, "large GEMM": lambda: rows @ square}, rounds)
    rate = 2 * 2048 * 768 * 768 / times.pop("large GEMM").median
    flops = _flops(layer, len(x))
    return {"bound": flops / rate, "share": flops / rate / times["ours"].median, **milliseconds(times)}


def _training(layer: KroneckerLinear, weight: Tensor, x: Tensor, rounds: int) -> dict[str, Any]:
    dense = nn.Parameter(weight.clone())
    a, b = (nn.Parameter(factor.detach()[0].clone()) for factor in (layer.a, layer.b))
    x = x.clone().requires_grad_()
    gradient = torch.randn(len(x), len(weight))
    passes = {"dense": partial(Module(lambda x: F.linear(x, dense)), x), "ours": partial(layer, x)}
    passes |= {name: partial(Module(other), x) for name, other in peers(a, b).items()}
    runs: dict[str, Callable[[], object]] = {}
    for name, forward in passes.items():
        try:
            torch.autograd.grad(forward(), x, gradient)
        except Exception as problem:  # inference only
            print(f"{name}: no backward ({str(problem)[:80]})")
            continue
        runs[name] = lambda forward=forward: forward().backward(gradient)  # type: ignore[misc]
    return milliseconds(side_by_side(runs, max(3, rounds // 2)))


def _flops(layer: KroneckerLinear, tokens: int) -> int:
    """The fewest that either order takes: what the bound is made of."""
    (_, m1, n1), (_, m2, n2) = layer.a.shape, layer.b.shape
    return 2 * tokens * min(m1 * n2 * (n1 + m2), n1 * m2 * (n2 + m1))


def tensor_trains(rounds: int) -> list[dict[str, Any]]:
    """A 19x tensor train of 768x768 against tensorly-torch's layers of about its size (that has no Kronecker layer)."""
    torch.set_num_threads(1)
    decomposer = get("tensor-train")
    group = Group("layer", (Target("layer", "linear", "attention", (768, 768)),))
    spec = decomposer.candidates(group, group.parameters // RATIO)[0]
    (layer,) = decomposer.layers(group, spec).values()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    found: dict[str, nn.Module] = {"dense": nn.Linear(768, 768, bias=False), f"ours, {spec.describe()}": layer}
    if tltorch := _module("tltorch"):
        sizes = {"in_tensorized_features": (8, 8, 12), "out_tensorized_features": (8, 8, 12)}
        for kind in ("blocktt", "tucker"):
            for way in ("factorized", "reconstructed"):
                made = tltorch.FactorizedLinear(
                    **sizes, factorization=kind, implementation=way, rank=1 / RATIO, bias=False
                )
                found[f"tensorly-torch {kind}, {way}"] = made
    rows = []
    for tokens in PEERS:
        x = torch.randn(tokens, 768)
        with torch.no_grad():
            times = side_by_side({name: partial(module, x) for name, module in found.items()}, rounds)
        for name, time in times.items():
            parameters = sum(parameter.numel() for parameter in found[name].parameters())
            rows.append({"layer": name, "parameters": parameters, "tokens": tokens, "milliseconds": 1e3 * time.median})
    return rows


def _text(shape: Pair) -> str:
    return f"{shape[0]}x{shape[1]}"
