"""Bad input of every kind: each is refused in one line that says what is wrong, and quickly."""

import os
from pathlib import Path

import pytest
import yaml
from test_config import MINIMAL

from codistill.config import Config, ConfigError, load_config


def refused(text: str | bytes, tmp_path: Path, *arguments: str) -> str:
    """The line that a configuration file with this content is refused with."""
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        load_config(["--config", str(path), *arguments])
    line = str(error.value)
    assert line.isprintable() and len(line) < 1000, line
    return line


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("small: {path: a, learning_rate: true}", "small.learning_rate = True: expected no true"),
        ("training: {steps: true}", "training.steps = True: expected no true or false"),
        ("seed: yes", "seed = True: expected no true or false"),
        ("reward: {functions: {mine.f: true}}", "reward.functions = {'mine.f': True}: expected no"),
        ("training: {steps: 1:40}", "found the number '1:40', which is no plain one"),
        ("training: {steps: 010}", "found the number '010', which is no plain one"),
        ("kd: {alpha: 1:30.5}", "found the number '1:30.5', which is no plain one"),
        ("kd: {alpha: .inf}", "found the number '.inf', which is no plain one"),
        ("training: {steps: 3}\ntraining: {epochs: 3}", "found the key 'training' a second time"),
        ("kd: {alpha: 1, alpha: 2}", "found the key 'alpha' a second time"),
        ("1: 2", "found the key '1', which is no text"),
        ("null: 2", "found the key 'null', which is no text"),
        ("rollout: {true: 2}", "found the key 'true', which is no text"),
        ("? [1, 2]\n: 3", "which is no text"),
        ("cli_args: [x]", "cli_args = ['x']: expected a known key"),
        ("model_cls: 1", "model_cls = 1: expected a known key"),
        ("cli_exit_on_error: true", "cli_exit_on_error = True: expected a known key"),
        ("_env_file: x", "_env_file = 'x': expected a known key"),
        ('"a\\n\\e[2Jb": 1', "a\\n\\x1b[2Jb = 1: expected a known key"),
        ("algorithm: grpo\ngrpo: small", "grpo = 'small': expected a section, with keys"),
        ("algorithm: grpo\ngrpo: [small]", "grpo = ['small']: expected a section, with keys"),
        ("rollout:", "rollout = None: expected a section, with keys"),
        ("a: &a [*a]", "found a reference (*name)"),
        (BOMB, "found a reference (*name)"),
        (f"kd: {'[' * 3000}{']' * 3000}", "expected YAML of few levels"),
        (f"data: {{template: {'x' * 10**6}}}", "expected at most 100000 bytes"),
        (f"name: {'x' * 9000}", "x...: expected the name of one folder"),
        ("# é".encode("latin-1"), "expected YAML in UTF-8: 'utf-8' codec can't decode byte 0xe9"),
        ("name: x".encode("utf-16"), "expected YAML in UTF-8"),
        (b"\x7fELF\x02\x01\x01\x00\x00\x00", "expected YAML in UTF-8: unacceptable character"),
        (f"training: {{epochs: {10**400}}}", "training.epochs = 1"),
        (f"training: {{epochs: 1{'0' * 5000}}}", "found the number '1000"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_wrong_yaml(tmp_path, text, expected):
    top = text.encode() if isinstance(text, str) else text
    missing = {key: value for key, value in MINIMAL.items() if f"{key}:".encode() not in top}
    assert expected in refused(yaml.safe_dump(missing).encode() + b"\n" + top, tmp_path)


def test_a_pipe_is_no_configuration(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match="expected a YAML file that exists"):
        load_config(["--config", str(tmp_path / "pipe.yaml")])


def test_config_without_a_file():
    with pytest.raises(ConfigError, match="--config: expected one argument"):
        load_config(["--config"])


FLOATS = [
    *("small.learning_rate", "rollout.temperature", "rollout.kv_cache_gib"),
    *("rollout.logp_gap_limit", "kd.alpha", "kd.alpha_end", "loss.beta", "loss.epsilon_high"),
    *("loss.importance_cap", "loss.truncate", "optimizer.weight_decay", "optimizer.max_grad_norm"),
    *("evaluation.temperature", "reward.timeout"),
]


@pytest.mark.parametrize("value", ["inf", "nan"])
@pytest.mark.parametrize("key", FLOATS)
def test_no_number_is_infinite(tmp_path, key, value):
    line = refused(yaml.safe_dump(MINIMAL), tmp_path, f"--{key}", value)
    assert line == f"{key} = {value!r}: input should be a finite number"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("small.learning_rate", "1e300"),
        ("optimizer.weight_decay", "1e300"),
        ("rollout.prompts_per_step", "1000000000000"),
        ("rollout.num_generations", "100000000000"),
        ("rollout.max_completion_tokens", "100000000000"),
        ("rollout.temperature", "0.001"),
        ("rollout.temperature", "3"),
        ("rollout.kv_cache_gib", "1e300"),
        ("rollout.kv_cache_gib", "1e-9"),
        ("evaluation.temperature", "0.001"),
        ("evaluation.temperature", "100"),
        ("reward.timeout", "1e12"),
        ("reward.timeout", "1e-9"),
        ("kd.alpha_end", "1e300"),
        ("reward.functions", "mine.f=nan"),
        ("reward.functions", "mine.f=1e300"),
        ("data.template", "{problem}" + "x" * 10**4),
        *(
            ("name", name)
            for name in ("", ".", "..", " ", "../../x", "/abs", "a/b", "a\nb", "\x1b")
        ),
        *(("name", name) for name in ("x" * 101, "é" * 60, "\udcff")),
        ("small.path", ""),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_out_of_bounds(tmp_path, key, value):
    line = refused(yaml.safe_dump(MINIMAL), tmp_path, f"--{key}", value)
    assert line.startswith(f"{key}")


def test_usual_numbers_are_read(tmp_path):
    text = "kd: {alpha: 5e-1}\nseed: 0x1F\ntraining: {steps: 1_000}\noptimizer: {weight_decay: 0.0}"
    (tmp_path / "config.yaml").write_text(f"\ufeff{yaml.safe_dump(MINIMAL)}\n{text}")
    config = load_config(["--config", str(tmp_path / "config.yaml")])
    assert (config.kd.alpha, config.seed, config.training.steps) == (0.5, 31, 1000)


def test_a_tilde_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    paths = {"output_dir": "~/runs", "data": {"train": "~/a.jsonl", "eval": "b.jsonl"}}
    config = Config(**MINIMAL | paths | {"small": {"path": "~/small"}})
    assert config.output_dir == Path("/home/somebody/runs")
    assert (config.data.train, config.data.eval) == (
        Path("/home/somebody/a.jsonl"),
        Path("b.jsonl"),
    )
    assert (config.small.path, config.large.path) == ("/home/somebody/small", "b")
