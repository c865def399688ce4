"""One identity of a checkpoint: what was begun, taught or measured with other files is not taken for this one's."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import tiny_model

import compresskit
from compresskit import InputError
from compresskit.benchmark.grid import Grid
from compresskit.benchmark.shared import Shared
from compresskit.model import identity
from compresskit.shrinking.job import Job


def _edit(folder: Path, name: str, **entries: Any) -> None:
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | entries))


def _epsilon(folder: Path) -> None:
    _edit(folder, "config.json", layer_norm_eps=0.3)


def _casing(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = not tokenizer["normalizer"]["lowercase"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def _settings(folder: Path) -> None:
    _edit(folder, "tokenizer_config.json", do_lower_case=False)


def _modules(folder: Path) -> None:
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    (folder / "modules.json").write_text(
        '[{"path": "", "type": "a.Transformer"}, {"path": "1_Pooling", "type": "a.P"}]'
    )


def _prompts(folder: Path) -> None:
    _edit(folder, "config_sentence_transformers.json", default_prompt_name="q", prompts={"q": "query: "})


def _template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def _code(folder: Path) -> None:
    (folder / "modeling_own.py").write_text("x = 1\n")


CHANGES = [_epsilon, _casing, _settings, _modules, _prompts, _template, _code]


@pytest.mark.parametrize("change", CHANGES)
def test_every_file_that_decides_counts(change: Callable[[Path], None], bench_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bench_folder / "model", folder)
    before = identity.of_folder(folder)
    assert {"model.safetensors", "config.json", "tokenizer.json", "vocab.txt"} <= before.keys()
    for record in ("README.md", "compression.json", "training.json", "losses.png"):
        (folder / record).write_text("{}")
    assert identity.of_folder(folder) == before
    change(folder)
    assert identity.of_folder(folder) != before


def test_a_model_in_memory_is_known_by_class_configuration_and_weights() -> None:
    model = tiny_model("bert", "classifier")
    before = identity.of_model(model)
    model.config.name_or_path = "elsewhere"
    model.set_attn_implementation("eager")
    assert identity.of_model(model) == before
    assert identity.of_model(tiny_model("bert", "classifier", seed=1)) != before
    assert identity.of_model(tiny_model("bert", "classifier", layer_norm_eps=0.3)) != before
    assert identity.of_model(model.half()) != before


class _Stop(transformers.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.fixture
def copies(bench_folder: Path, tmp_path: Path) -> Path:
    for name in ("teacher", "student"):
        shutil.copytree(bench_folder / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("who", "change", "says"),
    [
        ("teacher", _epsilon, "another content of the teacher (config.json "),
        ("teacher", _casing, "another content of the teacher (tokenizer.json "),
        ("student", _modules, "another content of the student (1_Pooling/config.json none"),
        (None, None, ""),
    ],
)
def test_resume_refuses_changed_files(who: Any, change: Any, says: str, copies: Path, bench_folder: Path) -> None:
    options: dict[str, Any] = {"task": "sst2", "data": bench_folder / "data", "max_length": 32, "device": "cpu"}
    options |= {"max_steps": 3, "save_every": 1, "output": copies / "out"}
    models = copies / "student", copies / "teacher"
    with pytest.raises(KeyboardInterrupt):
        compresskit.distill(*models, callbacks=[_Stop()], **options)
    if who is None:
        compresskit.distill(*models, resume=True, **options)
        return
    change(copies / who)
    with pytest.raises(InputError, match=re.escape(says)):
        compresskit.distill(*models, resume=True, **options)


def test_resume_refuses_another_object(bench_folder: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(bench_folder / "model")
    options: dict[str, Any] = {"task": "sst2", "data": bench_folder / "data", "max_length": 32, "device": "cpu"}
    options |= {"max_steps": 3, "save_every": 1, "output": tmp_path / "out", "tokenizer": tokenizer}
    names = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}

    def model(seed: int) -> transformers.PreTrainedModel:
        return tiny_model("bert", "classifier", seed=seed, **names)

    with pytest.raises(KeyboardInterrupt):
        compresskit.finetune(model(0), callbacks=[_Stop()], **options)
    with pytest.raises(InputError, match=re.escape("another content of the student (weights ")):
        compresskit.finetune(model(1), resume=True, **options)
    compresskit.finetune(model(0), resume=True, **options)


def test_kept_outputs_of_a_teacher_with_another_configuration_are_not_used(copies: Path, bench_folder: Path) -> None:
    options: dict[str, Any] = {"task": "sst2", "data": bench_folder / "data", "max_length": 32, "device": "cpu"}
    options |= {"max_steps": 2, "teacher_outputs": copies / "outputs"}
    models = copies / "student", copies / "teacher"
    folders = []
    for change in (None, None, _epsilon, _settings):
        if change is not None:
            change(copies / "teacher")
        if change is _settings:
            _settings(copies / "student")
        compresskit.distill(*models, **options)
        folders.append(len(list((copies / "outputs").glob("*/index.json"))))
    assert folders == [1, 1, 2, 3]


def test_cells_of_a_benchmark_see_every_file(bench_folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(bench_folder / "model", model)
    options = {"methods": ("low-rank",), "ratios": (3.0,), "text": str(bench_folder / "text.txt")}

    def keys() -> set[str]:
        return {cell.key for cell in Shared(Grid(models=(str(model),), **options)).cells()}

    found = [keys()]
    for change in CHANGES:
        change(model)
        found.append(keys())
    assert len(set.union(*found)) == sum(map(len, found))


def _declare(path: Path, labels: dict[str, str]) -> Path:
    """A task like sst2 with these labels in this order."""
    lines = ["version: 1", "name: films", "inputs: [sentence]", "label: label", f"labels: {json.dumps(labels)}"]
    lines += ["files: {train: SST-2/train.tsv, dev: SST-2/dev.tsv}", "metrics: [f1, accuracy]"]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_order_of_labels_counts(bench_folder: Path, tmp_path: Path) -> None:
    """It numbers the classes of a new head, and f1 is that of the second; mappings are equal in any order."""
    task = tmp_path / "task.yaml"
    options: dict[str, Any] = {"task": task, "data": bench_folder / "data", "max_length": 32, "device": "cpu"}
    options |= {"max_steps": 3, "save_every": 1, "output": tmp_path / "out"}
    labels = {"negative": "0", "positive": "1"}
    turned = dict(reversed(labels.items()))
    _declare(task, labels)
    with pytest.raises(KeyboardInterrupt):
        compresskit.finetune(bench_folder / "model", callbacks=[_Stop()], **options)
    _declare(task, turned)
    with pytest.raises(InputError, match="another order of the labels"):
        compresskit.finetune(bench_folder / "model", resume=True, **options)
    _declare(task, labels)
    compresskit.finetune(bench_folder / "model", resume=True, **options)

    def keys() -> set[str]:
        grid = {"models": (str(bench_folder / "model"),), "tasks": (str(task),), "data": str(bench_folder / "data")}
        return {cell.key for cell in Shared(Grid(methods=("low-rank",), ratios=(3.0,), **grid)).cells()}

    def decides() -> dict[str, Any]:
        asked = {"model": bench_folder / "model", "task": task, "data": bench_folder / "data", "ratio": 3.0}
        return Job(output=tmp_path / "small", **asked).schedule().decides

    before = keys(), decides()
    _declare(task, turned)
    assert not keys() & before[0]
    assert decides() != before[1]
