"""Phases of a training step: CoDistill against GRPO of the large model, on the same prompts.

    python -m bench step                      vLLM or Hugging Face rollouts, as train.py
    python -m bench step --rollouts random    no engine: score and update only

The paper shows these times in Figure 5 (a step) and Figure 6 (rollouts). The models have random
weights. On a GPU they have the paper's shapes, with as many layers as fit; on a CPU they are small.
Every run calls `Trainer.step` in a process of its own.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from bench import results
from bench.shapes import KEPT, ROLLOUTS_PER_PROMPT
from bench.table import Table

PHASES = ("rollout", "score", "update_small", "update_large", "sync")
RUNS = {
    "GRPO of the large model": dict(algorithm="grpo", generations=KEPT),
    "CoDistill without down-sampling": dict(algorithm="codistill", generations=KEPT),
    "CoDistill": dict(algorithm="codistill", generations=ROLLOUTS_PER_PROMPT),
}


@dataclass(frozen=True)
class StepRow:
    """The time of one phase of a step, over the steps of one run."""

    device: str
    driver: str
    torch: str
    triton: str
    commit: str
    models: str
    rollouts: str
    run: str
    phase: str
    median_s: float
    p20_s: float
    p80_s: float
    steps: int
    tokens: int
    """Mean length of a completion."""


def table(path: Path) -> Table[StepRow]:
    return Table(path, StepRow, ("device", "models", "rollouts", "run", "phase"))


# --- one run, in a process of its own ----------------------------------------------------------


class RandomEngine:
    """Gives random tokens at once, to measure the rest of a step on a machine without an engine."""

    name = "random tokens"

    def __init__(self, spec) -> None:
        self.vocab_size = spec.vocab_size

    def generate(self, prompts, seeds, sampling):
        from codistill.engine import Completion

        completions = []
        for seed in seeds:
            generator = np.random.default_rng(seed)
            for _ in range(sampling.num_generations):
                ids = generator.integers(2, self.vocab_size, sampling.max_tokens).tolist()
                completions.append(Completion(ids, [0.0] * len(ids), truncated=True))
        return completions

    def sync(self, weights) -> None:
        for _ in weights:
            pass

    def close(self) -> None:
        pass


class CoinGrader:
    """Calls completions right at random. They are all wrong, which would leave nothing to train."""

    def __init__(self) -> None:
        self.coin = np.random.default_rng(0)

    def grade(self, texts, answers):
        from codistill.grading import Grades

        return Grades((self.coin.random(len(texts)) < 0.5).tolist(), failures=0, timeouts=0)


def run_one(folder: Path, run: str, pair, rollouts: str, steps: int) -> list[dict[str, float]]:
    """Metrics of each step; a first step, which warms up, is left out."""
    import codistill.trainer
    from bench.random_models import random_policy
    from codistill import distributed
    from codistill.config import Config
    from codistill.inputs import load_inputs
    from codistill.run import quiet_libraries

    choice = RUNS[run]
    problems = folder / "problems.jsonl"
    models = {name: dict(path=str(folder / name)) for name in ("small", "large")}
    if choice["algorithm"] == "grpo":
        del models["small"]
    config = Config(
        name="step",
        output_dir=folder / "runs",
        algorithm=choice["algorithm"],
        data=dict(train=problems, eval=problems),
        rollout=dict(
            engine="hf" if rollouts == "random" else rollouts,
            prompts_per_step=pair.prompts,
            num_generations=choice["generations"],
            max_prompt_tokens=pair.prompt_tokens,
            max_completion_tokens=pair.completion_tokens,
            kv_cache_gib=1.0,
            logp_gap_limit=1e9 if rollouts == "random" else None,
        ),
        downsample=dict(keep=KEPT),
        training=dict(
            steps=steps + 1,
            tokens_per_micro_batch=8 * (pair.prompt_tokens + pair.completion_tokens),
            dtype=pair.dtype,
            gradient_checkpointing=pair.checkpointing,
        ),
        **models,
    )
    quiet_libraries()
    with contextlib.ExitStack() as stack:
        if rollouts == "random":  # folders without weights: none of them is looked for
            replacements = {
                "inputs.check_models": lambda config: None,
                "inputs.check_trainable": lambda key, path, tokens, lora: None,
                "inputs.fingerprints": lambda config: {},
                "engine.choice.make_engine": lambda kind, spec: RandomEngine(spec),
                "trainer.load_policy": random_policy,
            }
            for name, replacement in replacements.items():
                stack.enter_context(mock.patch(f"codistill.{name}", replacement))
        inputs = load_inputs(config)
        device = distributed.start(config.distributed.timeout)
        trainer = codistill.trainer.Trainer(config, inputs, device, CoinGrader())
    numbers = [trainer.step(step)[0] for step in range(1, steps + 2)]
    trainer.engine.close()
    return numbers[1:]


# --- all runs ----------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    from bench.random_models import PAIRS

    made = argparse.ArgumentParser(
        prog="python -m bench step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--models", choices=PAIRS, help="default: paper on a GPU, cpu on a CPU")
    made.add_argument("--rollouts", choices=("auto", "vllm", "hf", "random"), default="auto")
    made.add_argument("--steps", type=int, default=5, help="measured, after one that warms up")
    made.add_argument("--output", type=Path, help="default: bench/results/<device>-step.csv")
    made.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    made.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return made


def rows_of(run: str, numbers: list[dict[str, float]], columns: dict) -> list[StepRow]:
    """A row per phase and one for the whole step. numbers: the metrics of each step."""
    rows = []
    if columns["rollouts"] == "random":  # no engine wrote tokens or got weights
        for n in numbers:
            n["time/step"] -= n.pop("time/rollout") + n.pop("time/sync")
    for phase in (*PHASES, "step"):
        seconds = [n[f"time/{phase}"] for n in numbers if f"time/{phase}" in n]
        if seconds:
            p20, median, p80 = np.quantile(seconds, (0.2, 0.5, 0.8))
            tokens = round(np.mean([n["rollout/mean_tokens"] for n in numbers]))
            rows.append(
                StepRow(
                    **columns,
                    run=run,
                    phase=phase,
                    median_s=median,
                    p20_s=p20,
                    p80_s=p80,
                    steps=len(numbers),
                    tokens=tokens,
                )
            )
    return rows


def print_table(rows: list[StepRow]) -> None:
    """Median seconds by phase and run, and each step's ratio to the first run's."""
    import rich.table
    from rich.console import Console

    seconds = {(row.run, row.phase): row.median_s for row in rows}
    runs = list(dict.fromkeys(row.run for row in rows))
    made = rich.table.Table(
        title=f"median seconds, {rows[0].models} models, {rows[0].rollouts} rollouts"
    )
    for name in ("phase", *runs):
        made.add_column(name, justify="left" if name == "phase" else "right")
    for phase in (*PHASES, "step"):
        cells = [seconds.get((run, phase)) for run in runs]
        made.add_row(phase, *("" if s is None else f"{s:.3f}" for s in cells))
    base = seconds[runs[0], "step"]
    made.add_row("step / GRPO's", *(f"{seconds[run, 'step'] / base:.2f}" for run in runs))
    Console().print(made)


def main(arguments: list[str]) -> int:
    from bench.random_models import PAIRS, fitted, write
    from codistill import distributed

    options = parser().parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = options.models or ("paper" if device.type == "cuda" else "cpu")
    pair = fitted(PAIRS[name], device)
    if options.run:
        numbers = run_one(options.folder, options.run, pair, options.rollouts, options.steps)
        print(json.dumps(numbers))
        distributed.leave(0)
    layers = f"{pair.small.num_hidden_layers}+{pair.large.num_hidden_layers} layers"
    columns = results.environment(device) | dict(
        models=f"{name}, {layers}", rollouts=options.rollouts
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write(pair, Path(folder), weights=options.rollouts != "random")
        for run in RUNS:
            print(f"{run} ...", flush=True)
            numbers = in_process(arguments, run, folder)
            if numbers is None:
                return 1
            rows += rows_of(run, numbers, columns)
    table(options.output or results.path_of(device, suffix="-step")).write(rows)
    print_table(rows)
    return 0


def in_process(arguments: list[str], run: str, folder: str) -> list[dict[str, float]] | None:
    """The run's metrics. If it fails, prints what it said and returns None."""
    command = [sys.executable, "-m", "bench", "step", *arguments, "--run", run, "--folder", folder]
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"bench step: {run} failed:\n{done.stderr[-3000:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])
