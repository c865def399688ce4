"""How a stage of training runs: what a recipe's ``distill:`` section and the command line may set."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

LossName = Literal["embedding", "attention", "hidden", "logits", "supervised", "pooled", "similarity"]
LOSS_NAMES: tuple[LossName, ...] = get_args(LossName)
StageName = Literal["general", "task", "sentences"]
#: Fields that came after records were kept, each with the value that it had before it was there. At this value they
#: are not written, so that keys of earlier records hold.
_LATER: dict[str, Any] = {
    "pooled_loss": "cosine",
    "similarity_loss": "mse",
    "similarity_temperature": 0.05,
    "dims": [],
    "schedule": "linear",
    "class_weights": None,
    "early_stopping": None,
    "score_every": None,
}
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Stage(BaseModel):
    """Settings of one stage. Every field has a default, so a recipe gives only what it changes.

    Attributes:
        learning_rate: at its peak, after the warm-up; AdamW.
        batch_size: sequences per optimizer step, over all devices and accumulated micro-batches.
        max_length: tokens; longer texts are cut (tasks) or split (general text, SQuAD). None: the task's own, else 128.
            Of sentence vectors what each model's folder says is the default, and the most.
        epochs: passes over the data, unless steps or tokens limit the run.
        losses: weight of each loss term; a missing one counts as 0.
        logits_loss: ``kl`` (of the softened distributions) or ``mse``, which a head with one number always takes;
            ``margin``, for kind ``ranking``: squared error of the difference between a relevant text and an irrelevant
            one.
        temperature: of ``kl``, which is multiplied by its square.
        pooled_loss: of sentence vectors: ``cosine`` (1 - cosine to the teacher's vector) or ``mse`` (squared distance
            over the squared length of the teacher's vector), which keeps lengths too.
        similarity_loss: of the cosines between the sentences of a batch: ``mse``, or ``kl`` of each row's softmax.
        similarity_temperature: of that softmax.
        dims: lengths of prefixes of the vector that should serve as vectors too (Matryoshka): the similarity loss is
            the mean over the whole vector and these.
        warmup: share of the steps over which the learning rate rises.
        schedule: of the learning rate after that: it falls to 0, ``linear`` or as a ``cosine``, or stays ``constant``.
        weight_decay: of AdamW, on everything but biases and LayerNorm.
        dropout: in the trained model while it trains; ``keep`` leaves the checkpoint's own.
        mask_probability: share of the tokens that the masked-LM loss hides.
        class_weights: of labels, where each text or token has one class: ``balanced``, or class -> weight (1 where none
            is given); scaled so that their mean over the training rows is 1.
        early_stopping: so many scores in a row of a task's dev rows that are not above the best one, by the primary
            metric, end the training; the weights of the best score are kept.
        score_every: steps between two such scores; default: once a pass over the data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: float = Field(default=5e-4, gt=0, le=1, allow_inf_nan=False)
    batch_size: int = Field(default=32, ge=1)
    max_length: int | None = Field(default=None, ge=8)
    epochs: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    losses: dict[LossName, float] = Field(default_factory=dict, min_length=1)
    logits_loss: Literal["kl", "mse", "margin"] = "kl"
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    pooled_loss: Literal["cosine", "mse"] = "cosine"
    similarity_loss: Literal["mse", "kl"] = "mse"
    similarity_temperature: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    dims: tuple[Annotated[int, Field(ge=1)], ...] = ()
    warmup: float = Field(default=0.1, ge=0, lt=1)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    dropout: Annotated[float, Field(ge=0, lt=1)] | Literal["keep"] = 0.0
    mask_probability: float = Field(default=0.15, gt=0, lt=1)
    class_weights: Literal["balanced"] | dict[str, Weight] | None = None
    early_stopping: int | None = Field(default=None, ge=1)
    score_every: int | None = Field(default=None, ge=1)

    @property
    def margins(self) -> bool:
        """Whether margins between texts are compared with the teacher's."""
        return self.logits_loss == "margin" and self.losses.get("logits", 0) > 0

    @model_validator(mode="after")
    def _scores_are_used(self) -> Stage:
        if self.score_every is not None and self.early_stopping is None:
            raise ValueError("score_every: is for early_stopping; give both")
        return self

    @field_validator("dims")
    @classmethod
    def _once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if twins := [size for size in value if value.count(size) > 1]:
            raise ValueError(f"{twins[0]} is there twice, and would count twice")
        return value

    @field_validator("losses")
    @classmethod
    def _weights(cls, value: dict[LossName, float]) -> dict[LossName, float]:
        for name, weight in value.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name}: the weight must be a finite number of at least 0, not {weight}")
        return value

    @model_serializer(mode="wrap")
    def _later_if_set(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in whole(self).items() if _plain(value) != _LATER.get(name, ...)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


#: What runs where neither a recipe nor the user says otherwise. Measured on the embedded checkpoint (docs/results.md):
#: small batches come nearer to the teacher's hidden states with the same tokens; attention helps a task; sentence
#: vectors are learned better where hidden states are compared too.
DEFAULTS: dict[StageName, Stage] = {
    "general": Stage(
        learning_rate=2e-3, batch_size=8, losses={"embedding": 1, "hidden": 1, "logits": 1, "supervised": 1}
    ),
    "task": Stage(losses={"embedding": 1, "attention": 1, "hidden": 1, "logits": 1, "supervised": 1}),
    "sentences": Stage(learning_rate=2e-3, losses={"embedding": 1, "hidden": 1, "pooled": 1, "similarity": 4}),
}

#: Fine-tuning without a teacher: plain supervision with the checkpoint's own dropout.
FINE_TUNING = Stage(learning_rate=5e-5, epochs=3, dropout="keep", losses={"supervised": 1})
