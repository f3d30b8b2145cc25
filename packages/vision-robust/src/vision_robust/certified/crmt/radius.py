"""The paper's bound, and Lipschitz constants to put into it.

``r(x) = min_{j != y} (h_y - h_j) / sqrt(sum_m (a_y^m tau_y^m + a_j^m tau_j^m)^2)``, with
``h_k = sum_m a_k^m s_k^m + b_k`` and ``tau_k^m`` a Lipschitz constant of the score ``s_k^m`` in modality m: an input x'
that is taken for j has ``h_y(x') <= h_j(x')``, each score moved by at most ``tau_k^m |x'^m - x^m|``, and Cauchy-Schwarz
adds the modalities up. An attacker of modality m alone meets ``a_y^m tau_y^m + a_j^m tau_j^m`` in place of the root: a
preferred but vulnerable modality dominates the joint denominator.

With upper bounds (:func:`score_lipschitz`) the radius is certified up to rounding, which
:class:`~vision_robust.certified.crmt.MultiModalCertifier` accounts for; with :func:`sampled_slopes`, which only see
what was sampled, it is a score and certifies nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robust_core.certificates import LipschitzCertifier
from robust_core.certificates.bounds import trace
from robust_core.certificates.parts import functional_constants, part_constants, part_masks
from robust_core.checks import check_finite, check_inputs, check_labels
from robust_core.models import frozen
from vision_robust.certified.crmt.fusion import Fusion
from vision_robust.certified.crmt.model import Packed

__all__ = ["encoder_lipschitz", "margin_over_slopes", "multimodal_radius", "sampled_slopes", "score_lipschitz"]


def margin_over_slopes(
    logits: Tensor, y: Tensor, rivals: Tensor, weights: Tensor, lipschitz: Tensor, modality: int | None = None
) -> Tensor:
    """Return (B, R): ``h_y - h_j`` over its slope, for the rivals j; differentiable in logits and weights.

    Args:
        logits: (B, K) h.
        y: (B,) classes.
        rivals: (B, R) other classes.
        weights: (M, K) class weights a, at least 0.
        lipschitz: (M, K) constants tau of the scores.
        modality: the only one that moves; all of them together where None.
    """
    slopes = weights * lipschitz
    own, other = slopes[:, y].T, slopes[:, rivals].permute(1, 2, 0)  # (B, M), (B, R, M)
    sums = own[:, None, :] + other
    slope = torch.linalg.vector_norm(sums, dim=2) if modality is None else sums[..., modality]
    margin = logits.gather(1, y[:, None]) - logits.gather(1, rivals)
    return margin / slope.clamp(min=torch.finfo(logits.dtype).tiny)


def multimodal_radius(
    scores: Sequence[Tensor],
    y: Tensor,
    weights: Tensor,
    lipschitz: Tensor,
    bias: Tensor | None = None,
    *,
    modality: int | None = None,
) -> Tensor:
    """Return (B,) the paper's r(x), the least over all rivals; negative where y is not the decision.

    Args:
        scores: (B, K) of each modality, before class weights.
        y: (B,) int64 classes.
        weights: (M, K) class weights a, at least 0.
        lipschitz: (M, K) constants tau of the scores.
        bias: (K,) b, 0 where None.
        modality: position of the only modality that moves; all together where None.

    Raises:
        ValueError: numbers of modalities differ, negative weights or constants, values that are not finite.
    """
    shape = (len(scores), scores[0].shape[1] if len(scores) else 0)
    for name, value in (("weights", weights), ("lipschitz", lipschitz)):
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; {shape} is needed, for each modality and class")
        if bool((check_finite(name, value) < 0).any()):
            raise ValueError(f"{name} holds {int((value < 0).sum())} negative values; 0 or more is needed (clip)")
    if modality is not None and not 0 <= modality < len(scores):
        raise ValueError(f"modality={modality}: a position in 0 .. {len(scores) - 1} is needed")
    for score in scores:
        check_finite("scores", score)
    check_labels(y, len(scores[0]), shape[1])
    logits = sum((weight * score for weight, score in zip(weights, scores, strict=True)), start=scores[0] * 0)
    logits = logits if bias is None else logits + bias
    rivals = torch.arange(shape[1] - 1, device=y.device).expand(len(y), -1)
    rivals = rivals + (rivals >= y[:, None])
    return margin_over_slopes(logits, y, rivals, weights, lipschitz, modality).amin(1)


class _Score(nn.Module):
    """One modality's way from its input to its scores."""

    def __init__(self, encoder: nn.Module, fusion: Fusion, place: int) -> None:
        super().__init__()
        self.encoder, self.fusion, self.place = encoder, fusion, place

    def forward(self, x: Tensor) -> Tensor:
        return self.fusion.score(self.place, self.encoder(x))


def score_lipschitz(view: Packed) -> Tensor:
    """Return (M, K) float64 upper bounds of the Lipschitz constants of all scores, in L2 and eval mode.

    Layer by layer for the encoders, ``|W_k| Lip(phi)`` at most for the scores; rows are pulled back as far as that
    helps (:mod:`robust_core.certificates.parts`).

    Raises:
        UnsupportedLayerError: a layer without a sound rule.
    """
    found = []
    for place, (name, shape) in enumerate(zip(view.names, view.shapes, strict=True)):
        network = copy.deepcopy(_Score(view.model.encoders[name], view.fusion, place)).double().eval()
        device = next(iter(network.parameters())).device
        graph = trace(network.requires_grad_(False), torch.zeros((1, *shape), dtype=torch.float64, device=device))
        mask = part_masks(shape[:1], shape)
        rows = torch.eye(graph.n_classes, dtype=torch.float64, device=device)
        found.append(functional_constants(graph, part_constants(graph, mask), mask, rows)[:, 0])
    return torch.stack(found)


def encoder_lipschitz(encoder: nn.Module, shape: Sequence[int]) -> float:
    """Return an upper bound of the L2 Lipschitz constant of an encoder (B, *shape) -> (B, p), by products of layers."""
    parameter = next(iter(encoder.parameters()), torch.zeros(()))
    return LipschitzCertifier(encoder).constant(
        torch.zeros((1, *shape), dtype=parameter.dtype, device=parameter.device)
    )


def sampled_slopes(view: Packed, x: Tensor) -> Tensor:
    """Return (M, K) the steepest gradients of all scores met at some inputs: *lower* bounds of Lipschitz constants.

    A diagnostic of how loose :func:`score_lipschitz` is; the paper's own figures rest on such. It certifies nothing.

    Args:
        view: a packed classifier.
        x: (B, ...) packed inputs to look at.
    """
    check_inputs(x)
    found = torch.zeros(len(view.names), view.fusion.n_classes, dtype=torch.float64, device=x.device)
    with frozen(view), torch.enable_grad():
        parts = [part.detach().requires_grad_(True) for part in view.split(x).values()]
        for place, score in enumerate(view.model.scores(parts)):
            for k in range(score.shape[1]):
                (gradient,) = torch.autograd.grad(score[:, k].sum(), parts[place], retain_graph=True)
                found[place, k] = gradient.flatten(1).double().norm(dim=1).amax()
    return found
