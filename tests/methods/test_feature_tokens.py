"""Feature matching of transformers: tokens of blocks against formulas written out; which are the image's."""

import pytest
import torch

from diffkd.core.activations import capture_activations
from diffkd.errors import UserError
from diffkd.methods.base import Batch, Step
from diffkd.methods.feature import Feature
from diffkd.models import features, students
from tests.methods.test_feature import Wrapped
from tests.transformers import CLASSES, KINDS, cond_of, denoiser, network

ALONE = {"task": 0, "output": 0, "label_dropout": 0}


@pytest.fixture(scope="module")
def teachers():
    return {kind: denoiser(kind, network(kind)).requires_grad_(False) for kind in KINDS}


def nets_of(method, teacher, student):
    student.requires_grad_(True)
    return {"teacher": teacher, "student": student, **method.networks(teacher, student)}


def losses_of(method, nets, kind, count=3):
    stage = method.stages(nets["teacher"])[0]
    rng = torch.Generator().manual_seed(11)
    x0 = torch.randn(count, 4, 8, 8, generator=rng)
    return method.losses(nets, Batch(x0, cond_of(kind, count)), Step(stage, 0), rng)


def drawn(teacher, count=3):
    """x_t and the network's time of `losses_of`."""
    rng, steps = torch.Generator().manual_seed(11), teacher.schedule.num_train_timesteps
    x0 = torch.randn(count, 4, 8, 8, generator=rng)
    t = torch.randint(1, steps + 1, (count,), generator=rng).double() / steps
    eps = torch.randn(x0.shape, generator=rng)
    alpha, sigma = teacher.schedule.at(t, like=x0)
    return alpha * x0 + sigma * eps, teacher.schedule.network_time(t, x0)


def dit_tokens(net, x_t, time, cond):
    """The outputs of its blocks, one after the other."""
    h, found = net.pos_embed(x_t), []
    for block in net.transformer_blocks:
        h = block(h, timestep=time, class_labels=cond["class_labels"])
        found.append(h)
    return found


def sd3_tokens(net, x_t, time, cond):
    h, told = net.pos_embed(x_t), net.context_embedder(cond["encoder_hidden_states"])
    temb, found = net.time_text_embed(time, cond["pooled_projections"]), []
    for block in net.transformer_blocks:
        told, h = block(hidden_states=h, encoder_hidden_states=told, temb=temb)
        found.append(h)
    return found


def relative(mine, theirs):
    return ((mine - theirs).square().sum((1, 2)) / theirs.square().sum((1, 2))).mean()


def test_tokens_of_a_narrower_dit_by_hand(teachers):
    """Every block, through a linear layer each; the layers learn the same error."""
    teacher = teachers["dit"]
    student = denoiser("dit", network("dit", seed=3, num_layers=2, attention_head_dim=4))
    method = Feature(**ALONE, feature=2)
    nets = nets_of(method, teacher, student)
    pairs = [(1, 0), (3, 1)]  # half of the depth, and all of it
    named = {f"transformer_blocks.{a}": f"transformer_blocks.{b}" for a, b in pairs}
    assert method.pairs(teacher, student) == named
    x_t, time = drawn(teacher)
    theirs, ours = (dit_tokens(one.network, x_t, time, cond_of("dit", 3)) for one in (teacher, student))
    maps = [(one.weight, one.bias) for one in nets["projectors"].maps]
    assert [weight.shape for weight, _ in maps] == [(16, 8)] * 2
    expected = sum(
        relative(torch.einsum("oi,bni->bno", weight, ours[b]) + bias, theirs[a])
        for (a, b), (weight, bias) in zip(pairs, maps, strict=True)
    ) / len(pairs)
    first, second = losses_of(method, nets, "dit")
    assert (first.network, second.network) == ("student", "projectors")
    assert first.value.item() == pytest.approx(2 * expected.item(), rel=1e-4)
    assert second.value.item() == pytest.approx(expected.item(), rel=1e-4)
    own = [[*nets[name].parameters()] for name in ("student", "projectors")]
    wanted = torch.autograd.grad(expected, sum(own, []), allow_unused=True)
    got = torch.autograd.grad(first.value / 2, own[0], materialize_grads=True)
    got += torch.autograd.grad(second.value, own[1])
    for mine, other in zip(got, wanted, strict=True):
        other = torch.zeros_like(mine) if other is None else other
        assert torch.allclose(mine, other, rtol=1e-3, atol=1e-6)
    assert all(grad.abs().max() > 1e-4 for grad in wanted[len(own[0]) :])


def test_tokens_of_the_image_of_a_shorter_sd3_by_hand(teachers):
    """Of two streams; a guided teacher's are those with the prompt."""
    teacher = teachers["sd3"]
    student = students.drop_blocks(teacher, ["transformer_blocks.1"])
    pairs = [(0, 0), (1, 1), (3, 2)]
    x_t, time = drawn(teacher)
    theirs, ours = (sd3_tokens(one.network, x_t, time, cond_of("sd3", 3)) for one in (teacher, student))
    assert torch.equal(theirs[0], ours[0])
    expected = sum(relative(ours[b], theirs[a]) for a, b in pairs).item() / 3
    for guidance in (1.0, 3.0):
        method = Feature(**ALONE, guidance=guidance)
        nets = nets_of(method, teacher, student)
        assert "projectors" not in nets
        assert [loss.value.item() for loss in losses_of(method, nets, "sd3")] == [
            pytest.approx(expected, rel=1e-4)
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_has_no_loss(teachers, kind):
    """By default every block of both is matched; one that differs in its last block has a loss."""
    teacher = teachers[kind]
    student = students.copy_of(teacher)
    for guidance in (1.0,) if kind == "flux" else (1.0, 3.0):
        method = Feature(**ALONE, guidance=guidance)
        nets = {"teacher": teacher, "student": student, **method.networks(teacher, student)}
        assert method.pairs(teacher, student) == {name: name for name in features.blocks(teacher)}
        (loss,) = losses_of(method, nets, kind)
        assert loss.value.item() <= (0 if guidance == 1 else 1e-10)
    *_, last = features.blocks(teacher)
    for parameter in student.network.get_submodule(last).parameters():
        parameter.data += 0.1
    (loss,) = losses_of(method, nets, kind)
    assert loss.value.item() > 1e-6


def test_blocks_that_are_computed_again_give_the_same_gradients(teachers):
    """By gradient checkpointing, for which hooks are gone."""
    teacher = teachers["sd3"]
    student = students.drop_blocks(teacher, ["transformer_blocks.1"])
    method, found = Feature(**ALONE), []
    nets = nets_of(method, teacher, student)
    for _ in range(2):
        (loss,) = losses_of(method, nets, "sd3")
        found.append(torch.autograd.grad(loss.value, [*student.parameters()], materialize_grads=True))
        student.network.enable_gradient_checkpointing()
    assert all(map(torch.equal, *found)) and max(grad.abs().max() for grad in found[0]) > 1e-3


def test_networks_as_several_processes_have_them(teachers):
    """Wrapped by DDP, or of the class that FSDP makes of the stock one."""
    teacher = teachers["lumina2"]
    method = Feature(**ALONE)
    nets = nets_of(method, teacher, students.keep_spread(teacher, 0.5))
    (expected,) = (loss.value.item() for loss in losses_of(method, nets, "lumina2"))
    student, stock = nets["student"], nets["student"].network
    stock.__class__ = type("FSDP", (type(stock),), {})
    for one in (stock, Wrapped(stock)):
        student.network = one
        (found,) = (loss.value.item() for loss in losses_of(method, nets, "lumina2"))
        assert found == expected > 0


def test_blocks_correspond_at_equal_depth(teachers):
    """Of each list by itself: the last with the last."""
    teacher = teachers["flux"]
    student = students.drop_blocks(teacher, ["transformer_blocks.0", "single_transformer_blocks.1"])
    double, single = "transformer_blocks", "single_transformer_blocks"
    expected = {f"{double}.1": f"{double}.0", f"{single}.0": f"{single}.0", f"{single}.2": f"{single}.1"}
    assert Feature().pairs(teacher, student) == expected
    assert features._at_equal_depth(6, 3) == [(1, 0), (3, 1), (5, 2)]
    assert features._at_equal_depth(3, 6) == [(0, 1), (1, 3), (2, 5)]
    assert [theirs for theirs, _ in features._at_equal_depth(28, 14)] == [*range(1, 28, 2)]


@pytest.mark.parametrize("kind", [kind for kind in ("lumina2", "z_image") if kind in KINDS])
def test_tokens_of_the_image_beside_prompts_of_any_length(teachers, kind):
    """Those that the last layers make the output of; alone in a batch an example has the same."""
    teacher, net = teachers[kind], teachers[kind].network
    x_t, time = drawn(teacher, 4)
    cond, name = cond_of(kind, 4, tokens=40), "layers.3"  # Z-Image's prompts are padded to 32, or to 64
    lengths = set()
    with torch.no_grad(), capture_activations(net, [name]) as found:
        whole = teacher.call(net, x_t, time, cond)
        tokens = features.of_image(net, name, found[name], x_t, cond)
        assert tokens.shape == (4, 16, 16) and found[name].shape[1] > 16
        if kind == "lumina2":
            temb, _ = net.time_caption_embed(x_t, 1 - time / 1000, cond["encoder_hidden_states"])
            made = net.norm_out(tokens, temb)
        else:
            made = net.all_final_layer["2-1"](tokens, c=net.t_embedder((1000 - time) / 1000 * net.t_scale))
        made = made.view(4, 4, 4, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(4, 4, 8, 8)
        assert torch.allclose(-made, whole, atol=1e-5)
        for i in range(4):
            given = {key: value[i : i + 1] for key, value in cond.items()}
            teacher.call(net, x_t[i : i + 1], time[i : i + 1], given)
            alone = features.of_image(net, name, found[name], x_t[i : i + 1], given)
            assert torch.allclose(alone[0], tokens[i], atol=1e-4)
            lengths.add(found[name].shape[1])
    assert len(lengths) > 1


def test_the_image_of_attention_is_the_first_of_two(teachers):
    """Blocks name the prompt first, and the attention inside the image."""
    net, (x_t, time) = teachers["sd3"].network, drawn(teachers["sd3"])
    names = ["transformer_blocks.0", "transformer_blocks.0.attn"]
    with torch.no_grad(), capture_activations(net, names) as found:
        teachers["sd3"].call(net, x_t, time, cond_of("sd3", 3))
    assert {value.shape for value in found.values()} == {(3, 16, 16)}  # a prompt has 6


REFUSED = [
    ("lumina2", ["context_refiner.0"], "'context_refiner.0', which is not of the image's tokens; name l"),
    ("z_image", ["cap_embedder"], "'cap_embedder', which is not of the image's tokens; name layers.0"),
    ("dit", ["transformer_blocks.7"], "does not have; it has transformer_blocks.0, transformer_blocks.1"),
    ("dit", {"pos_embed.proj": "pos_embed"}, "outputs 4x4 and pos_embed of the student 16 tokens; match"),
    ("dit", ["transformer_blocks.0.norm1.emb"], "no feature map and no tokens; match"),
    ("sd3", {"pos_embed": "context_embedder"}, "16 tokens and context_embedder .* 6 tokens; match"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "blocks", "message"), REFUSED)
def test_what_cannot_be_matched(teachers, kind, blocks, message):
    if kind not in teachers:
        pytest.skip("this diffusers has no such network")
    with pytest.raises(UserError, match=message) as caught:
        Feature(blocks=blocks).networks(teachers[kind], teachers[kind])
    assert "\n" not in str(caught.value)


def test_labels_are_dropped_for_both(teachers):
    """As of UNets: the student learns the features without a class, too."""
    teacher, seen = students.copy_of(teachers["dit"]), []
    student = students.drop_blocks(teacher, ["transformer_blocks.2"])
    for one in (teacher, student):
        one.network.register_forward_pre_hook(
            lambda module, args, given: seen.append(given["class_labels"]), with_kwargs=True
        )
    method = Feature(label_dropout=1)
    next(losses_of(method, nets_of(method, teacher, student), "dit"))
    *_, theirs, ours = seen
    assert torch.equal(theirs, ours) and (ours == CLASSES).all()
