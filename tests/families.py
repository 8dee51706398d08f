"""A tiny random model of each family that is known to be trained right."""

from pathlib import Path

import torch
import transformers

SIZES = dict(
    vocab_size=37,  # no two processes have as many rows
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,  # of 32 numbers, vLLM's smallest head on a CPU
    num_key_value_heads=1,
    max_position_embeddings=64,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=1,
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Gemma multiplies embeddings by sqrt(hidden_size): with larger ones each token predicts itself.
GEMMA = {"head_dim": 32, "sliding_window": 4, "initializer_range": 0.02}
FAMILIES = {
    "qwen2, tied": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32}),
    "llama 3, scaled rope": (transformers.LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "mistral, window": (transformers.MistralConfig, {"sliding_window": 4}),
    "gemma 2, softcaps": (transformers.Gemma2Config, GEMMA | {"final_logit_softcapping": 5.0}),
    "gemma 3, window": (transformers.Gemma3TextConfig, GEMMA),
    "granite, logit scale": (transformers.GraniteConfig, {"logits_scaling": 8.0}),
    "cohere, logit scale": (transformers.CohereConfig, {"logit_scale": 0.25}),
    "phi, bias": (transformers.PhiConfig, {}),
}


def save_family(
    folder: Path, family: str, dtype: torch.dtype = torch.float32, **options: str
) -> Path:
    """A random model of a family, none of whose weights is zero or one throughout."""
    config_class, settings = FAMILIES[family]
    torch.manual_seed(1)
    lm = transformers.AutoModelForCausalLM.from_config(config_class(**SIZES | settings))
    with torch.no_grad():
        for weight in lm.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    lm.to(dtype).save_pretrained(folder, **options)
    return folder
