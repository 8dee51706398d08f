"""Models that are loaded; `codistill.model.pretrained` is about those that are not yet.

A `Policy` is a causal language model whose forward pass ends in log-probabilities, not in logits.
`shard` spreads its weights over the processes with FSDP2.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

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
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from codistill.attention import packed_attention
from codistill.batch import Ragged, TokenBatch
from codistill.config import ConfigError, require
from codistill.config.base import first_line
from codistill.config.schema import TrainingConfig
from codistill.distributed import is_first
from codistill.downloads import check_model_folder
from codistill.failures import first_alone
from codistill_kernels import linear_logps, linear_policy_loss
from codistill_kernels.integrations.transformers import linear_head

AttentionName = Literal["sdpa", "flash"]
IMPLEMENTATIONS = {"sdpa": "codistill_packed", "flash": "flash_attention_2"}
AttentionInterface.register(IMPLEMENTATIONS["sdpa"], packed_attention)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GAP_LIMIT = 1e-3  # nats, of `gap_to_definition` in fp32; rounding makes 1e-6
ROWS_OF_HEAD = 16384  # copied to fp32 at once: 0.2 GiB of a 7B model's; chosen, untested


def quiet_transformers() -> None:
    """No progress bars, no warnings: the run has its own display."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


class Policy(nn.Module):
    """pi(token | prompt, tokens before) of a causal language model, on packed sequences.

    Raises:
        ValueError: what the model does to its logits is none of what the kernels compute.
        NotImplementedError: its layers are not where they are in Llama, Qwen or Gemma.
    """

    def __init__(
        self, lm: PreTrainedModel, *, vocab_size: int, attention: AttentionName = "sdpa"
    ) -> None:
        super().__init__()
        linear_head(lm)  # refuses now what it would refuse in the first step
        if not hasattr(lm.base_model, "layers"):  # as `shard` needs them
            raise NotImplementedError(f"{type(lm).__name__} has no decoder layers named layers")
        self.lm, self.vocab_size = lm, vocab_size
        self.use_attention(attention)

    def use_attention(self, attention: AttentionName) -> None:
        self.attention = attention
        self.lm.set_attn_implementation(IMPLEMENTATIONS[attention])

    def forward(self, batch: TokenBatch, temperature: float) -> Tensor:
        """Log-probability of each completion token, [N] fp32 nats, at the given temperature."""
        return linear_logps(
            self.hidden_states(batch),
            token_ids=batch.token_ids,
            temperature=temperature,
            vocab_size=self.vocab_size,
            **linear_head(self.lm),
        )

    def policy_loss(
        self, batch: TokenBatch, temperature: float, **terms: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and statistics of `linear_policy_loss`, in one pass over the head."""
        return linear_policy_loss(
            self.hidden_states(batch),
            token_ids=batch.token_ids,
            cu_seqlens=batch.cu_seqlens,
            temperature=temperature,
            vocab_size=self.vocab_size,
            **linear_head(self.lm),
            **terms,
        )

    def hidden_states(self, batch: TokenBatch) -> Tensor:
        """[N, H] at the position that predicts each completion token."""
        packing = batch.packing
        within: dict[str, Any] = {"packing": packing}
        if self.attention == "flash":
            ends, longest = packing.cu_seqlens, packing.longest
            within = dict(
                cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=longest, max_length_k=longest
            )
        output = self.lm.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **within
        )
        return output.last_hidden_state[0].index_select(0, batch.positions)

    def head_inputs(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Any]]:
        """Hidden states [N, H], and the head as `linear_head` has it, whole until the policy runs
        again."""
        return self.hidden_states(batch), linear_head(self.lm)

    @property
    def has_bias(self) -> bool:
        """Whether the head adds a bias to the logits."""
        return self.lm.get_output_embeddings().bias is not None

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[list[int]],
        uniforms: np.ndarray,
        temperature: float,
        end_token_ids: tuple[int, ...] = (),
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens after each prompt, from softmax(logits / temperature), and their log-probabilities
        (nats), with a KV cache; the most probable tokens at temperature 0.

        uniforms: [S, T] in [0, 1); token t of row s is the inverse distribution function of
        uniforms[s, t]. T tokens each, fewer where `end_token_ids` have ended all rows. Without
        these there are T forward passes, whatever is sampled: each is a collective.
        """
        width = max(map(len, prompts))
        device = next(self.parameters()).device
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        draws = torch.tensor(uniforms, dtype=torch.float64, device=device)
        ends = torch.tensor(end_token_ids, dtype=torch.int64, device=device)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        cache, tokens, logps = None, [], []
        with self.unpacked():
            for draw in draws.T:
                output = self.lm.base_model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = output.past_key_values
                ids, logp = drawn(self.logits(output.last_hidden_state[:, -1]), draw, temperature)
                tokens.append(ids)
                logps.append(logp)
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                positions = positions[:, -1:] + 1
                if end_token_ids:
                    ended |= torch.isin(ids[:, 0], ends)
                    if ended.all():
                        break
        return torch.cat(tokens, dim=1).tolist(), torch.cat(logps, dim=1).tolist()

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """For generation: rows padded on the left, a KV cache, no dropout."""
        training = self.training
        self.eval()  # in training, gradient checkpointing would switch the cache off
        self.lm.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            self.use_attention(self.attention)
            self.train(training)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[S, H] -> [S, V] fp32, never rounded to the dtype of the forward pass, as in training."""
        head = linear_head(self.lm)
        parts = head["lm_head_weight"][: self.vocab_size].split(ROWS_OF_HEAD)
        logits = torch.cat([hidden_states.float() @ part.float().T for part in parts], dim=1)
        if head["bias"] is not None:
            logits = logits + head["bias"][: self.vocab_size].float()
        logits = head["logit_scale"] * logits
        softcap = head["softcap"]
        return logits if softcap is None else softcap * (logits / softcap).tanh()

    def reduce_head(self, wanted: bool) -> None:
        """Whether the next backward pass sums the gradient of embedding and head over processes.

        Else it is kept, and added to: once per step is enough.
        """
        if isinstance(self, FSDPModule):
            self.set_requires_gradient_sync(wanted, recurse=False)

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


def drawn(logits: Tensor, draw: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The token [S, 1] that each draw [S] in [0, 1) stands for, and its log-probability [S, 1]."""
    logits = logits.double()
    if temperature == 0:
        ids = logits.argmax(dim=1, keepdim=True)
        return ids, logits.log_softmax(dim=1).gather(1, ids)
    logps = (logits / temperature).log_softmax(dim=1)
    reached = logps.exp().cumsum(dim=1)
    # Rounding may leave the last sum below a draw.
    ids = torch.searchsorted(reached, draw[:, None].contiguous(), right=True)
    ids = ids.clamp(max=logits.shape[1] - 1)
    return ids, logps.gather(1, ids)


def shard(policy: Policy, *, dtype: torch.dtype, head_dtype: torch.dtype) -> Policy:
    """Shard over all processes with FSDP2: fp32 weights, layers run in `dtype`, the embedding, the
    last norm and the head in `head_dtype`.

    Gradients are summed over the processes, not averaged: the losses divide by a global count.
    """
    layers = policy.lm.base_model.layers
    for layer in layers:
        # A norm in float32 of bfloat16 would round again, or be refused: it depends on the model.
        leaves = head_dtype if layer is layers[-1] else None
        fully_shard(layer, mp_policy=MixedPrecisionPolicy(dtype, torch.float32, leaves))
    # Inputs stay as they are: those of `policy_loss` are log-probabilities and counts.
    whole = MixedPrecisionPolicy(head_dtype, torch.float32, cast_forward_inputs=False)
    # Head and embedding stay gathered: `head_inputs` returns them.
    fully_shard(policy, mp_policy=whole, reshard_after_forward=False)
    for method in ("sample", "head_inputs", "policy_loss"):
        register_fsdp_forward_method(policy, method)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    return policy


def load_causal_lm(path: str, *, dtype: torch.dtype) -> PreTrainedModel:
    """From safetensors only: other formats are pickles, which may run code.

    Raises:
        ConfigError: the weights cannot be read, or some are missing and would be random numbers.
    """
    try:
        lm, found = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"path = {path!r}: {first_line(error)}") from error
    missing = sorted(found["missing_keys"])
    expected = f"all weights, {len(missing)} are missing: {', '.join(missing[:3])}"
    require(not missing, "path", path, expected)
    return lm


def check_trainable(key: str, path: str, num_tokens: int) -> None:
    """Raise ConfigError under configuration key `key` unless the model, as its config.json has it,
    can be trained, has the shapes of its weights, and a row for each of the tokens.

    Nothing is computed and no weight is loaded.
    """
    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            lm = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        Policy(lm, vocab_size=num_tokens)
    except Exception as error:  # transformers computes with what the file says
        expected = f"a model that can be trained; {first_line(error)}"
        raise ConfigError(f"{key} = {path!r}: expected {expected}") from error
    rows = len(linear_head(lm)["lm_head_weight"])
    expected = f"a row for each of the tokenizer's {num_tokens} tokens; there are {rows}"
    require(num_tokens <= rows, key, path, expected)
    if not Path(path).is_dir():
        return
    shapes = check_model_folder(key, Path(path))
    for name, weight in lm.state_dict().items():
        shape, found = tuple(weight.shape), shapes.get(name, tuple(weight.shape))
        require(found == shape, key, path, f"{name} of {shape} as in config.json; it is {found}")


def chosen_attention(
    lm: PreTrainedModel, name: str, device: torch.device, dtype: torch.dtype
) -> AttentionName:
    """The implementation that `training.attention` stands for: flash where flash-attn is installed,
    the device is a GPU, the forward pass in bfloat16 and the model made for it."""
    has_flash = device.type == "cuda" and dtype == torch.bfloat16 and is_flash_attn_2_available()
    has_flash = has_flash and lm._supports_flash_attn
    expected = (
        "sdpa or auto: flash needs a GPU, training.dtype bfloat16, flash-attn installed and a "
        f"model that transformers runs with it, found {type(lm).__name__} on {device.type}"
    )
    require(name != "flash" or has_flash, "training.attention", name, expected)
    return "flash" if has_flash and name != "sdpa" else "sdpa"


def load_policy(
    key: str, path: str, options: TrainingConfig, vocab_size: int, device: torch.device
) -> Policy:
    """A sharded policy, ready to train.

    Raises:
        ConfigError: under configuration key `key`, the model is none that can be trained.
    """
    lm = load_causal_lm(path, dtype=torch.float32).to(device).eval()
    try:
        gap = gap_to_definition(Policy(lm, vocab_size=vocab_size))
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"{key} = {path!r}: {first_line(error)}") from error
    expected = f"a model of known attention and head; log-probabilities are {gap:.1e} nats off"
    require(gap <= GAP_LIMIT, key, path, expected)
    return prepare(lm, options, vocab_size, device)


def prepare(
    lm: PreTrainedModel, options: TrainingConfig, vocab_size: int, device: torch.device
) -> Policy:
    """A sharded policy of a model on the device, ready to train."""
    dtype = DTYPES[options.dtype]
    drop_dropout(lm)
    if options.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    attention = chosen_attention(lm, options.attention, device, dtype)
    policy = Policy(lm, vocab_size=vocab_size, attention=attention)
    head_dtype = dtype if options.head_dtype == "same" else torch.float32
    return shard(policy.train(), dtype=dtype, head_dtype=head_dtype)


def drop_dropout(lm: PreTrainedModel) -> None:
    """Switch dropout off: the policy that is trained is the one that was sampled and scored."""
    for module in lm.modules():
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@torch.no_grad()
def gap_to_definition(policy: Policy) -> float:
    """Largest difference (nats) between log-probabilities of two packed sequences and what the
    model's own forward pass, with its own attention and head, says of each alone."""
    rows, device = [[0, 1, 2], [1, 0]], next(policy.parameters()).device
    batch = TokenBatch.build(Ragged.of(rows), Ragged.of(rows), [0, 1], device)
    alone = []
    with short_windows(policy.lm):
        packed = policy(batch, 1.0)
        policy.lm.set_attn_implementation("eager")
        for row in rows:
            ids = torch.tensor([row + row], device=device)
            logits = policy.lm(input_ids=ids).logits[0, len(row) - 1 : -1, : policy.vocab_size]
            logps = logits.float().log_softmax(dim=1)
            alone.append(logps.gather(1, ids[:, len(row) :].T)[:, 0])
        policy.use_attention(policy.attention)
    return (packed - torch.cat(alone)).abs().max().item()


@contextmanager
def short_windows(lm: PreTrainedModel) -> Iterator[None]:
    """Let sliding windows be of 2 tokens, so that a few tokens show a model that has one in its
    mask alone, where packed attention does not see it."""
    holders: list[Any] = [lm.config.get_text_config(), *lm.modules()]
    windows = [(x, x.sliding_window) for x in holders if getattr(x, "sliding_window", None)]
    for holder, _ in windows:
        holder.sliding_window = 2
    try:
        yield
    finally:
        for holder, window in windows:
            holder.sliding_window = window


def freeze(policy: Policy) -> Policy:
    """A model that is only asked: no gradients, no optimizer."""
    return policy.eval().requires_grad_(False)


def export(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save as a Hugging Face model. Collective: every process must call; the first one writes."""
    first = is_first()
    weights = {name: weight.cpu() for name, weight in policy.full_weights() if first}

    def write() -> None:
        policy.lm.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)

    first_alone(write)
