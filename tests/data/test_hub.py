"""Saved Hugging Face datasets: columns, splits, labels, broken rows."""

from __future__ import annotations

import io

import datasets
import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from diffkd.data import Data
from diffkd.data.digits import Digits
from diffkd.data.folder import Folder
from diffkd.data.hub import HubDataset
from diffkd.errors import UserError
from tests.data.helpers import ARRAYS, hub, saved


def test_a_saved_dataset(tmp_path):
    saved().save_to_disk(tmp_path / "set")
    images = hub(tmp_path / "set")
    assert np.array_equal(images.pixels[:, 0], ARRAYS)
    assert images.labels.tolist() == [2, 0, 1, 2] and images.classes == ["zebra", "ant", "bee"]
    assert images.num_classes == 3
    unlabelled = hub(tmp_path / "set", labelled=False)
    assert unlabelled.labels is None and unlabelled.classes == []


def test_columns_by_name(tmp_path):
    saved().save_to_disk(tmp_path / "set")
    images = hub(tmp_path / "set", image="picture", label="number")
    assert images.labels.tolist() == [5, 0, 3, 1] and images.classes == list("012345")
    with pytest.raises(UserError, match="no column 'colour'; it has name, picture, sort, number"):
        hub(tmp_path / "set", label="colour")
    with pytest.raises(UserError, match="no image column 'photo'; it has name, picture, sort, number"):
        hub(tmp_path / "set", image="photo")


@pytest.mark.parametrize(
    "fields", [{"image": "number"}, {"image": "name"}, {"label": "name"}, {"label": "picture"}]
)
def test_columns_of_another_type_are_named(tmp_path, fields, caplog):
    """One message about the column, rather than one about each row."""
    saved().save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match=f"column '?{next(iter(fields.values()))}"):
        hub(tmp_path / "set", **fields)
    assert caplog.records == []


def test_the_split_of_a_dataset_dict(tmp_path):
    whole = saved()
    both = datasets.DatasetDict({"train": whole.select([0, 1, 2]), "test": whole.select([3])})
    both.save_to_disk(tmp_path / "set")
    assert np.array_equal(hub(tmp_path / "set").pixels[:, 0], ARRAYS[:3])
    test = hub(tmp_path / "set", split="test")
    assert np.array_equal(test.pixels[:, 0], ARRAYS[3:]) and test.labels.tolist() == [2]
    with pytest.raises(UserError, match=r"split valid.*train.*test"):
        hub(tmp_path / "set", split="valid")


def test_a_broken_row_is_skipped_with_its_label(tmp_path, caplog):
    """Images as bytes, one of which is not an image."""
    good = io.BytesIO()
    Image.fromarray(ARRAYS[0]).save(good, "PNG")
    rows = [{"bytes": good.getvalue() if i != 30 else b"no image", "path": None} for i in range(120)]
    table = datasets.Dataset.from_dict(
        {"image": rows, "label": [i % 7 for i in range(120)]},
        features=datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=7)),
    )
    table.save_to_disk(tmp_path / "set")
    images = hub(tmp_path / "set")
    assert images.labels.tolist() == [i % 7 for i in range(120) if i != 30] and len(images) == 119
    assert len(caplog.records) == 1 and "[30]" in caplog.text


def test_a_dataset_with_no_rows_is_refused(tmp_path, monkeypatch):
    saved().save_to_disk(tmp_path / "set")
    monkeypatch.setattr(datasets, "load_from_disk", lambda path: saved().select([]))
    with pytest.raises(UserError, match="no images"):
        hub(tmp_path / "set")


def test_unlabelled_rows_are_refused_by_name(tmp_path):
    """Hidden test labels are -1 in many datasets, which is not a class."""
    saved(sort=[2, -1, 1, 0]).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match=r"label.*-1|-1.*label"):
        hub(tmp_path / "set")


def test_kind_chooses_the_class():
    parse = TypeAdapter(Data).validate_python
    assert type(parse({"kind": "digits"})) is Digits
    assert type(parse({"kind": "folder", "path": "x", "size": 8})) is Folder
    assert type(parse({"kind": "datasets", "path": "x", "size": 8})) is HubDataset


def test_captions_are_a_column(tmp_path):
    """By the name text or caption, or the one that is named; of several of an image the first."""
    whole = saved()
    captions = ["a zebra", None, "a bee", "another"]
    whole.add_column("caption", captions).save_to_disk(tmp_path / "one")
    assert hub(tmp_path / "one").captions == ["a zebra", "", "a bee", "another"]
    assert hub(tmp_path / "one", labelled=False).captions == ["a zebra", "", "a bee", "another"]
    whole.add_column("said", [["x", "y"], ["z"], [], ["w"]]).save_to_disk(tmp_path / "several")
    assert hub(tmp_path / "several").captions == []
    assert hub(tmp_path / "several", text="said").captions == ["x", "z", "", "w"]
    with pytest.raises(UserError, match="no column 'spoken'"):
        hub(tmp_path / "several", text="spoken")
    with pytest.raises(UserError, match="no captions in column 'number'"):
        hub(tmp_path / "several", text="number")
