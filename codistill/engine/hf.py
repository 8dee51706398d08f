"""The forward pass of transformers as an engine."""

import numpy as np
import torch

from codistill.engine.interface import Completion, EngineSpec, Sampling, cut_at_end
from codistill.model.loading import load_causal_lm
from codistill.model.policy import Policy
from codistill.model.shards import Weights


class HFEngine:
    """The model's own forward pass: slower, but runs wherever the trainer does."""

    name = "hf"
    batch_size = 64
    """Sequences that are sampled together; chosen, untested."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        lm = load_causal_lm(spec.path, dtype=spec.dtype, key=spec.path_key).to(spec.device)
        self.policy = Policy(lm, vocab_size=spec.vocab_size).eval()

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

    def sync(self, weights: Weights) -> None:
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
