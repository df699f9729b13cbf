"""Labels of a reference's images as the model numbers its classes, whatever their order and number."""

from __future__ import annotations

import json
from typing import Any

import pytest

from diffkd.metrics.evaluation import image_stream
from diffkd.metrics.evaluation.image_sets import parse
from diffkd.metrics.evaluation.reference import Reference

NUMBERS = [str(i) for i in range(12)]


def test_labels_by_name(tmp_path, image_folder):
    image_folder(tmp_path, classes=NUMBERS, count=1)
    reference = Reference(parse(str(tmp_path / "images")))
    assert reference.labels.tolist() == list(range(12))  # "0", "1", "10", "11", "2", ...
    assert reference.labels_of(NUMBERS).tolist() == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    assert reference.labels_of(sorted(NUMBERS)).tolist() == list(range(12))
    assert reference.labels_of([]).tolist() == reference.labels_of(["cat"] * 12).tolist() == list(range(12))


@pytest.mark.parametrize("how", [[], ["--sampler", "stock"]])
def test_a_model_draws_the_classes_of_the_images(
    cli, tmp_path, monkeypatch, make_pipeline, image_folder, how
):
    """By the names on its card: here only two of its classes are in the folder, 10 and 9 of them."""
    folder = make_pipeline(tmp_path, name="model", classes=12)
    card: dict[str, Any] = {"steps": 1, "num_classes": 12, "classes": NUMBERS, "num_train_timesteps": 1024}
    (folder / "diffkd.json").write_text(json.dumps(card))
    for name, count in (("9", 9), ("10", 10)):
        image_folder(tmp_path, classes=[name], count=count)
    drawn: list[int] = []
    labels_for = image_stream.labels_for

    def seen(denoiser: Any, count: int, given: Any) -> Any:
        drawn.extend(given.tolist())
        return labels_for(denoiser, count, given)

    monkeypatch.setattr(image_stream, "labels_for", seen)
    if how:
        from diffkd.metrics.evaluation import stock_images

        generate = stock_images.generate_stock
        monkeypatch.setattr(
            stock_images, "generate_stock",
            lambda *a, labels, **k: (drawn.extend(labels.tolist()), generate(*a, labels=labels, **k))[1],
        )  # fmt: skip
    args = ("evaluate", folder, tmp_path / "images", "--features", "digits", *how)
    assert cli(*args).code == 0
    assert drawn == 10 * [10] + 9 * [9]
