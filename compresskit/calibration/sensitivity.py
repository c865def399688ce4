"""How much a model's predictions depend on each of its matrices, from a backward pass over a task's rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.calibration.tokens import RealTokens
from compresskit.decomposers import Target
from compresskit.errors import InputError
from compresskit.model.inputs import fitted
from compresskit.model.kept import copied
from compresskit.model.targets import find_targets, users
from compresskit.tasks.registry import KINDS, predictions_of
from compresskit.tasks.rows import TaskData

#: Tokens that are read: one number per matrix needs fewer than a second moment. And in a batch: a backward pass keeps
#: what every layer computed.
TOKENS, BATCH_TOKENS = 16_384, 1024


class NoPredictionsError(InputError):
    """The model predicts nothing that the task asks for. The message says why."""


def check_predicts(model: PreTrainedModel, data: TaskData, untrained: Sequence[str] = ()) -> None:
    """Refuse a model without a trained head for the task; ``untrained`` names tensors initialised at random.

    Raises:
        NoPredictionsError: no head, a new one, another kind of head, or one with other labels.
    """
    if untrained:
        raise NoPredictionsError(f"new in this model: {', '.join(untrained)}")
    try:
        kind = KINDS.get(data.task.kind)
        kind.check_head(data.task, model)
        kind.match(data, model)
    except InputError as error:
        raise NoPredictionsError(str(error)) from None


@torch.inference_mode(False)
@torch.enable_grad()
def sensitivities(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, float]:
    """What a squared relative error of each target's output costs in predictions, as a multiple of the targets' mean.

    To second order a change d of an output y moves the predictions by a divergence of d^T F d / 2, F the Fisher
    information of y. For a relative error e whose parts (of the vector, and of one token and the next) are independent
    and equally large, the mean of this is e^2 times ||y||^2 tr(F) / (2 len(y)). tr(F) is the mean square of g, the
    gradient of predictions' log-likelihood under the model's own distribution. After the idea of FWSVD (Hsu et al.,
    2022, arXiv 2207.00112), which weighs rows of weights by Fisher information with the labels of the data.

    Args:
        model: dense, with a head for classes, spans or a number (:func:`check_predicts`). It is copied, to float32, and
            not changed.
        batches: of a task's rows, with an attention mask.
        progress: called with (what, done, total) after each batch.

    Returns:
        By the names of the targets. 0 where no prediction depends on an output.

    Raises:
        InputError: outputs or gradients that are not finite.
        NoPredictionsError: they depend on no target, such as those of a head of zeros.
    """
    model = copied(model).float().eval().requires_grad_(False)
    targets, predictions = find_targets(model), predictions_of(model)
    gradients, energies, rows = ({target.name: 0.0 for target in targets} for _ in range(3))
    tokens: RealTokens

    def hook(target: Target) -> Any:
        name = target.name

        def after(layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            if target.role == "embedding":
                tokens.see_words(arguments[0])
            if not output.requires_grad:  # the graph begins here; a clone may be changed in place
                output = output.detach().requires_grad_().clone()
            bias = getattr(layer, "bias", None)  # stays as it is, however wrong its matrix
            own = tokens.rows((output if bias is None else output - bias).detach())
            energies[name] += float(own.square().sum())
            rows[name] += len(own)

            def backward(gradient: Tensor) -> None:
                gradients[name] += float(tokens.rows(gradient).square().sum())

            output.register_hook(backward)
            return output

        return after

    for target in targets:
        for module in users(model, target):
            module.register_forward_hook(hook(target))
    chance = torch.Generator().manual_seed(0)
    for number, batch in enumerate(batches, start=1):
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        tokens, mask = RealTokens(inputs), inputs["attention_mask"].bool()
        with torch.autocast(model.device.type, enabled=False):
            outputs = model(**fitted(model, inputs), return_dict=True)
            distributions = predictions.distributions(outputs, mask)
            torch.stack([informative(logits, chance) for logits in distributions]).sum().backward()
        progress("weighing matrices", number, len(batches))
    costs = {}
    for target in targets:
        width = target.shape[1] if target.kind == "embedding" else target.shape[0]
        costs[target.name] = gradients[target.name] * energies[target.name] / max(rows[target.name], 1) / width
    mean = sum(costs.values()) / len(costs)
    if not math.isfinite(mean):
        raise InputError("calibration: outputs or gradients of the model hold NaN or infinity on the task's rows")
    if mean == 0:
        raise NoPredictionsError("they depend on none")
    return {name: cost / mean for name, cost in costs.items()}


def informative(logits: Tensor, chance: torch.Generator) -> Tensor:
    """A scalar whose gradient by the logits is random, with their Fisher information as its covariance: diag(p) - p p^T
    of classes, 1 of a number (unit variance). The same as drawing labels and taking the gradient of their
    log-likelihood, but a sure prediction does not wait for a rare draw.
    """
    noise = torch.randn(logits.shape, generator=chance).to(logits.device)
    if logits.shape[-1] == 1:
        return (logits * noise).sum()
    p = logits.detach().softmax(-1)
    return (logits * (p.sqrt() * noise - p * (p.sqrt() * noise).sum(-1, keepdim=True))).sum()
