"""The heads that a model may have, by the words that ``--as`` takes."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

#: Word -> family -> class name. Names alone: the classes of all families would take seconds to import.
_NAMES = {
    "masked-lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "sequence-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token-classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "question-answering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "multiple-choice": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
}


def has_head(model: PreTrainedModel, head: str) -> bool:
    """Whether the model's class has this head, e.g. ``token-classification``."""
    return type(model).__name__ in _NAMES[head].values()
