"""Train a large and a small model with CoDistill-GRPO.

    torchrun --nproc-per-node 2 train.py --config configs/demo.yaml --training.steps 20

Exit codes: 0 done; 1 the run failed, with a message; 2 a mistake in configuration or input;
143 stopped by SIGTERM or Ctrl-C after saving a checkpoint: the same command goes on from there.
"""

import os
import sys

try:
    from codistill import distributed
    from codistill.config import ConfigError, load_config
except ImportError as error:  # the extra `train` is not installed
    print(f"train.py: {error}", file=sys.stderr)
    sys.exit(2)

# Read when torch and vLLM are imported: their warnings are not about the run.
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "VLLM_LOGGING_LEVEL": "ERROR"}


def main() -> int:
    first = distributed.is_first()
    for name, level in QUIET.items():
        os.environ.setdefault(name, level)
    try:
        config = load_config(sys.argv[1:])
        config.check_processes(distributed.world_size())
        from codistill.run import run  # imports torch: not for --help

        distributed.leave(run(config))
    except ConfigError as error:
        if first:
            print(f"train.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
