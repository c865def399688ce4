"""What is stored and what a recipe may say of a tensor train."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compresskit.decomposers import RuleOptions, Spec

Pair = tuple[int, int]


class TensorTrainSpec(Spec):
    """W in ``blocks`` = (m2, n2) blocks, with ``ranks`` = (r1, r2)."""

    method: Literal["tensor-train"] = "tensor-train"
    blocks: tuple[int, int]
    ranks: tuple[int, int]

    def describe(self) -> str:
        return f"{self.blocks[0]}x{self.blocks[1]} blocks, ranks {self.ranks[0]}, {self.ranks[1]}"


class TensorTrainOptions(RuleOptions):
    """Recipe options.

    Attributes:
        blocks: rows and columns of blocks that a matrix is cut into; default: what the planner offers.
        ranks: of the two bonds, output side first; needed.
    """

    blocks: tuple[int, int] | None = None
    ranks: tuple[int, int] | None = Field(default=None)
