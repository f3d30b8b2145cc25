"""Break a network of your own and look at what broke it."""

from torch import nn

from robust_core.attacks import AutoAttack
from robust_core.data import load
from robust_core.models import Normalize
from robust_core.threats import Linf
from robust_core.training import Standard, fit

train, test = load("digits", split="train"), load("digits", split="test").subset(range(64))
network = nn.Sequential(Normalize([0.3], [0.38]), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
fit(network, train, Standard(), epochs=8, batch_size=64)

result = AutoAttack(Linf(0.1), version="fast").run(network.eval(), test.x, test.y, index=test.index)
print(f"accuracy left at Linf 0.1: {result.robust_accuracy:.1%}")
for name in sorted(set(result.found_by) - {""}):
    print(f"  {name} broke {result.found_by.count(name)}")
