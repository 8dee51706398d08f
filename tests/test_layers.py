"""The architecture, as tests: who may import whom, and what an import may not do."""

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels" / "codistill_kernels"
CODISTILL = ROOT / "codistill"
# Modules of codistill_kernels.integrations, and what each may import, when it is used.
FRAMEWORKS = {
    "transformers": {"transformers", "peft"},
    "trl": {"trl", "transformers"},
}


def modules_imported(file: Path) -> set[str]:
    """Modules that a file imports, wherever in the file."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
    return modules


def imported(file: Path) -> set[str]:
    """Top-level packages that a file imports."""
    return {module.split(".")[0] for module in modules_imported(file)}


def test_kernels_import_torch_triton_and_numpy_only():
    allowed = {"codistill_kernels", "torch", "triton", "numpy"} | set(sys.stdlib_module_names)
    for file in KERNELS.rglob("*.py"):
        is_integration = file.parent.name == "integrations"
        frameworks = FRAMEWORKS.get(file.stem, set()) if is_integration else set()
        assert imported(file) <= allowed | frameworks, file


def test_kernels_do_not_import_integrations():
    for file in KERNELS.rglob("*.py"):
        if file.parent.name != "integrations":
            assert "integrations" not in file.read_text(), file


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_an_integration_imports_its_framework_only_when_it_is_used(name):
    code = textwrap.dedent(f"""
        import sys, codistill_kernels.integrations.{name}
        print([name for name in {sorted(FRAMEWORKS[name])} if name in sys.modules])
    """)
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert output.stdout.strip() == "[]", output.stdout


def test_reference_imports_nothing_of_ours():
    for file in (KERNELS / "reference").glob("*.py"):
        ours = {name for name in modules_imported(file) if name.startswith("codistill")}
        assert all(name.startswith("codistill_kernels.reference.") for name in ours), file


@pytest.mark.parametrize(
    ("package", "only"), [("vllm", "engine"), ("transformers", "model")], ids=str
)
def test_one_module_imports(package, only):
    users = {file for file in CODISTILL.rglob("*.py") if package in imported(file)}
    assert {file.relative_to(CODISTILL).parts[0] for file in users} == {only}


def test_config_imports_no_torch():
    code = "import sys, codistill.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_nothing_imports_upward():
    for file in CODISTILL.rglob("*.py"):
        assert not imported(file) & {"train", "bench", "tests", "demo", "study", "tools"}, file


def test_kernels_folder_does_not_shadow_hugging_face_kernels(tmp_path):
    """transformers looks a distribution named kernels up by version, then imports names from it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    package = tmp_path / "kernels"
    package.mkdir()
    names = "Device LayerRepository LocalLayerRepository Mode FuncRepository CacheRepository"
    (package / "__init__.py").write_text(
        "__version__ = '0.17.2'\n"
        "def anything(*args, **kwargs): return lambda decorated: decorated\n"
        + "".join(f"class {name}: pass\n" for name in names.split())
        + "def __getattr__(name):\n"
        "    if name.startswith('__'): raise AttributeError(name)\n"
        "    return anything\n"
    )
    info = tmp_path / "kernels-0.17.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")
    code = (
        "import kernels; assert kernels.__version__ == '0.17.2', kernels\n"
        "import transformers; from transformers import Qwen2ForCausalLM\n"
        "import codistill_kernels"
    )
    # The repository root comes first, as it does for a script that is run from it.
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_first_call_imports_no_compiler():
    """A process that compiles nothing does not wait for torch's compiler, triton or sympy."""
    code = textwrap.dedent("""
        import sys, torch, codistill_kernels as kernels
        x, weight, ids = torch.randn(4, 8), torch.randn(9, 8), torch.arange(4)
        x.requires_grad_()
        kernels.linear_logps(x, weight, ids).sum().backward()
        terms = (None, torch.ones(4))
        kernels.linear_policy_loss(x, weight, ids, *terms, normalizer=1.0)[0].backward()
        kernels.linear_reverse_kl((x, weight), (x, weight))
        kernels.linear_divergence((x, weight), (x.detach(), 2 * weight))[0].backward()
        kernels.selective_logps(torch.randn(4, 9).requires_grad_(), ids).sum().backward()
        print([name for name in ("torch._dynamo", "sympy", "triton") if name in sys.modules])
    """)
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert output.stdout.strip() == "[]", output.stdout
