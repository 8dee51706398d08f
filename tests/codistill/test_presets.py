"""configs/*.yaml: each says what Table 3 says, and each runs, with models and data of test size."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from codistill.config import Config, load_config
from codistill.inputs import load_inputs
from codistill.trainer import Trainer

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = {
    "qwen2.5_math": ["", "--kd.alpha 2 --name alpha2", "--hint.tokens 50 --name hints"],
    "qwen2.5_math_grpo": ["", "--grpo.model large --name large"],
    "qwen2.5_math_kdrl": [""],
    "qwen2.5_math_ct": [""],
    "llama3": [""],
    "llama3_grpo": [""],
}
CASES = [(name, options.split()) for name, rows in PRESETS.items() for options in rows]
IDS = [" ".join([name, *options]) for name, options in CASES]


def load(name: str, *options: str) -> Config:
    return load_config(["--config", str(CONFIGS / f"{name}.yaml"), *options])


def test_every_preset_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*PRESETS, "demo"}


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_a_preset_says_what_table_3_says(name, options):
    config = load(name, *options)
    config.check_processes(8)
    llama = name.startswith("llama3")
    assert all(config.model(m).learning_rate == (1e-7 if llama else 5e-6) for m in config.trained)
    assert config.optimizer.schedule == ("constant" if llama else "cosine")
    assert config.optimizer.warmup_fraction == (0.0 if llama else 0.05)
    rollout, kept = config.rollout, config.kept
    assert (rollout.max_prompt_tokens, rollout.max_completion_tokens, kept) == (1024, 3072, 8)
    alone = config.algorithm == "grpo"
    assert rollout.num_generations == (8 if alone else 12 if llama else 14)
    assert rollout.prompts_per_step * kept == 8 * 64  # batch size of each of 8 GPUs
    if config.training.steps is None:
        assert config.training.epochs == (2 if llama else 8)
    assert (config.data.template, config.reward.format) == (
        ("boxed", False) if llama else ("r1", True)
    )
    assert (config.loss.beta, config.advantage.scale, config.kd.alpha_end) == (0.0, "none", None)


@pytest.mark.parametrize(
    ("name", "algorithm", "writer", "alpha", "hint"),
    [
        ("qwen2.5_math", "codistill", "small", 1.0, 0),
        ("qwen2.5_math --kd.alpha 2", "codistill", "small", 2.0, 0),
        ("qwen2.5_math --hint.tokens 50", "codistill", "small", 1.0, 50),
        ("qwen2.5_math_kdrl", "kdrl", "small", 1.0, 0),
        ("qwen2.5_math_grpo", "grpo", "small", 1.0, 0),
        ("qwen2.5_math_grpo --grpo.model large", "grpo", "large", 1.0, 0),
        ("qwen2.5_math_ct", "grpo", "large", 1.0, 0),
        ("llama3", "codistill", "small", 1.0, 0),
        ("llama3_grpo", "grpo", "small", 1.0, 0),
    ],
)
def test_a_preset_is_the_row_of_the_tables_it_names(name, algorithm, writer, alpha, hint):
    config = load(*name.split())
    assert (config.algorithm, config.writer) == (algorithm, writer)
    assert (config.kd.alpha, config.hint.tokens, config.hint.epochs) == (alpha, hint, 1)


def test_presets_start_from_what_others_export():
    """The file of the other preset, its number of steps and its model."""
    codistill, large = load("qwen2.5_math"), load("qwen2.5_math_grpo", "--grpo.model", "large")
    steps = codistill.total_steps(num_problems=12_000)
    assert large.training.epochs == codistill.training.epochs
    folder = f"export/step_{steps}/large"
    assert load("qwen2.5_math_ct").model("large").path == f"runs/{codistill.name}/{folder}"
    header = (CONFIGS / "qwen2.5_math_grpo.yaml").read_text()
    assert "--grpo.model large --name qwen2.5_math_grpo_7b\n" in header
    path = load("qwen2.5_math_kdrl").model("large").path
    assert path == f"runs/qwen2.5_math_grpo_7b/{folder}"


def byte_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """One token per byte, so it takes any text. bos: whether it begins each text with a BOS token,
    as Llama's tokenizer does."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<end>", "<begin>", *letters]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"bos_token": "<begin>"} if bos else {}
    if bos:
        special = [("<begin>", words.index("<begin>"))]
        tokenizer.post_processor = TemplateProcessing(single="<begin> $A", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", **names)


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, Path]:
    """A small and a large model of each family."""
    folder = tmp_path_factory.mktemp("families")
    for family, kinds in {
        "qwen2.5": (Qwen2Config, Qwen2ForCausalLM),
        "llama3": (LlamaConfig, LlamaForCausalLM),
    }.items():
        tokenizer = byte_tokenizer(bos=family == "llama3")
        for name, hidden in (("small", 32), ("large", 64)):
            torch.manual_seed(hidden)
            config = kinds[0](
                vocab_size=len(tokenizer) + hidden,  # padded, and differently
                hidden_size=hidden,
                intermediate_size=hidden,
                num_hidden_layers=1,
                num_attention_heads=1,
                num_key_value_heads=1,
                max_position_embeddings=2048,
                tie_word_embeddings=name == "small",
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=tokenizer.bos_token_id,
            )
            kinds[1](config).save_pretrained(folder / family / name)
            tokenizer.save_pretrained(folder / family / name)
    rows = [{"problem": f"What is ${n} + 1$?", "answer": str(n + 1)} for n in range(4)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {path.name: path for path in folder.iterdir()}


def tiny(name: str, families: dict[str, Path], config: Config) -> list[str]:
    """Options that make a preset a run of two seconds."""
    family = families[name.split("_")[0]]
    options = {
        f"{model}.path": family / model
        for model in ("small", "large")
        if getattr(config, model) is not None
    }
    options |= {
        "data.train": families["data.jsonl"],
        "data.eval": families["data.jsonl"],
        "rollout.engine": "hf",
        "rollout.prompts_per_step": 1,
        "rollout.max_completion_tokens": 8,
        "training.steps": 2,
        "training.dtype": "float32",
    }
    options |= {"hint.tokens": 3} if config.hint.tokens else {}
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_a_preset_runs(name, options, families, grader, tmp_path, caplog):
    config = load(name, *options, *tiny(name, families, load(name, *options)))
    config.check_processes(1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        inputs = load_inputs(config)
        trainer = Trainer(config, inputs, torch.device("cpu"), grader)
        steps = [trainer.step(step) for step in (1, 2)]
    finally:
        dist.destroy_process_group()
    assert "data.eval: 4 of 4 problems are in data.train too" in caplog.text
    for numbers, rollouts, scored in steps:
        assert len(scored.credit.kept) == 8
        assert {key.rpartition("/")[2] for key in numbers if "loss/" in key} == {*config.trained}
        begin = inputs.tokenizer.bos_token_id
        for problem in rollouts.problems:
            assert problem.prompt_ids.count(begin) == (1 if name.startswith("llama3") else 0)
