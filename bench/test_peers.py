"""Ours against everything else that runs on a CPU, alone and with a rescaling loop: `make bench`.

Torch's optimizers fused, by foreach, in a loop and compiled; adamp, timm, pytorch-optimizer, optimi and heavyball where
they are installed (requirements/peers.txt); and the loops that one can write after torch's fused step: out of place, in
place, by foreach, by weight_norm's kernel, compiled. All of them take turns on the parameters of four networks.
"""

from __future__ import annotations

import pytest

from fastwrs.benchmark import measure
from fastwrs.benchmark.lists import LISTS
from fastwrs.benchmark.measure import Figures
from fastwrs.benchmark.sides import OPTIONS, ours, sides

NETWORKS = ("resnet50", "vgg16_bn", "wrn_28_10", "vit_s")
MOST_COMPILED = 100_000_000
"""Above so many parameters the slow ways are left out: torch compiled, its loops, and our reference."""


@pytest.mark.filterwarnings("ignore")  # what other packages and the compiler say
@pytest.mark.parametrize("rule", OPTIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_peers(name: str, rule: str, rounds: int, keep_side):
    params = LISTS[name].params()
    contenders = sides("peers", ["cpu"], LISTS[name].convolutions)
    if LISTS[name].elements < MOST_COMPILED:
        contenders.append(ours("reference", "out"))
    else:
        contenders = [side for side in contenders if not side.name.startswith(("torch compiled", "torch for-loop"))]
    measured = 0
    for line in measure.compare(params, rule, contenders, rounds=min(rounds, 20), seconds=120):
        keep_side(name, rule, line)
        measured += isinstance(line, Figures)
    assert measured > 10
