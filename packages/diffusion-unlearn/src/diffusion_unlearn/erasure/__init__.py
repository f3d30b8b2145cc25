"""Ways to erase a concept, each from its exact objective; :func:`erase` is one call for all.

Beside those of :data:`METHODS` stands :class:`SLD`, which edits nothing and guides the sampler instead.
"""

from __future__ import annotations

from diffusion_unlearn.erasure.advunlearn import AdvUnlearn, plug_in
from diffusion_unlearn.erasure.ca import ConceptAblation
from diffusion_unlearn.erasure.esd import ESD
from diffusion_unlearn.erasure.fmn import FMN
from diffusion_unlearn.erasure.front import METHODS, erase, recipe
from diffusion_unlearn.erasure.sld import SLD
from diffusion_unlearn.erasure.uce import UCE

__all__ = ["ESD", "FMN", "METHODS", "SLD", "UCE", "AdvUnlearn", "ConceptAblation", "erase", "plug_in", "recipe"]
