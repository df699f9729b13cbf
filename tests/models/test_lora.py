"""Students that are adapters: what they compute, what they share, what their files hold, what is refused."""

import json
import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from diffkd.core import adapters, interval
from diffkd.core.averages import follow
from diffkd.core.schedules import Schedule
from diffkd.errors import UserError
from diffkd.models import families, guidance_input, loading, saving, students
from diffkd.models.edm2_unet import EDM2UNet
from diffkd.models.students import lora
from diffkd.models.students.config import Lora
from diffkd.runs.reports import model_card
from tests import dit, flow_pipelines, masked_pipelines, text_to_image
from tests.lora import adapted
from tests.tiny import student

COSINE = Schedule.cosine(64)
ATTENDED = "mid_block.attentions.0"


def teacher(dtype=torch.float32):
    made = student(3, "v_prediction", COSINE, steps=None)
    return made.to(dtype=dtype).requires_grad_(False)


def inputs(dtype=torch.float32):
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(3, 1, 8, 8, generator=rng, dtype=torch.float64).to(dtype)
    return x, torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), {"class_labels": torch.arange(3)}


def call(denoiser, **more):
    x, t, cond = inputs(denoiser.dtype)
    return denoiser(x, t, **cond, **more)


def test_a_new_adapter_is_the_teacher_to_the_bit_and_its_weights_alone_learn():
    whole = teacher()
    pupil = Lora(kind="lora", rank=4).build(whole, 0).requires_grad_(True)
    assert torch.equal(call(pupil), call(whole))
    learn = {name for name, p in pupil.network.named_parameters() if p.requires_grad}
    assert learn == {*adapters.own(pupil.network)} and any("conv1" in name for name in learn)
    assert any("to_q" in name for name in learn) and not any(p.requires_grad for p in whole.parameters())


def test_the_base_is_in_memory_once():
    """Of a teacher, a student, a fake network and a target that follows: the numbers of one and of three
    adapters. The target moves, and the base does not."""
    whole = teacher()
    pupil = adapted(whole).requires_grad_(False)  # torch multiplies by weights that learn in another order
    fake, target = students.copy_of(whole), students.copy_of(pupil).requires_grad_(False)
    together = {p.data_ptr(): p.numel() for net in (whole, pupil, fake, target) for p in net.parameters()}
    base, adapter = (sum(p.numel() for p in found) for found in (
        whole.parameters(), adapters.own(pupil.network).values()
    ))  # fmt: skip
    assert sum(together.values()) == base + 3 * adapter and adapter < base
    before, theirs = call(whole), call(pupil)
    assert torch.equal(call(target), theirs) and torch.equal(call(fake), before)
    for parameter in adapters.own(target.network).values():
        parameter.data.zero_()
    follow(target, pupil, 0.0)
    assert torch.equal(call(target), theirs) and torch.equal(call(whole), before)


def test_the_length_of_a_step_learns_whole_beside_the_adapter():
    """Its embedding is 0 at first, each copy has one of its own, and folded it leaves the base as it was."""
    whole = teacher()
    pupil = Lora(kind="lora", rank=4).build(whole, 0).requires_grad_(True)
    interval.attach(pupil.network)
    half = {"interval": torch.full((3,), 0.5, dtype=torch.float64)}
    before = call(whole)
    assert torch.equal(call(pupil, **half), before)
    learn = {name for name, p in pupil.network.named_parameters() if p.requires_grad}
    added = {name for name in learn if not adapters.is_factor(name)}
    assert learn == {*adapters.own(pupil.network)}
    assert added == {f"{interval.NAME}.{one}" for one in ("first.weight", "first.bias", "second.weight",
                                                         "second.bias")}  # fmt: skip
    target = students.copy_of(pupil).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapters.own(pupil.network).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    pupil.requires_grad_(False)
    given, without = call(pupil, **half), call(pupil)
    assert (given - without).abs().max() > 0.01 and torch.equal(call(target, **half), before)
    follow(target, pupil, 0.0)
    assert torch.equal(call(target, **half), given)
    # on another base of the same numbers, and as a stock network
    again = teacher()
    moved = students.with_network(pupil, lora.rebased(pupil.network, again.network, pupil.adapter))
    assert torch.equal(call(moved.requires_grad_(False), **half), given)
    made = interval.folded(students.merged(pupil).network, 0.5)
    assert made.state_dict().keys() == whole.network.state_dict().keys()
    assert (call(students.with_network(pupil, made)) - given).abs().max() <= 1e-6 * given.abs().max()
    assert torch.equal(call(whole), before) and torch.equal(call(pupil, **half), given)
    shared = {p.data_ptr() for p in whole.network.parameters()}
    changed = {name for name, p in made.named_parameters() if p.data_ptr() not in shared}
    layers = {f"{name}.weight" for name in lora.layers(whole.network, pupil.adapter.targets)}
    assert changed == layers | {"time_embedding.linear_2.bias"}


def test_merged_equals_unmerged():
    pupil = adapted(teacher())
    made = students.merged(pupil)
    assert type(made.network) is type(teacher().network) and not adapters.own(made.network)
    assert made.network.state_dict().keys() == teacher().network.state_dict().keys()
    difference = (call(made) - call(pupil)).abs().max()
    assert difference <= 1e-6 * call(pupil).abs().max() and (call(made) - call(teacher())).abs().max() > 0.01


def test_an_update_is_that_of_weights_plus_ba():
    """Gradients, and a step of AdamW, against W + BA written out, in float64."""
    whole = teacher(torch.float64)
    pupil = adapted(whole).requires_grad_(True)
    pupil.network.double()
    own = adapters.own(pupil.network)
    mine = {name: p.detach().clone().requires_grad_() for name, p in lora.weights_of(pupil.network).items()}
    weights = dict(whole.network.named_parameters())
    for name in mine:
        if adapters.DOWN in name:
            up, key = mine[name.replace("lora_A", "lora_B")], name.replace("lora_A.", "")
            product = torch.einsum("or,ri->oi", up.flatten(1), mine[name].flatten(1))
            weights[key] = weights[key] + product.reshape(weights[key].shape)
    x, t, cond = inputs(torch.float64)
    time = COSINE.network_time(t, x)
    written = functional_call(whole.network, weights, (x, time), cond).sample
    assert (pupil.output(x, t, **cond) - written).abs().max() < 1e-13
    for loss, params in (
        (pupil.output(x, t, **cond).square().mean(), own), (written.square().mean(), mine)
    ):  # fmt: skip
        loss.backward()
        torch.optim.AdamW(params.values(), lr=0.1).step()
    for name, parameter in own.items():
        other = mine[name.replace(".default", "")]
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(parameter, other, rtol=1e-9, atol=1e-12)


def test_blocks_that_are_computed_again_have_the_gradients_of_those_that_are_not():
    """Two networks on one base, one checkpointed: neither finds the other's adapter."""
    whole = teacher()
    pair = [adapted(whole, seed=seed).requires_grad_(True) for seed in (0, 0, 7)]
    pair[1].network.train().enable_gradient_checkpointing()
    losses = [call(one).square().mean() for one in pair]
    sum(losses).backward()
    grads = [[p.grad for p in adapters.own(one.network).values()] for one in pair]
    assert all(torch.equal(a, b) for a, b in zip(grads[0], grads[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(grads[0], grads[2], strict=True))


# files


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Tiny pipelines of Stable Diffusion and Flux."""
    work = tmp_path_factory.mktemp("bases")
    made = text_to_image.pipeline(work / "parts", prediction="v_prediction")
    made.save_pretrained(work / "sd", safe_serialization=True)
    flow_pipelines.pipeline(work / "parts", "flux").save_pretrained(work / "flux", safe_serialization=True)
    return work


def save(base, folder, **options):
    pupil = adapted(loading.load(base), **options)
    pupil.steps, pupil.sampler, pupil.clip = 4, "ddim", None
    saving.save(pupil, folder)
    model_card.write(folder, model_card.describe(pupil))
    return pupil


def outputs(*denoisers):
    x, t, cond = denoisers[0].example_inputs()
    x = torch.randn(x[..., :8, :8].shape, generator=torch.Generator().manual_seed(0))
    return [one.output(x, t, **cond) for one in denoisers]


def test_a_folder_is_read_as_it_was_written(work, tmp_path):
    pupil = save(work / "sd", tmp_path / "student")
    read = loading.load(tmp_path / "student")
    ours, theirs, base = outputs(pupil, read, loading.load(work / "sd"))
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max() and (ours - base).abs().max() > 0.01
    assert (read.steps, read.sampler, read.name) == (4, "ddim", str(tmp_path / "student"))
    assert sum(p.stat().st_size for p in (tmp_path / "student").rglob("*") if p.is_file()) < 80_000


KOHYA = [
    f"lora_unet_{block}_transformer_blocks_0_{attention}_{layer}.{part}"
    for block in ("down_blocks_0_attentions_0", "mid_block_attentions_0", "up_blocks_1_attentions_0",
                  "up_blocks_1_attentions_1")
    for attention in ("attn1", "attn2")
    for layer in ("to_q", "to_k", "to_v", "to_out_0")
    for part in ("lora_down.weight", "lora_up.weight", "alpha")
]  # fmt: skip


def test_keys_are_pefts_and_kohyas_with_alpha_the_rank(work, tmp_path):
    pupil = save(work / "sd", tmp_path / "student", rank=2)
    raw = load_file(tmp_path / "student" / "pytorch_lora_weights.safetensors")
    kohya = load_file(tmp_path / "student" / "kohya_lora_weights.safetensors")
    assert sorted(kohya) == sorted(KOHYA)
    assert all(re.fullmatch(r"unet\..*\.lora_[AB]\.weight", key) for key in raw) and len(raw) == 2 * 32
    assert {value.item() for key, value in kohya.items() if key.endswith("alpha")} == {2.0}
    for key, value in lora.weights_of(pupil.network).items():
        layer, _, which = key.removesuffix(".weight").rpartition(".")
        name = f"lora_unet_{layer.replace('.', '_')}.{ {'lora_A': 'lora_down', 'lora_B': 'lora_up'}[which] }"
        assert torch.equal(raw[f"unet.{key}"], value) and torch.equal(kohya[f"{name}.weight"], value)
    save(work / "flux", tmp_path / "flux", rank=2)
    keys = {*load_file(tmp_path / "flux" / "kohya_lora_weights.safetensors")}
    assert "lora_transformer_transformer_blocks_0_attn_add_q_proj.lora_down.weight" in keys
    assert "lora_transformer_single_transformer_blocks_1_attn_to_q.alpha" in keys


def test_a_weight_baked_into_the_base_is_baked_in_again(work, tmp_path):
    base = loading.load(work / "flux")
    guidance_input.fold(base, 6.0)
    pupil = adapted(base)
    pupil.steps = 2
    saving.save(pupil, tmp_path)
    card = model_card.describe(pupil)
    model_card.write(tmp_path, card)
    assert card["call"]["guidance_scale"] == 6.0 and card["lora"]["guidance"] == 6.0
    ours, theirs = outputs(pupil, loading.load(tmp_path))
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"targets": ["to_q", "to_x"]},
            "has to_x, which no layer .* there are conv_in, .*to_q",
        ),
        (
            {"targets": ["conv_in"], "rank": 9},
            "rank 9 is above the size of layer conv_in, .* rank 8 at",
        ),
        ({"rank": 17}, "student.rank 17 is above the size of layer .*use student.rank"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    whole = teacher()
    with pytest.raises(UserError, match=message):
        Lora(**{"kind": "lora", "rank": 4, **options}).build(whole, 0)
    assert whole.adapter is None


def test_targets_are_names_or_their_ends():
    whole = teacher()
    found = lora.layers(whole.network, [f"{ATTENDED}.to_q", "conv_shortcut"])
    ends = [name.rpartition(".")[2] for name in found]
    assert f"{ATTENDED}.to_q" in found and ends.count("to_q") == 1 and ends.count("conv_shortcut") > 1
    assert {*ends} == {"to_q", "conv_shortcut"}


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs peft, .* pip install peft \(extra lora\)"):
        Lora(kind="lora").build(teacher(), 0)


def test_an_adapter_is_no_base(work, tmp_path):
    save(work / "sd", tmp_path)
    with pytest.raises(UserError, match="is an adapter itself.* run diffkd fuse"):
        Lora(kind="lora", rank=2).build(loading.load(tmp_path), 0)


def other_base(folder):
    card = json.loads((folder / "diffkd.json").read_text())
    card["lora"]["fingerprint"] = "0" * 32
    (folder / "diffkd.json").write_text(json.dumps(card))


def no_base(folder, named="nowhere"):
    card = json.loads((folder / "diffkd.json").read_text())
    card["lora"]["base"] = str(folder / named)
    (folder / "diffkd.json").write_text(json.dumps(card))


def no_card(folder):
    (folder / "diffkd.json").unlink()


def nonsense(folder):
    card = json.loads((folder / "diffkd.json").read_text())
    card["lora"]["rank"] = "4"
    (folder / "diffkd.json").write_text(json.dumps(card))


def edited(change):
    def edit(folder):
        path = folder / "pytorch_lora_weights.safetensors"
        content = load_file(path)
        change(content, next(iter(content)))
        save_file(content, path)

    return edit


def torn(folder):
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"x" * 99)


NO_LAYER = "is no adapter of a layer of its base; is it of another"
BROKEN = {
    "another base": (other_base, "adapter for another base than .* the weights differ"),
    "no base": (no_base, "its base cannot be opened: .*nowhere.* name its place as base in"),
    "itself": (partial(no_base, named="."), "its base cannot be opened: .* is an adapter itself; run"),
    "no card": (no_card, "is an adapter whose diffkd.json does not name its base"),
    "a card of nonsense": (nonsense, "has lora .*which describes no adapter; repair it"),
    "another layer": (edited(lambda c, k: c.update({f"unet.x.{k}": c[k].clone()})), NO_LAYER),
    "half a pair": (edited(lambda c, k: c.pop(k)), NO_LAYER),
    "another rank": (
        edited(lambda c, k: c.update({k: c[k][:1].clone()})),
        r"of shape \(1, \d+\), and its base",
    ),
    "no floats": (edited(lambda c, k: c.update({k: c[k].int()})), "and its base wants"),
    "NaN": (edited(lambda c, k: c[k].fill_(torch.nan)), "makes NaN or infinite values"),
    "torn": (torn, "cannot be read as safetensors"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused(work, tmp_path, name):
    save(work / "sd", tmp_path)
    edit, message = BROKEN[name]
    edit(tmp_path)
    with pytest.raises(UserError, match=message):
        loading.load(tmp_path)


def edm2_network():
    return EDM2UNet(
        8, 3, model_channels=8, channel_mult=(1, 2), num_blocks=1, attention=(4,), head_channels=8
    )


NETWORKS = {
    "sd": text_to_image.network, "sd3": flow_pipelines.sd3_network, "flux": flow_pipelines.flux_network,
    "dit": dit.network, "edm2": edm2_network,
    **{kind: partial(masked_pipelines.network, kind) for kind in masked_pipelines.KINDS},
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_the_targets_of_a_family_are_layers_of_its_networks(name):
    """Each of them; and each of these layers gets an adapter."""
    network = NETWORKS[name]()
    (family,) = (one for one in families.families() if type(network) is one.NETWORK)
    found = lora.layers(network, family.LORA_TARGETS)
    made = lora.copied(network, adapters.Adapter(2, family.LORA_TARGETS, "base"))
    assert len(adapters.own(made)) == 2 * len(found) > 0
