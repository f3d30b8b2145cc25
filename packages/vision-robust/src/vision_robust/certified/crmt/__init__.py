r"""CRMT: classifiers of several modalities that do not hang on one of them, and what they certify.

Zequn Yang, Yake Wei, Ce Liang, Di Hu, "Quantifying and Enhancing Multi-modal Robustness with Modality Preference",
ICLR 2024, arXiv:2402.06244.

A joint model of audio and video (or colour and depth, or two views) leans on the modality that it prefers, and falls
with it. The paper bounds the least perturbation of all modalities together that can flip the decision, by each
modality's margin and weight, and trains both.

- general bound, joint and of one modality -> :class:`MultiModalCertifier`, for any fusion, in a sharper form
- its CRMT form r(x) with class weights a -> :func:`multimodal_radius`, from :func:`score_lipschitz`
- orthogonal directions, :math:`(ZZ^T)^{-1/2}Z` -> :func:`orthonormal_rows`, :class:`OrthogonalFusion`; joint and late
  fusion -> :class:`JointFusion`, :class:`LateFusion`
- step 1 and its variants CRMT-AT and CRMT-Mix -> :class:`CRMTMargins`; step 2 -> :class:`CRMTWeights`; both, as a list
  of stages for ``fit`` -> :func:`crmt_stages`
- files with one array for each modality -> :func:`load_modalities`; encoders for them -> :func:`encoder_for`
- attacks on all or one modality -> core's own, on :class:`Packed` with :meth:`Packed.threat`; missing modalities ->
  :meth:`Packed.without`, :class:`MissingModalities` in any evaluation

Two things differ from the official code, which the paper's text does not follow there: it orthogonalises each row
alone, so that rows are merely normalised (here all rows of a modality are orthonormal), and it estimates Lipschitz
constants from sampled gradients, which bound nothing (:func:`sampled_slopes` is a diagnostic here; certificates use
upper bounds). Step 1 raises margins without limit: attack with a loss that scale does not blunt, ``loss="margin"``.

Left out: the audio and video pipelines of the paper's data sets; encoders are the user's own. Defaults are those of
the official Kinetics-Sounds configuration. Reconstructed: the proof of the bound, which tests check by attacks and by
closed forms of linear models.
"""

from vision_robust.certified.crmt.certify import MultiModalCertifier
from vision_robust.certified.crmt.data import Frames, ModalityDataset, encoder_for, holds_modalities, load_modalities
from vision_robust.certified.crmt.evaluation import MissingModalities
from vision_robust.certified.crmt.fusion import Fusion, JointFusion, LateFusion, OrthogonalFusion, orthonormal_rows
from vision_robust.certified.crmt.model import MultiModalClassifier, Packed, missing_accuracy
from vision_robust.certified.crmt.objectives import CRMTMargins, CRMTWeights, crmt_stages, unimodal_margin_loss
from vision_robust.certified.crmt.radius import (
    encoder_lipschitz,
    margin_over_slopes,
    multimodal_radius,
    sampled_slopes,
    score_lipschitz,
)

__all__ = [
    "CRMTMargins",
    "CRMTWeights",
    "Frames",
    "Fusion",
    "JointFusion",
    "LateFusion",
    "MissingModalities",
    "ModalityDataset",
    "MultiModalCertifier",
    "MultiModalClassifier",
    "OrthogonalFusion",
    "Packed",
    "crmt_stages",
    "encoder_for",
    "encoder_lipschitz",
    "holds_modalities",
    "load_modalities",
    "margin_over_slopes",
    "missing_accuracy",
    "multimodal_radius",
    "orthonormal_rows",
    "sampled_slopes",
    "score_lipschitz",
    "unimodal_margin_loss",
]
