"""Benchmarks of the kernels and of a training step.

python -m bench kernels         every operation against every peer; --help lists the choices
python -m bench compare A B     ratios of two tables of measurements; exit code 1 if one got worse
python -m bench report          plots and the README's tables, from bench/results
python -m bench step            phases of a CoDistill step and of a GRPO step
python -m bench first_contact   is every operation right, and as fast as predicted? (needs a GPU)
python -m bench tune            proposes sizes of slabs and numbers of warps (needs a GPU)
python -m bench ahead_of_time   what every Triton kernel compiles to (needs no GPU)
python -m bench roofline        predicted time and memory on GPUs (needs none)
"""

import importlib
import sys

COMMANDS = {
    "kernels": "plan",
    "compare": "compare",
    "report": "report",
    "step": "step",
    "first_contact": "first_contact",
    "tune": "tune",
    "ahead_of_time": "ahead_of_time",
    "roofline": "roofline",
}


def main() -> int:
    """Run the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        return 0
    if name not in COMMANDS:
        print(f"bench: expected one of {', '.join(COMMANDS)}, got {name!r}", file=sys.stderr)
        return 2
    return importlib.import_module(f"bench.{COMMANDS[name]}").main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
