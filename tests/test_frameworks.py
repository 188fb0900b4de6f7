"""Trainer, Lightning with Fabric, and Accelerate: they resume bit for bit, and their wrappers hide nothing."""

from __future__ import annotations

import csv
import importlib
import logging
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import one_thread
from torch import Tensor, nn
from torch.nn import functional as F

import fastwrs

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "frameworks"
SCRIPTS = [["trainer.py"], ["trainer.py", "--way", "class"], ["lightning_module.py"], ["accelerate_loop.py"]]
pytestmark = [
    pytest.mark.frameworks,
    # Lightning's: one is of how it asks torch, the other of its own files that are there when it goes on.
    pytest.mark.filterwarnings(r"ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
]
on_every_backend = pytest.mark.usefixtures("backend")


@pytest.fixture(autouse=True, scope="module")
def _from_the_folder() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.syspath_prepend(str(FOLDER))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without a network, in a folder of its own, and with what Accelerate keeps for the whole process set back."""

    def refuse(*_: Any) -> None:
        raise AssertionError("something reaches for the network")

    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def module(name: str) -> ModuleType:
    """An example. Not imported with this file: the frameworks take seconds."""
    return importlib.import_module(name)


def assert_equal(one: Any, other: Any) -> None:
    """That two state dicts have the same bits."""
    if isinstance(one, Mapping):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


def assert_norms_held(optimizer: Any) -> None:
    """That all that is to be rescaled has the norm 1, and that there is such a thing."""
    groups = [group for group in optimizer.param_groups if group["rescale"] is not None]
    assert groups
    for group in groups:
        norms = fastwrs.channel_norms(group["params"], axis=group["rescale"].axis)
        assert max(float((norm - 1).abs().max()) for norm in norms) < 3e-7


def assert_half_the_steps_were_saved(saved: Mapping[str, Any], whole: Any) -> None:
    """That there was something to resume: half the steps, and weights that went on to change."""
    counts = {int(state["step"]) for state in saved["state"].values()}
    assert len(counts) == 1
    assert {2 * count for count in counts} == {int(state["step"]) for state in whole.state_dict()["state"].values()}


@pytest.mark.parametrize("command", SCRIPTS, ids=" ".join)
def test_the_examples_run(command: list[str], tmp_path: Path) -> None:
    """As a user runs them; nothing is written but to --out."""
    done = subprocess.run(
        [sys.executable, FOLDER / command[0], *command[1:], "--out", "out"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "largest difference after resuming: 0.0\n" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert any((tmp_path / "out").rglob("*"))


# -------------------------------------------------------------------------------------------------------------- Trainer


@on_every_backend
@pytest.mark.parametrize("way", ["optimizers", "class"])
def test_trainer_resumes_bit_for_bit(way: str, tmp_path: Path) -> None:
    whole, resumed = module("trainer").main(["--steps", "12", "--way", way, "--out", str(tmp_path)])
    assert_equal(whole.model.state_dict(), resumed.model.state_dict())
    assert_equal(whole.optimizer.state_dict(), resumed.optimizer.state_dict())
    assert_equal(whole.lr_scheduler.state_dict(), resumed.lr_scheduler.state_dict())
    saved = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert_half_the_steps_were_saved(saved, whole.optimizer)
    assert_norms_held(resumed.optimizer)


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_trainer_goes_on_where_it_was_stopped(options: dict[str, Any], tmp_path: Path) -> None:
    """Really stopped, in a step that is no multiple of anything."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            control.should_save = control.should_training_stop = state.global_step == 5

    make = module("trainer").make_trainer
    whole, stopped, resumed = (make(tmp_path / name, 12, "optimizers", **options) for name in "abb")
    whole.train()
    stopped.add_callback(Stop())
    stopped.train()
    assert stopped.state.global_step == 5
    resumed.train(resume_from_checkpoint=True)
    assert_equal(whole.model.state_dict(), resumed.model.state_dict())
    assert_equal(whole.optimizer.state_dict(), resumed.optimizer.state_dict())
    assert_equal(whole.lr_scheduler.state_dict(), resumed.lr_scheduler.state_dict())
    assert_norms_held(whole.optimizer)


def trainer_of_torch_or_ours(folder: Path, **given: Any) -> Any:
    """A Trainer that sorts the parameters into decayed and other ones itself."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    example = module("trainer")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=example.LENGTH, **example.SHAPE))
    saving = {"max_steps": 8, "save_steps": 4, "learning_rate": 1e-3, "weight_decay": 1.0, "optim": "adamw_torch"}
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **saving)
    return Trainer(model, arguments, train_dataset=example.make_data(), **given)


def test_trainer_with_its_own_groups_is_as_with_torch(tmp_path: Path) -> None:
    """From the start, and from a checkpoint that torch's AdamW has left."""
    ours = {"optimizer_cls_and_kwargs": (fastwrs.AdamW, {"lr": 1e-3})}
    with_torch, with_ours = trainer_of_torch_or_ours(tmp_path / "a"), trainer_of_torch_or_ours(tmp_path / "b", **ours)
    changed = trainer_of_torch_or_ours(tmp_path / "c", **ours)
    before = [p.detach().clone() for p in with_torch.model.parameters()]
    with_torch.train()
    with_ours.train()
    changed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    for trainer in (with_ours, changed):
        assert isinstance(trainer.optimizer.optimizer, fastwrs.AdamW)
        assert sorted(group["weight_decay"] for group in trainer.optimizer.param_groups) == [0.0, 1.0]
        states = dict(with_torch.model.named_parameters())
        for name, p in trainer.model.named_parameters():
            torch.testing.assert_close(p, states[name], rtol=1e-4, atol=1e-6)
    assert not any(map(torch.equal, before, with_ours.model.parameters()))


def test_trainers_own_groups_cannot_be_rescaled(tmp_path: Path) -> None:
    given = {"optimizer_cls_and_kwargs": (fastwrs.AdamW, {"lr": 1e-3, "rescale": fastwrs.Rescale()})}
    with pytest.raises(ValueError, match=r"needs at least 2 dimensions\. fastwrs\.param_groups"):
        trainer_of_torch_or_ours(tmp_path, **given).train()


@pytest.mark.parametrize("axis", ["out", "in"])
def test_the_layers_of_gpt2_have_their_outputs_in_dimension_1(axis: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    rescaled, norms, rest = fastwrs.param_groups(model, rescale=fastwrs.Rescale(axis=axis), weight_decay=0.1)
    assert rescaled["rescale"].axis == (0,)
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert rescaled["param_names"] == [f"transformer.h.0.{layer}.weight" for layer in layers]
    assert norms["weight_decay"] == 0.1 and len(norms["params"]) == 6
    assert "transformer.wte.weight" in rest["param_names"]  # the head's too: tied to an embedding, which comes first
    optimizer = fastwrs.AdamW([rescaled, norms, rest], lr=0.01)
    tokens = torch.arange(16).view(1, 16)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert_norms_held(optimizer)
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert weight.shape == (8, 32)
    torch.testing.assert_close(torch.linalg.vector_norm(weight, dim=0), torch.ones(32), rtol=0, atol=3e-7)


# ------------------------------------------------------------------------------------------------- Lightning and Fabric


@on_every_backend
def test_lightning_resumes_bit_for_bit(tmp_path: Path) -> None:
    example = module("lightning_module")
    whole, resumed = example.main(["--epochs", "2", "--out", str(tmp_path)])
    assert_equal(whole.lightning_module.state_dict(), resumed.lightning_module.state_dict())
    (one,), (other,) = whole.optimizers, resumed.optimizers
    assert_equal(one.state_dict(), other.state_dict())
    (one_schedule,), (other_schedule,) = (run.lr_scheduler_configs for run in (whole, resumed))
    assert_equal(one_schedule.scheduler.state_dict(), other_schedule.scheduler.state_dict())
    assert_norms_held(other)

    file = tmp_path / "saved" / "epoch=0.ckpt"
    assert_half_the_steps_were_saved(torch.load(file, weights_only=True)["optimizer_states"][0], one)
    loaded = example.Digits.load_from_checkpoint(file, weights_only=True)
    assert loaded.rescale == loaded.hparams.rescale == fastwrs.Rescale()


def test_lightnings_monitor_logs_the_rate_of_every_group(tmp_path: Path) -> None:
    example = module("lightning_module")
    trainer = example.make_trainer(tmp_path, 2)
    digits = example.Digits()
    trainer.fit(digits, example.make_loader())
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    logged = [[row[f"lr-AdamW/pg{k}"] for row in rows if row["lr-AdamW/pg1"]] for k in (1, 2, 3)]
    assert logged[0] == logged[1] == logged[2]
    assert len(set(logged[0])) > 3
    assert len(trainer.optimizers[0].param_groups) == len(digits.groups()) == 3


def fit(folder: Path, digits: nn.Module, **options: Any) -> Any:
    """Two epochs without mixed precision and logs; returns the Trainer."""
    import lightning

    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    quiet |= {"enable_progress_bar": False, "default_root_dir": folder, "max_epochs": 2}
    trainer = lightning.Trainer(accelerator="cpu", **{**quiet, **options})
    trainer.fit(digits, module("lightning_module").make_loader())  # type: ignore[arg-type]
    return trainer


def test_lightnings_manual_optimization_has_the_same_bits(tmp_path: Path) -> None:
    example = module("lightning_module")

    class ByHand(example.Digits):
        automatic_optimization = False

        def training_step(self, batch: Any) -> None:
            optimizer, schedule = self.optimizers(), self.lr_schedulers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch))
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
            schedule.step()

    automatic, by_hand = example.Digits(), ByHand()
    fit(tmp_path, automatic, gradient_clip_val=1.0)
    trainer = fit(tmp_path, by_hand)
    assert_equal(automatic.state_dict(), by_hand.state_dict())
    assert_norms_held(trainer.optimizers[0])


def test_lightning_clips_where_grad_scaler_unscales(tmp_path: Path) -> None:
    """Which an optimizer has to leave to it. What overflows is skipped; all else is as without scaling."""
    from lightning.pytorch.plugins import MixedPrecision

    example = module("lightning_module")

    class Scaled(example.Digits):
        fused: bool | None = False
        overflow = -1

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch)
            return loss * float("inf") if self.trainer.current_epoch == 0 and batch_idx == self.overflow else loss

        def configure_optimizers(self) -> Any:
            return fastwrs.AdamW(self.groups(), lr=self.lr, fused=self.fused)

    class Plain(MixedPrecision):
        """The scaler without fp16, so that a power of two as scale changes no bit."""

        def autocast_context_manager(self) -> Any:
            return torch.autocast("cpu", enabled=False)

    def plugin() -> Any:
        return Plain("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))  # type: ignore[attr-defined]

    scaled, plain, skipping = Scaled(), Scaled(), Scaled()
    fit(tmp_path, scaled, gradient_clip_val=1.0, plugins=[plugin()])
    fit(tmp_path, plain, gradient_clip_val=1.0)
    assert_equal(scaled.state_dict(), plain.state_dict())
    skipping.overflow = 3
    trainer = fit(tmp_path, skipping, gradient_clip_val=1.0, plugins=[plugin()])
    counts = {int(state["step"]) for state in trainer.optimizers[0].state.values()}
    assert counts == {trainer.num_training_batches * 2 - 1}
    assert_norms_held(trainer.optimizers[0])
    refused = Scaled()
    refused.fused = None
    with pytest.raises(RuntimeError, match=r"AdamW, does not allow for gradient clipping.*fused"):
        fit(tmp_path, refused, gradient_clip_val=1.0, plugins=[plugin()])


def test_fabric_resumes_bit_for_bit(tmp_path: Path) -> None:
    import lightning

    task = module("digits_task")
    images, labels = task.make_data()[:256]

    def setup() -> Any:
        fabric = lightning.Fabric(accelerator="cpu")
        model = task.make_model()
        optimizer = fastwrs.SGD(fastwrs.param_groups(model, rescale=fastwrs.Rescale(every=3)), lr=0.1, momentum=0.9)
        return fabric, *fabric.setup(model, optimizer)

    def train(run: Any, steps: range) -> None:
        fabric, model, optimizer = run
        for step in steps:
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(images[step * 32 :][:32]), labels[step * 32 :][:32]))
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()

    whole, resumed = setup(), setup()
    train(whole, range(4))
    fabric, model, optimizer = whole
    fabric.save(tmp_path / "saved.ckpt", {"model": model, "optimizer": optimizer})
    assert (
        torch.load(tmp_path / "saved.ckpt", weights_only=True)["optimizer"]["param_groups"][0]["rescale"]["every"] == 3
    )
    train(whole, range(4, 6))
    fabric, other_model, other = resumed
    fabric.load(tmp_path / "saved.ckpt", {"model": other_model, "optimizer": other})
    train(resumed, range(4, 6))
    assert_equal(model.state_dict(), other_model.state_dict())
    assert_equal(optimizer.state_dict(), other.state_dict())
    assert_norms_held(other)  # step 6 rescales


# ----------------------------------------------------------------------------------------------------------- Accelerate


@on_every_backend
def test_accelerate_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, resumed = module("accelerate_loop").main(["--out", str(tmp_path)])
    assert_equal(whole.model.state_dict(), resumed.model.state_dict())
    assert_equal(whole.optimizer.state_dict(), resumed.optimizer.state_dict())
    assert_equal(whole.schedule.state_dict(), resumed.schedule.state_dict())
    assert_norms_held(resumed.optimizer)
    saved = torch.load(tmp_path / "optimizer.bin", weights_only=True)
    batches = len(whole.loader)
    steps = {int(state["step"]) for state in whole.optimizer.state_dict()["state"].values()}
    assert steps == {batches * 2 // 2}  # two epochs, two batches for a step
    assert {int(state["step"]) for state in saved["state"].values()} == {(batches + 6) // 2}


@pytest.mark.parametrize("fused", [False, None])
def test_accelerate_knows_of_skipped_steps(fused: bool | None) -> None:
    """Where they are GradScaler's to skip; otherwise, as with torch's fused optimizers, its scheduler goes on."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)  # type: ignore[attr-defined]
    task = module("digits_task")
    images, labels = task.make_data()[:64]
    model = task.make_model()
    optimizer = fastwrs.AdamW(fastwrs.param_groups(model), lr=0.01, fused=fused)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    skipped = []
    for factor in (1.0, float("inf"), 1.0):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(images), labels) * factor)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        skipped.append(optimizer.step_was_skipped)
        assert all(map(torch.equal, before, model.parameters())) == (factor != 1.0)
    assert skipped == [False, fused is False, False]
    assert schedule.get_last_lr()[0] == 0.01 * 0.5 ** (2 if fused is False else 3)
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}
    assert_norms_held(optimizer)


# ------------------------------------------------------------------------------------------------------------- wrappers


def wrapped(kind: str, model: nn.Module, optimizer: Any) -> Any:
    """What a framework hands out in the place of an optimizer."""
    if kind == "accelerate":
        from accelerate import Accelerator

        return Accelerator(cpu=True).prepare(optimizer)
    if kind == "fabric":
        import lightning

        return lightning.Fabric(accelerator="cpu").setup(model, optimizer)[1]
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from lightning.pytorch.strategies import SingleDeviceStrategy

    made = LightningOptimizer(optimizer)
    made._strategy = SingleDeviceStrategy()
    return made


@pytest.mark.parametrize("kind", ["accelerate", "fabric", "lightning"])
def test_a_weight_rescaler_sees_through_the_wrapper_of_any_optimizer(kind: str) -> None:
    model = module("digits_task").make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rescaler = fastwrs.WeightRescaler(wrapped(kind, model, optimizer), fastwrs.Rescale())
    assert rescaler.optimizer is optimizer
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    norms = fastwrs.channel_norms([p for p in model.parameters() if p.ndim >= 2])
    assert max(float((norm - 1).abs().max()) for norm in norms) < 3e-7


@pytest.mark.parametrize("kind", ["accelerate", "fabric", "lightning"])
def test_what_watches_an_optimizer_sees_through_its_wrapper(kind: str) -> None:
    model = module("digits_task").make_model()
    optimizer = fastwrs.AdamW(fastwrs.param_groups(model, weight_decay=0.1), lr=0.1)
    outside = wrapped(kind, model, optimizer)
    assert outside is not optimizer
    monitor = fastwrs.Monitor(outside)
    follower = fastwrs.follow_batchnorm(model, outside)
    window = fastwrs.WeightDecayWindow(outside, start=2)
    assert monitor.optimizer is window.optimizer is optimizer
    assert len(follower.pairs) == 2
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0] * 3
    statistics = model[1].running_var.clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    window.step()
    assert monitor.steps == 1
    assert monitor.curve("norm_after")["0.weight"]
    assert not torch.equal(model[1].running_var, statistics)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1, 0.0]
