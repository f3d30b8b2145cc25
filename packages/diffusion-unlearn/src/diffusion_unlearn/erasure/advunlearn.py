"""AdvUnlearn: a concept is erased together with the prompts that would bring it back, and other pictures stay good.

Zhang et al. 2024 (arXiv 2405.15234). The text encoder (or the UNet) is trained against an attacker who puts k free
vectors beside the words of the concept; the result is a drop-in text encoder for every checkpoint that shares it
(:func:`plug_in`). With c the concept, c* the attacked concept, C retained prompts and frozen predictions e_o:

    attack    min over k vectors of  |e(x_t|c*) - e_o(x_t|c)|^2                 :meth:`AdvUnlearnObjective.attack`
    erase     |e(x_t|c*) - [e_o(x_t|) - eta (e_o(x_t|c) - e_o(x_t|))]|^2        :func:`~.esd.esd_loss`
    retain    mean over C of |e(x_t|c') - e_o(x_t|c')|^2                        :func:`retain_loss`
    total     erase + gamma retain        (``mode="iterative"``: a step on each by turns)

Only the student sees c*: states and targets are those of c. Until ``warmup`` it sees c itself. Defaults are those of
the published command for nudity: 1000 steps of Adam at 1e-5, warm-up 200, 30 attack steps of 1e-3 from the embedding of
a random token as a prefix, 5 retained prompts a step, gamma 0.3. The fast variant is ``attack=SoftTokens(fast=True)``
(signs of the gradient, the released flag) or ``SoftTokens(n_steps=1, fast=True)`` (one linearised step, as published).

Departures: square norms are means over entries; states come from pools, for the frozen model never changes; layers are
chosen by number (the released prefix match takes layers 10 and 11 with layer 1); prompts are measured in tokens; the
attack's gradient is fresh in each step (the released code adds them all up); a retained prompt that holds the concept
is refused; passes over the retained prompts leave out a last batch that would be short.

Left out: two text encoders (XL), where one alone cannot unlearn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from diffusion_unlearn.erasure.esd import esd_loss
from diffusion_unlearn.erasure.parts import (
    UNET_PARTS,
    check_concepts,
    check_retained,
    edited_copy,
    trained_parameters,
)
from diffusion_unlearn.erasure.training import ErasureObjective, Progress, TrainedErasure
from diffusion_unlearn.pipeline import Conditioning, TextToImage, UnsupportedPipelineError
from diffusion_unlearn.trajectories import TrajectoryPool
from robust_core.attacks.tokens import SoftTokens, TokenProblem, TokenSpace, insert_slots
from robust_core.checks import check_choice, check_count, check_number
from robust_core.random import derive, stream
from robust_core.training import Batch, Loss

__all__ = ["AdvUnlearn", "AdvUnlearnObjective", "attack_space", "plug_in", "retain_loss"]

Position = Literal["prefix", "suffix", "middle", "spread", "replace"]
POSITIONS = ("prefix", "suffix", "middle", "spread", "replace")


def retain_loss(student: Tensor, told: Tensor) -> Tensor:
    """Return (B,) mean square distances of the student's predictions from the frozen ones."""
    return (student - told).square().flatten(1).mean(1)


@dataclass(frozen=True)
class AdvUnlearn(TrainedErasure):
    """Erase a concept against an attacker; see the module.

    Args:
        concept: prompts that stand for it, one or several; list synonyms, which no prefix attack stands for.
        retain: prompts that shall draw what they drew; none is allowed where ``gamma`` is 0.
        part: ``"text_encoder"``, or a part of the UNet (:data:`~diffusion_unlearn.erasure.parts.UNET_PARTS`).
        layers: of the text encoder, ``"all"`` or numbers.
        gamma: weight of the retaining loss.
        eta: strength of the erasure.
        n_steps: erasing steps.
        warmup: steps before the first attack.
        lr: of Adam.
        batch_size: states of the concept in a step, and of a step of the attack.
        retain_batch: retained prompts in a step.
        attack_every: steps for which one attack is used.
        k: free vectors of the attacker.
        position: where they stand: prefix, suffix, middle, spread or replace.
        attack: how they are found.
        start: ``"random"``, or ``"latest"``: from the last attack's.
        mode: ``"regularised"`` (a sum, the paper's) or ``"iterative"``.
        generator: seed.
    """

    concept: str | Sequence[str]
    retain: Sequence[str] = ()
    part: str = "text_encoder"
    layers: str | Sequence[int] = "all"
    gamma: float = 0.3
    eta: float = 1.0
    n_steps: int = 1000
    warmup: int = 200
    lr: float = 1e-5
    batch_size: int = 1
    retain_batch: int = 5
    attack_every: int = 1
    k: int = 1
    position: str = "prefix"
    attack: SoftTokens = field(default_factory=lambda: SoftTokens(n_steps=30, lr=1e-3))
    start: str = "random"
    mode: str = "regularised"
    generator: int | None = None

    def __post_init__(self) -> None:
        check_retained(self.retain, check_concepts(self.concept))
        check_choice("part", self.part, ("text_encoder", *UNET_PARTS))
        check_choice("position", self.position, POSITIONS)
        check_choice("start", self.start, ("random", "latest"))
        check_choice("mode", self.mode, ("regularised", "iterative"))
        check_number("gamma", self.gamma, low=0)
        check_number("eta", self.eta)
        check_number("lr", self.lr, low=0, open_low=True)
        check_count("warmup", self.warmup, low=0)
        for name in ("n_steps", "batch_size", "retain_batch", "attack_every", "k"):
            check_count(name, getattr(self, name))
        if self.gamma > 0 and not self.retain:
            raise ValueError(
                f"gamma={self.gamma:g} without retained prompts: give retain, or gamma=0 (other pictures will suffer)"
            )
        if not isinstance(self.attack, SoftTokens):
            raise TypeError(f"attack must be a SoftTokens, not {type(self.attack).__name__}")

    @property
    def optimiser_steps(self) -> int:
        """Steps of the optimiser: in iterative mode, two for each erasing step."""
        return (2 if self.mode == "iterative" and self.gamma > 0 else 1) * self.n_steps

    def check(self, parts: TextToImage) -> None:
        """Refuse pipelines with two text encoders, and prompts without room for the attacker's vectors."""
        if parts.is_xl:
            raise UnsupportedPipelineError(
                f"{type(parts.pipe).__name__} has two text encoders; the attacker writes for one: use ESD or UCE"
            )
        for prompt in check_concepts(self.concept):
            attack_space(parts, prompt, self.k, self.position)
        parts.ids(self.retain or [""])

    def pool(
        self,
        pipe: Any,
        n: int = 4,
        *,
        keep: int = 10,
        steps: int = 50,
        guidance: float = 3.0,
        progress: Progress | None = None,
    ) -> Pools:
        """Return states of the concept's prompts (n trajectories for each) and of the retained (one, ``keep`` states).

        Args:
            pipe: the unedited pipeline.
            n: trajectories for each prompt of the concept.
            keep: states of each retained trajectory.
            steps: of the sampler.
            guidance: its scale.
            progress: called with (what is drawn, trajectories done, in all).
        """
        seed = derive(self.generator or 0, "advunlearn pools")
        settings: dict[str, Any] = {"steps": steps, "guidance": guidance, "generator": seed}

        def report(what: str) -> Any:
            return None if progress is None else partial(progress, what)

        concept = TrajectoryPool.draw(
            pipe, check_concepts(self.concept), n, on_step=report("states of the concept"), **settings
        )
        if self.gamma == 0:
            return concept, None
        kept = report("states of retained prompts")
        return concept, TrajectoryPool.draw(pipe, self.retain, keep=min(keep, steps), on_step=kept, **settings)

    def keep_pool(self, pool: Pools, folder: Path) -> None:
        """Write both pools."""
        for name, part in zip(("concept", "retained"), pool, strict=True):
            if part is not None:
                part.save(folder / name)

    def kept_pool(self, folder: Path) -> Pools:
        """Read both pools."""
        concept, retained = folder / "concept", folder / "retained"
        return TrajectoryPool.load(concept), TrajectoryPool.load(retained) if self.gamma > 0 else None

    def _objective(self, pipe: Any, pool: Pools) -> AdvUnlearnObjective:
        return AdvUnlearnObjective(pipe, self, pool)


Pools = tuple[TrajectoryPool, TrajectoryPool | None]


def attack_space(parts: TextToImage, prompt: str, k: int, position: str) -> TokenSpace:
    """Return the texts that the attacker may write: k places beside a prompt.

    Raises:
        ValueError: they do not fit into the encoder's length.
    """
    tokenizer, (ids,) = parts.tokenizers[0], parts.ids([prompt])
    end = len(tokenizer(prompt).input_ids) - 1
    marks = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    fill = next(i for i in range(len(tokenizer)) if i not in marks)
    slots = insert_slots(ids, k, cast(Position, position), start=1, end=end, fill=fill, length=parts.max_tokens)
    return TokenSpace.vocabulary(*slots, n_tokens=len(tokenizer), banned=marks)


class AdvUnlearnObjective(ErasureObjective):
    """The loss of one step, the attack included; made by :meth:`AdvUnlearn.objective`.

    Args:
        pipe: the pipeline that is edited.
        method: its settings.
        pools: of the concept, and of the retained prompts.
    """

    vectors: Tensor
    attacked: Tensor

    def __init__(self, pipe: Any, method: AdvUnlearn, pools: Pools) -> None:
        parameters = trained_parameters(pipe, method.part, method.layers)
        super().__init__(pipe, method.component, parameters, generator=method.generator)
        method.check(self.parts)
        device, (concept, retained) = self.parts.device, pools
        if method.gamma > 0 and retained is None:
            raise ValueError(f"pools hold no states of retained prompts, with gamma={method.gamma:g}")
        self.method, self.concept = method, concept.to(device)
        self.retained = retained.to(device) if retained is not None else None
        self.spaces = [attack_space(self.parts, prompt, method.k, method.position) for prompt in concept.prompts]
        self.frozen = self.frozen_conditions(concept.prompts)
        self.frozen_retained = None if retained is None else self.frozen_conditions(retained.prompts)
        width = self.parts.embedding_table.shape[1]
        self.register_buffer("vectors", torch.zeros(1, method.k, width, device=device))
        self.register_buffer("attacked", torch.zeros((), dtype=torch.int64))  # the step of the last attack, plus 1

    def attack(self, model: nn.Module, row: int, seed: int) -> Tensor:
        """Return (1, k, D): vectors beside prompt ``row`` with which the student says what the original would.

        Args:
            model: the part that is trained, held still.
            row: which prompt of the concept.
            seed: of start and states.
        """
        method, table = self.method, self.parts.embedding_table.detach()

        def loss(embeddings: Tensor, text: Tensor, draw: int) -> Tensor:
            rows = torch.full((method.batch_size,), row)
            states = self.concept.sample(rows, generator=stream(seed, draw, "attack"))
            condition = self.condition(model, ids=[self.spaces[row].ids], embeddings=embeddings)
            found = self.of_states(model, states, condition.expand(method.batch_size))
            return retain_loss(found, states.told).mean()[None]

        problem = TokenProblem(
            self.spaces[row], embedded=loss, embedding=table, stochastic=True,
            models=(model, self.parts.pipe.unet, self.parts.encoders[0]),
        )  # fmt: skip
        search = replace(method.attack, padding=False)
        if method.start == "latest" and int(self.attacked) > 0:
            search = replace(search, init=self.vectors.clone())
        return search.run(problem, generator=seed).vectors.detach()

    def attacked_condition(self, model: nn.Module, row: int, vectors: Tensor) -> Conditioning:
        """Return the student's condition under the attacked prompt, one row."""
        space = self.spaces[row]
        embeddings = self.parts.embedding_table.detach()[space.ids]
        embeddings[space.slots >= 0] = vectors[0].to(embeddings.dtype)
        return self.condition(model, ids=[space.ids], embeddings=embeddings)

    def erase(self, model: nn.Module, step: int, seed: int) -> Tensor:
        """Return the erasing loss of one step, a scalar; the attack is made here."""
        method = self.method
        period = step // method.attack_every
        row = int(torch.randint(len(self.spaces), (), generator=stream(self.seed, period, "concept")))
        rows = torch.full((method.batch_size,), row)
        states = self.concept.sample(rows, generator=stream(seed, 0, "erase"))
        if step < method.warmup:
            condition = self.told(model, self.concept.prompts, rows, self.frozen)
        else:
            if step % method.attack_every == 0 or int(self.attacked) == 0:
                self.vectors.copy_(self.attack(model, row, derive(seed, "attack")))
                self.attacked.fill_(step + 1)
            condition = self.attacked_condition(model, row, self.vectors).expand(method.batch_size)
        found = self.of_states(model, states, condition)
        return esd_loss(found, states.told, states.untold, eta=method.eta).mean()

    def retain(self, model: nn.Module, step: int, seed: int) -> Tensor:
        """Return the retaining loss of one step, a scalar: prompts without replacement, pass after pass."""
        pool = self.retained
        if pool is None:
            raise ValueError("there are no retained prompts: gamma is 0")
        size = min(self.method.retain_batch, len(pool.prompts))
        lap, place = divmod(step, len(pool.prompts) // size)
        order = torch.randperm(len(pool.prompts), generator=stream(self.seed, lap, "retain"))
        rows = order[place * size : (place + 1) * size]
        states = pool.sample(rows, generator=stream(seed, 1, "retain"))
        found = self.of_states(model, states, self.told(model, pool.prompts, rows, self.frozen_retained))
        return retain_loss(found, states.told).mean()

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the loss of one step; ``batch`` may be empty."""
        method = self.method
        step = int(batch.get("step", self.get_buffer("calls")))
        seed = self.step_seed(batch)
        if method.gamma == 0:
            erase = self.erase(model, step, seed)
            return Loss(erase, {"erase": erase.detach()})
        if method.mode == "iterative":
            turn, by = divmod(step, 2)
            name = "retain" if by else "erase"
            loss = method.gamma * self.retain(model, turn, seed) if by else self.erase(model, turn, seed)
            return Loss(loss, {name: loss.detach()})
        erase, retain = self.erase(model, step, seed), self.retain(model, step, seed)
        return Loss(erase + method.gamma * retain, {"erase": erase.detach(), "retain": retain.detach()})


def plug_in(pipe: Any, text_encoder: Any) -> Any:
    """Return ``pipe`` with another text encoder in place of its own; all other parts are shared.

    Args:
        pipe: another checkpoint.
        text_encoder: such as the one of an edited pipeline.

    Raises:
        ValueError: width, depth, length or vocabulary differ, so that the checkpoint cannot read it.
    """
    mine, theirs = pipe.text_encoder.config, text_encoder.config
    names = ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")
    pairs = {name: (getattr(mine, name), getattr(theirs, name)) for name in names}
    differing = [f"{name}: {other}, not {own}" for name, (own, other) in pairs.items() if own != other]
    if differing:
        raise ValueError(f"text_encoder does not fit the pipeline ({'; '.join(differing)})")
    result = edited_copy(pipe)
    result.text_encoder = text_encoder
    return result
