"""The command codistill-train: train a large and a small model with CoDistill-GRPO.

    torchrun --nproc-per-node 2 -m codistill.train --config configs/demo.yaml --training.steps 20

In a checkout `train.py` is the same command. With --dry-run it checks everything as at a start,
prints the configuration and the plan of a step, and ends. Exit codes: 0 done; 1 the run failed,
with a message; 2 a mistake in configuration or input; 143 stopped by a signal (SIGTERM, Ctrl-C,
SIGHUP, SIGUSR1) after saving a checkpoint: the same command goes on from there.
"""

import os
import sys

from codistill import distributed
from codistill.config import ConfigError, load_config
from codistill.downloads import check_files
from codistill.stopping import StopSignals

DRY_RUN = "--dry-run"
QUIET = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Python's helper says what it cleans up behind a process that a signal has ended at once.
    "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
}
"""Read when torch, vLLM and helpers of this process start: their warnings are not about the run."""


def quiet_imports() -> None:
    """Silence what torch, vLLM and helpers of this process would print; before they start."""
    for name, level in QUIET.items():
        os.environ.setdefault(name, level)


def main() -> int:
    """Run what the command line asks for; the exit code, unless a run ends the process itself."""
    quiet_imports()
    signals = StopSignals.listen()
    try:
        config = load_config([word for word in sys.argv[1:] if word != DRY_RUN])
        config.check_processes(distributed.world_size())
        check_files(config)
        if DRY_RUN in sys.argv:
            from codistill.dry_run import dry_run

            dry_run(config)
            return 0
        from codistill.run import run  # imports torch, which --help does not wait for

        distributed.leave(run(config, signals))
    except ConfigError as error:
        if distributed.local_rank() == 0:  # another node may have other files, and no mistake
            distributed.complain(str(error), first_only=False)
        return distributed.ended(2)


if __name__ == "__main__":
    sys.exit(main())
