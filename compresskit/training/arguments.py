"""What transformers' Trainer takes and :class:`~compresskit.training.trainer.DistillationTrainer` does otherwise.

Losses, batches and their order are ours: arguments that say something else about them are refused, so that none is
ignored without a word. ``tests/test_trainer_arguments.py`` goes through all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import TrainingArguments

from compresskit.errors import InputError
from compresskit.internals.transformers import checkpointing_of, set_checkpointing
from compresskit.training.batches import MaskingCollator

_BATCHES = "batches hold sequences of similar length, in an order of (seed, epoch)"
_LOSSES = "the loss is that of the stage"
#: Argument -> the values that change nothing here, and why others are refused.
_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0.0,), f"{_LOSSES}, and its labels are not smoothed"),
    "auto_find_batch_size": ((False,), "every step takes the same sequences; lower per_device_train_batch_size"),
    "train_sampling_strategy": (("random", "group_by_length"), _BATCHES),
    "parallelism_config": ((None,), "models are not cut into pieces"),
    "use_liger_kernel": ((False,), "its kernels replace losses and layers of decoders"),
    "deepspeed": ((None,), "it is not tested; take accelerate's FSDP"),
}
#: The same for what ``accelerator_config`` says of batches, which every process makes by itself.
_ACCELERATOR: dict[str, Any] = {
    "split_batches": False,
    "dispatch_batches": None,
    "even_batches": True,
    "use_seedable_sampler": True,
}
_CHECKPOINTING = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
_REENTRANT = "use_reentrant"
_LOSES = "reentrant checkpointing loses the gradients of attention maps and hidden states"


def check_arguments(args: TrainingArguments, targets: tuple[str, ...], rest: Mapping[str, Any]) -> None:
    """Refuse arguments that would have no effect.

    Args:
        args: of the run.
        targets: the columns of a batch that hold what is to be predicted.
        rest: further arguments of the constructor.

    Raises:
        InputError: names the argument and says what decides in its place.
    """
    for name, (fine, reason) in _FIXED.items():
        if (value := getattr(args, name, fine[0])) not in fine:
            raise InputError(f"{name}={value!r}: is not supported: {reason}")
    if args.label_names is not None and tuple(args.label_names) != targets:
        raise InputError(f"label_names={args.label_names!r}: is not supported: the model's are {list(targets)}")
    accelerator: Any = args.accelerator_config
    for name, default in _ACCELERATOR.items():
        if (value := getattr(accelerator, name, default)) != default:
            raise InputError(f"accelerator_config: {name}={value!r}: is not supported: {_BATCHES}")
    if args.world_size > 1 and not args.average_tokens_across_devices:
        what = "terms are means over all devices"
        raise InputError(f"average_tokens_across_devices=False: is not supported: {what}")
    if args.fp16 and args.device.type == "cpu":
        raise InputError("fp16=True: is not supported: accelerate computes in float32 on a CPU; take bf16")
    if args.n_gpu > 1:
        raise InputError(f"{args.n_gpu} GPUs in one process are not supported: start one process a GPU (torchrun)")
    for name, reason in (
        ("model_init", "give the model, which is trained in place"),
        ("compute_loss_func", _LOSSES),
    ):
        if rest.get(name) is not None:
            raise InputError(f"{name}: is not supported: {reason}")


def check_together(together: int, args: TrainingArguments, rows: Any = (), held_out: Any = None) -> None:
    """Refuse batches and data sets that would part rows which stay together. Raises InputError."""
    counts = {
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "train_dataset: its number of rows": len(rows),
    }
    if held_out is not None:
        sets = held_out.values() if isinstance(held_out, dict) else [held_out]
        counts["per_device_eval_batch_size"] = args.per_device_eval_batch_size
        counts["eval_dataset: its number of rows"] = next((len(each) for each in sets if len(each) % together), 0)
    for name, count in counts.items():
        if count % together:
            raise InputError(f"{name} ({count}): must be a multiple of {together}, for so many rows stay together")


def check_workers(args: TrainingArguments, collator: Any) -> None:
    """Refuse workers that would keep the masks of the first epoch. Raises InputError."""
    if args.dataloader_persistent_workers and isinstance(collator, MaskingCollator):
        raise InputError(
            "dataloader_persistent_workers=True: is not supported where words are masked anew in every epoch: workers "
            "would keep the masks of the first one"
        )


def without_reentrance(args: TrainingArguments) -> None:
    """Let checkpointing that ``args`` ask for keep gradients. Raises InputError where they ask for the other kind."""
    for name in _CHECKPOINTING:
        given = getattr(args, name, None)
        if given and given.get(_REENTRANT):
            raise InputError(f"{name}: {_REENTRANT}=True is not supported: {_LOSES}; leave it out")
        if given:  # torch takes the other kind where only other keys are given
            setattr(args, name, {**given, _REENTRANT: False})


def check_checkpointing(model: nn.Module) -> None:
    """The same for a model that was switched before.

    Raises:
        InputError: it was switched to reentrant checkpointing.
    """
    for module, found in _checkpointed(model):
        reentrant = getattr(found, "keywords", {}).get(_REENTRANT)
        if reentrant:
            raise InputError(
                f"{type(model).__name__}: {_LOSES}; switch it with "
                'gradient_checkpointing_enable({"use_reentrant": False})'
            )
        if reentrant is None and getattr(found, "func", found).__module__.startswith(("torch.", "transformers.")):
            set_checkpointing(module, functools.partial(found, use_reentrant=False))


@contextmanager
def checkpointing_kept(model: Any) -> Iterator[None]:
    """Leave the model checkpointed, or not, as it was."""
    before = [(module, module.gradient_checkpointing) for module in model.modules() if _can(module)]
    try:
        yield
    finally:
        for module, was in before:
            module.gradient_checkpointing = was


def _can(module: Any) -> bool:
    return hasattr(module, "gradient_checkpointing")


def _checkpointed(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Modules that are checkpointed, with the function that does it."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            yield module, checkpointing_of(module)
