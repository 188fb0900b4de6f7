"""Accelerate: a small network learns digits, and a second run goes on from a checkpoint of the first.

python examples/frameworks/accelerate_loop.py [--epochs 2] [--out examples/frameworks/out/accelerate]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from digits_task import make_data, make_model
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fastwrs

HERE = Path(__file__).resolve().parent
LR, BATCH, ACCUMULATE = 0.1, 64, 2


class Run:
    """A training: ``(epoch, batch)`` is where it is, and comes with what else ``save_state`` saves."""

    def __init__(self, epochs: int, **options: Any) -> None:
        # An order of the images that depends on the seed and the epoch alone.
        order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0)
        options = {
            "dataloader_config": order,
            "mixed_precision": "bf16",
            "gradient_accumulation_steps": ACCUMULATE,
            **options,
        }
        self.accelerator, self.epochs, self.epoch, self.batch = Accelerator(cpu=True, **options), epochs, 0, 0
        model, loader = make_model(), DataLoader(make_data(), BATCH, shuffle=True, drop_last=True)
        groups = fastwrs.param_groups(model, rescale=fastwrs.Rescale(), weight_decay=1e-3)
        for group in groups:
            if group["rescale"] is not None:
                fastwrs.rescale_(group["params"])  # once, so that the first step starts from norm 1
        optimizer = fastwrs.SGD(groups, lr=LR, momentum=0.9, nesterov=True)
        fastwrs.follow_batchnorm(model, optimizer)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader) // ACCUMULATE)
        self.model, self.optimizer, self.schedule, self.loader = self.accelerator.prepare(
            model, optimizer, schedule, loader
        )
        self.accelerator.register_for_checkpointing(self)

    def state_dict(self) -> dict[str, int]:
        """Where it is."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes there."""
        self.epoch, self.batch = state["epoch"], state["batch"]

    def train(self, save_at: tuple[int, int] | None = None, folder: Path | None = None) -> None:
        """Trains from where it is to the end, and saves into ``folder`` when it is at ``(epoch, batch)``."""
        while self.epoch < self.epochs:
            self.loader.set_epoch(self.epoch)  # the order of its images
            for images, labels in self.accelerator.skip_first_batches(self.loader, self.batch):
                with self.accelerator.accumulate(self.model):
                    with self.accelerator.autocast():
                        loss = F.cross_entropy(self.model(images), labels)
                    self.accelerator.backward(loss)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()
                self.batch += 1
                if (self.epoch, self.batch) == save_at:
                    self.accelerator.save_state(str(folder))
            self.epoch, self.batch = self.epoch + 1, 0


def main(arguments: list[str] | None = None) -> tuple[Run, Run]:
    """The command line. Returns the uninterrupted run, and the one that went on from the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "out" / "accelerate")
    options = parser.parse_args(arguments)

    whole, resumed = Run(options.epochs), Run(options.epochs)
    whole.train(save_at=(options.epochs // 2, 6), folder=options.out)
    resumed.accelerator.load_state(str(options.out))
    resumed.train()

    pairs = zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True)
    print(f"largest difference after resuming: {max(float((a - b).abs().max()) for a, b in pairs)}")
    return whole, resumed


if __name__ == "__main__":
    main()
