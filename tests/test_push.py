"""Publishing on the hub, against a server in this process that answers its HTTP calls."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Result, Run, outputs, refused, tiny_model
from huggingface_hub import HfApi, constants

import compresskit
from compresskit.folders import publish
from compresskit.model import checkpoint


class Hub(ThreadingHTTPServer):
    """Stands in for the hub: repositories are made, every file is committed inline."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: list[dict] = []
        self.commits: list[dict[str, bytes]] = []
        self.tokens: set[str] = set()
        self.refuses = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization", ""))
        if self.server.refuses:
            self._answer({"error": "You don't have the rights to create a model under this namespace"}, 403)
        elif self.path == "/api/repos/create":
            self.server.repositories.append(json.loads(body))
            name = f"owner/{json.loads(body)['name']}"
            self._answer({"url": f"{self.server.address}/{name}", "id": name})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        else:
            assert "/commit/" in self.path, self.path
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.server.commits.append({file["path"]: base64.b64decode(file["content"]) for file in files})
            self._answer({"commitUrl": f"{self.server.address}/owner/small/commit/abc", "commitOid": "abc"})

    def do_GET(self) -> None:
        self._answer({"siblings": [], "sha": "0" * 40, "id": "owner/small"})

    def _answer(self, data: dict, code: int = 200) -> None:
        text = json.dumps(data).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(server: Hub) -> Iterator[Hub]:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub()) as server:
        yield server


@pytest.fixture
def small(run: Run, tmp_path: Path) -> Path:
    """A compressed folder with its card, and a sentence-transformers module."""
    dense = tmp_path / "dense"
    tiny_model().save_pretrained(dense)
    (dense / "1_Pooling").mkdir()
    (dense / "1_Pooling" / "config.json").write_text("{}")
    (dense / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    folder = tmp_path / "small"
    result = run("compress", "--model", dense, "--method", "low-rank", "--ratio", 3, "--output", folder)
    assert result.code == 0, result.err
    return folder


def push(hub: Hub, run: Run, *arguments: object) -> Result:
    """The command; the hub's address and mode are what its library reads from the environment when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", hub.address)
        patch.setattr(publish, "HfApi", partial(HfApi, endpoint=hub.address))
        patch.setenv("HF_TOKEN", "hf_secret")
        return run("push", *arguments)


def test_push(hub: Hub, run: Run, small: Path) -> None:
    (small / "notes.txt").write_text("mine")
    stage = {
        "finished": "2026-01-02T03:04:05+00:00",
        "stage": "task",
        "steps": 1,
        "tokens": 1,
        "seed": 0,
        "epochs": 1.0,
        "batch_size": 1,
        "learning_rate": 1.0,
        "losses": {},
        "data": {
            "task": {"name": "sst2", "hub": {"path": "nyu-mll/glue", "name": "sst2"}},
            "splits": {"dev": {"remark": ""}, "other": {"remark": "sample"}},
        },
        "primary_metric": "accuracy",
        "scores": {"student_after": {"dev": {"accuracy": 0.845183}, "other": {"accuracy": 0.5}}},
    }
    (small / "training.json").write_text(json.dumps({"format_version": 1, "stages": [stage]}))
    done = push(hub, run, small, "small", "--private")
    assert done.code == 0, done.err
    assert "Pushed: " in done.out
    assert hub.tokens == {"Bearer hf_secret"}
    (made,) = hub.repositories
    assert made["name"] == "small"
    assert made.get("visibility") == "private" or made.get("private") is True  # huggingface_hub 2, 1
    (files,) = hub.commits  # one commit: nothing half-written
    ours = {path.relative_to(small).as_posix() for path in small.rglob("*") if path.is_file()} - {"notes.txt"}
    assert files.keys() == ours | {".eval_results/compresskit.yaml"}
    for name in ("model.safetensors", "config.json"):  # without --auto-map nothing of it is there
        assert files[name] == (small / name).read_bytes()
    card = files["README.md"].decode()
    assert 'model = SentenceTransformer("owner/small")' in card
    assert "library_name: sentence-transformers" in card
    assert yaml.safe_load(files[".eval_results/compresskit.yaml"]) == [
        {
            "dataset": {"id": "nyu-mll/glue", "task_id": "sst2"},
            "value": 0.8452,
            "date": "2026-01-02T03:04:05+00:00",
            "notes": "accuracy, dev split",
        }
    ]


TRUSTING = """
import json, sys
from transformers import AutoModel, AutoModelForSequenceClassification
assert "compresskit" not in sys.modules
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "compresskit" in sys.modules
import torch
with torch.no_grad():
    logits = model(input_ids=torch.arange(5, 16)[None]).logits[0].tolist()
model.save_pretrained(sys.argv[2])
encoder = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps([type(model).__name__, type(encoder.embeddings.word_embeddings).__name__, logits]))
"""


def trust(folder: Path, output: Path, cache: Path) -> list:
    """Load a folder in a process that does not import compresskit itself; class, class of its table, logits."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache)}
    line = [sys.executable, "-c", TRUSTING, str(folder), str(output)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.sweep
def test_auto_map_loads_without_an_import(hub: Hub, run: Run, tmp_path: Path) -> None:
    tiny_model(head="classifier").save_pretrained(tmp_path / "dense")
    arguments = ("--model", tmp_path / "dense", "--method", "tucker", "--ratio", 2, "--output", tmp_path / "small")
    assert run("compress", *arguments).code == 0
    done = push(hub, run, tmp_path / "small", "small", "--auto-map")
    assert done.code == 0, done.err
    pushed = tmp_path / "pushed"
    for name, content in hub.commits[0].items():
        (pushed / name).parent.mkdir(parents=True, exist_ok=True)
        (pushed / name).write_bytes(content)
    code = (pushed / "modeling_compresskit.py").read_text()
    assert "import compresskit" in code
    assert len(code.splitlines()) < 15
    ids = torch.arange(5, 16)[None]
    expected = outputs(compresskit.load(tmp_path / "small"), ids)[0].tolist()
    kind, table, logits = trust(pushed, tmp_path / "saved", tmp_path / "cache")
    assert kind == "BertForSequenceClassification"
    assert table != "Embedding"
    assert logits == pytest.approx(expected, abs=1e-6)
    assert trust(tmp_path / "saved", tmp_path / "again", tmp_path / "cache")[2] == logits  # what it saves loads so too
    # Reading it here runs no code of the folder, and what is made from it does not ask for the file.
    read = checkpoint.read(pushed, compressed=True)
    assert not hasattr(read.model.config, "auto_map")
    assert type(read.model).__module__.startswith("transformers.")


def test_refusals_of_the_hub_are_one_line(hub: Hub, run: Run, small: Path) -> None:
    hub.refuses = True
    refused(push(hub, run, small, "other/small"), "repository other/small: the hub refuses", code=1)
    assert hub.commits == []


def test_refused_before_anything_is_sent(
    run: Run, small: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    refused(run("push", small, "a/b/c"), "repository 'a/b/c': give name or owner/name")
    refused(run("push", small, "has spaces"), "give name or owner/name")
    refused(run("push", tiny_folder, "small"), "is not compressed")
    refused(run("push", small.parent / "nowhere", "small"), "no such folder")
    result = run("push", small, "owner/small")  # offline, as all tests are
    assert result.code == 1
    assert "the hub cannot be reached" in result.err
    (small / "README.md").unlink()
    refused(run("push", small, "small"), "has no model card")
    shutil.copy(tiny_folder / "config.json", small / "README.md")
    monkeypatch.setattr("compresskit.folders.publish.get_token", lambda: None)
    refused(run("push", small, "small"), "no token for the hub: log in with `hf auth login`, or set HF_TOKEN")
