"""Two sub-images and the classifiers that see one of them each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.checks import check_choice, check_count, check_inputs
from robust_core.models import Classifier, frozen, padded
from robust_core.random import stream

__all__ = ["FEEDS", "DualClassifier", "Side", "SubImage", "check_partition", "check_side", "checkerboard_partition"]

FEEDS = ("zero", "half", "maxpool")


def checkerboard_partition(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return two (height, width) boolean masks: of each horizontal pair of pixels one goes to each side, in turn."""
    rows, columns = torch.arange(check_count("height", height)), torch.arange(check_count("width", width))
    left = (rows[:, None] + columns) % 2 == 0
    return left, ~left


class SubImage(nn.Module):
    """Make a network's input of the kept pixels alone: (B, ..., n_kept) -> what the network takes.

    Args:
        mask: boolean, of the shape of the pixels, (H, W) for images: channels stay together.
        feed: ``"zero"``: the image with 0 at the other pixels. ``"half"``: the kept pixels of each row side by side,
            (H, W / 2). ``"maxpool"``: as ``"zero"``, and each kept pixel plus the largest value of its 2 x 2 block.
    """

    def __init__(self, mask: Tensor, feed: str = "zero") -> None:
        super().__init__()
        self.feed = check_choice("feed", feed, FEEDS)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or not mask.ndim or not bool(mask.any()):
            raise ValueError("mask: a boolean tensor of the pixels' shape that keeps some is needed")
        if feed != "zero" and mask.ndim != 2:
            raise ValueError(f"feed={feed!r} needs a mask (height, width), not {tuple(mask.shape)}; use 'zero'")
        each = mask.flatten(0, -2).sum(-1) if mask.ndim > 1 else mask.sum()[None]
        if feed == "half" and int(each.min()) != int(each.max()):
            raise ValueError("feed='half': every row must keep as many pixels; use 'zero'")
        self.shape = tuple(mask.shape)
        self.width = int(each.max())
        self.register_buffer("index", mask.detach().flatten().nonzero().flatten())

    @property
    def mask(self) -> Tensor:
        """Boolean mask of the kept pixels."""
        index = self.get_buffer("index")
        kept = torch.zeros(math.prod(self.shape), dtype=torch.bool, device=index.device)
        return kept.index_fill(0, index, True).reshape(self.shape)

    def kept(self, x: Tensor) -> Tensor:
        """Return (B, ..., n_kept) the kept pixels of images, in the order of the mask."""
        if x.ndim <= len(self.shape) or tuple(x.shape[-len(self.shape) :]) != self.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}; (B, ..., {', '.join(map(str, self.shape))}) is needed")
        return x.flatten(-len(self.shape)).index_select(-1, self.get_buffer("index"))

    def forward(self, kept: Tensor) -> Tensor:
        """Return the network's input."""
        if self.feed == "half":
            return kept.unflatten(-1, (self.shape[0], self.width))
        flat = kept.new_zeros((*kept.shape[:-1], math.prod(self.shape)))
        image = flat.index_copy(-1, self.get_buffer("index"), kept).unflatten(-1, self.shape)
        if self.feed == "zero":
            return image
        blocks = F.max_pool2d(image, 2, ceil_mode=True).repeat_interleave(2, -2).repeat_interleave(2, -1)
        return image + self.mask * blocks[..., : self.shape[0], : self.shape[1]]

    def extra_repr(self) -> str:
        """Say how pixels are fed."""
        return f"{self.feed!r}, {len(self.get_buffer('index'))} of {math.prod(self.shape)} pixels"


class Side(nn.Module):
    """A classifier of whole images that reads the kept pixels and nothing else, by construction.

    Args:
        net: maps what ``feed`` makes to logits (B, C).
        mask: see :class:`SubImage`.
        feed: see :class:`SubImage`.

    Attributes:
        classifier: maps (B, ..., n_kept) kept pixels to logits: smoothing draws noise for these alone.
    """

    classifier: nn.Sequential

    def __init__(self, net: nn.Module, mask: Tensor, feed: str = "zero") -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be a torch.nn.Module, not {type(net).__name__}")
        self.classifier = nn.Sequential(SubImage(mask, feed), net)

    @property
    def sub_image(self) -> SubImage:
        """What is kept, and how it is fed."""
        return self.classifier[0]  # pyright: ignore[reportReturnType]

    @property
    def mask(self) -> Tensor:
        """Boolean mask of the kept pixels."""
        return self.sub_image.mask

    def kept(self, x: Tensor) -> Tensor:
        """Return (B, ..., n_kept) the kept pixels."""
        return self.sub_image.kept(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C) logits of whole images."""
        return self.classifier(self.kept(x))


class DualClassifier(nn.Module):
    """Two classifiers, one for each sub-image; as a classifier, the logarithm of the mean of their probabilities.

    Each side is trained like any network: ``fit(dual.left, data, NoiseConsistency(sigma))``, or both at once by
    ``EachSide``. The paper starts from one pre-trained network: ``DualClassifier(net, copy.deepcopy(net), masks)``.

    Args:
        left: network of the left side, any one.
        right: network of the right side.
        masks: (left, right), disjoint and covering all pixels; see :func:`checkerboard_partition`.
        feed: how pixels reach the networks, see :class:`SubImage`; or one for each side.
    """

    stochastic = False
    differentiable = True
    optimises_at_test_time = False

    def __init__(
        self, left: nn.Module, right: nn.Module, masks: Sequence[Tensor], *, feed: str | tuple[str, str] = "zero"
    ) -> None:
        super().__init__()
        first, second = check_partition(masks)
        feeds = (feed, feed) if isinstance(feed, str) else tuple(feed)
        if len(feeds) != 2:
            raise ValueError(f"feed={feed!r}: one word, or (left, right), is needed")
        if left is right:
            raise ValueError("left and right are one network, which training would pull both ways; give a copy")
        self.left = Side(left, first, feeds[0])
        self.right = Side(right, second, feeds[1])

    @property
    def sides(self) -> tuple[Side, Side]:
        """Left and right."""
        return self.left, self.right

    def surrogate(self) -> DualClassifier:
        """Return the module itself: it is its own differentiable surrogate."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C) log-probabilities."""
        left, right = (side(x).log_softmax(1) for side in self.sides)
        return torch.logaddexp(left, right) - math.log(2.0)

    def validate(self, x: Tensor) -> None:
        """Check on images that each side depends on its own pixels alone; see :func:`check_side`."""
        check_partition((self.left.mask, self.right.mask))
        for side in self.sides:
            check_side(side, side.mask, x)


def check_partition(masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return (left, right) if they are boolean, disjoint and cover all pixels."""
    if len(masks) != 2 or any(not isinstance(mask, Tensor) or mask.dtype != torch.bool for mask in masks):
        raise ValueError("masks: two boolean tensors are needed, left and right")
    left, right = masks
    if left.shape != right.shape:
        raise ValueError(f"masks: shapes {tuple(left.shape)} and {tuple(right.shape)} differ")
    if bool((left & right).any()):
        raise ValueError(f"masks: {int((left & right).sum())} pixels belong to both sides; each needs exactly one")
    if not bool((left | right).all()):
        raise ValueError(f"masks: {int((~(left | right)).sum())} pixels belong to no side; each needs exactly one")
    return left, right


def check_side(classifier: Classifier, mask: Tensor, x: Tensor) -> None:
    """Check that a classifier of whole images depends on the pixels of ``mask`` alone.

    A network that splits images itself, or denoises them first, may read pixels that are not its own; what is certified
    is then not what it computes. The gradient and the change under new values of the other pixels must both be 0.

    Args:
        classifier: maps whole images to logits (B, C).
        mask: boolean, its own pixels.
        x: (B, ..., *mask.shape) images to try.

    Raises:
        ValueError: the classifier reads other pixels.
    """
    check_inputs(x)
    probe = padded(x).detach().clone()
    others = ~mask.to(x.device)
    generator = stream(0, 0, "dual-smoothing/validate", device=x.device)
    noise = torch.empty_like(probe).normal_(generator=generator)
    with frozen(classifier), torch.enable_grad():
        logits = classifier(probe.requires_grad_(True))
        weight = torch.linspace(1.0, 2.0, logits.shape[1], dtype=logits.dtype, device=x.device)
        total = (logits * weight).sum()
        gradient = torch.autograd.grad(total, probe, allow_unused=True)[0] if total.requires_grad else None
        moved = classifier(torch.where(others, probe.detach() + noise, probe.detach()))
    touched = 0.0 if gradient is None else float((gradient * others).abs().amax())
    changed = float((moved - logits).detach().abs().amax())
    if touched > 0 or changed > 0:
        raise ValueError(
            f"classifier: pixels of the other side move its logits (gradient {touched:.3g}, change {changed:.3g}); "
            "each side must see its own pixels only (split first, then denoise)"
        )
