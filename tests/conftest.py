"""Small random models and checkpoints that the tests share. No network, no embedded checkpoint needed."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from matplotlib.figure import Figure
from safetensors.torch import load_file
from transformers import PreTrainedModel

import compresskit
from compresskit import cli
from compresskit.benchmark.runner import BenchResult
from compresskit.errors import InputError
from compresskit.model import checkpoint, demo

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


#: Files that take longest, the longest first. Begun first, they leave no process idle at the end; the others follow in
#: alphabetical order (`--no-loadscope-reorder` in the Makefile keeps this one).
_LONGEST = (
    "test_export_fused", "test_documents", "test_bench_grids", "test_planning", "test_families", "test_export",
    "test_trimming", "test_rivals", "test_checkpoint", "test_cli", "test_bench", "test_training_resume",
    "test_plugin_packages", "test_disks", "test_bench_exports", "test_bad_input", "test_shrink", "test_speed",
    "test_decomposers", "test_predict",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(autouse=True, scope="module")
def _little_to_collect() -> None:
    """What is imported stays: every training looks for garbage, and would go through all of it for 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _few_pictures() -> Iterator[None]:
    """Trainings draw their losses, benchmarks their quality: a quarter of what their tests cost. So each kind is drawn
    once, coarsely; later files of that kind are copies.
    """
    save = Figure.savefig
    drawn: dict[str, bytes] = {}

    def once(figure: Figure, to: Path, *, dpi: int) -> None:
        kind = to.stem.partition("-")[0]
        if kind in drawn:
            to.write_bytes(drawn[kind])
        else:
            save(figure, to, dpi=dpi / 4)
            drawn[kind] = to.read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", once)
        yield


@pytest.fixture(autouse=True, scope="session")
def _few_traces() -> Iterator[None]:
    """Tracing takes most of an export's time; what has the same class, configuration and weights is traced once."""
    try:
        import onnx_ir

        from compresskit.exporting import graph
    except ImportError:  # without the extra nothing is exported
        yield
        return
    trace = graph.to_graph
    traced: dict[str, Any] = {}

    def once(model: PreTrainedModel, opset: int) -> Any:
        config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
        digest = hashlib.sha256(repr((type(model), opset, config)).encode())
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().numpy().tobytes())
        key = digest.hexdigest()
        if key not in traced:
            traced[key] = onnx_ir.to_proto(trace(model, opset))
        return onnx_ir.from_proto(traced[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "to_graph", once)
        yield


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
    "questions": transformers.AutoModelForQuestionAnswering,
    "tokens": transformers.AutoModelForTokenClassification,
}


def quick(names: Iterable[str], *chosen: str) -> list[Any]:
    """Parameters of a test: those that are not ``chosen`` are left to `make test-slow`."""
    return [pytest.param(name, marks=() if name in chosen else pytest.mark.sweep) for name in names]


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


def every_pair(*columns: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Rows of one value a column, in which each value meets each value of every other of the three columns.

    Half a second for each family, head and method adds up: all combinations take two to four times as long.
    """
    values = [list(column) for column in columns]
    assert len(values) == 3
    short, *long = sorted(range(len(values)), key=lambda number: len(values[number]))
    rows = []
    for places in itertools.product(*(range(len(values[number])) for number in long)):
        row = {number: values[number][place] for number, place in zip(long, places, strict=True)}
        row[short] = values[short][sum(places) % len(values[short])]
        rows.append(tuple(row[number] for number in range(len(values))))
    return rows


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


POSITIVE, NEGATIVE = ["good", "great", "fine", "nice"], ["bad", "awful", "poor", "ugly"]
FILLERS = ["the", "of", "film", "movie", "plot", "actor", "was", "is", "very", "not", "so", "and", "but", "it", "one"]


def vocabulary() -> list[str]:
    """499 tokens: words, letters and word pieces, so that no text is unknown."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *POSITIVE, *NEGATIVE, *FILLERS, *letters]
    tokens += [f"##{letter}" for letter in letters]
    return [*tokens, *(f"unused{i}" for i in range(499 - len(tokens)))]


@pytest.fixture
def tokenizer(tmp_path: Path) -> transformers.BertTokenizer:
    """One that reads words and pieces of :func:`vocabulary`."""
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary()), encoding="utf-8")
    return transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt"))


def reviews(rows: int, seed: int) -> list[tuple[str, str]]:
    """(text, label) where one word of the text decides the label."""
    chance = random.Random(seed)
    found = []
    for _ in range(rows):
        label = chance.randint(0, 1)
        words = [chance.choice(FILLERS) for _ in range(chance.randint(2, 20))]
        words.insert(chance.randrange(len(words) + 1), chance.choice(POSITIVE if label else NEGATIVE))
        found.append((" ".join(words), str(label)))
    return found


def write_tsv(path: Path, header: str, rows: list[tuple[str, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *("\t".join(row) for row in rows)]) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def bench_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once: ``model`` (a tiny BERT with a tokenizer), ``data`` (sst2 in GLUE's layout), ``text.txt``, ``student``
    (the model, 3x smaller), ``teacher`` (the model fine-tuned on sst2).
    """
    root = tmp_path_factory.mktemp("bench")
    model = root / "model"
    tiny_model().save_pretrained(model)
    (model / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
    transformers.BertTokenizer(vocab=str(model / "vocab.txt")).save_pretrained(model)
    write_tsv(root / "data" / "SST-2" / "train.tsv", "sentence\tlabel", reviews(400, seed=0))
    write_tsv(root / "data" / "SST-2" / "dev.tsv", "sentence\tlabel", reviews(80, seed=1))
    documents = [" ".join(text for text, _ in reviews(12, seed=seed)) for seed in range(2, 42)]
    (root / "text.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    compresskit.compress(model, method="low-rank", ratio=3).save_pretrained(root / "student")
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / file, root / "student" / file)
    made = compresskit.finetune(
        model,
        task="sst2",
        data=root / "data",
        output=root / "teacher",
        max_length=32,
        learning_rate=3e-3,
        epochs=6,
        device="cpu",
    )
    assert made.record["scores"]["student_after"]["dev"]["accuracy"] > 0.9
    return root


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(left: Path, right: Path) -> bool:
    ours, theirs = weights(left), weights(right)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


#: Of a benchmark in tests; the tiny model has 40 positions.
BUDGET = {"max_tokens": 3000, "max_length": 32, "learning_rate": 2e-3}


def tiny_bench(root: Path, output: Path, **changes: Any) -> BenchResult:
    """Low rank at 3x on the model and text of ``bench_folder``, unless ``changes`` say otherwise."""
    grid = {"methods": ("low-rank",), "ratios": (3.0,), "baselines": ("dense",), "latency_rounds": 1}
    grid |= {"models": (str(root / "model"),), "text": str(root / "text.txt"), "general": BUDGET}
    return compresskit.bench(output=output, **(grid | changes))


@pytest.fixture(scope="session")
def masked_lm(bench_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a masked-LM ``teacher`` and its ``student``."""
    root = tmp_path_factory.mktemp("mlm")
    tiny_model(head="masked-lm").save_pretrained(root / "teacher")
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bench_folder / "model" / file, root / "teacher" / file)
    compresskit.compress(root / "teacher", method="kronecker", ratio=2).save_pretrained(root / "student")
    return root


@pytest.fixture(scope="session")
def embedded() -> Path:
    """The folder of the embedded checkpoint."""
    try:
        return demo.folder()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def small_sentence(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint, 2x smaller, with everything that was beside its weights."""
    folder = tmp_path_factory.mktemp("sentence")
    student = compresskit.compress(embedded, method="low-rank", ratio=2)
    checkpoint.save(checkpoint.Checkpoint(demo.NAME, demo.ORIGIN, embedded, student), folder)
    return folder


#: What a sentence-transformers module's type begins with.
MODULES = "sentence_transformers.models."


def sentence_folder(
    model: Path,
    folder: Path,
    pooling: dict[str, Any] | None = None,
    behind: tuple[str, ...] = (),
    encoder: dict[str, Any] | None = None,
    general: dict[str, Any] | None = None,
) -> Path:
    """A copy of ``model`` as a sentence-transformers folder."""
    shutil.copytree(model, folder)
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), *((n, f"{i}_{n}") for i, n in enumerate(behind, 2))]
    listed = [{"idx": i, "name": str(i), "path": p, "type": MODULES + n} for i, (n, p) in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(listed))
    for _, path in modules[1:]:
        (folder / path).mkdir()
    config = pooling or {"word_embedding_dimension": 48, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    (folder / "sentence_bert_config.json").write_text(json.dumps(encoder or {}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(general or {}))
    return folder


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
