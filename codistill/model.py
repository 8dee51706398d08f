"""Models and tokenizers. The only importer of transformers.

A `Policy` is a causal language model whose forward pass ends in log-probabilities, not in logits.
`shard` spreads its weights over the processes with FSDP2.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from codistill.batch import TokenBatch
from codistill.config import Config, ConfigError, require
from codistill_kernels import linear_logps

ROWS_OF_HEAD = 16384  # copied to fp32 at once: 0.2 GiB of a 7B model's; chosen, untested


def quiet_transformers() -> None:
    """No progress bars, no warnings: the run has its own display."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


class Policy(nn.Module):
    """pi(token | prompt, tokens before) of a causal language model."""

    def __init__(self, lm: PreTrainedModel, *, vocab_size: int) -> None:
        super().__init__()
        self.lm = lm
        self.vocab_size = vocab_size
        self.softcap = getattr(lm.config.get_text_config(), "final_logit_softcapping", None)

    def forward(self, batch: TokenBatch, temperature: float) -> Tensor:
        """Log-probability of each completion token, [N] fp32 nats, at the given temperature."""
        head = self.lm.get_output_embeddings()
        return linear_logps(
            self.hidden_states(batch),
            head.weight,
            batch.token_ids,
            bias=head.bias,
            temperature=temperature,
            softcap=self.softcap,
            vocab_size=self.vocab_size,
        )

    def hidden_states(self, batch: TokenBatch) -> Tensor:
        """[N, H] at the position that predicts each completion token."""
        output = self.lm.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
        return output.last_hidden_state.flatten(0, 1)[batch.positions]

    def head_inputs(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """(hidden states [N, H], lm_head weight [V, H]), whole, until the policy runs again.

        Raises:
            NotImplementedError: the head does more than multiply.
        """
        head = self.lm.get_output_embeddings()
        if head.bias is not None or self.softcap is not None:
            raise NotImplementedError("kd.estimator exact: an lm_head with a bias or a softcap")
        return self.hidden_states(batch), head.weight

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[list[int]], uniforms: np.ndarray, temperature: float
    ) -> list[list[int]]:
        """T tokens after each prompt, from softmax(logits / temperature), with a KV cache.

        uniforms: [S, T] in [0, 1); token t of row s is the inverse distribution function of
        uniforms[s, t]. Exactly T forward passes, whatever is sampled: each is a collective.
        """
        training = self.training
        self.eval()  # in training, gradient checkpointing would switch the cache off
        width = max(map(len, prompts))
        device = next(self.parameters()).device
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        draws = torch.tensor(uniforms, dtype=torch.float64, device=device)
        cache, tokens = None, []
        for draw in draws.T:
            output = self.lm.base_model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            logits = self.logits(output.last_hidden_state[:, -1]).double()
            reached = (logits / temperature).softmax(dim=1).cumsum(dim=1)
            # Rounding may leave the last sum below a draw.
            ids = torch.searchsorted(reached, draw[:, None].contiguous(), right=True)
            ids = ids.clamp(max=self.vocab_size - 1)
            tokens.append(ids)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            positions = positions[:, -1:] + 1
        self.train(training)
        return torch.cat(tokens, dim=1).tolist()

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[S, H] -> [S, V] fp32, never rounded to the dtype of the forward pass, as in training."""
        head = self.lm.get_output_embeddings()
        parts = head.weight[: self.vocab_size].split(ROWS_OF_HEAD)
        logits = torch.cat([hidden_states.float() @ part.float().T for part in parts], dim=1)
        if head.bias is not None:
            logits = logits + head.bias[: self.vocab_size].float()
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def release(self) -> None:
        """Give back the weights that a forward pass has gathered and keeps: embedding and head."""
        if isinstance(self, FSDPModule):
            self.reshard()

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """All weights by Hugging Face name, gathered one by one: every process must iterate."""
        self.release()  # what a forward pass leaves behind is rounded to its dtype
        for name, parameter in self.lm.named_parameters():
            weight = parameter.detach()
            yield name, weight.full_tensor() if isinstance(weight, DTensor) else weight


def shard(policy: Policy, *, dtype: torch.dtype) -> Policy:
    """Shard over all processes with FSDP2: fp32 weights, forward and backward in `dtype`.

    Gradients are summed over the processes, not averaged: the losses divide by a global count.
    """
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in policy.lm.base_model.layers:
        fully_shard(layer, mp_policy=precision)
    fully_shard(policy, mp_policy=precision)
    for method in ("sample", "head_inputs"):
        register_fsdp_forward_method(policy, method)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    return policy


def load_causal_lm(path: str, *, dtype: torch.dtype) -> PreTrainedModel:
    """From safetensors only: other formats are pickles, which may run code."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True)


def load_policy(
    path: str, *, vocab_size: int, dtype: torch.dtype, device: torch.device, checkpointing: bool
) -> Policy:
    """A sharded policy, ready to train."""
    lm = load_causal_lm(path, dtype=torch.float32)
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(lm, vocab_size=vocab_size).to(device)
    return shard(policy.train(), dtype=dtype)


def freeze(policy: Policy) -> Policy:
    """A model that is only asked: no gradients, no optimizer."""
    return policy.eval().requires_grad_(False)


def load_tokenizer(key: str, path: str) -> PreTrainedTokenizerBase:
    """Raises ConfigError under configuration key `key` if there is none."""
    local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if local and not Path(path).is_dir():
        raise ConfigError(f"{key} = {path!r}: expected a folder that exists, or a Hub name")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        expected = f"a model with a tokenizer: {str(error).splitlines()[0]}"
        raise ConfigError(f"{key} = {path!r}: expected {expected}") from error


def load_tokenizers(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer that all models of the run share.

    Raises:
        ConfigError: one is missing, or they give different ids to the same text: a ratio of the
            models' probabilities means something only token by token.
    """
    first, *rest = config.loaded
    path = config.model(first).path
    tokenizer = load_tokenizer(f"{first}.path", path)
    for name in rest:
        other_path = config.model(name).path
        other = load_tokenizer(f"{name}.path", other_path)
        ours, theirs = tokenizer.get_vocab(), other.get_vocab()
        different = next((t for t in sorted(ours | theirs) if ours.get(t) != theirs.get(t)), None)
        require(
            different is None,
            f"{name}.path",
            other_path,
            f"the tokenizer of {first}.path = {path!r}; token {different!r} has id "
            f"{theirs.get(different)} here and {ours.get(different)} there",
        )
    return tokenizer


def check_context(config: Config) -> None:
    """Raise ConfigError unless prompt and completion fit into the positions of every model."""
    rollout = config.rollout
    for name in config.loaded:
        path = config.model(name).path
        try:
            text_config = AutoConfig.from_pretrained(path).get_text_config()
        except (OSError, ValueError) as error:
            expected = f"a model with a config.json: {str(error).splitlines()[0]}"
            raise ConfigError(f"{name}.path = {path!r}: expected {expected}") from error
        positions = getattr(text_config, "max_position_embeddings", None)
        require(
            positions is None
            or rollout.max_prompt_tokens + rollout.max_completion_tokens <= positions,
            "rollout.max_completion_tokens",
            rollout.max_completion_tokens,
            f"no more than the {positions} positions of {name}.path = {path!r} less "
            f"rollout.max_prompt_tokens = {rollout.max_prompt_tokens}",
        )


def end_token_ids(key: str, path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a completion: the model's generation_config, else the tokenizer's end token.

    Raises ConfigError under configuration key `key` if there is none.
    """
    try:
        ids = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # the model has no generation_config.json
        ids = None
    ids = tokenizer.eos_token_id if ids is None else ids
    if ids is None:
        raise ConfigError(f"{key} = {path!r}: expected a model that names its end token")
    return tuple(ids) if isinstance(ids, list) else (ids,)


def export(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path, *, write: bool
) -> None:
    """Save as a Hugging Face model. Every process must call; the one with `write` writes."""
    weights = {name: weight.cpu() for name, weight in policy.full_weights() if write}
    if write:
        policy.lm.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
