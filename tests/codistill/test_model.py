"""Which models are refused, and which tokens end a completion."""

import json

import pytest
import torch
import transformers
from tiny import packed_logps

from codistill.batch import Ragged, TokenBatch
from codistill.config import ConfigError
from codistill.config.machinery import TrainingConfig
from codistill.model.definition import check_definition, check_trainable, stand_in
from codistill.model.loading import load_policy
from codistill.model.policy import prepare
from codistill.model.pretrained import end_token_ids, find_model

SIZES = dict(vocab_size=24, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
HEADS = dict(num_attention_heads=2, num_key_value_heads=2)


def refused(path) -> str:
    """The line that a model of this folder is refused with."""
    with pytest.raises(ConfigError) as error:
        find_model("large.path", str(path))
        check_trainable("large.path", str(path), 18)
        load_policy("large.path", str(path), TrainingConfig(), 18, torch.device("cpu"))
    assert str(error.value).startswith(f"large.path = {str(path)!r}: ")
    return str(error.value)


def test_models_that_cannot_be_trained_are_refused_in_one_line(tmp_path, process_group):
    gpt2 = transformers.GPT2Config(vocab_size=24, n_embd=32, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "gpt2")
    assert "GPT2LMHeadModel has no decoder layers" in refused(tmp_path / "gpt2")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | HEADS))
    llama.config.save_pretrained(tmp_path / "pickled")
    torch.save(llama.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    assert "model.safetensors; a .bin file is a pickle" in refused(tmp_path / "pickled")
    few = transformers.LlamaConfig(**SIZES | HEADS | {"vocab_size": 16})
    transformers.LlamaForCausalLM(few).save_pretrained(tmp_path / "few")
    assert "a row for each of the tokenizer's 18 tokens; there are 16" in refused(tmp_path / "few")
    sinks = transformers.GptOssConfig(**SIZES | HEADS, head_dim=16, num_local_experts=2)
    transformers.GptOssForCausalLM(sinks).save_pretrained(tmp_path / "sinks")
    assert "attention with sinks" in refused(tmp_path / "sinks")


def test_a_stand_in_shows_what_the_whole_model_would(tmp_path):
    """PhiMoE has its window in the mask alone."""
    sizes = SIZES | HEADS | dict(num_local_experts=2, num_hidden_layers=3)
    cpu = torch.device("cpu")
    for name, window in (("whole", None), ("window", 4096)):
        transformers.PhimoeConfig(**sizes | {"sliding_window": window}).save_pretrained(
            tmp_path / name
        )
    check_definition("large.path", str(tmp_path / "whole"), cpu)
    with pytest.raises(ConfigError, match="known attention and head; log-probabilities are .* off"):
        check_definition("large.path", str(tmp_path / "window"), cpu)


def test_a_stand_in_has_a_layer_of_each_type_and_few_tokens():
    config = transformers.Gemma3TextConfig(
        **SIZES | HEADS | dict(num_hidden_layers=14, head_dim=16, vocab_size=300, pad_token_id=299)
    )
    lm = stand_in(config, torch.device("cpu"))
    assert lm.config.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    assert len(lm.model.layers) == 6 and lm.get_input_embeddings().num_embeddings == 64
    assert len(config.layer_types) == 14


def test_a_head_in_float32(models, process_group):
    """Embedding, last norm and head; the layers as training.dtype says."""
    options, path = TrainingConfig(head_dtype="float32"), str(models["large"])
    policy = load_policy("large.path", path, options, 18, torch.device("cpu"))
    seen = {}
    for name in ("embed_tokens", "layers.0.mlp", "norm"):
        module = policy.lm.model.get_submodule(name)
        module.register_forward_hook(lambda m, i, output, name=name: seen.update({name: output}))
    policy.sample([[3, 4]], torch.zeros(1, 1).numpy(), 1.0)
    dtypes = {name: output.dtype for name, output in seen.items()}
    assert dtypes == {
        "embed_tokens": torch.float32,
        "layers.0.mlp": torch.bfloat16,
        "norm": torch.float32,
    }
    assert policy.lm.lm_head.weight.dtype == torch.float32


def test_hidden_states_have_the_dtype_of_the_head(process_group):
    """Gemma's norms return the dtype they are given."""
    sizes = SIZES | HEADS | {"head_dim": 16, "pad_token_id": 0}
    lm = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes))
    policy = prepare(lm, TrainingConfig(head_dtype="float32"), 18, torch.device("cpu"))
    rows = Ragged.of([[3, 4]])
    batch = TokenBatch.build(rows, rows, [0], torch.device("cpu"))
    hidden_states, head = policy.head_inputs(batch)
    assert hidden_states.dtype == head["lm_head_weight"].dtype == torch.float32


def test_terms_of_the_loss_are_not_rounded_to_bfloat16(models, process_group):
    """1003 would be 1004, and a log-probability of -5 off by 0.01."""
    path, cpu = str(models["large"]), torch.device("cpu")
    policy = load_policy("large.path", path, TrainingConfig(), 18, cpu)
    prompts, completions = Ragged.of([[3, 4], [5]]), Ragged.of([[2] * 9, [5, 1, 7]])
    batch = TokenBatch.build(prompts, completions, [0, 1], cpu)
    loss, statistics = policy.policy_loss(
        batch,
        0.9,
        old_logps=policy(batch, 0.9).detach(),
        advantages=torch.tensor([1.001, -1.0]),
        mask=torch.ones(12, dtype=torch.bool),
        normalizer=torch.tensor(1003.0, dtype=torch.float64),
    )
    assert statistics["ratio_max"].item() == pytest.approx(1, abs=1e-6)
    assert loss.item() == pytest.approx(-(9 * 1.001 - 3) / 1003, rel=1e-5)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [([7, 3], (7, 3)), (5, (5,)), (None, (1,))],
    ids=["several", "one", "the tokenizer's"],
)
def test_end_tokens_are_those_of_generation_config(tmp_path, tokenizer, ids, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert end_token_ids("small.path", str(tmp_path), tokenizer) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '{"eos_token_id": [1, 99]}',
            "expected end tokens below 20, the number of tokens; found 99",
        ),
        ('{"eos_token_id": -1}', "expected end tokens below 20, the number of tokens; found -1"),
        ('{"eos_token_id": "x"}', "expected end tokens below 20, the number of tokens; found 'x'"),
        ("{", "expected JSON in generation_config.json"),
        ("[]", "expected an object in generation_config.json"),
    ],
    ids=["one too large", "negative", "text", "broken", "list"],
)
def test_wrong_end_tokens(tmp_path, tokenizer, text, expected):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError) as error:
        end_token_ids("small.path", str(tmp_path), tokenizer)
    assert f"small.path = {str(tmp_path)!r}: {expected}" in str(error.value)


def test_a_model_without_generation_config_ends_as_its_tokenizer(tmp_path, tokenizer):
    assert end_token_ids("small.path", str(tmp_path), tokenizer) == (tokenizer.eos_token_id,)


def test_a_model_that_names_no_end_token_is_refused(tmp_path):
    class Tokenizer:
        eos_token_id = None

    with pytest.raises(ConfigError, match="small.path = .* a model that names its end token"):
        end_token_ids("small.path", str(tmp_path), Tokenizer())


def test_no_dropout(tmp_path, process_group):
    """What is trained is what was scored: twice the same."""
    dropout = dict(resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5)
    torch.manual_seed(0)
    phi = transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES | HEADS | dropout))
    phi.save_pretrained(tmp_path)
    options = TrainingConfig(dtype="float32")
    policy = load_policy("large.path", str(tmp_path), options, 18, torch.device("cpu"))
    assert policy.training
    first, second = (packed_logps(policy, [[3, 4]], [[5, 6, 7]], 1.0) for _ in range(2))
    assert torch.equal(first, second)


def test_flash_is_refused_where_it_does_not_run(models, process_group):
    options = TrainingConfig(attention="flash")
    with pytest.raises(ConfigError, match="training.attention = 'flash': expected sdpa or auto"):
        load_policy("large.path", str(models["large"]), options, 18, torch.device("cpu"))
