"""Lightning: a small network learns digits, and a second run goes on from a checkpoint of the first.

python examples/frameworks/lightning_module.py [--epochs 4] [--out examples/frameworks/out/lightning]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from digits_task import make_data, make_model
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

import fastwrs

HERE = Path(__file__).resolve().parent


class Digits(lightning.LightningModule):
    """The network, its loss and its optimizer. The options of fastwrs are saved as other hyperparameters are."""

    def __init__(self, rescale: fastwrs.Rescale = fastwrs.Rescale(), lr: float = 1e-2) -> None:  # noqa: B008 (frozen)
        super().__init__()
        self.save_hyperparameters()
        self.network, self.rescale, self.lr = make_model(), rescale, lr
        # Once, so that the first step starts from norm 1; not in configure_optimizers, which runs when resuming too,
        # after the weights have been loaded, and would round them anew.
        for group in self.groups():
            if group["rescale"] is not None:
                fastwrs.rescale_(group["params"], axis=rescale.axis, target=rescale.target)

    def groups(self) -> list[dict[str, Any]]:
        """Which parameters are rescaled and which are decayed."""
        return fastwrs.param_groups(self.network, rescale=self.rescale, weight_decay=0.01)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW with rescaled weights, and a learning rate that changes with every step."""
        # Lightning clips, in mixed precision, the gradients of optimizers that say that they are not fused.
        optimizer = fastwrs.AdamW(self.groups(), lr=self.lr, fused=False)
        fastwrs.follow_batchnorm(self.network, optimizer)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def make_trainer(folder: Path, epochs: int, **options: Any) -> lightning.Trainer:
    """A Trainer that saves half way."""
    half: dict[str, Any] = {"every_n_epochs": epochs // 2, "save_top_k": -1, "enable_version_counter": False}
    saving = ModelCheckpoint(folder / "saved", filename="{epoch}", **half)
    options = {"callbacks": [saving, LearningRateMonitor()], "logger": CSVLogger(folder), **options}
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 5}
    return lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, precision="bf16-mixed", gradient_clip_val=1.0, **quiet, **options
    )


def make_loader() -> DataLoader:
    """Batches in an order that depends on the epoch alone, so that a run that goes on sees those that come next."""
    data = make_data()
    return DataLoader(data, batch_size=128, drop_last=True, sampler=DistributedSampler(data, num_replicas=1, rank=0))


def main(arguments: list[str] | None = None) -> tuple[lightning.Trainer, lightning.Trainer]:
    """The command line. Returns the uninterrupted Trainer, and the one that went on from the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", type=Path, default=HERE / "out" / "lightning")
    options = parser.parse_args(arguments)

    whole, resumed = make_trainer(options.out, options.epochs), make_trainer(options.out, options.epochs)
    whole.fit(Digits(), make_loader())
    saved = options.out / "saved" / f"epoch={options.epochs // 2 - 1}.ckpt"
    resumed.fit(Digits(), make_loader(), ckpt_path=saved, weights_only=True)

    states = (trainer.lightning_module.state_dict().values() for trainer in (whole, resumed))
    print(f"largest difference after resuming: {max(float((a - b).abs().max()) for a, b in zip(*states, strict=True))}")
    return whole, resumed


if __name__ == "__main__":
    main()
