"""What vLLM is asked for and what it answers, in this process and over HTTP alike."""

from typing import Any

from codistill.engine.interface import Completion, EngineSpec, Sampling, cut_at_end

NEVER = -100.0  # the lowest logit bias that vLLM takes: a probability of about 1e-43


def padded_rows_bias(spec: EngineSpec, rows: int) -> dict[int, float] | None:
    """A logit bias that keeps vLLM from ids beyond the tokenizer's, in a head of `rows` rows.

    Its own way to allow some ids only takes the list of them, 150 thousand per request.
    """
    return {row: NEVER for row in range(spec.vocab_size, rows)} or None


def sampling_options(
    spec: EngineSpec, sampling: Sampling, seed: int, logit_bias: dict[int, float] | None
) -> dict[str, Any]:
    """The arguments of vLLM's SamplingParams for one prompt."""
    options: dict[str, Any] = {
        "n": sampling.num_generations,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "seed": seed,
        "logprobs": 0,  # of the sampled token alone
        "stop_token_ids": list(spec.end_token_ids),
        "ignore_eos": True,  # the tokenizer's end token may be none of those
        "logit_bias": logit_bias,
    }
    if spec.stop is None:
        return options | {"detokenize": False}
    # It looks at the text, so that it writes little beyond a stop string.
    return options | {
        "stop": list(spec.stop.strings),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }


def completion(
    spec: EngineSpec, token_ids: list[int], logps: list[float], finish_reason: str | None
) -> Completion:
    """A completion of vLLM's. Where a stop string ends it is for `cut_at_end` to say, as with the
    engine hf."""
    cut_off = finish_reason == "length"
    if spec.stop is None:
        return Completion(token_ids, logps, cut_off)
    token_ids, unended = cut_at_end(token_ids, spec.end_token_ids, spec.stop)
    return Completion(token_ids, logps[: len(token_ids)], unended and cut_off)
