"""Sizes of mixtures of experts and of adapters, by counting what torch multiplies and by hand."""

import pytest
import torch
import transformers
from families import SIZES, save_family
from torch.utils.flop_counter import FlopCounterMode

from codistill.config import ConfigError
from codistill.config.machinery import LoraConfig
from codistill.model.lora import add_adapters
from codistill.model.shape import model_shape
from codistill.output.throughput import training_flops

TOKENS = 40
MIXTURES = {
    "qwen3": transformers.Qwen3MoeConfig(**SIZES, num_experts=8, moe_intermediate_size=32),
    "mixtral": transformers.MixtralConfig(**SIZES),
}


@pytest.fixture(params=MIXTURES)
def mixture(request, tmp_path) -> tuple[str, transformers.PreTrainedModel]:
    """A random model in which a token goes through 2 of 8 experts, and its folder."""
    config = MIXTURES[request.param]
    config.num_experts_per_tok = 2
    lm = transformers.AutoModelForCausalLM.from_config(config)
    lm.save_pretrained(tmp_path)
    return str(tmp_path), lm


def test_a_token_multiplies_the_weights_of_its_own_experts(mixture):
    """The norms, which are no products, are the difference."""
    folder, lm = mixture
    lm.set_experts_implementation("eager")  # whose products are those that are counted
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lm(input_ids=torch.arange(TOKENS)[None] % SIZES["vocab_size"])
    counted = counter.flop_counts["Global"][torch.ops.aten.mm] / (2 * TOKENS)
    shape = model_shape("small.path", folder)
    assert shape.multiplied() == pytest.approx(counted, rel=0.02)
    assert shape.multiplied() < 0.6 * shape.parameters
    assert training_flops(lm) == 6 * shape.multiplied()


def test_many_tokens_together_reach_all_experts(mixture):
    """Each expert is passed by with probability 3/4 by each token."""
    shape = model_shape("small.path", mixture[0])
    everything = shape.parameters - SIZES["vocab_size"] * SIZES["hidden_size"]
    assert shape.multiplied(3) == pytest.approx(everything - shape.expert_parameters * 27 / 64)
    assert shape.multiplied(100) == pytest.approx(everything)


@pytest.mark.parametrize(
    ("targets", "numbers", "rows", "inputs", "outputs"),
    # Rank 3, 2 layers: inputs and outputs of q, k, v, o, gate, up, down; then of some alone.
    [
        (
            *("all-linear", 3 * 2 * (128 + 96 + 96 + 128 + 3 * 112), 3 * 7),
            *(64 + 64 + 64 + 48, 64 + 32 + 32 + 64 + 48 + 48 + 64),
        ),
        (["q_proj", "v_proj"], 3 * 2 * (128 + 96), 3 * 2, 64, 64 + 32),
        (["o_proj", "k_proj"], 3 * 2 * (128 + 96), 3 * 2, 64 + 64, 64 + 32),
        (["down_proj", "up_proj"], 3 * 2 * 2 * 112, 3 * 2, 64 + 48, 64 + 48),
    ],
    ids=str,
)
def test_adapters_by_hand(tmp_path, targets, numbers, rows, inputs, outputs):
    folder = str(save_family(tmp_path, "qwen2, tied"))
    lora = LoraConfig(rank=3, alpha=6, target_modules=targets)
    shape, whole = model_shape("small.path", folder, lora), model_shape("small.path", folder)
    assert (shape.trained, shape.adapter_width) == (numbers, rows)
    assert (shape.adapter_inputs, shape.adapter_outputs) == (inputs, outputs)
    assert whole.adapter_inputs == 0 and whole.learning_inputs == 64 + 64 + 64 + 48
    assert shape.held == whole.held + numbers and shape.parameters == whole.trained
    assert shape.layer_trained == numbers // 2 and shape.root_trained == 0
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder)
    add_adapters(lm, "small.path", folder, lora)
    assert training_flops(lm) == 4 * whole.multiplied() + 6 * numbers


def test_layers_that_are_not_there(tmp_path):
    folder = str(save_family(tmp_path, "qwen2, tied"))
    lora = LoraConfig(rank=3, alpha=6, target_modules=["k_prj"])
    with pytest.raises(ConfigError, match=r"^small.lora.target_modules = \['k_prj'\]: expected"):
        model_shape("small.path", folder, lora)
