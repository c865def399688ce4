"""One stage of training: prepare the data, compare, train, compare again, write."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    TrainerCallback,
    set_seed,
)

from compresskit.data import corpus as corpora
from compresskit.errors import InputError
from compresskit.folders import training as reports
from compresskit.model import checkpoint as checkpoints
from compresskit.model import output as outputs
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.positions import check_length, positions
from compresskit.planning.stage import Stage
from compresskit.tasks.encoding import encode
from compresskit.tasks.labels import check_head, map_labels
from compresskit.tasks.task import TRAIN, Task, TaskData
from compresskit.training.attention import attention_kept
from compresskit.training.batches import MaskingCollator
from compresskit.training.evaluation import Progress, held_out_losses, score
from compresskit.training.objective import TARGETS, Objective
from compresskit.training.run import micro_batches, train
from compresskit.training.settings import Options
from compresskit.training.working_folder import WorkingFolder

#: Sequences of a general text that are held out, to compare the student before and after.
HELD_OUT = 64
#: Tokens per sequence where neither settings nor task say.
DEFAULT_LENGTH = 128


@dataclass
class Result:
    """What a run made.

    Attributes:
        model: the trained model, in eval mode, on the device it was trained on.
        record: what ``training.json`` holds of this stage.
        folder: where it was written; None if nothing was.
        notes: what the user should know.
    """

    model: PreTrainedModel
    record: dict[str, Any]
    folder: Path | None = None
    notes: tuple[str, ...] = field(default=())


@dataclass
class Job:
    """Everything a stage needs but its data."""

    name: str
    student: Checkpoint
    teacher: Checkpoint | None
    tokenizer: Any
    stage: Stage
    options: Options
    target: Path | None
    overwrite: bool
    resume: bool
    progress: Progress | None
    callbacks: Sequence[TrainerCallback]
    explicit_losses: tuple[str, ...] = ()
    teacher_outputs: Path | None = None
    work: WorkingFolder | None = field(default=None, init=False)

    def on_task(self, examples: TaskData) -> Result:
        """Train on the task's ``train`` rows; score on the others. Raises InputError, WorkError."""
        task = examples.task
        length = sequence_length(self.stage.max_length, task, self.student, self.teacher)
        notes = list(examples.notes)
        numbers = None
        for checkpoint in (self.teacher, self.student):
            if checkpoint is not None:
                check_head(task, checkpoint.model)
        if task.kind == "classification":
            labels = map_labels(task, examples.labels, self.student.model)
            numbers = labels.single
            notes += [labels.note] if labels.note else []
        encoded = encode(task, examples.splits[TRAIN], self.tokenizer, length, numbers)
        cut = sum(size >= length for size in encoded["length"])
        if cut and task.kind != "spans":
            notes.append(f"{cut} of {len(encoded)} training texts reach {length} tokens; what is longer was cut there")

        def measure(model: PreTrainedModel) -> Any:
            return score(model, self.tokenizer, examples, length, progress=self.progress)

        data = {"task": task.model_dump(mode="json", exclude_defaults=True), "splits": examples.record()}
        collator = DataCollatorWithPadding(self.tokenizer)
        return self._run(encoded, collator, length, data, measure, notes, task.primary)

    def on_text(self, corpus: corpora.Corpus) -> Result:
        """Train on plain text. Raises InputError, WorkError."""
        length = sequence_length(self.stage.max_length, None, self.student, self.teacher)
        limit = self.options.max_tokens
        if self.options.max_steps is not None:
            limit = self.options.max_steps * self.stage.batch_size * length
        # Some more than is trained on: the held-out part.
        tokens = limit + 2 * HELD_OUT * length if limit else None
        return self.on_dataset(corpora.sequences(corpus, self.tokenizer, length, tokens), corpus.record())

    def on_dataset(self, dataset: Dataset, data: dict[str, Any]) -> Result:
        """Train on token sequences; the loss terms on held-out ones are the score. Raises InputError, WorkError."""
        if "input_ids" not in dataset.column_names:
            columns = ", ".join(dataset.column_names) or "none"
            raise InputError(f"data set: has no column 'input_ids'; tokenise it first (its columns: {columns})")
        if "label" in dataset.column_names and "labels" not in dataset.column_names:
            dataset = dataset.rename_column("label", "labels")
        used = [name for name in (*self.tokenizer.model_input_names, *TARGETS) if name in dataset.column_names]
        dataset = dataset.select_columns(used)
        dataset = dataset.add_column("length", [len(ids) for ids in dataset["input_ids"]])
        if len(dataset) < 2:
            raise InputError(f"{data['source']}: {len(dataset)} sequences are too few; two are the least")
        length, longest = max((length, row) for row, length in enumerate(dataset["length"]))
        limit = min(positions(each.model) or length for each in (self.student, self.teacher) if each is not None)
        if length > limit:
            raise InputError(f"{data['source']}: row {longest} has {length} tokens, the models take {limit}: cut it")
        embedding: Any = self.student.model.get_input_embeddings()
        if (token := max(map(max, dataset["input_ids"]))) >= embedding.num_embeddings:
            raise InputError(f"{data['source']}: token {token} is beyond the vocabulary of {embedding.num_embeddings}")
        if self.stage.max_length is not None and length > self.stage.max_length:
            raise InputError(f"{data['source']}: holds {length} tokens in a row, max length is {self.stage.max_length}")
        order = np.random.default_rng(0).permutation(len(dataset))
        count = min(HELD_OUT, max(1, len(dataset) // 10))
        held_out, training = dataset.select(order[:count]), dataset.select(np.sort(order[count:]))
        collators = [self._collator(dataset) for _ in range(2)]  # masks of training move on with the epochs

        def measure(model: PreTrainedModel) -> Any:
            assert self.teacher is not None
            return {"held_out": held_out_losses(model, self.teacher.model, held_out, collators[0], self.stage)}

        data = {**data, "sequences": len(training), "held_out": count}
        return self._run(training, collators[1], length, data, measure, [], None)

    def _collator(self, dataset: Dataset) -> Any:
        """Masks words where the class predicts them and the data has no labels; pads labels of tokens."""
        if "labels" not in dataset.column_names:
            if type(self.student.model).__name__.endswith("ForMaskedLM"):
                return MaskingCollator(self.tokenizer, self.stage.mask_probability, self.options.seed)
        elif isinstance(dataset[0]["labels"], list):
            return DataCollatorForTokenClassification(self.tokenizer)
        return DataCollatorWithPadding(self.tokenizer)

    def _run(self, *args: Any) -> Result:
        try:
            return self._train(*args)
        finally:
            if self.work is not None:
                self.work.close()

    def _train(
        self,
        dataset: Dataset,
        collator: Any,
        length: int,
        data: dict[str, Any],
        measure: Callable[[PreTrainedModel], Any],
        notes: Sequence[str],
        primary: str | None,
    ) -> Result:
        stage = self.stage.model_copy(update={"max_length": length})
        settings = {
            "stage": self.name,
            "student": reports.identity(self.student),
            "teacher": reports.identity(self.teacher),
            "data": data,
            **stage.model_dump(mode="json"),
            **self.options.model_dump(mode="json", exclude={"device", "save_every"}),
        }
        # Refused before anything is written.
        earlier = reports.earlier_stages(self.student)
        student: Any = self.student.model
        teacher: Any = self.teacher.model if self.teacher is not None else None
        micro_batches(stage, self.options)
        masked = isinstance(collator, MaskingCollator)
        with attention_kept(student, teacher):
            Objective(student, teacher, stage, dataset.column_names, masked=masked, explicit=self.explicit_losses)
        work = None
        if self.target is not None:
            self.work = work = WorkingFolder(self.target, settings, resume=self.resume, overwrite=self.overwrite)
            if self.resume and not work.found:
                notes = [*notes, f"{work.path.name}: there was no run to resume, so one was started"]
        dtypes = {model: model.dtype for model in (student, teacher) if model is not None}
        scores = {}
        for who, model in (("student_before", student), ("teacher", teacher)):
            if model is not None:
                model.float().to(self.options.torch_device)
                scores[who] = work.once(who, partial(measure, model)) if work else measure(model)
        set_seed(self.options.seed)  # a resumed run skips the measurements
        with attention_kept(student, teacher), tempfile.TemporaryDirectory() as nowhere:
            history = train(
                student,
                teacher,
                dataset,
                collator,
                stage,
                self.options,
                work.path if work else Path(nowhere),  # Trainer wants a folder even to write nothing
                checkpoints=work is not None,
                resume_from=work.last_checkpoint if work else None,
                explicit_losses=self.explicit_losses,
                callbacks=self.callbacks,
                teacher_outputs=self.teacher_outputs,
                progress=self.progress,
            )
        student.to(dtypes[student]).eval()  # trained in fp32, stored and scored as it was
        scores["student_after"] = measure(student.float())
        for model, dtype in dtypes.items():
            model.to(dtype)
        all_notes = dict.fromkeys(
            [*self.student.notes, *(self.teacher.notes if self.teacher else ()), *notes, *history["losses_dropped"]]
        )
        record = reports.stage_record(settings, history, scores, primary, list(all_notes))
        if self.target is not None and work is not None:
            if PartialState().is_main_process:
                with outputs.output_folder(self.target, self.overwrite) as temporary:
                    checkpoints.save(self.student, temporary)
                    self.tokenizer.save_pretrained(temporary)  # the one that it was trained with
                    reports.write(self.student, [*earlier, record], temporary, self.target.name)
            work.remove()
            PartialState().wait_for_everyone()
        return Result(student, record, self.target, tuple(all_notes))


def sequence_length(max_length: int | None, task: Task | None, *models: Checkpoint | None) -> int:
    """Tokens per sequence: as set, else the task's, else :data:`DEFAULT_LENGTH`. Raises InputError if too long."""
    length = max_length or (task.max_length if task is not None else DEFAULT_LENGTH)
    for checkpoint in models:
        if checkpoint is not None:
            check_length(checkpoint.model, length)
    return length
