"""Heads that several processes hold: DTensors by every placement, shards of a group, what is
refused. Two processes each; what they find is compared with the whole head in one."""

import itertools

import pytest
import torch
import torch.distributed as dist
from processes import spawn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from codistill_kernels import (
    PolicyLoss,
    codistill_losses,
    linear_divergence,
    linear_logps,
    linear_policy_loss,
    linear_reverse_kl,
    linear_token_loss,
)
from codistill_kernels._linear import planning
from codistill_kernels._linear.chunks import Plan

N, H = 13, 8
BACKENDS = ["cpu", "torch"]


def join(rank: int, folder: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    return init_device_mesh("cpu", (2,))


def leave() -> None:
    dist.barrier()  # who leaves early closes connections that the other still uses
    dist.destroy_process_group()


def make_case(vocab: int, seed: int = 0):
    """hidden states, weight, bias, ids, advantages; those of tokens depend on the seed."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(vocab, H, generator=generator)
    bias = torch.randn(vocab, generator=generator)
    generator.manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator)
    ids = torch.randint(0, vocab, (N,), generator=generator)
    ids[3] = vocab - 1
    return hidden, weight, bias, ids, torch.randn(N, generator=generator)


def logps_loss(hidden, weight, bias, ids, advantages, **options):
    mine = ids.clone()
    mine[2] = -100
    logps, entropy = linear_logps(hidden, weight, mine, bias=bias, return_entropy=True, **options)
    return (advantages * logps + entropy).sum()


def policy(hidden, weight, bias, ids, advantages, kind="clip", **options):
    old = torch.linspace(-5, -3, N)
    mask = torch.arange(N) != 2
    terms = dict(loss=PolicyLoss(kind), normalizer=3.0, bias=bias, **options)
    if kind == "gspo":
        terms["cu_seqlens"] = torch.tensor([0, 4, N])
        advantages = advantages[:2]
    return linear_policy_loss(hidden, weight, ids, old, advantages, mask, **terms)[0]


def gspo(*arguments, **options):
    return policy(*arguments, kind="gspo", **options)


def token(hidden, weight, bias, ids, advantages, **options):
    def fn(logps, entropy, rows):
        return advantages[rows] * logps.exp() + entropy

    return linear_token_loss(hidden, weight, ids, fn, bias=bias, **options)[0]


def both(hidden, weight, bias, ids, advantages, **options):
    model = (hidden, weight, bias)
    terms = (ids, advantages - 4, advantages, -advantages)
    small, large = codistill_losses(model, model, *terms, normalizer=3.0, **options)
    return small[0] + 2 * large[0]


FUNCTIONS = (logps_loss, policy, gspo, token, both)


def value_and_gradients(function, leaves, *others, **options):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    value = function(*leaves, *others, **options)
    return value.detach(), torch.autograd.grad(value, leaves)


def each_way():
    """Pieces of 5 rows so that there are several, and the workspace's own choice."""
    plans = {kind: kind.plan for kind in (planning.CpuChunks, planning.TorchChunks)}
    for way in (Plan("chunks", 5), Plan("columns", 5), None):
        for kind, plan in plans.items():
            kind.plan = plan if way is None else staticmethod(lambda *_, way=way: way)
        yield
    for kind, plan in plans.items():
        kind.plan = plan


def sharded_head(rank: int, folder: str) -> None:
    mesh = join(rank, folder)
    # Shards that are even; 21 and 20 rows; 21 and 12 or 20 and none that count; one row and none.
    for vocab, vocab_size in ((40, 40), (41, 41), (41, 33), (41, 20), (1, 1)):
        hidden, weight, bias, ids, advantages = make_case(vocab)
        ids %= vocab_size
        head = [distribute_tensor(t, mesh, [Shard(0)]) for t in (weight, bias)]
        # The gradient of a sure token, p - 1, is the rounding of logits that are made twice.
        tolerance = dict(rtol=2e-5, atol=5e-6 if vocab > 1 else 5e-5)
        for function, backend in itertools.product(FUNCTIONS, BACKENDS):
            options = dict(backend=backend, vocab_size=vocab_size)
            value, grads = value_and_gradients(
                function, (hidden, weight, bias), ids, advantages, **options
            )
            for _ in each_way():
                found, (dx, *parts) = value_and_gradients(
                    function, (hidden, *head), ids, advantages, **options
                )
                torch.testing.assert_close(found, value, **tolerance)
                for part, leaf in zip(parts, head, strict=True):
                    assert part.placements == (Shard(0),)
                    assert part.to_local().shape == leaf.to_local().shape
                whole = (dx, *(part.full_tensor() for part in parts))
                torch.testing.assert_close(whole, grads, **tolerance)
        again = logps_loss(hidden, *head, ids, advantages, group=dist.group.WORLD)
        torch.testing.assert_close(again, logps_loss(hidden, *head, ids, advantages))
    leave()


def same_chunks(rank: int, folder: str) -> None:
    """Shards of 21 and 20 rows: both processes plan for 21, or their chunks would not match."""
    mesh = join(rank, folder)
    hidden, *head, ids, advantages = make_case(41)
    head = [distribute_tensor(part, mesh, [Shard(0)]).requires_grad_() for part in head]
    planned = []

    def plan(rows, vocab, *_):
        planned.append(vocab)
        return Plan("chunks", 5)

    planning.CpuChunks.plan = plan
    policy(hidden, *head, ids, advantages)
    token(hidden, *head, ids, advantages)
    assert planned == [21, 21, 21]  # the policy loss plans twice
    leave()


def test_shards_of_one_head_make_the_same_chunks(tmp_path):
    spawn(same_chunks, str(tmp_path), processes=2)


def test_sharded_dtensor_equals_whole(tmp_path):
    spawn(sharded_head, str(tmp_path), processes=2)


def gradient_of_this_shard(rank: int, folder: str) -> None:
    """reduce_hidden_gradient=False: the parts of the processes sum to the whole."""
    join(rank, folder)
    hidden, weight, bias, ids, advantages = make_case(42)
    mine = slice(21 * rank, 21 * (rank + 1))
    for function in FUNCTIONS:
        for way in ("kept", "chunks", "columns"):
            planning.CpuChunks.plan = lambda *_, way=way: Plan(way, 5)
            _, (whole, _, _) = value_and_gradients(
                function, (hidden, weight, bias), ids, advantages, backend="cpu"
            )
            shard = (hidden, weight[mine], bias[mine])
            options = dict(group=dist.group.WORLD, backend="cpu")
            _, (part, *head) = value_and_gradients(
                function, shard, ids, advantages, **options, reduce_hidden_gradient=False
            )
            _, (_, *expected) = value_and_gradients(function, shard, ids, advantages, **options)
            torch.testing.assert_close(head, expected)
            assert (part - whole).abs().max() > 0.01
            dist.all_reduce(part)
            torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-5)
    leave()


def test_gradient_of_hidden_states_may_be_left_to_the_caller(tmp_path):
    spawn(gradient_of_this_shard, str(tmp_path), processes=2)


def replicated_head(rank: int, folder: str) -> None:
    """Each process has tokens of its own; the gradient is that of all of them."""
    mesh = join(rank, folder)
    for function in FUNCTIONS:
        for backend in BACKENDS:
            cases = [make_case(40, seed) for seed in (0, 1)]
            alone = [
                value_and_gradients(function, case[:3], *case[3:], backend=backend)
                for case in cases
            ]
            value, (dx, _, _) = alone[rank]
            dw, db = (sum(grads[i] for _, grads in alone) for i in (1, 2))
            hidden, weight, bias, *others = cases[rank]
            head = [
                torch.nn.Parameter(distribute_tensor(t.clone(), mesh, [Replicate()]))
                for t in (weight, bias)
            ]
            hidden.requires_grad_()
            found = function(hidden, *head, *others, backend=backend)
            found.backward()
            torch.testing.assert_close(found, value)
            torch.testing.assert_close(hidden.grad, dx)
            for parameter, gold in zip(head, (dw, db), strict=True):
                assert all(placement.is_partial() for placement in parameter.grad.placements)
                torch.testing.assert_close(parameter.grad.full_tensor(), gold)
            # What stands in param.grad is what optimizers and clipping take.
            norm = torch.nn.utils.clip_grad_norm_(head, 0.5).full_tensor()
            gold_norm = torch.stack((dw.norm(), db.norm())).norm()
            torch.testing.assert_close(norm, gold_norm)
            torch.optim.SGD(head, lr=0.1).step()
            stepped = weight - 0.1 * dw * (0.5 / gold_norm).clamp(max=1)
            torch.testing.assert_close(head[0].to_local(), stepped, rtol=1e-5, atol=1e-6)
    student = (hidden.detach(), head[0])
    teacher = (hidden.detach().flip(1), weight)
    torch.testing.assert_close(
        linear_reverse_kl(student, teacher),
        linear_reverse_kl((student[0], head[0].to_local()), teacher),
    )
    for parameter in head:
        parameter.grad = None
    local = [t.to_local().detach().requires_grad_() for t in head]
    for parts in (head, local):
        linear_divergence((student[0], *parts), teacher, kind="jsd")[0].backward()
    for parameter, plain in zip(head, local, strict=True):
        dist.all_reduce(plain.grad)
        torch.testing.assert_close(parameter.grad.full_tensor(), plain.grad)
    leave()


def test_replicated_dtensor_has_the_gradient_of_all_tokens(tmp_path):
    spawn(replicated_head, str(tmp_path), processes=2)


def steps_of_an_optimizer(rank: int, folder: str) -> None:
    """AdamW on a replicated head, two micro-batches per step, against all tokens in one process."""
    mesh = join(rank, folder)
    cases = [make_case(40, seed) for seed in range(8)]
    whole = torch.nn.Parameter(cases[0][1].clone())
    replica = torch.nn.Parameter(distribute_tensor(cases[0][1].clone(), mesh, [Replicate()]))
    adams = [torch.optim.AdamW([p], lr=0.01, foreach=False) for p in (whole, replica)]
    for step in range(2):
        batch = cases[4 * step : 4 * step + 4]
        for head, mine in ((whole, batch), (replica, batch[rank::2])):
            for hidden, _, bias, *others in mine:
                bias = bias if head is whole else distribute_tensor(bias, mesh, [Replicate()])
                policy(hidden, head, bias, *others).backward()
        for adam in adams:
            adam.step()
            adam.zero_grad()
    torch.testing.assert_close(replica.full_tensor(), whole, rtol=1e-4, atol=1e-5)
    leave()


def test_replicated_dtensor_trains_as_all_tokens_do(tmp_path):
    spawn(steps_of_an_optimizer, str(tmp_path), processes=2)


def head_of_fsdp(rank: int, folder: str) -> None:
    join(rank, folder)
    hidden, weight, bias, ids, advantages = make_case(41)
    linear = torch.nn.Linear(H, 41)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    fully_shard(linear)
    assert isinstance(linear.weight, DTensor) and linear.weight.placements == (Shard(0),)
    value, (dx, dw, db) = value_and_gradients(policy, (hidden, weight, bias), ids, advantages)
    found = policy(hidden, linear.weight, linear.bias, ids, advantages)
    found.backward()
    torch.testing.assert_close(found, value)
    torch.testing.assert_close(linear.weight.grad.full_tensor(), dw, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(linear.bias.grad.full_tensor(), db, rtol=2e-5, atol=2e-6)
    # Data parallelism: tokens of each process's own are refused, and one says how it goes.
    mine, _, _, mine_ids, mine_advantages = make_case(41, seed=rank)
    with pytest.raises(ValueError, match="^token_ids must be the same"):
        policy(mine, linear.weight, linear.bias, mine_ids, mine_advantages)
    with pytest.raises(ValueError, match="^token_ids must be the same"):
        length = N - rank
        linear_logps(hidden[:length], linear.weight, ids[:length], bias=linear.bias)
    linear.unshard()
    alone, _ = value_and_gradients(policy, (mine, weight, bias), mine_ids, mine_advantages)
    whole = policy(mine, linear.weight, linear.bias, mine_ids, mine_advantages)
    torch.testing.assert_close(whole.detach(), alone)
    linear.reshard()
    full = [p.full_tensor() for p in (linear.weight, linear.bias)]
    torch.testing.assert_close(policy(mine, *full, mine_ids, mine_advantages).detach(), alone)
    leave()


def test_head_of_fsdp(tmp_path):
    spawn(head_of_fsdp, str(tmp_path), processes=2)


def unequal_shards(rank: int, folder: str) -> None:
    join(rank, folder)
    hidden, weight, bias, ids, advantages = make_case(41)
    group = dist.group.WORLD
    mine = [part.tensor_split([19])[rank] for part in (weight, bias)]
    for backend in BACKENDS:
        for function in FUNCTIONS:
            for _ in each_way():
                with pytest.raises(ValueError, match="^lm_head_weight must be .* got 19 to 22"):
                    function(hidden, *mine, ids, advantages, group=group, backend=backend)
    torch._dynamo.reset()

    def logps(hidden, weight):
        return linear_logps(hidden, weight, ids, group=group)

    compiled = torch.compile(logps, fullgraph=True, backend="aot_eager")
    assert compiled(hidden, mine[0]).isnan().all()  # nothing is looked at in a graph
    leave()


def test_unequal_shards_are_refused(tmp_path):
    spawn(unequal_shards, str(tmp_path), processes=2)


def compiled_shards(rank: int, folder: str) -> None:
    mesh = join(rank, folder)
    hidden, *head, ids, advantages = make_case(40)
    group = dist.group.WORLD
    chunks = [part.chunk(2)[rank] for part in head]
    dtensors = [distribute_tensor(part, mesh, [Shard(0)]) for part in head]
    for function, shards, options in (
        (logps_loss, chunks, dict(group=group)),
        (policy, chunks, dict(group=group)),
        (logps_loss, dtensors, {}),
    ):
        torch._dynamo.reset()
        value, (dx, *grads) = value_and_gradients(function, (hidden, *head), ids, advantages)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        found, (found_dx, *parts) = value_and_gradients(
            compiled, (hidden, *shards), ids, advantages, **options
        )
        parts = [part.to_local() if isinstance(part, DTensor) else part for part in parts]
        mine = [grad.chunk(2)[rank] for grad in grads]
        torch.testing.assert_close(found, value, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close([found_dx, *parts], [dx, *mine], rtol=2e-5, atol=5e-6)
    leave()


def test_shards_compile(tmp_path):
    spawn(compiled_shards, str(tmp_path), processes=2)


def mistakes(rank: int, folder: str) -> None:
    mesh = join(rank, folder)
    hidden, weight, bias, ids, advantages = make_case(40)

    def placed(tensor, *placements, mesh=mesh):
        return distribute_tensor(tensor, mesh, placements)

    plane = init_device_mesh("cpu", (2, 1))
    rows, replica = placed(weight, Shard(0)), placed(weight, Replicate())
    odd = DTensor.from_local(
        weight.tensor_split([13])[rank], mesh, [Shard(0)], shape=weight.shape, stride=(H, 1)
    )
    other = dist.new_group([0, 1])
    for change, message in (
        (
            dict(lm_head_weight=placed(weight, Shard(1))),
            r"lm_head_weight must be placed as .*unshard\(\).*grad_placements=\[Partial\(\)\]",
        ),
        (
            dict(lm_head_weight=placed(weight, Shard(0), Replicate(), mesh=plane)),
            "lm_head_weight must be placed as",
        ),
        (dict(lm_head_weight=rows, bias=bias), "bias must be a DTensor placed as lm_head_weight"),
        (
            dict(lm_head_weight=rows, bias=placed(bias, Replicate())),
            "bias must be a DTensor placed as lm_head_weight",
        ),
        (dict(bias=placed(bias, Replicate())), "bias must be a plain tensor like lm_head_weight"),
        (dict(lm_head_weight=replica, group=dist.group.WORLD), "group must be None"),
        (dict(lm_head_weight=rows, group=other), "group must be None or that of"),
        (dict(lm_head_weight=odd), "lm_head_weight must be sharded as by torch.chunk"),
        (dict(hidden_states=placed(hidden, Replicate())), "hidden_states must be a plain tensor"),
        (dict(token_ids=placed(ids, Replicate())), "token_ids must be a plain tensor"),
        (dict(lm_head_weight=rows, vocab_size=41), "vocab_size must be in 1 .. 40"),
    ):
        arguments = dict(hidden_states=hidden, lm_head_weight=weight, token_ids=ids) | change
        for function, terms in (
            (linear_logps, {}),
            (
                linear_policy_loss,
                dict(old_logps=None, advantages=advantages, normalizer=1.0),
            ),
            (linear_token_loss, dict(fn=lambda logps, *_: logps)),
        ):
            with pytest.raises(ValueError, match=f"^{message}"):
                function(**arguments, **terms)
    for pair, message in (
        ((hidden, rows), "teacher must be whole on every process: .*grad_placements"),
        ((placed(hidden, Replicate()), weight), "teacher must be a plain tensor"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            linear_reverse_kl((hidden, weight), pair)
    leave()


def test_mistakes_are_named(tmp_path):
    spawn(mistakes, str(tmp_path), processes=2)
