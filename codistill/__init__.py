"""The trainer. It needs what the extra `train` installs; the kernels (codistill_kernels) do not."""

import sys
from importlib.util import find_spec
from pathlib import Path

REQUIRED = (
    "numpy",
    "httpx",
    "jinja2",
    "matplotlib",
    "math_verify",
    "packaging",
    "pebble",
    "plotly",
    "pyarrow",
    "pydantic",
    "pydantic_settings",
    "yaml",
    "rich",
    "transformers",
)
missing = [name for name in REQUIRED if find_spec(name) is None]
if missing:
    message = (
        f"codistill needs {', '.join(missing)}, not installed: pip install 'codistill-grpo[train]'"
    )
    # A command (codistill-train, or python -m codistill) ends with an exit code, not a traceback.
    if Path(sys.argv[0]).name in ("-m", "codistill-train"):
        print(message, file=sys.stderr)
        sys.exit(2)
    raise ImportError(message)
