"""Packing: every token once, in its place, seen by its own sequence alone."""

import copy

import pytest
import torch
import transformers
from tiny import packed_logps

from codistill.attention import group_indices
from codistill.batch import Ragged, TokenBatch, pack
from codistill.model.definition import gap_to_definition
from codistill.model.policy import Policy

CPU = torch.device("cpu")
VOCAB = 96


def test_ragged_rows():
    ragged = Ragged.of([[1, 2, 3], [], [4], [5, 6]])
    assert ragged.lengths.tolist() == [3, 0, 1, 2]
    some = ragged.rows(torch.tensor([3, 0, 1]))
    assert some.values.tolist() == [5, 6, 1, 2, 3] and some.cu_seqlens.tolist() == [0, 2, 5, 5]
    both = Ragged.cat([some, ragged])
    assert both.lengths.tolist() == [2, 3, 0, 3, 0, 1, 2]
    assert both.values.tolist() == [5, 6, 1, 2, 3, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("lengths", "limit", "expected"),
    [
        ([3, 5, 2, 5], 10, [[1, 3], [0, 2]]),
        ([3, 5, 2, 5], 9, [[1], [3, 0], [2]]),
        ([12, 1, 1], 10, [[0], [1, 2]]),  # one that is longer goes alone
        ([], 10, []),
    ],
)
def test_pack_by_hand(lengths, limit, expected):
    assert pack(torch.tensor(lengths, dtype=torch.int64), limit) == expected


def test_token_batch_by_hand():
    prompts, completions = Ragged.of([[7, 8], [9], [5]]), Ragged.of([[1], [2, 3, 4], [6]])
    batch = TokenBatch.build(prompts, completions, [1, 0], CPU)
    assert batch.input_ids.tolist() == [[9, 2, 3, 4, 7, 8, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.positions.tolist() == [0, 1, 2, 5]  # the last prompt token predicts the first
    assert batch.token_ids.tolist() == [2, 3, 4, 1] and batch.index.tolist() == [1, 2, 3, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 4] and batch.rows.tolist() == [1, 0]
    assert batch.packing.cu_seqlens.tolist() == [0, 4, 7] and batch.packing.longest == 4


def test_a_batch_without_rollouts_is_one_token():
    batch = TokenBatch.build(Ragged.of([[7]]), Ragged.of([[1]]), [], CPU)
    assert batch.input_ids.shape == (1, 1) and batch.cu_seqlens.tolist() == [0]
    assert not len(batch.token_ids) and not len(batch.rows)


def test_groups_are_of_like_lengths():
    lengths = [900, 800, 788, 787, 64, 10, 1]
    groups = group_indices(lengths)
    # 7/8 of 900 is 787.5
    assert [(part.start, part.stop, width) for part, width, *_ in groups] == [
        (0, 2488, 900),
        (2488, 3275, 787),
        (3275, 3350, 64),
    ]
    assert groups[1][2] is None and len(groups[0][2]) == 3 * 900


FAMILIES = {
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "llama": (transformers.LlamaConfig, {}),
    "mistral with a window": (transformers.MistralConfig, {"sliding_window": 8}),
    "gemma2, softcaps": (
        transformers.Gemma2Config,
        {"head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": (transformers.Gemma3TextConfig, {"head_dim": 16, "sliding_window": 8}),
    "granite, logit scale": (transformers.GraniteConfig, {"logits_scaling": 8.0}),
    "cohere, logit scale": (transformers.CohereConfig, {"logit_scale": 0.25}),
    "phi, bias": (transformers.PhiConfig, {}),
}


def make_lm(config_class, options: dict) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
    )
    return transformers.AutoModelForCausalLM.from_config(config_class(**sizes | options)).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_log_probabilities_are_the_models_own(family):
    """Against the model's own attention and logits, one sequence at a time; gradients too."""
    lm = make_lm(*FAMILIES[family])
    generator = torch.Generator().manual_seed(1)
    lengths = [(3, 90), (1, 30), (5, 8), (2, 1), (4, 70), (3, 29), (2, 75)]

    def draw(count: int) -> list[int]:
        return torch.randint(VOCAB, (count,), generator=generator).tolist()

    prompts, completions = zip(*((draw(p), draw(c)) for p, c in lengths), strict=True)
    own = copy.deepcopy(lm)
    own.set_attn_implementation("eager")
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = own(input_ids=torch.tensor([prompt + completion])).logits[0] / 0.7
        logps = logits[len(prompt) - 1 : -1].log_softmax(dim=1)
        expected.append(logps.gather(1, torch.tensor(completion)[:, None])[:, 0])
    expected = torch.cat(expected)
    policy = Policy(lm, vocab_size=VOCAB)
    found = packed_logps(policy, prompts, completions, 0.7)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert gap_to_definition(policy) < 1e-5

    prompts, completions = Ragged.of(prompts), Ragged.of(completions)
    (rows,) = pack(prompts.lengths + completions.lengths, 10**6)
    batch = TokenBatch.build(prompts, completions, rows, CPU)
    weights = torch.randn(len(expected), generator=generator)
    (policy(batch, 0.7) * weights[batch.index]).sum().backward()
    (expected * weights).sum().backward()
    for (name, ours), theirs in zip(lm.named_parameters(), own.parameters(), strict=True):
        scale = theirs.grad.abs().max()
        assert (ours.grad - theirs.grad).abs().max() < 1e-4 * scale, name


def test_no_heads_are_shared_under_a_mask(monkeypatch):
    """On a GPU that would hold the scores of all pairs of tokens."""
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def recorded(*args, **options):
        calls.append((options["attn_mask"] is not None, options["enable_gqa"]))
        return attention(*args, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", recorded)
    policy = Policy(make_lm(*FAMILIES["mistral with a window"]), vocab_size=VOCAB)
    packed_logps(policy, [[1, 2], [3] * 40], [[3], [4] * 40], 1.0)
    assert set(calls) == {(False, True), (True, False)}


def test_a_window_in_the_mask_alone_is_found():
    """However long it is: PhiMoE tells its attention nothing of it."""
    options = {"sliding_window": 4096, "num_local_experts": 2, "attention_dropout": 0.0}
    policy = Policy(make_lm(transformers.PhimoeConfig, options), vocab_size=VOCAB)
    assert gap_to_definition(policy) > 0.1
    assert policy.lm.config.sliding_window == 4096
    policy = Policy(
        make_lm(transformers.PhimoeConfig, options | {"sliding_window": None}), vocab_size=VOCAB
    )
    assert gap_to_definition(policy) < 1e-5
    mistral = Policy(
        make_lm(transformers.MistralConfig, {"sliding_window": 4096}), vocab_size=VOCAB
    )
    assert gap_to_definition(mistral) < 1e-5


def test_a_head_that_does_something_else_is_found():
    """What no key of the configuration tells: logits times two."""
    lm = make_lm(*FAMILIES["llama"])
    policy = Policy(lm, vocab_size=VOCAB)
    assert gap_to_definition(policy) < 1e-5
    lm.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert gap_to_definition(policy) > 0.1
