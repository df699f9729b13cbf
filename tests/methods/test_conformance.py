"""What holds for every method: one conformance test over the folder."""

import re
from pathlib import Path

import pytest
import torch

from diffkd import methods
from diffkd.core.classifier import Classifier
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule
from diffkd.methods.base import Batch, Method, Step
from diffkd.methods.denoising import Denoising
from diffkd.models import students
from diffkd.runs.classification.cnn import CNN
from tests.tiny import student

ROOT = Path(__file__).parents[2]
COSINE = Schedule.cosine(64)


def classifiers_of(method):
    torch.manual_seed(3)
    teacher, pupil = (
        Classifier(CNN(1, 3, channels, timed=False), 3, shape=(1, 8, 8)) for channels in ([8, 8], [4])
    )
    teacher.requires_grad_(False)
    return {"teacher": teacher, "student": pupil, **method.networks(teacher, pupil)}


def nets_of(method):
    if method.kind is Classifier:
        return classifiers_of(method)
    teacher = student(4, "v_prediction", COSINE, seed=1).requires_grad_(False)
    teacher.num_classes, teacher.null_label = 3, 3
    pupil = students.copy_of(teacher).requires_grad_(True)
    with torch.no_grad():
        for parameter in pupil.network.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return {"teacher": teacher, "student": pupil, **method.networks(teacher, pupil)}


def losses_of(method, nets, stage, seed):
    rng = torch.Generator().manual_seed(seed)
    x0 = torch.rand(6, 1, 8, 8, generator=rng) * 2 - 1
    return method.losses(nets, Batch(x0, {"class_labels": torch.arange(6) % 3}), Step(stage, 0), rng)


@pytest.mark.parametrize("name", methods.names())
def test_a_method_keeps_the_contract(name):
    kind = methods.find(name)
    method = kind()
    nets = nets_of(method)
    teacher_before = [p.clone() for p in nets["teacher"].parameters()]
    stages = method.stages(nets["teacher"])
    assert stages and len({stage.name for stage in stages}) == len(stages)
    for stage in (stages[0], stages[-1]):
        values = []
        for loss in losses_of(method, nets, stage, 11):
            assert loss.value.shape == () and loss.value.isfinite()
            assert all(
                v.shape == (6,) and v.isfinite().all() and not v.requires_grad for v in loss.metrics.values()
            )
            others = [p for key, net in nets.items() if key != loss.network for p in net.parameters()]
            loss.value.backward(inputs=[p for p in nets[loss.network].parameters() if p.requires_grad])
            grads = [p.grad for p in nets[loss.network].parameters() if p.grad is not None]
            assert any(g.abs().sum() > 0 for g in grads) and all(g.isfinite().all() for g in grads)
            assert all(p.grad is None for p in others)
            for parameter in nets[loss.network].parameters():
                parameter.grad = None
            values.append(loss.value.item())
        method.after_update(nets, Step(stage, 0))
        assert values == [loss.value.item() for loss in losses_of(method, nets, stage, 11)]
        assert values != [loss.value.item() for loss in losses_of(method, nets, stage, 12)]
    assert all(torch.equal(a, b) for a, b in zip(teacher_before, nets["teacher"].parameters(), strict=True))


@pytest.mark.parametrize("name", methods.names())
def test_a_method_is_one_final_class_with_a_reference_a_config_and_a_row(name):
    kind = methods.find(name)
    assert kind.__mro__[1] is Method
    assert re.search(r"\d{4}, https://", kind.reference)
    assert all(field.description for field in kind.model_fields.values())
    configs = [path.read_text() for path in (ROOT / "configs").rglob("*.yaml")]
    assert any(f"name: {name}" in text or f"\n{name}:" in text for text in configs)
    assert f"`{name}`" in (ROOT / "README.md").read_text()


def test_a_users_own_module_is_found(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from diffkd.methods.denoising import Denoising\nfrom diffkd.methods.base import Method, Stage\n"
        "class Mine(Method):\n"
        "    reference = 'x'\n"
        "    def stages(self, start):\n        return []\n"
        "    def losses(self, nets, batch, step, rng):\n        yield\n"
    )
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "own.py").write_text((tmp_path / "mine.py").read_text())
    monkeypatch.syspath_prepend(tmp_path)
    assert methods.find("package.own").__name__ == "Mine"
    with pytest.raises(ValueError, match="'package.nothing' is unknown"):
        methods.find("package.nothing")


# denoising


def test_denoising_hides_labels_and_weighs_by_prediction():
    """With v's weight the loss is the mean squared error of v; labels are hidden at the asked rate."""

    seen = []

    class Network(torch.nn.Module):
        def forward(self, x, time, class_labels):
            seen.append(class_labels.clone())
            return torch.zeros_like(x)

    denoiser = Denoiser(Network(), COSINE, "v_prediction", num_classes=3, null_label=3)
    method = Denoising(label_dropout=0.25)
    x0 = torch.rand(4000, 1, 2, 2) * 2 - 1
    batch = Batch(x0, {"class_labels": torch.arange(4000) % 3})
    loss = next(
        method.losses(
            {"student": denoiser}, batch, method.stages(denoiser)[0], torch.Generator().manual_seed(0)
        )
    )
    assert abs((seen[0] == 3).float().mean() - 0.25) < 0.03
    kept = seen[0] != 3
    assert torch.equal(seen[0][kept], (torch.arange(4000) % 3)[kept])
    rng = torch.Generator().manual_seed(0)
    t = torch.randint(1, 65, (4000,), generator=rng).double() / 64
    eps = torch.randn(x0.shape, generator=rng)
    alpha, sigma = COSINE.at(t, like=x0.double())
    v = alpha * eps - sigma * x0
    assert loss.value.item() == pytest.approx(v.square().mean().item(), rel=1e-4)
