"""Exported models: ONNX Runtime and ordinary checkpoints against torch, sizes, bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
import transformers
from conftest import HEADS, Run, outputs, quick, refused, tiny_model, token_ids
from transformers import AutoModel, PreTrainedModel

import compresskit
from compresskit import InputError, WorkError
from compresskit.decomposers import FactorisedEmbedding, FactorisedLinear
from compresskit.decomposers.registry import METHODS
from compresskit.exporting import exported
from compresskit.exporting.agreement import example_inputs
from compresskit.exporting.format import FORMATS, ExportFormat, Runtime, Written
from compresskit.exporting.formats.onnx import OPSETS, Onnx, OnnxOptions
from compresskit.exporting.graph import to_graph  # before conftest puts its store of traced models in this place
from compresskit.exporting.int8 import to_int8
from compresskit.model import checkpoint
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.targets import count_parameters

METHODS = list(METHODS.all())
OTHER_HEADS = {
    "tokens": transformers.AutoModelForTokenClassification,
    "answers": transformers.AutoModelForQuestionAnswering,
    "choice": transformers.AutoModelForMultipleChoice,
}


def student(head: str = "classifier", method: str = "low-rank", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random compressed model with one layer: every layer adds seconds to an export."""
    dense = tiny_model("bert", head if head in HEADS else "base", num_hidden_layers=1)
    if head in OTHER_HEADS:
        dense = OTHER_HEADS[head].from_config(dense.config)
    return compresskit.compress(dense.to(dtype), method=method, ratio=2).eval()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A compressed classifier on disk."""
    student().save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "vocab.txt").write_text("[PAD]\n[UNK]\n", encoding="utf-8")
    return tmp_path / "small"


def check(model: PreTrainedModel, file: Path, near: Callable[[np.ndarray, np.ndarray], bool]) -> None:
    """Every output of the file, at sizes the graph was not traced with."""
    session = onnxruntime.InferenceSession(file)
    names = [value.name for value in session.get_outputs()]
    for batch, length in ((1, 1), (4, 30), (3, 7)):
        inputs = example_inputs(model, batch, length)
        with torch.no_grad():
            expected = model.float()(**inputs)
        got = session.run(names, {name: ids.numpy() for name, ids in inputs.items()})
        for name, values in zip(names, got, strict=True):
            assert near(values, expected[name].numpy()), (name, batch, length)


def same(got: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(got - expected).max() <= 1e-4)


def similar(got: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.linalg.norm(got - expected) <= 0.03 * np.linalg.norm(expected))


@pytest.mark.parametrize("method", quick(METHODS, "kronecker"))
def test_every_method_in_onnx_and_int8(method: str, tmp_path: Path) -> None:
    """As masked-LM, whose tied head computes with the factors that the look-up reads."""
    model = student("masked-lm", method)
    graph = to_graph(model, OnnxOptions().operator_set)
    onnx_ir.save(graph, tmp_path / "model.onnx")
    check(model, tmp_path / "model.onnx", same)
    constants = {name: value.const_value for name, value in graph.graph.initializers.items()}
    factors = sum(tensor.nbytes for tensor in constants.values())
    assert factors <= 1.02 * 4 * count_parameters(model)  # nothing multiplied out, the tied table once
    assert (tmp_path / "model.onnx").stat().st_size < factors + 60_000

    to_int8(graph)
    onnx_ir.save(graph, tmp_path / "int8.onnx")
    check(model, tmp_path / "int8.onnx", similar)
    tables = [node.inputs[0].const_value for node in graph.graph if node.op_type == "Gather"]
    largest = max((table for table in tables if table is not None), key=lambda table: table.size)
    assert largest.dtype == onnx_ir.DataType.INT8  # the look-up reads codes


#: Each with another operator set or stored dtype, which go with any head.
VARIANTS = {
    "classifier": (OPSETS[0], torch.float32),
    "answers": (OPSETS[-1], torch.float16),
    "tokens": (None, torch.bfloat16),
    "choice": (None, torch.float32),
}


@pytest.mark.parametrize("head", quick(VARIANTS, "classifier", "answers"))
def test_every_head_in_onnx(head: str, tmp_path: Path) -> None:
    opset, dtype = VARIANTS[head]
    model = student(head, dtype=dtype)
    model.save_pretrained(tmp_path / "small")
    done = compresskit.export(tmp_path / "small", output=tmp_path / "out", opset=opset)
    check(model, tmp_path / "out" / "model.onnx", same)
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record == done.record
    assert record["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
    assert all(found["largest difference"] < 1e-4 for found in record["agreement"].values())
    assert onnx_ir.load(tmp_path / "out" / "model.onnx").opset_imports[""] == record["opset"] == (opset or 20)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_without_a_mask_every_token_is_real(small: Path, tmp_path: Path) -> None:
    """As in torch. Tokenizers whose model_input_names lack the mask made batches in which no token was."""
    compresskit.export(small, output=tmp_path / "out")
    run: Any = FORMATS.get("onnx").load(tmp_path / "out")
    ids = token_ids()
    bare, masked = run(input_ids=ids)["logits"], run(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
    assert torch.equal(bare, masked)
    torch.testing.assert_close(bare, outputs(student(), ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", HEADS)
def test_dense_is_an_ordinary_checkpoint(head: str, method: str, tmp_path: Path) -> None:
    model = student(head, method)
    model.save_pretrained(tmp_path / "small")
    done = compresskit.export(tmp_path / "small", output=tmp_path / "dense", format="dense")
    dense = HEADS[head].from_pretrained(tmp_path / "dense")
    assert not any(isinstance(module, FactorisedLinear | FactorisedEmbedding) for module in dense.modules())
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    torch.testing.assert_close(outputs(dense), outputs(model), rtol=1e-4, atol=1e-5)
    assert all(found["largest difference"] < 1e-4 for found in done.record["agreement"].values())


@pytest.mark.sweep
def test_minilm_19x_in_int8_is_55_times_smaller(run: Run, embedded: Path) -> None:
    assert run("compress", "--method", "low-rank", "--ratio", 19, "--output", "small").code == 0
    result = run("export", "small", "--format", "onnx-int8")
    assert result.code == 0, result.err
    folder = Path("small-onnx-int8")
    original = (embedded / "model.safetensors").stat().st_size
    assert (folder / "model.onnx").stat().st_size <= original / 55
    assert "before compression 90.87 MB" in result.out
    assert {"config.json", "tokenizer.json", "export.json"} <= {path.name for path in folder.iterdir()}
    record = json.loads((folder / "export.json").read_text())
    assert record["megabytes"]["original"] == original / 1e6
    assert 0 < record["agreement"]["last_hidden_state"]["relative error"] < 0.1


def test_overwrite(run: Run, small: Path) -> None:
    arguments = ("export", small, "--format", "dense", "--output", "out")
    assert run(*arguments).code == 0
    assert Path("out/vocab.txt").is_file()
    again = run(*arguments)
    assert again.code == 2
    assert "exists" in again.err
    assert run(*arguments, "--overwrite").code == 0
    result = run("export", "out", "--output", Path.cwd() / "out", "--overwrite")
    assert result.code == 2
    assert "is the model itself" in result.err


def test_a_model_that_computes_no_numbers_is_not_written_in_any_format(small: Path, tmp_path: Path) -> None:
    """Formats that round have no limit of how far they may be from torch: NaN passed."""
    model = compresskit.load(small)
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "large")
    (tmp_path / "large" / "vocab.txt").write_text("[PAD]\n[UNK]\n", encoding="utf-8")
    for format in ("onnx", "onnx-int8", "dense"):
        with pytest.raises(WorkError, match="computes NaN or infinity in logits: nothing was written"):
            compresskit.export(tmp_path / "large", output=tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_a_dense_folder_is_refused(run: Run, tiny_folder: Path) -> None:
    refused(run("export", tiny_folder), "is not compressed; make it with `compresskit compress`")
    refused(run("export", tiny_folder.parent / "nowhere/"), "no such folder")


def test_bad_choices(run: Run, small: Path) -> None:
    refused(run("export", small, "--opset", 99), "opset 99: can be written from 18 to 25")
    refused(run("export", small, "--opset", 20, "--format", "dense"), "an opset is for")
    refused(run("export", small, "--output", "/proc/out"), "cannot be written")
    refused(run("export", small, "--format", "onx"), "unknown format 'onx': did you mean 'onnx'")
    with pytest.raises(InputError, match="unknown option of format dense 'opsets': known: none"):
        compresskit.export(small, output="out", format="dense", opsets=20)


def test_what_sentence_transformers_adds_is_named_where_the_graph_lacks_it(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "sentence"
    student("base").save_pretrained(folder)
    kinds = ("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    done = run("export", folder, "--output", "graph")
    assert done.code == 0, done.err
    assert "no output sentence_embedding" in " ".join(done.out.split())
    assert "Pooling, Normalize" in " ".join(done.out.split())
    assert Path("graph/1_Pooling/config.json").is_file()
    assert compresskit.export(folder, output="dense", format="dense").notes == ()  # has them
    assert Path("dense/modules.json").is_file()


def test_kept_factors_are_named_where_they_are_left_out(tmp_path: Path) -> None:
    """A masked-LM student keeps the pooler's factors, which its class does not use."""
    compresskit.compress(tiny_model(num_hidden_layers=1), method="low-rank", ratio=2).save_pretrained(tmp_path / "base")
    words = checkpoint.read(
        tmp_path / "base", compressed=True, adopt=tiny_model("bert", "masked-lm", num_hidden_layers=1)
    )
    (tmp_path / "words").mkdir()
    checkpoint.save(words, tmp_path / "words")
    done = compresskit.export(tmp_path / "words", output=tmp_path / "dense", format="dense")
    assert any("left out" in note and "pooler.dense.a" in note for note in done.notes)
    AutoModel.from_pretrained(tmp_path / "dense")


@dataclass(frozen=True)
class BoxOptions:
    word: str = "plain"


class Box(ExportFormat[BoxOptions]):
    """The state of the model as torch saves it, in a folder of its own, run by torch."""

    name = "box"
    summary = "a box"
    options_type = BoxOptions
    packages = ("torch",)
    files = ("inside/weights.box",)
    tolerance = 0.0
    runtime = Runtime("Torch", "torch")

    def write(self, read: Checkpoint, folder: Path, options: BoxOptions) -> Written:
        (folder / "inside").mkdir()
        torch.save(read.model.float().eval(), folder / self.files[0])
        return Written({"word": options.word}, notes=("boxed",))

    def load(self, folder: Path) -> PreTrainedModel:
        return torch.load(folder / self.files[0], weights_only=False)


class Lacking(Box):
    name = "lacking"
    packages = ("torch", "no-such-package")
    extra = "boxes"


class Far(Onnx):
    """Nothing is ever near enough."""

    name = "far"
    tolerance = -1.0


class Failing(Onnx):
    """Is written, and cannot be run."""

    name = "failing"

    def load(self, folder: Path) -> Any:
        raise RuntimeError("no such operator")


class Low(Onnx):
    """Holds next to nothing."""

    name = "low"
    largest = 1000


@pytest.fixture
def plugins() -> Iterator[None]:
    """The formats above, as if packages brought them."""
    with FORMATS.with_plugins(
        EntryPoint(form.name, f"test_export:{form.__name__}", FORMATS.group)
        for form in (Box, Lacking, Far, Failing, Low)
    ):
        yield


@pytest.mark.usefixtures("plugins")
def test_a_format_of_another_package(run: Run, small: Path) -> None:
    result = run("export", small, "--format", "box")
    assert result.code == 0, result.err
    assert "boxed" in result.out
    folder = Path(f"{small.name}-box")
    record = json.loads((folder / "export.json").read_text())
    assert record["word"] == "plain"
    assert record["agreement"]["logits"]["largest difference"] == 0
    assert record["megabytes"]["exported"] == (folder / "inside" / "weights.box").stat().st_size / 1e6
    assert set(record["versions"]) == {"compresskit", "torch", "transformers"}
    assert record["files"] == ["config.json", "inside/weights.box", "vocab.txt"]
    again = compresskit.export(small, output=folder, format="box", word="other", overwrite=True)
    assert again.record["word"] == "other"
    (folder / "inside" / "notes.txt").write_text("not compresskit's")
    with pytest.raises(InputError, match="holds inside, which compresskit did not write"):
        compresskit.export(small, output=folder, format="box", overwrite=True)
    assert "box: a box; dense: an ordinary checkpoint" in " ".join(run("export", "--help").out.split())


@pytest.mark.usefixtures("plugins")
def test_what_a_format_says_of_itself_is_heeded(run: Run, small: Path) -> None:
    words = "format lacking: no-such-package missing; install the extra 'boxes'"
    refused(run("export", small, "--format", "lacking"), words)
    with pytest.raises(InputError, match="a word is for the formats box and lacking"):
        compresskit.export(small, output="out", word="no")
    with pytest.raises(InputError, match="unknown option of format box 'wood': did you mean 'word'"):
        compresskit.export(small, output="out", format="box", wood="no")
    refused(run("export", small, "--format", "low"), "0.0 GB in float32; format low holds up to 0.0 GB")
    # What differs from torch is not written.
    far = run("export", small, "--format", "far")
    refused(far, "ONNX Runtime differs from torch", "nothing was written", code=1)
    failing = run("export", small, "--format", "failing")
    refused(failing, "which ONNX Runtime cannot run: no such operator: nothing was written", code=1)


@pytest.mark.parametrize("family", quick(["XLM", "XLNet", "Flaubert"], "XLM"))
def test_token_types_without_a_table_of_them_are_an_input(family: str, tmp_path: Path) -> None:
    """XLM looks them up among the words, XLNet compares them: without them a graph answers otherwise than torch."""
    sizes = {"vocab_size": 499, "num_labels": 2}
    sizes |= (
        {"emb_dim": 48, "n_layers": 1, "n_heads": 4, "pad_index": 0}
        if family in ("XLM", "Flaubert")
        else {"d_model": 48, "n_layer": 1, "n_head": 4, "d_inner": 96}
    )
    torch.manual_seed(0)
    dense = getattr(transformers, f"{family}ForSequenceClassification")(
        getattr(transformers, f"{family}Config")(**sizes)
    )
    student = compresskit.compress(dense.eval(), method="low-rank", ratio=1.5)
    done = exported.write(checkpoint.in_memory(student), tmp_path / "out", "onnx")
    assert "token_type_ids" in done.record["inputs"]


def test_formats_are_listed_without_torch_and_without_the_extra() -> None:
    program = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('onnx', 'onnx_ir', 'onnxscript', 'onnxruntime'))\n"  # as if not there
        "from compresskit.exporting.format import FORMATS\n"
        "print(*FORMATS.all())\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == ["dense", "onnx", "onnx-int4", "onnx-int8", "openvino"]


def test_object_is_to_be_saved_first(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"give a folder that compresskit wrote, or a hub id, not a Bert.*; save it first"
    ):
        compresskit.export(student("classifier"), output=tmp_path / "out")  # type: ignore[arg-type]
