# SPDX-License-Identifier: Apache-2.0
"""Threshold-based margin on activation states (GeRe, arXiv 2508.04676), with the states in 2 bits each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Literal

import torch
from torch import Tensor

# The 2-bit codes. UNDEFINED is a reference entry that is NaN (or a dimension without any finite reference): it falls in
# none of the three states of the paper and holds the activation nowhere.
NEGATIVE, NEUTRAL, POSITIVE, UNDEFINED = 0, 1, 2, 3

# Rows that are held in float64 at once while moments are accumulated; bounds the memory, not the result's meaning.
_ROWS_AT_ONCE = 8192


class ActivationMoments:
    """Mean and population variance of each hidden dimension over a stream of chunks, merged exactly as one would sum.

    Chunks are reduced in float64 about their own mean and merged with the pairwise update of Chan, Golub and LeVeque
    (1979), so that a dimension with a large offset and a small spread keeps its spread: ``E[x^2] - E[x]^2`` in float32
    loses it. Entries that are not finite are left out of their own dimension and of no other.

    Args:
        dim: Hidden size D.
        device: Where the three float64 vectors live; the chunks' device avoids copies.

    Example:
        >>> moments = ActivationMoments(2)
        >>> moments.update(torch.tensor([[1.0, 10.0], [3.0, 10.0]]))
        >>> lower, upper = moments.thresholds(num_std=1.0)
        >>> lower.tolist(), upper.tolist()
        ([1.0, 10.0], [3.0, 10.0])
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        # MPS has no float64
        self._device = torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)
        self.count, self.mean, self.m2 = torch.zeros(3, dim, dtype=torch.float64, device=self._device)

    def update(self, hidden: Tensor, mask: Tensor | None = None) -> None:
        """Take in a chunk.

        Args:
            hidden: ``[..., D]``, any floating dtype.
            mask: ``[...]``, nonzero (or True) where the token is real; None means everywhere.

        Raises:
            ValueError: If the last dimension is not D or the mask has another shape.
        """
        dim = len(self.count)
        if hidden.shape[-1] != dim:
            raise ValueError(
                f"The chunk has shape {tuple(hidden.shape)}, but the chunks before it had a last dimension of {dim}."
                " Moments are kept per hidden dimension: pass activations of one layer."
            )
        rows = hidden.detach().reshape(-1, dim)
        keep = None
        if mask is not None:
            if mask.shape != hidden.shape[:-1]:
                raise ValueError(
                    f"`mask` has shape {tuple(mask.shape)}, but `hidden` {tuple(hidden.shape)} needs"
                    f" {tuple(hidden.shape[:-1])}: one entry a token."
                )
            keep = (mask != 0).reshape(-1, 1)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            block = rows[start : start + _ROWS_AT_ONCE]
            # in the input's own precision, which has fewer bytes to read
            valid = torch.isfinite(block).to(self._device)
            if keep is not None:
                # masked instead of selected: a selection by mask would wait for the device
                valid &= keep[start : start + _ROWS_AT_ONCE].to(self._device)
            count = valid.sum(0, dtype=torch.float64)
            values = block.to(self._device, torch.float64).where(valid, 0.0)
            mean = values.sum(0) / count.clamp_min(1.0)
            m2 = values.sub_(mean).masked_fill_(~valid, 0.0).square_().sum(0)
            self._merge(count, mean, m2)

    def merge(self, other: ActivationMoments) -> None:
        """Take in everything that ``other`` has seen."""
        self._merge(other.count.to(self._device), other.mean.to(self._device), other.m2.to(self._device))

    def _merge(self, count: Tensor, mean: Tensor, m2: Tensor) -> None:
        total = self.count + count
        safe = total.clamp_min(1.0)
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / safe)
        self.m2 = self.m2 + m2 + delta.square() * (self.count * count / safe)
        self.count = total

    def thresholds(self, num_std: float = 1.0) -> tuple[Tensor, Tensor]:
        """``mean - num_std * sd`` and ``mean + num_std * sd`` per dimension.

        Returns:
            ``(lower, upper)``, each ``[D]``, float32. NaN in a dimension in which nothing finite was seen.

        Raises:
            ValueError: If ``num_std`` is not a finite number > 0.
        """
        check_num_std(num_std)
        mean = self.mean.masked_fill(self.count == 0, math.nan)
        spread = num_std * (self.m2 / self.count.clamp_min(1.0)).sqrt()
        return (mean - spread).float(), (mean + spread).float()

    def state_dict(self) -> Tensor:
        """``[3, D]`` float64 on the CPU: count, mean, sum of squared deviations."""
        return torch.stack([self.count, self.mean, self.m2]).cpu()

    def load_state_dict(self, state: Tensor) -> None:
        """Continue from :meth:`state_dict`."""
        self.count, self.mean, self.m2 = state.to(self._device, torch.float64).clone()


def check_num_std(num_std: float) -> None:
    """Refuse a width of the neutral interval that is none.

    Raises:
        ValueError: If ``num_std`` is not a finite number > 0.
    """
    if not (math.isfinite(num_std) and num_std > 0):
        raise ValueError(
            f"`num_std={num_std}`: the thresholds are mean - num_std * sd and mean + num_std * sd, which enclose a"
            " neutral interval only for a finite number > 0. Use the paper's `num_std=1.0`."
        )


def activation_thresholds(
    hidden: Tensor | Iterable[Tensor], num_std: float = 1.0, mask: Tensor | Iterable[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Per hidden dimension, mean minus and plus ``num_std`` population standard deviations over all tokens.

    GeRe, arXiv 2508.04676, section 3: the two thresholds that part an activation's range into negative, neutral and
    positive. Moments are merged in float64 (see :class:`ActivationMoments`).

    Args:
        hidden: Reference activations ``[..., D]``, or an iterable of such chunks (lengths may differ, D may not).
        num_std: Half width of the neutral interval in standard deviations, > 0. The paper's: 1.
        mask: ``[...]``, nonzero where the token is real; for an iterable of chunks an iterable of masks. Clear a row's
            first token in it to leave out an attention sink.

    Returns:
        ``(lower, upper)``, each ``[D]``, float32.

    Raises:
        ValueError: If ``num_std`` is not > 0, shapes disagree, or there is no chunk at all.

    Example:
        >>> lower, upper = activation_thresholds(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
        >>> lower.tolist(), upper.tolist()
        ([0.0, 5.0], [2.0, 5.0])
    """
    check_num_std(num_std)
    chunks = [hidden] if isinstance(hidden, Tensor) else hidden
    masks: Iterator[Tensor | None]
    masks = repeat(None) if mask is None else iter([mask] if isinstance(mask, Tensor) else mask)
    moments = None
    for chunk in chunks:
        if moments is None:
            moments = ActivationMoments(chunk.shape[-1], chunk.device)
        try:
            chunk_mask = next(masks)
        except StopIteration:
            raise ValueError("`mask` has fewer chunks than `hidden`. Pass one mask a chunk, or None.") from None
        moments.update(chunk, chunk_mask)
    if moments is None:
        raise ValueError("`hidden` holds no chunk, so there is nothing to take thresholds of. Pass at least one.")
    return moments.thresholds(num_std)


def encode_activation_states(hidden: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The state of each reference activation in 2 bits, four a byte: all that the margin loss needs to know of it.

    0 negative (``<= lower``), 1 neutral (between), 2 positive (``>= upper``), 3 undefined (NaN). A value that is both
    ``<= lower`` and ``>= upper`` (a dimension without spread) is negative. Entry ``4 i + j`` of a row sits in the bits
    ``2 j`` and ``2 j + 1`` of byte ``i``; bits past D are zero.

    Args:
        hidden: Reference activations ``[..., D]``, any floating dtype; compared in float32 (float64 if it is).
        lower: ``[D]``.
        upper: ``[D]``.

    Returns:
        uint8 ``[..., ceil(D / 4)]``: 16x less than the float32 activations.

    Raises:
        ValueError: If the thresholds are not ``[D]``.

    Example:
        >>> lower, upper = torch.full((5,), -1.0), torch.full((5,), 1.0)
        >>> encode_activation_states(torch.tensor([-2.0, 0.0, 1.0, -1.0, 3.0]), lower, upper).tolist()
        [36, 2]
    """
    lower, upper = _thresholds_like(hidden, lower, upper)
    values = hidden.detach().to(lower.dtype)
    # comparisons with NaN are false, so what is neither of the three keeps UNDEFINED
    codes = torch.full(values.shape, UNDEFINED, dtype=torch.uint8, device=values.device)
    codes.masked_fill_((values > lower) & (values < upper), NEUTRAL)
    codes.masked_fill_(values >= upper, POSITIVE)
    codes.masked_fill_(values <= lower, NEGATIVE)
    missing = -codes.shape[-1] % 4
    quads = torch.nn.functional.pad(codes, (0, missing)).unflatten(-1, (-1, 4))
    return quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6


def decode_activation_states(states: Tensor, dim: int) -> Tensor:
    """The 2-bit codes of :func:`encode_activation_states`, one a byte.

    Args:
        states: uint8 ``[..., ceil(dim / 4)]``.
        dim: Hidden size D.

    Returns:
        uint8 ``[..., D]`` with values 0 to 3.

    Example:
        >>> decode_activation_states(torch.tensor([36, 2], dtype=torch.uint8), 5).tolist()
        [0, 1, 2, 0, 2]
    """
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=states.device)
    return ((states.unsqueeze(-1) >> shifts) & 3).flatten(-2)[..., :dim]


def activation_margin_loss(
    hidden: Tensor,
    states: Tensor,
    lower: Tensor,
    upper: Tensor,
    mask: Tensor | None = None,
    reduction: Literal["violations", "mean", "sum"] = "violations",
) -> Tensor:
    """Distance of each activation from the interval of the state that the reference model gave it.

    GeRe, arXiv 2508.04676, the threshold-based margin (TM) loss, with ``h`` the activation::

        negative   (-inf, lower]     relu(h - lower)
        neutral    [lower, upper]    relu(h - upper) + relu(lower - h)
        positive   [upper, +inf)     relu(upper - h)
        undefined                    0

    It depends on the reference only through its state, so 2 bits an entry give the same bits as float32 references do.

    Args:
        hidden: Current activations ``[..., D]`` with their graph, any floating dtype; the arithmetic is float32
            (float64 for float64 input).
        states: uint8 ``[..., ceil(D / 4)]`` from :func:`encode_activation_states`.
        lower: ``[D]``.
        upper: ``[D]``.
        mask: ``[...]`` with one entry a token, or broadcastable to ``[..., D]``; nonzero where the entry counts. What
            is masked has no gradient, whatever it holds.
        reduction: ``"violations"``, the paper's: the sum over ``count of nonzero entries + 1e-8``. ``"mean"``: the sum
            over the number of unmasked entries (0 if there is none). ``"sum"``: to divide by a count of one's own.

    Returns:
        A scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: If shapes, the states' dtype or ``reduction`` do not fit.

    Example:
        >>> lower, upper = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([1.0, 1.0, 1.0])
        >>> states = encode_activation_states(torch.tensor([[-2.0, 0.0, 2.0]]), lower, upper)
        >>> activation_margin_loss(torch.tensor([[0.0, 1.5, 3.0]]), states, lower, upper).item()  # (1 + 0.5 + 0) / 2
        0.75
        >>> activation_margin_loss(torch.tensor([[0.0, 1.5, 3.0]]), states, lower, upper, reduction="mean").item()
        0.5
    """
    if reduction not in ("violations", "mean", "sum"):
        raise ValueError(f"`reduction={reduction!r}` is none of 'violations', 'mean', 'sum'.")
    lower, upper = _thresholds_like(hidden, lower, upper)
    dim = hidden.shape[-1]
    if states.dtype != torch.uint8 or states.shape != (*hidden.shape[:-1], -(-dim // 4)):
        raise ValueError(
            f"`states` is {states.dtype} {tuple(states.shape)}, but `hidden` {tuple(hidden.shape)} needs torch.uint8"
            f" {(*hidden.shape[:-1], -(-dim // 4))}: 2 bits an entry, as `encode_activation_states` returns them."
        )
    h = hidden.to(lower.dtype)
    codes = decode_activation_states(states, dim)
    distance = torch.where(
        codes == NEGATIVE,
        torch.relu(h - lower),
        torch.where(
            codes == POSITIVE,
            torch.relu(upper - h),
            # zero-width branch for UNDEFINED: neither state holds it
            torch.where(codes == NEUTRAL, torch.relu(h - upper) + torch.relu(lower - h), 0.0),
        ),
    )
    if mask is not None:
        keep = entry_mask(mask, hidden)
        distance = torch.where(keep, distance, 0.0)
    total = distance.sum()
    if reduction == "sum":
        return total
    if reduction == "violations":
        return total / ((distance != 0).sum().to(total.dtype) + 1e-8)
    if mask is None:
        return total / max(hidden.numel(), 1)
    return total / keep.expand(hidden.shape).sum().clamp_min(1).to(total.dtype)


def feature_imitation_loss(
    hidden: Tensor,
    reference: Tensor,
    mask: Tensor | None = None,
    kind: Literal["l1", "l2"] = "l2",
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Absolute or squared difference from the reference activations: the baselines of GeRe, arXiv 2508.04676.

    Args:
        hidden: Current activations ``[..., D]`` with their graph; the arithmetic is float32 (float64 for float64).
        reference: Reference activations of the same shape, any floating dtype; entries that are not finite count as
            equal.
        mask: As in :func:`activation_margin_loss`.
        kind: ``"l1"`` or ``"l2"``.
        reduction: ``"mean"`` over the unmasked entries (0 if there is none), or ``"sum"``.

    Returns:
        A scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: If shapes, ``kind`` or ``reduction`` do not fit.

    Example:
        >>> feature_imitation_loss(torch.tensor([[1.0, 5.0]]), torch.tensor([[0.0, 2.0]]), kind="l2").item()
        5.0
    """
    if kind not in ("l1", "l2") or reduction not in ("mean", "sum"):
        raise ValueError(f"`kind={kind!r}`, `reduction={reduction!r}`: choose 'l1' or 'l2', and 'mean' or 'sum'.")
    if hidden.shape != reference.shape:
        raise ValueError(
            f"`reference` has shape {tuple(reference.shape)}, `hidden` {tuple(hidden.shape)}: entry is compared with"
            " entry, so they must be equal."
        )
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    target = reference.detach().to(dtype)
    keep = torch.isfinite(target)
    counted = torch.ones_like(keep)
    if mask is not None:
        counted = entry_mask(mask, hidden).expand(hidden.shape)
        keep = keep & counted
    # selected before the distance is taken: the slope of |NaN| is NaN, and 0 times that would be too
    difference = torch.where(keep, hidden.to(dtype) - target, 0.0)
    total = (difference.abs() if kind == "l1" else difference.square()).sum()
    return total if reduction == "sum" else total / counted.sum().clamp_min(1).to(dtype)


def entry_mask(mask: Tensor, hidden: Tensor) -> Tensor:
    """``mask`` as a bool tensor that broadcasts to ``hidden``: one entry a token means all its dimensions.

    Raises:
        ValueError: If it does neither.
    """
    keep = mask != 0
    if keep.shape == hidden.shape[:-1]:
        return keep.unsqueeze(-1)
    fits = keep.ndim == hidden.ndim and all(a in (1, b) for a, b in zip(keep.shape, hidden.shape, strict=True))
    if not fits:
        raise ValueError(
            f"`mask` has shape {tuple(mask.shape)}, but `hidden` {tuple(hidden.shape)} needs {tuple(hidden.shape[:-1])}"
            " (one entry a token) or a shape that broadcasts to its own."
        )
    return keep


def _thresholds_like(hidden: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    if lower.shape != hidden.shape[-1:] or upper.shape != hidden.shape[-1:]:
        raise ValueError(
            f"`lower` {tuple(lower.shape)} and `upper` {tuple(upper.shape)} must both be {tuple(hidden.shape[-1:])},"
            f" one threshold a dimension of `hidden` {tuple(hidden.shape)}."
        )
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return lower.to(hidden.device, dtype), upper.to(hidden.device, dtype)
