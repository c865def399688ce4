"""Ideas that were tried and are not part of the package, for ablation.py: it shows what each of them is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compresskit.decomposers import weighted
from compresskit.decomposers.base import FactorisedEmbedding, FactorisedLinear
from compresskit.decomposers.group_reduce import GroupReduceEmbedding
from compresskit.decomposers.low_rank import LowRankEmbedding, LowRankLinear
from compresskit.training import losses
from compresskit.training.attention import SCORES, scores_attention
from compresskit.training.trainer import DistillationTrainer

Rows = Sequence[dict[str, Tensor]]


@contextmanager
def relations() -> Iterator[None]:
    """The attention loss compares the last layer's relations of queries, keys and values in place of all layers'
    scores (MiniLMv2: Wang et al. 2021, section 3.1; as many relation heads as attention heads).
    """

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **rest: Any
    ) -> Any:
        output, _ = scores_attention(module, query, key, value, mask, **rest)
        found = [x @ x.transpose(2, 3) * x.shape[-1] ** -0.5 for x in (query, key, value)]
        return output, torch.cat(found, dim=1)  # (B, 3 A, T, T)

    def loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor, count: Tensor | float) -> Tensor:
        hidden = mask[:, None, None, :] == 0
        ours, theirs = (
            F.log_softmax(maps[-1].float().masked_fill(hidden, -1e9), dim=-1) for maps in (student, teacher)
        )
        rows = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)  # (B, 3 A, T)
        return (rows * mask[:, None]).sum() / (mask.sum() * rows.shape[1])

    plain = losses.attention_loss
    ALL_ATTENTION_FUNCTIONS.register(SCORES, attention)
    losses.attention_loss = loss
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.register(SCORES, scores_attention)
        losses.attention_loss = plain


def rate_of_factors(times: float) -> Callable[[], AbstractContextManager[None]]:
    """Factors learn ``times`` as fast as the other parameters (biases, LayerNorm, head, dense tables)."""

    @contextmanager
    def patched() -> Iterator[None]:
        plain = DistillationTrainer.create_optimizer

        def create(self: Any, model: Any = None) -> Any:
            optimizer = plain(self, model)
            layers = (m for m in self.model.modules() if isinstance(m, FactorisedLinear | FactorisedEmbedding))
            factors = {id(p) for layer in layers for name, p in layer.named_parameters() if name != "bias"}
            for group in list(optimizer.param_groups):
                fast = [p for p in group["params"] if id(p) in factors]
                group["params"] = [p for p in group["params"] if id(p) not in factors]
                optimizer.add_param_group({**group, "params": fast, "lr": times * group["lr"]})
            return optimizer

        DistillationTrainer.create_optimizer = create  # type: ignore[method-assign]
        try:
            yield
        finally:
            DistillationTrainer.create_optimizer = plain  # type: ignore[method-assign]

    return patched


@torch.no_grad()
def one_sided(student: PreTrainedModel, teacher: PreTrainedModel, rows: Rows) -> None:
    """Of low-rank layers A has columns of length 1 and B all of the size; otherwise both have an equal share."""
    for layer in student.modules():
        if isinstance(layer, LowRankLinear | LowRankEmbedding | GroupReduceEmbedding):
            pairs = [(layer.a, layer.b)]
            if isinstance(layer, GroupReduceEmbedding):
                pairs.append((layer.frequent_a, layer.frequent_b))
            for a, b in pairs:
                size = torch.linalg.vector_norm(a, dim=0)
                a.div_(size)
                b.mul_(size[:, None])


@torch.no_grad()
def layer_by_layer(student: PreTrainedModel, teacher: PreTrainedModel, rows: Rows) -> None:
    """Low-rank layers of a BERT are fitted again, from the first to the last, to the inputs X' that they will really
    see: W* minimises ||W X - W* X'||, and the factors are its optimum of their rank under X'X'^T.
    """
    roles = (
        [f"attention.self.{name}" for name in ("query", "key", "value")],
        ["attention.output.dense"],
        ["intermediate.dense"],
        ["output.dense"],
    )
    for number in range(student.config.num_hidden_layers):
        for role in roles:
            names = [f"encoder.layer.{number}.{name}" for name in role]
            theirs, ours = (inputs(model.base_model, names[0], rows) for model in (teacher, student))
            moment = ours.T @ ours
            damped = moment + 1e-3 * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
            shift = torch.linalg.solve(damped, ours.T @ theirs)  # X = X' shift, as near as can be
            for name in names:
                layer: Any = student.base_model.get_submodule(name)
                wanted = teacher.base_model.get_submodule(name).weight.double() @ shift.T
                a, b = weighted.low_rank(wanted, moment, layer.a.shape[1])
                layer.a.copy_(a)
                layer.b.copy_(b)


def inputs(model: nn.Module, name: str, rows: Rows) -> Tensor:
    """What a layer sees of all real tokens, (tokens, n) float64."""
    found: list[Tensor] = []
    mask = torch.ones(0)

    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found.append(arguments[0][mask].double())

    handle = model.get_submodule(name).register_forward_pre_hook(hook)
    try:
        for batch in rows:
            mask = batch["attention_mask"].bool()
            model(**batch)
    finally:
        handle.remove()
    return torch.cat(found)


#: While a student is trained.
TRAINING: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "relations": relations,
    "factors twice as fast": rate_of_factors(2),
    "factors half as fast": rate_of_factors(0.5),
}
#: Before it is.
CUTS: dict[str, Callable[[PreTrainedModel, PreTrainedModel, Rows], None]] = {
    "one-sided": one_sided,
    "layer by layer": layer_by_layer,
}
