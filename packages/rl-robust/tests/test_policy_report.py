"""A policy's report: paired figures, honest headlines, a page that can be shown."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from rl_robust.evaluation import PolicyReport, evaluate
from rl_robust.observation import EpisodeBudget, View
from rl_robust.policy import NetworkPolicy
from rl_robust.task import Task
from robust_core.errors import UntrustedFileError


@dataclass(frozen=True)
class Push:
    """Pushes the pole's angle one way for the whole episode."""

    budget: EpisodeBudget
    share: float = 0.2

    def perturb(self, view: View) -> Tensor:
        direction = torch.tensor([0.0, 0.0, 1.0, 0.0])
        return view.obs + self.share * self.budget.eps * direction


def balance() -> NetworkPolicy:
    net = nn.Linear(4, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, -0.2, -1, -1], [0.0, 0.2, 1, 1]]))
        net.bias.zero_()
    return NetworkPolicy(net, spaces.Discrete(2))


@pytest.mark.quick
def test_a_report_says_what_attacks_leave(tmp_path: Path) -> None:
    task = Task("CartPole-v1", max_steps=60)
    attacks = {"none": Push(EpisodeBudget(0.0)), "push": Push(EpisodeBudget(2.0))}
    report = evaluate(balance(), task, attacks, n_episodes=40, generator=3, name="a <policy>")
    assert report["none/lost"].value == 0
    assert report["push/return"].value < report["clean/return"].value
    assert report["worst/return"].value == report["push/return"].value
    assert report["worst/tried"].value == 2
    assert report["push/spent"].value <= 2.0
    folder = report.save(tmp_path / "out")
    again = PolicyReport.load(folder)
    assert again.document == report.document
    np.testing.assert_array_equal(again.arrays["push/returns"], report.arrays["push/returns"])
    page = (folder / "report.html").read_text()
    assert "a &lt;policy&gt; on CartPole-v1" in page
    assert page.count("<svg") == 2
    assert "<script" not in page
    repeated = evaluate(balance(), task, attacks, n_episodes=40, generator=3, n_envs=3)
    assert repeated.document["figures"] == report.document["figures"]


def test_something_else_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"schema": "other"}')
    with pytest.raises(UntrustedFileError):
        PolicyReport.load(tmp_path)
