"""The loggers of log.to: copies of metrics.jsonl and evaluations.jsonl elsewhere.

The first process alone logs. A logger that fails says so in one line, and the run goes on.
"""

import importlib.util
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, get_args

import yaml

from codistill import files
from codistill.config import Config, ConfigError, require
from codistill.config.base import first_line
from codistill.config.machinery import LoggerKind

WANDB_ID = "wandb_id.txt"
"""The file in a run's folder that holds the id by which wandb knows the run."""


@dataclass(frozen=True)
class Start:
    """What a logger is opened with."""

    config: Config
    done: int
    """Steps done before; -1 where not even the evaluation before the first step is done."""

    @property
    def folder(self) -> Path:
        return self.config.output_dir / self.config.name

    @property
    def values(self) -> dict[str, Any]:
        """The complete configuration, section by section."""
        return self.config.model_dump(mode="json")


class Logger(Protocol):
    """Where numbers go. Any method may raise anything."""

    def __init__(self, start: Start) -> None:
        """Open the log of a run, or the one that it has, and log the configuration."""

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Add what was measured in, or after, a step. Names that were logged before may come
        again with a step that is computed again."""

    def close(self, *, failed: bool) -> None:
        """Bring everything to its place. The last call."""


class TensorBoard:
    """Event files in the folder tensorboard of the run; tensorboard --logdir RUN shows them."""

    def __init__(self, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What was logged of steps that are computed again is not shown any more.
        purge = None if start.done < 0 else start.done + 1
        self.writer = SummaryWriter(str(start.folder / "tensorboard"), purge_step=purge)
        text = yaml.safe_dump(start.values, sort_keys=False)
        indented = "".join(f"    {line}\n" for line in text.splitlines())  # code, in Markdown
        self.writer.add_text("config", indented, max(0, start.done))

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, *, failed: bool) -> None:
        self.writer.close()


class WandB:
    """A run on Weights & Biases, or with WANDB_MODE=offline in the folder wandb of the run."""

    def __init__(self, start: Start) -> None:
        import wandb

        # vLLM imports openai, which would make wandb advertise its product for tracing.
        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")
        self.run = wandb.init(
            project=start.config.log.project,
            name=start.config.name,
            id=self.run_id(start.folder / WANDB_ID),
            resume="allow",
            dir=start.folder,
            config=start.values,
            allow_val_change=True,  # a run may go on with other settings of some keys
            settings=wandb.Settings(silent=True, console="off"),
        )
        # wandb's own steps never go back, as those of a run do that is computed again.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    @staticmethod
    def run_id(path: Path) -> str:
        """The run's id: a new one where there is none yet."""
        if not path.is_file():
            files.write_text(path, secrets.token_hex(4) + "\n")
        return path.read_text().strip()

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log({"step": step} | numbers)

    def close(self, *, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Trackio:
    """A run in trackio's own folder on this computer, known by project and name; trackio show."""

    def __init__(self, start: Start) -> None:
        import trackio

        self.run = trackio.init(
            project=start.config.log.project,
            name=start.config.name,
            resume="never" if start.done < 0 else "allow",
            config=start.values,
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def close(self, *, failed: bool) -> None:
        self.run.finish()


KINDS: dict[LoggerKind, type[Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}
assert set(KINDS) == set(get_args(LoggerKind))


class Loggers:
    """Loggers that are open: none before `open`, which the first process alone calls.

    One that raises an error is off from then on, with a warning.
    """

    def __init__(self) -> None:
        self.loggers: dict[LoggerKind, Logger] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def open(self, config: Config, done: int) -> None:
        """Open all of log.to; done: as in `Start`."""
        start = Start(config, done)
        for kind in config.log.to:
            with self.off_at_an_error(kind):
                self.loggers[kind] = KINDS[kind](start)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Tell all of them; see `Logger`."""
        for kind, logger in list(self.loggers.items()):
            with self.off_at_an_error(kind):
                logger.log(step, numbers)

    def close(self, *, failed: bool) -> None:
        """Close all of them; failed: whether the run ends with an error."""
        for kind, logger in list(self.loggers.items()):
            with self.off_at_an_error(kind):
                logger.close(failed=failed)
        self.loggers.clear()

    @contextmanager
    def off_at_an_error(self, kind: LoggerKind) -> Iterator[None]:
        """Warn of any error of the block, and drop the logger."""
        try:
            yield
        except Exception as error:  # of any of the libraries
            self.loggers.pop(kind, None)
            reason = f"{type(error).__name__}: {first_line(error)}"
            logging.getLogger(__name__).warning("log.to: %s is off from now on: %s", kind, reason)


def check_loggers(config: Config) -> None:
    """Raise ConfigError for a logger that is not installed, or that would ask for a password."""
    for kind in config.log.to:
        expected = f"a logger that is installed: pip install {kind}"
        require(importlib.util.find_spec(kind) is not None, "log.to", kind, expected)
    if "wandb" in config.log.to:
        check_wandb()


def check_wandb() -> None:
    """Raise ConfigError if wandb goes online and has no key, or one that its server refuses."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    if wandb.setup().settings.mode in ("offline", "disabled"):
        return
    expected = "a key: WANDB_API_KEY or wandb login sets it; or WANDB_MODE=offline"
    try:
        has_key = wandb.login(prompt=False)
    except Exception as error:  # no network, a key that is refused, files that cannot be read
        raise ConfigError(f"log.to = 'wandb': {first_line(error)}; expected {expected}") from error
    require(has_key, "log.to", "wandb", expected)
