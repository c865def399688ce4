"""Ways to factorise a weight matrix: one file each, registered under the name that ``--method`` takes.

What a method needs, and what others need to speak of methods, is imported from here: ``interface`` says what a
decomposer owes, ``groups`` what it factorises, ``layers`` what it puts in place, ``sources`` what it reads.
"""

from compresskit.decomposers.groups import ROLES, Group, Kind, Role, Target
from compresskit.decomposers.interface import (
    AUTO,
    COST_TOKENS,
    DENSE,
    MAX_FLOPS_RATIO,
    NEAR,
    SHRINKING,
    STEPS,
    AnyDecomposer,
    Cost,
    Decomposer,
    RuleOptions,
    Spec,
)
from compresskit.decomposers.layers import (
    FactorisedEmbedding,
    FactorisedLayer,
    FactorisedLinear,
    SharedFactors,
    TiedHead,
    add_bias,
)
from compresskit.decomposers.least_squares import output_error
from compresskit.decomposers.linalg import exact_products
from compresskit.decomposers.sources import BLOCK_ROWS, Statistics, WeightSource, counts_of, moment_of, row_blocks

__all__ = [
    "AUTO",
    "BLOCK_ROWS",
    "COST_TOKENS",
    "DENSE",
    "MAX_FLOPS_RATIO",
    "NEAR",
    "ROLES",
    "SHRINKING",
    "STEPS",
    "AnyDecomposer",
    "Cost",
    "Decomposer",
    "FactorisedEmbedding",
    "FactorisedLayer",
    "FactorisedLinear",
    "Group",
    "Kind",
    "Role",
    "RuleOptions",
    "SharedFactors",
    "Spec",
    "Statistics",
    "Target",
    "TiedHead",
    "WeightSource",
    "add_bias",
    "counts_of",
    "exact_products",
    "moment_of",
    "output_error",
    "row_blocks",
]
