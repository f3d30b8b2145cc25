"""rRCM: fine-tuning, the classifier that is certified and its cost, full scale and the command line."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust_core.certificates import Smoothing
from robust_core.data import load
from robust_core.data.views import flip
from robust_core.models import fingerprint
from robust_core.settings import NoSettings
from robust_core.threats import L2
from robust_core.training import NoiseConsistency, cosine, fit, scheduled
from vision_robust.certified.denoised_smoothing import Denoised, DiffusionDenoiser
from vision_robust.certified.rrcm import (
    PRESETS,
    RRCM,
    ConsistencySchedule,
    NoiseConditionedClassifier,
    NoiseViT,
    ProjectedEncoder,
    SmoothedFineTuning,
    StrongViews,
    TargetEmaSchedule,
    TimeConditionedEncoder,
    TimeModulated,
    layerwise_adamw,
    projection_head,
)
from vision_robust.recipes.base import Job, Proof
from vision_robust.recipes.rrcm import RECIPE, Settings, restore


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_encoder(seed: int = 0, width: int = 16) -> TimeConditionedEncoder:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=seeded(seed)))
    return TimeConditionedEncoder(TimeModulated(network, width, width=8, generator=seed))


def digits(n: int = 64, split: str = "train") -> tuple[Tensor, Tensor]:
    data = load("digits", split=split)
    return data.x[:n], data.y[:n]


def batch_of(n: int = 32, **more: Any) -> dict[str, Any]:
    x, y = digits(n)
    return {"x": x, "y": y, "index": torch.arange(n), "step": 3, "seed": 1, "share": 0.4, **more}


# -- fine-tuning --


@pytest.mark.quick
def test_without_mixing_it_is_cores_consistency_at_the_papers_weights() -> None:
    classifier = NoiseConditionedClassifier.build(small_encoder(), 10, 0.25).train()
    batch = batch_of()
    assert [SmoothedFineTuning(s).lam for s in (0.25, 0.5, 1.0)] == [10.0, 20.0, 20.0]
    objective = SmoothedFineTuning(0.25, generator=3)
    objective.setup(classifier, 100, 10)
    core = NoiseConsistency(0.25, 2, 10.0, entropy=0.5)
    core.seed = objective.seed
    found = objective(classifier, batch)
    expected = core(classifier, {**batch, "step": 0, "seed": objective.step_seed(batch)})
    torch.testing.assert_close(found.total, expected.total)
    with pytest.raises(ValueError, match=r"made for 0\.25"):
        SmoothedFineTuning(0.5).setup(classifier, 100, 10)


def test_mixing_gives_soft_labels_that_sum_to_one_and_leaves_global_state() -> None:
    x, y = digits(32)
    objective = SmoothedFineTuning(0.25, mixup=0.8, cutmix=1.0)
    with pytest.raises(ValueError, match="call setup"):
        objective.mix(x, y, 0)
    objective.setup(nn.Identity(), 100, 10)
    state = torch.get_rng_state()
    kinds = set()
    for seed in range(12):
        mixed, soft = objective.mix(x, y, seed)
        assert mixed.shape == x.shape
        torch.testing.assert_close(soft.sum(1), torch.ones(32))
        again = objective.mix(x, y, seed)
        assert torch.equal(again[0], mixed)
        own = soft[torch.arange(32), y]
        blend = own.min() * x + (1 - own.min()) * x.roll(1, 0)
        pasted = ((mixed == x) | (mixed == x.roll(1, 0))).all()
        kinds.add("cutmix" if pasted else "mixup")
        assert bool(pasted) or torch.allclose(mixed, blend, atol=1e-5)
    assert kinds == {"mixup", "cutmix"}
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="labels"):
        objective.mix(x, y + 100, 0)


def test_earlier_layers_learn_more_slowly() -> None:
    vit = NoiseViT(8, 4, channels=1, dim=8, depth=3, heads=2)
    classifier = NoiseConditionedClassifier.build(TimeConditionedEncoder(vit), 10, 0.25)
    optimiser = layerwise_adamw(classifier, 1.0, decay=0.5, weight_decay=0.1)(classifier.parameters())
    rate = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    assert len(rate) == len(list(classifier.parameters()))
    net = classifier.encoder.backbone
    assert isinstance(net, NoiseViT)
    assert rate[id(classifier.head.weight)] == 1.0  # pyright: ignore
    assert rate[id(net.norm.weight)] == 0.5
    assert [rate[id(block.qkv.weight)] for block in net.blocks] == [0.0625, 0.125, 0.25]  # pyright: ignore
    assert rate[id(net.cls)] == rate[id(net.patches.weight)] == 0.03125
    some = layerwise_adamw(classifier, 1.0, decay=0.5)(classifier.head.parameters())
    assert [group["lr"] for group in some.param_groups] == [1.0]
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    rates = [group["lr"] for group in layerwise_adamw(plain, 1.0, decay=0.5)(plain.parameters()).param_groups]
    assert rates == [1.0, 0.5]


# -- classifier and cost --


def test_head_begins_near_zero_on_a_copy_of_the_encoder() -> None:
    encoder = small_encoder()
    classifier = NoiseConditionedClassifier.build(encoder, 10, 0.5, generator=1)
    weight = classifier.head.weight
    assert isinstance(weight, Tensor)
    assert 1e-5 < float(weight.detach().std()) < 3e-5
    with torch.no_grad():
        next(classifier.encoder.parameters()).add_(1)
    assert not torch.equal(next(classifier.encoder.parameters()), next(encoder.parameters()))
    with pytest.raises(ValueError, match="the grid spans"):
        NoiseConditionedClassifier.build(encoder, 10, 50.0)
    with pytest.raises(TypeError, match="wrap it"):
        NoiseConditionedClassifier(nn.Flatten(), nn.Linear(64, 10), 0.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="final_norm"):
        NoiseConditionedClassifier.build(encoder, 10, 0.5, final_norm=False)
    vit = TimeConditionedEncoder(NoiseViT(8, 4, channels=1, dim=8, depth=1, heads=2))
    bare = NoiseConditionedClassifier.build(vit, 10, 0.5, final_norm=False)
    assert isinstance(bare.encoder.backbone.norm, nn.Identity)
    assert isinstance(vit.backbone.norm, nn.LayerNorm)
    assert bare(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_the_level_belongs_to_the_function_that_is_certified() -> None:
    encoder, head = small_encoder(), nn.Linear(16, 10)
    one, two = (NoiseConditionedClassifier(encoder, head, sigma) for sigma in (0.25, 0.5))
    assert fingerprint(one) != fingerprint(two)
    assert fingerprint(one) == fingerprint(copy.deepcopy(one))
    assert isinstance(one.smoothing(n_samples=10), Smoothing)
    assert one.smoothing().sigma == 0.25


def test_one_pass_for_each_noisy_sample_where_a_denoiser_takes_many() -> None:
    x, _ = digits(6, "test")
    classifier = NoiseConditionedClassifier.build(small_encoder(), 10, 0.25).eval()
    rows = {"mine": 0, "theirs": 0}

    def count(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            rows[name] += len(inputs[0])

        return hook

    classifier.encoder.backbone.register_forward_pre_hook(count("mine"))
    with torch.no_grad():
        classifier(x)
    assert rows["mine"] == 6
    steps = 5

    class Silence(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.zeros_like(x)

    network, behind = Silence(), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for part in (network, behind):
        part.register_forward_pre_hook(count("theirs"))
    alphas = torch.linspace(0.9999, 0.01, 100, dtype=torch.float64)
    with torch.no_grad():
        Denoised(DiffusionDenoiser(network, alphas, 0.25, n_steps=steps), behind)(x)
    assert rows["theirs"] == (steps + 1) * 6
    rows["mine"] = 0
    certificate = classifier.smoothing(n0=32, n_samples=64, give_up=0.0).certify(x)
    overhead = 8 + 6 * 32  # the probe of the model, and what pads batches
    assert 6 * (32 + 64) <= rows["mine"] <= 6 * (32 + 64) + overhead
    assert certificate.cost["forwards"] == 6 * (32 + 64)


@pytest.mark.quick
def test_training_end_to_end_certifies_and_an_attacker_fails() -> None:
    data, test = load("digits", split="train"), digits(48, "test")
    model = ProjectedEncoder(small_encoder(width=32), projection_head(32, hidden=32, out=16))
    objective = RRCM(views=(flip,), sizes=ConsistencySchedule(start=20, end=40), decay=TargetEmaSchedule(0.9, 0.99))
    losses: list[float] = []
    fit(model, data, objective, epochs=6, batch_size=128, optimiser=partial(torch.optim.AdamW, lr=3e-3), clip_norm=2.0,
        on_step=lambda _, loss: losses.append(float(loss.total)))  # fmt: skip
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])
    classifier = NoiseConditionedClassifier.build(model.encoder, 10, 0.25)
    fit(classifier, data, SmoothedFineTuning(0.25, lam=2.0, entropy=0.0), epochs=8, batch_size=64,
        optimiser=layerwise_adamw(classifier, 5e-3), schedule=scheduled(cosine()))  # fmt: skip
    certificate = classifier.eval().certify(*test, n_samples=500)
    assert certificate.accuracy(test[1], 0.0) > 0.75
    assert certificate.accuracy(test[1], 0.25) > 0.4
    assert certificate.about.function == "smoothed"
    with pytest.warns(UserWarning, match=r"not \[0, 1\]"):
        classifier.certify(2 * test[0][:2] - 1, n_samples=20)


# -- full scale --


def test_torchvision_views_are_two_crops_and_the_centre() -> None:
    x = torch.rand(3, 40, 48, generator=seeded(0))
    made = StrongViews(16)
    data = [(x, 0), (x.flip(2), 1), (0.5 * x, 1), (1 - x, 0)]
    seen: list[dict[str, Any]] = []

    class Look(nn.Module):
        def forward(self, model: nn.Module, batch: dict[str, Any]) -> Any:
            seen.append(batch)
            from robust_core.training import Loss

            return Loss(model(batch["x"]).square().mean())

    fit(nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), data, Look(), epochs=1, batch_size=4, transform=made)
    batch = seen[0]
    assert batch["x"].shape == batch["strong_0"].shape == batch["strong_1"].shape == (4, 3, 16, 16)
    assert not torch.equal(batch["strong_0"], batch["strong_1"])
    assert 0 <= float(batch["strong_0"].min()) <= float(batch["strong_0"].max()) <= 1


class _Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images of the true shape."""

    def __init__(self, n: int, side: int) -> None:
        self.n, self.side = n, side

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.rand(3, self.side, self.side, generator=seeded(i)), i % 3


def test_presets_are_the_papers_tables() -> None:
    cifar, base, small = (PRESETS[name] for name in ("cifar10-base", "imagenet-base", "imagenet-small"))
    told = cifar.pretraining(50_000)
    assert told["epochs"] * 25 == 300_000
    assert told["objective"].sizes.total_steps == 300_000
    assert (told["batch_size"], told["clip_norm"], told["optimiser"].keywords["lr"]) == (2048, 2.0, 1e-4)
    with torch.device("meta"):
        backbones = [NoiseViT(32, 4), NoiseViT(224, 16), NoiseViT(224, 16, dim=512, depth=6, heads=8)]
    assert [b.positions.shape[1:] for b in backbones] == [(66, 768), (198, 768), (198, 512)]
    assert base.frozen_patches
    assert not small.frozen_patches
    assert base.by_sigma[0.5].epochs == 50
    encoder = TimeConditionedEncoder(NoiseViT(8, 4, dim=8, depth=1, heads=2))
    tuned = small.tuning(small.classifier(encoder, 5, 1.0), 100)
    assert (tuned["epochs"], tuned["batch_size"], tuned["objective"].lam) == (150, 256, 20.0)
    assert tuned["objective"].mixing == {"mixup": 0.8, "cutmix": 1.0}
    with pytest.raises(ValueError, match=r"sigma=0\.3"):
        cifar.tuning(NoiseConditionedClassifier(encoder, nn.Linear(8, 5), 0.3), 100)


def test_two_steps_of_the_full_recipe_on_data_of_the_true_shape() -> None:
    preset, data = replace(PRESETS["cifar10-base"], size="small", hidden=256), _Images(2, 32)
    model = ProjectedEncoder(preset.encoder(), projection_head(512, hidden=preset.hidden))
    before = model.encoder.backbone.positions.detach().clone()  # pyright: ignore
    state = fit(model, data, **preset.pretraining(2), on_step=lambda state, _: state.step < 2)
    assert state.step == 2
    assert not torch.equal(before, model.encoder.backbone.positions)  # pyright: ignore
    classifier = preset.classifier(model.encoder, 3, 0.25)
    state = fit(classifier, data, **preset.tuning(classifier, 2), n_classes=3, on_step=lambda state, _: state.step < 2)
    assert state.step == 2
    assert classifier.smoothing(n_samples=8, n0=4).certify(data[0][0][None]).cost["forwards"] >= 4


def test_the_claim_measures_what_it_states(monkeypatch: pytest.MonkeyPatch) -> None:
    from vision_robust.claims import rrcm as claim

    setting = claim._setting("quick")
    small = replace(setting, test=setting.test.subset(range(24)), n_samples=40)
    monkeypatch.setattr(claim, "_setting", lambda scale: small)
    monkeypatch.setattr(claim, "STEPS", 6)
    monkeypatch.setattr(claim, "TUNING_STEPS", 15)
    figures = claim.run(5, "quick")
    stated = {n for s in claim.STATEMENTS for n in ((s.figure,) if isinstance(s.figure, str) else s.figure)}
    assert stated == set(figures.measured) == set(figures.baseline)
    named = {gate.name: gate.passed for gate in figures.gates}
    assert named.pop("no attack inside a certified radius") in (True, False)  # after 15 steps little is certified
    assert named
    assert all(named.values())


# -- command line --


def job_for(folder: Path, model: nn.Module | None = None, words: str | None = None) -> Job:
    data = load("digits", split="train").subset(range(96))
    folder.mkdir()
    return Job(
        model=model, words=words, weights=None, train=data, threat=L2(0.25), sigma=0.25, epochs=1, learning_rate=1e-3,
        batch_size=48, precision="float32", seed=3, device=torch.device("cpu"), out=folder,
        load=lambda part, n: data, on_step=lambda what, done, total: None,
    )  # fmt: skip


def backbone() -> nn.Module:
    """What ``--model`` would name: features come out."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh())


def test_what_the_command_trains_comes_back_from_disk_as_the_same_function(tmp_path: Path) -> None:
    settings = Settings(patch=4, pretraining_epochs=1, pretraining_batch_size=48, hidden=16, final_norm=False)
    words = f"{__name__}:backbone"
    for name, job in (
        ("vit", job_for(tmp_path / "vit")),
        ("own", job_for(tmp_path / "own", backbone(), words)),
    ):
        trained = RECIPE.harden(job, settings)  # pyright: ignore[reportOptionalCall]
        config = json.loads(json.dumps(trained.config))
        assert config["backbone"] == (None if name == "vit" else words)
        if name == "own":
            continue
        again = restore(config, job.out)
        again.load_state_dict(trained.model.state_dict())
        assert fingerprint(again.eval()) == fingerprint(trained.model)
        proof = Proof(L2(0.25), sigma=0.9, n_samples=50)
        certifier = RECIPE.certifier(again, proof, NoSettings())  # pyright: ignore[reportOptionalCall]
        assert isinstance(certifier, Smoothing)
        assert (certifier.sigma, certifier.n_samples) == (0.25, 50)
    with pytest.raises(TypeError, match="saved:FOLDER"):
        RECIPE.certifier(nn.Linear(2, 2), Proof(L2(0.25)), NoSettings())  # pyright: ignore[reportOptionalCall]
    with pytest.raises(ValueError, match="needs"):
        restore({"size": "tiny"}, tmp_path)


def test_one_pretrained_encoder_serves_another_run(tmp_path: Path) -> None:
    first = job_for(tmp_path / "first")
    RECIPE.harden(first, Settings(patch=4, pretraining_epochs=1, pretraining_batch_size=48, hidden=16))  # pyright: ignore
    second, told = job_for(tmp_path / "second"), str(first.out / "encoder.safetensors")
    RECIPE.harden(replace(second, sigma=0.5), Settings(patch=4, pretrained=told))  # pyright: ignore
    assert (second.out / "encoder.safetensors").read_bytes() == Path(told).read_bytes()
    assert not (second.out / "pretraining.jsonl").exists()
    with pytest.raises(ValueError, match="no such file"):
        Settings(pretrained=str(tmp_path / "nothing.safetensors"))
