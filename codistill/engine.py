"""Generation. The only importer of vllm.

An engine holds its own copy of one model's weights, writes completions with them and takes new
weights from the trainer. Both engines sample from softmax(logits / temperature) over the
tokenizer's tokens and return the log-probability of each sampled token under just that.
"""

import importlib.util
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from codistill import distributed
from codistill.config import require
from codistill.config.machinery import EngineKind
from codistill.downloads import source
from codistill.failures import RunError
from codistill.model.loading import load_causal_lm
from codistill.model.policy import Policy
from codistill.texts import StopStrings


@dataclass(frozen=True)
class Completion:
    """What was written after a prompt, up to and with the token that ends it, unless it was cut
    off."""

    token_ids: list[int]
    logps: list[float]
    """Log-probability of each token that the engine sampled (nats): of the last ones, where the
    first are a hint."""
    truncated: bool
    """The length limit stopped it, not an end token or a stop string."""


@dataclass(frozen=True)
class Sampling:
    num_generations: int
    """Completions per prompt; 1 if greedy."""
    temperature: float
    """Divides the logits; 0 is greedy."""
    max_tokens: int


class SyncError(RunError):
    """Engine and trainer disagree on the probability of what the engine wrote."""


class EngineError(RunError):
    """An engine failed, and was not or could not be started again."""


class Sampler(Protocol):
    """What writes completions."""

    name: str

    def generate(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling
    ) -> list[Completion]:
        """`num_generations` completions of each prompt, prompt after prompt.

        seeds: one per prompt. Same weights, prompts and seeds give the same completions.
        """


class Engine(Sampler, Protocol):
    """A `Sampler` that takes weights."""

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take all weights of the model, Hugging Face names. Consumes the iterator to its end."""

    def sleep(self) -> None:
        """Leave the memory of the GPU, with weights in the host's memory, until `wake_up`."""

    def wake_up(self) -> None:
        """Come back to the GPU as it was, without what it remembers of prompts."""

    def close(self) -> None:
        """Let go of what the engine holds, process groups included. The last call to it."""


@dataclass(frozen=True)
class EngineSpec:
    """What an engine must know of the model it runs."""

    path: str
    vocab_size: int
    """Only ids below this are sampled: the tokenizer's, not the padded rows above."""
    end_token_ids: tuple[int, ...]
    max_model_tokens: int
    """Longest prompt plus longest completion."""
    dtype: torch.dtype
    device: torch.device
    kv_cache_gib: float
    stop: StopStrings | None = None
    """Texts that end a completion, besides `end_token_ids`."""
    sleeps: bool = False
    """It may be put to sleep."""


def engine_kind(kind: EngineKind) -> Literal["vllm", "hf"]:
    """The engine that `kind` stands for: auto is vllm where it is installed."""
    if kind == "auto":
        return "vllm" if importlib.util.find_spec("vllm") else "hf"
    return kind


def make_engine(kind: EngineKind, spec: EngineSpec) -> Engine:
    """The engine of rollout.engine = kind, with the weights on disk."""
    match engine_kind(kind):
        case "vllm":
            return VLLMEngine(spec)
        case "hf":
            return HFEngine(spec)


class RestartingEngine:
    """An engine that is started again, once, with the trainer's weights, when it raises an error.

    Only the engine hf is: vLLM in the trainer's process leaves process groups and memory behind
    that a second start stumbles over. Its error, or a second one, ends the run on all processes.

    weights: gives the trainer's weights. Collective, as are `generate` and `sync`.
    """

    def __init__(
        self,
        kind: EngineKind,
        spec: EngineSpec,
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
    ) -> None:
        self.kind, self.spec, self.weights = kind, spec, weights
        self.engine = make_engine(kind, spec)
        self.name = self.engine.name
        self.may_restart = self.name == "hf"

    def generate(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling
    ) -> list[Completion]:
        """See `Sampler`.

        Raises:
            EngineError: on all processes, if the engine of one of them failed.
        """
        error, completions = None, None
        try:
            completions = self.engine.generate(prompts, seeds, sampling)
        except Exception as failure:  # an engine may raise anything
            error = failure
        if self.restarted(error, "generate"):
            return self.generate(prompts, seeds, sampling)
        assert completions is not None
        return completions

    def sync(self) -> None:
        """Take the trainer's weights.

        Raises:
            EngineError: on all processes, if the engine of one of them failed.
        """
        error, weights = None, iter(self.weights())
        try:
            self.engine.sync(weights)
        except Exception as failure:
            error = failure
            for _ in weights:  # the other processes gather the rest together with this one
                pass
        self.restarted(error, "sync")

    def sleep(self) -> None:
        """See `Engine`; nothing happens with rollout.sleep = false."""
        if self.spec.sleeps:
            self.engine.sleep()

    def wake_up(self) -> None:
        """See `Engine`; nothing happens with rollout.sleep = false."""
        if self.spec.sleeps:
            self.engine.wake_up()

    def restarted(self, error: Exception | None, what: str) -> bool:
        """Whether any process has an error, so that all of them have started their engines again.
        Collective."""
        message = distributed.first_error(error)
        if message is None:
            return False
        text = f"engine {self.name} failed in {what} on {message}"
        if not self.may_restart:
            raise EngineError(text) from error
        logging.getLogger(__name__).warning("%s; starting it again", text)
        self.may_restart = False
        self.engine.close()
        self.engine = make_engine(self.kind, self.spec)
        self.sync()
        return True

    def close(self) -> None:
        self.engine.close()


NEVER = -100.0  # the lowest logit bias that vLLM takes: a probability of about 1e-43


class VLLMEngine:
    """vLLM in this process: one engine per process with all weights, no tensor parallelism."""

    name = "vllm"

    def __init__(self, spec: EngineSpec) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights reach it by reference
        if spec.device.type == "cpu":
            # The trainer shares these threads: pinning them to cores would slow both.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            # vLLM compiles a helper of its sampler: 4 to 15 s, and a compiler, for no gain here.
            torch._dynamo.config.disable = True
        import vllm

        self.spec = spec
        self.llm = vllm.LLM(
            model=source(spec.path),
            dtype=str(spec.dtype).removeprefix("torch."),
            max_model_len=spec.max_model_tokens,
            kv_cache_memory_bytes=int(spec.kv_cache_gib * 2**30),
            distributed_executor_backend="external_launcher",
            skip_tokenizer_init=spec.stop is None,
            generation_config="vllm",  # the model's own file may add top-p or a penalty
            logprobs_mode="processed_logprobs",
            enforce_eager=spec.device.type == "cpu",
            enable_sleep_mode=spec.sleeps,
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        check_own_model(self.llm.llm_engine.model_config)
        # vLLM's own way to allow some ids only takes the list of them, 150 thousand a request.
        rows = self.llm.llm_engine.model_config.get_vocab_size()
        self.logit_bias = {row: NEVER for row in range(spec.vocab_size, rows)} or None

    def generate(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling
    ) -> list[Completion]:
        from vllm import SamplingParams

        if not prompts:
            return []
        params = [
            SamplingParams(
                n=sampling.num_generations,
                temperature=sampling.temperature,
                max_tokens=sampling.max_tokens,
                seed=seed,
                logprobs=0,
                flat_logprobs=True,
                stop_token_ids=list(self.spec.end_token_ids),
                ignore_eos=True,  # the tokenizer's end token may be none of those
                logit_bias=self.logit_bias,
                **self.text_options(),
            )
            for seed in seeds
        ]
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        return [
            self.completion(output)
            for request in outputs
            for output in sorted(request.outputs, key=lambda output: output.index)
        ]

    def text_options(self) -> dict[str, Any]:
        """How vLLM is told to look at the text, so that it writes little beyond a stop string."""
        if self.spec.stop is None:
            return {"detokenize": False}
        return {
            "stop": list(self.spec.stop.strings),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
        }

    def completion(self, output: Any) -> Completion:
        """A completion of vLLM's. Where a stop string ends it is for `cut_at_end` to say, as with
        the other engine."""
        token_ids, logps = list(output.token_ids), list(output.logprobs.logprobs)
        cut_off = output.finish_reason == "length"
        if self.spec.stop is None:
            return Completion(token_ids, logps, cut_off)
        token_ids, unended = cut_at_end(token_ids, self.spec.end_token_ids, self.spec.stop)
        return Completion(token_ids, logps[: len(token_ids)], unended and cut_off)

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        # All weights in one call: vLLM takes a call for a whole model, and parts of it corrupt it.
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        if self.spec.device.type == "cpu":
            self.llm.apply_model(repack_tied_head)
        self.llm.reset_prefix_cache()

    def sleep(self) -> None:
        self.llm.sleep(level=1)  # the KV cache is dropped; CUDA graphs and addresses stay

    def wake_up(self) -> None:
        # vLLM maps memory itself: it cannot take what torch keeps for tensors to come.
        torch.cuda.empty_cache()
        self.llm.wake_up()

    def close(self) -> None:
        # Left to the end of the process, vLLM would look for process groups that are gone by then.
        self.llm.llm_engine.engine_core.shutdown()


def check_own_model(model_config: Any) -> None:
    """Raise ConfigError for a model that vLLM has no code for.

    It would run the code of transformers, changed in place, which the trainer cannot use any more.
    """
    name = model_config.architectures[0]
    expected = f"hf: this vLLM has no model of its own for {name}"
    require(not model_config.using_transformers_backend(), "rollout.engine", "vllm", expected)


def repack_tied_head(model: torch.nn.Module) -> None:
    """Renew the copy of a tied head that vLLM packs for the CPU.

    The stream of weights names a tied matrix once, as the embedding, so vLLM renews that alone and
    the head would go on with the weights it was loaded with. Gemma 2 has no such copy: its
    embedding is the head.
    """
    config = model.config.get_text_config()
    if getattr(config, "tie_word_embeddings", False) and hasattr(model, "lm_head"):
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


class HFEngine:
    """The model's own forward pass: slower, but runs wherever the trainer does."""

    name = "hf"
    batch_size = 64
    """Sequences that are sampled together; chosen, untested."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        model = load_causal_lm(spec.path, dtype=spec.dtype).to(spec.device)
        self.policy = Policy(model, vocab_size=spec.vocab_size).eval()

    def generate(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling
    ) -> list[Completion]:
        count, ends, stop = sampling.num_generations, self.spec.end_token_ids, self.spec.stop
        rows = [prompt for prompt in prompts for _ in range(count)]
        uniforms = [np.random.default_rng(s).random((count, sampling.max_tokens)) for s in seeds]
        draws = np.concatenate([np.empty((0, sampling.max_tokens)), *uniforms])
        completions: list[Completion] = []
        for start in range(0, len(rows), self.batch_size):
            part = slice(start, start + self.batch_size)
            written = self.policy.sample(rows[part], draws[part], sampling.temperature, ends, stop)
            for ids, logps in zip(*written, strict=True):
                token_ids, truncated = cut_at_end(ids, ends, stop)
                completions.append(Completion(token_ids, logps[: len(token_ids)], truncated))
        return completions

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        parameters = dict(self.policy.lm.named_parameters())
        with torch.no_grad():
            for name, weight in weights:
                parameters.pop(name).copy_(weight)
        assert not parameters, f"weights not synced: {sorted(parameters)}"

    def sleep(self) -> None:
        self.policy.to("cpu")

    def wake_up(self) -> None:
        self.policy.to(self.spec.device)

    def close(self) -> None:
        del self.policy


def cut_at_end(
    tokens: list[int], end_token_ids: tuple[int, ...], stop: StopStrings | None = None
) -> tuple[list[int], bool]:
    """Tokens up to and with the first end token, or the first to complete a stop string, and
    whether there was neither."""
    places = (place for place, token in enumerate(tokens, start=1) if token in end_token_ids)
    end = next(places, None)
    stopped = None if stop is None else stop.end(tokens[:end])
    length = stopped or end
    return tokens[:length], length is None


def prompt_seeds(seed: int, step: int, draws: Iterable[tuple[int, int]]) -> list[int]:
    """One seed per prompt, fixed by what is drawn alone: not by rank or place in the batch.

    draws: the index of each problem, and how often the step has drawn it before.
    """
    return [int(np.random.default_rng([seed, step, *draw]).integers(2**48)) for draw in draws]
