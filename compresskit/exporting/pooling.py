"""The vector of a sentence, as sentence-transformers makes it of the tokens' vectors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from compresskit.model import sentence
from compresskit.model.sentence_vectors import in_lower_case, prompts
from compresskit.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from compresskit.model.checkpoint import Checkpoint

#: How the vector of a sentence is made of those of its tokens.
Pooling = Literal["mean", "cls"]
#: The name that sentence-transformers and transformers.js look for, and that of the tokens' vectors.
OUTPUT, TOKENS = "sentence_embedding", "last_hidden_state"
#: Least divisors, those of sentence-transformers: of a mean, and of a vector's length.
LEAST_TOKENS, LEAST_LENGTH = 1e-9, 1e-12


@dataclass(frozen=True)
class SentenceVector:
    """How a sentence's vector is made.

    Attributes:
        pooling: mean over the tokens that are no padding, or the first token's vector.
        normalised: whether it is then brought to length 1.
    """

    pooling: Pooling
    normalised: bool

    def of(self, hidden: Tensor, mask: Tensor) -> Tensor:  # (batch, length, h), (batch, length) -> (batch, h)
        """In torch, to compare with."""
        if self.pooling == "cls":
            vectors = hidden[:, 0]
        else:
            kept = mask[..., None].to(hidden.dtype)
            vectors = (hidden * kept).sum(1) / kept.sum(1).clamp(min=LEAST_TOKENS)
        return torch.nn.functional.normalize(vectors, dim=1, eps=LEAST_LENGTH) if self.normalised else vectors


def sentence_vector(read: Checkpoint) -> SentenceVector | None:
    """How the sentence vectors of a checkpoint are made.

    None for a model with a head, for one that is no sentence-transformers model, and for one whose vectors are made in
    a way that a graph does not hold: by other pooling than mean and cls, by cls where texts are padded in front,
    without the prompt's tokens, cut to fewer numbers, or with further modules.
    """
    if read.folder is None or read.model.base_model is not read.model:
        return None
    kind, *further = sentence.modules_behind(read.folder) or [""]
    mode = _mode(read.folder) if kind == "Pooling" and set(further) <= {"Normalize"} else None
    if mode is None or (mode == "cls" and _pads_in_front(read)):
        return None
    return SentenceVector(mode, bool(further))


def before_tokens(read: Checkpoint) -> tuple[str, ...]:
    """A note on what sentence-transformers does with a text before it is cut into tokens: a graph beside the plain
    tokenizer gives other vectors without it.
    """
    assert read.folder is not None
    parts = ["puts them in lower case"] if in_lower_case(read.folder) else []
    parts += ["puts prompts in front"] if prompts(read.folder) else []
    if not parts:
        return ()
    return (
        f"{OUTPUT} is that of sentence-transformers for texts read as it reads them: it {' and '.join(parts)}, which "
        "tokenizer.json alone does not",
    )


def _pads_in_front(read: Checkpoint) -> bool:
    """Whether the first place of a row may be padding; the graph takes it for the first token."""
    return getattr(load_tokenizer(read), "padding_side", "right") == "left"


def _mode(folder: Path) -> Pooling | None:
    """The mode in the settings of the first module behind the encoder; None for what a graph does not hold."""
    try:
        modules = json.loads((folder / sentence.MODULES).read_text(encoding="utf-8"))
        path = next(str(module["path"]) for module in modules if module["path"])
        settings = json.loads((folder / path / "config.json").read_text(encoding="utf-8"))
        # Before version 6 there was a switch for every mode.
        switches = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value]
        mode = settings.get("pooling_mode") or ", ".join(switches)
        general = folder / sentence.CONFIG
        cut = general.is_file() and json.loads(general.read_text(encoding="utf-8")).get("truncate_dim") is not None
        if cut or not settings.get("include_prompt", True):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return None
    if mode in ("cls", "pooling_mode_cls_token"):
        return "cls"
    return "mean" if mode in ("mean", "pooling_mode_mean_tokens") else None
