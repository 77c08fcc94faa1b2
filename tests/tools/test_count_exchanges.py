"""What scripts/count_exchanges.py counts, by hand."""

import sys

from paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from count_exchanges import of_all


def test_a_step_of_the_real_model() -> None:
    """Two sums a layer, of one and two arrays; self-conditioning, made and taken in; two more."""
    canvas = 256 * 2816 * 2
    found = of_all(2)
    assert len(found) == 2 * 30 + 4
    assert sorted(found)[2:] == [canvas] * 32 + [2 * canvas] * 30
    assert max(sorted(found)[:2]) < 16_000  # what is read off, and the state
