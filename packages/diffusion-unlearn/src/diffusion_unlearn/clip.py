"""CLIP looks at pictures: as a judge without training, and as the features of a CLIP score or a Frechet distance.

A. Radford and others, "Learning Transferable Visual Models From Natural Language Supervision" (ICML 2021,
arXiv:2103.00020). The user's own checkpoint is read from a folder in the layout of transformers (safetensors only);
nothing is downloaded. Pictures are prepared as the folder's ``preprocessor_config.json`` says, in tensors where the
model is: resized on the shorter side, cut in the middle, normalised. Resizing is torch's bicubic, which differs from
that of 8-bit files by less than a grey level on average; where pictures have the right size, nothing differs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffusion_unlearn.judges import Verdict, check_images
from robust_core.checks import check_count, check_number
from robust_core.errors import DataMissingError, MalformedFileError, UntrustedFileError
from robust_core.io import read_json
from robust_core.models import fingerprint, frozen

__all__ = ["ClipFeatures", "ClipJudge"]

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PREPROCESSOR = "preprocessor_config.json"


class ClipFeatures:
    """Unit vectors of pictures and of texts in one space.

    Args:
        model: a ``CLIPModel`` of transformers.
        tokenizer: its tokenizer.
        size: side of the pictures that the model sees; that of its configuration if None.
        mean: of the channels.
        std: of the channels.
        name: of the checkpoint.
        version: head of a SHA-256 over the weights if None.
        batch_size: pictures or texts at a time.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        size: int | None = None,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        name: str = "clip",
        version: str | None = None,
        batch_size: int = 64,
    ) -> None:
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean={mean!r}, std={std!r}: three numbers each are needed, std above 0")
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.size = check_count("size", int(model.config.vision_config.image_size) if size is None else size)
        self.mean, self.std = tuple(mean), tuple(std)
        self.version = version or fingerprint(model)[:12]
        self.batch_size = check_count("batch_size", batch_size)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> ClipFeatures:
        """Read a checkpoint in the layout of transformers.

        Raises:
            DataMissingError: no such folder, or no ``config.json`` in it.
            UntrustedFileError: weights that are no safetensors.
            MalformedFileError: a folder that transformers cannot read, or is not CLIP's.
        """
        place = Path(folder)
        if not (place / "config.json").is_file():
            raise DataMissingError(f"{place}: no checkpoint in the layout of transformers (config.json is missing)")
        if not list(place.glob("*.safetensors")):
            raise UntrustedFileError(
                f"{place}: no *.safetensors; pickled weights are not loaded. Convert once, where you trust the file: "
                "CLIPModel.from_pretrained(folder).save_pretrained(folder, safe_serialization=True)"
            )
        from safetensors import SafetensorError
        from transformers import CLIPModel, CLIPTokenizer

        try:
            model: Any = CLIPModel.from_pretrained(place, local_files_only=True, use_safetensors=True)
            tokenizer = CLIPTokenizer.from_pretrained(place, local_files_only=True)
            settings = read_json(place / PREPROCESSOR) if (place / PREPROCESSOR).is_file() else {}
            crop = settings.get("crop_size", {})
            size = crop.get("height") if isinstance(crop, dict) else crop
            more = {"mean": settings.get("image_mean", MEAN), "std": settings.get("image_std", STD), "size": size}
        except (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
            why = " ".join(str(error).split())[:300]
            raise MalformedFileError(f"{place}: cannot be read as CLIP ({why})") from error
        return cls(model.to(device).eval(), tokenizer, name=place.resolve().name, **more)

    @property
    def scale(self) -> float:
        """By which cosines are multiplied to be logits."""
        return float(self.model.logit_scale.detach().exp())

    def _pixels(self, images: Tensor) -> Tensor:
        x = images.to(self.model.device, torch.float32)
        x = x.expand(-1, 3, -1, -1)
        height, width = x.shape[-2:]
        short = min(height, width)
        if short != self.size:
            wanted = (height * self.size // short, width * self.size // short)
            x = functional.interpolate(x, size=wanted, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (x.shape[-2] - self.size) // 2, (x.shape[-1] - self.size) // 2
        x = x[..., top : top + self.size, left : left + self.size]
        mean, std = (x.new_tensor(values).reshape(1, 3, 1, 1) for values in (self.mean, self.std))
        return ((x - mean) / std).to(self.model.dtype)

    def images(self, images: Tensor) -> Tensor:
        """Return (B, D) unit vectors of (B, C, H, W) images in [0, 1], on the images' device."""
        check_images(images)
        with frozen(self.model), torch.no_grad():
            rows = [_pooled(self.model.get_image_features(self._pixels(x))) for x in images.split(self.batch_size)]
        return functional.normalize(torch.cat(rows).float(), dim=1).to(images.device)

    __call__ = images

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return (B, D) unit vectors of texts.

        Raises:
            ValueError: a text that does not fit; cut, it would be another text.
        """
        rows = []
        for start in range(0, len(texts), self.batch_size):
            part = list(texts[start : start + self.batch_size])
            found = self.tokenizer(part, padding=True, return_tensors="pt").to(self.model.device)
            room = int(self.model.config.text_config.max_position_embeddings)
            if found.input_ids.shape[1] > room:
                longest = max(part, key=len)
                raise ValueError(f"text {longest[:60]!r} has more than {room} tokens: shorten it")
            with frozen(self.model), torch.no_grad():
                ids, mask = found.input_ids, found.attention_mask
                rows.append(_pooled(self.model.get_text_features(input_ids=ids, attention_mask=mask)))
        return functional.normalize(torch.cat(rows).float(), dim=1)


def _pooled(found: Any) -> Tensor:
    """Return the projected features: transformers 4 gives them, 5 an object that holds them."""
    return found if isinstance(found, Tensor) else found.pooler_output


class ClipJudge:
    """A concept in words, against other words: the probability that CLIP gives it is the score.

    Args:
        features: a checkpoint.
        concept: one text, or several that mean it.
        against: one text or more for what else a picture may show. The score is relative to them: choose neighbours of
            the concept, not only ``"a photo"``.
        threshold: probability above which it is a hit.
    """

    def __init__(
        self,
        features: ClipFeatures,
        concept: str | Sequence[str],
        against: str | Sequence[str],
        *,
        threshold: float = 0.5,
    ) -> None:
        check_number("threshold", threshold, low=0.0, high=1.0, open_low=True, open_high=True)
        self.concept = (concept,) if isinstance(concept, str) else tuple(concept)
        self.against = (against,) if isinstance(against, str) else tuple(against)
        for name, texts in (("concept", self.concept), ("against", self.against)):
            if not texts or not all(text.strip() for text in texts):
                raise ValueError(f"{name}={texts!r}: one or more texts are needed")
        both = set(self.concept) & set(self.against)
        if both:
            raise ValueError(f"against holds {sorted(both)[0]!r}, which is the concept")
        self.features, self.threshold = features, float(threshold)
        self.name, self.version = f"clip:{features.name}", features.version
        self.texts = features.texts([*self.concept, *self.against])

    @property
    def rule(self) -> str:
        """What the score is, in words."""
        return f"probability of {' | '.join(self.concept)} against {' | '.join(self.against)}"

    def __call__(self, images: Tensor, prompts: Sequence[str] | None = None) -> Verdict:
        """Judge (B, C, H, W) images in [0, 1]; prompts are not looked at."""
        cosines = self.features.images(images).double() @ self.texts.to(images.device).double().T
        score = (cosines * self.features.scale).softmax(1)[:, : len(self.concept)].sum(1)
        return Verdict(score, score > self.threshold)
