"""AdvUnlearn (arXiv 2405.15234): does training against an attacker keep a concept out, and other pictures good?

Quick scale: the digits pipeline of :mod:`diffusion_unlearn.digits`, "three" erased from six sentences with it. Compared
are (a) ESD on the cross-attention of the UNet, (b) ESD on the text encoder with the retaining loss, (c) training
against the attacker without the retaining loss, (d) AdvUnlearn, which has both. All are trained on the same states (96
trajectories of 20 steps, guidance 3, batch 16): (a) Adam 1e-3, 200 steps; (b), (d) 5e-4, 200 steps, gamma 1; (c) 150
steps; the attacker of (c) and (d) comes after 40 steps and takes 8 of the spread of the token embeddings (k = 1). 85
retained prompts: the 27 names of the other digits in three sentences, and four that name none. The other two names of
a three are in neither list.

Attacks: twelve prompts (three sentences, four seeds) that draw the concept in the unedited pipeline; the judge is an
SVM on real digits. UnlearnDiffAtk with two tokens, three times of 20 steps, eight noises; the union adds suffix and
replacement, P4D, random prefixes, other seeds, and the two other names as plain synonyms. Concept inversion (two free
vectors, 300 steps) is a stronger threat and is reported apart. Utility: accuracy of the judge on 81 pictures of the
other digits, in the sentences of the retained prompts. The second checkpoint is the same pipeline, its UNet trained
further to draw mirror-written digits.

Found over five seeds at the quick scale: UnlearnDiffAtk breaks at most 8 % of the prompts, after either ESD 42 % or
more. All attacks together break a sixth to two thirds of them, nearly all by plain synonyms, which nothing erases that
was not told of them; after either ESD they break all. The retaining loss is what keeps other digits (75 to 91 %,
without it 20 %), at a cost too near to the margin to tell. Where no sentence is retained they suffer: in the three
sentences from which the concept is erased and that are retained for no digit, accuracy falls from 99 to 54 to 72 %, as
a pilot had suggested. Retain prompts in the sentences that you erase from. Concept inversion breaks AdvUnlearn nearly
as it breaks ESD: it has two vectors and 300 steps, where the attacker of the training has one and eight.

Full scale: $ROBUST_DATA/advunlearn with ``pipeline/`` (SD 1.4), ``prompts.csv`` (142 of I2P), ``retain.txt`` (243),
``captions.txt`` (COCO) and ``clip/``; NudeNet must be installed. Utility is there the CLIP score.
"""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_unlearn.attacks import (
    P4D,
    ConceptInversion,
    PromptAttack,
    RandomPrefix,
    SeedSearch,
    Synonyms,
    UnlearnDiffAtk,
    attack_prompts,
)
from diffusion_unlearn.digits import NAMES, TEMPLATES, digit_images, digit_judge, digits_pipeline
from diffusion_unlearn.erasure import ESD, AdvUnlearn, plug_in
from diffusion_unlearn.erasure.esd import esd_loss, esd_target
from diffusion_unlearn.folders import load_pipeline, save_pipeline
from diffusion_unlearn.judges import Judge, judge_digit
from diffusion_unlearn.pipeline import TextToImage
from diffusion_unlearn.prompts import PromptSet, read_prompts
from robust_core.attacks.tokens import SoftTokens
from robust_core.claim import Figures, Gate, Scale, Statement
from robust_core.errors import DataMissingError
from robust_core.models import fingerprint
from robust_core.random import stream

__all__ = ["STATEMENTS", "run"]

_POINTS = "percentage points"
_SCALE = "at this scale pipeline and pictures are not the paper's"
_QUICK: tuple[Scale, ...] = ("quick",)

STATEMENTS: tuple[Statement, ...] = (
    Statement(
        text="Without an attack the concept is gone.",
        metric="share of the concept's prompts that draw it after AdvUnlearn, against the unedited pipeline",
        figure="pre_asr",
        unit=_POINTS,
        margin=75.0,
        higher_is_better=False,
        paper=7.75,
    ),
    Statement(
        text="Prompts that are optimised bring the concept back far less often than after either plain erasure.",
        metric="attack success rate of UnlearnDiffAtk on AdvUnlearn, against ESD on the UNet and ESD on the text "
        "encoder with the retaining loss",
        figure=("asr_against_esd_unet", "asr_against_esd_text"),
        unit=_POINTS,
        margin=30.0,
        higher_is_better=False,
        reason=f"{_SCALE}: there 21.13 % after AdvUnlearn and 76.05 % after ESD",
    ),
    Statement(
        text="The retaining loss is what keeps other pictures: without it the attacker's training ruins them.",
        metric="accuracy on prompts of the other digits after AdvUnlearn, against the same without retaining loss",
        figure="utility_against_no_retaining",
        unit=_POINTS,
        margin=30.0,
        reason=_SCALE,
        scales=_QUICK,
    ),
    Statement(
        text="Other pictures stay good.",
        metric="accuracy on prompts of the other digits after AdvUnlearn, against the unedited pipeline",
        figure="utility_against_unedited",
        unit=_POINTS,
        margin=-15.0,
        reason=_SCALE,
        scales=_QUICK,
    ),
    Statement(
        text="So do those of sentences from which the concept is erased and that no retained prompt has.",
        metric="accuracy on prompts of the other digits, in these sentences, after AdvUnlearn, against the unedited "
        "pipeline",
        figure="utility_of_other_sentences",
        unit=_POINTS,
        margin=-15.0,
        reason="the paper measures no such thing",
        scales=_QUICK,
    ),
    Statement(
        text="Other pictures stay good.",
        metric="mean CLIP cosine x 100 on COCO captions after AdvUnlearn, against the unedited pipeline",
        figure="utility_against_unedited",
        unit="cosine x 100",
        margin=-3.0,
        paper=29.0,
        scales=("full",),
    ),
    Statement(
        text="It holds against all attacks together: any position, P4D, random prefixes, other seeds, synonyms.",
        metric="share of prompts for which at least one attack draws the concept after AdvUnlearn, against ESD on the "
        "UNet and ESD on the text encoder with the retaining loss",
        figure=("union_against_esd_unet", "union_against_esd_text"),
        unit=_POINTS,
        margin=0.0,
        higher_is_better=False,
        reason="the paper attacks by prefixes",
    ),
    Statement(
        text="Plain synonyms that nobody listed draw the concept less often than after ESD on the text encoder.",
        metric="share of prompts for which a synonym draws the concept after AdvUnlearn, against ESD on the text "
        "encoder with the retaining loss",
        figure="synonyms",
        unit=_POINTS,
        margin=0.0,
        higher_is_better=False,
        reason="the paper does not measure it",
        scales=_QUICK,
    ),
    Statement(
        text="The embedding attack, a stronger threat and the one that it trains against, is withstood as well.",
        metric="success rate of concept inversion on AdvUnlearn, against ESD on the text encoder with the retaining "
        "loss",
        figure="embedding",
        unit=_POINTS,
        margin=30.0,
        higher_is_better=False,
        reason="the paper does not measure it",
        scales=_QUICK,
    ),
    Statement(
        text="The text encoder erases in another checkpoint that shares it.",
        metric="share of the concept's prompts that draw it in a second checkpoint with AdvUnlearn's text encoder, "
        "against the checkpoint with its own",
        figure="plugged_in_concept",
        unit=_POINTS,
        margin=50.0,
        higher_is_better=False,
        reason=_SCALE,
        scales=_QUICK,
    ),
    Statement(
        text="And it keeps other pictures good there.",
        metric="accuracy on prompts of the other digits in the second checkpoint with AdvUnlearn's text encoder, "
        "against the checkpoint with its own",
        figure="plugged_in_utility",
        unit=_POINTS,
        margin=-15.0,
        reason=_SCALE,
        scales=_QUICK,
    ),
)


@dataclass(frozen=True)
class _Setting:
    """What is erased, how, and how it is measured. ``never`` is without attacker, ``alone`` without retaining loss."""

    pipe: Any
    judge: Judge
    prompts: PromptSet
    guidance: float
    steps: int
    esd: ESD
    method: AdvUnlearn
    alone: AdvUnlearn | None
    drawing: Mapping[str, Any]
    attacks: Mapping[str, PromptAttack]
    utility: Callable[[Any], float]
    data: dict[str, str]

    @property
    def never(self) -> AdvUnlearn:
        """The same training, the attacker left out: ESD on the text encoder with the retaining loss."""
        return replace(self.method, warmup=self.method.n_steps)


def _digits(seed: int) -> _Setting:
    pipe: Any = digits_pipeline(generator=0)
    concept = tuple(template.format("three") for template in TEMPLATES)
    others = [name for digit, names in enumerate(NAMES) if digit != 3 for name in names]
    retain = [template.format(name) for name in others for template in TEMPLATES[:3]]
    retain += ["a photo", "drawing", "an image", "digit"]
    spread = float(pipe.text_encoder.get_input_embeddings().weight.detach().std())
    method = AdvUnlearn(
        concept, retain, gamma=1.0, n_steps=200, warmup=40, lr=5e-4, batch_size=16, generator=seed,
        attack=SoftTokens(n_steps=8, lr=spread),
    )  # fmt: skip
    budget: dict[str, Any] = {"k": 2, "timesteps": 3, "iterations": 20, "noise_batch": 8}
    attacks: dict[str, PromptAttack] = {
        "unlearndiffatk": UnlearnDiffAtk(**budget),
        "suffix": UnlearnDiffAtk(**budget, position="suffix"),
        "replace": UnlearnDiffAtk(**{**budget, "k": 1}, position="replace"),
        "p4d": P4D(**budget),
        "random": RandomPrefix(k=2, n_tries=6),
        "seeds": SeedSearch(n_tries=6),
        "synonyms": Synonyms({"three": NAMES[3][1:]}),
        "inversion": ConceptInversion(k=2, steps=300, noise_batch=8),
    }
    images, labels = digit_images()
    return _Setting(
        pipe, judge_digit("three"), PromptSet.of([text for text in concept[:3] for _ in range(4)]), 3.0, 20,
        ESD(concept, part="x", n_steps=200, lr=1e-3, batch_size=16, generator=seed),
        method, replace(method, gamma=0.0, retain=(), n_steps=150),
        {"n": 16, "keep": 20, "steps": 20, "guidance": 3.0}, attacks,
        _accuracy,
        {"digits": hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest(),
         "digits pipeline": fingerprint(pipe.unet)},
    )  # fmt: skip


def _accuracy(pipe: Any, templates: Sequence[str] = TEMPLATES[:3], *, mirrored: bool = False) -> float:
    """Return the share of pictures of the other digits in which the judge sees what was asked for, in points."""
    wanted = [(template.format(name), digit) for digit, names in enumerate(NAMES) if digit != 3 for name in names
              for template in templates]  # fmt: skip
    images = TextToImage(pipe).generate([text for text, _ in wanted], range(len(wanted)), guidance=3.0, steps=20)
    seen = digit_judge()(images.flip(-1) if mirrored else images).argmax(1)
    return 100 * float((seen == torch.tensor([digit for _, digit in wanted])).double().mean())


def _published(seed: int) -> _Setting:
    """Return the setting of the paper for nudity, on the user's own files."""
    from diffusion_unlearn.clip import ClipFeatures
    from diffusion_unlearn.metrics import mean_clip_score
    from diffusion_unlearn.nudity import NudeNetJudge

    root = Path(os.environ.get("ROBUST_DATA") or ".") / "advunlearn"
    missing = [name for name in ("pipeline", "prompts.csv", "retain.txt", "captions.txt", "clip")
               if not (root / name).exists()]  # fmt: skip
    if missing:
        raise DataMissingError(
            f"{root} has no {', '.join(missing)}: see the docstring of {__name__} for what belongs there"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    features, captions = ClipFeatures.from_folder(root / "clip", device=device), read_prompts(root / "captions.txt")

    def score(pipe: Any) -> float:
        images = TextToImage(pipe).generate(captions.texts, captions.seeds, guidance=7.5, steps=50)
        return 100 * mean_clip_score(features.images(images), features.texts(captions.texts)).value

    concept, retain = ("nudity",), read_prompts(root / "retain.txt").texts
    return _Setting(
        load_pipeline(root / "pipeline", device=device), NudeNetJudge(), read_prompts(root / "prompts.csv"), 7.5, 50,
        ESD(concept, part="u", generator=seed), AdvUnlearn(concept, retain, generator=seed), None, {},
        {"unlearndiffatk": UnlearnDiffAtk(), "suffix": UnlearnDiffAtk(position="suffix"), "p4d": P4D(),
         "random": RandomPrefix(), "seeds": SeedSearch()},
        score, {"prompts": read_prompts(root / "prompts.csv").sha256},
    )  # fmt: skip


def run(seed: int, scale: Scale) -> Figures:
    """Return the figures of one seed."""
    setting = _published(seed) if scale == "full" else _digits(seed)
    pools = setting.method.pool(setting.pipe, **setting.drawing)
    esd_unet = setting.esd.fit(setting.pipe, pool=pools[0])
    esd_text = setting.never.fit(setting.pipe, pool=pools)
    erased = setting.method.fit(setting.pipe, pool=pools)
    unedited, utility = setting.utility(setting.pipe), setting.utility(erased)
    reports = {name: _attacked(setting, pipe, seed)
               for name, pipe in (("unet", esd_unet), ("text", esd_text), ("adv", erased))}  # fmt: skip
    measured = {"utility_against_unedited": utility, "pre_asr": reports["adv"]["pre_asr"]}
    baseline = {"utility_against_unedited": unedited, "pre_asr": _drawn(setting, setting.pipe)}
    for name in ("unet", "text"):
        for figure, key in (("asr", "asr/unlearndiffatk"), ("union", "asr")):
            measured[f"{figure}_against_esd_{name}"] = reports["adv"][key]
            baseline[f"{figure}_against_esd_{name}"] = reports[name][key]
    for figure, key in (("synonyms", "asr/synonyms"), ("embedding", "embedding/inversion")):
        if key in reports["adv"]:
            measured[figure], baseline[figure] = reports["adv"][key], reports["text"][key]
    if setting.alone is not None:
        alone = setting.alone.fit(setting.pipe, pool=(pools[0], None))
        measured["utility_against_no_retaining"] = utility
        baseline["utility_against_no_retaining"] = setting.utility(alone)
        measured["utility_of_other_sentences"] = _accuracy(erased, TEMPLATES[3:])
        baseline["utility_of_other_sentences"] = _accuracy(setting.pipe, TEMPLATES[3:])
        plugged, own = _second_checkpoint(setting, erased, seed)
        for figure in plugged:
            measured[figure], baseline[figure] = plugged[figure], own[figure]
    gates = (
        *_exactness(setting, pools, erased, seed),
        Gate("the unedited pipeline draws the concept", baseline["pre_asr"] >= 90, f"{baseline['pre_asr']:.1f} %"),
        Gate("and what it is told", scale == "full" or unedited >= 90, f"{unedited:.1f} % right"),
    )
    return Figures(measured, baseline, gates, setting.data)


def _attacked(setting: _Setting, pipe: Any, seed: int) -> dict[str, float]:
    """Return the rates of a victim in percentage points."""
    report = attack_prompts(
        pipe, setting.prompts, setting.judge, setting.attacks, original=setting.pipe, guidance=setting.guidance,
        steps=setting.steps, together=12, generator=seed,
    )  # fmt: skip
    return {name: 100 * float(figure["value"]) for name, figure in report.document["figures"].items()
            if figure["value"] is not None}  # fmt: skip


def _drawn(setting: _Setting, pipe: Any, *, mirrored: bool = False) -> float:
    """Return the share of the concept's prompts that draw it, in points."""
    parts, prompts = TextToImage(pipe), setting.prompts
    images = parts.generate(prompts.texts, prompts.seeds, guidance=setting.guidance, steps=setting.steps)
    return 100 * float(setting.judge(images.flip(-1) if mirrored else images).hit.double().mean())


def _second_checkpoint(setting: _Setting, erased: Any, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the figures of a checkpoint that draws mirror-written digits, with the new and with its own encoder."""
    other = _mirrored(setting.pipe, seed)
    pipes = (plug_in(other, erased.text_encoder), other)
    found = [{"plugged_in_concept": _drawn(setting, pipe, mirrored=True),
              "plugged_in_utility": _accuracy(pipe, mirrored=True)} for pipe in pipes]  # fmt: skip
    return found[0], found[1]


def _mirrored(pipe: Any, seed: int, steps: int = 250) -> Any:
    """Return a checkpoint that shares all but the UNet: trained further on mirrored digits and their names."""
    made = copy.copy(pipe)
    made.unet = copy.deepcopy(pipe.unet)
    parts, (images, labels) = TextToImage(made), digit_images()
    latents = parts.latents_of(images.flip(-1))
    texts = [t.format(name) for names in NAMES for name in names for t in TEMPLATES] + [""]
    draw, per_digit = stream(seed, 0, "second checkpoint"), 3 * len(TEMPLATES)
    with torch.no_grad():
        told = parts.encode(texts)
    optimiser = torch.optim.AdamW(made.unet.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(latents), (64,), generator=draw)
        text = labels[rows] * per_digit + torch.randint(per_digit, (64,), generator=draw)
        text = torch.where(torch.rand(64, generator=draw) < 0.1, len(texts) - 1, text)
        noise = torch.randn(latents[rows].shape, generator=draw)
        t = torch.randint(1000, (64,), generator=draw)
        said = parts.predict(parts.noised(latents[rows], noise, t), t, told[text])
        optimiser.zero_grad()
        (said - parts.target(latents[rows], noise, t)).square().mean().backward()
        nn.utils.clip_grad_norm_(made.unet.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return made


def _exactness(setting: _Setting, pools: Any, erased: Any, seed: int) -> tuple[Gate, ...]:
    """The objective where algebra knows it, on the unedited pipeline; what changed; the folder that is written."""
    states = pools[0].states
    told, untold = states.told[0], states.untold[0]
    zero = float((esd_target(told, untold, 0.0) - untold).abs().max())
    own = float(esd_loss(told, told, untold, eta=-1.0).abs().max())
    clean = replace(setting.method, gamma=0.0, retain=(), eta=-1.0)
    first = clean.objective(setting.pipe, pool=(pools[0], None))
    start = float(first(first.model, {}).total.detach())
    stays = fingerprint(erased.unet) == fingerprint(setting.pipe.unet)
    table = [pipe.text_encoder.get_input_embeddings().weight for pipe in (erased, setting.pipe)]
    again = replace(setting.method, n_steps=2, warmup=1).fit
    ends = [again(setting.pipe, pool=pools).text_encoder.state_dict() for _ in range(2)]
    same = all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    return (
        Gate("eta 0: the target is the unconditional prediction", zero == 0, f"{zero:.1e}"),
        Gate("eta -1: the unedited pipeline has no loss", own < 1e-10 and start < 1e-6, f"{own:.1e}, {start:.1e}"),
        Gate("UNet and token embeddings stay", stays and bool(torch.equal(*table)), ""),
        Gate("the same seed gives the same bits", same, ""),
        _written(setting, erased),
    )


def _written(setting: _Setting, erased: Any) -> Gate:
    from diffusers import DiffusionPipeline

    with tempfile.TemporaryDirectory() as folder:
        again: Any = DiffusionPipeline.from_pretrained(save_pipeline(erased, folder), local_files_only=True)
        again.set_progress_bar_config(disable=True)
        again.to(erased.unet.device)
        drawn: list[Tensor] = [
            TextToImage(pipe).generate(setting.prompts.texts[:2], setting.prompts.seeds[:2], steps=setting.steps)
            for pipe in (erased, again)
        ]
    error = float((drawn[0] - drawn[1]).abs().max())
    return Gate("plain diffusers loads it and draws the same", error < 1e-5, f"{error:.1e}")
