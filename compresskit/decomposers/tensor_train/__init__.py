"""Tensor-train factorisation: a matrix as a tensor of order three, cut into a train of three cores (TT-SVD).

Rows are numbered i = i2 m1 + i1, columns j = j2 n3 + j3, so that W (m2 m1, n2 n3) is a tensor with the modes i1,
(i2, j2) and j3, a TT-matrix whose first core has no column and whose last core no row index:

    W[i, j] = sum over p, q of  A[i1, p] G[i2, p, j2, q] B[q, j3]

with a: (m1, r1), core: (m2, r1, n2, r2), b: (r2, n3). Every product with it is three plain matrix products. A
vocabulary that m2 does not divide is padded with rows of zeros, which look-up and tied head never show. TT-SVD
(Oseledets 2011) cuts the singular values bond by bond. In one shot a train of a linear is not nearer than low rank: A
and B serve m2 and n2 blocks alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from compresskit.decomposers import (
    COST_TOKENS,
    MAX_FLOPS_RATIO,
    SHRINKING,
    STEPS,
    Cost,
    Decomposer,
    Group,
    Statistics,
    WeightSource,
    least_squares,
    linalg,
)
from compresskit.decomposers.registry import register
from compresskit.decomposers.tensor_train import fit
from compresskit.decomposers.tensor_train.layers import TensorTrainEmbedding, TensorTrainLinear
from compresskit.decomposers.tensor_train.spec import Pair, TensorTrainOptions, TensorTrainSpec
from compresskit.errors import InputError

#: Blocks of an embedding, (rows, columns). The first is near low rank in one shot at 8x and 19x
#: (reports/minilm-shared-shapes); at low ratios only the second is as fast as dense under a tied head.
_EMBEDDING_BLOCKS = ((4, 2), (2, 2))


@register
class TensorTrain(Decomposer[TensorTrainSpec, TensorTrainOptions]):
    """Three cores from the TT-SVD."""

    name = "tensor-train"
    summary = "a train of three cores from the TT-SVD, outer ones shared by all blocks of a matrix"
    reference = "Oseledets 2011"
    spec_type = TensorTrainSpec
    options_type = TensorTrainOptions

    def candidates(self, group: Group, parameters: int, *, allow_slow: bool = False) -> list[TensorTrainSpec]:
        """Equal ranks and their neighbours. The fewest blocks for which both outer cores are about equally long: of
        equally large trains these are nearest to the original (reports/minilm-shared-shapes).
        """
        for share in SHRINKING:
            for blocks in _blocks(group):
                specs = dict.fromkeys(
                    TensorTrainSpec(blocks=blocks, ranks=ranks)
                    for step in STEPS
                    for ranks in _ranks_for(group, blocks, round(parameters * share * step))
                )
                found = self.offered(group, specs, round(parameters * share), allow_slow=allow_slow)
                if found:
                    return found
        return []

    def slow(self, group: Group, spec: TensorTrainSpec) -> bool:
        """An embedding is slow where its tied head would be."""
        if group.kind == "linear":
            return super().slow(group, spec)
        m2, r1 = spec.blocks[0], spec.ranks[0]
        head = self.cost(group, spec, 1).flops + 2 * math.ceil(group.shape[0] / m2) * m2 * r1
        return head > MAX_FLOPS_RATIO * 2 * group.parameters

    def resolve(self, group: Group, options: TensorTrainOptions) -> TensorTrainSpec:
        if options.ranks is None:
            raise InputError(f"tensor-train for {group.name}: give ranks")
        blocks = options.blocks or next(iter(_blocks(group)), None)
        if blocks is None:
            raise InputError(f"tensor-train for {group.name}: a side of its shape has no divisor; give blocks")
        spec = TensorTrainSpec(blocks=blocks, ranks=options.ranks)
        self.check(group, spec)
        return spec

    def check(self, group: Group, spec: TensorTrainSpec) -> None:
        (m2, n2), (r1, r2) = spec.blocks, spec.ranks
        m, n = group.shape
        where = f"tensor-train for {group.name} ({m}x{n}): {spec.describe()}"
        if min(m2, n2, r1, r2) < 1 or n % n2 or (m % m2 and group.kind == "linear") or -m % m2 >= math.ceil(m / m2):
            raise InputError(f"{where}: blocks must divide the shape, ranks be at least 1")
        m1, n3 = math.ceil(m / m2), n // n2
        if r1 > min(m1, m2 * n2 * r2) or r2 > min(n3, m2 * n2 * r1):
            raise InputError(f"{where}: larger ranks than {m1} and {n3} (or than the core can join) add nothing")
        if self.cost(group, spec).parameters >= group.parameters:
            raise InputError(f"{where} saves no parameters")

    def cost(self, group: Group, spec: TensorTrainSpec, tokens: int = COST_TOKENS) -> Cost:
        (m2, n2), (r1, r2) = spec.blocks, spec.ranks
        m, n = group.shape
        m1, n3 = math.ceil(m / m2), n // n2
        core = m2 * r1 * n2 * r2
        # A look-up of A's rows costs nothing.
        per_token = n * r2 + core + (m1 * m2 * r1 if group.kind == "linear" else 0)
        return Cost(m1 * r1 + core + r2 * n3, 2 * tokens * per_token)

    def errors(self, group: Group, specs: Sequence[TensorTrainSpec], source: WeightSource) -> list[float]:
        found: dict[TensorTrainSpec, float] = {}
        for blocks in {spec.blocks for spec in specs}:
            same = [spec for spec in specs if spec.blocks == blocks]
            tensor = fit.as_tensor(source.read(group.target), blocks)
            m1, joined, n3 = tensor.shape
            total = float(tensor.square().sum())
            left, values, _ = fit.leading_svd(tensor.flatten(1), max(spec.ranks[0] for spec in same))
            rest = left.T @ tensor.flatten(1)  # (largest r1, m2 n2 n3)
            for r1 in {spec.ranks[0] for spec in same}:
                lost = total - float(values[:r1].square().sum())
                tail, right = linalg.leading(linalg.gram([rest[:r1].reshape(-1, n3)]), n3)
                # The train's own rows beyond the vocabulary are not there: their share is no error.
                padded = left[m1 - (-group.shape[0] % blocks[0]) :, :r1] @ rest[:r1]
                right = right.to(padded.dtype)
                beyond = (padded.unflatten(1, (joined, n3))[:, -blocks[1] :] @ right).square().sum((0, 1))
                for spec in (spec for spec in same if spec.ranks[0] == r1):
                    r2 = spec.ranks[1]
                    residual = max(0.0, lost) + float(tail[r2:].square().sum()) - float(beyond[:r2].sum())
                    found[spec] = math.sqrt(max(0.0, residual) / total) if total > 0 else 0.0
        return [found[spec] for spec in specs]

    def output_errors(
        self, group: Group, specs: Sequence[TensorTrainSpec], source: WeightSource, statistics: Statistics
    ) -> list[float]:
        """Of one spec exactly; of several an upper bound, about 2 % above it: with one round of alternation."""
        rounds, dtype = (fit.ROUNDS, torch.float64) if len(specs) == 1 else (1, torch.float32)
        known = fit.seen(group.target, source, statistics, dtype)
        if known is None:
            return super().output_errors(group, specs, source, statistics)
        captured: dict[TensorTrainSpec, float] = {}
        for blocks in {spec.blocks for spec in specs}:
            same = [spec for spec in specs if spec.blocks == blocks]
            svd = fit.shared_svd(max(spec.ranks[0] for spec in same))
            if isinstance(known, fit.SeenRows) and len(specs) > 1:
                captured |= fit.row_energies(known, same, svd)
            else:
                captured |= {spec: fit.to_outputs(known, spec, rounds, svd)[-1] for spec in same}
        return [least_squares.error(known.energy, captured[spec]) for spec in specs]

    def factorise(
        self, group: Group, spec: TensorTrainSpec, source: WeightSource, statistics: Statistics | None = None
    ) -> dict[str, Tensor]:
        weight, name = source.read(group.target), group.target.name
        known = fit.seen(group.target, source, statistics)
        a, core, b = fit.balanced(
            *(fit.tt_svd(spec)(weight) if known is None else fit.to_outputs(known, spec, fit.ROUNDS)[:3])
        )
        factors = {f"{name}.a": a, f"{name}.core": core, f"{name}.b": b}
        return {name: factor.to(weight.dtype).contiguous() for name, factor in factors.items()}

    def layers(self, group: Group, spec: TensorTrainSpec) -> dict[str, nn.Module]:
        target, blocks, ranks = group.target, spec.blocks, spec.ranks
        m, n = target.shape
        if target.kind == "embedding":
            return {target.name: TensorTrainEmbedding(m, n, blocks, ranks, target.padding_idx)}
        return {target.name: TensorTrainLinear(n, m, blocks, ranks, target.bias)}


def _blocks(group: Group) -> list[Pair]:
    """(m2, n2) that are offered, preferred ones first; none where a side has no divisor above 1."""
    m, n = group.shape
    if group.kind == "embedding":
        return [(m2, n2 if n % n2 == 0 else 1) for m2, n2 in _EMBEDDING_BLOCKS if m > m2]
    pairs = [(m2, n2) for m2 in _divisors(m) for n2 in _divisors(n)]

    def preference(pair: Pair) -> tuple[float, int]:
        m2, n2 = pair
        return round(abs(math.log((m / m2) / (n / n2))), 3), m2 * n2

    return sorted(pairs, key=preference)[:1]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(2, number) if number % divisor == 0]


def _ranks_for(group: Group, blocks: Pair, parameters: int) -> Iterator[Pair]:
    """Ranks (r1, r2), about equal, that lead to about so many parameters."""
    (m, n), (m2, n2) = group.shape, blocks
    m1, n3 = math.ceil(m / m2), n // n2
    linear, square = m1 + n3, m2 * n2
    middle = (-linear + (linear**2 + 4 * square * max(0, parameters)) ** 0.5) / (2 * square)
    for r2 in {min(n3, max(1, round(middle) + shift)) for shift in (-1, 0, 1)}:
        r1 = max(1, round((parameters - n3 * r2) / (m1 + square * r2)))
        if r1 <= min(m1, square * r2) and r2 <= square * r1:
            yield r1, r2
