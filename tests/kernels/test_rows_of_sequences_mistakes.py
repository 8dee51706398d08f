"""Tokens [B, T]: what does not fit together is refused by name."""

import pytest
import torch

from codistill_kernels import (
    PolicyLoss,
    importance_weights,
    kd_rewards,
    kl_penalty,
    linear_policy_loss,
    linear_reverse_kl,
    linear_token_loss,
    policy_loss,
)

H, V = 16, 61
FLAT, ROWS = torch.zeros(6), torch.zeros(2, 3)
STATES, IDS = torch.zeros(2, 3, H), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(old_logps=FLAT), r"old_logps must be \[B, T\] = \(2, 3\), got \(6,\)"),
        (dict(mask=FLAT.bool()), r"mask must be \[B, T\]"),
        (
            dict(mask=ROWS.long()),
            r"mask must be bool \(mask.bool\(\) of 0 and 1\)",
        ),
        (dict(importance_weights=ROWS.T), r"importance_weights must be \[B, T\]"),
        (dict(advantages=FLAT), r"advantages must be \[B\] = \(2,\), got \(6,\)"),
        (dict(advantages=ROWS.T), r"advantages must be \[B, T\]"),
        (dict(cu_seqlens=torch.tensor([0, 3, 6])), "cu_seqlens must be None"),
        (
            dict(loss=PolicyLoss("gspo"), advantages=ROWS),
            "cu_seqlens must be given with 'gspo'",
        ),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = dict(old_logps=ROWS, advantages=torch.zeros(2), mask=None, normalizer=1.0) | change
    with pytest.raises(ValueError, match=f"^{message}"):
        policy_loss(ROWS, **arguments)
    with pytest.raises(ValueError, match=f"^{message}"):
        linear_policy_loss(STATES, torch.zeros(V, H), IDS, **arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: policy_loss(FLAT, ROWS, FLAT, normalizer=1.0), r"old_logps must be \[N\]"),
        (lambda: policy_loss(ROWS[None], None, ROWS, normalizer=1.0), r"logps must be \[N\] or"),
        (
            lambda: linear_policy_loss(
                STATES.view(6, H), torch.zeros(V, H), IDS, None, FLAT, normalizer=1.0
            ),
            r"hidden_states must be \[B, T, H\] with \[B, T\] = \(2, 3\), got \(6, 16\)",
        ),
        (
            lambda: linear_token_loss(
                STATES, torch.zeros(V, H), IDS.view(6), lambda logps, *_: logps
            ),
            r"hidden_states must be \[N, H\] with \[N\] = \(6,\), got \(2, 3, 16\)",
        ),
        (
            lambda: linear_policy_loss(
                STATES, torch.zeros(V, H), IDS, None, ROWS, normalizer=1.0, temperature=FLAT + 1
            ),
            r"temperature must be \[B, T\]",
        ),
        (
            lambda: linear_reverse_kl(
                (STATES, torch.zeros(V, H)), (STATES.view(6, H), torch.zeros(V, H))
            ),
            r"teacher must be \[B, T, H\]",
        ),
        (
            lambda: importance_weights(ROWS, ROWS, cu_seqlens=torch.tensor([0, 3, 6])),
            "cu_seqlens must be None with tokens",
        ),
        (lambda: kl_penalty(ROWS, FLAT, normalizer=1.0), r"reference_logps must be \[B, T\]"),
        (
            lambda: kl_penalty(ROWS, ROWS, weights=FLAT, normalizer=1.0),
            r"weights must be \[B\]",
        ),
        (
            lambda: kd_rewards(
                torch.zeros(2),
                None,
                None,
                torch.tensor([0, 1, 2]),
                alpha=1.0,
                max_completion_tokens=3,
                estimator="exact",
                teacher=(STATES, torch.zeros(V, H)),
                student=(STATES, torch.zeros(V, H)),
            ),
            r"teacher must be \(\[N, H\], \[V, H\]\)",
        ),
    ],
)
def test_flat_and_rows_in_one_call_are_refused(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
