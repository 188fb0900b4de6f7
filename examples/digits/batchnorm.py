"""What a rescale does to a network in eval mode, with and without ``fastwrs.follow_batchnorm``, on the digits.

    python examples/digits/batchnorm.py [--epochs 3] [--backend auto]

The demo's network is trained without rescaling; then one step is taken three times from the same place: without a
rescale, with one, and with one that BatchNorm follows. The second table trains on with a rescale every 10 steps.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from train import BATCH, load_data, make_model

import fastwrs

STEPS, EVERY = 60, 10


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """The outputs in eval mode, with the statistics as they are."""
    model.eval()
    with torch.no_grad():
        found = model(images)
    model.train()
    return found


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, count: int) -> None:
    """Some steps on batches in a fixed order."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(count))
    for k in range(count):
        batch = order[torch.arange(k * BATCH, (k + 1) * BATCH) % len(x)]
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


def optimizer_of(model: nn.Module, rescale: fastwrs.Rescale | None, follow: bool, backend: str) -> fastwrs.SGD:
    """SGD that rescales all weights but the head's, which has no BatchNorm behind it."""
    groups = fastwrs.param_groups(model, rescale=rescale, head="skip")
    optimizer = fastwrs.SGD(groups, lr=0.05, momentum=0.9, backend=backend)
    if follow:
        fastwrs.follow_batchnorm(model, optimizer)
    return optimizer


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3, help="without rescaling, before")
    parser.add_argument("--backend", default="auto", help="a backend of fastwrs.backends()")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the network is so small that a second thread only waits
    x, y, x_test, y_test = load_data()
    trained = make_model()
    steps(trained, optimizer_of(trained, None, False, options.backend), x, y, options.epochs * (len(x) // BATCH))

    def accuracy(model: nn.Module) -> float:
        return 100 * (logits(model, x_test).argmax(1) == y_test).float().mean().item()

    for title, rescale, count in (
        ("one step", fastwrs.Rescale(), 1),
        (f"{STEPS} steps, a rescale every {EVERY}, the last one just now", fastwrs.Rescale(every=EVERY), STEPS),
    ):
        print(f"\n{title}\n{'':<34}accuracy in eval mode (%)   largest change of a logit")
        plain = None
        for name, option, follow in (
            ("no rescale", None, False),
            ("rescale", rescale, False),
            ("rescale that BatchNorm follows", rescale, True),
        ):
            model = copy.deepcopy(trained)
            steps(model, optimizer_of(model, option, follow, options.backend), x, y, count)
            found = logits(model, x_test)
            plain = found if plain is None else plain
            # Further steps from rescaled weights are other steps: only after one can logits be compared.
            change = f"{float((found - plain).abs().max()):.2g}" if count == 1 and option else ""
            print(f"{name:<34}{accuracy(model):>25.1f}   {change:>25}")


if __name__ == "__main__":
    main()
