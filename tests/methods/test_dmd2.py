"""DMD2 on Gaussians: one update by hand, where it stays, where it goes; its discriminator; what it refuses.

That its direction is the gradient of the reverse KL is in tests/core/test_scores.py.
"""

import pytest
import torch
from pydantic import ValidationError

from diffkd.core.discriminator import logistic, non_saturating
from diffkd.core.guidance_kinds import set_kind
from diffkd.core.noise import add_noise
from diffkd.core.scores import draw, noise_times
from diffkd.errors import UserError
from diffkd.methods.adversarial import Adversarial
from diffkd.methods.base import Batch, Step
from diffkd.methods.dmd2 import DMD2
from diffkd.methods.f_distill import FDistill
from diffkd.methods.sid import SiD
from tests import guided
from tests.gaussian import affine, gaussian
from tests.methods.matching import (
    COSINE,
    FAKE,
    STUDENT,
    TEACHER,
    BestHeads,
    Draws,
    batch_of,
    losses_of,
    nets_of,
    noised,
    posterior,
    student_gradient,
    train,
)
from tests.tiny import student


def test_one_update_by_hand():
    nets, draws = nets_of(), Draws()
    found = losses_of(DMD2(fake_updates=2), nets)
    assert [loss.network for loss in found] == ["student", "fake", "fake"]
    # the student
    z = draws.student_noise()
    x = STUDENT[0] + STUDENT[1] * z
    t = draws.times(2, 62)  # 0.02 to 0.98 of 64
    x_t = noised(x, t, draws.noise())
    real, fake = posterior(x_t, t, TEACHER), posterior(x_t, t, FAKE)
    size = torch.stack([(a - b).abs().mean() for a, b in zip(x, real, strict=True)])
    direction = (fake - real) / size.reshape(3, 1, 1, 1)
    assert found[0].value.item() == pytest.approx(direction.square().mean().item() / 2, rel=1e-9)
    expected = torch.stack([direction.mean(), (direction * z).mean()])
    assert torch.allclose(student_gradient(found[0], nets), expected, rtol=1e-9)
    # the fake network: the student's first images again, then new ones
    for loss in found[1:]:
        if loss is found[2]:
            x = STUDENT[0] + STUDENT[1] * draws.student_noise()
        t = draws.times(1, 64)
        error = posterior(noised(x, t, draws.noise()), t, FAKE) - x
        assert loss.value.item() == pytest.approx(error.square().mean().item(), rel=1e-9)


def test_a_student_that_is_its_teacher_stays():
    nets = nets_of(TEACHER, TEACHER)
    assert (student_gradient(losses_of(DMD2(), nets)[0], nets).abs() < 1e-12).all()


@pytest.mark.parametrize("options", [{}, {"t_min": 0.5, "t_max": 0.5}, {"fake_updates": 1}])
def test_the_student_becomes_the_teacher(options):
    assert train(DMD2(**{"fake_updates": 2, **options}), nets_of()) == pytest.approx(TEACHER, abs=0.03)


def test_two_steps_by_hand():
    """One image from noise; one from what the student made of noise, noised to t = 1/2."""
    nets, draws = nets_of(), Draws(count=2)
    found = losses_of(DMD2(steps=2), nets, count=2)[0]
    z = draws.student_noise()
    alpha, sigma = COSINE.numbers(0.5)
    again = torch.randn(1, 1, 4, 4, generator=draws.rng, dtype=torch.float64)
    z[1] = alpha * (STUDENT[0] + STUDENT[1] * z[1]) + sigma * again[0]
    x = STUDENT[0] + STUDENT[1] * z
    t = draws.times(2, 62)
    x_t = noised(x, t, draws.noise())
    real, fake = posterior(x_t, t, TEACHER), posterior(x_t, t, FAKE)
    direction = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
    expected = torch.stack([direction.mean(), (direction * z).mean()])
    assert torch.allclose(student_gradient(found, nets), expected, rtol=1e-9)  # none through the first step


def test_only_the_teacher_is_guided():
    """With a fake network of the teacher's weights the direction is that of guidance, and 0 without."""
    teacher = student(4, "v_prediction", COSINE)
    teacher.num_classes, teacher.null_label = 3, 3
    nets = {"teacher": teacher, "student": student(4, "v_prediction", COSINE, seed=1)}
    batch = Batch(torch.zeros(3, 1, 8, 8), {"class_labels": torch.arange(3)})
    values = []
    for method in (DMD2(), DMD2(guidance=3.0)):
        nets |= method.networks(teacher, nets["student"])
        step = Step(method.stages(teacher)[0], 0)
        values.append(next(method.losses(nets, batch, step, torch.Generator().manual_seed(0))).value)
    assert values[0] == 0 and values[1] > 1e-6


def test_guidance_of_another_kind_is_baked_in_by_hand():
    """Classes in closed form: the teacher is guided within an interval and led away from a worse model."""
    teacher, worse = guided.model(prediction="sample"), guided.model(prediction="sample", std=0.8)
    set_kind(teacher, interval=(0.28, 5.42), worse=worse)
    method, rng = DMD2(guidance=3.0, fake_updates=1), torch.Generator().manual_seed(5)
    nets = {
        "teacher": teacher,
        "student": affine(COSINE, *STUDENT),
        "fake": guided.model(prediction="sample"),
    }
    labels = torch.arange(8) % 3
    batch = Batch(torch.zeros(8, 1, 2, 2, dtype=torch.float64), {"class_labels": labels})
    found = next(method.losses(nets, batch, Step(method.stages(teacher)[0], 0), rng))
    rng.manual_seed(5)
    x = STUDENT[0] + STUDENT[1] * torch.randn(8, 1, 2, 2, generator=rng, dtype=torch.float64)
    torch.rand((), generator=rng, dtype=torch.float64)
    t = torch.randint(2, 63, (8,), generator=rng).double() / 64
    x_t = noised(x, t, torch.randn(8, 1, 2, 2, generator=rng))
    inside = torch.tensor([0.28 <= guided.level(COSINE, time) <= 5.42 for time in t.tolist()])
    assert inside.any() and not inside.all()
    given = guided.by_hand(COSINE, x_t, t, labels, 1.0)
    its = guided.posterior(COSINE, x_t, t, guided.MEANS[labels].reshape(-1, 1, 1, 1), 0.8)
    real = torch.where(inside.reshape(-1, 1, 1, 1), its + 3.0 * (given - its), given)
    direction = (given - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)  # the fake is the teacher
    assert found.value.item() == pytest.approx(direction.square().mean().item() / 2, rel=1e-5)
    assert (found.metrics["gap"] > 0).tolist() == inside.tolist()


def test_a_tiny_network_guided_within_an_interval_by_hand():
    """Where one call of the network for each of given and null says what the target is."""
    teacher = student(4, "v_prediction", COSINE, steps=None)
    teacher.num_classes, teacher.null_label = 3, 3
    set_kind(teacher, interval=(0.28, 5.42), rescale=0.7)
    method = DMD2(guidance=3.0)
    nets = {"teacher": teacher, "student": student(4, "v_prediction", COSINE, seed=1)}
    nets |= method.networks(teacher, nets["student"])
    labels, stage = torch.arange(12) % 3, method.stages(teacher)[0]
    batch = Batch(torch.zeros(12, 1, 8, 8), {"class_labels": labels})
    found = next(method.losses(nets, batch, Step(stage, 0), torch.Generator().manual_seed(0)))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        x = draw(nets["student"], batch.x0, 1, rng, drawn="renoise", simulated=True, class_labels=labels)
        t = noise_times(12, COSINE, 0.02, 0.98, rng, x.device)
        x_t = add_noise(COSINE, x, t, rng)
        given, null = (teacher.output(x_t, t, class_labels=c) for c in (labels, torch.full((12,), 3)))
        plain = null + 3.0 * (given - null)
        ratio = given.std((1, 2, 3), keepdim=True) / plain.std((1, 2, 3), keepdim=True)
        inside = torch.tensor([0.28 <= guided.level(COSINE, time) <= 5.42 for time in t.tolist()])
        v = torch.where(inside.reshape(-1, 1, 1, 1), 0.7 * ratio * plain + 0.3 * plain, given)
        alpha, sigma = COSINE.at(t, like=x_t)
        real, drawn = alpha * x_t - sigma * v, alpha * x_t - sigma * given
    assert inside.any() and not inside.all()
    direction = (drawn - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
    assert found.value.item() == pytest.approx(direction.square().mean().item() / 2, rel=1e-3)


# the discriminator


HEADS = BestHeads(*(nets_of()[name].network for name in ("teacher", "fake")))


def logits(x, t, eps):
    time = (64 * t - 1).reshape(-1, 1, 1, 1).expand(x.shape)
    return HEADS([torch.cat([noised(x, t, eps), time], 1)])


def test_the_discriminator_adds_its_losses():
    nets = {**nets_of(), "heads": HEADS}
    method = DMD2(gan=0.5, gan_fake=0.25, fake_updates=1)
    found, plain = losses_of(method, nets), losses_of(DMD2(fake_updates=1), nets | {"heads": None})
    assert [loss.network for loss in found] == ["student", "fake", "heads"]
    draws = Draws()
    x = STUDENT[0] + STUDENT[1] * draws.student_noise()
    t = draws.times(2, 62)
    added = non_saturating(logits(x, t, draws.noise())).mean()
    assert (found[0].value - plain[0].value).item() == pytest.approx(0.5 * added.item(), rel=1e-6)
    t = draws.times(1, 64)
    drawn = logits(x, t, draws.noise())
    real = logits(batch_of().x0, t, draws.noise())  # at the same noise levels
    told = logistic(real, drawn)
    assert (found[1].value - plain[1].value).item() == pytest.approx(0.25 * told.mean().item(), rel=1e-6)
    assert found[2].value.item() == pytest.approx(told.mean().item(), rel=1e-6)
    right = ((real > 0).double() + (drawn < 0).double())[:, 0] / 2
    assert found[2].metrics["accuracy"].tolist() == right.tolist()


def test_the_penalty_on_the_heads_by_hand():
    """How their logits of real images change with a noise on these, at the same level and noise of x_t."""
    nets, settings = {**nets_of(), "heads": HEADS}, {"gan": 0.5, "gan_fake": 0.25, "fake_updates": 1}
    found, plain = (losses_of(DMD2(**settings, **more), nets) for more in ({"r1": 10, "r1_noise": 0.2}, {}))
    assert [loss.network for loss in found] == ["student", "fake", "heads"]
    assert [loss.value.item() for loss in found[:2]] == [loss.value.item() for loss in plain[:2]]
    draws, x0 = Draws(), batch_of().x0
    draws.student_noise(), draws.times(2, 62), draws.noise()
    t, _ = draws.times(1, 64), draws.noise()
    eps = draws.noise()
    moved = logits(x0 + 0.2 * draws.noise(torch.float64), t, eps)
    penalty = 10 * (logits(x0, t, eps) - moved).square().mean()
    assert penalty > 0.1
    assert (found[2].value - plain[2].value).item() == pytest.approx(penalty.item(), rel=1e-6)


def test_the_penalty_compares_features_of_one_network():
    """The fake network learns before the heads do: of what it then makes of moved images nothing is seen."""
    teacher = student(None, "v_prediction", COSINE)
    batch, values = Batch(torch.randn(4, 1, 8, 8), {}), []
    for more in ({"r1": 1e3, "r1_noise": 1e-9}, {}):
        method = DMD2(gan=0.5, fake_updates=1, **more)
        nets = {"teacher": teacher, "student": student(None, "v_prediction", COSINE, seed=1)}
        nets |= method.networks(teacher, nets["student"])
        rng = torch.Generator().manual_seed(0)
        losses = method.losses(nets, batch, Step(method.stages(teacher)[0], 0), rng)
        assert [next(losses).network, next(losses).network] == ["student", "fake"]
        for parameter in nets["fake"].parameters():
            parameter.data *= 1.5
        values.append(next(losses).value.item())
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_it_sets_hooks_only_for_a_discriminator():
    assert not DMD2().hooks and DMD2(gan=1e-3).hooks


# settings


@pytest.mark.parametrize("method", [DMD2, FDistill, SiD, Adversarial])
def test_a_student_drawn_by_ddim_is_saved_so_and_learns_through_every_step(method):
    net = student(3, "v_prediction", COSINE, steps=None)
    teacher = student(3, "v_prediction", COSINE, steps=None, seed=1).requires_grad_(False)
    batch = Batch(torch.randn(4, 1, 8, 8), {"class_labels": torch.arange(4) % 3})
    for drawn, learning in (("ddim", 2), ("renoise", 1)):
        own = method(steps=2, drawn=drawn)
        (stage,) = own.stages(net)
        assert (stage.drawn, stage.steps) == (drawn, 2)
        outputs = []
        handle = net.network.register_forward_hook(lambda *call, into=outputs: into.append(call[2].sample))
        nets = {"student": net, "teacher": teacher, **own.networks(teacher, net)}
        for parameter in nets["fake"].parameters() if "fake" in nets else ():
            parameter.data *= 1.1  # as the teacher it would leave the student where it is
        loss = next(own.losses(nets, batch, Step(stage, 0), torch.Generator().manual_seed(0)))
        handle.remove()
        with_graph = [output for output in outputs if output.requires_grad]
        assert (len(outputs), len(with_graph)) == (2, learning)
        for gradient in torch.autograd.grad(loss.value, with_graph):
            assert (gradient.abs().flatten(1).sum(1) > 0).all()


def test_its_stage():
    method = DMD2(steps=2, guidance=1.5, learning_rate=1e-4, fake_learning_rate=3e-4, gan=1e-3)
    teacher = student(4, "v_prediction", COSINE)
    teacher.null_label = 3
    (stage,) = method.stages(teacher)
    assert (stage.name, stage.steps, stage.drawn, stage.teacher) == ("2-steps", 2, "renoise", "original")
    assert stage.guidance == 1.5 and stage.rate(stage.warmup, "student") < stage.rate(stage.warmup, "fake")
    assert stage.networks["fake"].learning_rate == stage.networks["heads"].learning_rate == 3e-4
    assert set(DMD2().stages(teacher)[0].networks) == {"fake"}


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="a student of 3 steps does not fit"):
        DMD2(steps=3).stages(gaussian(COSINE))
    with pytest.raises(UserError, match="guidance needs a label"):
        DMD2(guidance=2).stages(gaussian(COSINE))
    with pytest.raises(ValidationError, match=r"t_min 0\.9 is above t_max 0\.5; exchange them"):
        DMD2(t_min=0.9, t_max=0.5)
    without = {"gan_fake": 0.1, "gan_learning_rate": 1e-3, "blocks": ["mid_block"], "r1_noise": 0.2}
    for name, value in without.items():
        with pytest.raises(ValidationError, match=f"{name} .* is of the discriminator, which gan: 0 does no"):
            DMD2(**{name: value})
        assert DMD2(**{name: value}, gan=0.1)
    with pytest.raises(ValidationError, match="r1 10.* is of the discriminator, which .* have; leave it out"):
        DMD2(r1=10)
    for method in (DMD2, FDistill, Adversarial):
        with pytest.raises(ValidationError, match="simulate: false starts .* leave one of the two out"):
            method(steps=2, drawn="ddim", simulate=False)
    with pytest.raises(
        UserError, match=r"method\.blocks names 'mid', which the network does not have; it has"
    ):
        net = student(None, "v_prediction", COSINE)
        DMD2(gan=1e-3, blocks=["mid"]).networks(net, net)
