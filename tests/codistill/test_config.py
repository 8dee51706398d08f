"""A mistake in the configuration ends in exit code 2 and one line that names it."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from codistill.config import Config, ConfigError, load_config
from codistill.config.load import field_keys, most_like
from codistill.losses import make_policy_loss
from codistill.run import run
from codistill.stopping import StopSignals

ROOT = Path(__file__).parents[2]
MINIMAL = {
    "name": "x",
    "small": {"path": "a"},
    "large": {"path": "b"},
    "data": {"train": "a.jsonl", "eval": "b.jsonl"},
}


@pytest.fixture
def load(tmp_path):
    def run(*arguments: str) -> Config:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(MINIMAL))
        return load_config(["--config", str(path), *arguments])

    return run


def test_command_line_wins_and_keeps_the_rest_of_a_section(load):
    config = load("--small.learning_rate", "1e-3", "--kd.alpha=2")
    assert (config.small.path, config.small.learning_rate, config.kd.alpha) == ("a", 1e-3, 2.0)


def test_defaults_are_those_of_table_3():
    config = Config(**MINIMAL)
    assert config.rollout.num_generations == 14 and config.downsample.keep == 8
    assert config.rollout.max_completion_tokens == 3072
    assert config.small.learning_rate == config.large.learning_rate == 5e-6
    assert config.optimizer.schedule == "cosine" and config.optimizer.warmup_fraction == 0.05


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rollout.num_gen", "4"], "rollout.num_gen = '4': expected a known key; did you mean"),
        (["--rollout.temperature", "warm"], "rollout.temperature = 'warm': input should be"),
        (["--rollout.temperature", "0"], "rollout.temperature = '0': input should be greater"),
        (
            ["--rollout.engine", "sglang"],
            "rollout.engine = 'sglang': input should be 'auto', 'vllm'",
        ),
        (["--rollout.num_generations", "6"], "rollout.num_generations = 6: expected M of at least"),
        (["--downsample.keep", "7"], "downsample.keep = 7: expected an even number"),
        (["--data.template", "x"], "data.template = 'x': expected r1, boxed, chat or a text with"),
        (
            ["--hint.tokens", "3072"],
            "hint.tokens = 3072: expected less than rollout.max_completion",
        ),
        (["--hint.tokens", "3", "--algorithm", "grpo"], "hint.tokens = 3: expected 0 with"),
        (["--hint.loss", "masked"], "hint.loss = 'masked': expected own where hint.tokens = 0"),
        (
            ["--kd.placement", "objective", "--kd.estimator", "k1"],
            "kd.estimator = 'k1': expected k2",
        ),
        (
            ["--kd.estimator", "k2"],
            "kd.estimator = 'k2': expected k1 or k3 or exact with kd.placem",
        ),
        (["--downsample.method", "none", "--downsample.by", "shortness"], "downsample.by = 'short"),
        (
            ["--advantage.baseline", "leave_one_out", "--advantage.scale", "std"],
            "advantage.scale = 'std': expected none with baseline leave_one_out",
        ),
        (
            ["--downsample.keep", "1", "--downsample.method", "top"],
            "downsample.keep = 1: expected at least 2",
        ),
        (["--loss.kind", "ppo"], "loss.kind = 'ppo': input should be 'clip', 'cispo', 'gspo'"),
        (
            ["--loss.epsilon", "1"],
            "loss.epsilon = '1': expected a known key; did you mean",
        ),
        (
            ["--loss.old_logps", "engine", "--loss.importance_cap", "2"],
            "loss.importance_cap = 2.0: expected no value with loss.old_logps = 'engine'",
        ),
        (
            ["--loss.old_logps=engine", "--loss.logp_temperature=one", "--rollout.temperature=0.7"],
            "loss.old_logps = 'engine': expected trainer with loss.logp_temperature = 'one'",
        ),
        (
            ["--algorithm", "kdrl", "--loss.large_log_ratio_clamp", "5"],
            "loss.large_log_ratio_clamp = 5.0: expected no value: algorithm kdrl does not train",
        ),
        (
            ["--algorithm", "grpo", "--training.update_order", "large_first"],
            "training.update_order = 'large_first': expected small_first: algorithm grpo",
        ),
        (["--algorithm", "ppo"], "algorithm = 'ppo': input should be 'codistill', 'kdrl'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_key_or_value_is_named(load, arguments, expected):
    with pytest.raises(ConfigError) as error:
        load(*arguments)
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: x", "small is missing: expected phi"),
        ("rollout: {speed: 3}", "rollout.speed = 3: expected a known key"),
        ("a: [", "expected YAML"),
        ("[1]", "expected a YAML file with section: keys"),
    ],
    ids=["missing", "unknown", "broken", "list"],
)
def test_wrong_file_is_named(tmp_path, text, expected):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + text if "rollout" in text else text)
    with pytest.raises(ConfigError) as error:
        load_config(["--config", str(path)])
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--loss.epsilon_low", "1"], "loss.epsilon_low = 1.0: expected in [0, 1)"),
        (
            ["--loss.epsilon_low", "2", "--loss.kind", "cispo"],
            "loss.epsilon_low = 2.0: expected in [0, 1]",
        ),
        (
            ["--loss.kind", "gmpo", "--loss.large_dual_clip", "3"],
            "loss.large_dual_clip = 3.0: expected None with kind 'gmpo', which does not use it",
        ),
        (
            ["--loss.large_log_ratio_clamp", "-1"],
            "loss.large_log_ratio_clamp = -1.0: expected > 0",
        ),
        (
            ["--loss.vespo_k_negative", "1"],
            "loss.vespo_k_negative = 1.0: expected 3.0 with kind 'clip', which does not use it",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_setting_of_the_loss_is_named(load, arguments, expected):
    config = load(*arguments)
    with pytest.raises(ConfigError) as error:
        for name in config.trained:
            make_policy_loss(config, name)
    assert str(error.value) == expected


def test_missing_file_is_named():
    with pytest.raises(ConfigError, match="--config = 'no.yaml': expected a YAML file that exists"):
        load_config(["--config", "no.yaml"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--loss.epsilon_low", "1", "--loss.kind", "cispo"],
        ["--loss.epsilon_low", "3", "--loss.kind", "gmpo"],
        ["--downsample.keep", "7", "--downsample.method", "top"],
        ["--downsample.method", "none", "--rollout.num_generations", "4"],
        ["--loss.old_logps", "engine", "--loss.logp_temperature", "one"],  # temperature is 1
        ["--algorithm", "grpo", "--grpo.model", "large", "--loss.large_dual_clip", "3"],
    ],
    ids=str,
)
def test_right_combinations(load, arguments):
    config = load(*arguments)
    for name in config.trained:
        make_policy_loss(config, name)


def test_processes_must_divide_the_prompts(load):
    with pytest.raises(ConfigError, match="rollout.prompts_per_step = 64: expected a multiple of"):
        load().check_processes(3)
    load().check_processes(2)
    load("--training.mini_batches", "8").check_processes(2)
    with pytest.raises(ConfigError, match="2 processes times training.mini_batches = 24"):
        load("--training.mini_batches", "24").check_processes(2)


def test_a_micro_batch_holds_the_longest_rollout(load):
    expected = "tokens_per_micro_batch = 4095: expected at least the 4096 tokens"
    with pytest.raises(ConfigError, match=expected):
        load("--training.tokens_per_micro_batch", "4095")
    load("--training.tokens_per_micro_batch", "4096")


def test_every_field_has_a_text():
    models = [Config, *(field.annotation for field in Config.model_fields.values())]
    for model in models:
        for name, field in getattr(model, "model_fields", {}).items():
            assert field.description, f"{model.__name__}.{name}"
    assert len(field_keys(Config)) > 30


def test_help_is_quick_and_needs_no_torch():
    start = time.perf_counter()
    code = (
        "import sys; sys.argv = ['train.py', '--help']\n"
        "import train\n"
        "try: train.main()\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--rollout.num_generations int" in done.stdout
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("rollout.num_gen", "rollout.num_generations"),
        ("rollout.n", "rollout.num_generations"),
        ("rollout.max_tokens", "rollout.max_prompt_tokens"),
        ("loss.epsilon", "loss.epsilon_low"),
        ("data.prompt_field", "data.problem_field"),
        ("learning_rate", "small.learning_rate"),
        ("rollout.seed", "seed"),
        ("sed", "seed"),
        ("rolout.temprature", "rollout.temperature"),
        ("rollout.top_p", None),  # not rollout.stop
        ("training.lr", None),
        ("speed", "seed"),
    ],
)
def test_the_key_that_is_most_like_an_unknown_one(key, near):
    assert most_like(key, field_keys(Config)) == near


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"data": {"train": "nowhere.jsonl"}},
            "data.train = 'nowhere.jsonl': expected a file that",
        ),
        ({"data": {"train": "{empty}"}}, "expected at least one problem, found none"),
        ({"data": {"train": "{wrong}"}}, "ground_truth or answer or solution, found question"),
        (
            {"data": {"eval": "{bad}"}},
            "an answer in row 2 that can be compared",
        ),
        (
            {"small": {"path": "./nowhere"}},
            "small.path = './nowhere': expected a folder that exists",
        ),
        ({"large": {"path": "{other}"}}, "expected the tokenizer of small.path"),
        (
            {"rollout": {"max_prompt_tokens": 3}},
            "expected rollout.max_prompt_tokens of at least 4, the length of the prompt in row 1",
        ),
        (
            {"rollout": {"max_completion_tokens": 57}, "training": {"tokens_per_micro_batch": 65}},
            "rollout.max_completion_tokens = 57: expected no more than the 64 positions of small",
        ),
        ({"loss": {"epsilon_low": 1.0}}, "loss.epsilon_low = 1.0: expected in [0, 1)"),
        (
            {"rollout": {"prompts_per_step": 6, "sampling_rounds": 2}},
            "rollout.sampling_rounds = 2: expected 1 with the 8 problems of data.train",
        ),
    ],
    ids=[
        "no file",
        "empty",
        "wrong fields",
        "bad answer",
        "no model",
        "tokenizers",
        "long prompt",
        "few positions",
        "loss",
        "no rounds",
    ],
)
def test_wrong_input_stops_the_run(settings, tmp_path, models, change, expected):
    (tmp_path / "empty.jsonl").write_text("")
    rows = [{"problem": "1", "answer": answer} for answer in ("1", "}")]
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "wrong.jsonl").write_text('{"question": "1"}\n')
    shutil.copytree(models["large"], tmp_path / "other")
    vocabulary = tmp_path / "other" / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace('"7"', '"x"').replace('"8"', '"7"'))
    for section, values in change.items():
        for key, value in values.items():
            if isinstance(value, str) and value.startswith("{"):
                name = value.strip("{}")
                value = str(tmp_path / (name if name == "other" else f"{name}.jsonl"))
            settings.setdefault(section, {})[key] = value
    config = Config(**settings)
    with pytest.raises(ConfigError) as error:
        config.check_processes(1)
        run(config, StopSignals())
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert not torch.distributed.is_initialized()  # nothing was loaded or started


def test_commands_print_one_line_and_end_with_code_2(settings, train, tmp_path):
    settings["data"]["eval"] = "nowhere.jsonl"
    done = train(settings)
    assert done.returncode == 2
    line = "data.eval = 'nowhere.jsonl': expected a file that exists\n"
    assert (done.stderr, done.stdout) == (f"train.py: {line}", "")
    doctor = [sys.executable, "-m", "codistill", "doctor", "--config", tmp_path / "config.yaml"]
    done = subprocess.run(doctor, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (2, f"codistill: {line}", "")


@pytest.mark.parametrize("command", ["train", "doctor", "eval"])
def test_files_that_are_missing_are_said_before_torch_is_imported(settings, tmp_path, command):
    path = tmp_path / "config.yaml"
    settings["data"]["eval"] = "nowhere.jsonl"
    path.write_text(yaml.safe_dump(settings))
    arguments = ["--config", str(path)]
    if command == "eval":
        arguments = f"--model nowhere --data sums={path} --template r1 --output {tmp_path}".split()
    module = "codistill.train" if command == "train" else "codistill.__main__"
    names = [] if command == "train" else [command]
    code = (
        f"import sys; sys.argv = {['train.py', *names, *arguments]!r}\n"
        f"from {module} import main\n"
        "assert main() == 2 and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    key = "model = 'nowhere'" if command == "eval" else "data.eval = 'nowhere.jsonl'"
    assert done.stderr.startswith(f"train.py: {key}: expected a f")


def test_a_mistake_that_is_seen_in_a_group_ends_the_process_at_once(settings, tmp_path):
    """Without the interpreter's teardown, which gloo's threads may not survive."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    code = (
        "import atexit, sys\n"
        f"sys.argv = ['train.py', '--config', {str(path)!r}]\n"
        "from codistill import distributed, run, train\n"
        "from codistill.config import ConfigError\n"
        "def late(*arguments):\n"
        "    distributed.start(60)\n"
        "    raise ConfigError('small.path: expected another one')\n"
        "run.run = late\n"
        "atexit.register(print, 'teardown')\n"
        "sys.exit(train.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    line = "train.py: small.path: expected another one\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)
