"""Feature and output matching: their losses against formulas written out, and their hooks and projectors."""

import itertools

import pytest
import torch
from diffusers import DDPMScheduler
from pydantic import ValidationError
from torch import nn

from diffkd.core.activations import capture_activations
from diffkd.core.denoiser import Denoiser
from diffkd.core.losses import weighting_for
from diffkd.core.schedules import Schedule, from_diffusers
from diffkd.errors import UserError
from diffkd.methods.base import Batch, Step
from diffkd.methods.denoising import Denoising
from diffkd.methods.feature import Feature
from diffkd.methods.output import Output
from diffkd.models import students
from diffkd.models.unet import UNet2D
from tests.methods.conformance import losses_of
from tests.models.unets import max_difference, network, untouched

COSINE = Schedule.cosine(64)
LINEAR = from_diffusers(DDPMScheduler())
READ = [("v_prediction", COSINE), ("epsilon", LINEAR), ("sample", COSINE)]
NULL = 3


def teacher_of(prediction="v_prediction", schedule=COSINE, **config):
    """A teacher of three classes with a null label."""
    net = network(**{"num_class_embeds": 4, "layers_per_block": 2, **config})
    return Denoiser(net, schedule, prediction, num_classes=3, null_label=NULL).requires_grad_(False)


def nets_of(method, teacher, student):
    student.requires_grad_(True)
    return {"teacher": teacher, "student": student, **method.networks(teacher, student)}


def moved_copy(teacher):
    found = students.copy_of(teacher)
    rng = torch.Generator().manual_seed(2)
    for parameter in found.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=rng)
    return found


def values(method, nets, seed=11):
    stage = method.stages(nets["teacher"])[0]
    return [loss.value.item() for loss in losses_of(method, nets, stage, seed)]


class Drawn:
    """What `losses_of` and a method draw, in the algorithm's order."""

    def __init__(self, schedule, steps, dropout, seed=11):
        rng = torch.Generator().manual_seed(seed)
        self.x0 = torch.rand(6, 1, 8, 8, generator=rng) * 2 - 1
        self.t = torch.randint(1, steps + 1, (6,), generator=rng).double() / steps
        self.eps = torch.randn(self.x0.shape, generator=rng)
        self.alpha, self.sigma = schedule.at(self.t, like=self.x0)
        self.x_t = self.alpha * self.x0 + self.sigma * self.eps
        self.time = (self.t * schedule.num_train_timesteps - 1).float()
        labels = torch.arange(6) % 3
        hidden = torch.rand(6, generator=rng) < dropout if dropout else torch.zeros(6, dtype=torch.bool)
        self.labels = torch.where(hidden, NULL, labels)

    def of(self, denoiser, labels=None):
        """The network's own output."""
        labels = self.labels if labels is None else labels
        return denoiser.network(self.x_t, self.time, class_labels=labels).sample

    def truth(self, prediction):
        v = self.alpha * self.eps - self.sigma * self.x0
        return {"v_prediction": v, "epsilon": self.eps, "sample": self.x0}[prediction]


# the losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prediction", "schedule"), READ)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_each_term_alone_is_the_method_of_that_name(prediction, schedule, dropout):
    """Denoising, and output matching at any guidance, to the bit."""
    teacher = teacher_of(prediction, schedule)
    nets = {"teacher": teacher, "student": moved_copy(teacher)}
    task = Feature(task=1, output=0, feature=0, label_dropout=dropout)
    denoising = Denoising(weight=weighting_for(prediction), label_dropout=dropout)
    assert values(task, nets) == values(denoising, nets)
    for guidance in (1.0, 2.5):
        more = {"label_dropout": dropout, "guidance": guidance}
        output = Feature(task=0, output=1, feature=0, **more)
        assert values(output, nets) == values(Output(**more), nets) != values(task, nets)


@pytest.mark.parametrize(("prediction", "schedule"), READ)
@pytest.mark.parametrize("guidance", [1.0, 2.5, 0.0])
def test_the_default_error_is_the_mean_square_of_network_outputs(prediction, schedule, guidance):
    """In v, eps or x0: the student's output against the teacher's, guided by hand."""
    teacher = teacher_of(prediction, schedule)
    student = moved_copy(teacher)
    drawn = Drawn(schedule, schedule.num_train_timesteps, 0.4)
    with torch.no_grad():
        given, null = drawn.of(teacher), drawn.of(teacher, torch.full((6,), NULL))
        target, ours = null + guidance * (given - null), drawn.of(student)
    matched = (ours - target).square().mean().item()
    denoised = (ours - drawn.truth(prediction)).square().mean().item()
    nets = {"teacher": teacher, "student": student}
    more = {"guidance": guidance, "label_dropout": 0.4}
    assert values(Output(**more), nets) == [pytest.approx(matched, rel=1e-4)]
    both = Feature(task=0.5, output=3, feature=0, **more)
    assert values(both, nets) == [pytest.approx(0.5 * denoised + 3 * matched, rel=1e-4)]
    alone = Output(weight="constant", **more)
    x0 = (ours - target).flatten(1) * {
        "v_prediction": drawn.sigma, "epsilon": drawn.sigma / drawn.alpha, "sample": torch.ones(6),
    }[prediction].reshape(6, 1)  # fmt: skip
    assert values(alone, nets) == [pytest.approx(x0.square().mean().item(), rel=1e-4)]
    loss = next(losses_of(alone, nets, alone.stages(teacher)[0], 11))
    assert torch.allclose(loss.metrics["gap"], x0.square().mean(1).sqrt(), rtol=1e-3)


def features(net, x, time, labels):
    """The outputs of the blocks of a UNet, one after the other."""
    emb = net.time_embedding(net.time_proj(time)) + net.class_embedding(labels)
    h, found = net.conv_in(x), {}
    skips = (h,)
    for i, block in enumerate(net.down_blocks):
        h, more = block(h, emb)
        skips, found[f"down_blocks.{i}"] = skips + more, h
    if net.mid_block is not None:
        h = found["mid_block"] = net.mid_block(h, emb)
    for i, block in enumerate(net.up_blocks):
        count = len(block.resnets)
        h = block(h, skips[-count:], emb)
        skips, found[f"up_blocks.{i}"] = skips[:-count], h
    return found


def by_hand(nets, drawn, pairs):
    """The feature loss. pairs: (the teacher's module, the student's, whether a projector is between)."""
    teacher, student = nets["teacher"].network, nets["student"].network
    given = drawn.x_t, drawn.time, drawn.labels
    with torch.no_grad():
        theirs = features(teacher, *given)
    ours, total = features(student, *given), 0
    maps = iter(nets["projectors"].maps) if "projectors" in nets else None
    for name, mine, projected in pairs:
        feature = ours[mine]
        if projected:
            layer = next(maps)
            feature = torch.einsum("oi,bihw->bohw", layer.weight[:, :, 0, 0], feature)
            feature = feature + layer.bias[:, None, None]
        apart = (feature - theirs[name]).square().sum((1, 2, 3)) / theirs[name].square().sum((1, 2, 3))
        total = total + apart.mean() / len(pairs)
    return total


SAME = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
SMALLER = {  # what is made, of which teacher, and the blocks that are matched
    "copy": (moved_copy, {}, [(name, name, False) for name in SAME]),
    "narrow": (lambda t: students.narrow(t, [4, 8]), {}, [(name, name, True) for name in SAME]),
    "one": (lambda t: students.narrow(t, [4, 16]), {}, [(n, n, n in (SAME[0], SAME[4])) for n in SAME]),
    "middle": (lambda t: students.drop_blocks(t, ["mid_block", "*.resnets.1"]), {},
               [(name, name, False) for name in SAME if name != "mid_block"]),
    "innermost": (lambda t: students.drop_blocks(t, ["down_blocks.2"]), {"channels": (8, 16, 16)},
                  [("down_blocks.0", "down_blocks.0", False), ("up_blocks.1", "up_blocks.0", False),
                   ("up_blocks.2", "up_blocks.1", False)]),
    "two": (lambda t: students.drop_blocks(students.drop_blocks(t, ["down_blocks.2"]), ["down_blocks.1"]),
            {"channels": (8, 8, 8)}, [("up_blocks.2", "up_blocks.0", False)]),
}  # fmt: skip


def smaller(name, method, **config):
    make, more, pairs = SMALLER[name]
    teacher = teacher_of(**more, **config)
    return nets_of(method, teacher, make(teacher)), pairs


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", SMALLER)
def test_features_are_compared_block_by_block(name, guidance):
    """A guided teacher's features are those for the labels, not those for the null label."""
    method = Feature(task=0, output=0, feature=2, label_dropout=0.4, guidance=guidance)
    nets, pairs = smaller(name, method)
    assert method.pairs(nets["teacher"], nets["student"]) == {theirs: ours for theirs, ours, _ in pairs}
    expected = by_hand(nets, Drawn(COSINE, 64, 0.4), pairs).item()
    found = values(method, nets)
    assert found[0] == pytest.approx(2 * expected, rel=1e-4)
    assert found[1:] == ([pytest.approx(expected, rel=1e-4)] if "projectors" in nets else [])
    assert len(getattr(nets.get("projectors"), "maps", [])) == sum(projected for *_, projected in pairs)
    whole = Feature(task=0.5, output=2, feature=3, label_dropout=0.4, guidance=guidance)
    rest = Feature(task=0.5, output=2, feature=0, label_dropout=0.4, guidance=guidance)
    alone = values(rest, {key: nets[key] for key in ("teacher", "student")})
    assert len(alone) == 1 and values(whole, nets)[0] == pytest.approx(alone[0] + 3 * expected, rel=1e-4)


METHODS = {"all": Feature(), "feature": Feature(task=0, output=0), "output": Output()}


@pytest.mark.parametrize("name", SMALLER)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_smaller_student_keeps_the_contract(name, method):
    """Gradients for the named network alone, the same for the same random numbers; teacher unchanged."""
    nets, _ = smaller(name, method)
    before = [p.clone() for p in nets["teacher"].parameters()]
    stage, found = method.stages(nets["teacher"])[0], []
    for loss in losses_of(method, nets, stage, 11):
        assert loss.value.shape == () and loss.value.isfinite()
        assert all(v.shape == (6,) and not v.requires_grad for v in loss.metrics.values())
        own = [p for p in nets[loss.network].parameters() if p.requires_grad]
        loss.value.backward(inputs=own)
        grads = [p.grad for p in own if p.grad is not None]
        assert any(g.abs().sum() > 0 for g in grads) and all(g.isfinite().all() for g in grads)
        others = [p for key, net in nets.items() if key != loss.network for p in net.parameters()]
        assert all(p.grad is None for p in others)
        for parameter in own:
            parameter.grad = None
        found.append(loss.value.item())
    assert values(method, nets) == found != values(method, nets, seed=12)
    assert all(map(torch.equal, before, nets["teacher"].parameters()))


@pytest.mark.parametrize("config", [{}, {"attention": [True, True]}, {"attention_head_dim": None}])
def test_identical_networks_have_no_loss(config):
    """Exactly none if neither learns; torch may multiply weights that learn in another order."""
    for training in (False, True):
        teacher = teacher_of(**config)
        nets = {"teacher": teacher.train(training), "student": students.copy_of(teacher)}
        methods = (Output(), Feature(task=0), Feature(task=0, output=0), Feature(task=0, feature=0))
        assert [values(method, nets) for method in methods] == [[0.0]] * 4
        nets["student"].requires_grad_(True)
        assert all(values(method, nets)[0] < 1e-10 for method in methods)


@pytest.mark.parametrize("method", [Feature(feature=0), Output()], ids=["feature", "output"])
@pytest.mark.parametrize("steps", [None, 4])
def test_times_are_on_the_grid_of_the_teacher(method, steps):
    teacher = teacher_of()
    teacher.steps = steps
    nets, stage = {"teacher": teacher, "student": moved_copy(teacher)}, method.stages(teacher)[0]
    assert stage.steps == steps and len(method.stages(teacher)) == 1
    seen = {t for s in range(20) for t in next(losses_of(method, nets, stage, s)).metrics["t"].tolist()}
    count = steps or 64
    assert seen <= {i / count for i in range(1, count + 1)} and len(seen) > (3 if steps else 40)


@pytest.mark.parametrize("method", [Feature, Output])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_same_labels_are_dropped_for_both(method, guidance):
    teacher, labels = teacher_of(), {"teacher": [], "student": []}
    method = method(label_dropout=0.5, guidance=guidance)
    nets = nets_of(method, teacher, moved_copy(teacher))
    for name, seen in labels.items():
        nets[name].network.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["class_labels"]), with_kwargs=True
        )
    for seed in range(20):
        values(method, nets, seed)
    theirs, ours, given = torch.stack(labels["teacher"]), torch.stack(labels["student"]), torch.arange(6) % 3
    assert torch.equal(theirs[:, :6], ours) and theirs.shape[1] == (6 if guidance == 1 else 12)
    assert (theirs[:, 6:] == NULL).all() and abs((ours == NULL).float().mean() - 0.5) < 0.15
    assert torch.equal(torch.where(ours == NULL, given, ours), given.expand(20, 6))


# projectors -----------------------------------------------------------------------------------------------


def test_projectors_are_the_same_in_every_process():
    teacher = teacher_of()
    student, found = students.narrow(teacher, [4, 16]), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(untouched(lambda: Feature().networks(teacher, student)["projectors"]))
    first, again = (list(net.parameters()) for net in found)
    assert all(map(torch.equal, first, again)) and all(p.requires_grad for p in first)
    assert [m.weight.shape for m in found[0].maps] == [(8, 4, 1, 1)] * 2
    assert Feature(blocks=["mid_block"]).networks(teacher, student) == {}
    assert Feature(feature=0).networks(teacher, student) == {}


def test_projectors_pass_gradients_and_learn_from_their_own_loss():
    """Each network's gradient is the formula's; the student's update in between changes nothing."""
    method = Feature(task=0, output=0, label_dropout=0.4)
    nets, pairs = smaller("narrow", method)
    expected = by_hand(nets, Drawn(COSINE, 64, 0.4), pairs)
    student, maps = ([p for p in nets[n].parameters()] for n in ("student", "projectors"))
    wanted = torch.autograd.grad(expected, student + maps, allow_unused=True)
    losses = losses_of(method, nets, method.stages(nets["teacher"])[0], 11)
    first = next(losses)
    assert (first.network, first.value.requires_grad) == ("student", True)
    for got, grad in zip(torch.autograd.grad(first.value, student), wanted, strict=False):
        grad = torch.zeros_like(got) if grad is None else grad
        assert torch.allclose(got, grad, rtol=1e-3, atol=1e-6)
    assert max(grad.abs().max() for grad in wanted[: len(student)] if grad is not None) > 1e-3
    for parameter in student:
        parameter.data += 1
    second = next(losses)
    assert second.network == "projectors" and second.value.item() == pytest.approx(expected.item(), rel=1e-4)
    grads = torch.autograd.grad(second.value, student + maps, allow_unused=True)
    assert all(grad is None for grad in grads[: len(student)])
    for got, grad in zip(grads[len(student) :], wanted[len(student) :], strict=True):
        assert torch.allclose(got, grad, rtol=1e-3, atol=1e-6) and grad.abs().max() > 1e-4
    assert next(losses, None) is None


def test_one_module_of_the_student_may_match_two_of_the_teacher():
    """They may have different widths."""
    method = Feature(task=0, output=0, blocks={"conv_in": "conv_in", "down_blocks.0.resnets.1": "conv_in"})
    teacher = teacher_of()
    nets = nets_of(method, teacher, students.narrow(teacher, [4, 8]))
    assert torch.tensor(values(method, nets)).isfinite().all()
    wide = teacher_of(channels=(8, 16), layers_per_block=1)
    method = Feature(task=0, output=0, blocks={"up_blocks.0": "up_blocks.0", "up_blocks.1": "up_blocks.0"})
    nets = nets_of(method, wide, students.narrow(wide, [4, 8]))
    assert torch.tensor(values(method, nets)).isfinite().all()


# nothing is left behind -----------------------------------------------------------------------------------


def hooks(*nets):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, kind)) for net in nets for m in net.modules() for kind in kinds)


class Wrapped(nn.Module):
    """Wrapped as several processes wrap a network."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_no_hook_outlives_a_loss(monkeypatch):
    method = Feature()
    nets, _ = smaller("narrow", method)
    stage = method.stages(nets["teacher"])[0]
    for count in (1, 2, 3):  # asked for the first only, for both, and for more than there are
        losses = losses_of(method, nets, stage, 11)
        found = list(itertools.islice(losses, count))
        assert hooks(*nets.values()) == 0 and len(found) == min(count, 2)
        losses.close()
    for name in ("teacher", "student"):
        with monkeypatch.context() as patch:
            layer = nets[name].network.up_blocks[1]

            def broken(*args):
                assert hooks(*nets.values()) > 0
                raise RuntimeError("broken")

            patch.setattr(layer, "forward", broken)
            with pytest.raises(RuntimeError, match="broken"):
                next(losses_of(method, nets, stage, 11))
        assert hooks(*nets.values()) == 0
    assert hooks(*smaller("innermost", method)[0].values()) == 0


def test_the_last_output_inside_the_context_is_captured():
    class Two(nn.Module):
        def forward(self, x):
            return x + 1, "more"

    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sequential(Two()))
    net[1].forward = lambda x: net[1][0](x)[0]
    x, y = torch.rand(2, 3, 1, 4, 4)
    kept = net[0].register_forward_hook(lambda module, given, output: output * 2)  # the user's own
    with capture_activations(net, ["0", "1.0"]) as outer:
        net(x)
        with capture_activations(net, ["1.0"]) as inner:
            net(y)
        assert torch.equal(inner["1.0"], 2 * net[0].forward(y) + 1) and inner.keys() == {"1.0"}
        assert torch.equal(outer["1.0"], inner["1.0"]) and torch.equal(outer["0"], 2 * net[0].forward(y))
        net(x)
    assert torch.equal(outer["1.0"], 2 * net[0].forward(x) + 1)
    assert torch.equal(inner["1.0"], 2 * net[0].forward(y) + 1)
    assert hooks(net) == 1
    kept.remove()
    with pytest.raises(AttributeError), capture_activations(net, ["0", "2.0"]):
        pass
    with pytest.raises(KeyError), capture_activations(net, ["0"]):
        raise KeyError
    with capture_activations(Wrapped(net), ["0"]) as found:
        net(x)
    assert torch.equal(found["0"], net[0](x)) and hooks(net) == 0


def test_a_wrapped_network_gives_the_same():
    method = Feature()
    nets, _ = smaller("narrow", method)
    expected = values(method, nets)
    for name in ("teacher", "student"):
        nets[name].network = Wrapped(nets[name].network)
    assert values(method, nets) == expected and hooks(*nets.values()) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_network_compiled_in_place_gives_the_same():
    """In every update: hooks come and go, and compiled code sees the current ones."""
    torch._dynamo.reset()
    method = Feature(blocks=["down_blocks.0", "up_blocks.0"])
    teacher = teacher_of(layers_per_block=1, mid_block_type=None)
    nets = nets_of(method, teacher, students.narrow(teacher, [4, 8]))
    expected = [values(method, nets, seed) for seed in range(3)]
    for name in ("teacher", "student"):
        nets[name].network.compile(backend="eager", dynamic=False)
    assert [values(method, nets, seed) for seed in range(3)] == expected
    torch._dynamo.reset()


# what is refused ------------------------------------------------------------------------------------------

REFUSED = [
    (
        ["mid"],
        "method.blocks names 'mid', which the teacher does not have; it has down_blocks.0, down_blocks.1, m",
    ),
    (
        {"mid_block": "middle"},
        "names 'middle', which the student does not have; it has down_blocks.0, down_block",
    ),
    ([""], "names '', which the teacher does not have"),
    (
        {"conv_in": "down_blocks.0"},
        "conv_in of the teacher outputs 8x8 and down_blocks.0 of the student 4x4; ma",
    ),
    (
        {"conv_in": "conv_in", "up_blocks.0": "mid_block"},
        "up_blocks.0 .*mid_block.* match modules of the same",
    ),
    ({"conv_in": "mid_block.attentions.0.to_q"}, "outputs 8x8 and .*to_q of the student 16 tokens; match"),
    (["time_embedding"], "no feature map and no tokens.*match modules of the same resolution"),
    ({"conv_in": "time_embedding"}, "no feature map"),
    (["down_blocks"], "'?down_blocks'?[ ,:]"),  # a list, which is never called
]


@pytest.mark.parametrize(("blocks", "message"), REFUSED)
def test_features_that_cannot_be_matched(blocks, message):
    teacher = teacher_of()
    with pytest.raises(UserError, match=message) as caught:
        Feature(blocks=blocks).networks(teacher, students.narrow(teacher, [4, 8]))
    assert "\n" not in str(caught.value) and ";" in str(caught.value)
    assert hooks(teacher) == 0


def test_a_student_of_more_resolutions_is_not_matched_by_default():
    teacher = teacher_of(channels=(8, 16))
    model = UNet2D(channels=[8, 16, 16], norm_groups=4)
    with pytest.raises(UserError, match="method.blocks") as caught:
        Feature().networks(teacher, students.from_config(teacher, model))
    assert "-1" not in str(caught.value)  # a name that nobody has given


def test_configs_without_a_loss_are_refused():
    with pytest.raises(
        ValidationError, match="task, output and feature are all 0; give one of them a weight"
    ):
        Feature(task=0, output=0, feature=0)
    for empty in ([], {}):
        with pytest.raises(ValidationError):
            Feature(task=0, output=0, blocks=empty)
    bare = Denoiser(network(), COSINE, "v_prediction")
    for method in (Feature(guidance=2.0), Output(guidance=2.0)):
        with pytest.raises(UserError, match="guidance needs a label that means no class.*null_label"):
            method.stages(bare)
    assert [stage.guidance for stage in Feature(guidance=2.0).stages(teacher_of())] == [2.0]


def test_without_classes_no_label_is_dropped():
    teacher = Denoiser(network(), COSINE, "v_prediction").requires_grad_(False)
    nets = {"teacher": teacher, "student": moved_copy(teacher)}
    method, rng = Output(label_dropout=0.9), torch.Generator().manual_seed(1)
    x0 = torch.rand(4, 1, 8, 8)
    loss = next(method.losses(nets, Batch(x0, {}), Step(method.stages(teacher)[0], 0), rng))
    rng.manual_seed(1)
    t = torch.randint(1, 65, (4,), generator=rng).double() / 64
    alpha, sigma = COSINE.at(t, like=x0)
    x_t = alpha * x0 + sigma * torch.randn(x0.shape, generator=rng)
    outputs = [net.network(x_t, (64 * t - 1).float()).sample for net in nets.values()]
    assert loss.value.item() == pytest.approx((outputs[0] - outputs[1]).square().mean().item(), rel=1e-4)
    assert max_difference(*outputs) > 1e-2
