"""Small random models and checkpoints that the tests share. No network, no embedded checkpoint needed."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import compresskit  # noqa: F401  (registers with transformers)
from compresskit import cli
from compresskit.data import demo
from compresskit.errors import InputError

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

FAMILIES = {
    "bert": transformers.BertConfig,
    "roberta": transformers.RobertaConfig,
    "distilbert": transformers.DistilBertConfig,
    "xlm-roberta": transformers.XLMRobertaConfig,
    "electra": transformers.ElectraConfig,
}
HEADS = {
    "base": transformers.AutoModel,
    "classifier": transformers.AutoModelForSequenceClassification,
    "masked-lm": transformers.AutoModelForMaskedLM,
}


def tiny_model(family: str = "bert", head: str = "base", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model with two layers; 499 words, a prime number, as in real vocabularies."""
    sizes = {"vocab_size": 499, "max_position_embeddings": 40}
    if family == "distilbert":
        sizes |= {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96}
    else:
        sizes |= {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    if family == "electra":
        sizes["embedding_size"] = 24  # smaller than the hidden size, as in the real ones
    torch.manual_seed(seed)
    model = HEADS[head].from_config(FAMILIES[family](**(sizes | changes))).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases start as zeros, which would hide a lost one
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def token_ids(batch: int = 3, length: int = 11, vocabulary: int = 499) -> torch.Tensor:
    return torch.randint(5, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def outputs(model: PreTrainedModel, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids() if ids is None else ids)[0]


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A dense checkpoint on disk."""
    folder = tmp_path / "tiny-bert"
    tiny_model().save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def embedded() -> Path:
    """The folder of the embedded checkpoint."""
    try:
        return demo.folder()
    except InputError as error:
        pytest.skip(str(error))


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """The command in this process, in an empty working folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["compresskit", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def refused(result: Result, *words: str, code: int = 2) -> None:
    """Exit code, one line, the words in it, nothing written."""
    assert result.code == code, result
    lines = [line for line in result.err.splitlines() if line.strip()]
    assert len([line for line in lines if "rror" in line]) == 1
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err
    assert list(Path.cwd().iterdir()) == []
