"""python -m codistill eval --model DIR --data NAME=FILE --template r1 --output DIR

Accuracy of models on sets of problems, mean and standard deviation over seeds. It runs under
torchrun too. Exit codes: 0 done; 1 failed, with a message; 2 a mistake in an option or an input;
143 stopped by a signal: the same command goes on from the last finished seed.
"""

import os

from codistill import distributed
from codistill.config import load_options, require
from codistill.config.evaluation import EvalOptions
from codistill.downloads import is_here
from codistill.stopping import StopSignals
from codistill.train import quiet_imports


def main(arguments: list[str]) -> None:
    """Evaluate what the options name; ends the process."""
    environment = dict(os.environ)
    quiet_imports()
    signals = StopSignals.listen()
    signals.unsaved = "in the middle of a seed; the same command goes on from the last finished one"
    options = load_options(EvalOptions, arguments)
    options.check_processes(distributed.world_size())
    check_files(options)
    from codistill.evaluation_run import run  # imports torch, which --help does not wait for

    distributed.leave(run(options, environment))


def check_files(options: EvalOptions) -> None:
    """Raise ConfigError for a file or a model that is not there; it is seen before torch, which
    takes seconds to import."""
    for name, path in options.sets.items():
        require(path.exists(), f"data.{name}", str(path), "a file that exists")
    for model in options.model:
        is_here("model", model)
