"""What speed rests on: compiled models, in-place additions that gradients survive, no dense table in a look-up."""

from __future__ import annotations

import pytest
import torch
from conftest import count, tiny_model, token_ids
from torch.utils._python_dispatch import TorchDispatchMode

import compresskit
from compresskit.decomposers.registry import decomposers


class Largest(TorchDispatchMode):
    """The largest floating tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.size = max(self.size, tensor.numel())
        return result


@pytest.mark.parametrize("method", list(decomposers()))
def test_compiled_models_give_the_same_values_and_gradients(method: str) -> None:
    torch._dynamo.reset()
    student = compresskit.compress(tiny_model("bert", "masked-lm"), method=method, ratio=3)
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    for shape in ((3, 11), (1, 40)):
        ids = token_ids(*shape)
        with torch.no_grad():
            torch.testing.assert_close(compiled(input_ids=ids).logits, student(input_ids=ids).logits)
        gradients = []
        for model in (student, compiled):
            student.zero_grad()
            model(input_ids=ids).logits.square().mean().backward()
            gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("method", list(decomposers()))
def test_look_up_and_tied_head_never_form_the_table(method: str) -> None:
    dense = tiny_model("bert", "masked-lm", vocab_size=4999)
    student = compresskit.compress(dense, method=method, ratio=4)
    with torch.no_grad(), Largest() as largest:
        student(input_ids=token_ids(2, 9))
    assert largest.size < 4999 * 48 / 2 < count(dense)


@pytest.mark.parametrize("method", list(decomposers()))
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
