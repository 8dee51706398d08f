"""A run, from its configuration to its files: check, load, train, stop, sum up."""

import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from codistill import checkpoint, distributed, failures, watching
from codistill.config import Config
from codistill.failures import Failure, RunError, first_alone, phase
from codistill.files import finish_folder, is_disk_full, read_object
from codistill.inputs import load_inputs, make_grader
from codistill.model.policy import export, quiet_transformers
from codistill.output import report
from codistill.output.console import Progress, print_summary
from codistill.output.run_directory import RunDirectory, run_lock
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
    try:
        return train(config, signals)
    except (RunError, FloatingPointError) as error:
        distributed.complain(f"stopped: {error}")
    except Failure as failure:
        folder = config.output_dir / config.name
        if failure.__cause__ is not None and is_disk_full(failure.__cause__):
            distributed.complain(
                f"stopped: no space is left on the disk of {folder}, or a quota is used up; its "
                "checkpoints are whole: make space and start it again"
            )
        else:
            failures.report(failure, folder)
    return 1


def train(config: Config, signals: StopSignals) -> int:
    """What `run` does, without what it says of errors."""
    console = Console(quiet=not distributed.is_first())
    folder = config.output_dir / config.name
    if config.reward.functions:
        watching.start(distributed.rank(), failures.log_path(folder, distributed.rank()))
    with phase("loading"):
        inputs = load_inputs(config)
    with run_lock(config), make_grader(config) as grader:
        failures.forget(folder)
        with phase("loading"):
            device = distributed.start(config.distributed.timeout)
            found = checkpoint.find(folder / CHECKPOINTS)
            console.print("loading models and engine ...")
            trainer = Trainer(config, inputs, device, grader)
        try:
            with phase("training"):
                loop = Loop(trainer, console, signals)
                with loop.saver:
                    return loop.run(found)
        finally:
            signals.ignore()  # torchrun sends one as soon as another process has ended
            trainer.engine.close()
            if dist.is_initialized():  # vLLM takes the group down with itself
                dist.destroy_process_group()


class Loop:
    """Steps, evaluations, checkpoints and files of one trainer."""

    def __init__(self, trainer: Trainer, console: Console, signals: StopSignals) -> None:
        signals.wait_for_step()
        self.trainer, self.console, self.signals = trainer, console, signals
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
        progress.add(step, numbers)
        last = step == self.trainer.total_steps
        if last or step % config.evaluation.every == 0:
            self.on_first(lambda directory: directory.add_samples(step, rollouts, scored))
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
            with phase("sync"):
                self.trainer.engine.sync()
            self.console.print(f"going on after step {done}{self.changes_text()}", soft_wrap=True)
        self.on_first(lambda directory: self.start(directory, -1 if done is None else done))
        return done or 0

    def start(self, directory: RunDirectory, done: int) -> None:
        for line in directory.start(done, self.trainer.inputs.fingerprints):
            self.console.print(line, soft_wrap=True)

    def changes_text(self) -> str:
        """What is said of keys that are not as before; nothing if all are."""
        changes = self.trainer.inputs.changes.items()
        parts = [f"{key} {old} -> {new}" for key, (old, new) in changes]
        return f" with other settings: {', '.join(parts)}" if parts else ""

    def evaluate(self, step: int) -> None:
        with phase("evaluate"):
            accuracy = self.trainer.evaluate(step)
        self.on_first(lambda directory: directory.add_evaluation(accuracy))
        text = ", ".join(f"{name} {accuracy[name]:.1%}" for name in accuracy if name != "step")
        self.console.print(f"held-out accuracy after step {step}: {text}", highlight=False)

    def save(self, step: int) -> None:
        with phase("checkpoint"):
            self.saver.save(step)

    def finish_saving(self) -> None:
        with phase("checkpoint"):
            self.saver.finish()

    def export(self, step: int) -> None:
        """Write the models, under export/step_<k> once they are all there."""
        folder = self.folder / "export"
        unfinished = folder / f"unfinished_{step}"
        with phase("export"):
            first_alone(lambda: shutil.rmtree(unfinished, ignore_errors=True))
            for learner in self.learners:
                export(learner.policy, self.trainer.inputs.tokenizer, unfinished / learner.name)
            first_alone(lambda: finish_folder(unfinished, folder / f"step_{step}"))

    def finish(self, directory: RunDirectory) -> None:
        trainer = self.trainer
        summary = report.summarize(
            self.folder, steps=trainer.total_steps, problems=len(trainer.inputs.held_out)
        )
        directory.write_summary(summary)
        report.plot(self.folder)
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
