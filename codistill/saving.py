"""When the checkpoints of a run are written: at once, or while training goes on."""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from codistill import checkpoint

if TYPE_CHECKING:
    from codistill.config import Config
    from codistill.learner import Learner

PLAIN = StagingOptions(
    use_pinned_memory=False,
    use_shared_memory=False,
    use_async_staging=False,
    use_non_blocking_copy=False,
)


class Saver:
    """Saves the checkpoints of a run, one after the other.

    With checkpoint.asynchronous a thread writes them from copies in the memory of the host. The
    copies are complete when `save` returns, so what a step changes is in no checkpoint of the step
    before. The collective operations of the thread have a process group of their own: those of
    training may come between them in another order on each process.

    As a context it ends with its thread at rest, whatever else has failed.
    """

    def __init__(self, folder: Path, learners: "list[Learner]", config: "Config") -> None:
        """folder: where the checkpoints are. Collective: it makes the group."""
        self.folder, self.learners = folder, learners
        self.keep = config.checkpoint.keep
        self.thread: ThreadPoolExecutor | None = None
        self.writing: Future[None] | None = None
        if config.checkpoint.asynchronous:
            self.thread = ThreadPoolExecutor(max_workers=1)
            timeout = timedelta(seconds=config.distributed.timeout)
            self.group = dist.new_group(backend="gloo", timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self.writing is not None:  # an error is on its way, which says more than one in here
            wait([self.writing])

    def save(self, step: int) -> None:
        """Save what the learners are after `step`, unless the last checkpoint is of this step.

        The save before is finished first. Collective: every process must call.

        Raises:
            OSError, RuntimeError: as `checkpoint.save`, for this save or the one before.
        """
        self.finish()
        if checkpoint.latest(self.folder) == step:
            return
        states = checkpoint.states_of(self.learners)
        if self.thread is None:
            checkpoint.save(self.folder, step, states, keep=self.keep)
            return
        terms = {"keep": self.keep, "group": self.group}
        copies = on_the_host(states)
        self.writing = self.thread.submit(checkpoint.save, self.folder, step, copies, **terms)

    @property
    def has_failed(self) -> bool:
        """Whether the last save has ended with an error, which `finish` raises."""
        return (
            self.writing is not None
            and self.writing.done()
            and self.writing.exception() is not None
        )

    def finish(self) -> None:
        """Wait until the last save is written.

        Raises:
            OSError, RuntimeError: it could not be.
        """
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()


def on_the_host(states: dict[str, dict]) -> dict[str, dict]:
    """Copies that share no memory with `states`, DTensors included."""
    stager = DefaultStager(PLAIN)
    try:
        copies = stager.stage(states)
        assert isinstance(copies, dict)
        return copies
    finally:
        stager.close()
