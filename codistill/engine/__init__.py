"""Generation. The only importer of vllm.

An engine holds its own copy of one model's weights, writes completions with them and takes new
weights from the trainer. All engines sample from softmax(logits / temperature) over the
tokenizer's tokens and return the log-probability of each sampled token under just that.
"""

from codistill.engine.choice import (
    RestartingEngine,
    check_engine,
    engine_kind,
    make_engine,
    temporary_engine,
)
from codistill.engine.interface import (
    Completion,
    Engine,
    EngineError,
    EngineSpec,
    Sampler,
    Sampling,
    SyncError,
    cut_at_end,
    prompt_seeds,
)

__all__ = [
    "Completion",
    "Engine",
    "EngineError",
    "EngineSpec",
    "RestartingEngine",
    "Sampler",
    "Sampling",
    "SyncError",
    "check_engine",
    "cut_at_end",
    "engine_kind",
    "make_engine",
    "temporary_engine",
    "prompt_seeds",
]
