"""The minimum of an update, method by method: the network passes that it cannot avoid, written out by hand.

Everything that the passes take is there already, and what they give is used in the simplest way that makes
the same gradients necessary: no times, no noise, no targets, no weights, no norms of gradients, no log.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.core import interval
from diffkd.core.classifier import Model
from diffkd.methods.base import Method


class Bare:
    """Copies of a method's networks, with inputs of an update's sizes.

    settings: the method, whose shares of a batch and numbers of fake updates are the update's.
    """

    def __init__(self, settings: Method, nets: Mapping[str, nn.Module], batch: int, precision: str) -> None:
        teacher: Any = nets["teacher"]
        self.settings: Any = settings
        self.device, self.precision = teacher.device, precision
        bare = {name: net.network if isinstance(net, Model) else net for name, net in nets.items()}
        self.nets: dict[str, Any] = {name: copy.deepcopy(net) for name, net in bare.items()}
        if precision == "bf16":
            self.nets["teacher"].to(torch.bfloat16)
        self.params, self.optimizers = {}, {}
        for name, net in self.nets.items():
            if learns := [p for p in net.parameters() if p.requires_grad]:
                self.params[name] = learns
                self.optimizers[name] = torch.optim.AdamW(learns, lr=1e-5, fused=True)
        self.shadow = [p.detach().clone() for p in self.params["student"]]
        self.x = torch.randn(batch, *teacher.shape, device=self.device)
        self.t = torch.full((batch,), 500.0, device=self.device)
        labels = torch.zeros(batch, dtype=torch.long, device=self.device)
        self.cond = {"class_labels": labels} if teacher.num_classes else {}
        self.features: dict[str, Tensor] = {}
        if "heads" in self.nets:  # on the blocks of the fake network, or else of the teacher
            for name in self.nets["heads"].blocks:
                block = self.nets["fake" if "fake" in self.nets else "teacher"].get_submodule(name)
                block.register_forward_hook(self._keeping(name))

    def _keeping(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self.features[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def update(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            MINIMUMS[type(self.settings).__name__](self)

    def __call__(self, name: str, x: Tensor | None = None, share: float = 1.0) -> Tensor:
        """What a network makes of x, or of a share of the batch, with gradients if it learns or x has any."""
        count = round(share * len(self.x))
        x = self.x[:count] if x is None else x
        net = self.nets[name]
        if (second := interval.attached(net)) is not None:
            second.value = torch.full((count,), 0.5, dtype=torch.float64, device=self.device)
        cond = {key: value[:count] for key, value in self.cond.items()}
        dtype = next(net.parameters()).dtype
        output: Tensor = net(x.to(dtype), self.t[:count], **cond).sample
        return output

    @torch.no_grad()
    def frozen(self, name: str, share: float = 1.0) -> Tensor:
        return self(name, share=share)

    def told(self, detached: bool = False) -> Tensor:
        """The heads' logits of the last call's features."""
        found = [self.features[name] for name in self.nets["heads"].blocks]
        logits: Tensor = self.nets["heads"]([f.detach() for f in found] if detached else found)
        return logits

    def learn(self, name: str, loss: Tensor) -> None:
        """Backward, AdamW, and of the student the average."""
        with torch.autocast(self.device.type, enabled=False):
            loss.backward(inputs=self.params[name])
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()
        if name == "student":
            torch._foreach_lerp_(self.shadow, self.params["student"], 0.01)


def error(output: Tensor, aim: Tensor) -> Tensor:
    return (output - aim).square().mean()


def progressive(m: Bare) -> None:
    m.frozen("teacher")
    m.learn("student", error(m("student"), m.frozen("teacher")))


def consistency(m: Bare) -> None:
    m.frozen("teacher")
    m.learn("student", error(m("student"), m.frozen("student")))


def scm(m: Bare) -> None:
    m.frozen("teacher")
    output = m("student")
    ahead, behind = m.frozen("student"), m.frozen("student")
    m.learn("student", error(output, ahead - behind))
    m.learn("weight", m.nets["weight"](m.t).mean())


def tcm(m: Bare) -> None:
    output, share = m("student"), m.settings.boundary
    m.frozen("teacher", share)
    m.frozen("student", 1 - share)
    m.learn("student", error(output, m.x))


def lcm(m: Bare) -> None:
    m.frozen("teacher")
    m.learn("student", error(m("student"), m.frozen("target")))
    torch._foreach_lerp_([*m.nets["target"].parameters()], [*m.nets["student"].parameters()], 0.05)


def meanflow(m: Bare) -> None:
    aim, share = m.frozen("teacher"), m.settings.ratio
    output = m("student")
    m.frozen("student", share)
    m.frozen("student", share)
    m.learn("student", error(output, aim))


def shortcut(m: Bare) -> None:
    output, share = m("student"), m.settings.share
    m.frozen("student", share)
    m.frozen("student", share)
    m.frozen("teacher", 1 - share)
    m.learn("student", error(output, m.x))


def dmd2(m: Bare) -> None:
    x = m("student")
    m.frozen("teacher")
    m.learn("student", error(x, m.frozen("fake")))
    for k in range(m.settings.fake_updates):
        if k:
            m.frozen("student")
        m.learn("fake", error(m("fake"), m.x))


def f_distill(m: Bare) -> None:
    x = m("student")
    aim = m.frozen("teacher")
    m("fake", x)
    m.learn("student", error(x, aim) + m.told().mean())
    for k in range(m.settings.fake_updates):
        if k:
            m.frozen("student")
        drawn = m("fake")
        of_drawn, again = m.told(), [f.detach() for f in m.features.values()]
        m("fake")
        of_real = m.told()
        m.learn("fake", error(drawn, m.x) + (of_drawn - of_real).mean())
        m.learn("heads", (m.told(detached=True) - m.nets["heads"](again)).mean())


def sid(m: Bare) -> None:
    x = m("student")
    real, fake = m("teacher", x), m("fake", x)
    m.learn("student", ((real - fake) * (fake - x)).mean())
    for k in range(m.settings.fake_updates):
        if k:
            m.frozen("student")
        m.learn("fake", error(m("fake"), m.x))


def adversarial(m: Bare) -> None:
    m("teacher", m("student"))
    m.learn("student", m.told().mean())
    for k in range(m.settings.critic_updates):
        if k:
            m.frozen("student")
        m.frozen("teacher")
        of_drawn = m.told()
        m.frozen("teacher")
        m.learn("heads", (of_drawn - m.told()).mean())


def regression(m: Bare) -> None:
    m.learn("student", error(m("student"), m.x))


MINIMUMS: dict[str, Callable[[Bare], None]] = {
    "Progressive": progressive, "Consistency": consistency, "SCM": scm, "TCM": tcm, "LCM": lcm,
    "MeanFlow": meanflow, "Shortcut": shortcut, "IMM": consistency, "DMD2": dmd2, "FDistill": f_distill,
    "SiD": sid, "Adversarial": adversarial, "Reflow": regression, "Regression": regression,
}  # fmt: skip
# the defaults, and a teacher where one can do without; unguided, as guidance makes the passes longer
SETTINGS: dict[str, dict[str, Any]] = {
    "progressive": {"steps": [4]}, "consistency": {}, "scm": {}, "tcm": {}, "lcm": {}, "meanflow": {},
    "shortcut": {}, "imm": {"mode": "distillation"}, "dmd2": {}, "f_distill": {}, "sid": {},
    "adversarial": {}, "reflow": {}, "regression": {},
}  # fmt: skip
