"""UNet2DConditionModels of class labels: what stock does with them, and which are read as a UNet2DModel."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import ConsistencyModelPipeline, DDIMScheduler, UNet2DConditionModel, UNet2DModel

import diffkd
from diffkd.core.samplers import sample
from diffkd.errors import UserError
from diffkd.models import plain_unets, saving
from tests import edm

PLAIN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
         "mid_block_type": "UNetMidBlock2D"}  # fmt: skip
LABELS = torch.tensor([2, 0, 1])


def network(**options):
    torch.manual_seed(0)
    made = UNet2DConditionModel(
        **{
            "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16),
            "layers_per_block": 1, "norm_num_groups": 4, "num_class_embeds": 3, "cross_attention_dim": 4,
            "attention_head_dim": 4, **PLAIN, **options,
        }
    )  # fmt: skip
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made.eval()


@pytest.fixture
def saved(tmp_path):
    """saved(network) -> a folder of it alone, with its scheduler."""

    def save(made):
        made.save_pretrained(tmp_path / "teacher", safe_serialization=True)
        table = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
        table.save_pretrained(tmp_path / "teacher")
        return tmp_path / "teacher"

    return save


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_embed_type": "timestep", "resnet_time_scale_shift": "scale_shift", "freq_shift": 1},
        {"num_class_embeds": None, "mid_block_type": None, "time_embedding_dim": 12, "layers_per_block": 2},
    ],
    ids=["labels", "labels as times", "no labels, no middle"],
)
def test_it_is_the_unet2dmodel_of_the_same_outputs(options):
    given = network(**options)
    made = plain_unets.rewritten(given).eval()
    labels = None if given.config.num_class_embeds is None else LABELS
    x, time = edm.noise(), torch.tensor([3.0, 500.0, 999.0])
    theirs = given(x, time, None, class_labels=labels).sample
    assert theirs.std() > 0.1 and torch.equal(made(x, time, class_labels=labels).sample, theirs)


@torch.no_grad()
def test_its_student_is_drawn_by_stock(saved, tmp_path):
    """By the pipeline that could not call the network as it was; and its new block can learn."""
    given = network()
    teacher = diffkd.load(saved(given))
    assert isinstance(teacher.network, UNet2DModel) and (teacher.num_classes, teacher.shape) == (3, (3, 8, 8))
    teacher.steps = 4
    saving.save(teacher, tmp_path / "student")
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student")
    theirs, _ = edm.stock(stock, 4, LABELS.tolist())
    assert type(stock) is ConsistencyModelPipeline and theirs.std() > 0.1
    assert torch.equal(sample(teacher, edm.noise(), 4, class_labels=LABELS), theirs)
    with pytest.raises(TypeError, match="encoder_hidden_states"):
        ConsistencyModelPipeline(given, stock.scheduler)(3, class_labels=LABELS, num_inference_steps=4)
    last = teacher.network.requires_grad_(True).mid_block.resnets[1].conv2
    with torch.enable_grad():
        teacher(edm.noise(), 0.5, class_labels=LABELS).square().sum().backward()
    assert last.weight.abs().max() == 0 and last.weight.grad.abs().max() > 1e-3


def test_no_stock_pipeline_takes_labels_beside_these():
    """What the refusals rest on; one that is found here is one to read such networks for."""
    folder = Path(diffusers.__file__).parent / "pipelines"
    calls = [(path, re.search(r"def __call__\((.*?)\)\s*(->|:)", path.read_text(), re.DOTALL))
             for path in folder.rglob("pipeline_*.py")]  # fmt: skip
    taking = {path.name for path, found in calls if found and "class_labels" in found[1]}
    assert taking == {"pipeline_consistency_models.py", "pipeline_dit.py"}


CROSS = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (CROSS, "of 3 class labels with cross-attention: no stock pipeline .*train a UNet2DModel"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "of 3 class labels with cross-attention"),
        ({**CROSS, "num_class_embeds": None}, "alone, without its text encoder"),
        ({**CROSS, "in_channels": 7}, "alone, without its text encoder"),
        ({"act_fn": "gelu"}, "has act_fn 'gelu', which is not supported; supported is silu"),
        ({"class_embeddings_concat": True}, "has class_embeddings_concat True, which is not supported"),
        ({"mid_block_scale_factor": 2}, "has mid_block_scale_factor 2, which is not supported"),
    ],
    ids=str,
)
def test_networks_that_stock_does_not_draw(saved, options, says):
    with pytest.raises(UserError, match=says) as refused:
        diffkd.load(saved(network(**options)))
    assert "\n" not in str(refused.value)


def test_a_pipeline_of_one_is_refused(saved, tmp_path):
    """Which diffusers saves, and cannot draw."""
    folder = tmp_path / "pipeline"
    ConsistencyModelPipeline(network(), DDIMScheduler()).save_pretrained(folder, safe_serialization=True)
    with pytest.raises(UserError, match="its ConsistencyModelPipeline cannot call, .*its own folder alone"):
        diffkd.load(folder)
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("DDIMPipeline", "DDPMPipeline"):
        (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
        with pytest.raises(UserError, match=f"UNet2DConditionModel, which its {name} cannot call"):
            diffkd.load(folder)
    shutil.copytree(folder / "scheduler", folder / "unet", dirs_exist_ok=True)
    assert diffkd.load(folder / "unet").num_classes == 3
