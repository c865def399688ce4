"""A compressed folder on the hub: files, model card and results, in one commit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, EvalResultEntry, HfApi, eval_result_entries_to_yaml, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel

from compresskit.errors import InputError, WorkError, one_line
from compresskit.folders.card import CARD, IMPORT, PLACE
from compresskit.folders.training import last_stage
from compresskit.internals.transformers import class_for
from compresskit.model import sentence
from compresskit.model.checkpoint import MODEL_CLASSES, load_compressed
from compresskit.model.output import is_ours

RESULTS = ".eval_results/compresskit.yaml"
#: What ``trust_remote_code=True`` runs: importing compresskit is all it does.
BOOTSTRAP = "modeling_compresskit"


def push(folder: str | Path, repository: str, *, private: bool | None = None, auto_map: bool = False) -> str:
    """Put a compressed folder into a model repository of the hub, which is made if it is not there.

    The card names the repository to load from; scores of a task that lies on the hub go into ``.eval_results/``, the
    hub's format for them. Files that compresskit does not write stay behind. All of it is one commit.

    Args:
        folder: what ``compresskit compress`` or ``distill`` wrote. It must load.
        repository: ``name`` or ``owner/name``.
        private: of a new repository. Default: the owner's setting.
        auto_map: add a few lines of code that import compresskit, so that ``from_pretrained(repository,
            trust_remote_code=True)`` needs no import before it. compresskit must be installed all the same.

    Returns:
        The address of the commit.

    Raises:
        InputError: a folder that is not ours or does not load, a bad name, no token.
        WorkError: the hub refuses, or cannot be reached.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"repository {repository!r}: give name or owner/name: {one_line(error)}") from None
    path = Path(folder)
    model = load_compressed(path)  # what does not load is not published
    if not (path / CARD).is_file():
        raise InputError(f"{folder}: has no model card ({CARD}); `compresskit compress` and `distill` write one")
    if get_token() is None:
        raise InputError("no token for the hub: log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="compresskit")
    code = _bootstrap(path, model) if auto_map else {}
    try:
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        operations = _operations(path, repository, code)
        commit = api.create_commit(repository, operations, commit_message="Upload compressed model")
    except HfHubHTTPError as error:
        raise WorkError(f"repository {repository}: the hub refuses: {one_line(error)}") from error
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        raise WorkError(f"repository {repository}: the hub cannot be reached: {one_line(error)}") from error
    return str(commit.commit_url)


def _bootstrap(folder: Path, model: PreTrainedModel) -> dict[str, bytes]:
    """Code and configuration for ``trust_remote_code``: the model's own class, and its encoder as ``AutoModel``."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    wanted = {type(model).__name__, type(model.base_model).__name__}
    autos: Any = MODEL_CLASSES.values()
    known = {auto.__name__: class_for(auto, model.config) for auto in autos}
    classes = {auto: found.__name__ for auto, found in known.items() if found and found.__name__ in wanted}
    config["auto_map"] = {auto: f"{BOOTSTRAP}.{name}" for auto, name in classes.items()}
    # Classes of its own, since saving such a model copies the file that defines its class.
    code = ['"""Loads this model with trust_remote_code=True. Needs the package compresskit."""', ""]
    code += [IMPORT, "import transformers"]
    for name in dict.fromkeys(classes.values()):
        code += ["", "", f"class {name}(transformers.{name}):", f'    """{name} with factorised layers."""']
    return {
        "config.json": (json.dumps(config, indent=2) + "\n").encode(),
        f"{BOOTSTRAP}.py": ("\n".join(code) + "\n").encode(),
    }


def _operations(folder: Path, repository: str, code: Mapping[str, bytes]) -> list[CommitOperationAdd]:
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and is_ours(file.name) and file.name != CARD]
    for name in sentence.module_folders(folder):
        files += sorted(file for file in (folder / name).rglob("*") if file.is_file())
    contents: dict[str, Path | bytes] = {file.relative_to(folder).as_posix(): file for file in files}
    card = (folder / CARD).read_text(encoding="utf-8")
    contents[CARD] = card.replace(PLACE, repository).encode()
    contents |= code
    results = _results(folder)
    if results:
        contents[RESULTS] = yaml.safe_dump(eval_result_entries_to_yaml(results), sort_keys=False).encode()
    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()]


def _results(folder: Path) -> list[EvalResultEntry]:
    """The primary metric on every whole split of the last stage's task, where its data set lies on the hub."""
    stage = last_stage(folder)
    task = stage.data.task if stage is not None else None
    if stage is None or task is None or task.hub is None:
        return []
    splits, metric = stage.data.splits, stage.primary_metric
    return [
        EvalResultEntry(
            dataset_id=task.hub.path,
            task_id=task.hub.name or task.name,
            value=round(scores[metric], 4),
            date=stage.finished,
            notes=f"{metric}, {split} split",
        )
        for split, scores in stage.scores["student_after"].items()
        if metric in scores and split in splits and not splits[split].remark
    ]
