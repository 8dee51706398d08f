"""codistill_kernels.integrations.verl: the example, a vocabulary in shards, what is refused. Its
numbers are tested in conformance/test_verl.py."""

import pytest
import torch
import torch.distributed as dist
from peers import log_softmax_head
from processes import spawn

from codistill_kernels.integrations import verl
from examples import verl_linear_cross_entropy as example

N, H, V = 13, 8, 32


def make_case():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*size, generator=generator) for size in ((N, H), (V, H)))
    return hidden, weight, torch.randint(0, V, (N,), generator=generator)


def outcome(function, case, upstream=None, **options):
    hidden, weight, labels = case
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    logprobs, entropy = function(*leaves, labels, **options)
    upstream = torch.linspace(-1, 1, N) if upstream is None else upstream
    ((upstream * logprobs).sum() - 0.3 * (entropy * torch.linspace(0, 1, N)).sum()).backward()
    return [logprobs.detach(), entropy.detach(), *(leaf.grad for leaf in leaves)]


def assert_near(got, expected, **tolerance):
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, **dict(atol=2e-6, rtol=1e-5) | tolerance)


def test_example_trains_as_verl_does(single_thread):
    plain, fused = (example.train(head) for head in (example.definition, verl.linear_cross_entropy))
    assert len(fused) == 20 and len(set(fused)) > 15
    assert fused == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tokens_come_back_flat(dtype):
    hidden, weight, labels = make_case()
    expected = outcome(log_softmax_head, (hidden, weight, labels), temperature=0.7)
    case = (hidden[:, None], weight, labels.to(dtype)[None])
    got = outcome(verl.linear_cross_entropy, case, temperature=0.7)
    assert got[2].shape == (N, 1, H)
    got[2] = got[2].squeeze(1)
    assert_near(got, expected)


@pytest.mark.parametrize(("reduction", "factor"), [("sum", 1.0), ("mean", 1 / N), ("Mean", 1 / N)])
def test_reductions(reduction, factor):
    case = make_case()
    ones = torch.ones(N) * factor
    logprobs, *expected = outcome(log_softmax_head, case, ones)
    value, *got = outcome(verl.linear_cross_entropy, case, torch.ones(()), reduction=reduction)
    torch.testing.assert_close(value, logprobs.sum() * factor)
    assert_near(got, expected)


def test_ignored_labels():
    hidden, weight, labels = make_case()
    labels[3] = -100
    logprobs, entropy, dhidden, _ = outcome(verl.linear_cross_entropy, (hidden, weight, labels))
    assert logprobs[3] == entropy[3] == 0 and not dhidden[3].any()


def test_module_keeps_the_shape():
    hidden, weight, labels = make_case()
    logprobs, entropy = verl.FusedLinearForPPO(chunk_size=4)(
        hidden[None], weight, labels[None].int(), 1.3
    )
    expected = log_softmax_head(hidden, weight, labels, temperature=1.3)
    assert logprobs.shape == entropy.shape == (1, N)
    assert_near([logprobs[0], entropy[0]], expected)


def shards(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    hidden, weight, labels = make_case()
    expected = outcome(log_softmax_head, (hidden, weight, labels), temperature=0.7)
    part = (hidden, weight.chunk(2)[rank], labels)
    got = outcome(verl.linear_cross_entropy, part, temperature=0.7, group=dist.group.WORLD)
    alone = got[2].clone()
    dist.all_reduce(got[2])  # the caller has to do it; in verl Megatron does
    assert (alone - got[2]).abs().max() > 0.01
    expected[3] = expected[3].chunk(2)[rank]
    assert_near(got, expected)
    dist.barrier()
    dist.destroy_process_group()


def test_shards_leave_the_hidden_gradient_to_the_caller(tmp_path):
    spawn(shards, str(tmp_path), processes=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: verl.linear_cross_entropy(*make_case(), 1.0, "max"), "reduction must be none"),
        (lambda: verl.linear_cross_entropy(*make_case(), 0.0), "temperature must be > 0"),
        (lambda: verl.get_policy_loss_fn("clip_cov"), "name must be one of vanilla"),
        (lambda: verl.get_policy_loss_fn("gpg")(*[torch.zeros(2, 3)] * 4), "config must be verl"),
        (
            lambda: verl.aggregation("batch-mean", torch.ones(2, 3) > 0),
            "loss_agg_mode must be one of token-mean",
        ),
        (
            lambda: verl.aggregation("token-mean", torch.ones(2, 3) > 0, dp_size=2),
            "batch_num_tokens must be given with dp_size > 1",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
