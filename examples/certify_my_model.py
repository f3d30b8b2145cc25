"""Train for certificates, then prove what no attack can do."""

from torch import nn

from robust_core.certificates import Crown, Smoothing
from robust_core.data import load
from robust_core.threats import Linf
from robust_core.training import GaussianNoise, fit

train, test = load("digits", split="train"), load("digits", split="test").subset(range(48))
network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
fit(network, train, GaussianNoise(0.25), epochs=15, batch_size=64)
network.eval()

voted = Smoothing(network, sigma=0.25, n_samples=2000).certify(test.x, test.y)
proved = Crown(network, Linf(0.01)).certify(test.x, test.y)
for radius in (0.1, 0.25, 0.5):
    print(f"L2 {radius}: {voted.accuracy(test.y, radius):.0%} certified for the network under noise")
print(f"Linf 0.01: {proved.accuracy(test.y, 0.01):.0%} proved for the network itself")
