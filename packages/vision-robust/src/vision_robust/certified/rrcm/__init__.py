r"""rRCM: one encoder pass that denoises and classifies at once, for smoothing at low cost.

Jiachen Lei, Julius Berner, Jiongxiao Wang, Zhongzhu Chen, Zhongjie Ba, Kui Ren, Jun Zhu, Anima Anandkumar, "Robust
Representation Consistency Model via Contrastive Denoising", ICLR 2025, arXiv:2501.13094.

Denoise-then-classify pays a denoiser before each of 100,000 noisy votes. Here an encoder is pre-trained, without
labels, so that the points of one noise trajectory ``x_t = x + t e`` have one representation; after fine-tuning at one
level it is the base classifier of ``robust_core.certificates.Smoothing``: the same certificate, one forward pass for
each vote.

- grid of noise levels, schedules N(k) and of the teacher's decay -> :class:`KarrasGrid`, :class:`ConsistencySchedule`,
  :class:`TargetEmaSchedule`
- input scaling, time value, encoder -> :class:`TimeConditionedEncoder` around :class:`NoiseViT` or a backbone of your
  own (:class:`TimeModulated` where it has no time input)
- InfoNCE -> :func:`info_nce`; pre-training loss -> :class:`RRCM`, an objective for ``fit`` on a
  :class:`ProjectedEncoder`
- fine-tuning loss -> :class:`SmoothedFineTuning`; slower early layers -> :func:`layerwise_adamw`
- the classifier that is certified -> :class:`NoiseConditionedClassifier`
- the paper's numbers for CIFAR-10 and ImageNet -> :data:`PRESETS`

``sigma`` is in units of images in [0, 1] everywhere; levels t are in units of the normalised input, ``t = sigma /
std``: twice ``sigma``. Only :class:`TimeConditionedEncoder` turns one into the other.

Left out: gradients are clipped during warm-up too (the paper begins afterwards). Reconstructed: the teacher normalises
by the statistics of its own batches, as the student does; which projector width goes with which data set; the
layer-wise decay of each setting (0.75, the middle of the paper's range). Defaults are those for CIFAR-10.
"""

from vision_robust.certified.rrcm.classifier import NoiseConditionedClassifier
from vision_robust.certified.rrcm.encoder import (
    NoiseViT,
    ProjectedEncoder,
    TimeConditionedEncoder,
    TimeModulated,
    noise_vit,
    noisy_point,
    projection_head,
    time_embedding,
)
from vision_robust.certified.rrcm.objective import RRCM, StrongViews, info_nce, strong_crop
from vision_robust.certified.rrcm.presets import PRESETS, Preset, Tuning
from vision_robust.certified.rrcm.schedule import ConsistencySchedule, KarrasGrid, TargetEmaSchedule
from vision_robust.certified.rrcm.tuning import SmoothedFineTuning, layerwise_adamw

__all__ = [
    "PRESETS",
    "RRCM",
    "ConsistencySchedule",
    "KarrasGrid",
    "NoiseConditionedClassifier",
    "NoiseViT",
    "Preset",
    "ProjectedEncoder",
    "SmoothedFineTuning",
    "StrongViews",
    "TargetEmaSchedule",
    "TimeConditionedEncoder",
    "TimeModulated",
    "Tuning",
    "info_nce",
    "layerwise_adamw",
    "noise_vit",
    "noisy_point",
    "projection_head",
    "strong_crop",
    "time_embedding",
]
