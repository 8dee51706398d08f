"""A run, from its configuration to its files: check, load, train, stop, sum up."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from codistill import checkpoint, distributed, failures, watching
from codistill.config import Config
from codistill.exports import export_models
from codistill.failures import first_alone, phase
from codistill.files import read_object, read_rows
from codistill.inputs import load_inputs, make_grader
from codistill.model.policy import quiet_transformers
from codistill.output.console import Progress, print_summary
from codistill.output.curves import plot
from codistill.output.loggers import Loggers
from codistill.output.model_card import Cards
from codistill.output.run_directory import RunDirectory, check_shared, run_lock
from codistill.output.summary import summarize
from codistill.saving import Saver
from codistill.stopping import STOPPED, StopSignals
from codistill.trainer import Trainer

CHECKPOINTS = "checkpoints"


def run(config: Config, signals: StopSignals) -> int:
    """Train to the last step, or until a signal; the exit code.

    Raises:
        ConfigError: a setting or an input is missing or wrong; no model was loaded.
    """
    quiet_libraries()
    folder = config.output_dir / config.name
    return failures.exit_code(lambda: train(config, signals), folder)


def train(config: Config, signals: StopSignals) -> int:
    """What `run` does, without what it says of errors."""
    console = Console(quiet=not distributed.is_first())
    folder = config.output_dir / config.name
    if config.reward.functions or config.rollout.engine == "server":
        watching.start(distributed.rank(), failures.log_path(folder, distributed.rank()))
    with phase("loading"):
        inputs = load_inputs(config)
    with run_lock(config), make_grader(config) as grader:
        failures.forget(folder)
        with phase("loading"):
            device = distributed.start(config.distributed.timeout)
            check_shared(folder, "output_dir", config.output_dir)
            found = checkpoint.find(folder / CHECKPOINTS)
            console.print("loading models and engine ...")
            trainer = Trainer(config, inputs, device, grader)
        try:
            with phase("training"), Loggers() as loggers:
                loop = Loop(trainer, console, signals, loggers)
                with loop.saver:
                    return loop.run(found)
        finally:
            signals.ignore()  # torchrun sends one as soon as another process has ended
            trainer.engine.close()
            if dist.is_initialized():  # vLLM takes the group down with itself
                dist.destroy_process_group()


class Loop:
    """Steps, evaluations, checkpoints and files of one trainer."""

    def __init__(
        self, trainer: Trainer, console: Console, signals: StopSignals, loggers: Loggers
    ) -> None:
        signals.wait_for_step()
        self.trainer, self.console, self.signals = trainer, console, signals
        self.loggers = loggers
        self.learners = list(trainer.learners.values())
        self.directory = RunDirectory(trainer.config)
        self.folder = trainer.config.output_dir / trainer.config.name
        self.saver = Saver(self.folder / CHECKPOINTS, self.learners, trainer.config)
        self.finished = is_finished(self.folder / "summary.json", trainer.total_steps)

    def run(self, found: checkpoint.Found) -> int:
        """Train from the checkpoint on that was found; the exit code."""
        trainer, total = self.trainer, self.trainer.total_steps
        done = self.restore(found)
        self.console.print(
            f"rollout engine: {trainer.engine.name}, {dist.get_world_size()} processes on "
            f"{trainer.device.type}, {len(trainer.inputs.problems)} problems, "
            f"files in {self.folder}"
        )
        for unused in trainer.config.unused():
            self.console.print(f"not used by algorithm {trainer.config.algorithm}: {unused}")
        if done == 0:
            self.evaluate(0)
            if self.stop_wanted():
                self.console.print("stopped before the first step; the same command starts again")
                return STOPPED
        progress = Progress(self.console, total_steps=total, first_step=done + 1)
        with progress.show():
            for step in range(done + 1, total + 1):
                self.step(step, progress)
                if step < total and self.stop_wanted():
                    self.save(step)
                    self.finish_saving()
                    self.console.print(f"stopped after step {step}; the same command goes on")
                    return STOPPED
        if done < total or not self.finished:
            self.export(total)
        self.finish_saving()
        self.on_first(self.finish)
        dist.barrier()  # a process that ends early closes connections that others still use
        return 0

    def step(self, step: int, progress: Progress) -> None:
        """Train one step, write it down, evaluate and save where it is time to."""
        config = self.trainer.config
        numbers, rollouts, scored = self.trainer.step(step)
        self.on_first(lambda directory: directory.add_metrics(step, numbers))
        self.loggers.log(step, numbers)
        progress.add(step, numbers)
        last = step == self.trainer.total_steps
        if last or step % config.evaluation.every == 0:
            tokenizer = self.trainer.inputs.tokenizer
            self.on_first(lambda folder: folder.add_samples(step, rollouts, scored, tokenizer))
            self.evaluate(step)
        if last or step % config.checkpoint.every == 0:
            self.save(step)

    def restore(self, found: checkpoint.Found) -> int:
        """Go on from the last good checkpoint if there is one; the number of steps done."""
        for line in found.passed_over:
            self.console.print(line, soft_wrap=True)
        done = found.step
        if done is not None:
            with phase("checkpoint"):
                checkpoint.load(self.saver.folder, done, self.learners)
            self.console.print(f"going on after step {done}{self.changes_text()}", soft_wrap=True)
        with phase("sync"):
            self.trainer.engine.sync()  # a server may have the weights of another run
        self.on_first(lambda directory: self.start(directory, -1 if done is None else done))
        return done or 0

    def start(self, directory: RunDirectory, done: int) -> None:
        for line in directory.start(done, self.trainer.inputs.fingerprints):
            self.console.print(line, soft_wrap=True)
        self.loggers.open(self.trainer.config, done)

    def changes_text(self) -> str:
        """What is said of keys that are not as before; nothing if all are."""
        changes = self.trainer.inputs.changes.items()
        parts = [f"{key} {old} -> {new}" for key, (old, new) in changes]
        return f" with other settings: {', '.join(parts)}" if parts else ""

    def evaluate(self, step: int) -> None:
        with phase("evaluate"):
            accuracy = self.trainer.evaluate(step)
        self.on_first(lambda directory: directory.add_evaluation(accuracy))
        numbers = {f"evaluation/{name}": accuracy[name] for name in accuracy if name != "step"}
        self.loggers.log(step, numbers)
        text = ", ".join(f"{name} {accuracy[name]:.1%}" for name in accuracy if name != "step")
        self.console.print(f"held-out accuracy after step {step}: {text}", highlight=False)

    def save(self, step: int) -> None:
        with phase("checkpoint"):
            self.saver.save(step)

    def finish_saving(self) -> None:
        with phase("checkpoint"):
            self.saver.finish()

    def export(self, step: int) -> None:
        """Write the models that learned to export/step_<k>."""
        policies = {learner.name: learner.policy for learner in self.learners}
        evaluations = read_rows(self.folder / "evaluations.jsonl")
        cards = Cards(self.trainer.config, step, evaluations)
        with phase("export"):
            path = self.folder / "export" / f"step_{step}"
            export_models(policies, self.trainer.inputs.tokenizer, path, cards)

    def finish(self, directory: RunDirectory) -> None:
        trainer = self.trainer
        summary = summarize(
            self.folder,
            steps=trainer.total_steps,
            problems=sum(map(len, trainer.inputs.held_out.values())),
        )
        directory.write_summary(summary)
        plot(self.folder)
        print_summary(self.console, summary, self.folder)

    def on_first(self, write: Callable[[RunDirectory], Any]) -> None:
        """Let the first process write to its directory. Collective."""
        first_alone(lambda: write(self.directory))

    def stop_wanted(self) -> bool:
        """Whether any process got a signal: then all stop after the same step.

        Raises:
            Failure: a checkpoint that was written meanwhile has failed, on all processes.
        """
        states = [int(self.signals.received), int(self.saver.has_failed)]
        received, failed = distributed.totals(states)
        if failed:
            self.finish_saving()
        return received > 0


def is_finished(summary: Path, total_steps: int) -> bool:
    """Whether an earlier start of this run has reached its last step and written everything."""
    return read_object(summary).get("steps") == total_steps


def quiet_libraries() -> None:
    """Silence what libraries print that is not about the run."""
    quiet_transformers()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(vllm|torch)\.")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vllm").setLevel(logging.ERROR)
    for name in ("codistill", "codistill_kernels"):
        logging.getLogger(name).setLevel(logging.INFO if distributed.is_first() else logging.ERROR)
