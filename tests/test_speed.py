"""What speed and memory rest on: compiled models, half precision, no dense table in a look-up, mapped checkpoints."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import quick, tiny_model, token_ids
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, PreTrainedModel

import compresskit
from compresskit.decomposers.registry import METHODS


class Largest(TorchDispatchMode):
    """The largest floating tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.size = max(self.size, tensor.numel())
        return result


class Factorised(torch.nn.Module):
    """Look-up, layers and tied head of a student: what it has of ours, without what transformers takes to compile."""

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__()
        self.embedding, self.head = student.get_input_embeddings(), student.get_output_embeddings()
        self.layers = student.base_model.encoder.layer

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer.output.dense(layer.intermediate(hidden))
        return (self.head(hidden),)


@pytest.mark.parametrize(
    ("method", "whole"),
    [
        pytest.param("low-rank", True, marks=pytest.mark.sweep),
        *(pytest.param(name, False, marks=() if name == "kronecker" else pytest.mark.sweep) for name in METHODS.all()),
    ],
)
def test_compiled_models_give_the_same_values_and_gradients(method: str, whole: bool) -> None:
    torch._dynamo.reset()
    layers = 2 if method == "tucker" else 1  # that share factors
    student = compresskit.compress(tiny_model("bert", "masked-lm", num_hidden_layers=layers), method=method, ratio=3)
    student = student if whole else Factorised(student)
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    for shape in ((3, 11), (1, 40)):
        ids = token_ids(*shape)
        logits, gradients = [], []
        for model in (student, compiled):
            student.zero_grad()
            logits.append(model(input_ids=ids)[0])
            logits[-1].square().mean().backward()
            gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
        torch.testing.assert_close(*logits)
        torch.testing.assert_close(*gradients)
    with torch.no_grad():  # where layers may take another way
        torch.testing.assert_close(compiled(input_ids=ids)[0], student(input_ids=ids)[0])


@pytest.mark.parametrize("method", list(METHODS.all()))
def test_exported_layers_take_any_batch(method: str) -> None:
    student = compresskit.compress(tiny_model(), method=method, ratio=3)
    layer = student.requires_grad_(False).encoder.layer[0].intermediate.dense.eval()
    dims = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}}
    x = torch.randn(3, 7, 48)
    exported = torch.export.export(layer, (x,), dynamic_shapes=dims).module()
    traced = torch.jit.trace(layer, x, check_trace=False)
    for shape in ((3, 7), (5, 30)):
        x = torch.randn(*shape, 48)
        torch.testing.assert_close(exported(x), layer(x))
        torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("method", list(METHODS.all()))
def test_look_up_and_tied_head_never_form_the_table(method: str) -> None:
    dense = tiny_model("bert", "masked-lm", vocab_size=4999)
    student = compresskit.compress(dense, method=method, ratio=4)
    with torch.no_grad(), Largest() as largest:
        student(input_ids=token_ids(2, 9))
    assert largest.size < 4999 * 48 / 2


@pytest.mark.parametrize("method", list(METHODS.all()))
def test_autocast_computes_in_half_precision(method: str) -> None:
    student = compresskit.compress(tiny_model(), method=method, ratio=3)
    layer = student.encoder.layer[0].intermediate.dense
    x = torch.randn(4, 7, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        y.square().mean().backward()
    torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.1)
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 0.2 GB in shards."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    model = tiny_model(vocab_size=60_000, hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    model.save_pretrained(folder, max_shard_size="40MB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("method", quick(["kronecker", "low-rank"], "kronecker"))
def test_from_shards_as_from_memory(sharded: Path, method: str) -> None:
    in_memory = AutoModel.from_pretrained(sharded)
    for parameter in in_memory.parameters():
        parameter.data = parameter.data.clone()
    expected = compresskit.compress(in_memory, method=method, ratio=8).state_dict()
    found = compresskit.compress(sharded, method=method, ratio=8).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path to 0.8 GB of BERT, far above what Python and its libraries occupy (0.3 GB) and any one tensor (0.12 GB)."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    sizes = {"vocab_size": 60_000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 54}
    tiny_model(**sizes).save_pretrained(folder, max_shard_size="40MB")
    return folder


@pytest.mark.sweep
@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
def test_memory_stays_below_the_checkpoint(deep: Path, tmp_path: Path) -> None:
    def peak(model: Path) -> int:
        line = [sys.executable, "-m", "compresskit", "compress", "--model", str(model), "--method", "low-rank"]
        line += ["--ratio", "19", "--output", str(tmp_path / f"{model.name}-out")]
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
        highest = 0
        while process.poll() is None:
            for entry in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if entry.startswith("RssAnon:"):
                    highest = max(highest, 1024 * int(entry.split()[1]))
            time.sleep(0.01)
        assert process.returncode == 0
        return highest

    assert peak(deep) < sum(file.stat().st_size for file in deep.glob("*.safetensors"))
