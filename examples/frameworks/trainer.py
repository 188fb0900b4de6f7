"""Hugging Face Trainer: a small Llama learns the bytes of a text, and another run goes on from its checkpoint.

python examples/frameworks/trainer.py [--steps 40] [--way optimizers | class] [--out examples/frameworks/out/trainer]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, get_cosine_schedule_with_warmup
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils import logging

import fastwrs

HERE = Path(__file__).resolve().parent
LENGTH, LR = 64, 1e-2
SHAPE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def make_data() -> list[dict[str, torch.Tensor]]:
    """The bytes of the licence, cut into pieces."""
    text = torch.tensor(list((HERE.parents[1] / "LICENSE").read_bytes()))
    return [{"input_ids": piece, "labels": piece} for piece in text.split(LENGTH)[:-1]]


def make_trainer(folder: Path, steps: int, way: str, **options: Any) -> Trainer:
    """A Trainer that has not yet trained; it saves half way. ``options`` go to TrainingArguments."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, **SHAPE))

    # Llama's normalisation layers are a class of their own; the head is not in front of one, and left alone.
    rescale = fastwrs.Rescale()
    groups = fastwrs.param_groups(model, rescale=rescale, weight_decay=0.1, head="skip", norm_types=LlamaRMSNorm)
    for group in groups:
        if group["rescale"] is not None:
            fastwrs.rescale_(group["params"])  # once, so that the first step starts from norm 1

    given: dict[str, Any]
    if way == "optimizers":  # you make both
        optimizer = fastwrs.AdamW(groups, lr=LR)
        given = {"optimizers": (optimizer, get_cosine_schedule_with_warmup(optimizer, steps // 10, steps))}
    else:  # Trainer makes both; with "params" it takes these groups instead of those that it would make
        given = {"optimizer_cls_and_kwargs": (fastwrs.AdamW, {"params": groups, "lr": LR})}
        options |= {"lr_scheduler_type": "cosine", "warmup_steps": steps // 10}

    options |= {"max_steps": steps, "save_steps": steps // 2, "max_grad_norm": 1.0}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": max(1, steps // 4)}
    return Trainer(model, TrainingArguments(str(folder), **quiet, **options), train_dataset=make_data(), **given)


def main(arguments: list[str] | None = None) -> tuple[Trainer, Trainer]:
    """The command line. Returns the uninterrupted Trainer, and the one that went on from the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--way", choices=("optimizers", "class"), default="optimizers")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "trainer")
    options = parser.parse_args(arguments)

    logging.disable_progress_bar()
    whole = make_trainer(options.out, options.steps, options.way)
    whole.train()
    resumed = make_trainer(options.out, options.steps, options.way)
    resumed.train(resume_from_checkpoint=str(options.out / f"checkpoint-{options.steps // 2}"))

    assert whole.model is not None and resumed.model is not None
    pairs = zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True)
    print(f"largest difference after resuming: {max(float((a - b).abs().max()) for a, b in pairs)}")
    return whole, resumed


if __name__ == "__main__":
    main()
