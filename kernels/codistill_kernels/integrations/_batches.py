"""Sums and means over padded tokens [B, T] that the losses of several frameworks share."""

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values [B, T] over a bool mask [B, T]; 0 if the mask is empty."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def counts(mask: Tensor) -> Tensor:
    """[B] unmasked tokens of each sequence, at least 1, so that an empty sequence has mean 0."""
    return mask.sum(-1).clamp(min=1)


def sequence_means(values: Tensor, mask: Tensor) -> Tensor:
    """[B, T] -> [B]: the mean of each sequence over its unmasked tokens."""
    return torch.where(mask, values, 0.0).sum(-1) / counts(mask)


def clipped_share(
    ratio: Tensor, advantages: Tensor, mask: Tensor, bounds: tuple[float, float]
) -> Tensor:
    """Share of unmasked tokens that are clipped: ratio < low and A < 0, or ratio > high and A > 0.

    ratio and advantages broadcast to the mask's [B, T].
    """
    low, high = bounds
    cut = (ratio < low) & (advantages < 0) | (ratio > high) & (advantages > 0)
    return masked_mean(cut.expand(mask.shape), mask)
