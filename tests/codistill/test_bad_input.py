"""Bad input of every kind: each is refused in one line that says what is wrong, and quickly."""

import copy
import gzip
import json
import os
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
import tokenizers
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from test_config import MINIMAL

from codistill.config import Config, ConfigError, load_config
from codistill.config.data import DataConfig
from codistill.data import load_problems
from codistill.inputs import load_inputs
from codistill.model.loading import load_causal_lm


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
        ("data.template", "{problem}\ud800"),
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
        [Path("/home/somebody/a.jsonl")],
        Path("b.jsonl"),
    )
    assert (config.small.path, config.large.path) == ("/home/somebody/small", "b")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


def edit(folder: Path, name: str, **values) -> None:
    """Change values of a JSON file."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder: Path, change) -> None:
    """Change the dictionary of weights."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def narrow(weights: dict) -> None:
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.norm.weight"][None].clone()


def add_tokens(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<{number}>" for number in range(30)])
    tokenizer.save_pretrained(folder)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


WEIGHTS = "model.safetensors"
REFUSED_MODELS = {
    "no config": (lambda f: (f / "config.json").unlink(), "a model's folder, with config.json"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "an object in config.json"),
    "config broken": (lambda f: (f / "config.json").write_text("{"), "JSON in config.json"),
    "config a pointer": (
        lambda f: (f / "config.json").write_text(POINTER),
        "config.json is a Git LFS pointer",
    ),
    "unknown type": (
        lambda f: edit(f, "config.json", model_type="mine", auto_map={"AutoConfig": "x.Y"}),
        "a model that is understood",
    ),
    "no causal model": (lambda f: edit(f, "config.json", model_type="t5"), "a model that is"),
    "impossible sizes": (lambda f: edit(f, "config.json", hidden_size="x"), "a model that is"),
    "other shape": (
        lambda f: edit_weights(f, narrow),
        "model.layers.0.mlp.up_proj.weight of (128, 64) as in config.json; it is (1, 64)",
    ),
    "fewer rows than in config": (
        lambda f: edit(f, "config.json", vocab_size=99),
        "as in config.json; it is (40, 64)",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"the weights {WEIGHTS}, which are not there"),
    "empty weights": (
        lambda f: (f / WEIGHTS).write_bytes(b""),
        f"a whole safetensors file {WEIGHTS}",
    ),
    "cut weights": (lambda f: cut(f / WEIGHTS), f"a whole safetensors file {WEIGHTS}"),
    "weights a pointer": (
        lambda f: (f / WEIGHTS).write_text(POINTER),
        f"{WEIGHTS} is a Git LFS pointer",
    ),
    "weights a pipe": (
        lambda f: ((f / WEIGHTS).unlink(), os.mkfifo(f / WEIGHTS)),
        f"the weights {WEIGHTS}, which are not there",
    ),
    "a shard missing": (
        lambda f: (f / f"{WEIGHTS}.index.json").write_text(
            '{"weight_map": {"a": "b.safetensors"}}'
        ),
        "the weights b.safetensors, which are not there",
    ),
    "index of nothing": (
        lambda f: (f / f"{WEIGHTS}.index.json").write_text("{}"),
        f"a weight_map of file names in {WEIGHTS}.index.json",
    ),
    "empty tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "a model with a tokenizer",
    ),
    "more tokens than rows": (
        add_tokens,
        "a row for each of the tokenizer's 50 tokens; there are 40",
    ),
}


@pytest.mark.parametrize("case", REFUSED_MODELS)
def test_wrong_model_is_named(settings, models, tmp_path, case):
    change, expected = REFUSED_MODELS[case]
    path = tmp_path / "model"
    shutil.copytree(models["large"], path)
    change(path)
    # The only model of its run, or the first of two: the other must not be blamed.
    settings["small"]["path"] = str(path)
    if case == "more tokens than rows":
        settings |= {"algorithm": "grpo"}
    with pytest.raises(ConfigError) as error:
        load_inputs(Config(**settings))
    assert str(error.value).startswith(f"small.path = {str(path)!r}: expected ")
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_is_not_there_is_said_at_once(settings, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for path in ("demo/typo", "./typo", "typo", "a/b/c", "~/typo"):
        settings["large"]["path"] = path
        start = time.monotonic()
        with pytest.raises(
            ConfigError, match="^large.path = '.*(typo|c)': expected a folder that exists"
        ):
            load_inputs(Config(**settings))
        assert time.monotonic() - start < 10


def test_weights_that_are_missing_are_no_random_numbers(models, tmp_path):
    shutil.copytree(models["large"], tmp_path / "model")
    edit_weights(tmp_path / "model", lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(
        ConfigError, match="^model = .*: expected all weights and no others, 1 are missing: model.n"
    ):
        load_causal_lm(str(tmp_path / "model"), dtype=torch.float32, key="model")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", POINTER, "the file itself: it is a Git LFS pointer"),
        ("a.parquet", POINTER, "the file itself: it is a Git LFS pointer"),
        (
            "a.jsonl",
            '{"problem": "\\ud800", "answer": "1"}',
            "a text without '\\ud800' as problem in",
        ),
        (
            "a.jsonl",
            '{"problem": "1\\u0000", "answer": "1"}',
            "a text without '\\x00' as problem in",
        ),
        (
            "a.jsonl",
            '{"problem": "1", "answer": "1\\u0000"}',
            "a text without '\\x00' as answer in",
        ),
        (
            "a.jsonl",
            '{"problem": "1", "answer": "\\udfff"}',
            "a text without '\\udfff' as answer in",
        ),
        (
            "a.jsonl",
            '{"problem": " \\n", "answer": "1"}',
            "a text or a list of messages as problem in",
        ),
        (
            "a.jsonl",
            '{"problem": "1", "answer": " "}',
            "a text, a number or a list of them as answer",
        ),
        (
            "a.jsonl",
            '{"problem": "1", "answer": true}',
            "a text, a number or a list of them as answer",
        ),
        (
            "a.jsonl",
            '{"problem": "1", "answer": NaN}',
            "a text, a number or a list of them as answer",
        ),
        (
            "a.jsonl",
            '{"problem": "1", "answer": "1"}\n{"question": "1", "answer": "1"}',
            "as problem, as in other rows, in row 2, which has question, answer",
        ),
        ("a.jsonl", '{"a\\nb": "1", "c": "1"}', "found a\\nb, c"),
        ("a.json", "[" * 100_000, "rows of few levels"),
        (
            "a.jsonl",
            "\u00e9".encode("latin-1"),
            "expected UTF-8: 'utf-8' codec can't",
        ),
        ("a.jsonl", "{}".encode("utf-16"), "expected UTF-8: 'utf-8' codec can't"),
        ("a.jsonl.gz", b"no gzip", "Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b"x" * 999, mtime=0)[:-12],
            "end-of-stream marker was reached",
        ),
        ("a.csv", 'problem,answer\n1,"2', "unexpected end of data"),
        ("a.csv", "problem,answer\n1,2,3", "row 1 has more values than the first line has names"),
        ("folder", "[1]", "expected rows of problems: list indices must be integers"),
        ("folder", '{"_data_files": [{"filename": 3}]}', "expected rows of problems: unsupported"),
        ("pipe.jsonl", None, "a file that exists"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_wrong_data(tmp_path, tokenizer, name, content, expected):
    path = tmp_path / name
    if content is None:
        os.mkfifo(path)
    else:
        target = path if path.suffix else path / "state.json"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.encode())
    config = DataConfig(train=path, eval=path)
    with pytest.raises(ConfigError) as error:
        load_problems(
            "data.train", config, paths=config.train, tokenizer=tokenizer, max_prompt_tokens=99
        )
    assert str(error.value).startswith(f"data.train = {str(path)!r}: expected ")
    assert expected in str(error.value) and str(error.value).isprintable()


def test_a_prompt_without_tokens(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"problem": "\\u200b", "answer": "1"}')
    config = DataConfig(train=tmp_path / "a.jsonl", eval=tmp_path / "a.jsonl")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("\u200b", "")
    with pytest.raises(ConfigError, match="expected a prompt of tokens in row 1, which has"):
        load_problems(
            "data.train", config, paths=config.train, tokenizer=tokenizer, max_prompt_tokens=99
        )
