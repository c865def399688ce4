"""benchmarks/ablation.py and the ideas beside it: what is trained, what an idea leaves behind (nothing), the report."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import outputs, tiny_model, token_ids
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import compresskit
from compresskit import api
from compresskit.model import demo
from compresskit.planning.stage import DEFAULTS
from compresskit.training import losses
from compresskit.training.attention import SCORES
from compresskit.training.settings import with_settings
from compresskit.training.trainer import DistillationTrainer

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
NAMES = ("all of it", "matrices counted alike", "relations for attention scores", "factors twice as fast")


@pytest.fixture
def ablation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bench_folder: Path) -> Any:
    """The program, made short."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import ablation

    short = {name: replace(variant, training={"max_length": 32}) for name, variant in ablation.VARIANTS.items()}
    for name, value in {"OUTPUT": tmp_path, "RATIO": 3, "EPOCHS": {"sst2": 0.2}, "VARIANTS": short}.items():
        monkeypatch.setattr(ablation, name, value)
    monkeypatch.setattr(api, "TOKENS", 1000)
    arguments = ["ablation.py", "--task", "sst2", "--teacher", str(bench_folder / "teacher"), "--threads", "1"]
    arguments += ["--data", str(bench_folder / "data"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", arguments + [word for name in NAMES for word in ("--only", name)])
    return ablation


def test_records_and_report(ablation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    plain = ALL_ATTENTION_FUNCTIONS[SCORES], losses.attention_loss
    rates: list[list[float]] = []
    train = DistillationTrainer.train

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        result = train(self, *arguments, **options)
        rates.append([group["initial_lr"] for group in self.optimizer.param_groups if group["params"]])
        return result

    monkeypatch.setattr(DistillationTrainer, "train", watched)
    ablation.main()
    assert len(capsys.readouterr().out.splitlines()) == len(NAMES)
    assert rates == [[5e-4, 5e-4]] * 3 + [[5e-4, 5e-4, 1e-3]]
    assert (ALL_ATTENTION_FUNCTIONS[SCORES], losses.attention_loss) == plain
    found = {record["variant"]: record for record in map(json.loads, (p.read_text() for p in tmp_path.glob("*.json")))}
    assert [found[name]["weighed"] for name in NAMES] == [True, False, True, True]
    assert [found[name].get("idea") for name in NAMES] == [None, None, "relations", "factors twice as fast"]
    before = [found[name]["student"]["sha256"] for name in NAMES]
    assert before[0] == before[2] == before[3] != before[1]  # ideas of training leave the cut alone
    ablation.main()
    assert capsys.readouterr().out == ""  # nothing is made again
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert all(f"| {name} | 1 |" in text for name in NAMES)


def test_settings_of_every_row() -> None:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import ablation
    finally:
        sys.path.remove(str(BENCHMARKS))
    settings = {name: ablation.asked(name, "mrpc", 0)["training"] for name in ablation.VARIANTS}
    stages = {name: with_settings(DEFAULTS["task"], training) for name, training in settings.items()}
    plain = stages["all of it"]
    changed = {name: {k for k, v in stage if v != getattr(plain, k)} for name, stage in stages.items()}
    assert {name for name in changed if changed[name]} == {name for name, r in ablation.VARIANTS.items() if r.training}
    assert stages["labels alone"].losses == dict.fromkeys(plain.losses, 0.0) | {"supervised": 1.0}
    assert stages["no attention loss"].losses == {**plain.losses, "attention": 0.0}
    assert (stages["batches of 32"].batch_size, stages["temperature 2"].temperature) == (32, 2)


def test_students_of_a_grid_are_rows(
    ablation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    report = BENCHMARKS.parent / "reports" / "glue-minilm"
    monkeypatch.setattr(ablation, "RATIO", 19)
    ablation.take(report, "mrpc")
    said = capsys.readouterr().out
    assert "all-MiniLM-L6-v2-auto-19x-mrpc-seed0" in said  # the rows of these tests are of 32 tokens
    assert not list(tmp_path.glob("*.json"))
    monkeypatch.setattr(ablation, "VARIANTS", {**ablation._TODAY})
    ablation.take(report, "mrpc")
    taken = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    rows = ("all-of-it", "low-rank", "group-reduce", "kronecker")
    assert taken.keys() == {f"mrpc-{row}-seed{seed}.json" for row in rows for seed in range(3)}
    for record in taken.values():
        cell = json.loads((report / "cells" / record["cell"] / "record.json").read_text())
        assert record["scores"]["student_after"]["dev"]["f1"] == cell["score"]
        assert record["scores"]["teacher"]["dev"]["f1"] == cell["score_teacher"]
        assert (record["seed"], record["method"], cell["ratio_asked"]) == (cell["seed"], cell["method"], 19)
        assert cell["made_by"]["calibration"]["weighed_by"] == "predictions"
    ablation.write_report()
    auto = [r["scores"]["student_after"]["dev"]["f1"] for r in taken.values() if r["variant"] == "all of it"]
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"| {100 * sum(auto) / len(auto):.2f} ± " in text


def test_cuts(ablation: Any, bench_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each field of a row changes."""
    monkeypatch.setattr(demo, "folder", lambda: bench_folder / "model")
    known = {}
    for name, variant in {
        "uniform": ablation.Variant("low-rank", "uniform", weighed=False),
        "weights": ablation.Variant("low-rank", "uniform", calibrated=False, weighed=False),
        "checkpoint": ablation.Variant(start="checkpoint", weighed=False),
        "low-rank": ablation.Variant("low-rank", "error"),
        "one-sided": ablation.Variant("low-rank", "error", idea="one-sided"),
        "much of the embedding": ablation.Variant("low-rank", "error", embedding=1000),
    }.items():
        ablation.cut(variant, bench_folder / "teacher", "sst2", bench_folder / "data", tmp_path / name)
        known[name] = compresskit.load(tmp_path / name)
    table = "embeddings.word_embeddings"
    ids = token_ids(4)
    assert known["much of the embedding"].get_submodule(f"bert.{table}").a.numel() > (
        known["low-rank"].get_submodule(f"bert.{table}").a.numel()
    )
    assert not hasattr(known["checkpoint"], "classifier")
    fitted, plain = (known[name].state_dict() for name in ("uniform", "weights"))
    assert {name: tensor.shape for name, tensor in fitted.items()} == {name: t.shape for name, t in plain.items()}
    assert any(not torch.allclose(fitted[name], plain[name], atol=1e-2) for name in fitted)
    torch.testing.assert_close(outputs(known["one-sided"], ids), outputs(known["low-rank"], ids), rtol=1e-4, atol=1e-5)
    assert ablation.blocks._WORDS_WEIGHED != 1000


def test_ideas_about_factors(ablation: Any) -> None:
    teacher = tiny_model()
    ids = token_ids(40)
    rows = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)]

    small = compresskit.compress(tiny_model(), method="low-rank", ratio=3)
    small.embeddings = copy.deepcopy(teacher.embeddings)  # whose error would hide that of the layers
    start, wanted = outputs(small, ids), outputs(teacher, ids)
    ablation.ideas.one_sided(small, teacher, rows)
    layer = small.encoder.layer[0].output.dense
    torch.testing.assert_close(layer.a.norm(dim=0), torch.ones(layer.a.shape[1]))
    torch.testing.assert_close(outputs(small, ids), start, rtol=1e-4, atol=1e-5)
    ablation.ideas.layer_by_layer(small, teacher, rows)
    assert (outputs(small, ids) - wanted).norm() < 0.95 * (start - wanted).norm()


def test_relations_compare_the_last_layer(ablation: Any) -> None:
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    one, other = torch.randn(2, 2, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    with ablation.ideas.relations():
        assert losses.attention_loss([one, other], [other, other], mask, 13) == 0
        loss = losses.attention_loss([other], [one], mask, 13)
    ours, theirs = (x.masked_fill(mask[:, None, None] == 0, -1e9).softmax(-1).clamp_min(1e-30) for x in (other, one))
    rows = (theirs * (theirs / ours).log()).sum(-1).movedim(1, -1)[mask.bool()]
    torch.testing.assert_close(loss, rows.mean())
