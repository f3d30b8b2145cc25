"""rRCM: closed forms of grid, schedules and losses, units, what gets gradients, two processes against one."""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from robust_core.data import load
from robust_core.training import fit
from vision_robust.certified.rrcm import (
    RRCM,
    ConsistencySchedule,
    KarrasGrid,
    NoiseConditionedClassifier,
    NoiseViT,
    ProjectedEncoder,
    TargetEmaSchedule,
    TimeConditionedEncoder,
    TimeModulated,
    info_nce,
    noise_vit,
    noisy_point,
    projection_head,
    time_embedding,
)

LIGHT = settings(deadline=None, derandomize=True, max_examples=25)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_encoder(seed: int = 0, width: int = 16) -> TimeConditionedEncoder:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=seeded(seed)))
    return TimeConditionedEncoder(TimeModulated(network, width, width=8, generator=seed))


def small_model(seed: int = 0) -> ProjectedEncoder:
    return ProjectedEncoder(small_encoder(seed), projection_head(16, hidden=24, out=12, generator=seed))


def digits(n: int = 64, split: str = "train") -> tuple[Tensor, Tensor]:
    data = load("digits", split=split)
    return data.x[:n], data.y[:n]


def batch_of(n: int = 32, **more: Any) -> dict[str, Any]:
    x, y = digits(n)
    return {"x": x, "y": y, "index": torch.arange(n), "step": 3, "seed": 1, "share": 0.4, **more}


# -- grid and schedules --


@pytest.mark.quick
def test_grid_ends_at_its_ends_and_falls() -> None:
    for n in (2, 21, 41, 81):
        grid = KarrasGrid(n=n)
        levels = grid.levels()
        assert (float(levels[0]), float(levels[-1])) == (80.0, 0.002)
        assert bool((levels.diff() < 0).all())
    middle = (0.5 * (80 ** (1 / 7) + 0.002 ** (1 / 7))) ** 7
    assert math.isclose(KarrasGrid(n=3)[1], middle, rel_tol=1e-12)


@LIGHT
@given(st.floats(0.002, 80.0), st.integers(2, 81))
def test_nearest_is_the_nearest(t: float, n: int) -> None:
    grid = KarrasGrid(n=n)
    levels = grid.levels()
    assert abs(grid.nearest(t) - t) <= float((levels - t).abs().min()) + 1e-12


def test_levels_outside_the_grid_and_bad_grids_are_refused() -> None:
    for t in (0.001, 81.0, math.nan):
        with pytest.raises(ValueError, match="the grid spans"):
            KarrasGrid().nearest(t)
    with pytest.raises(IndexError, match="levels 0"):
        KarrasGrid(n=5)[5]
    for bad in ({"sigma_min": 0.0}, {"sigma_min": 2.0, "sigma_max": 1.0}, {"n": 1}, {"rho": 0.0}):
        with pytest.raises(ValueError):
            KarrasGrid(**bad)  # pyright: ignore[reportArgumentType]


@pytest.mark.quick
def test_number_of_levels_over_training() -> None:
    assert [ConsistencySchedule(10).size(k) for k in (0, 1, 5, 6, 10)] == [21, 41, 41, 81, 81]
    long = ConsistencySchedule(300_000)
    sizes = [long.at(share) for share in (0.0, 1 / 300_000, 0.43, 0.44, 1.0)]
    assert sizes == [21, 41, 41, 81, 81]
    limit = ConsistencySchedule()
    assert all(limit.at(k / 997) == long.at(k / 997) for k in range(998))
    assert ConsistencySchedule(start=20, end=40).at(1.0) == 41
    with pytest.raises(ValueError, match="total_steps=None"):
        limit.size(3)
    with pytest.raises(ValueError, match="end"):
        ConsistencySchedule(start=20, end=10)


def test_decay_of_the_teacher_rises_between_its_ends() -> None:
    for sharpness in (10.0, 15.0):
        schedule = TargetEmaSchedule(sharpness=sharpness)
        values = [schedule.at(k / 200) for k in range(201)]
        assert values[0] == pytest.approx(0.99, abs=1e-12)
        assert values[-1] == pytest.approx(0.9999, abs=1e-6 if sharpness == 15 else 1e-5 * 0.99)
        assert all(a <= b <= 0.9999 for a, b in pairwise(values))
    k = 0.3
    e = math.sqrt(k * (0.9999**2 - 0.99**2) + 0.99**2)
    c = 2 / (1 + math.exp(-15 * (e - 0.99) / 0.0099)) - 1
    assert TargetEmaSchedule().at(k) == pytest.approx(c * 0.9999 + (1 - c) * 0.99, rel=1e-12)
    assert TargetEmaSchedule(0.95, 0.95).at(0.7) == 0.95


# -- InfoNCE --


@pytest.mark.quick
@LIGHT
@given(st.integers(2, 12), st.floats(0.05, 2.0))
def test_info_nce_of_orthonormal_rows(n: int, tau: float) -> None:
    eye = torch.eye(n, dtype=torch.float64)
    expected = math.log1p((n - 1) * math.exp(-1 / tau))
    assert float(info_nce(7 * eye, eye, tau=tau)) == pytest.approx(expected, rel=1e-9)


def test_info_nce_is_the_slow_sum_and_keys_get_no_gradient() -> None:
    q, k = (torch.randn(5, 7, generator=seeded(i), dtype=torch.float64, requires_grad=True) for i in (1, 2))
    found = info_nce(q, k)
    a, b = (v.detach() / v.detach().norm(dim=1, keepdim=True) for v in (q, k))
    terms = [
        math.log(sum(math.exp(float(a[j] @ b[m]) / 0.2) for m in range(5))) - float(a[j] @ b[j]) / 0.2 for j in range(5)
    ]
    assert float(found.detach()) == pytest.approx(sum(terms) / 5, rel=1e-12)
    found.backward()
    assert q.grad is not None
    assert k.grad is None
    shuffled = torch.tensor([3, 1, 4, 0, 2])
    inverse = shuffled.argsort()
    moved = info_nce(q, k[shuffled], positives=inverse)
    torch.testing.assert_close(moved, found)


def test_info_nce_refuses_what_has_nothing_to_be_told_from() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        info_nce(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"\(B, D\)"):
        info_nce(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="tau"):
        info_nce(torch.ones(2, 3), torch.ones(2, 3), tau=0.0)


# -- encoder and units --


def test_points_of_one_trajectory_differ_by_the_noise_alone() -> None:
    x, e = torch.rand(2, 4, 1, 8, 8, generator=seeded(0), dtype=torch.float64)
    difference = noisy_point(x, 3.0, e) - noisy_point(x, 1.25, e)
    torch.testing.assert_close(difference, 1.75 * e)
    per_row = noisy_point(x, torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64), e)
    torch.testing.assert_close(per_row[2], x[2] + 2 * e[2])


class Spy(nn.Module):
    """Remember what a backbone is given."""

    n_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.seen.append((x.clone(), time.clone()))
        return x.flatten(1)


@pytest.mark.quick
def test_sigma_on_images_is_twice_that_on_normalised_inputs() -> None:
    spy = Spy()
    encoder = TimeConditionedEncoder(spy)
    classifier = NoiseConditionedClassifier(encoder, nn.Linear(64, 10), 0.25)
    assert encoder.level(0.25) == 0.5
    assert classifier.t == KarrasGrid().nearest(0.5)
    x, noise = torch.rand(3, 1, 8, 8), torch.randn(3, 1, 8, 8, generator=seeded(0))
    torch.testing.assert_close(encoder.normalise(x + 0.25 * noise), noisy_point(encoder.normalise(x), 0.5, noise))
    classifier(x)
    scaled, time = spy.seen[0]
    torch.testing.assert_close(scaled, (2 * x - 1) / math.sqrt(classifier.t**2 + 0.25))
    torch.testing.assert_close(time, torch.full((3,), 250 * math.log(classifier.t)))
    other = TimeConditionedEncoder(Spy(), mean=[0.1, 0.2, 0.3], std=0.25)
    assert other.level(0.25) == 1.0
    colour = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(other.normalise(colour)[:, 2], (colour[:, 2] - 0.3) / 0.25)


def test_scaled_inputs_have_one_size_at_every_level() -> None:
    spy = Spy()
    encoder = TimeConditionedEncoder(spy)
    x, e = 0.5 * torch.randn(200, 1, 8, 8, generator=seeded(0)), torch.randn(200, 1, 8, 8, generator=seeded(1))
    for t in (0.002, 0.5, 80.0):
        encoder(noisy_point(x, t, e), t)
    assert all(abs(float(scaled.std()) - 1) < 0.02 for scaled, _ in spy.seen)
    assert float(spy.seen[0][1][0]) == pytest.approx(250 * math.log(0.002), rel=1e-5)  # about -1554


def test_time_embedding_tells_negative_times_and_fractions_apart() -> None:
    times = torch.tensor([-1553.65, -1553.4, 0.0, 0.25, 1095.5])
    found = time_embedding(times, 9)
    assert found.shape == (5, 9)
    assert float(torch.cdist(found, found)[~torch.eye(5, dtype=torch.bool)].min()) > 0.05
    assert torch.equal(found[:, 8], torch.zeros(5))
    torch.testing.assert_close(found[3, [0, 4]], torch.tensor([math.cos(0.25), math.sin(0.25)]))


def test_vit_has_two_more_tokens_than_patches_and_knows_the_level() -> None:
    vit = noise_vit("tiny", 8, 2, channels=1, depth=1)
    assert vit.positions.shape == (1, 2 + 16, 64)
    encoder = TimeConditionedEncoder(vit)
    x = torch.rand(3, 1, 8, 8, generator=seeded(0))
    with torch.no_grad():
        features, other = encoder(x, 0.5), encoder(x, 0.6)
    assert features.shape == (3, 64)
    assert float((features - other).abs().max()) > 1e-3
    torch.testing.assert_close(encoder(x, torch.full((3,), 0.5)), features)
    torch.testing.assert_close(encoder(x[1:2], 0.5), features[1:2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.double()(x.double(), 0.5).float(), features, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="images"):
        vit(torch.rand(2, 1, 9, 8), torch.zeros(2))
    with pytest.raises(ValueError, match="divide"):
        NoiseViT(9, 2)
    with pytest.raises(ValueError, match="size='huge'"):
        noise_vit("huge", 8, 2)


def test_frozen_patches_stay_as_they_are() -> None:
    vit = NoiseViT(8, 4, channels=1, dim=8, depth=1, heads=2, frozen_patches=True)
    assert not any(p.requires_grad for p in vit.patches.parameters())
    assert sum(len(layer) for layer in vit.layers()) == len(list(vit.parameters()))


def test_a_backbone_without_time_begins_as_itself_and_learns_the_level() -> None:
    encoder = small_encoder()
    modulated = encoder.backbone
    assert isinstance(modulated, TimeModulated)
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(modulated(x, torch.zeros(4)), modulated.backbone(x))
    with torch.no_grad():
        modulated.modulation[2].bias.fill_(0.5)  # pyright: ignore
    torch.testing.assert_close(modulated(x, torch.zeros(4)), 1.5 * modulated.backbone(x) + 0.5)
    wrong = TimeModulated(nn.Flatten(), 10)
    with pytest.raises(ValueError, match="take off its head"):
        wrong(x, torch.zeros(4))
    with pytest.raises(TypeError, match="no n_features"):
        _ = TimeConditionedEncoder(nn.Flatten()).n_features


# -- pre-training --


def ready(model: nn.Module, **more: Any) -> RRCM:
    objective = RRCM(**more)
    objective.setup(model, 1000, 10)
    return objective


class Recorder(ProjectedEncoder):
    """Remember levels, noise and whether a gradient is wanted."""

    def __init__(self, inner: ProjectedEncoder) -> None:
        super().__init__(inner.encoder, inner.projector)
        self.seen: list[tuple[float, Tensor, bool, bool]] = []

    def forward(
        self, x: Tensor, t: Tensor | float | None = None, noise: Tensor | None = None, *, project: bool = True
    ) -> Tensor:
        assert noise is not None
        self.seen.append((float(t), noise.clone(), project, torch.is_grad_enabled()))  # pyright: ignore
        return super().forward(x, t, noise, project=project)


def test_one_noise_serves_all_levels_and_one_level_the_whole_batch() -> None:
    model = Recorder(small_model()).train()
    objective = ready(model)
    objective(model, batch_of())
    objective(model, batch_of(step=4))
    first, second = model.seen[:4], model.seen[4:]
    for passes in (first, second):
        assert all(torch.equal(noise, passes[0][1]) for _, noise, _, _ in passes)
        assert [t for t, *_ in passes[:2]] == [0.002, 0.002]
        assert [project for *_, project, _ in passes] == [True, True, False, False]
        assert [wanted for *_, wanted in passes] == [True, True, False, True]  # no gradient at the cleaner level
        levels = KarrasGrid(n=41).levels().tolist()
        cleaner, noisier = passes[2][0], passes[3][0]
        place = min(range(41), key=lambda i: abs(levels[i] - noisier))
        assert noisier == pytest.approx(levels[place], rel=1e-6)
        assert cleaner == pytest.approx(levels[place + 1], rel=1e-6)
    assert not torch.equal(first[0][1], second[0][1])
    flat = torch.cat([p[0][1].flatten() for p in (first, second)])
    assert abs(float(flat.std()) - 1) < 0.05


def test_levels_are_uniform_over_the_grid() -> None:
    model = Recorder(small_model()).train()
    objective = ready(model)
    for step in range(150):
        objective(model, batch_of(8, step=step, share=0.0))
    levels = KarrasGrid(n=21).levels()
    drawn = [int((levels - model.seen[4 * k + 3][0]).abs().argmin()) for k in range(150)]
    assert min(drawn) <= 1
    assert max(drawn) in (18, 19)
    assert abs(sum(drawn) / 150 - 9.5) < 3 * 5.77 / math.sqrt(150)


def test_the_loss_is_the_sum_of_its_formulas() -> None:
    model = small_model().double().train()
    x, y = digits(16)
    views = {"strong_0": x.flip(3).double(), "strong_1": x.flip(2).double(), "weak": (0.9 * x).double()}
    batch = {"x": x.double(), "y": y, "step": 5, "share": 0.0, **views}
    objective = ready(model, generator=2)
    with torch.no_grad():
        for parameter in objective.target.module.parameters():
            parameter.mul_(1.1)  # so that student and teacher differ
    recorder = Recorder(model)
    found = objective(recorder.train(), batch)
    noise, cleaner, noisier = recorder.seen[0][1], recorder.seen[2][0], recorder.seen[3][0]
    teacher: Any = objective.target.module

    def point(name: str, t: float) -> Tensor:
        return 2 * views[name] - 1 + t * noise

    def features(net: Any, name: str, t: float) -> Tensor:
        return net.encoder(point(name, t), t)

    p, q = (net.projector(features(net, "strong_0", 0.002)) for net in (model, teacher))
    r, s = (net.projector(features(net, "strong_1", 0.002)) for net in (model, teacher))

    def slow(a: Tensor, b: Tensor) -> Tensor:
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
        scores = a @ b.T / 0.2
        return (scores.logsumexp(1) - scores.diagonal()).mean()

    contrast = slow(p, s) + slow(r, q)
    consistency = slow(features(model, "weak", noisier), features(model, "weak", cleaner))
    torch.testing.assert_close(found.parts["contrast"], contrast.detach())
    torch.testing.assert_close(found.parts["consistency"], consistency.detach())
    torch.testing.assert_close(found.total, contrast + consistency)


@pytest.mark.quick
def test_the_teacher_gets_no_gradient_and_follows_at_the_decay_of_the_moment() -> None:
    model = small_model().train()
    objective = ready(model, decay=TargetEmaSchedule(0.9, 0.99))
    before = [p.clone() for p in objective.target.module.parameters()]
    objective(model, batch_of(share=0.25)).total.backward()
    assert all(p.grad is None and not p.requires_grad for p in objective.target.parameters())
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    objective.after_step(model, 0)
    decay = TargetEmaSchedule(0.9, 0.99).at(0.25)
    for old, new in zip(before, objective.target.module.parameters(), strict=True):
        torch.testing.assert_close(new, old + (1 - decay))


def test_without_consistency_features_at_noise_are_not_asked_for() -> None:
    model = Recorder(small_model()).train()
    loss = ready(model, consistency_weight=0.0)(model, batch_of())
    assert len(model.seen) == 2
    assert set(loss.parts) == {"contrast"}


def test_independent_noise_would_be_another_loss() -> None:
    """The trap of the method: with the same trajectory, neighbours agree far better than with fresh noise."""
    model = small_model().eval()
    x = digits(32)[0]
    grid, e = KarrasGrid(n=41), torch.randn(2, 32, 1, 8, 8, generator=seeded(0))
    with torch.no_grad():
        noisy, same, fresh = (model(x, grid[i], n, project=False) for i, n in ((15, e[0]), (16, e[0]), (16, e[1])))
    assert float(info_nce(noisy, same)) < 0.5 * float(info_nce(noisy, fresh))


def test_shares_of_the_batch_give_the_gradient_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes by hand: each has every second row as queries, and the keys of all."""
    from vision_robust.certified.rrcm import objective as module

    model = small_model().eval()
    objective = ready(model)
    student, teacher = torch.randn(2, 7, 12, generator=seeded(3), dtype=torch.float64)
    whole = objective._contrast(student, teacher)
    monkeypatch.setattr(module, "gather_rows", lambda rows: teacher)
    monkeypatch.setattr(module, "world", lambda: 2)
    parts = []
    for number in range(2):
        monkeypatch.setattr(module, "rank", lambda number=number: number)
        parts.append(objective._contrast(student[number::2], teacher[number::2]))
    torch.testing.assert_close((4 * parts[0] + 3 * parts[1]) / 7, whole)


def test_pretraining_refuses_what_it_cannot_use() -> None:
    with pytest.raises(TypeError, match="ProjectedEncoder"):
        RRCM().setup(nn.Linear(2, 2), 10, 2)
    with pytest.raises(TypeError, match="wrap it"):
        ProjectedEncoder(nn.Linear(2, 2))  # pyright: ignore
    with pytest.raises(ValueError, match="call setup"):
        RRCM()(small_model(), batch_of())
    model = ProjectedEncoder(small_encoder(), nn.Linear(16, 4)).train()
    with pytest.raises(ValueError, match="at least 2"):
        ready(model)(model, batch_of(1))
    with pytest.raises(ValueError, match="NaN"):
        ready(model)(model, batch_of(x=torch.full((32, 1, 8, 8), torch.nan)))


def test_an_interrupted_pretraining_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    def run(folder: str, **more: Any) -> dict[str, Tensor]:
        model, objective = small_model(), RRCM(generator=4)
        fit(model, digits(48), objective, epochs=3, batch_size=16, generator=1, checkpoint=tmp_path / folder, **more)
        return {**model.state_dict(), **{f"o.{k}": v for k, v in objective.state_dict().items()}}

    whole = run("whole")
    run("cut", on_step=lambda state, loss: state.step != 4)
    resumed = run("cut")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


# -- two real processes --

_SCRIPT = """
import json, os, sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from robust_core.training import fit
from vision_robust.certified.rrcm import RRCM, ProjectedEncoder, TimeConditionedEncoder, TimeModulated

alone = "RANK" not in os.environ
if not alone:
    where = f"file://{sys.argv[1]}/rendezvous"
    dist.init_process_group("gloo", init_method=where, rank=int(os.environ["RANK"]), world_size=2)
rank = 0 if alone else dist.get_rank()
draw = torch.Generator().manual_seed(99 if rank else 0)  # the others must take rank 0's weights
network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8))
encoder = TimeConditionedEncoder(TimeModulated(network, 8, width=4))
model = ProjectedEncoder(encoder, nn.Linear(8, 6, bias=False))  # no batch norm: its statistics would be each one's own
with torch.no_grad():
    for parameter in model.parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=draw))
x = torch.rand(23, 1, 4, 4, generator=torch.Generator().manual_seed(1))
objective = RRCM(generator=5)
fit(model, (x, torch.zeros(23, dtype=torch.int64)), objective, epochs=2, batch_size=9, generator=2, n_classes=2,
    optimiser=lambda p: torch.optim.SGD(p, lr=0.05))
state = {**model.state_dict(), **{f"o.{k}": v for k, v in objective.state_dict().items()}}
path = Path(sys.argv[1], f"{'alone' if alone else rank}.json")
path.write_text(json.dumps({k: v.tolist() for k, v in state.items()}))
if not alone:
    dist.barrier()
    dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # threads of gloo may outlive the group, and abort an interpreter that is taken down around them
"""


def test_two_processes_pretrain_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train.py"
    script.write_text(_SCRIPT)
    command = [sys.executable, str(script), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(command, env={**environment, "RANK": r}, stderr=subprocess.PIPE) for r in ("0", "1")]
    monkeypatch.setattr(sys, "argv", command[1:])
    runpy.run_path(str(script))
    for process in started:
        error = process.communicate(timeout=240)[1]
        assert process.returncode == 0, error[-3000:]
    alone, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "0", "1"))
    assert first == second
    assert alone.keys() == first.keys()
    for key in alone:
        torch.testing.assert_close(torch.tensor(alone[key]), torch.tensor(first[key]), rtol=1e-4, atol=1e-5)
