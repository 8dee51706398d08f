"""What is released: the source distribution, the wheel built from it, and its installation."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import torch

import codistill
from codistill.versions import VLLM
from codistill_kernels import __version__

ROOT = Path(__file__).parents[1]
LIBRARY = "codistill_kernels/libcodistill_cpu.so"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    """Run a command with no module of this checkout on the path."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def build(what: str, source: Path, target: Path, **variables: str) -> Path:
    """Build as pip does, but with the setuptools that is here; torch cannot be imported."""
    code = (
        "import sys; sys.modules['torch'] = None; from setuptools import build_meta\n"
        f"build_meta.build_{what}({str(target)!r})"
    )
    done = run(sys.executable, "-c", code, cwd=source, **variables)
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("*.whl" if what == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    unwanted = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "*.so")
    shutil.copytree(ROOT, folder / "checkout", ignore=unwanted)
    return build("sdist", folder / "checkout", folder)


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"codistill_grpo-{__version__}"


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory) -> Path:
    return build("wheel", unpacked, tmp_path_factory.mktemp("wheel"))


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_sdist_holds_all_that_builds_tests_and_explains(unpacked):
    wanted = set("CHANGELOG.md CITATION.cff CONTRIBUTING.md LICENSE Makefile README.md".split())
    wanted |= {"constraints.txt", "pyproject.toml", "setup.py", "train.py"}
    for folder in "bench codistill configs csrc demo docs kernels study tests tools".split():
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file())
        wanted |= {str(path.relative_to(ROOT)) for path in files}
    built = {name for name in wanted if re.search(r"\.so$|__pycache__|\.egg-info", name)}
    found = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert wanted - built <= found


@needs_compiler
def test_wheel_serves_every_python_and_torch(wheel):
    platform = re.sub(r"\W", "_", sysconfig.get_platform())
    assert wheel.name == f"codistill_grpo-{__version__}-py3-none-{platform}.whl"
    names = names_in(wheel)
    assert {LIBRARY, "codistill_kernels/py.typed", "codistill/__main__.py"} <= names
    assert "codistill/output/templates/model_card.md" in names
    page = ROOT / "codistill" / "output" / "page"
    templates = [path for path in page.iterdir() if path.suffix not in (".py", "")]
    assert templates and {str(path.relative_to(ROOT)) for path in templates} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (entry_points,) = (name for name in names if name.endswith("/entry_points.txt"))
    assert not any(name.startswith(("tests", "bench", "csrc", "study")) for name in names)
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read(LIBRARY)
        commands = archive.read(entry_points).decode().split("\n", 1)
    assert commands == ["[console_scripts]", "codistill-train = codistill.train:main\n"]
    assert b"libgomp" in library or sys.platform != "linux"
    assert not re.search(rb"libtorch|libc10|libpython|Py_Initialize", library)
    assert len(library) < 2**20, "debug information"


def test_extras(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    extras = set("train log lora vllm vllm-cpu bench bench-hopper dev docs".split())
    assert set(metadata.get_all("Provides-Extra")) == extras
    required = metadata.get_all("Requires-Dist")
    names = {re.match(r"[\w-]+", line)[0] for line in required if "extra" not in line}
    assert names == {"torch"}
    train = [re.match(r"[\w-]+", line)[0] for line in required if '"train"' in line]
    modules = {name.replace("-", "_").replace("pyyaml", "yaml") for name in train}
    assert modules == set(codistill.REQUIRED)
    for name in ("vllm", "vllm-cpu"):
        assert f'{name}{VLLM}; extra == "{name}"' in required


@needs_compiler
def test_installed_wheel_computes(wheel, tmp_path):
    """Installed into an environment of its own that sees torch."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    done = run(*pip, wheel)
    assert done.returncode == 0, done.stderr
    site = next((tmp_path / "venv").rglob("site-packages"))
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    code = textwrap.dedent("""
        import torch, codistill_kernels as kernels
        x, weight = torch.randn(9, 32).requires_grad_(), torch.randn(300, 32).requires_grad_()
        ids, advantages = torch.arange(9), torch.randn(9)
        loss, *_ = kernels.linear_policy_loss(
            x, weight, ids, None, advantages, normalizer=9.0, backend="cpu"
        )
        loss.backward()
        assert x.grad.norm() > 0 and weight.grad.norm() > 0
        print(kernels.__version__, kernels.__file__)
    """)
    done = run(python, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    version, path = done.stdout.split()
    assert version == __version__ and Path(path).is_relative_to(site)
    done = run(python.parent / "codistill-train", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: codistill-train") and "--kd.alpha float" in done.stdout


def test_without_compiler_everything_else_installs(unpacked, tmp_path):
    shutil.copytree(unpacked, tmp_path / "source", ignore=shutil.ignore_patterns("build"))
    built = build("wheel", tmp_path / "source", tmp_path, CXX="/no/compiler")
    names = names_in(built)
    assert LIBRARY not in names and "codistill_kernels/_native.py" in names


SCRIPT = "import sys; sys.argv[0] = 'bin/codistill-train'; from codistill.train import main"


@pytest.mark.parametrize(
    "command",
    [("-m", "codistill", "doctor"), ("-m", "codistill.train"), ("train.py",), ("-c", SCRIPT)],
    ids=["doctor", "module", "train.py", "codistill-train"],
)
def test_commands_without_the_extra_name_it(command):
    done = run(sys.executable, "-S", *command)  # no installed packages
    assert done.returncode == 2
    assert re.search(r"^(train.py: )?codistill needs numpy.*codistill-grpo\[train\]'$", done.stderr)


def test_import_without_the_extra_names_it():
    done = run(sys.executable, "-S", "-c", "import codistill")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: codistill needs") and "'codistill-grpo[train]'" in last


def test_one_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
