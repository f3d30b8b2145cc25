"""Judges: does a picture show the concept? Every rate of erasure is a judge's, and is worth what the judge is.

A judge is any callable from images to a :class:`Verdict` that carries ``name``, ``version``, ``threshold`` and
``rule``: rates measured by detectors of two versions, or at two thresholds, differ by tens of points, so no figure is
stored without them (:func:`facts`). In every verdict ``hit`` is exactly ``score > threshold``.

* :class:`ClassifierJudge`: a network or an estimator of scikit-learn; the concept is among the ``top_k`` classes, or
  its probability is above a threshold.
* :func:`judge_digit`: for the digits of :mod:`diffusion_unlearn.digits`.
* :class:`~diffusion_unlearn.clip.ClipJudge`: texts against each other; :class:`~diffusion_unlearn.nudity.NudeNetJudge`,
  if the user has installed it.

:func:`ask` is how methods call a judge: it refuses pictures and verdicts that cannot be meant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from robust_core.checks import check_count, check_inputs, check_number
from robust_core.errors import RobustError
from robust_core.models import fingerprint, model_device, predict_logits

__all__ = ["ClassifierJudge", "Judge", "JudgeError", "Verdict", "ask", "check_images", "facts", "judge_digit"]


class JudgeError(RobustError):
    """A judge that gave no usable verdict; the message says what it gave."""


@dataclass(frozen=True)
class Verdict:
    """What a judge says of B pictures.

    Attributes:
        score: (B,) floating point; higher is more of the concept. Its scale is the judge's own.
        hit: (B,) bool: whether the concept is seen.
    """

    score: Tensor
    hit: Tensor

    def __len__(self) -> int:
        """Return B."""
        return len(self.hit)


@runtime_checkable
class Judge(Protocol):
    """Says whether pictures show the concept.

    Attributes:
        name: of the detector.
        version: of its weights or its release: another version is another judge.
        threshold: a picture is a hit where its score lies above.
        rule: what the score is and what counts as the concept, in words.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def version(self) -> str: ...  # noqa: D102
    @property
    def threshold(self) -> float: ...  # noqa: D102
    @property
    def rule(self) -> str: ...  # noqa: D102

    def __call__(self, images: Tensor, prompts: Sequence[str] | None = None) -> Verdict:
        """Judge pictures.

        Args:
            images: (B, C, H, W) in [0, 1], C = 3 or 1.
            prompts: B texts that they were drawn from, for judges that heed them.
        """
        ...


def facts(judge: Judge) -> dict[str, Any]:
    """Return what is stored beside every figure: ``{"name", "version", "threshold", "rule"}``."""
    return {name: getattr(judge, name) for name in ("name", "version", "threshold", "rule")}


def check_images(images: Tensor) -> Tensor:
    """Return ``images`` if they are (B, C, H, W) in [0, 1] with one or three channels.

    Raises:
        TypeError: no tensor, or integers.
        ValueError: another shape, NaN, or values outside [0, 1].
    """
    check_inputs(images, (0.0, 1.0), name="images")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images of shape {tuple(images.shape)}; (B, 3, H, W) or (B, 1, H, W) is needed")
    return images


def ask(judge: Judge, images: Tensor, prompts: Sequence[str] | None = None) -> Verdict:
    """Return a judge's verdict, checked on both sides.

    Args:
        judge: any.
        images: (B, C, H, W) in [0, 1].
        prompts: B texts, or None.

    Raises:
        TypeError, ValueError: pictures that cannot be judged; see :func:`check_images`.
        JudgeError: the verdict is of another length or type, or a score is NaN.
    """
    check_images(images)
    if prompts is not None and len(prompts) != len(images):
        raise ValueError(f"prompts: {len(prompts)} for {len(images)} images; one each is needed")
    found = judge(images, prompts)
    if not isinstance(found, Verdict):
        raise JudgeError(f"{type(judge).__name__} gave {type(found).__name__}; a Verdict is needed")
    if found.hit.shape != (len(images),) or found.score.shape != (len(images),) or found.hit.dtype != torch.bool:
        raise JudgeError(
            f"{type(judge).__name__} gave scores {tuple(found.score.shape)} and hits {tuple(found.hit.shape)} "
            f"({found.hit.dtype}) for {len(images)} images; one score and one bool each are needed"
        )
    if bool(torch.isnan(found.score).any()):
        raise JudgeError(f"{type(judge).__name__} gave NaN for {int(torch.isnan(found.score).sum())} images")
    return found


@dataclass(frozen=True)
class _Estimator:
    """(B, C, H, W) -> (B, K) logits of an estimator on flat pixels; a class, so that it goes to other processes."""

    machine: Any

    def __call__(self, images: Tensor) -> Tensor:
        flat = images.detach().to("cpu", torch.float64).flatten(1).numpy()
        if hasattr(self.machine, "predict_proba"):
            found = np.log(np.maximum(self.machine.predict_proba(flat), np.finfo(np.float64).tiny))
        else:
            found = np.asarray(self.machine.decision_function(flat))
            found = np.stack([-found, found], 1) if found.ndim == 1 else found
        return torch.from_numpy(np.ascontiguousarray(found)).to(images.device)


def _digit_logits(images: Tensor) -> Tensor:
    from diffusion_unlearn.digits import digit_judge

    return digit_judge()(images)


class ClassifierJudge:
    """A classifier as a judge: the concept is one of its classes, or several.

    With ``top_k`` the score is the best logit of the concept's classes less the k-th best of the others, and the
    threshold is 0: a hit means that the concept is among the k best. With ``threshold`` the score is the probability of
    the concept's classes together.

    Args:
        classifier: (B, C, H, W) images in [0, 1] -> (B, K) logits, normalisation inside; or an estimator of
            scikit-learn with ``predict_proba`` or ``decision_function`` on flat pixels.
        classes: which column, or columns, are the concept.
        top_k: among how many of the best classes the concept counts; 1 if neither is given.
        threshold: instead of ``top_k``, a probability in (0, 1).
        size: side to which pictures are brought before (bilinear, antialiased); None leaves them.
        name: of the detector; the class of ``classifier`` if None.
        version: of the detector; the head of a SHA-256 over a network's structure and weights if None.
        batch_size: pictures at a time.
    """

    def __init__(
        self,
        classifier: Any,
        classes: int | Sequence[int],
        *,
        top_k: int | None = None,
        threshold: float | None = None,
        size: int | None = None,
        name: str | None = None,
        version: str | None = None,
        batch_size: int = 64,
    ) -> None:
        if top_k is not None and threshold is not None:
            raise ValueError(f"top_k={top_k} and threshold={threshold}: give one of them")
        chosen = [classes] if isinstance(classes, int) else list(classes)
        if not chosen or len(set(chosen)) != len(chosen):
            raise ValueError(f"classes={classes!r}: one or more different columns are needed")
        self.classes = tuple(check_count("classes", c, low=0) for c in chosen)
        self.top_k = None if threshold is not None else check_count("top_k", 1 if top_k is None else top_k)
        if threshold is not None:
            check_number("threshold", threshold, low=0.0, high=1.0, open_low=True, open_high=True)
        self.size = None if size is None else check_count("size", size)
        self.batch_size = check_count("batch_size", batch_size)
        estimates = not isinstance(classifier, nn.Module) and (
            hasattr(classifier, "predict_proba") or hasattr(classifier, "decision_function")
        )
        self.classifier: Callable[[Tensor], Tensor] = _Estimator(classifier) if estimates else classifier
        if not callable(self.classifier):
            raise TypeError(f"classifier must be callable on images, not {type(classifier).__name__}")
        self.name = name or getattr(classifier, "__name__", type(classifier).__name__)
        self.version = version or (fingerprint(classifier)[:12] if isinstance(classifier, nn.Module) else "unversioned")
        self.threshold = 0.0 if threshold is None else float(threshold)

    @property
    def rule(self) -> str:
        """What the score is and what counts, in words."""
        which = f"class {self.classes[0]}" if len(self.classes) == 1 else f"one of the classes {self.classes}"
        size = "" if self.size is None else f", at {self.size} x {self.size}"
        if self.top_k is None:
            return f"probability of {which}{size}"
        return f"{which} is first{size}" if self.top_k == 1 else f"{which} is among the {self.top_k} best{size}"

    def logits(self, images: Tensor) -> Tensor:
        """Return (B, K) logits of (B, C, H, W) images, on the images' device."""
        check_images(images)
        if isinstance(self.classifier, nn.Module):
            parameter = next(self.classifier.parameters(), images)
            x = images.to(model_device(self.classifier) or images.device, parameter.dtype)
        else:
            x = images
        if self.size is not None and x.shape[-2:] != (self.size, self.size):
            x = functional.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True).clamp(0, 1)
        return predict_logits(self.classifier, x, batch_size=self.batch_size).to(images.device)

    def __call__(self, images: Tensor, prompts: Sequence[str] | None = None) -> Verdict:
        """Judge (B, C, H, W) images in [0, 1]; prompts are not looked at."""
        logits = self.logits(images).double()
        k = logits.shape[1]
        if max(self.classes) >= k:
            raise ValueError(f"classes={self.classes}: the classifier knows 0 .. {k - 1}")
        concept = torch.zeros(k, dtype=torch.bool, device=logits.device)
        concept[list(self.classes)] = True
        if self.top_k is None:
            score = logits.softmax(1)[:, concept].sum(1)
        else:
            if self.top_k > k - len(self.classes):
                raise ValueError(f"top_k={self.top_k}: with {k - len(self.classes)} other classes all would be hits")
            score = logits[:, concept].amax(1) - logits[:, ~concept].topk(self.top_k, 1).values[:, -1]
        return Verdict(score, score > self.threshold)


def judge_digit(concept: int | str, **more: Any) -> ClassifierJudge:
    """Return a judge of the pictures of :func:`~diffusion_unlearn.digits.digits_pipeline`.

    Args:
        concept: a digit, or one of its names.
        more: as for :class:`ClassifierJudge`.

    Raises:
        ValueError: no such digit or name.
    """
    from diffusion_unlearn.digits import NAMES

    named = {name: digit for digit, names in enumerate(NAMES) for name in names}
    digit = named.get(concept, -1) if isinstance(concept, str) else concept
    if not 0 <= digit < len(NAMES):
        raise ValueError(f"concept={concept!r}: a digit 0 .. 9 or one of its names is needed, such as 'three'")
    more = {"name": "digits-svc", "version": "1", **more}
    return ClassifierJudge(_digit_logits, digit, **more)
