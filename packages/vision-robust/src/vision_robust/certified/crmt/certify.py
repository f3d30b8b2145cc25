"""Certificates of classifiers of several modalities: for attacks on all of them together, and on each alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from robust_core.certificates import Certificate, Crown, PartsCertifier, Status
from robust_core.threats import L2
from vision_robust.certified.crmt.model import Packed

__all__ = ["MultiModalCertifier"]


class MultiModalCertifier:
    """Certify L2 radii of a packed classifier: ``min_j (h_y - h_j) / L_j`` over all rivals j.

    ``L_j`` adds up the modalities as the paper's bound does, but each modality's share is a Lipschitz constant of the
    margin ``h_y - h_j`` itself, pulled back through fusion and encoder: at most the paper's
    ``a_y^m tau_y^m + a_j^m tau_j^m``, and for orthonormal directions already ``sqrt(a_y^2 + a_j^2) Lip(phi^m)``. Works
    for every fusion here, for class weights of any sign, and for encoders of layers that core can bound.

    What is certified is the model in eval mode, with all its modalities; of a view ``without`` some, the model that
    remains. Where only some modalities are attacked, it is the model as a function of those, the others being what
    they are in each sample: ``about.function`` is "restricted", and an attack on all of the input says nothing of it.

    Args:
        view: the packed classifier; left as found.
        attacked: names of the modalities that an attacker may change together; all that are there when None.
        crown_up_to: also search radii up to this one with CROWN, and give each sample the better of both. It takes
            tens of times as long, and pays for small encoders in which much of what constants allow for cannot happen.

    Raises:
        TypeError: not a packed classifier.
        ValueError: unknown or missing modalities.
    """

    def __init__(
        self, view: Packed, attacked: Sequence[str] | None = None, *, crown_up_to: float | None = None
    ) -> None:
        if not isinstance(view, Packed):
            raise TypeError(f"view is a {type(view).__name__}; a classifier of several modalities, Packed, is needed")
        present = [name for name in view.names if name not in view.missing]
        attacked = present if attacked is None else list(attacked)
        if not attacked or any(name not in present for name in attacked):
            raise ValueError(f"attacked={tuple(attacked)}: names of {', '.join(present)} are needed")
        self.view, self.attacked = view, tuple(attacked)
        # What a view does not read may change with all that is attacked: the certificate is then of the whole input.
        moving = view.names if set(attacked) == set(present) else attacked
        places = sorted(view.names.index(name) for name in moving)
        self._certifier = PartsCertifier(view, view.lengths, "L2", dim=view.along, moving=places)
        self._crown = None if crown_up_to is None else Crown(view, L2(crown_up_to, None))

    def certify(self, x: Tensor, y: Tensor | None = None) -> Certificate:
        """Certify packed inputs (B, ...); rows that the model does not take for ``y`` stay unknown.

        Returns:
            the radius for all attacked modalities together; ``details["radius_NAME"]`` (B,) is that of an attack on
            one modality alone, infinite where the view does not read it, 0 where nothing is certified.

        Raises:
            TypeError, ValueError: bad arguments.
            UnsupportedLayerError: a layer without a sound rule.
        """
        found = self._certifier.certify(x, y)
        details = dict(found.details)
        alone = details.pop("part_radius")
        if self._crown is not None:
            # What no change of all modalities within a radius can flip, no change of some of them can.
            other = self._crown.radius(x, y)
            alone = torch.maximum(alone, other.radius[:, None])
            status = torch.where(other.certified, int(Status.CERTIFIED), found.status)
            radius, cost = torch.maximum(found.radius, other.radius), dict(found.cost)
            cost["seconds"] += other.cost["seconds"]
            about = replace(found.about, method=f"the better of CROWN and {found.about.method}")
            found = replace(found, radius=radius, status=status, cost=cost, about=about)
        for place, name in enumerate(self.view.names):
            details[f"radius_{name}"] = alone[:, place].where(found.certified, 0.0)
        gone = f"; without {', '.join(self.view.missing)}" if self.view.missing else ""
        method = f"modalities {', '.join(self.attacked)} attacked together{gone}; {found.about.method}"
        return replace(found, about=replace(found.about, method=method), details=details)
