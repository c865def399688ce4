"""Every argument of transformers' Trainer works with ours or is refused, and nothing that is passed is changed."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import tiny_model
from datasets import Dataset
from transformers import (
    BertTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import compresskit
from compresskit import DistillationTrainer, InputError, Stage
from compresskit.tasks.ranking import Relevance
from compresskit.tasks.registry import predictions_of
from compresskit.training.batches import MaskingCollator
from compresskit.training.early_stopping import EarlyStopping

OURS = """
train_sampling_strategy length_column_name seed data_seed dataloader_drop_last dataloader_num_workers
dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
dataloader_in_order remove_unused_columns logging_nan_inf_filter activation_checkpointing
activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs save_total_limit
load_best_model_at_end prediction_loss_only per_device_train_batch_size gradient_accumulation_steps
"""
#: Read by the Trainer or by what it calls; nothing of ours stands in between.
TRAINERS = """
output_dir num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim
optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules max_grad_norm bf16 bf16_full_eval
fp16_full_eval tf32 torch_compile torch_compile_backend torch_compile_mode use_cache neftune_noise_alpha
torch_empty_cache_steps logging_strategy logging_steps logging_first_step log_on_each_node
include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start
eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics
save_only_model save_strategy save_steps save_on_each_node enable_jit_checkpoint push_to_hub hub_token
hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision metric_for_best_model greater_is_better
ignore_data_skip restore_callback_states_from_checkpoint full_determinism use_cpu ddp_find_unused_parameters
ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config debug
skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank
"""
REFUSED: dict[str, Any] = {
    "label_smoothing_factor": 0.1,
    "auto_find_batch_size": True,
    "train_sampling_strategy": "sequential",
    "use_liger_kernel": True,
    "label_names": ["stars"],
    "fp16": True,
    "accelerator_config": {"dispatch_batches": True},
    "activation_checkpointing_kwargs": {"use_reentrant": True},
}
#: Refused too; to set them takes packages or processes that a test has not got.
UNTESTED = ["parallelism_config", "deepspeed", "liger_kernel_config", "average_tokens_across_devices"]


def rows(count: int = 24) -> Dataset:
    chance = np.random.default_rng(0)
    ids = [[2, *chance.integers(5, 400, size=chance.integers(2, 12)).tolist(), 3] for _ in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": [i % 2 for i in range(count)], "length": list(map(len, ids))})


@pytest.fixture
def collator(bench_folder: Path) -> DataCollatorWithPadding:
    return DataCollatorWithPadding(BertTokenizer.from_pretrained(bench_folder / "model"))


def trainer(tmp_path: Path, collator: Any, **changes: Any) -> DistillationTrainer:
    """Of a tiny classifier; ``changes`` go to TrainingArguments or the constructor, wherever they belong."""
    own = {name: changes.pop(name) for name in list(changes) if name in inspect.signature(Trainer).parameters}
    own |= {name: changes.pop(name) for name in ("teacher", "stage", "predictions", "together") if name in changes}
    known = {"output_dir": str(tmp_path / "out"), "max_steps": 3, "per_device_train_batch_size": 4, "use_cpu": True}
    known |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-3}
    arguments: dict[str, Any] = {
        "model": tiny_model("bert", "classifier"),
        "stage": Stage(losses={"supervised": 1}),
        "train_dataset": rows(),
        "data_collator": collator,
        "args": TrainingArguments(**known | changes),
    }
    return DistillationTrainer(**arguments | own)


def test_every_argument_has_a_place() -> None:
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert fields == {*OURS.split(), *TRAINERS.split(), *REFUSED, *UNTESTED}
    constructor = set(inspect.signature(Trainer).parameters)
    works = {"model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class", "compute_metrics"}
    works |= {"callbacks", "optimizers", "optimizer_cls_and_kwargs", "preprocess_logits_for_metrics"}
    assert constructor == works | {"model_init", "compute_loss_func"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_have_no_effect_is_refused(name: str, tmp_path: Path, collator: Any) -> None:
    with pytest.raises(InputError, match="is not supported"):
        trainer(tmp_path, collator, **{name: REFUSED[name]})


def test_class_weights_of_a_stage_are_not_lost(tmp_path: Path, collator: Any) -> None:
    """The commands find them in a task's rows; the trainer alone has no names of classes and takes numbers."""
    weighing = Stage(losses={"supervised": 1}, class_weights={"LABEL_1": 9})
    with pytest.raises(InputError, match="class_weights of the stage"):
        trainer(tmp_path, collator, stage=weighing)
    model = tiny_model("bert", "classifier")
    predictions = predictions_of(model).weighing(torch.tensor([1.0, 9.0]))
    own = trainer(tmp_path, collator, model=model, stage=weighing, predictions=predictions)
    batch = collator([{k: v for k, v in rows()[i].items() if k != "length"} for i in range(4)])
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(**batch).logits, batch["labels"], reduction="none")
        got = own.compute_loss(model, dict(batch))
    assert got.item() == pytest.approx((losses * (1 + 8 * batch["labels"])).mean().item(), rel=1e-5)


def test_early_stopping_of_a_stage_is_not_lost(tmp_path: Path, collator: Any) -> None:
    """The commands score a task's dev rows for it; the trainer alone would have gone on to the end."""
    for more in ({}, {"score_every": 1}):
        stage = Stage(losses={"supervised": 1}, early_stopping=1, **more)
        with pytest.raises(InputError, match="early_stopping of the stage"):
            trainer(tmp_path, collator, stage=stage)
    trainer(tmp_path, collator, stage=stage, callbacks=[EarlyStopping(lambda _: 0.0, 1, 1)])


def test_functions_of_the_constructor_are_refused(tmp_path: Path, collator: Any) -> None:
    for name in ("model_init", "compute_loss_func"):
        with pytest.raises(InputError, match=f"{name}: is not supported"):
            trainer(tmp_path, collator, **{name: lambda *_: None})
    with pytest.raises(InputError, match="give a PreTrainedModel, a folder or a hub id, not a Linear"):
        trainer(tmp_path, collator, model=torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="have no attention_mask"):
        trainer(tmp_path, lambda batch: {"input_ids": torch.tensor([batch[0]["input_ids"]])}).train()


@pytest.mark.parametrize(
    "changes",
    [
        {"neftune_noise_alpha": 5.0},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"include_num_input_tokens_seen": "non_padding"},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 3},
        {"train_sampling_strategy": "group_by_length", "bf16": True, "full_determinism": False},
        {"optim": "adafactor", "lr_scheduler_type": "cosine", "warmup_steps": 1, "gradient_accumulation_steps": 2},
    ],
)
def test_other_arguments_work(changes: dict[str, Any], tmp_path: Path, collator: Any) -> None:
    own = trainer(tmp_path, collator, **changes)
    own.train()
    assert own.state.global_step == 3
    if "include_num_input_tokens_seen" in changes:
        assert own.state.num_input_tokens_seen > 0
    if "dataloader_num_workers" in changes:
        loader = own.get_train_dataloader()
        assert loader.persistent_workers
        assert loader.prefetch_factor == 3


def test_order_and_last_batch_follow_their_arguments(tmp_path: Path, collator: Any) -> None:
    def order(**changes: Any) -> list[list[int]]:
        own = trainer(tmp_path, collator, train_dataset=rows(26), **changes)
        own.get_train_dataloader()
        return list(own.sampler)

    first = order()
    assert order(data_seed=42) == first  # the default of seed
    assert order(data_seed=1) == order(seed=1) != first
    assert sorted(map(len, first)) == [2, *[4] * 6]
    assert sorted(map(len, order(dataloader_drop_last=True))) == [4] * 6
    long = rows(26).rename_column("length", "size")
    own = trainer(tmp_path, collator, train_dataset=long, length_column_name="size")
    own.get_train_dataloader()
    assert list(own.sampler) == first


def test_lengths_do_not_reorder_what_is_evaluated(tmp_path: Path, collator: Any) -> None:
    held = rows(10)
    plain, by_length = (
        trainer(tmp_path, collator, train_sampling_strategy=how, eval_dataset=held).predict(held).predictions
        for how in ("random", "group_by_length")
    )
    assert np.allclose(plain, by_length, atol=1e-6)


def test_pairs_are_not_parted(tmp_path: Path, collator: Any) -> None:
    model = {"model": tiny_model("bert", "classifier", num_labels=1), "teacher": None}
    relevance = {"predictions": Relevance(), "together": 2, "train_dataset": rows().remove_columns("labels")}
    stage = Stage(losses={"logits": 1}, logits_loss="margin")
    fits = {**model, **relevance, "stage": stage} | {"teacher": tiny_model("bert", "classifier", seed=3, num_labels=1)}
    trainer(tmp_path, collator, **fits).train()
    for changes, what in (
        ({"per_device_train_batch_size": 3}, "per_device_train_batch_size"),
        ({"train_dataset": rows(13).remove_columns("labels")}, "train_dataset"),
        ({"eval_dataset": rows(4), "per_device_eval_batch_size": 3}, "per_device_eval_batch_size"),
        ({"eval_dataset": {"a": rows(4), "b": rows(5)}}, "eval_dataset"),
    ):
        with pytest.raises(InputError, match=f"{what}.*must be a multiple of 2"):
            trainer(tmp_path, collator, **{**fits, **changes})
    with pytest.raises(InputError, match=r"eval_dataset.*must be a multiple of 2"):
        trainer(tmp_path, collator, **fits).evaluate(rows(5))


def test_masking_is_known_and_takes_no_persistent_workers(tmp_path: Path, collator: Any) -> None:
    model = tiny_model("bert", "masked-lm")
    own = {"model": model, "train_dataset": rows().remove_columns("labels")}
    masking = MaskingCollator(collator.tokenizer, 0.3, 0)
    with pytest.raises(InputError, match="dataloader_persistent_workers=True: is not supported where words are masked"):
        trainer(tmp_path, masking, **own, dataloader_num_workers=1, dataloader_persistent_workers=True, max_steps=1)
    # The labels that transformers' own collator makes count as labels too.
    theirs = DataCollatorForLanguageModeling(collator.tokenizer, mlm_probability=0.3)
    found = trainer(tmp_path, theirs, **own)
    assert found.loss.weights == {"supervised": 1}
    found.train()


def test_columns_reach_the_collator_as_asked(tmp_path: Path, collator: Any) -> None:
    seen: list[set[str]] = []

    def spy(batch: list[dict[str, Any]]) -> Any:
        seen.append(set(batch[0]))
        return collator([{key: value for key, value in row.items() if key != "text"} for row in batch])

    data = rows().add_column("text", ["x"] * 24)
    for keep in (True, False):
        trainer(tmp_path, spy, train_dataset=data, remove_unused_columns=not keep, max_steps=1).train()
        assert ("text" in seen[-1]) is keep


def test_evaluation_scores_logits_and_keeps_the_best(tmp_path: Path, collator: Any) -> None:
    shapes: list[Any] = []

    def metrics(found: Any) -> dict[str, float]:
        shapes.append((found.predictions.shape, found.label_ids.shape))
        return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    teacher = tiny_model("bert", "classifier", seed=1)
    stage = Stage(losses={"hidden": 1, "attention": 1, "logits": 1, "supervised": 1})
    changes: dict[str, Any] = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    changes |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 1, "max_steps": 5}
    changes |= {"learning_rate": 0.5, "compute_metrics": metrics, "eval_dataset": rows(10)}  # the first is the best
    own = trainer(tmp_path, collator, teacher=teacher, stage=stage, **changes)
    own.train()
    assert set(shapes) == {((10, 2), (10,))}
    losses = {entry["step"]: entry["eval_loss"] for entry in own.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.__getitem__)
    assert own.state.best_model_checkpoint == str(tmp_path / "out" / f"checkpoint-{best}")
    assert best < 5
    assert own.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-4)
    kept = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert f"checkpoint-{best}" in kept
    with pytest.raises(InputError, match="has no column labels, which the loss supervised reads"):
        own.evaluate(rows(10).remove_columns("labels"))
    stage = Stage(losses={"logits": 1, "supervised": 0})
    untaught = trainer(tmp_path, collator, teacher=teacher, stage=stage)
    assert untaught.evaluate(rows(10).remove_columns("labels"))["eval_loss"] > 0


def state_of(model: PreTrainedModel) -> tuple[Any, ...]:
    tensors = {name: (t.dtype, t.device, t.clone()) for name, t in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    return tensors, modes, model.config._attn_implementation


def same_state(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    tensors = all(
        a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(left[0].values(), right[0].values(), strict=True)
    )
    return tensors and left[1:] == right[1:]


def test_what_is_passed_stays_as_it_was(bench_folder: Path, tmp_path: Path, collator: Any) -> None:
    teacher = tiny_model("bert", "classifier", seed=1).half().train()
    teacher.get_submodule("bert.pooler").eval()
    before, data = state_of(teacher), rows()
    args = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
    arguments = args.to_dict()
    stage = Stage(losses={"attention": 1, "logits": 1})
    student = tiny_model("bert", "classifier")
    own = DistillationTrainer(
        student, teacher.float().half(), stage=stage, args=args, train_dataset=data, data_collator=collator
    )
    batch = collator([{k: v for k, v in data[i].items() if k != "length"} for i in range(2)])
    keys = set(batch)
    own.compute_loss(student.half(), batch)
    assert set(batch) == keys
    assert same_state(state_of(teacher), before)
    assert args.to_dict() == arguments
    assert data.column_names == rows().column_names

    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(bench_folder / "teacher").half()
    classifier.train().get_submodule("bert.pooler").eval()
    before = state_of(classifier)
    tokenizer = BertTokenizer.from_pretrained(bench_folder / "model")
    options: dict[str, Any] = {"data": bench_folder / "data", "tokenizer": tokenizer, "device": "cpu"}
    compresskit.evaluate(classifier, task="sst2", max_length=32, **options)
    assert same_state(state_of(classifier), before)
    student = compresskit.compress(classifier, method="low-rank", ratio=2)
    assert same_state(state_of(classifier), before)
    compresskit.distill(student, classifier, task="sst2", max_length=32, max_steps=2, **options)
    assert same_state(state_of(classifier), before)


def checkpointed(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    model.gradient_checkpointing_enable(options or None)
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointing_keeps_every_gradient(tmp_path: Path, collator: Any) -> None:
    stage, teacher = Stage(losses={"attention": 1, "hidden": 1}), tiny_model("bert", "classifier", seed=1)

    def gradients(model: PreTrainedModel, **changes: Any) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}

        class Keep(transformers.TrainerCallback):
            def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
                found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        data = rows()
        own: dict[str, Any] = {"model": model, "teacher": teacher, "stage": stage, "train_dataset": data}
        trainer(tmp_path, collator, max_steps=1, callbacks=[Keep()], **own, **changes).train()
        return found

    expected = gradients(tiny_model("bert", "classifier"))
    assert any(gradient.abs().max() > 0 for name, gradient in expected.items() if ".query." in name)
    for found in (
        gradients(tiny_model("bert", "classifier"), activation_checkpointing=True),
        gradients(
            tiny_model("bert", "classifier"),
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"preserve_rng_state": True},
        ),
        gradients(checkpointed(tiny_model("bert", "classifier"))),
        gradients(checkpointed(tiny_model("bert", "classifier"), preserve_rng_state=True)),
    ):
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    with pytest.raises(InputError, match="reentrant checkpointing loses the gradients"):
        trainer(tmp_path, collator, model=checkpointed(tiny_model("bert", "classifier"), use_reentrant=True))
    late = trainer(tmp_path, collator)
    checkpointed(late.model, use_reentrant=True)
    with pytest.raises(InputError, match="reentrant checkpointing loses the gradients"):
        late.train()
