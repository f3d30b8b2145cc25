"""Ways to bring an erased concept back, and what they say of an erasure together.

    report = attack_prompts(erased, PromptSet.of(["a photo of three"]), judge, {"unlearndiffatk": UnlearnDiffAtk()},
                            original=pipe)
    report["pre_asr"], report["asr"]            # as they are; of all attacks together, prompt by prompt
    report.found["unlearndiffatk"][0].text      # what brought the concept back

=========================  =========  ==================================================================
:class:`UnlearnDiffAtk`    prompt     optimised tokens; needs the victim and a picture of the concept
:class:`P4D`               prompt     optimised tokens; needs the original model too
:class:`RandomPrefix`      prompt     random tokens: the control
:class:`Synonyms`          prompt     the user's own words
:class:`SeedSearch`        seed       the same prompt from other noise
:class:`ConceptInversion`  embedding  free vectors: a stronger threat, reported apart
=========================  =========  ==================================================================
"""

from __future__ import annotations

from diffusion_unlearn.attacks.base import Found, PromptAttack, Scene
from diffusion_unlearn.attacks.drawing import Drawing, Look, Try
from diffusion_unlearn.attacks.inversion import ConceptInversion
from diffusion_unlearn.attacks.p4d import P4D
from diffusion_unlearn.attacks.plain import RandomPrefix, SeedSearch, Synonyms
from diffusion_unlearn.attacks.report import AttackReport
from diffusion_unlearn.attacks.run import attack_prompts
from diffusion_unlearn.attacks.unlearndiffatk import UnlearnDiffAtk
from diffusion_unlearn.attacks.writing import Writing

__all__ = [
    "ATTACKS",
    "P4D",
    "AttackReport",
    "ConceptInversion",
    "Drawing",
    "Found",
    "Look",
    "PromptAttack",
    "RandomPrefix",
    "Scene",
    "SeedSearch",
    "Synonyms",
    "Try",
    "UnlearnDiffAtk",
    "Writing",
    "attack_prompts",
]

ATTACKS: dict[str, type[PromptAttack]] = {
    attack.name: attack for attack in (UnlearnDiffAtk, P4D, RandomPrefix, SeedSearch, Synonyms, ConceptInversion)
}
"""The attacks by name, for command lines."""
