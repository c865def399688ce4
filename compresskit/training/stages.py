"""``finetune`` and ``distill``: from models and data to a folder and a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback, set_seed

from compresskit.data.units import LANGUAGE, Texts, Unit, check_units, find_corpora, read_units
from compresskit.errors import InputError
from compresskit.internals.datasets import fingerprint
from compresskit.model import output as outputs
from compresskit.model.heads import has_head
from compresskit.model.tokenizer import find_tokenizer
from compresskit.planning.stage import FINE_TUNING, LossName, Stage, StageName
from compresskit.progress import Progress
from compresskit.tasks.declaration import Task
from compresskit.tasks.loading import find_task, load_data
from compresskit.training import data as training_data
from compresskit.training.data import Models, TrainingData
from compresskit.training.reading import (
    ModelLike,
    encoders,
    teacher_and_student,
    with_layers,
    with_new_head,
)
from compresskit.training.run import Output, Result, Run
from compresskit.training.settings import Options, recipe_stage, split_settings, start_processes, with_settings
from compresskit.training.working_folder import working_folder

#: Settings of losses of sentence vectors, and of losses of heads.
_OF_SENTENCES = ("pooled_loss", "similarity_loss", "similarity_temperature", "dims")
_OF_HEADS = ("logits_loss", "temperature", "mask_probability")
#: Settings that one loss alone reads.
_OF_LOSS: dict[str, LossName] = {
    "logits_loss": "logits",
    "temperature": "logits",
    "pooled_loss": "pooled",
    "similarity_loss": "similarity",
    "similarity_temperature": "similarity",
}


def finetune(
    model: ModelLike = None,
    *,
    task: Task | str | Path,
    data: str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    tokenizer: Any = None,
    as_class: str | None = None,
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **settings: Any,
) -> Result:
    """Train a model on a task by its labels alone: a teacher, or a compressed model without a teacher.

    Args:
        model: a model, folder or hub id, dense or compressed. Default: the embedded checkpoint. A model given as an
            object is trained in place.
        task: name of a shipped task, or a YAML file, or a :class:`Task`.
        data: folder with the task's files; without one the task comes from the hub.
        output: folder to write; None keeps the result in memory only.
        overwrite: replace an output (or an unfinished run) of compresskit.
        resume: continue an unfinished run.
        tokenizer: needed only for a model given as an object.
        as_class: the class to read a folder in, a key of :data:`~compresskit.model.checkpoint.MODEL_CLASSES`. It must
            be the one that the task needs, which is the default.
        progress: ``(what, done, total)`` is called while predicting.
        callbacks: transformers callbacks, e.g. a progress bar.
        settings: any field of :class:`compresskit.planning.stage.Stage` and
            :class:`compresskit.training.settings.Options`, but those that losses of a teacher or of vectors alone read.
            Defaults: learning rate 5e-5, 3 epochs, batch size 32.

    Raises:
        InputError: refused before training; says what is wrong with model, data or settings.
        WorkError: a loss that is not finite.
    """
    explicit, options = split_settings(settings)
    stage = with_settings(FINE_TUNING, explicit)
    if unused := [name for name in (*_OF_SENTENCES, *_OF_HEADS) if name in _changed(explicit)]:
        raise InputError(f"settings: {', '.join(unused)}: fine-tuning learns from labels alone; leave it out")
    declared = find_task(task)
    target = _check_output(output, overwrite, resume, model)
    start_processes(options)
    set_seed(options.seed)
    examples = load_data(declared, None if data is None else Path(data))
    read = with_new_head(model, declared, examples.labels, as_class, forget=options.new_head)
    models = Models(read, None, find_tokenizer(tokenizer, read))
    return Run(
        name="fine-tuning",
        models=models,
        data=training_data.from_task(examples, models, stage, progress),
        stage=stage,
        options=options,
        output=target,
        explicit_losses=_explicit_losses(explicit),
        progress=progress,
        callbacks=callbacks,
    ).execute()


def distill(
    student: ModelLike,
    teacher: ModelLike = None,
    *,
    task: Task | str | Path | None = None,
    data: str | Path | None = None,
    text: Texts = None,
    unit: Unit | Sequence[Unit] | None = None,
    fields: str | Sequence[str] = (),
    language: str = LANGUAGE,
    max_texts: int | None = None,
    dataset: Dataset | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    tokenizer: Any = None,
    allow_dense: bool = False,
    teacher_outputs: str | Path | None = None,
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **settings: Any,
) -> Result:
    """Bring a compressed student back to its teacher: the general stage on text, the task stage on a task, or sentence
    vectors on texts cut into units.

    The student is loaded in the teacher's class; head weights that it lacks are copied from the teacher. The student
    folder's recipe gives the defaults of the settings. For sentence vectors both are read without a head, and what
    their folders say of pooling, prompts and length is followed.

    Args:
        student: a compressed model or folder. A model given as an object is trained in place.
        teacher: the dense model, folder or hub id: the pre-trained one, or the one fine-tuned on the task. Default: the
            embedded checkpoint. Where its folder and the student's have tokenizers with different vocabularies, each
            reads the texts for itself, and layers are compared word by word (:mod:`compresskit.training.alignment`).
        task, data: as for :func:`finetune`; makes this the task stage.
        text: for the general stage: a file (plain, .gz, .jsonl), a folder of such files or a data set of the hub
            (:func:`compresskit.data.corpus.find_corpus`). Default: the embedded text. With ``unit`` also several, and
            files of rows (TSV, CSV, JSON, Parquet).
        unit: ``sentence``, ``passage`` or ``line``, or several of them: learn the teacher's vector of each
            (:func:`compresskit.data.units.read_units`).
        fields: with ``unit``: columns of files of rows, each of which gives texts.
        language: with ``unit``: of the sentences, ISO 639-1.
        max_texts: with ``unit``: at most so many texts, chosen at random.
        dataset: instead of both: a ``datasets.Dataset`` with ``input_ids``, and ``labels`` for the supervised loss.
            Other inputs of the model are columns with an integer, or a list of them, for each token (``bbox``).
        output, overwrite, resume, progress, callbacks: as for :func:`finetune`.
        tokenizer: of both; needed only for models given as objects.
        teacher_outputs: folder for the teacher's outputs on every row, which are then computed once (on a CPU) and
            shared by all students, seeds and epochs; several gigabytes for large tasks, to be deleted by hand. With
            ``unit`` also its sentence vectors, on any device.
        allow_dense: also take a student that is not compressed, such as one with half the teacher's layers.
        settings: as for :func:`finetune`. Defaults: :data:`compresskit.planning.stage.DEFAULTS`.

    Raises:
        InputError: refused before training; says what is wrong with models, data or settings.
        WorkError: a loss that is not finite.
    """
    units = (unit,) if isinstance(unit, str) else tuple(unit or ())
    fields = (fields,) if isinstance(fields, str) else tuple(fields)
    _check_lesson(units, task=task, data=data, text=text, dataset=dataset)
    check_units(units, fields=fields, language=language, limit=max_texts)
    name: StageName = "sentences" if units else "general" if task is None else "task"
    explicit, options = split_settings(settings)
    stage = with_settings(recipe_stage(student, name), explicit)
    if task is None and options.new_head:
        raise InputError("new_head: is for tasks; the general stage trains the head that the checkpoint has")
    _check_used(explicit, stage, sentences=bool(units))
    declared = None if task is None else find_task(task)
    corpus = find_corpora(text, fields, units) if task is None and dataset is None else ()
    target = _check_output(output, overwrite, resume, student, teacher)
    start_processes(options)
    set_seed(options.seed)
    examples = None if declared is None else load_data(declared, None if data is None else Path(data))
    kept = _check_teacher_outputs(teacher_outputs, target)
    if units:
        both = encoders(teacher, student, tokenizer, stage.max_length, allow_dense=allow_dense)
        stage, note = with_layers(stage, *both, _explicit_losses(explicit))
        models = Models.of_encoders(*both, stage)
        texts = read_units(corpus, units, language=language, limit=max_texts, seed=options.seed, progress=progress)
        found = training_data.from_units(texts, *both, stage, options, progress)
        found = replace(found, notes=(*found.notes, note)) if note is not None else found
    else:
        models = teacher_and_student(teacher, student, tokenizer, allow_dense=allow_dense, new_head=options.new_head)
        if examples is not None:
            found = training_data.from_task(examples, models, stage, progress)
        elif corpus:
            found = training_data.from_text(corpus[0], models, stage, options)
        else:
            found = _from_python(dataset, models, stage, options)
    _check_used_by(models, found, explicit)
    found = replace(found, notes=(*(note for one in corpus for note in one.notes), *found.notes))
    return Run(
        name=name,
        models=models,
        data=found,
        stage=stage,
        options=options,
        output=target,
        explicit_losses=_explicit_losses(explicit),
        teacher_outputs=kept,
        progress=progress,
        callbacks=callbacks,
    ).execute()


def _check_lesson(units: Sequence[Unit], *, task: Any, data: Any, text: Any, dataset: Any) -> None:
    """Refuse what :func:`distill` is given to learn from, where it does not go together. Raises InputError."""
    if sum(given is not None for given in (task, text, dataset)) > 1:
        raise InputError("give one of task, text and dataset")
    if units and (task is not None or dataset is not None):
        raise InputError("unit belongs to text; leave it out with a task or a data set")
    if data is not None and task is None:
        raise InputError("data belongs to a task; give one, or leave data out")


def _check_used(explicit: Mapping[str, Any], stage: Stage, *, sentences: bool) -> None:
    """Refuse settings other than the defaults that were given and that no loss reads. Raises InputError."""
    changed = _changed(explicit)
    if sentences and not stage.losses.get("similarity") and stage.dims and "dims" in changed:
        raise InputError("settings: dims: are prefixes that loss similarity compares; give it a weight")
    others = _OF_HEADS if sentences else _OF_SENTENCES
    if unused := [name for name in others if name in changed]:
        where = "with unit, which trains no head" if sentences else "without unit"
        raise InputError(f"settings: {', '.join(unused)}: no loss reads this {where}; leave it out")
    for name, loss in _OF_LOSS.items():
        if name in changed and not stage.losses.get(loss):
            raise InputError(f"settings: {name}: is of the loss {loss}, whose weight is 0; leave it out")
    for name, loss, form in (
        ("temperature", "logits", stage.logits_loss),
        ("similarity_temperature", "similarity", stage.similarity_loss),
    ):
        if name in changed and form != "kl":
            raise InputError(f"settings: {name}: is that of {loss} loss kl, here it is {form}; leave it out")


def _changed(explicit: Mapping[str, Any]) -> set[str]:
    """The settings that were given and are not the defaults."""
    return {name for name, value in explicit.items() if value != Stage.model_fields[name].get_default()}


def _check_used_by(models: Models, data: TrainingData, explicit: Mapping[str, Any]) -> None:
    """As :func:`_check_used`, for what models and data decide. Raises InputError."""
    changed, head = _changed(explicit), models.student.model
    if "mask_probability" in changed and not data.masked:
        why = "words are hidden for a masked-LM model that reads text without labels, in one vocabulary"
        raise InputError(f"settings: mask_probability: no word is hidden here: {why}; leave it out")
    if "temperature" in changed and has_head(head, "sequence-classification") and head.config.num_labels == 1:
        raise InputError(
            "settings: temperature: is of the loss logits, which compares the one number of this head by mse; leave it "
            "out"
        )


def _from_python(dataset: Any, models: Models, stage: Stage, options: Options) -> TrainingData:
    if not isinstance(dataset, Dataset):
        raise InputError(f"data set: give a datasets.Dataset, not a {type(dataset).__name__}")
    if models.by_words:
        raise InputError(
            "data set: holds token numbers of one vocabulary, and student and teacher have different ones: give a text "
            "or a task, or a tokenizer that is meant for both"
        )
    plain = dataset.with_format(None)
    record = {"source": "a data set given from Python", "fingerprint": fingerprint(plain)}
    return training_data.from_dataset(plain, record, models, stage, options)


def _explicit_losses(explicit: dict[str, Any]) -> tuple[str, ...]:
    return tuple(name for name, weight in explicit.get("losses", {}).items() if weight)


def _check_teacher_outputs(given: str | Path | None, output: Output | None) -> Path | None:
    """The folder, made now, so that nothing is refused after hours. Raises InputError."""
    if given is None:
        return None
    folder = Path(given)
    if output is not None and output.folder.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise InputError(f"teacher outputs {given}: lie in the output folder; choose another one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"teacher outputs {given}: cannot be written: {error.strerror or error}") from None
    return folder


def _check_output(output: str | Path | None, overwrite: bool, resume: bool, *inputs: ModelLike) -> Output | None:
    if resume and overwrite:
        raise InputError("give --resume (continue a run) or --overwrite (start again), not both")
    if output is None and resume:
        raise InputError("resume: continues the run of an output; give the output")
    if output is None:
        return None
    target = Path(output)
    for given in inputs:
        if isinstance(given, str | Path) and Path(given).resolve() == target.resolve():
            raise InputError(f"output {output}: is also a model that is read; choose another folder")
    if resume and target.exists() and not working_folder(target).exists():
        raise InputError(f"output {output}: exists, so the run is finished: nothing to resume")
    outputs.check_output(target, overwrite)
    return Output(target, overwrite, resume)
