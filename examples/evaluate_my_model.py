"""One report with everything, in a folder that can be sent to a colleague."""

from tempfile import TemporaryDirectory

from robust_core.data import load
from robust_core.evaluation import Adversarial, Calibration, Clean, Corruptions, evaluate
from robust_core.testing.tiny import digits_cnn
from robust_core.threats import Linf

parts = [
    Clean(),
    Calibration(),
    Adversarial(Linf(0.05), version="fast"),
    Corruptions(profile="small", names=["gaussian_noise", "contrast"], severities=[1, 3, 5]),
]
report = evaluate(digits_cnn("adversarial"), load("digits", split="test").subset(range(64)), parts)
with TemporaryDirectory() as folder:
    print(report.save(folder))
print(report)
