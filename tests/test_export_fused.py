"""Graphs for ONNX Runtime alone: they answer like torch, what is fused and what is not, 8 bits by error, 4 bits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
import transformers
from conftest import Run, quick, refused, tiny_model
from transformers import PreTrainedModel

import compresskit
from compresskit.decomposers.registry import METHODS
from compresskit.exporting import exported
from compresskit.exporting.agreement import example_inputs
from compresskit.exporting.formats.onnx import OnnxOptions
from compresskit.exporting.fused import rounded
from compresskit.exporting.fused.graph import fuse
from compresskit.exporting.fused.masks import Masks
from compresskit.exporting.fused.reading import Editor
from compresskit.exporting.graph import to_graph
from compresskit.exporting.int4 import rows_to_int4
from compresskit.model import checkpoint

FUSED = OnnxOptions(runtime="onnxruntime")


def student(
    head: str = "classifier", method: str = "low-rank", family: str = "bert", **changes: object
) -> PreTrainedModel:
    """A random compressed model of two layers, whose heads of 12 numbers are broader than its factors."""
    dense = tiny_model(family, head, **changes)
    return compresskit.compress(dense, method=method, ratio=4).eval()


def write(model: PreTrainedModel, folder: Path, format: str = "onnx") -> exported.Exported:
    return exported.write(checkpoint.in_memory(model), folder, format, FUSED)


def operators(folder: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx_ir.load(folder / "model.onnx").graph)


def check(model: PreTrainedModel, folder: Path, most: float = 1e-4) -> None:
    """Every output, at sizes that nothing was tried with."""
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [value.name for value in session.get_outputs()]
    for batch, length in ((1, 1), (4, 30), (3, 7)):
        inputs = example_inputs(model, batch, length)
        with torch.no_grad():
            expected = model(**inputs)
        feeds = {value.name: inputs[value.name].numpy() for value in session.get_inputs()}
        for name, values in zip(names, session.run(names, feeds), strict=True):
            assert np.abs(values - expected[name].numpy()).max() <= most, (name, batch, length)


@pytest.mark.parametrize("method", quick(METHODS.all(), "tensor-train"))
def test_every_method_computes_the_same(method: str, tmp_path: Path) -> None:
    """As masked-LM, whose tied head computes with the factors that the look-up reads."""
    model = student("masked-lm", method)
    done = write(model, tmp_path / "out")
    assert done.notes == ()
    assert (done.record["runtime"], done.record["opset"]) == ("onnxruntime", 23)
    check(model, tmp_path / "out")


@pytest.mark.parametrize("method", quick(METHODS.all(), "kronecker"))
def test_a_classifier_of_every_method_is_fused(method: str, tmp_path: Path) -> None:
    """Also where the layer before the first token is chosen is in other shapes, as a Kronecker product is."""
    model = student("classifier", method)
    assert write(model, tmp_path / "out").notes == ()
    check(model, tmp_path / "out")


@pytest.mark.parametrize("family", quick(["roberta", "distilbert", "electra", "xlm-roberta"], "distilbert"))
def test_families(family: str, tmp_path: Path) -> None:
    model = student("classifier", family=family)
    assert write(model, tmp_path / "out").notes == ()
    check(model, tmp_path / "out")
    assert operators(tmp_path / "out")["Softmax"] == 2


def test_few_factors_become_three_products_and_no_shape_is_computed_twice(tmp_path: Path) -> None:
    model = student("base")
    write(model, tmp_path / "out")
    found = operators(tmp_path / "out")
    assert found["Softmax"] == found["FusedMatMul"] == 2  # one for each layer
    assert not found.keys() & {"Transpose", "Where", "Attention"}
    assert not any(node.op_type == "Add" for node in _nodes(tmp_path / "out")[-12:])  # in the products before
    exported.write(checkpoint.in_memory(model), tmp_path / "any", "onnx")
    assert _bytes_of_weights(tmp_path / "out") <= _bytes_of_weights(tmp_path / "any")
    three = student("base", num_hidden_layers=3)
    write(three, tmp_path / "three")
    assert operators(tmp_path / "three")["Shape"] == found["Shape"]


def _bytes_of_weights(folder: Path) -> int:
    constants = onnx_ir.load(folder / "model.onnx").graph.initializers.values()
    return sum(value.const_value.nbytes for value in constants)


def _nodes(folder: Path) -> list[onnx_ir.Node]:
    return list(onnx_ir.load(folder / "model.onnx").graph)


def test_dense_attention_is_one_operator(tmp_path: Path) -> None:
    model = tiny_model("bert", "classifier").eval()
    write(model, tmp_path / "out")
    assert operators(tmp_path / "out")["Attention"] == 2
    assert not operators(tmp_path / "out")["Softmax"]
    check(model, tmp_path / "out")


def test_a_head_of_the_first_token_leaves_the_others_out(tmp_path: Path) -> None:
    for name, model in (("few", student()), ("dense", tiny_model("bert", "classifier").eval())):
        write(model, tmp_path / name)
        nodes = [node.op_type for node in _nodes(tmp_path / name)]
        # The choice of the first token stands before the last layer's feed-forward part.
        last = max(at for at, node in enumerate(_nodes(tmp_path / name)) if _takes_first(node))
        assert last < max(at for at, operator in enumerate(nodes) if operator == "Gelu")
        check(model, tmp_path / name)


def _takes_first(node: onnx_ir.Node) -> bool:
    return node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 1


def test_what_cannot_be_fused_is_written_as_it_is_and_said(tmp_path: Path) -> None:
    """MPNet adds relative positions to its scores."""
    config = transformers.MPNetConfig(
        vocab_size=99, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=40,
    )  # fmt: skip
    model = compresskit.compress(transformers.MPNetModel(config).eval(), method="low-rank", ratio=2).eval()
    done = write(model, tmp_path / "out")
    assert "not fused" in done.notes[0]
    check(model, tmp_path / "out")


@pytest.mark.parametrize(("half", "padding_alone"), [(64, False), (10_000, True)])
def test_a_mask_of_a_window_is_not_taken_for_one_of_padding(half: int, padding_alone: bool) -> None:
    """At few tokens both hide the same; ModernBERT's windows reach 64 tokens to each side."""
    mask = onnx_ir.Value(
        name="attention_mask",
        type=onnx_ir.TensorType(onnx_ir.DataType.INT64),
        shape=onnx_ir.Shape(["batch", "length"]),
    )
    graph = onnx_ir.Graph([mask], [], nodes=[], opset_imports={"": 23})
    editor = Editor(graph)

    def node(operator: str, *inputs: onnx_ir.Value, **attributes: int) -> onnx_ir.Value:
        graph.append(made := onnx_ir.node(operator, inputs, attributes))
        return made.outputs[0]

    def number(value: object) -> onnx_ir.Value:
        return editor.constant(str(value), np.array(value, np.int64), "number")

    length = node("Squeeze", node("Shape", mask, start=1))
    places = node("Range", number(0), length, number(1))
    away = node("Abs", node("Sub", node("Unsqueeze", places, number([0])), node("Unsqueeze", places, number([1]))))
    near = node("LessOrEqual", away, number(half))
    kept = node("Unsqueeze", node("Cast", mask, to=int(onnx_ir.DataType.BOOL)), number([1, 2]))
    assert Masks(editor).hides_padding(node("And", kept, near)) == padding_alone


def test_a_graph_that_fails_when_fused_stays_as_it_was() -> None:
    graph = to_graph(student("base", num_hidden_layers=1), 23)
    before = onnx_ir.to_proto(graph)
    lacking = fuse(graph, {}, {})  # nothing to try it on
    assert "left unfused" in lacking.notes[0]
    assert onnx_ir.to_proto(lacking.graph) == before


@pytest.mark.sweep
def test_multiple_choice_and_longer_questions(tmp_path: Path) -> None:
    dense = transformers.AutoModelForMultipleChoice.from_config(tiny_model(num_hidden_layers=1).config)
    model = compresskit.compress(dense, method="low-rank", ratio=4).eval()
    write(model, tmp_path / "out")
    check(model, tmp_path / "out")


def large(seed: int = 0) -> PreTrainedModel:
    """A student some of whose products are large enough to be computed with codes."""
    torch.manual_seed(seed)
    dense = tiny_model("bert", "base", hidden_size=96, intermediate_size=192, num_attention_heads=2)
    return compresskit.compress(dense, method="low-rank", ratio=1.3).eval()


def test_products_take_8_bits_by_their_error(tmp_path: Path) -> None:
    model = large()
    done = write(model, tmp_path / "out", "onnx-int8")
    products = done.record["products"]
    assert {product["kept"] for product in products} <= {"codes", "weights", "float32"}
    assert any(product["kept"] == "codes" and min(product["shape"]) >= 32 for product in products)
    assert all(product["error"] <= 0.05 for product in products if product["kept"] != "float32")
    assert any("encoder.layer.0.intermediate.dense.a" in product["name"] for product in products)
    codes = sum(product["kept"] == "codes" for product in products)
    assert operators(tmp_path / "out")["DynamicQuantizeMatMul"] == codes
    assert done.record["agreement"]["last_hidden_state"]["relative error"] < 0.1
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record == done.record


def test_a_product_whose_codes_would_err_is_computed_with_floats(tmp_path: Path) -> None:
    """A number that is always zero is multiplied by weights so large that all others would share their scale."""
    model = large()
    layer = model.encoder.layer[0]
    with torch.no_grad():
        layer.intermediate.dense.bias[0] = -1000
        layer.output.dense.b[:, 0] *= 1e5
    done = write(model, tmp_path / "out", "onnx-int8")
    kept = {product["name"]: (product["kept"], product["axis"]) for product in done.record["products"]}
    assert kept["encoder.layer.0.output.dense.b"] == ("weights", 0)
    assert kept["encoder.layer.1.output.dense.b"] == ("codes", 1)
    assert done.record["agreement"]["last_hidden_state"]["relative error"] < 0.1


def test_a_weight_whose_error_is_too_large_stays_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounded, "MOST", 0.0)
    done = write(large(), tmp_path / "out", "onnx-int8")
    assert {product["kept"] for product in done.record["products"]} == {"float32"}
    assert not operators(tmp_path / "out")["DynamicQuantizeMatMul"]


def test_codes_of_products_cannot_overflow(tmp_path: Path) -> None:
    """255 x 64 x 2 fits into 16 bits, in which processors without VNNI sum two products."""
    write(large(), tmp_path / "out", "onnx-int8")
    for node in _nodes(tmp_path / "out"):
        if node.op_type == "DynamicQuantizeMatMul":
            codes = node.inputs[1].const_value.numpy().astype(int)
            assert 255 * np.abs(codes).max() * 2 < 2**15


@pytest.mark.parametrize("format", ["onnx-int8", "onnx-int4"])
def test_numbers_beyond_what_short_scales_hold(format: str, tmp_path: Path) -> None:
    """Scales of 16 bits would be infinite."""
    model = student("base", hidden_size=96, num_hidden_layers=1)
    with torch.no_grad():
        model.embeddings.position_embeddings.weight.mul_(1e8)
        model.encoder.layer[0].output.dense.b.mul_(1e9)
    done = exported.write(checkpoint.in_memory(model), tmp_path / "out", format, FUSED)
    assert done.record["agreement"]["last_hidden_state"]["relative error"] < 0.1


def test_rows_in_4_bits(tmp_path: Path) -> None:
    model = student("base", hidden_size=96)
    done = exported.write(checkpoint.in_memory(model), tmp_path / "int4", "onnx-int4")
    exported.write(checkpoint.in_memory(model), tmp_path / "int8", "onnx-int8", FUSED)
    assert operators(tmp_path / "int4")["GatherBlockQuantized"] >= 2  # words and positions
    sizes = {name: (tmp_path / name / "model.onnx").stat().st_size for name in ("int4", "int8")}
    assert sizes["int4"] < sizes["int8"]
    assert done.record["agreement"]["last_hidden_state"]["relative error"] < 0.3


@pytest.mark.parametrize("format", ["onnx-int8", "onnx-int4"])
def test_a_table_that_a_look_up_and_a_product_read(format: str, tmp_path: Path) -> None:
    """The first factor of a tied embedding: both take the same scales."""
    done = exported.write(checkpoint.in_memory(student("masked-lm")), tmp_path / "out", format, FUSED)
    assert done.record["agreement"]["logits"]["relative error"] < 0.1


@pytest.mark.parametrize("width", [7, 16, 40, 64])
def test_4_bit_tables_read_what_was_stored(width: int) -> None:
    """Rows broader and narrower than a block, an empty row, and rows with very small numbers."""
    table = np.random.default_rng(0).standard_normal((20, width)).astype(np.float32)
    table[3] = 0
    table[4] *= 1e-7
    ids = onnx_ir.Value(name="ids", type=onnx_ir.TensorType(onnx_ir.DataType.INT64), shape=onnx_ir.Shape(["n"]))
    stored = onnx_ir.Value(name="table", const_value=onnx_ir.tensor(table, name="table"))
    nodes = [onnx_ir.node("Gather", [stored, ids])]
    nodes.append(onnx_ir.node("Identity", nodes[0].outputs))
    for node, name in zip(nodes, ("read", "rows"), strict=True):
        node.outputs[0].name = name
    nodes[1].outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    graph = onnx_ir.Graph([ids], nodes[1].outputs, nodes=nodes, initializers=[stored], opset_imports={"": 23})
    model = onnx_ir.Model(graph, ir_version=10)
    rows_to_int4(model)
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
    (rows,) = session.run(None, {"ids": np.arange(20)})
    assert np.abs(rows - table).max() <= np.abs(table).max() / 7
    assert not rows[3].any()
    assert np.linalg.norm(rows - table) < 0.15 * np.linalg.norm(table)


@pytest.mark.parametrize(("pooling", "runtime"), [("mean", "any"), ("cls", "onnxruntime")])
def test_sentence_vectors_are_an_output(pooling: str, runtime: str, tmp_path: Path) -> None:
    folder = sentence_model(tmp_path, pooling)
    if pooling == "mean":
        (folder / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
        (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "query: "}}))
    done = compresskit.export(folder, output=tmp_path / "out", runtime=runtime)
    assert done.record["outputs"][-1] == "sentence_embedding"
    before = "it puts them in lower case and puts prompts in front, which tokenizer.json alone does not"
    assert any(before in note for note in done.notes) == (pooling == "mean")
    assert done.record["agreement"]["sentence_embedding"]["largest difference"] < 1e-5
    model = compresskit.load(folder)
    inputs = example_inputs(model, 2, 9)
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].float()
    expected = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
    expected = torch.nn.functional.normalize(expected, dim=1)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    (got,) = session.run(["sentence_embedding"], {name: ids.numpy() for name, ids in inputs.items()})
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()


@pytest.mark.parametrize(
    ("file", "change"),
    [("1_Pooling/config.json", {"include_prompt": False}), ("config_sentence_transformers.json", {"truncate_dim": 8})],
)
def test_vectors_that_a_graph_does_not_hold_are_no_output(file: str, change: dict[str, object], tmp_path: Path) -> None:
    folder = sentence_model(tmp_path, "mean")
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | change))
    done = compresskit.export(folder, output=tmp_path / "out")
    assert "sentence_embedding" not in done.record["outputs"]
    assert any(note.startswith("no output sentence_embedding") for note in done.notes)


def test_the_first_token_is_no_vector_where_texts_are_padded_in_front(tmp_path: Path) -> None:
    """It would be that of the padding."""
    folder = sentence_model(tmp_path, "cls")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    for side in ("right", "left"):
        transformers.BertTokenizer(vocab=str(folder / "vocab.txt"), padding_side=side).save_pretrained(folder)
        done = compresskit.export(folder, output=tmp_path / side)
        assert ("sentence_embedding" in done.record["outputs"]) == (side == "right")


def sentence_model(folder: Path, pooling: str) -> Path:
    model = student("base", num_hidden_layers=1)
    model.save_pretrained(folder / "small")
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": at, "path": path, "type": f"sentence_transformers.models.{k}"} for at, (path, k) in enumerate(kinds)
    ]
    (folder / "small" / "modules.json").write_text(json.dumps(modules))
    (folder / "small" / "1_Pooling").mkdir()
    (folder / "small" / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": pooling}))
    return folder / "small"


def test_bad_choices(run: Run, tmp_path: Path) -> None:
    student("base", num_hidden_layers=1).save_pretrained(tmp_path / "small")
    small = tmp_path / "small"
    refused(run("export", small, "--runtime", "onnxrt"), "unknown runtime 'onnxrt': did you mean 'onnxruntime'")
    refused(run("export", small, "--runtime", "onnxruntime", "--opset", 20), "opset 20: lacks the operator", "23 to 25")
    refused(run("export", small, "--runtime", "any", "--format", "onnx-int4"), "is for runtime onnxruntime alone")
    refused(
        run("export", small, "--runtime", "any", "--format", "dense"),
        "a runtime is for the formats onnx and onnx-int4 and",
    )
