"""Tools beside codistill-train.

    python -m codistill doctor --config FILE [--section.key value ...]
    python -m codistill eval --model DIR --data NAME=FILE --template r1 --output DIR
    python -m codistill report runs/NAME [runs/OTHER ...]
    python -m codistill export runs/NAME [--step K] [--output DIR]
    python -m codistill plan --config FILE [--machine.gpus N] [--section.key value ...]
    python -m codistill serve --config FILE [--port 8001] [--section.key value ...]

doctor   say what is installed and which kernel backend and engine run, and check the configuration
         and its inputs; exit code 2 if they are wrong
eval     accuracy of models on sets of problems, mean and standard deviation over seeds, as a table
report   write one HTML page about runs, with their curves, configuration and rollouts; draw
         curves.png and print the summary of those that have ended
export   write the models of a checkpoint in Hugging Face format, each with a model card
plan     memory and time of a step on GPUs, by formulas
serve    start a server that writes the rollouts, for rollout.engine server

COMMAND --help lists the options of a command.
"""

import importlib
import sys

from codistill import distributed
from codistill.config import ConfigError, require

COMMANDS = ("doctor", "eval", "report", "export", "plan", "serve")


def main() -> int:
    """Run one of COMMANDS; the exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        require(name in COMMANDS, "command", name, f"one of {', '.join(COMMANDS)}")
        importlib.import_module(f"codistill.commands.{name}").main(sys.argv[2:])
    except ConfigError as error:
        distributed.complain(str(error))
        return distributed.ended(2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
