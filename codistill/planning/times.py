"""Time of the phases of a step on GPUs, by formulas. No GPU has confirmed them."""

import math
from typing import assert_never

from codistill.config.plan import MachineConfig, PlanOptions
from codistill.model.shape import ModelShape
from codistill.planning.machines import (
    ADAM,
    BANDWIDTH_SHARE,
    FP32,
    GIB,
    GPUS,
    HOST_BANDWIDTH,
    SCORING_SHARE,
    TRAINING_SHARE,
    host_link_rate,
    link_rate,
)

ITERATION = 4e-3  # s that vLLM's host takes for an iteration of small batches; assumed
LATENCY = 1e-5  # s that a sum over GPUs takes at least; assumed
MOST_SEQUENCES = 256  # that vLLM decodes at once by default (max_num_seqs)
# Bytes of the host's memory that clipping and torch's AdamW of a CPU read and write per number,
# operation by operation.
CPU_STEP_BYTES = 84


def rollout_seconds(options: PlanOptions, shape: ModelShape) -> float:
    """Decoding by each engine: iterations, each of which reads all weights and the KV cache of the
    sequences in it, or computes 2 P per sequence, whichever takes longer. Then the engine goes to
    sleep, if it does.

    There are as many iterations as the longest completion has tokens, or more where not all
    sequences are decoded at once. The GPUs of an engine, its sharers, do equal parts of all that,
    except that each has at least one key head, and add up hidden states twice per layer.
    """
    gpu, rollout = GPUS[options.machine.gpu], options.rollout
    prompt, completion = options.machine.mean_prompt_tokens, options.mean_completion
    sharers = rollout.tensor_parallel
    engines = len(rollout.servers) or options.machine.gpus / sharers
    sequences = rollout.prompts_per_step * rollout.num_generations / engines
    key_width = max(shape.key_width / sharers, shape.query_width / shape.heads)
    kv_bytes = 2 * 2 * shape.layers * key_width  # K and V in bf16, per token
    room = rollout.kv_cache_gib * GIB / (kv_bytes * (prompt + completion))
    at_once = max(1.0, min(sequences, MOST_SEQUENCES, room))
    iterations = max(rollout.max_completion_tokens, sequences * completion / at_once)
    together = sequences * completion / iterations
    read = 2 * shape.multiplied(together) / sharers
    read += kv_bytes * together * (prompt + completion / 2)
    flops = 2 * shape.multiplied() / sharers  # per token
    compute = flops * together / (SCORING_SHARE * gpu.flops)
    decode = max(read / (BANDWIDTH_SHARE * gpu.bandwidth), compute) + ITERATION
    decode += sum_seconds(options.machine, shape, together, sharers)
    prompts = rollout.prompts_per_step / engines * prompt
    prefill = flops * prompts / (SCORING_SHARE * gpu.flops)
    prefill += sum_seconds(options.machine, shape, prompts, sharers)
    return iterations * decode + prefill + sleep_seconds(options, shape)


def sum_seconds(machine: MachineConfig, shape: ModelShape, tokens: float, sharers: int) -> float:
    """Sums of the hidden states of so many tokens over the GPUs of an engine, in bf16: two per
    layer, in each of which a GPU sends, and gets, its share twice, less what is its own."""
    if sharers == 1:
        return 0.0
    moved = 2 * 2 * shape.hidden * tokens * (sharers - 1) / sharers
    return 2 * shape.layers * (moved / link_rate(machine, sharers) + LATENCY)


def sleep_seconds(options: PlanOptions, shape: ModelShape) -> float:
    """Copying the engine's weights to the host or back; nothing where it does not sleep."""
    asleep = options.rollout.sleep * options.forward_bytes * shape.parameters
    return asleep / options.rollout.tensor_parallel / host_link_rate(options.machine)


def score_seconds(options: PlanOptions, shapes: dict[str, ModelShape]) -> float:
    """All models on all rollouts; for loss.beta those that learn once more on the kept ones."""
    prompts, written = options.rollout.prompts_per_step, options.rollout.num_generations
    references = [shapes[name] for name in options.trained if options.loss.beta]
    return sum(
        pass_seconds(options, shape, prompts * count, updates=False)
        for models, count in ((shapes.values(), written), (references, options.kept))
        for shape in models
    )


def update_seconds(options: PlanOptions, shape: ModelShape) -> float:
    """The optimizer steps of a model on the kept rollouts."""
    rollouts = options.rollout.prompts_per_step * options.kept * options.training.inner_epochs
    steps = options.optimizer_steps * optimizer_seconds(options, shape)
    return pass_seconds(options, shape, rollouts, updates=True) + steps


def sync_seconds(options: PlanOptions, shape: ModelShape) -> float:
    """Gathering the writer's weights in fp32, for an engine that wakes up if it slept."""
    rate = link_rate(options.machine, options.gpus_per_replica)
    return FP32 * shape.parameters / rate + sleep_seconds(options, shape)


def flops_per_token(shape: ModelShape, sequence: float) -> float:
    """Operations of a forward pass: 2 for each weight that multiplies; scores and values of
    attention, each 2 for each number of a query and each token of half the sequence."""
    return 2 * shape.multiplied() + 2 * 2 * shape.layers * shape.query_width * sequence / 2


def pass_seconds(
    options: PlanOptions, shape: ModelShape, rollouts: float, *, updates: bool
) -> float:
    """Forward passes over so many rollouts of all GPUs, or forward and backward passes: products
    and attention, or moving the weights in each micro-batch, whichever takes longer.

    A backward pass takes twice the operations of a forward pass; where adapters learn once, as
    frozen weights have no gradient.
    """
    machine, training = options.machine, options.training
    sequence = options.mean_sequence
    tokens = rollouts * sequence / machine.gpus
    passes = 1.0
    if updates:
        passes += 1.0 if shape.adapters else 2.0
        passes += training.gradient_checkpointing == "full"
    share = TRAINING_SHARE if updates else SCORING_SHARE
    compute = passes * flops_per_token(shape, sequence) * tokens / (share * GPUS[machine.gpu].flops)
    micro_batches = math.ceil(tokens / training.tokens_per_micro_batch)
    return max(compute, micro_batches * moving_seconds(options, shape, updates=updates))


def moving_seconds(options: PlanOptions, shape: ModelShape, *, updates: bool) -> float:
    """Gathering the weights for a forward pass, or for both passes and summing gradients.

    Replicas sum gradients after each micro-batch: each GPU sends, and gets, its share of them
    twice, less what is its own. With weights on the host each GPU first copies its share, in fp32,
    while gradients go the other way.
    """
    machine, gathers = options.machine, 2 if updates else 1
    gathered = options.forward_bytes * shape.held * gathers + updates * FP32 * shape.trained
    replicas, sharers = options.distributed.replicas, options.gpus_per_replica
    moving = gathered * (sharers - 1) / sharers / link_rate(machine, sharers)
    if updates and replicas > 1:
        summed = 2 * FP32 * shape.trained / sharers * (replicas - 1) / replicas
        moving += summed / link_rate(machine, machine.gpus)
    if options.training.offload == "all":
        moving += gathers * FP32 * shape.held / sharers / host_link_rate(machine)
    return moving


def optimizer_seconds(options: PlanOptions, shape: ModelShape) -> float:
    """What training.offload adds to each optimizer step: copies of the states to the GPU and back,
    or the step itself on the CPU. A step on the GPU takes next to nothing."""
    machine, numbers = options.machine, shape.trained / options.gpus_per_replica
    match options.training.offload:
        case "none":
            return 0.0
        case "optimizer":
            return 2 * ADAM * numbers / host_link_rate(machine)
        case "all":
            neighbours = min(machine.gpus, machine.gpus_per_node)
            return CPU_STEP_BYTES * numbers * neighbours / HOST_BANDWIDTH
        case _:
            assert_never(options.training.offload)
