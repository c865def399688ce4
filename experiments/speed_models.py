"""How fast whole models and training steps are, dense and factorised. speed.py runs this and writes the report."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timing import side_by_side
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedModel

import compresskit
from compresskit.decomposers.registry import METHODS
from compresskit.model import checkpoint
from compresskit.model.measure import count_flops

RECIPES = ("kroneckerbert-8", "kroneckerbert-8-fast", "kroneckerbert-21", "kroneckerbert-21-fast")
#: Dense parameters / parameters of the students of every method.
RATIO = 19


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
