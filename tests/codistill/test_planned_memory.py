"""Memory of an update: the formulas of `python -m codistill plan` against what a CPU allocates."""

import gc

import pytest
import torch
import torch.distributed as dist
import transformers
from processes import spawn
from torch.profiler import ProfilerActivity, profile

from codistill.batch import Ragged, TokenBatch
from codistill.config.machinery import LoraConfig, TrainingConfig
from codistill.model.lora import add_adapters, start_adapters
from codistill.model.policy import prepare
from codistill.model.shape import ModelShape, model_shape
from codistill.planning.memory import update_bytes
from codistill_kernels import PolicyLoss
from codistill_kernels._linear import slab_sizes

SEQUENCES, PROMPT, COMPLETION = 4, 64, 192
TOKENS, COMPLETION_TOKENS = SEQUENCES * (PROMPT + COMPLETION), SEQUENCES * COMPLETION
TINY = dict(
    hidden_size=256,
    intermediate_size=768,
    num_attention_heads=8,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
LAYERS = dict(TINY, num_hidden_layers=6, vocab_size=1024)
LORA = LoraConfig(rank=8, alpha=16)
TWO = LoraConfig(rank=8, alpha=16, target_modules=["q_proj", "v_proj"])
CASES = {
    "layers": ("bfloat16", "none", LAYERS, None),
    "selective": ("bfloat16", "selective", LAYERS, None),
    "full": ("bfloat16", "full", LAYERS, None),
    "head": ("float32", "none", dict(TINY, num_hidden_layers=2, vocab_size=8192), None),
    "adapters": ("bfloat16", "none", LAYERS, LORA),
    "adapters, selective": ("bfloat16", "selective", LAYERS, LORA),
    "two adapters": ("bfloat16", "none", LAYERS, TWO),
    "two adapters, selective": ("bfloat16", "selective", LAYERS, TWO),
    "adapters, head": ("float32", "none", dict(TINY, num_hidden_layers=2, vocab_size=8192), LORA),
}


def train_twice(case: str) -> None:
    """Two steps of two micro-batches: the second step finds Adam's moments, and its second
    micro-batch the gradients of the first."""
    dtype, checkpointing, sizes, lora = CASES[case]
    options = TrainingConfig(dtype=dtype, gradient_checkpointing=checkpointing)
    lm = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**sizes))
    if lora:
        add_adapters(lm, "small.path", "", lora)
    policy = prepare(lm, options, sizes["vocab_size"], torch.device("cpu"))
    start_adapters(policy.lm)
    rows = Ragged.of([[1] * PROMPT] * SEQUENCES), Ragged.of([[2] * COMPLETION] * SEQUENCES)
    batch = TokenBatch.build(*rows, list(range(SEQUENCES)), torch.device("cpu"))
    optimizer = torch.optim.AdamW(weight for weight in policy.parameters() if weight.requires_grad)
    for _ in range(2):
        for is_last in (False, True):
            policy.reduce_head(is_last)
            loss, _ = policy.policy_loss(
                batch,
                1.0,
                loss=PolicyLoss(),
                old_logps=torch.zeros(COMPLETION_TOKENS),
                advantages=torch.ones(SEQUENCES),
                normalizer=1.0,
            )
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def peak_bytes(case: str) -> int:
    """The most that torch's allocator has given out at once."""
    gc.collect()  # what an earlier case left would count as given back
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_twice(case)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def peak_of_a_process(rank: int, folder: str, case: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    found = peak_bytes(case)
    if rank == 0:
        torch.save(found, f"{folder}/peak.pt")
    dist.barrier()
    dist.destroy_process_group()


def shape_of(folder, *, lora: LoraConfig | None = None, **sizes) -> ModelShape:
    config = transformers.Qwen2Config(**sizes, architectures=["Qwen2ForCausalLM"])
    config.save_pretrained(folder)
    return model_shape("small.path", str(folder), lora)


def predicted_bytes(case: str, folder, processes: int) -> float:
    dtype, checkpointing, sizes, lora = CASES[case]
    shape = shape_of(folder, lora=lora, **sizes)
    update = update_bytes(
        shape,
        TOKENS,
        COMPLETION_TOKENS,
        2 if dtype == "bfloat16" else 4,
        processes=processes,
        checkpointing=checkpointing,
    )
    return (4 * shape.held + 8 * shape.trained) / processes + sum(update.values())


@pytest.mark.parametrize("case", CASES)
def test_memory_of_an_update(process_group, tmp_path, monkeypatch, case):
    monkeypatch.setattr(slab_sizes, "SLAB_BYTES", 0)  # a GPU's
    assert predicted_bytes(case, tmp_path, 1) == pytest.approx(peak_bytes(case), rel=0.15)


def test_memory_of_an_update_by_two_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(slab_sizes, "SLAB_BYTES", 0)
    spawn(peak_of_a_process, str(tmp_path), "layers", processes=2)
    measured = torch.load(tmp_path / "peak.pt")
    assert predicted_bytes("layers", tmp_path, 2) == pytest.approx(measured, rel=0.15)
