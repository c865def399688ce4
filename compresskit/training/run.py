"""One training run: compare, train, compare again, write."""

from __future__ import annotations

import math
import pickle
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, TrainerState

from compresskit.errors import InputError, one_line
from compresskit.folders import training as reports
from compresskit.folders.trained import write_trained
from compresskit.internals.accelerate import own_forward
from compresskit.internals.transformers import on_one_gpu
from compresskit.model import checkpoint as checkpoints
from compresskit.model import identity
from compresskit.model import output as outputs
from compresskit.model.kept import as_it_was
from compresskit.planning.stage import Stage
from compresskit.progress import Progress
from compresskit.scores import worsened
from compresskit.training.arguments import checkpointing_kept
from compresskit.training.attention import attention_kept
from compresskit.training.batches import LengthBatchSampler
from compresskit.training.checkpoints import state_of
from compresskit.training.data import Models, TrainingData
from compresskit.training.early_stopping import EarlyStopping, scores
from compresskit.training.forward import dropout
from compresskit.training.objective import Objective
from compresskit.training.projections import beside
from compresskit.training.settings import Options
from compresskit.training.terms import compared
from compresskit.training.trainer import DistillationTrainer
from compresskit.training.working_folder import WorkingFolder, working_folder


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


@dataclass(frozen=True)
class Output:
    """Where a run writes.

    Attributes:
        folder: what appears once the run is complete.
        overwrite: replace a folder (or an unfinished run) of compresskit.
        resume: continue an unfinished run.
    """

    folder: Path
    overwrite: bool = False
    resume: bool = False


@dataclass(frozen=True)
class Run:
    """A stage of training with all its settings.

    Attributes:
        name: of the stage, for the record.
        models: student, teacher and tokenizer.
        data: what is trained on, and how models are scored.
        stage: losses and schedule.
        options: budget, seed, device.
        output: None keeps the result in memory only.
        explicit_losses: terms that the user asked for by name: refused where they are impossible, not dropped.
        teacher_outputs: folder that keeps the teacher's outputs for every row, see
            :meth:`DistillationTrainer.keep_teacher_outputs`.
        progress: called with (what, done, total) while the teacher's outputs are computed.
        callbacks: of transformers.
    """

    name: str
    models: Models
    data: TrainingData
    stage: Stage
    options: Options
    output: Output | None = None
    explicit_losses: tuple[str, ...] = ()
    teacher_outputs: Path | None = None
    progress: Progress | None = None
    callbacks: Sequence[TrainerCallback] = ()

    def execute(self) -> Result:
        """Score, train the student in place, score again, and write the output.

        Raises:
            InputError: losses that are impossible, a batch size that cannot be shared out, another run's folder.
            WorkError: a loss that is not finite.
        """
        settings = self._settings()
        # Refused before anything is written.
        earlier = reports.earlier_stages(self.models.student)
        parts = micro_batches(self.stage, self.options, self.data.together)
        if self.stage.losses.get("similarity") and self.stage.batch_size < 2 * parts:
            raise InputError(
                "loss similarity: compares the sentences of a micro-batch, and here each holds one: give a larger "
                "batch size or less accumulation, or leave the loss out (similarity=0)"
            )
        self._check()
        with attention_kept(*self._everyone):
            _ = self._needs_teacher
        work = None
        if self.output is not None:
            where = self.output
            decides = {**settings, **self._content()}
            folder = working_folder(where.folder)
            work = WorkingFolder(folder, decides, resume=where.resume, overwrite=where.overwrite)
        try:
            with as_it_was(*self._everyone[1:]):  # the teacher
                return self._execute(settings, earlier, work)
        finally:
            if work is not None:
                work.close()

    def _execute(self, settings: dict[str, Any], earlier: list[dict[str, Any]], work: WorkingFolder | None) -> Result:
        student = self._everyone[0]
        dtype = student.dtype
        scores = self._scores_before(work)
        set_seed(self.options.seed)  # a resumed run skips the measurements
        learned = beside(student, self.data.learned_beside)
        with attention_kept(*self._everyone), learned, tempfile.TemporaryDirectory() as nowhere:
            # Trainer wants a folder even to write nothing.
            history, trained = self._train(Path(nowhere) if work is None else work.path, work)
        student.to(dtype).eval()  # trained in fp32, stored and scored as it was
        scores["student_after"] = self.data.measure(student.float())
        student.to(dtype)
        worse = worsened(scores["student_before"], scores["student_after"], self.data.primary)
        notes = list(dict.fromkeys([*self._notes(work), *history["losses_dropped"], *trained, *worse]))
        record = reports.stage_record(settings, history, scores, self.data.primary, notes)
        if self.output is not None and work is not None:
            self._write([*earlier, record], self.output)
            work.remove()
            PartialState().wait_for_everyone()
        return Result(student, record, self.output.folder if self.output is not None else None, tuple(notes))

    @property
    def _everyone(self) -> list[Any]:
        """The student's model, and the teacher's if there is one."""
        return [checkpoint.model for checkpoint in self.models.all()]

    @cached_property
    def _needs_teacher(self) -> bool:
        """Whether a loss compares with the teacher at every step. Raises InputError: losses that are impossible."""
        return Objective(
            self._everyone[0],
            self._teacher,
            self.stage,
            self.data.rows.column_names,
            masked=self.data.masked,
            sentences=self.data.sentences is not None,
            explicit=self.explicit_losses,
            predictions=self.data.predictions,
            projections=self.data.projections,
        ).needs_teacher

    def _check(self) -> None:
        """Refuse what models or data do not allow. Raises InputError."""
        student = self._everyone[0]
        if self.stage.early_stopping is not None and self.data.dev is None:
            raise InputError("early_stopping: goes by the primary metric on a task's dev rows; there is no task")
        if self.stage.early_stopping is not None and self.output is None and PartialState().num_processes > 1:
            raise InputError(
                "early_stopping: goes back to weights in a file, which several processes share beside the output: give "
                "an output"
            )
        if self.stage.class_weights is not None and self.data.dev is None:
            raise InputError("class_weights: weigh the labels of a task; there is no task")
        if self.stage.class_weights is not None and not self.stage.losses.get("supervised"):
            raise InputError("class_weights: are of the loss supervised, whose weight is 0")
        if self.options.gradient_checkpointing and not student.supports_gradient_checkpointing:
            raise InputError(f"gradient_checkpointing: {type(student).__name__} does not support it")

    @property
    def _teacher(self) -> Any:
        """The teacher where a loss compares with it at every step. The sentence vectors of a teacher stand in a file,
        and it may be of another family.
        """
        _, *teacher = self._everyone
        return teacher[0] if teacher and (compared(self.stage) or self.data.sentences is None) else None

    def _settings(self) -> dict[str, Any]:
        """What decides the result, as plain data: a run with other settings is another run."""
        stage = self.stage.model_copy(update={"max_length": self.data.max_length})
        return {
            "stage": self.name,
            "student": reports.identity(self.models.student),
            "teacher": reports.identity(self.models.teacher),
            "data": self.data.record,
            **stage.model_dump(mode="json"),
            **self.options.model_dump(
                mode="json", exclude={"device", "gradient_checkpointing", "new_head", "save_every"}
            ),
        }

    def _content(self) -> dict[str, Any]:
        """Hashes of all that the models and the tokenizer are made of, and the order of declared labels: it decides the
        class numbers, and two mappings are equal whatever their order.
        """
        found: dict[str, Any] = {"content of the student": identity.of_checkpoint(self.models.student)}
        if self.models.teacher is not None:
            found["content of the teacher"] = identity.of_checkpoint(self.models.teacher)
        found["tokenizer"] = identity.of_tokenizer(self.models.tokenizer)
        if self.models.by_words:
            found["tokenizer of the teacher"] = identity.of_tokenizer(self.models.teacher_tokenizer)
        if labels := self.data.record.get("task", {}).get("labels"):
            found["order of the labels"] = list(labels)
        return found

    def _notes(self, work: WorkingFolder | None) -> list[str]:
        notes = [note for checkpoint in self.models.all() for note in checkpoint.notes] + list(self.data.notes)
        parts, batch = micro_batches(self.stage, self.options, self.data.together), self.stage.batch_size
        if parts > 1 and self.data.sentences is not None and self.stage.losses.get("similarity"):
            own = f"the {batch // parts} sentences of each of {parts} parts of a batch"
            notes.append(f"loss similarity compares {own} with each other, not all {batch}")
        if work is not None and self.output is not None and self.output.resume and not work.found:
            notes.append(f"{work.path.name}: there was no run to resume, so one was started")
        return notes

    def _scores_before(self, work: WorkingFolder | None) -> dict[str, Any]:
        scores = {}
        for model in self._everyone:  # losses need both at once
            model.float().to(self.options.torch_device)
        for who, model in zip(("student_before", "teacher"), self._everyone, strict=False):
            measure = partial(self.data.measure, model)
            scores[who] = work.once(who, measure) if work is not None else measure()
        return scores

    def _train(self, folder: Path, work: WorkingFolder | None) -> tuple[dict[str, Any], list[str]]:
        """Train; what happened, as plain data, and notes. ``folder`` takes checkpoints, where there is ``work``."""
        sampler = self._sampler()
        steps = self._steps(sampler)
        stopping = self._early_stopping(sampler)
        student = self._everyone[0]
        arguments = self._arguments(folder, steps, checkpoints=work is not None)
        vectors = None
        if self.data.sentences is not None:
            at_every_step = self._needs_teacher and self.teacher_outputs is None
            vectors = self.data.sentences.taught(self.teacher_outputs or folder, at_every_step=at_every_step)
        trainer = DistillationTrainer(
            student,
            self._teacher,
            stage=self.stage,
            explicit_losses=self.explicit_losses,
            vectors=vectors,
            args=arguments,
            train_dataset=self.data.rows,
            data_collator=self.data.collator,
            predictions=self.data.predictions,
            projections=self.data.projections,
            together=self.data.together,
            callbacks=[*self.callbacks, *([stopping] if stopping is not None else [])],
        )
        trainer.remove_callback(PrinterCallback)  # the command line shows progress in its own way
        if arguments.bf16 and self.options.use_cpu and trainer.loss.attention_maps is None:
            # The backward of torch's fused attention is slow in bf16 on CPUs (figures in docs/algorithms.md).
            student.set_attn_implementation("eager")
        with dropout(student, self.stage.dropout), own_forward(student), checkpointing_kept(student):
            notes = self._drive(trainer, work.last_checkpoint if work is not None else None, steps, stopping)
        if lost := sampler.left_out:
            every = f"{lost} of {len(sampler.lengths)} sequences are left out of every pass over the data"
            notes.append(f"{every}, others each time: they are too few for the {sampler.world} parts of a batch")
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        steps = trainer.state.global_step  # of all that were planned, where it did not stop before
        found = {} if stopping is None else self._stopped(trainer.state)
        found |= {"gradient_checkpointing": True} if self.options.gradient_checkpointing else {}
        history = found | {
            "steps": steps,
            "epochs": steps / sampler.steps,
            "tokens": sampler.tokens(steps),
            # From the log, so that a resumed run counts the time before it was stopped too.
            "seconds": sum(entry["seconds"] for entry in log) * steps / log[-1]["step"],
            "losses": trainer.loss.weights,
            "losses_dropped": list(trainer.loss.dropped.values()),
            "attention_maps": trainer.loss.attention_maps,
            "log": log,
        }
        return history, notes

    def _early_stopping(self, sampler: LengthBatchSampler) -> EarlyStopping | None:
        if self.stage.early_stopping is None or self.data.dev is None:
            return None
        return EarlyStopping(self.data.dev, self.stage.score_every or sampler.steps, self.stage.early_stopping)

    def _stopped(self, state: TrainerState) -> dict[str, Any]:
        """For the record: every score, and the step whose weights are kept."""
        return {"dev_scores": scores(state.log_history), "best_step": state.best_global_step}

    def _drive(
        self, trainer: DistillationTrainer, checkpoint: Path | None, steps: int, stopping: EarlyStopping | None
    ) -> list[str]:
        """Train to the end, from the checkpoint if there is one, and go back to the best weights if that was asked;
        notes.
        """
        notes: list[str] = []
        over = checkpoint is not None and checkpoint.name == f"checkpoint-{steps}"
        if checkpoint is not None and stopping is not None:
            over = over or stopping.is_over(state_of(checkpoint))
        if checkpoint is not None and over:
            trainer.load_finished(checkpoint)
        else:
            notes = self._train_on(trainer, checkpoint)
        if stopping is not None and trainer.state.best_global_step != trainer.state.global_step:
            trainer.load_weights(Path(str(trainer.args.output_dir)) / f"checkpoint-{trainer.state.best_global_step}")
        return notes

    def _train_on(self, trainer: DistillationTrainer, checkpoint: Path | None) -> list[str]:
        reason = None
        if self.teacher_outputs is not None and (trainer.vectors is None or self._needs_teacher):
            reason = trainer.keep_teacher_outputs(self.teacher_outputs, self.progress)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except pickle.UnpicklingError as error:
            raise InputError(
                f"{checkpoint}: refused, it holds more than plain tensors: {one_line(error)}; "
                "--overwrite starts the run again"
            ) from None
        trainer.check_weights()
        return [] if reason is None else [f"teacher outputs are not kept: {reason}"]

    def _sampler(self) -> LengthBatchSampler:
        """The batches of the run, as the Trainer draws them."""
        together = self.data.together
        parts = micro_batches(self.stage, self.options, together)
        lengths = self.data.rows["length"]
        sampler = LengthBatchSampler(
            lengths, self.stage.batch_size, world=parts, seed=self.options.seed, together=together
        )
        if not sampler.steps:
            raise InputError(f"data set: {len(lengths)} sequences are too few for {parts} processes and micro-batches")
        return sampler

    def _steps(self, sampler: LengthBatchSampler) -> int:
        """Optimizer steps of the budget."""
        if self.options.max_tokens is not None:
            return sampler.steps_for_tokens(self.options.max_tokens)
        return self.options.max_steps or math.ceil(self.stage.epochs * sampler.steps)

    def _arguments(self, folder: Path, steps: int, *, checkpoints: bool) -> TrainingArguments:
        stage, options = self.stage, self.options
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=stage.batch_size // micro_batches(stage, options, self.data.together),
            gradient_accumulation_steps=options.accumulation,
            learning_rate=stage.learning_rate,
            weight_decay=stage.weight_decay,
            warmup_steps=math.ceil(stage.warmup * steps),
            lr_scheduler_type="constant_with_warmup" if stage.schedule == "constant" else stage.schedule,
            max_steps=steps,
            seed=options.seed,
            bf16=options.precision == "bf16",
            activation_checkpointing=options.gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
            use_cpu=options.use_cpu,
            logging_steps=max(1, min(50, steps // 100)),
            save_strategy="steps" if checkpoints else "no",
            save_steps=options.save_every or max(100, min(500, math.ceil(steps / 10))),
            save_total_limit=1,
            dataloader_pin_memory=not options.use_cpu,
            report_to="none",
            disable_tqdm=True,
        )
        on_one_gpu(arguments)  # several GPUs take torchrun: nn.DataParallel breaks tied heads
        return arguments

    def _write(self, stages: list[dict[str, Any]], output: Output) -> None:
        if not PartialState().is_main_process:
            return
        with outputs.output_folder(output.folder, output.overwrite) as temporary:
            checkpoints.save(self.models.student, temporary)
            self.models.tokenizer.save_pretrained(temporary)  # the one that it was trained with
            if self.data.sentences is not None:
                self.data.sentences.write_modules(temporary)
            write_trained(self.models.student, stages, temporary, output.folder.name)


def micro_batches(stage: Stage, options: Options, together: int = 1) -> int:
    """Into how many micro-batches a step is cut: processes x accumulation. Raises InputError if it cannot be, with
    ``together`` sequences that stay together.
    """
    processes = PartialState().num_processes
    parts = processes * options.accumulation
    if stage.batch_size % (parts * together):
        pairs = f", each of whole groups of {together} texts" if together > 1 else ""
        raise InputError(
            f"batch size {stage.batch_size}: must be a multiple of {parts * together} "
            f"({processes} processes x {options.accumulation} accumulated micro-batches{pairs})"
        )
    return parts
