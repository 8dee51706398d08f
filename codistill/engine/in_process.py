"""vLLM in the trainer's own processes."""

import os
import re
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from codistill import distributed
from codistill.config import ConfigError, require
from codistill.downloads import source
from codistill.engine.interface import Completion, EngineSpec, Sampling
from codistill.engine.vllm_requests import completion, padded_rows_bias, sampling_options
from codistill.model.shards import Weights

GLOO_WORKER = "codistill.engine.cpu_worker.GlooWorker"


class VLLMEngine:
    """vLLM in this process: an engine of its own, or one that it shares with its neighbours by
    rank, each of which has a part of every weight (tensor parallelism).

    vLLM plans a shared engine's work in each of its processes anew, so all of them must ask it the
    same, in the same order. They do: every method is collective, `generate` asks for the prompts
    of all of them, and `sync` gets whole weights everywhere, of which vLLM takes its part.
    """

    name = "vllm"

    def __init__(self, spec: EngineSpec) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights reach it by reference
        on_cpu = spec.device.type == "cpu"
        if on_cpu:
            # The trainer shares these threads: pinning them to cores would slow both.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            # vLLM compiles a helper of its sampler: 4 to 15 s, and a compiler, for no gain here.
            torch._dynamo.config.disable = True
        self.spec = spec
        self.group = None
        if spec.tensor_parallel > 1:
            self.group, _ = dist.new_subgroups(spec.tensor_parallel, backend="gloo")
        self.llm = start(
            spec,
            model=source(spec.path),
            dtype=str(spec.dtype).removeprefix("torch."),
            max_model_len=spec.max_model_tokens,
            kv_cache_memory_bytes=int(spec.kv_cache_gib * 2**30),
            distributed_executor_backend="external_launcher",
            tensor_parallel_size=spec.tensor_parallel,
            worker_cls=GLOO_WORKER if on_cpu and self.group else "auto",
            skip_tokenizer_init=spec.stop is None,
            generation_config="vllm",  # the model's own file may add top-p or a penalty
            logprobs_mode="processed_logprobs",
            enforce_eager=on_cpu,
            enable_sleep_mode=spec.sleeps,
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        check_own_model(f"{spec.section}engine", self.llm.llm_engine.model_config)
        rows = self.llm.llm_engine.model_config.get_vocab_size()
        self.logit_bias = padded_rows_bias(spec, rows)

    def generate(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling
    ) -> list[Completion]:
        asked, first = list(zip(prompts, seeds, strict=True)), 0
        if self.group is not None:
            parts = distributed.gathered(asked, self.group)
            asked, first = list(chain(*parts)), sum(map(len, parts[: self.group.rank()]))
        if not asked:
            return []
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids, _ in asked],
            [self.parameters(seed, sampling) for _, seed in asked],
            use_tqdm=False,
        )
        return [
            completion(
                self.spec,
                list(output.token_ids),
                list(output.logprobs.logprobs),
                output.finish_reason,
            )
            for request in outputs[first : first + len(prompts)]
            for output in sorted(request.outputs, key=lambda output: output.index)
        ]

    def parameters(self, seed: int, sampling: Sampling) -> Any:
        """How vLLM is to sample the completions of a prompt."""
        from vllm import SamplingParams

        options = sampling_options(self.spec, sampling, seed, self.logit_bias)
        return SamplingParams(**options, flat_logprobs=True)

    def sync(self, weights: Weights) -> None:
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


def start(spec: EngineSpec, **options: Any) -> Any:
    """vLLM's `LLM` with these options.

    Raises:
        ConfigError: its KV cache has no room for the longest sequence.
    """
    import vllm

    try:
        return vllm.LLM(**options)
    except ValueError as error:
        # Only vLLM knows what its cache takes for a model; it has no class for this error.
        if "KV cache" not in str(error):
            raise
        longest = re.search(r"maximum model length is (\d+)", str(error))
        room = f", there is room for {longest[1]}" if longest else ""
        raise ConfigError(
            f"{spec.section}kv_cache_gib = {spec.kv_cache_gib:g}: expected room for a sequence of "
            f"{spec.max_model_tokens} tokens, prompt and completion{room}"
        ) from error


def check_own_model(key: str, model_config: Any) -> None:
    """Raise ConfigError under key `key`, the engine's, for a model that vLLM has no code for.

    It would run the code of transformers, changed in place, which the trainer cannot use any more.
    """
    name = model_config.architectures[0]
    expected = f"hf: this vLLM has no model of its own for {name}"
    require(not model_config.using_transformers_backend(), key, "vllm", expected)


def repack_tied_head(model: torch.nn.Module) -> None:
    """Renew the copy of a tied head that vLLM packs for the CPU.

    The stream of weights names a tied matrix once, as the embedding, so vLLM renews that alone and
    the head would go on with the weights it was loaded with. Gemma 2 has no such copy: its
    embedding is the head.
    """
    config = model.config.get_text_config()
    if getattr(config, "tie_word_embeddings", False) and hasattr(model, "lm_head"):
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
