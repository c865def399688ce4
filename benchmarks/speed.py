"""How fast factorised layers, whole models and training steps are, against dense ones, their FLOPs and other packages.

Run: python benchmarks/speed.py    (`make bench-speed` runs compress.py and memory.py too)
Writes README.md, layers.json, models.json, training.json and speed.png into reports/speed/. Other packages are compared
where they are installed (pip install '.[benchmarks]'). Idle machines only: every figure is a ratio taken side by side,
but a busy core distorts those too.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import matplotlib
import torch
from timing import REPORT, Time, made_on, side_by_side
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, PreTrainedModel

import compresskit
from compresskit.decomposers.base import Group, Target
from compresskit.decomposers.kronecker import KroneckerLinear
from compresskit.decomposers.registry import METHODS, get
from compresskit.markup import markdown
from compresskit.model import checkpoint
from compresskit.model.measure import count_flops

matplotlib.use("agg")
from matplotlib import pyplot as plt

Pair = tuple[int, int]
#: Kronecker layers of BERT_BASE as the paper prints them: A and B. The mirror swaps them.
SHAPES: dict[str, tuple[Pair, Pair]] = {
    "_8 attention": ((384, 384), (2, 2)),
    "_8 FFN": ((8, 2), (384, 384)),
    "_21 attention": ((384, 48), (2, 16)),
    "_21 FFN": ((16, 2), (192, 384)),
}
#: Share of the bound that the forward pass is to reach: printed shapes, and all mirrored ones.
GOALS = {"_8 attention": 0.5, "_8 FFN": 0.5, "_21 attention": 0.4, "_21 FFN": 0.6}
MIRRORED = 0.65
TOKENS = (16, 128, 512, 2048, 4096)
PEERS = (128, 2048)
RECIPES = ("kroneckerbert-8", "kroneckerbert-8-fast", "kroneckerbert-21", "kroneckerbert-21-fast")
RATIO = 19
PARTS = ("layers", "trains", "models", "training")


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
    return {"bound": flops / rate, "share": flops / rate / times["ours"].median, **_plain(times)}


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
    return _plain(side_by_side(runs, max(3, rounds // 2)))


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


class Nothing(nn.Module):
    """In place of a linear layer: a result of the right shape, for free."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], self.features).contiguous()


def models(rounds: int) -> list[dict[str, Any]]:
    """BERT_BASE dense, without its linear layers, and factorised in every way."""
    torch.manual_seed(0)
    dense = BertModel(BertConfig()).eval()
    found: dict[str, PreTrainedModel] = {"dense": dense, "without linear layers": _hollow(dense)}
    found |= {name: compresskit.compress(dense, recipe=name) for name in RECIPES}
    found |= {f"{name} {RATIO}x": compresskit.compress(dense, method=name, ratio=RATIO) for name in METHODS.all()}
    found[f"kronecker {RATIO}x, latency"] = compresskit.compress(
        dense, method="kronecker", ratio=RATIO, objective="latency"
    )
    flops = {name: count_flops(model) for name, model in found.items()}
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for batch in (1, 16):
            words = torch.randint(5, 30000, (batch, 128))
            runs = {name: partial(model, input_ids=words, attention_mask=words > 0) for name, model in found.items()}
            with torch.inference_mode():
                times = side_by_side(runs, rounds if batch == 1 else max(3, rounds // 2))
            rest = times["without linear layers"].median
            for name, time in times.items():
                ratio = flops["dense"].linear / max(flops[name].linear, 1)
                bound = times["dense"].median / (rest + (times["dense"].median - rest) / ratio)
                rows.append(
                    {
                        "model": name,
                        "threads": threads,
                        "batch": batch,
                        "milliseconds": 1e3 * time.median,
                        "spread": 1e3 * time.spread,
                        "speedup": times["dense"].median / time.median,
                        "bound": None if name in ("dense", "without linear layers") else bound,
                        "flops_ratio": flops["dense"].total / flops[name].total,
                    }
                )
            print(f"{threads} threads, batch {batch}", flush=True)
    return rows


def _hollow(model: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, Nothing(module.out_features))
    return model


def training(rounds: int) -> list[dict[str, Any]]:
    """A step of the embedded checkpoint (forward, backward, AdamW) against the same of its students at 19x.

    The student's share of a distillation step: what the frozen teacher computes beside it is the same for all.
    """
    dense = checkpoint.read(None).model.float()
    students = {name: compresskit.compress(dense, method=name, ratio=RATIO) for name in METHODS.all()}
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for batch, tokens in ((32, 32), (8, 128)):
            words = torch.randint(5, 30000, (batch, tokens))
            steps = {name: _step(model, words) for name, model in {"dense": dense, **students}.items()}
            times = side_by_side(steps, max(3, rounds // 2))
            rows += [
                {
                    "model": name,
                    "threads": threads,
                    "batch": batch,
                    "tokens": tokens,
                    "milliseconds": 1e3 * time.median,
                    "spread": 1e3 * time.spread,
                    "share": time.median / times["dense"].median,
                }
                for name, time in times.items()
            ]
        print(f"training, {threads} threads", flush=True)
    return rows


def _step(model: PreTrainedModel, words: Tensor) -> Callable[[], object]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        states = model(input_ids=words, attention_mask=torch.ones_like(words), output_hidden_states=True).hidden_states
        torch.stack([state.square().mean() for state in states]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _text(shape: Pair) -> str:
    return f"{shape[0]}x{shape[1]}"


def _plain(times: dict[str, Time]) -> dict[str, Any]:
    return {
        "milliseconds": {name: 1e3 * time.median for name, time in times.items()},
        "spread": {name: 1e3 * time.spread for name, time in times.items()},
    }


def goals(parts: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Every goal with what was measured."""
    rows = []
    forward = [row for row in parts["layers"] if row["pass"] == "forward" and row["threads"] == 1]
    for row in (row for row in forward if row["tokens"] in PEERS):
        goal = MIRRORED if row["mirrored"] else GOALS[row["name"]]
        fastest = min(value for name, value in row["milliseconds"].items() if name not in ("ours", "dense"))
        ours = row["milliseconds"]["ours"]
        what = f"{row['name']}, {row['shape']}, {row['tokens']} tokens"
        rows.append([what, f">= {goal:.0%} of the bound", f"{row['share']:.0%}", _met(row["share"] >= goal)])
        rows.append([what, "no slower than the fastest peer", f"{fastest / ours:.2f}x as fast", _met(ours <= fastest)])
    for row in (row for row in parts["layers"] if row["pass"] == "training"):
        ours = row["milliseconds"]["ours"]
        fastest = min(value for name, value in row["milliseconds"].items() if name not in ("ours", "dense"))
        what = f"{row['name']}, {row['shape']}, {row['tokens']} tokens, forward + backward"
        dense = row["milliseconds"]["dense"] / ours
        if not row["name"].startswith("_8 attention"):  # the goal is for 3x fewer FLOPs, this has 2x
            rows.append([what, "faster than dense", f"{dense:.2f}x", _met(dense > 1)])
        rows.append([what, "no slower than the fastest peer", f"{fastest / ours:.2f}x as fast", _met(ours <= fastest)])
    for row in parts["models"]:
        goal = {1: 6.0, 16: 5.0}[row["batch"]]
        if row["model"] == "kroneckerbert-21-fast" and row["threads"] == 1:
            what = f"BERT_BASE, {row['model']}, {row['batch']}x128, one thread"
            rows.append([what, f">= {goal:g}x dense", f"{row['speedup']:.2f}x", _met(row["speedup"] >= goal)])
    for row in parts["training"]:
        if row["model"] != "dense":
            threads = {1: "one thread", 2: "two threads"}[row["threads"]]
            what = f"training step, {row['model']} {RATIO}x, {row['batch']}x{row['tokens']}, {threads}"
            rows.append([what, "<= 0.6 of the dense step", f"{row['share']:.2f}", _met(row["share"] <= 0.6)])
    return rows


def _met(condition: bool) -> str:
    return "met" if condition else "**not met**"


def report(parts: dict[str, list[dict[str, Any]]]) -> None:
    """README.md and the picture."""
    names = list(dict.fromkeys(name for row in parts["layers"] for name in row["milliseconds"]))
    layer_rows = [
        [
            row["name"], row["shape"], row["pass"], str(row["tokens"]), str(row["threads"]),
            *(f"{row['milliseconds'][n]:.2f}" if n in row["milliseconds"] else "" for n in names),
            f"{1e3 * row['bound']:.2f}" if "bound" in row else "", f"{row['share']:.0%}" if "share" in row else "",
        ]
        for row in parts["layers"]
    ]  # fmt: skip
    model_rows = [
        [
            row["model"], f"{row['batch']}x128", str(row["threads"]),
            f"{row['milliseconds']:.1f} ± {row['spread']:.1f}",
            f"{row['flops_ratio']:.1f}x", f"{row['speedup']:.2f}x", f"{row['bound']:.1f}x" if row["bound"] else "",
        ]
        for row in parts["models"]
    ]  # fmt: skip
    training_rows = [
        [
            row["model"], f"{row['batch']}x{row['tokens']}", str(row["threads"]),
            f"{row['milliseconds']:.1f} ± {row['spread']:.1f}", f"{row['share']:.2f}",
        ]
        for row in parts["training"]
    ]  # fmt: skip
    train_rows = [
        [row["layer"], f"{row['parameters']:,}", str(row["tokens"]), f"{row['milliseconds']:.2f}"]
        for row in parts["trains"]
    ]
    gpu = (
        "A GPU was there but is not used"
        if torch.cuda.is_available()
        else "No GPU was there: nothing is known about one"
    )
    text = [
        "# Speed", "",
        "`make bench-speed`. Medians over rounds in which every candidate had its turn. Bound: FLOPs of the cheaper",
        f"order / the rate of a 2048x768x768 matrix product in the same rounds. {gpu}.",
        "See also [compression](compression.md), [memory](memory.md), [the cost model](contraction.md) and",
        "[where layers lose that a peer computes faster](profile.md).", "",
        "## Goals", "", markdown(("what", "goal", "measured", ""), goals(parts)), "",
        "![Whole models: speed-up against FLOPs](speed.png)", "",
        "## Whole models, BERT_BASE", "",
        "Bound: t(dense) / (t(without linear layers) + t(linear layers) / ratio of their FLOPs).", "",
        markdown(("model", "batch", "threads", "ms", "fewer FLOPs", "speedup", "bound"), model_rows), "",
        "## Training steps, embedded checkpoint", "",
        "Forward with all hidden states, backward, AdamW; share: of the dense model's step.", "",
        markdown(("model", "batch", "threads", "ms", "share"), training_rows), "",
        "## Tensor trains", "", "768x768, one thread, forward.", "",
        markdown(("layer", "parameters", "tokens", "ms"), train_rows), "",
        "## Layers", "", "Milliseconds; training: forward + backward.", "",
        markdown(("layer", "shape", "pass", "tokens", "threads", *names, "bound", "share of bound"), layer_rows), "",
        made_on(),
    ]  # fmt: skip
    (REPORT / "README.md").write_text("\n".join(text), encoding="utf-8")
    figure, axis = plt.subplots(figsize=(7.5, 5), layout="constrained")
    shown = [row for row in parts["models"] if row["threads"] == 1 and row["bound"]]
    for batch, marker in ((1, "o"), (16, "s")):
        mine = sorted((row for row in shown if row["batch"] == batch), key=lambda row: row["flops_ratio"])
        ratios = [row["flops_ratio"] for row in mine]
        points = axis.plot(ratios, [row["speedup"] for row in mine], marker, label=f"measured, {batch}x128")
        axis.plot(
            ratios, [row["bound"] for row in mine], "_", color=points[0].get_color(), label=f"bound, {batch}x128",
            markersize=14,
        )  # fmt: skip
        if batch == 1:
            for row in mine:
                axis.annotate(
                    row["model"], (row["flops_ratio"], row["speedup"]), fontsize=7, xytext=(4, -9),
                    textcoords="offset points",
                )  # fmt: skip
    axis.margins(x=0.2)  # room for names
    axis.set(xlabel="fewer FLOPs than dense", ylabel="times faster than dense", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(REPORT / "speed.png", dpi=130)


def main() -> None:
    """All parts, or some of them, then the report from what is there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="measured anew; the others as they are"
    )
    arguments = parser.parse_args()
    REPORT.mkdir(parents=True, exist_ok=True)
    for part in arguments.parts:
        found = {"layers": layers, "trains": tensor_trains, "models": models, "training": training}[part](
            arguments.rounds
        )
        (REPORT / f"{part}.json").write_text(json.dumps(found, indent=1) + "\n")
    parts = {part: json.loads((REPORT / f"{part}.json").read_text()) for part in PARTS}
    report(parts)
    print(markdown(("what", "goal", "measured", ""), goals(parts)))


if __name__ == "__main__":
    main()
