"""Train against an attacker, with checkpoints: run it again after an interruption and it goes on."""

from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from robust_core.attacks import PGD
from robust_core.data import load
from robust_core.threats import Linf
from robust_core.training import Adversarial, FastPGD, fit

threat = Linf(0.1)
train, test = load("digits", split="train"), load("digits", split="test").subset(range(128))
network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
with TemporaryDirectory() as folder:
    objective = Adversarial(FastPGD(threat, n_iter=5))
    fit(network, train, objective, epochs=8, batch_size=64, checkpoint=Path(folder) / "run")

result = PGD(threat, n_iter=40).run(network.eval(), test.x, test.y, index=test.index)
print(f"clean {(network(test.x).argmax(1) == test.y).double().mean():.1%}, under PGD {result.robust_accuracy:.1%}")
