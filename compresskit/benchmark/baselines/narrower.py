"""The dense model with smaller widths: an ordinary checkpoint of its class, distilled as the students are."""

from __future__ import annotations

from dataclasses import replace

from compresskit.benchmark.baselines.base import Asked, Baseline, Made
from compresskit.benchmark.baselines.registry import register
from compresskit.benchmark.provenance import MadeBy
from compresskit.errors import UnreachableError
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.sentence import modules_behind
from compresskit.model.targets import count_parameters
from compresskit.model.width import Anatomy

#: Tokens of the students' text that say what matters.
_TOKENS = 16_384
#: Modules behind an encoder that take vectors of any length.
_OF_ANY_WIDTH = ("Pooling", "Normalize", "Dropout")


@register
class Narrower(Baseline):
    """Keeps all layers, and of each the heads, FFN units and hidden numbers that matter most, as many as the ratio
    leaves room for (:meth:`compresskit.model.width.Anatomy.find_widths`). No weight is factorised, so whatever loads
    the family loads it. Hidden states are compared through linear maps that are learned beside.
    """

    name = "narrower"
    summary = "the dense model with smaller hidden size and FFN and fewer heads, trained on the students' budget"
    rated = True
    trained = True

    def make(self, dense: Checkpoint, asked: Asked) -> Made:
        """The narrower model. Raises UnreachableError: no widths are small enough, or the family cannot be cut."""
        assert asked.ratio is not None
        model = dense.model
        if model.base_model is model and dense.folder is not None:
            for module in modules_behind(dense.folder):
                if module not in _OF_ANY_WIDTH:
                    raise UnreachableError(f"narrower: a {module} layer behind the encoder takes vectors of its width")
        anatomy = Anatomy(model)
        widths = anatomy.find_widths(count_parameters(model) / asked.ratio)
        statistics = None if asked.statistics is None else asked.statistics(_TOKENS)
        narrow = anatomy.narrowed(widths, statistics)
        kept, before = widths._asdict(), anatomy.widths._asdict()
        facts = {name: f"{kept[name]:,} of {before[name]:,}" for name in kept}
        fitted = {} if statistics is None else {"calibration": statistics.record()}
        return Made(replace(dense, model=narrow, kept={}), {"facts": facts, **fitted})

    def fact(self, model: str, made_by: MadeBy) -> str:
        """Its widths."""
        widths = made_by.facts or {}
        found = (
            f"hidden size {widths['hidden']}, {widths['ffn']} FFN units and {widths['heads']} heads of {model}, those "
            "that matter most"
        )
        mapped = "; without labels its states are compared through linear maps to the dense model's width"
        return found + (mapped if made_by.task is None else "")
