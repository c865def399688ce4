"""How far predictions are from a teacher's or from the labels, as functions of plain tensors.

C is the number of classes. Every term is a sum over this micro-batch's valid items divided by ``count``, their number
over all devices and accumulated micro-batches of the step, so that sums over devices and micro-batches give the mean
over the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

#: The label of what is not to be predicted, as in transformers.
IGNORED = -100


def logits_loss(
    student: Tensor,
    teacher: Tensor,
    count: Tensor | float,
    *,
    form: str = "kl",
    temperature: float = 1.0,
    valid: Tensor | None = None,
) -> Tensor:
    """Distance of the predictions (..., C).

    Args:
        student, teacher: logits.
        count: number of valid predictions.
        form: ``kl``: temperature^2 x KL(teacher || student) of the softened distributions (Hinton et al., 2015), the
            mean over predictions; ``mse``: mean squared error of the logits. One class (regression) takes ``mse``.
        temperature: of ``kl``.
        valid: (...), which predictions count; default: all. Classes with a teacher logit of minus infinity are left
            out of both (padding in spans).
    """
    student, teacher = student.float(), teacher.float()
    if valid is not None:
        student, teacher = student[valid], teacher[valid]
    open_classes = teacher != -torch.inf
    if form == "mse" or student.shape[-1] == 1:
        # A closed class (minus infinity) must not enter as inf - inf.
        squares = torch.where(open_classes, student - teacher, 0.0).square()
        return (squares.sum(-1) / open_classes.sum(-1).clamp(min=1)).sum() / count
    # A large negative number has no probability either, and no undefined gradient.
    student, teacher = (logits.masked_fill(~open_classes, -1e9) for logits in (student, teacher))
    log_student = F.log_softmax(student / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) / count


def supervised_loss(
    logits: Tensor, labels: Tensor, count: Tensor | float, class_weights: Tensor | None = None
) -> Tensor:
    """Distance to the labels: squared error for float labels, cross-entropy for class numbers (-100 is left out).

    Args:
        logits: (..., C); for float labels C = 1 or the labels' own shape.
        labels: (...).
        count: number of labels that are not left out.
        class_weights: (C,), what a label of each class counts; default: 1.
    """
    if labels.is_floating_point():
        return (logits.float().reshape(labels.shape) - labels.float()).square().sum() / count
    flat = logits.float().reshape(-1, logits.shape[-1])
    weights = None if class_weights is None else class_weights.to(flat.device)
    return F.cross_entropy(flat, labels.reshape(-1), weights, ignore_index=IGNORED, reduction="sum") / count
