"""Train a large and a small model with CoDistill-GRPO: the command codistill-train, in a checkout.

torchrun --nproc-per-node 2 train.py --config configs/demo.yaml --training.steps 20
"""

import sys

try:
    from codistill.train import main
except ImportError as error:  # the extra `train` is not installed
    print(f"train.py: {error}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
