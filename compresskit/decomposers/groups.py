"""The matrices that are factorised: a target is one of them, a group is what is factorised together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["linear", "embedding"]
Role = Literal["embedding", "attention", "ffn", "head"]
ROLES: tuple[Role, ...] = ("embedding", "attention", "ffn", "head")


@dataclass(frozen=True)
class Target:
    """One weight matrix that may be factorised.

    Attributes:
        name: module path in the model, as ``model.get_submodule`` takes it.
        kind: ``linear`` or ``embedding``.
        role: what the matrix does; None for a matrix that stays dense unless a recipe's pattern names it.
        shape: (m, n) of the weight.
        bias: whether the linear has a bias (it is kept, and counted with the dense rest).
        padding_idx: of an embedding.
        reason: why ``role`` is None.
        shared: names of other modules that compute with the very same weight: they get the same factors.
    """

    name: str
    kind: Kind
    role: Role | None
    shape: tuple[int, int]
    bias: bool = False
    padding_idx: int | None = None
    reason: str = ""
    shared: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of weights, without the bias."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Group:
    """Targets that are factorised together, all of one role, kind and shape.

    Attributes:
        name: the target's own where there is one; of several a name without dots, under which the base model holds
            what they share.
        targets: in the model's order.
    """

    name: str
    targets: tuple[Target, ...]

    @property
    def role(self) -> Role | None:
        """Role of every target."""
        return self.targets[0].role

    @property
    def kind(self) -> Kind:
        """Kind of every target."""
        return self.targets[0].kind

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of every target's weight."""
        return self.targets[0].shape

    @property
    def parameters(self) -> int:
        """Number of weights of all targets, without biases."""
        return sum(target.parameters for target in self.targets)

    @property
    def target_names(self) -> frozenset[str]:
        """Names of all targets."""
        return frozenset(target.name for target in self.targets)

    @property
    def target(self) -> Target:
        """The only target of a group of one."""
        (target,) = self.targets
        return target
