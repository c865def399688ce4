"""A look-up table: one vector for each token, found once by model2vec; a text is the mean of its tokens' vectors."""

from __future__ import annotations

import contextlib
import copy
import io
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional
from transformers import DataCollatorWithPadding, PreTrainedModel

from compresskit.benchmark.baselines.base import Asked, Baseline, Made
from compresskit.benchmark.baselines.registry import register
from compresskit.benchmark.provenance import MadeBy
from compresskit.errors import UnreachableError
from compresskit.model import identity
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.targets import count_parameters
from compresskit.model.tokenizer import find_tokenizer, is_fast
from compresskit.tasks.kind import TaskKind
from compresskit.tasks.registry import KINDS
from compresskit.tasks.rows import TRAIN, TaskData

#: The head that one vector for each text can have.
_HEAD = "sequence-classification"
_BATCH = 256
#: Minus the logit of a class without a row.
_NEVER = 1e4


@register
class Static(Baseline):
    """model2vec's table of the dense model, as narrow as the ratio asks: its vectors are turned to their principal
    axes, of which the first ones stay. For a task with a head scikit-learn fits a linear one to the task's rows.
    """

    name = "static"
    summary = "a table with a vector for each token (model2vec), with a linear head for a task"
    rated = True
    exported = False
    cpu_only = True
    packages = ("model2vec", "skeletoken")
    extra = "static"

    def __init__(self) -> None:
        #: The last table and the model it is of: all ratios of a benchmark are cut from one.
        self._last: tuple[dict[str, str], _Table] | None = None

    def make(self, dense: Checkpoint, asked: Asked) -> Made:
        """The table with its head, as a model. Raises UnreachableError: it cannot be as small, or no head fits."""
        assert asked.ratio is not None
        kind = None if asked.rows is None else KINDS.get(asked.rows.task.kind)
        if kind is not None and kind.head not in (None, _HEAD):
            raise UnreachableError(f"static: one vector for a text answers no task of kind {kind.name}")
        tokenizer = find_tokenizer(None, dense)
        if not is_fast(tokenizer):
            raise UnreachableError(f"static: model2vec reads fast tokenizers alone, not {type(tokenizer).__name__}")
        whole = self._table(dense, tokenizer)
        answers = int(dense.model.config.num_labels or 0) if kind is not None and kind.head is not None else 0
        pairs = asked.rows is not None and answers > 0 and len(asked.rows.task.inputs) == 2
        # Of each axis: an entry of every token, its direction, and weights of every answer.
        rows, hidden = whole.vectors.shape
        room = count_parameters(dense.model) / asked.ratio - answers
        axes = min(int(room / (rows + hidden + answers * _features(pairs))), hidden)
        if axes < 1:
            raise UnreachableError(f"static: a table of one number for each of {rows:,} tokens is larger than that")
        between = tokenizer.sep_token_id if pairs else None
        if pairs and between is None:
            raise UnreachableError(
                "static: no token stands between the texts of a pair (the tokenizer has no sep_token)"
            )
        made = StaticModel(dense.model.config, whole, axes, answers, between)
        if asked.rows is not None and kind is not None and answers:
            _fit_head(made, kind, asked.rows, tokenizer, asked.max_length, dense.model)
        facts = {"tokens": f"{rows:,}", "axes": str(axes)}
        return Made(replace(dense, model=made), {"facts": facts}, run=made)

    def megabytes(self, made: Checkpoint) -> float:
        """Of what a file of its numbers would hold, in float32."""
        return sum(parameter.nbytes for parameter in made.model.parameters()) / 1e6

    def fact(self, model: str, made_by: MadeBy) -> str:
        """How large the table is."""
        facts = made_by.facts or {}
        return f"a vector of {facts['axes']} numbers for each of {facts['tokens']} tokens of {model}, by model2vec"

    def _table(self, dense: Checkpoint, tokenizer: Any) -> _Table:
        key = identity.of_model(dense.model)
        if self._last is None or self._last[0] != key:
            self._last = (key, _Table.of(dense, tokenizer))
        return self._last[1]


class _Table:
    """All of model2vec's vectors, turned to their principal axes.

    Attributes:
        vectors: (rows, H), weighted by model2vec's estimate of how often a token comes (SIF).
        axes: (H, H), the direction of each axis as a row, the widest first: ``vectors @ axes`` lies where the dense
            model's sentence vectors lie.
        place: (vocabulary,) the row of a token; -1 where it has none.
    """

    def __init__(self, vectors: Tensor, axes: Tensor, place: Tensor) -> None:
        self.vectors, self.axes, self.place = vectors, axes, place

    @classmethod
    def of(cls, dense: Checkpoint, tokenizer: Any) -> _Table:
        """The table of a model. Its vectors are those that model2vec's own principal axes give, up to their signs."""
        from model2vec.distill import distill_from_model
        from model2vec.distill.inference import compute_weights

        encoder: Any = copy.deepcopy(dense.model.base_model).float().cpu().eval()
        encoder.name_or_path = str(dense.folder)  # of what is no folder, model2vec asks the hub for a model card
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            found = distill_from_model(
                encoder, tokenizer, device="cpu", pca_dims=None, sif_coefficient=None, quantize_to="float32"
            )
        raw = torch.from_numpy(np.asarray(found.embedding, dtype=np.float64))
        centred = raw - raw.mean(0)
        axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1).T
        weights = torch.from_numpy(compute_weights(len(raw), 1e-4))
        vectors = (centred @ axes.T) * weights[:, None]
        rows = found.tokenizer.get_vocab()
        place = torch.full((dense.model.config.vocab_size,), -1)
        special = set(tokenizer.all_special_ids)
        for token, number in tokenizer.get_vocab().items():
            if token in rows and number not in special:
                place[number] = rows[token]
        return cls(vectors.float(), axes.float(), place)


class StaticModel(PreTrainedModel):
    """A table, called like a transformers model.

    With a head it gives ``logits``, otherwise ``last_hidden_state``: the vectors of the tokens where the dense model's
    lie. A token that has none, such as the first one, stands for the text's mean, so that a folder that pools by it
    gets that.

    Args:
        config: of the dense model.
        table: whose first axes are taken.
        axes: how many.
        answers: outputs of the head; 0: there is none.
        between: the token between the two texts of a pair; None: the texts are no pairs.
    """

    def __init__(self, config: Any, table: _Table, axes: int, answers: int, between: int | None = None) -> None:
        config = copy.deepcopy(config)
        config._attn_implementation = "eager"  # it has none
        super().__init__(config)
        self.between = between
        self.words = nn.Embedding.from_pretrained(table.vectors[:, :axes].clone())
        self.axes = nn.Parameter(table.axes[:axes].clone(), requires_grad=False)
        self.head = nn.Linear(axes * _features(between is not None), answers) if answers else None
        self.register_buffer("place", table.place)
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> dict[str, Tensor]:
        """(B, T) token ids -> logits (B, answers), or vectors (B, T, H)."""
        vectors, known = self._look_up(input_ids, attention_mask)
        if self.head is None:
            mean = vectors.sum(1, keepdim=True) / known.sum(1).clamp(min=1)[:, None, None]
            read = torch.ones_like(known) if attention_mask is None else attention_mask > 0
            return {"last_hidden_state": torch.where((read & ~known)[..., None], mean, vectors) @ self.axes}
        return {"logits": self.head(self._described(input_ids, vectors, known))}

    def features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """What the head reads: (B, T) token ids -> (B, d), or (B, 4 d) for pairs."""
        return self._described(input_ids, *self._look_up(input_ids, attention_mask))

    def _look_up(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Vectors (B, T, d), and which tokens have one (B, T)."""
        place: Any = self.place
        rows = place[input_ids]
        known = (rows >= 0) if attention_mask is None else (rows >= 0) & (attention_mask > 0)
        return self.words(rows.clamp(min=0)) * known[..., None], known

    def _described(self, input_ids: Tensor, vectors: Tensor, known: Tensor) -> Tensor:
        if self.between is None:
            return _mean(vectors, known)
        second = (input_ids == self.between).cumsum(1) > 0
        one, two = _mean(vectors, known & ~second), _mean(vectors, known & second)
        return torch.cat([one, two, (one - two).abs(), one * two], -1)


def _features(pairs: bool) -> int:
    """How often the head reads a vector's width: of a pair both vectors, their distance and their product."""
    return 4 if pairs else 1


def _mean(vectors: Tensor, chosen: Tensor) -> Tensor:
    """Means over the chosen tokens, of length 1 as model2vec gives them: (B, T, d) -> (B, d)."""
    return functional.normalize((vectors * chosen[..., None]).sum(-2), dim=-1)


def _fit_head(
    made: StaticModel, kind: TaskKind, data: TaskData, tokenizer: Any, max_length: int, dense: PreTrainedModel
) -> None:
    """Fit the head to the task's training rows, numbered as the dense model's head numbers its answers.

    Raises:
        UnreachableError: what is to be predicted is neither a class nor a number nor flags.
    """
    rows = kind.encode(data, data.splits[TRAIN], tokenizer, max_length, dense)
    collate = DataCollatorWithPadding(tokenizer)
    ids = rows["input_ids"][:]
    found = []
    with torch.inference_mode():
        for start in range(0, len(ids), _BATCH):
            batch = collate([{"input_ids": one} for one in ids[start : start + _BATCH]])
            found.append(made.features(batch["input_ids"], batch["attention_mask"]))
    scaler = StandardScaler()
    features, targets = scaler.fit_transform(torch.cat(found).double().numpy()), np.asarray(rows["labels"][:])
    weight, bias = _linear(features, targets, dense.config.problem_type, made)
    # The head reads features as they are: what the scaler does goes into the weights.
    weight = weight / scaler.scale_
    bias = bias - weight @ scaler.mean_
    head: Any = made.head
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias))


def _linear(features: np.ndarray, targets: np.ndarray, problem: str | None, made: StaticModel) -> tuple[Any, Any]:
    """Weights (answers, features) and biases of the best linear head by scikit-learn's defaults."""
    head: Any = made.head
    answers = head.out_features
    if problem == "regression" or (problem is None and answers == 1):  # of kind ranking, how relevant a text is
        ridge = Ridge().fit(features, targets)
        return np.reshape(ridge.coef_, (1, -1)), np.reshape(ridge.intercept_, 1)
    if problem == "multi_label_classification":
        fitted = [_logistic(features, targets[:, number] > 0.5, 2) for number in range(answers)]
        return np.stack([w[1] - w[0] for w, _ in fitted]), np.stack([b[1] - b[0] for _, b in fitted])
    if problem in (None, "single_label_classification"):
        return _logistic(features, targets, answers)
    raise UnreachableError(f"static: no linear head for {problem}")


def _logistic(features: np.ndarray, targets: np.ndarray, answers: int) -> tuple[np.ndarray, np.ndarray]:
    """One row of weights and a bias for each class; a class without a row is never the answer."""
    weight, bias = np.zeros((answers, features.shape[1])), np.full(answers, -_NEVER)
    present = np.unique(targets).astype(int)
    if len(present) == 1:
        bias[present] = 0.0
        return weight, bias
    model = LogisticRegression(max_iter=1000).fit(features, targets)
    if len(present) == 2:  # scikit-learn gives one row for both
        weight[present] = np.concatenate([-model.coef_, model.coef_]) / 2
        bias[present] = np.concatenate([-model.intercept_, model.intercept_]) / 2
    else:
        weight[present], bias[present] = model.coef_, model.intercept_
    return weight, bias
