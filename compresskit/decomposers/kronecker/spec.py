"""What is stored and what a recipe may say of a sum of Kronecker products."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from compresskit.decomposers import RuleOptions, Spec

Size = Annotated[int, Field(ge=1)]
Pair = tuple[Size, Size]


class KroneckerSpec(Spec):
    """W (m, n) = sum over ``terms`` of A (a[0], a[1]) (x) B (b[0], b[1]), with a[0]*b[0] = m and a[1]*b[1] = n."""

    method: Literal["kronecker"] = "kronecker"
    a: Pair
    b: Pair
    terms: Size = 1

    @property
    def complexity(self) -> int:
        """Products beyond the first one."""
        return self.terms - 1

    def describe(self) -> str:
        text = f"{self.a[0]}x{self.a[1]} (x) {self.b[0]}x{self.b[1]}"
        return text if self.terms == 1 else f"{self.terms} of {text}"


class KroneckerOptions(RuleOptions):
    """Recipe options: one factor's shape (``a`` or ``b``, or ``n`` for a row B); the other follows by division.

    Attributes:
        a: rows and columns of A.
        b: rows and columns of B.
        n: columns of a B with one row, as for embeddings.
        terms: products that are summed.
        swap_for_output: transpose the given shape for matrices with fewer rows than columns (the second FFN linear), as
            the paper does.
    """

    a: Pair | None = None
    b: Pair | None = None
    n: Size | None = None
    terms: Size = 1
    swap_for_output: bool = False

    @model_validator(mode="after")
    def _some_factor(self) -> KroneckerOptions:
        if self.n is not None and (self.a or self.b):
            raise ValueError("n means b: [1, n]; give n, or a and b")
        if self.n is None and not (self.a or self.b):
            raise ValueError("give a, b or n; the other factor follows by division")
        return self
