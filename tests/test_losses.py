"""Every loss term against plain arithmetic, with padding, and as a sum of shares."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, tiny_model
from torch.nn import functional as F

from compresskit.errors import InputError
from compresskit.planning.stage import LOSS_NAMES, Stage
from compresskit.tasks import losses as answers
from compresskit.tasks.predictions import count_items
from compresskit.training import losses
from compresskit.training.attention import SCORES, expose_attention
from compresskit.training.objective import Objective
from compresskit.training.terms import TERMS

LENGTHS = (5, 3, 1)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def mask() -> torch.Tensor:
    return torch.tensor([[1] * n + [0] * (5 - n) for n in LENGTHS])


def test_embedding_and_hidden_are_means_over_real_tokens() -> None:
    students = [random(3, 5, 8, seed=i) for i in range(3)]
    teachers = [random(3, 5, 8, seed=10 + i) for i in range(3)]
    expected = []
    for s, t in zip(students, teachers, strict=True):
        squares = [
            float((s[b, i, h] - t[b, i, h]) ** 2) for b, n in enumerate(LENGTHS) for i in range(n) for h in range(8)
        ]
        expected.append(sum(squares) / len(squares))
    embedding = losses.embedding_loss(students[0], teachers[0], mask(), sum(LENGTHS))
    assert embedding.item() == pytest.approx(expected[0], rel=1e-5)
    hidden = losses.hidden_loss(students, teachers, mask(), sum(LENGTHS))
    assert hidden.item() == pytest.approx(sum(expected), rel=1e-5)  # a sum over layers, as in the paper


def test_attention_is_a_mean_over_real_pairs_and_heads() -> None:
    students, teachers = [random(3, 2, 5, 5, seed=1)], [random(3, 2, 5, 5, seed=2)]
    squares = [
        float((students[0][b, a, i, j] - teachers[0][b, a, i, j]) ** 2)
        for b, n in enumerate(LENGTHS)
        for a in range(2)
        for i in range(n)
        for j in range(n)
    ]
    loss = losses.attention_loss(students, teachers, mask(), sum(n * n for n in LENGTHS))
    assert loss.item() == pytest.approx(np.mean(squares), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_of_softened_distributions(temperature: float) -> None:
    student, teacher = random(3, 4, seed=1), random(3, 4, seed=2)
    expected = 0.0
    for s, t in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
        p = [math.exp(x / temperature) for x in t]
        q = [math.exp(x / temperature) for x in s]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) * temperature**2
    loss = answers.logits_loss(student, teacher, 3, temperature=temperature)
    assert loss.item() == pytest.approx(expected / 3, rel=1e-5)
    assert answers.logits_loss(teacher, teacher, 3, temperature=temperature).item() == pytest.approx(0, abs=1e-6)


def test_logits_mse_and_regression() -> None:
    student, teacher = random(3, 4, seed=1), random(3, 4, seed=2)
    assert answers.logits_loss(student, teacher, 3, form="mse").item() == pytest.approx(
        F.mse_loss(student, teacher).item(), rel=1e-5
    )
    # One output has no distribution: kl would be 0 whatever the student says.
    one, other = random(3, 1, seed=1), random(3, 1, seed=2)
    assert answers.logits_loss(one, other, 3).item() == pytest.approx(F.mse_loss(one, other).item(), rel=1e-5)


def test_padding_in_spans_is_no_class() -> None:
    student, teacher = random(3, 5, seed=1), random(3, 5, seed=2)
    closed = torch.where(mask().bool(), teacher, -torch.inf)
    expected = sum(
        F.kl_div(
            student[b, :5].masked_fill(~mask()[b].bool(), -1e30).log_softmax(-1)[:n],
            teacher[b, :n].log_softmax(-1),
            log_target=True,
            reduction="sum",
        ).item()
        for b, n in enumerate(LENGTHS)
    )
    student.requires_grad_()
    answers.logits_loss(student, closed, 3).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert (student.grad[~mask().bool()] == 0).all()
    assert answers.logits_loss(student, closed, 3).item() == pytest.approx(expected / 3, rel=1e-4)
    mse = answers.logits_loss(student, closed, 3, form="mse").item()
    rows = [((student[b, :n] - teacher[b, :n]) ** 2).mean().item() for b, n in enumerate(LENGTHS)]
    assert mse == pytest.approx(np.mean(rows), rel=1e-5)


def test_supervised_terms() -> None:
    logits, labels = random(3, 4), torch.tensor([0, 3, 1])
    expected = F.cross_entropy(logits, labels).item()
    assert answers.supervised_loss(logits, labels, 3).item() == pytest.approx(expected, rel=1e-5)
    tokens, wanted = random(3, 5, 7), torch.full((3, 5), answers.IGNORED)
    wanted[0, 1], wanted[2, 0] = 4, 6
    assert answers.supervised_loss(tokens, wanted, 2).item() == pytest.approx(
        F.cross_entropy(tokens.reshape(-1, 7), wanted.reshape(-1), ignore_index=-100).item(), rel=1e-5
    )
    scores, numbers = random(3, 1), torch.tensor([0.5, 2.0, 5.0])
    assert answers.supervised_loss(scores, numbers, 3).item() == pytest.approx(
        F.mse_loss(scores[:, 0], numbers).item(), rel=1e-5
    )


ALL = {"embedding": 1.0, "attention": 2.0, "hidden": 3.0, "logits": 4.0, "supervised": 5.0}


def batch(rows: slice) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 499, (3, 5), generator=torch.Generator().manual_seed(1)) * mask()
    return {"input_ids": ids[rows], "attention_mask": mask()[rows], "labels": torch.tensor([0, 1, 1])[rows]}


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_of_micro_batches_add_up_and_gradients_flow(family: str) -> None:
    student, teacher = tiny_model(family, "classifier", seed=1), tiny_model(family, "classifier", seed=2)
    objective = Objective(student, teacher, Stage(losses=ALL), ["input_ids", "labels"])
    assert objective.attention_maps == "scores"
    counts = count_items(batch(slice(None)))
    assert counts.tolist() == [sum(LENGTHS), sum(n * n for n in LENGTHS), 3, 3, 3 * 2, sum(LENGTHS)]

    def terms(rows: slice) -> dict[str, torch.Tensor]:
        inputs = batch(rows)
        labels = {"labels": inputs.pop("labels")}
        with torch.inference_mode():
            taught = teacher(**inputs, **objective.wanted)
        outputs = student(**inputs, **objective.wanted)
        return objective.terms(outputs, taught, inputs["attention_mask"], labels, counts)

    whole, first, rest = terms(slice(None)), terms(slice(0, 1)), terms(slice(1, 3))
    assert set(whole) == set(ALL)
    for name, value in whole.items():
        assert value.item() > 0
        assert (first[name] + rest[name]).item() == pytest.approx(value.item(), rel=1e-4), name
    total = objective.total(whole)
    assert total.item() == pytest.approx(sum(ALL[name] * value.item() for name, value in whole.items()), rel=1e-5)
    total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.get_input_embeddings().parameters())


def test_a_batch_without_labels_has_no_loss() -> None:
    model = tiny_model(head="masked-lm")
    objective = Objective(model, model, Stage(losses=ALL), [], masked=True)
    inputs = batch(slice(None)) | {"labels": torch.full((3, 5), answers.IGNORED)}
    counts = count_items(inputs)
    targets = {"labels": inputs.pop("labels")}
    outputs = model(**inputs, **objective.wanted)
    terms = objective.terms(outputs, outputs, inputs["attention_mask"], targets, counts)
    assert terms["supervised"].item() == terms["logits"].item() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_exposed_scores_are_those_before_mask_and_softmax(family: str) -> None:
    model = tiny_model(family)
    inputs = batch(slice(None)) | {}
    del inputs["labels"]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**inputs, output_attentions=True)
        assert expose_attention(model) == "scores"
        assert model.config._attn_implementation == SCORES
        found = model(**inputs, output_attentions=True)
    real = mask().bool()
    assert torch.allclose(found[0][real], expected[0][real], atol=1e-6)
    closed = torch.where(real[:, None, None, :], 0.0, -torch.inf)
    for scores, probabilities in zip(found.attentions, expected.attentions, strict=True):
        assert torch.allclose((scores + closed).softmax(-1), probabilities, atol=1e-6)
    # Before the mask: a padded key has a score like any other.
    assert torch.isfinite(found.attentions[0]).all()
    assert found.attentions[0].abs().max() < 1e3


def test_families_without_the_interface_give_probabilities() -> None:
    import transformers

    config = transformers.MPNetConfig(
        vocab_size=499, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96
    )
    model = transformers.MPNetModel(config).eval()
    assert expose_attention(model) == "probabilities"
    with torch.no_grad():
        maps = model(input_ids=batch(slice(0, 1))["input_ids"], output_attentions=True).attentions
    assert torch.allclose(maps[0].sum(-1), torch.ones(1, 4, 5), atol=1e-5)


def test_every_term_that_may_be_named_is_there() -> None:
    assert tuple(TERMS) == LOSS_NAMES


def test_pooled_loss() -> None:
    ours, theirs = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    assert float(losses.pooled_loss(ours, theirs, 2, form="cosine")) == pytest.approx((1 - 0.6 + 1 - 0) / 2)
    assert float(losses.pooled_loss(ours, theirs, 2, form="mse")) == pytest.approx((16 / 9 + 5 / 4) / 2)


@pytest.mark.parametrize("form", ["mse", "kl"])
def test_similarity_loss(form: Any) -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(4, 6), torch.randn(4, 9)
    a, b = (F.normalize(v, dim=1) @ F.normalize(v, dim=1).T for v in (ours, theirs))
    expected = 0.0
    for i in range(4):
        others = [j for j in range(4) if j != i]
        if form == "mse":
            expected += sum(float((a[i, j] - b[i, j]) ** 2) for j in others) / 12
        else:
            p, q = ((m[i, others] / 0.1).softmax(0) for m in (b, a))
            expected += float((p * (p / q).log()).sum()) / 4
    count = 12 if form == "mse" else 4
    found = losses.similarity_loss(ours, theirs, count, form=form, temperature=0.1)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    prefix = losses.similarity_loss(ours[:, :3], theirs, count, form=form, temperature=0.1)
    both = losses.similarity_loss(ours, theirs, count, form=form, temperature=0.1, dims=(3,))
    assert float(both) == pytest.approx((expected + float(prefix)) / 2, rel=1e-5)


def test_prefixes_are_shorter_than_the_vector_and_count_once() -> None:
    """A longer one was the whole vector once more, and one that was named twice weighed twice."""
    ours, theirs = torch.randn(4, 6), torch.randn(4, 6)
    with pytest.raises(InputError, match="dims 7: the student's vectors have 6 numbers"):
        losses.similarity_loss(ours, theirs, 12, form="mse", dims=(3, 7))
    with pytest.raises(ValueError, match="3 is there twice"):
        Stage(losses={"similarity": 1}, dims=(3, 2, 3))


def test_one_sentence_is_similar_to_nothing() -> None:
    vector = torch.ones(1, 3, requires_grad=True)
    losses.similarity_loss(vector, vector.detach(), 1, form="kl").backward()
    assert float(vector.grad.abs().sum()) == 0  # type: ignore[union-attr]
