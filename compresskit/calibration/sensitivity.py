"""How much a model's predictions depend on each of its matrices, from a backward pass over a task's rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.model.targets import find_targets

#: Tokens that are read: one number per matrix needs fewer than a second moment.
TOKENS = 16_384


def predicts(model: PreTrainedModel) -> bool:
    """Whether the model has a head whose predictions can be told apart."""
    return model.base_model is not model and not type(model).__name__.endswith("ForPreTraining")


def sensitivities(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, float]:
    """What a squared relative error of each target's output costs in predictions, as a multiple of the targets' mean.

    A small change d of an output y moves the predictions by a divergence of d^T F d / 2, F the Fisher information. For
    changes that are spread evenly over the numbers of y, and a relative error e, this is e^2 times
    ||y||^2 ||g||^2 / (2 len(y)), with g the gradient of the log-likelihood of a prediction that is drawn from the
    model's own distribution. Fisher information as a weight of factors: FWSVD (Hsu et al., 2022, arXiv 2207.00112).

    Args:
        model: dense, with a head (:func:`predicts`); its weights and mode are left as they are.
        batches: of a task's rows, as :func:`~compresskit.calibration.statistics.calibrate` reads them.
        progress: called with (what, done, total) after each batch.

    Returns:
        By the names of the targets. 0 for a target on which no prediction depends.
    """
    targets = find_targets(model)
    gradients, energies, rows = ({target.name: 0.0 for target in targets} for _ in range(3))
    mask = torch.ones(0, dtype=torch.bool)

    def real(values: Tensor) -> Tensor:
        values = values.detach()
        return (values[mask] if values.shape[:-1] == mask.shape else values.flatten(0, -2)).float()

    def hook(name: str) -> Any:
        def after(layer: nn.Module, _: Any, output: Tensor) -> None:
            if not output.requires_grad:  # a look-up, where the graph begins
                output.requires_grad_()
            bias = getattr(layer, "bias", None)
            own = real(output if bias is None else output - bias)
            energies[name] += float(own.square().sum())
            rows[name] += len(own)

            def backward(gradient: Tensor) -> None:
                gradients[name] += float(real(gradient).square().sum())

            output.register_hook(backward)

        return after

    training, chance = model.training, torch.Generator().manual_seed(0)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [model.get_submodule(target.name).register_forward_hook(hook(target.name)) for target in targets]
    model.eval()
    model.requires_grad_(False)
    try:
        for number, batch in enumerate(batches, start=1):
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            mask = inputs["attention_mask"].bool()
            with torch.enable_grad(), torch.autocast(model.device.type, enabled=False):
                _log_likelihood(model(**inputs), mask, chance).backward()
            progress("weighing", number, len(batches))
    finally:
        for handle in handles:
            handle.remove()
        for parameter in learning:
            parameter.requires_grad_()
        model.train(training)
    costs = {}
    for target in targets:
        width = target.shape[1] if target.kind == "embedding" else target.shape[0]
        costs[target.name] = gradients[target.name] * energies[target.name] / max(rows[target.name], 1) / width
    mean = sum(costs.values()) / len(costs)
    return {name: cost / mean for name, cost in costs.items()} if mean > 0 else {}


def _log_likelihood(outputs: Any, mask: Tensor, chance: torch.Generator) -> Tensor:
    """Of predictions drawn from the model's own distribution: classes, positions of a span, numbers (unit variance)."""
    if "start_logits" in outputs:
        sides = (outputs["start_logits"], outputs["end_logits"])
        return torch.stack([_drawn(side.float().masked_fill(~mask, -1e9), chance) for side in sides]).sum()
    logits = outputs["logits"].float()
    logits = logits[mask] if logits.shape[:-1] == mask.shape else logits
    if logits.shape[-1] == 1:
        return (logits * torch.randn(logits.shape, generator=chance).to(logits.device)).sum()
    return _drawn(logits, chance)


def _drawn(logits: Tensor, chance: torch.Generator) -> Tensor:
    likelihood = logits.log_softmax(-1)
    drawn = torch.multinomial(likelihood.detach().exp().cpu(), 1, generator=chance).to(logits.device)
    return likelihood.gather(-1, drawn).sum()
