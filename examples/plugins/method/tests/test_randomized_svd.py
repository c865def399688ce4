"""The checks that compresskit has for every method. Run: ``pytest examples/plugins/method/tests``."""

import pytest
from compresskit_randomized_svd import RandomizedSvd

from compresskit.testing import DecomposerChecks, cases


@pytest.mark.parametrize("case", cases(RandomizedSvd()), ids=str)
class TestRandomizedSvd(DecomposerChecks):
    pass
