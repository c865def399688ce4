"""A narrower student: which widths it gets, what is kept, that it is an ordinary checkpoint, and how it learns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    BUDGET,
    Run,
    count,
    outputs,
    quick,
    refused,
    same,
    sentence_folder,
    tiny_bench,
    tiny_model,
    weights,
    write_tsv,
)
from datasets import Dataset
from families import FAMILIES
from faults.command import finish, start_ranks
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel, TrainerCallback

import compresskit
from compresskit import InputError
from compresskit.benchmark.baselines.base import Asked
from compresskit.benchmark.baselines.narrower import Narrower
from compresskit.benchmark.runner import BenchResult
from compresskit.errors import UnreachableError
from compresskit.model import checkpoint as checkpoints
from compresskit.model.width import Anatomy, Widths

#: Families of which it cannot be told what lies along their dimensions, each with a word of the reason.
NOT_CUT = {
    "convbert": "query is 16x32",
    "embedding_gemma2": "k_proj is",
    "flaubert": "0 matrices of role attention",
    "fnet": "0 matrices of role attention",
    "gemma3 (bidirectional)": "k_proj is",
    "lilt": "layout_query is",
    "longt5 encoder": "0 matrices of role attention",
    "markuplm": "0 matrices of role attention",
    "mobilebert": "query is 16x16",
    "mt5 encoder": "0 matrices of role attention",
    "roc_bert": "in a way that is not known",
    "squeezebert": "0 matrices of role attention",
    "switch_transformers encoder": "0 matrices of role attention",
    "t5 encoder": "0 matrices of role attention",
    "umt5 encoder": "0 matrices of role attention",
    "xlm": "0 matrices of role attention",
    "xlnet": "0 matrices of role attention",
    "xmod": "output.dense is 32x64",
    **dict.fromkeys(
        ("deberta", "esmc", "eurobert", "funnel", "layoutlmv3", "siglip text", "siglip2 text", "ultrabert"),
        "its outputs change",
    ),
}


def find(result: BenchResult) -> Any:
    return next(record for record in result.records if record.method == "narrower")


def narrow(folder: Path, to: Path, ratio: float = 2.0) -> Path:
    """The narrower model of a folder, untrained."""
    checkpoints.save(Narrower().make(checkpoints.read(folder), Asked("", ratio)).checkpoint, to)
    return to


@pytest.mark.sweep
def test_without_labels(bench_folder: Path, tmp_path: Path) -> None:
    result = tiny_bench(bench_folder, tmp_path / "out", baselines=("narrower",), ratios=(2.0,), exports=("onnx",))
    made = find(result)
    assert (made.status, made.message) == ("finished", "")
    assert made.made_by.facts == {"hidden": "24 of 48", "ffn": "96 of 96", "heads": "2 of 4"}
    assert made.made_by.calibration.tokens > 0
    assert made.made_by.calibration.text.part == "training"
    assert made.score > made.score_before
    assert set(made.scores) >= {"sentence similarity", "hidden error", "retrieval"}
    assert made.exports["onnx"].score == pytest.approx(made.score, abs=1e-3)
    (folder,) = (tmp_path / "out" / "cells").glob("model-narrower-2x-*/model")
    plain = AutoModel.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert [config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")] == [24, 96, 2]
    assert torch.equal(outputs(plain.eval()), outputs(checkpoints.read(folder, compressed=None).model))
    assert made.parameters == count(plain)
    assert made.ratio == count(tiny_model()) / count(plain) >= 2.0
    assert not any("projection" in name for name in weights(folder))
    (stage,) = json.loads((folder / "training.json").read_text())["stages"]
    assert "hidden states of 24 numbers are compared with the teacher's of 48 through linear maps, which are" in str(
        stage["notes"]
    )
    assert (
        "- narrower: hidden size 24 of 48, 96 of 96 FFN units and 2 of 4 heads of model, those that matter most"
        in (result.folder / "README.md").read_text()
    )


@pytest.mark.parametrize("start", quick(["checkpoint", "teacher"], "teacher"))
def test_on_a_task(bench_folder: Path, tmp_path: Path, start: str) -> None:
    stage = {"epochs": 6, "max_length": 32, "learning_rate": 3e-3}
    result = tiny_bench(
        bench_folder,
        tmp_path / "out",
        tasks=("sst2",),
        data=str(bench_folder / "data"),
        baselines=("narrower",),
        ratios=(2.0,),
        students_from=start,
        general=False,
        teacher=stage,
        task=stage,
    )
    made = find(result)
    assert (made.status, made.message) == ("finished", "")
    assert made.score > 0.9
    assert made.made_by.calibration.text.task == ("sst2" if start == "teacher" else None)
    assert set(made.made_by.task_stage.losses) == {"embedding", "hidden", "logits", "supervised"}
    (folder,) = (tmp_path / "out" / "cells").glob("model-narrower-2x-*/model")
    (record,) = json.loads((folder / "training.json").read_text())["stages"]
    assert "loss attention is left out: the teacher has 4 attention heads, the student 2" in record["notes"]
    new = "not in the student, whose width is not the teacher's, so initialised at random: classifier.bias"
    assert any(new in note for note in record["notes"]) == (start == "checkpoint")
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert torch.equal(outputs(plain), outputs(checkpoints.read(folder, compressed=None).model))
    again = compresskit.evaluate(folder, task="sst2", data=bench_folder / "data", max_length=32).record["scores"]
    assert made.scores == again


def test_where_vectors_are_compared(bench_folder: Path, tmp_path: Path) -> None:
    """The map to the teacher's length is a module of the folder: it counts, in parameters and in MB."""
    sentence_folder(bench_folder / "model", tmp_path / "model", behind=("Normalize",))
    (tmp_path / "near.yaml").write_text(
        "version: 1\nname: near\nkind: similarity\ninputs: [one, two]\nlabel: score\n"
        "files: {dev: rows.tsv}\nmetrics: [spearman]\n"
    )
    rows = [(a, b, str(float(a[0] == b[0]))) for a in ("good", "great", "bad") for b in ("good", "bad", "plot")]
    write_tsv(tmp_path / "rows.tsv", "one\ttwo\tscore", rows)
    shutil.copy(bench_folder / "text.txt", tmp_path)
    result = tiny_bench(
        tmp_path,
        tmp_path / "out",
        tasks=(str(tmp_path / "near.yaml"),),
        data=str(tmp_path),
        unit=("sentence",),
        baselines=("narrower",),
        ratios=(2.0,),
        general={"max_steps": 4, "max_length": 32},
    )
    made = find(result)
    assert (made.status, made.message) == ("finished", "")
    (folder,) = (tmp_path / "out" / "cells").glob("model-narrower-2x-*/model")
    behind = load_file(folder / "3_Dense" / "model.safetensors")["linear.weight"]
    assert behind.shape == (48, 24)
    assert made.parameters == count(AutoModel.from_pretrained(folder)) + behind.numel()
    sizes = [path.stat().st_size for path in folder.rglob("model.safetensors")]
    assert made.megabytes == sum(sizes) / 1e6
    assert json.loads((folder / "1_Pooling" / "config.json").read_text())["word_embedding_dimension"] == 24
    model = SentenceTransformer(str(folder), device="cpu")
    assert model.encode(["the film was good"]).shape == (1, 48)
    assert model[1].get_embedding_dimension() == 24


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_a_narrower_student_is_distilled_and_goes_on_bit_for_bit(bench_folder: Path, tmp_path: Path) -> None:
    start = narrow(bench_folder / "model", tmp_path / "start")
    settings = {**BUDGET, "text": bench_folder / "text.txt", "allow_dense": True, "save_every": 2, "device": "cpu"}

    def train(output: str, *callbacks: TrainerCallback, **options: Any) -> Any:
        return compresskit.distill(
            start, bench_folder / "model", output=tmp_path / output, callbacks=callbacks, **settings, **options
        )

    whole = train("whole").record
    with pytest.raises(KeyboardInterrupt):
        train("stopped", Stop())
    train("stopped", resume=True)
    assert same(tmp_path / "whole", tmp_path / "stopped")
    before, after = (whole["scores"][who]["held_out"] for who in ("student_before", "student_after"))
    assert after["hidden"] < before["hidden"]
    assert whole["scores"]["teacher"]["held_out"] == {"embedding": 0.0, "hidden": 0.0}
    assert set(weights(tmp_path / "whole")) == set(weights(start))
    with pytest.raises(InputError, match="loss attention: the teacher has 4 attention heads, the student 2, but its"):
        train("asked", losses={"attention": 1})


def test_vectors_and_hidden_states_of_a_wider_teacher(bench_folder: Path, tmp_path: Path) -> None:
    start = narrow(bench_folder / "model", tmp_path / "start")
    settings = {"text": bench_folder / "text.txt", "unit": "line", "max_length": 32, "max_steps": 3, "device": "cpu"}
    found = compresskit.distill(start, bench_folder / "model", allow_dense=True, output=tmp_path / "out", **settings)
    assert set(found.record["losses"]) == {"embedding", "hidden", "pooled", "similarity"}
    assert set(weights(tmp_path / "out")) == set(weights(start))
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").is_file()


@pytest.mark.slow
def test_projections_are_learned_by_one_process(bench_folder: Path, tmp_path: Path) -> None:
    start = narrow(bench_folder / "model", tmp_path / "start")
    compresskit.compress(start, method="low-rank", ratio=1.5).save_pretrained(tmp_path / "student")
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(start / name, tmp_path / "student")
    models = ("--student", tmp_path / "student", "--teacher", bench_folder / "model", "--output", tmp_path / "out")
    settings = ("--text", bench_folder / "text.txt", "--max-length", "32", "--max-steps", "1", "--device", "cpu")
    processes = start_ranks(tmp_path / "log", 2, "distill", *models, *settings, "--threads", "1")
    assert [finish(process) for process in processes] == [2, 2]
    said = (tmp_path / "log-0").read_text()
    assert "hidden sizes of 48 and 24" in said
    assert "--loss embedding=0 --loss hidden=0" in said
    assert not (tmp_path / "out").exists()


def test_a_masked_lm_learns_from_a_wider_one(bench_folder: Path, tmp_path: Path) -> None:
    """Logits are compared as they are; so a student may also learn from them alone."""
    wide, start = tmp_path / "wide", tmp_path / "start"
    tiny_model(head="masked-lm").save_pretrained(wide)
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bench_folder / "model" / name, wide)
    narrow(wide, start)
    settings = {"text": bench_folder / "text.txt", "max_length": 32, "max_steps": 2, "device": "cpu"}
    record = compresskit.distill(start, wide, allow_dense=True, **settings).record
    assert set(record["losses"]) == {"embedding", "hidden", "logits", "supervised"}
    alone = {"embedding": 0, "hidden": 0}
    record = compresskit.distill(start, wide, allow_dense=True, losses=alone, **settings).record
    assert set(record["losses"]) == {"logits", "supervised"}
    assert not any("linear maps" in note for note in record["notes"])


def test_a_trainer_of_your_own_needs_projections(bench_folder: Path, tmp_path: Path) -> None:
    from compresskit.planning.stage import Stage
    from compresskit.training.trainer import DistillationTrainer

    stage, rows = Stage(losses={"hidden": 1}), Dataset.from_dict({"input_ids": [[2, 5, 6, 3]]})
    with pytest.raises(InputError, match=r"teacher and student have different hidden sizes \(hidden_size\): 48 and 24"):
        DistillationTrainer(
            tiny_model(hidden_size=24, num_attention_heads=2), tiny_model(), stage=stage, args=None, train_dataset=rows
        )


def made(model: PreTrainedModel, ratio: float) -> PreTrainedModel:
    anatomy = Anatomy(model)
    return anatomy.narrowed(anatomy.find_widths(count(model) / ratio))


def cut(model: PreTrainedModel, **widths: int) -> PreTrainedModel:
    anatomy = Anatomy(model)
    return anatomy.narrowed(anatomy.widths._replace(**widths))


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra"])
def test_ffn_units_that_add_nothing_go_first(family: str) -> None:
    model = tiny_model(family)
    for name, parameter in model.named_parameters():
        if parameter.shape == (48, 96):
            parameter.data[:, 1::2] = 0
        assert "query" not in name or parameter.shape != (48, 96)
    smaller = cut(model, ffn=48)
    assert count(smaller) < count(model)
    torch.testing.assert_close(outputs(smaller), outputs(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_heads_that_add_nothing_go_first(family: str) -> None:
    model = FAMILIES[family].build("encoder")
    for name, parameter in model.named_parameters():
        if name.endswith(("attention.output.dense.weight", "attention.attn.o.weight")):
            parameter.data.view(32, 4, 8)[:, [0, 2]] = 0
        elif name.endswith(("query.weight", "attn.q.weight")):
            parameter.data[:] = torch.arange(4).repeat_interleave(8)[:, None]
        elif name.endswith("relative_attention_bias.weight"):
            parameter.data[:] = torch.arange(4)
    smaller = cut(model, hidden=16, heads=2)
    of_heads = [p for n, p in smaller.named_parameters() if n.endswith(("query.weight", "q.weight", "bias.weight"))]
    assert len(of_heads) == (1 if family == "bert" else 2)
    assert all(set(parameter.flatten().tolist()) == {1.0, 3.0} for parameter in of_heads)


def test_hidden_numbers_that_are_read_most_stay() -> None:
    model = tiny_model()
    loud = torch.tensor([3, 4, 7, 10, 11, 20, 25, 31, 40, 41, 42, 43, 44, 45, 46, 47])
    for name, parameter in model.named_parameters():
        if name.endswith(("query.weight", "key.weight", "value.weight", "intermediate.dense.weight")):
            parameter.data[:, loud] *= 9
    smaller = cut(model, hidden=16, heads=2)
    words = "embeddings.word_embeddings.weight"
    assert torch.equal(smaller.state_dict()[words], model.state_dict()[words][:, loud])


@pytest.mark.parametrize("ratio", [1.2, 2.0, 5.0, 20.0])
@pytest.mark.parametrize("sizes", [(384, 1536, 12), (768, 3072, 12), (128, 512, 2)])
def test_widths_come_near_the_ratio_from_below(sizes: tuple[int, int, int], ratio: float) -> None:
    hidden, ffn, heads = sizes
    model = tiny_model(hidden_size=hidden, intermediate_size=ffn, num_attention_heads=heads)
    anatomy, wanted = Anatomy(model), count(model) / ratio
    found = anatomy.find_widths(wanted)
    assert found.hidden % found.heads == 0
    assert found.hidden // found.heads <= hidden // heads
    assert 0.85 * wanted < anatomy.parameters(found) <= wanted
    assert count(anatomy.narrowed(found)) == anatomy.parameters(found)


def test_rotary_heads_stay_whole() -> None:
    model = FAMILIES["modernbert"].build("encoder")
    for wanted in (count(model) / 1.5, count(model) / 3):
        found = Anatomy(model).find_widths(wanted)
        assert found.hidden == 8 * found.heads


@pytest.mark.parametrize("name", quick(FAMILIES, "bert", "roberta", "mpnet", "modernbert", "albert", "fnet", "xlnet"))
def test_every_family_is_cut_or_refused(name: str) -> None:
    family = FAMILIES[name]
    head = family.heads()[0]
    model = family.build(head)
    if name in NOT_CUT:
        with pytest.raises(UnreachableError, match=f"its widths cannot be cut: .*{NOT_CUT[name]}"):
            made(model, 1.6)
        return
    smaller = made(model, 1.6)
    assert type(smaller) is type(model)
    assert count(smaller) <= count(model) / 1.6
    assert smaller.config.hidden_size < model.config.hidden_size
    found = smaller(**family.batch(head))
    assert all(torch.isfinite(value).all() for value in found.values() if torch.is_tensor(value))


def test_families_that_are_not_cut_are_listed() -> None:
    text = " ".join((Path(__file__).parent.parent / "docs" / "compatibility.md").read_text(encoding="utf-8").split())
    listed = text.partition("cannot be made narrower: ")[2].partition(".")[0]
    assert listed.split(", ") == sorted(NOT_CUT)


def test_what_cannot_be_narrower_is_refused(run: Run, bench_folder: Path, tmp_path: Path) -> None:
    refused(run("bench", "--baselines", "narrower:2", "--output", "out"), "baseline narrower:2: takes no argument")
    one = tiny_model(hidden_size=8, num_attention_heads=2, intermediate_size=16)
    with pytest.raises(UnreachableError, match="no smaller hidden size than 8 can be shared out among its heads"):
        Anatomy(one).find_widths(10)
    with pytest.raises(UnreachableError, match=r"but the narrowest model \(hidden size 8, FFN 8, heads 1\) has 5,344"):
        Narrower().make(checkpoints.read(bench_folder / "model"), Asked("", 90.0))
    folder = sentence_folder(bench_folder / "model", tmp_path / "dense", behind=("Dense",))
    with pytest.raises(UnreachableError, match="narrower: a Dense layer behind the encoder takes vectors of its width"):
        Narrower().make(checkpoints.read(folder), Asked("", 2.0))
    assert Widths(1, 2, 3)._asdict() == {"hidden": 1, "ffn": 2, "heads": 3}
