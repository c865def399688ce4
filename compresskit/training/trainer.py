"""The Trainer behind ``finetune`` and ``distill``: own losses, batches by length, checkpoints whole or not there."""

from __future__ import annotations

import copy
import inspect
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from compresskit.errors import InputError, WorkError
from compresskit.model import identity
from compresskit.model.adapters import check_given
from compresskit.model.inputs import fitted
from compresskit.model.kept import twin
from compresskit.model.tokenizer import padding_for
from compresskit.planning.stage import Stage
from compresskit.tasks.predictions import Predictions, count_items
from compresskit.tasks.registry import predictions_of
from compresskit.training.alignment import WordsOfBatch, is_by_words, pair_columns, teacher_inputs, words_of
from compresskit.training.arguments import (
    check_arguments,
    check_checkpointing,
    check_together,
    check_workers,
    without_reentrance,
)
from compresskit.training.batches import LengthBatchSampler, MaskingCollator, is_masking
from compresskit.training.checkpoints import PART, put_in_place, state_of
from compresskit.training.early_stopping import EarlyStopping
from compresskit.training.meter import Meter
from compresskit.training.objective import Objective, check_fit
from compresskit.training.sentences import TEXT, VectorsOfBatch
from compresskit.training.targets import checked_rows, numbered
from compresskit.training.taught import ROW, TaughtRows, teach


class DistillationTrainer(Trainer):
    """transformers' Trainer with the distillation losses; without a teacher it fine-tunes.

    Everything of the Trainer works: accelerate, DDP, FSDP, bf16, accumulation, callbacks, resuming, evaluation with
    ``eval_dataset`` (whose loss is the stage's, and whose predictions are the logits). Arguments that would have no
    effect on our losses and batches are refused (:mod:`compresskit.training.arguments`).

    Args:
        model: the student. It is trained in place, and where attention is compared it stays with the attention
            implementation that shows it; checkpointing that keeps no gradients is refused.
        teacher: a model of the same family, with as many layers or more, and as wide unless there are ``projections``;
            None for supervised training alone. It stays as it is: a twin that shares its weights computes. Its
            vocabulary may be another one where the data set has its own tokens too
            (:func:`compresskit.training.alignment.paired`).
        stage: weights of the loss terms and their form; other fields are the caller's to put into ``args``.
        args: as for Trainer. ``per_device_train_batch_size`` x devices x accumulation sequences make one step.
        train_dataset: a ``datasets.Dataset`` with ``input_ids`` (and ``labels`` for the supervised loss: the student's
            class numbers, or names of its classes).
        explicit_losses: terms that are refused where they are impossible, instead of dropped.
        vectors: finds the sentence vectors of a batch, for the losses that compare them; the data set then names the
            text of each row (``text_number``).
        predictions: what the head predicts and how that is learnt. Default: what the head says.
        projections: of the student's hidden states to the teacher's width, one for each, of a student of another hidden
            size (:func:`compresskit.training.projections.of_hidden_states`). They are trained where they are parts of
            the model (:func:`compresskit.training.projections.beside`).
        together: so many rows after each other stay in one batch. Default: 1.
        rest: passed on to Trainer; ``data_collator`` must pad and give an ``attention_mask`` (DataCollatorWithPadding,
            the default where a tokenizer is given as ``processing_class``). A copy of it pads where the model may be
            padded, whatever the side of its tokenizer.

    Raises:
        InputError: teacher and student do not fit; a data set without ``input_ids``; labels that the head cannot learn;
            no loss term is possible; an argument that would have no effect.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
        *,
        stage: Stage,
        args: TrainingArguments,
        train_dataset: Any,
        explicit_losses: Sequence[str] = (),
        vectors: VectorsOfBatch | None = None,
        predictions: Predictions | None = None,
        projections: nn.ModuleList | None = None,
        together: int = 1,
        callbacks: Sequence[TrainerCallback] = (),
        **rest: Any,
    ) -> None:
        for given, what in ((model, "model"), *([(teacher, "teacher")] if teacher is not None else [])):
            check_given(given, what)
        train_dataset = _own_rows(train_dataset, model)
        held_out = rest.get("eval_dataset")
        if isinstance(held_out, dict):
            rest["eval_dataset"] = {split: _own_rows(rows, model) for split, rows in held_out.items()}
        elif held_out is not None:
            rest["eval_dataset"] = _own_rows(held_out, model)
        if teacher is not None:
            by_words = is_by_words(train_dataset.column_names)
            check_fit(model, teacher, by_words=by_words, projected=projections is not None)
        check_arguments(args, (predictions or predictions_of(model)).targets, rest)
        check_checkpointing(model)
        args = copy.copy(args)  # the caller's stay as they are
        without_reentrance(args)
        self.every_column = not args.remove_unused_columns
        args.remove_unused_columns = False  # columns are chosen below
        args.logging_nan_inf_filter = False  # a loss that is not finite stops the run
        args.train_sampling_strategy = "random"  # by length Trainer would reorder what it evaluates too
        super().__init__(model=model, args=args, train_dataset=train_dataset, callbacks=list(callbacks), **rest)
        self.data_collator = _padding(self.data_collator, model)
        self.add_callback(_SetEpoch(self))
        # Says that compute_loss divides by the counts of the whole step, so that Trainer must not divide again.
        self.model_accepts_loss_kwargs = True
        check_workers(args, self.data_collator)
        masked = is_masking(self.data_collator)
        columns = train_dataset.column_names
        own = None if teacher is None else twin(teacher).eval()
        _check_stage(stage, predictions, callbacks, together)
        check_together(together, args, train_dataset, rest.get("eval_dataset"))
        self.vectors, self.together = vectors, together
        self.loss = Objective(
            model,
            own,
            stage,
            columns,
            masked=masked,
            sentences=vectors is not None,
            explicit=explicit_losses,
            predictions=predictions,
            projections=projections,
        )
        self.teacher: Any = None
        if own is not None and self.loss.needs_teacher:
            self.teacher = own.to(args.device)
        self.taught: TaughtRows | None = None
        self.signature = set(inspect.signature(model.forward).parameters)
        self.meter = Meter()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches by length, of this process's share."""
        data: Any = self.train_dataset
        named = self.args.length_column_name
        lengths = data[named] if named in data.column_names else [len(ids) for ids in data["input_ids"]]
        columns = self._columns(data)
        if self.taught is not None:
            data, columns = data.add_column(ROW, range(len(data))), [*columns, ROW]
        self.sampler = LengthBatchSampler(
            lengths,
            self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps,
            world=self.args.world_size,
            rank=self.args.process_index,
            accumulation=self.args.gradient_accumulation_steps,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            drop_last=self.args.dataloader_drop_last,
            together=self.together,
        )
        return DataLoader(
            data.select_columns(columns),
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            in_order=self.args.dataloader_in_order,
        )

    def _columns(self, data: Any) -> list[str]:
        """The columns of a batch: those that a model or a loss reads, unless the caller wants all."""
        read = {*self.signature, *self.loss.predictions.targets, *([TEXT] if self.vectors is not None else [])}
        read |= {*pair_columns(data.column_names)}
        return [name for name in data.column_names if self.every_column or name in read]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As Trainer's, with the columns that are read."""
        held: Any = self.eval_dataset
        model: Any = self.model
        if isinstance(eval_dataset, str) or eval_dataset is None:
            chosen = held[eval_dataset] if isinstance(eval_dataset, str) else held
        else:
            chosen = _own_rows(eval_dataset, model)
        if chosen is None:
            raise InputError("evaluation needs an eval_dataset")
        found = set(chosen.column_names)
        targets = self.loss.predictions.targets
        if "supervised" in self.loss.weights and not self.loss.masked and not found.issuperset(targets):
            raise InputError(f"eval_dataset: has no column {targets[0]}, which the loss supervised reads")
        if self.loss.by_words and not is_by_words(found):
            raise InputError("eval_dataset: lacks the teacher's own tokens, which the rows of the training have")
        check_together(self.together, self.args, held_out=chosen)
        return super().get_eval_dataloader(chosen.select_columns(self._columns(chosen)))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Sequence[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Loss, logits and targets of a batch."""
        moved: dict[str, Any] = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, moved, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        predictions = self.loss.predictions
        names = [name for name in predictions.outputs if name in outputs and name not in (ignore_keys or ())]
        logits = tuple(outputs[name].detach() for name in names)
        targets = tuple(moved[name] for name in predictions.targets if name in moved)
        return loss.detach(), _alone(logits), _alone(targets)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Valid tokens, (query, key) pairs, sequences and labels of the whole step, over all devices."""
        if not batch_samples:
            return None
        counts = torch.stack([self._count(batch) for batch in batch_samples]).sum(0).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        return counts

    def _count(self, batch: Mapping[str, Tensor]) -> Tensor:
        if "attention_mask" not in batch:
            what = "its batches have no attention_mask; give one that pads, such as DataCollatorWithPadding(tokenizer)"
            raise InputError(f"data_collator {type(self.data_collator).__name__}: {what}")
        return count_items(batch, self.loss.predictions, words_of(batch))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The weighted sum of the terms. Each term is kept for the log."""
        counts = num_items_in_batch if num_items_in_batch is not None else self._count(inputs).to(self.args.device)
        targets = {name: inputs[name] for name in self.loss.predictions.targets if name in inputs}
        features = {key: value for key, value in inputs.items() if key in self.signature and key not in targets}
        taught: Any = None
        if self.taught is not None and ROW in inputs:
            taught = self.taught.batch(inputs[ROW].tolist(), features["input_ids"].shape[1])
        elif self.teacher is not None:
            taught = self._teach(teacher_inputs(inputs) or features)
        outputs = model(**fitted(self.accelerator.unwrap_model(model), features), **self.loss.wanted)
        vectors = None if self.vectors is None else self.vectors.pair(outputs, taught, inputs)
        words = WordsOfBatch.of(inputs)
        terms = self.loss.terms(outputs, taught, inputs["attention_mask"], targets, counts, vectors, words)
        loss = self.loss.total(terms)
        if not self._everywhere(torch.isfinite(loss)):
            batch = self.state.global_step % self.sampler.steps + 1 if model.training else 0
            broken = ", ".join(f"{name} {term.item():g}" for name, term in terms.items())
            raise WorkError(
                f"the loss is not finite at step {self.state.global_step + 1} (batch {batch} of its epoch, "
                f"{' x '.join(map(str, features['input_ids'].shape))} tokens: {broken}): lower the learning rate; "
                "the last checkpoint is kept"
            )
        if model.training:
            self.meter.add(loss, terms, counts[0] / self.args.gradient_accumulation_steps)
            # DDP takes the mean of the gradients over processes; the terms are shares of one sum.
            loss = loss * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def _teach(self, features: Mapping[str, Tensor]) -> Any:
        # accelerate puts only the trained model's forward under autocast.
        with torch.inference_mode(), self.accelerator.autocast():
            return self.teacher(**fitted(self.teacher, features), **self.loss.wanted)

    def keep_teacher_outputs(self, folder: Path, progress: Callable[[str, int, int], None] | None = None) -> str | None:
        """Compute the teacher's outputs once for all rows, or read those of an earlier run, instead of at every step.

        Args:
            folder: for the outputs; hidden states and attention in bf16 under bf16 autocast.
            progress: ``(what, done, total)``.

        Returns:
            Why nothing is kept; None where it is.
        """
        data: Any = self.train_dataset
        tokenizer: Any = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if (reason := self._cannot_be_kept()) is not None:
            return reason
        data = data if "length" in data.column_names else data.add_column("length", list(map(len, data["input_ids"])))
        predictions = self.loss.predictions
        inputs = [n for n in data.column_names if n in self.signature and n not in predictions.targets]

        def collate(rows: list[dict[str, Any]]) -> Any:
            return self.data_collator([{name: row[name] for name in inputs} for row in rows])

        content = [identity.of_model(self.teacher), identity.of_tokenizer(tokenizer)]
        kind = [self.loss.wanted, self.loss.attention_maps, *content, torch.__version__, transformers.__version__]
        data = data.select_columns([*inputs, "length"])
        half = bool(self.args.bf16)
        found = teach(self._teach, data, collate, folder, kind, predictions=predictions, half=half, progress=progress)
        if isinstance(found, str):
            return found
        self.taught = found
        return None

    def _cannot_be_kept(self) -> str | None:
        """Why outputs of the teacher are not kept in files; None where they can be."""
        reasons = (
            (self.teacher is None, "no loss reads the teacher"),
            (self.loss.by_words, "it has another vocabulary than the student"),
            (self.args.world_size > 1, "one of several processes would keep the others waiting"),
            (self.args.device.type != "cpu", "a GPU computes them faster than files are read"),
            (is_masking(self.data_collator), "other words are masked in every epoch"),
        )
        return next((reason for holds, reason in reasons if holds), None)

    def _everywhere(self, holds: Tensor) -> bool:
        """Whether something holds in every process, so that all of them stop together."""
        if self.args.world_size > 1:
            holds = self.accelerator.gather(holds[None]).all()
        return bool(holds)

    def load_finished(self, checkpoint: Path) -> None:
        """Take over the last checkpoint of a run that ended: ``train`` would add a step."""
        self.load_weights(checkpoint)
        self.state = state_of(checkpoint)

    def load_weights(self, checkpoint: Path) -> None:
        """Take over the weights of a checkpoint alone."""
        self._load_from_checkpoint(str(checkpoint))

    def check_weights(self) -> None:
        """Raise WorkError unless every weight is finite: a loss shows it one step too late."""
        model: Any = self.model
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise WorkError(
                    f"{name} is not finite after step {self.state.global_step}: lower the learning rate; "
                    "the last checkpoint is kept"
                )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each term since the last log, seconds, and real tokens per second over all devices."""
        if "loss" in logs and self.meter.batches:
            steps = self.meter.batches / self.args.gradient_accumulation_steps
            logs |= self.meter.read(steps, self.accelerator)
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return os.path.join(folder, PART) if getattr(self, "_saving", False) else folder

    def train(self, *arguments: Any, **options: Any) -> Any:
        """As Trainer's. Raises InputError where the model was switched to checkpointing that keeps no gradients."""
        check_checkpointing(self.model)  # type: ignore[arg-type]
        return super().train(*arguments, **options)

    def _name_best(self, final: Path) -> None:
        """Let the state name the best checkpoint where it will lie, in the one that is being written too."""
        if self.state.best_global_step:
            name = f"checkpoint-{self.state.best_global_step}"
            if (final / name).is_dir() or (final / PART / name).is_dir():
                self.state.best_model_checkpoint = str(final / name)
            state = final / PART / f"checkpoint-{self.state.global_step}" / TRAINER_STATE_NAME
            if self.args.should_save and state.is_file():
                self.state.save_to_json(str(state))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer, but written aside and renamed, so that a checkpoint folder is always complete. Raises WorkError
        instead of saving weights that are not finite.
        """
        self.check_weights()
        final = Path(str(self.args.output_dir))
        self._saving = True
        try:
            if self.is_world_process_zero():
                shutil.rmtree(final / PART, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self._name_best(final)
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            put_in_place(final, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()


def _check_stage(
    stage: Stage, predictions: Predictions | None, callbacks: Sequence[TrainerCallback], together: int
) -> None:
    """Refuse what a stage asks for that only the commands can do, where the caller does not. Raises InputError."""
    if stage.margins and together != 2:
        raise InputError("logits loss margin: compares rows two by two, which must stay in one batch: give together=2")
    if stage.class_weights is not None and getattr(predictions, "class_weights", None) is None:
        raise InputError(
            "class_weights of the stage: are found in the rows of a task (finetune and distill with a task); here "
            "give predictions that weigh, predictions_of(model).weighing(weights) in compresskit.tasks.registry"
        )
    if stage.early_stopping is not None and not any(isinstance(one, EarlyStopping) for one in callbacks):
        raise InputError(
            "early_stopping of the stage: goes by scores of a task's dev rows (finetune and distill with a task); here "
            "leave it out, and give an eval_dataset with transformers' EarlyStoppingCallback"
        )


def _own_rows(dataset: Any, model: PreTrainedModel) -> Any:
    """The rows with labels as the head numbers them."""
    return numbered(checked_rows(dataset), model)


def _padding(collator: Any, model: PreTrainedModel) -> Any:
    """The collator, or a copy of it whose tokenizer pads where the model may be padded."""
    tokenizer = getattr(collator, "tokenizer", None)
    fitting = None if tokenizer is None else padding_for(model, tokenizer)
    asked = ("padding_side", "model_input_names")
    if fitting is None or all(getattr(tokenizer, name, None) in (None, getattr(fitting, name)) for name in asked):
        return collator
    changed = copy.copy(collator)
    changed.tokenizer = fitting
    return changed


def _alone(values: tuple[Any, ...]) -> Any:
    """Several values as they are, one by itself, None for none."""
    return values if len(values) > 1 else next(iter(values), None)


class _SetEpoch(TrainerCallback):
    """Tells sampler and masks the epoch. Trainer itself does not reach them after a resume."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """The clock starts here, not when the Trainer was made."""
        self.trainer.meter.reset()

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Called before the first batch is drawn."""
        sampler = self.trainer.sampler
        epoch = state.global_step // sampler.steps
        sampler.set_epoch(epoch)
        if isinstance(self.trainer.data_collator, MaskingCollator):
            self.trainer.data_collator.epoch = epoch
