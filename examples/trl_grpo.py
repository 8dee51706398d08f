"""GRPO with TRL on the kernels: one line more than without them.

    pip install "trl==1.16.*" codistill-grpo
    python examples/trl_grpo.py

A model of 109 thousand parameters adds three numbers. A third of its samples are right. 20 steps
take about a minute on a CPU, and are too few to learn much.
"""

import random
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from codistill_kernels.integrations.trl import patch_trl

MODEL = Path(__file__).parents[1] / "demo" / "small"


def problems(count: int) -> Dataset:
    rng = random.Random(0)
    rows = [[rng.randint(10, 99) for _ in range(3)] for _ in range(count)]
    prompts = ["+".join(map(str, row)) + "=" for row in rows]
    return Dataset.from_dict({"prompt": prompts, "answer": [str(sum(row)) for row in rows]})


def accuracy(completions: list[str], answer: list[str], **_: object) -> list[float]:
    texts = zip(completions, answer, strict=True)
    return [float(f"<answer>{right}</answer>" in text) for text, right in texts]


def train(steps: int = 20) -> list[dict]:
    """The trainer's log of each step."""
    config = GRPOConfig(
        output_dir="runs/trl_grpo",
        max_steps=steps,
        per_device_train_batch_size=64,
        gradient_accumulation_steps=2,
        num_generations=8,
        num_iterations=2,
        max_completion_length=48,
        temperature=1.0,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        seed=0,
    )
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
        accuracy,
        config,
        train_dataset=problems(512),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    patch_trl()  # the one line
    train()
