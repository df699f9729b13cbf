"""Methods by settings that add networks, losses or derivatives to what their defaults have."""

from __future__ import annotations

from diffkd.methods.adversarial import Adversarial
from diffkd.methods.base import Method
from diffkd.methods.dmd2 import DMD2
from diffkd.methods.meanflow import MeanFlow
from diffkd.methods.scm import SCM
from diffkd.methods.shortcut import Shortcut
from diffkd.methods.tcm import TCM

VARIANTS: dict[str, Method] = {
    "dmd2-gan": DMD2(steps=2, fake_updates=2, gan=0.1, gan_fake=0.1, r1=1.0, guidance=1.5),
    "dmd2-ddim": DMD2(steps=2, fake_updates=1, drawn="ddim"),
    "adversarial-r1": Adversarial(steps=2, critic_updates=2, r1=1.0, distance=1.0),
    "scm-jvp": SCM(derivative="jvp", tangent_warmup=0),
    "meanflow-jvp": MeanFlow(derivative="jvp"),
    "tcm-distillation": TCM(mode="distillation", steps=[1], substeps=2, guidance=1.5),
    "shortcut-target": Shortcut(target_decay=0.5, share=0.5),
}
