"""One training run: from a data set and settings to the Trainer."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from compresskit.errors import InputError, one_line
from compresskit.planning.stage import Stage
from compresskit.training.batches import LengthBatchSampler
from compresskit.training.evaluation import Progress
from compresskit.training.settings import Options
from compresskit.training.trainer import DistillationTrainer

_DROPOUT_NUMBERS = ("attention_dropout", "attention_probs_dropout_prob", "dropout_prob")


def train(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    dataset: Dataset,
    collator: Any,
    stage: Stage,
    options: Options,
    folder: Path,
    *,
    checkpoints: bool = True,
    resume_from: Path | None = None,
    explicit_losses: Sequence[str] = (),
    callbacks: Sequence[TrainerCallback] = (),
    teacher_outputs: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train ``model`` in place.

    Args:
        folder: where checkpoints go.
        checkpoints: whether to write any.
        explicit_losses: terms that the user asked for by name: refused where they are impossible, not dropped.
        teacher_outputs: folder that keeps the teacher's outputs for every row, see
            :meth:`DistillationTrainer.keep_teacher_outputs`.
        progress: of computing these.

    Returns:
        What happened, as plain data: steps, epochs, tokens, seconds, dropped losses and the log.

    Raises:
        InputError: the batch size cannot be shared out; models and losses that do not fit.
        WorkError: a loss that is not finite.
    """
    parts = micro_batches(stage, options)
    lengths = dataset["length"] if "length" in dataset.column_names else [len(ids) for ids in dataset["input_ids"]]
    sampler = LengthBatchSampler(lengths, stage.batch_size, world=parts, seed=options.seed)
    if not sampler.steps:
        raise InputError(f"data set: {len(lengths)} sequences are too few for {parts} processes and micro-batches")
    if options.max_tokens is not None:
        steps = sampler.steps_for_tokens(options.max_tokens)
    else:
        steps = options.max_steps or math.ceil(stage.epochs * sampler.steps)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=stage.batch_size // parts,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=stage.learning_rate,
        weight_decay=stage.weight_decay,
        warmup_steps=math.ceil(stage.warmup * steps),
        lr_scheduler_type="linear",
        max_steps=steps,
        seed=options.seed,
        bf16=options.precision == "bf16",
        use_cpu=options.use_cpu,
        logging_steps=max(1, min(50, steps // 100)),
        save_strategy="steps" if checkpoints else "no",
        save_steps=options.save_every or max(100, min(500, math.ceil(steps / 10))),
        save_total_limit=1,
        dataloader_pin_memory=not options.use_cpu,
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs take torchrun: nn.DataParallel breaks tied heads
    trainer = DistillationTrainer(
        model,
        teacher,
        stage=stage,
        explicit_losses=explicit_losses,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=callbacks,
    )
    if arguments.bf16 and options.use_cpu and trainer.loss.attention_maps is None:
        # The backward of torch's fused attention is slow in bf16 on CPUs (figures in docs/algorithms.md).
        model.set_attn_implementation("eager")
    with dropout(model, stage.dropout), own_forward(model):
        if resume_from is not None and resume_from.name == f"checkpoint-{steps}":
            trainer.load_finished(resume_from)
        else:
            if teacher_outputs is not None:
                trainer.keep_teacher_outputs(teacher_outputs, progress)
            try:
                trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
            except pickle.UnpicklingError as error:
                raise InputError(
                    f"{resume_from}: refused, it holds more than plain tensors: {one_line(error)}; "
                    "--overwrite starts the run again"
                ) from None
            trainer.check_weights()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    # From the log, so that a resumed run counts the time before it was stopped too.
    seconds = sum(entry["seconds"] for entry in log) * steps / log[-1]["step"]
    return {
        "steps": steps,
        "epochs": steps / sampler.steps,
        "tokens": tokens_seen(sampler, steps),
        "seconds": seconds,
        "losses": trainer.loss.weights,
        "losses_dropped": list(trainer.loss.dropped.values()),
        "attention_maps": trainer.loss.attention_maps,
        "log": log,
    }


def micro_batches(stage: Stage, options: Options) -> int:
    """Into how many micro-batches a step is cut: processes x accumulation. Raises InputError if it cannot be."""
    processes = PartialState().num_processes
    parts = processes * options.accumulation
    if stage.batch_size % parts:
        raise InputError(
            f"batch size {stage.batch_size}: must be a multiple of {parts} "
            f"({processes} processes x {options.accumulation} accumulated micro-batches)"
        )
    return parts


def tokens_seen(sampler: LengthBatchSampler, steps: int) -> int:
    """Real tokens in the first ``steps`` optimizer steps."""
    seen, epoch = 0, 0
    while steps > 0:
        batches = sampler.step_batches(epoch)[:steps]
        seen += sum(int(sampler.lengths[batch].sum()) for batch in batches)
        steps -= len(batches)
        epoch += 1
    return seen


@contextmanager
def dropout(model: PreTrainedModel, probability: float | Literal["keep"]) -> Iterator[None]:
    """Every dropout of the model at ``probability`` for a while; ``keep`` changes nothing."""
    changed: list[tuple[Any, str, float]] = []
    for module in model.modules() if probability != "keep" else ():
        # Attention modules keep the probability as a number.
        names = ("p",) if isinstance(module, torch.nn.Dropout) else _DROPOUT_NUMBERS
        changed += [(module, name, getattr(module, name)) for name in names if _is_number(module, name)]
    for module, name, _ in changed:
        setattr(module, name, probability)
    try:
        yield
    finally:
        for module, name, before in changed:
            setattr(module, name, before)


@contextmanager
def own_forward(model: PreTrainedModel) -> Iterator[None]:
    """Take accelerate's autocast off the model's forward in the end: the model would go on computing in bf16."""
    before = model.__dict__.get("forward")
    try:
        yield
    finally:
        for name in ("forward", "_original_forward"):
            model.__dict__.pop(name, None)
        if before is not None:
            model.__dict__["forward"] = before


def _is_number(module: Any, name: str) -> bool:
    return isinstance(getattr(module, name, None), float | int)
