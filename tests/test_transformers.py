"""transformers' own tools on a compressed model: pipelines, shards, device maps, dtypes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny_model, token_ids
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, pipeline

import compresskit
from compresskit.decomposers import FactorisedEmbedding
from compresskit.decomposers.registry import METHODS

TEXT = "the film was good"

#: Class, changes of the configuration, what the pipeline is called with.
PIPELINES = {
    "feature-extraction": ("AutoModel", {}, {}),
    "text-classification": ("AutoModelForSequenceClassification", {}, {}),
    "token-classification": ("AutoModelForTokenClassification", {}, {}),
    "fill-mask": ("AutoModelForMaskedLM", {}, {}),
    "zero-shot-classification": (
        "AutoModelForSequenceClassification",
        {"id2label": {0: "entailment", 1: "other"}, "label2id": {"entailment": 0, "other": 1}},
        {"candidate_labels": ["film", "plot"]},
    ),
}


@pytest.mark.parametrize("task", PIPELINES)
def test_pipelines_read_a_compressed_folder(task: str, bench_folder: Path, tmp_path: Path) -> None:
    """And answer as they do with the model in memory, which was checked elsewhere."""
    kind, changes, asked = PIPELINES[task]
    config = tiny_model().config
    config.update(changes)
    student = compresskit.compress(getattr(transformers, kind).from_config(config), method="kronecker", ratio=2).eval()
    student.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
    tokenizer.save_pretrained(tmp_path)
    text = f"{TEXT} [MASK]" if task == "fill-mask" else TEXT
    loaded = pipeline(task, model=str(tmp_path), device="cpu")
    assert isinstance(loaded.model.get_input_embeddings(), FactorisedEmbedding)
    answer = loaded(text, **asked)
    assert answer
    assert answer == pipeline(task, model=student, tokenizer=tokenizer, device="cpu")(text, **asked)


def hidden(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids())[0].float()


@pytest.fixture(params=list(METHODS.all()))
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A compressed folder in several files, and what its model computes."""
    student = compresskit.compress(tiny_model(), method=request.param, ratio=2).eval()
    student.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    return tmp_path, hidden(student)


def test_shards_device_map_and_dtypes(shards: tuple[Path, torch.Tensor]) -> None:
    folder, expected = shards
    for device_map in ("cpu", {"": "cpu"}):
        torch.testing.assert_close(hidden(AutoModel.from_pretrained(folder, device_map=device_map)), expected)
    for dtype in (torch.bfloat16, torch.float16):
        model = AutoModel.from_pretrained(folder, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        torch.testing.assert_close(hidden(model), expected, rtol=0.1, atol=0.05)
    model = AutoModel.from_pretrained(folder)
    torch.testing.assert_close(hidden(model.half()), expected, rtol=0.1, atol=0.05)
    assert model.float().dtype == torch.float32
