"""Datasets of images: to train on, and to compare with."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from diffkd.data.absent import NoData, Prompts
from diffkd.data.digits import Digits
from diffkd.data.folder import Folder
from diffkd.data.hub import HubDataset
from diffkd.data.shapes import Shapes

Data = Annotated[Digits | Shapes | Folder | HubDataset | Prompts | NoData, Field(discriminator="kind")]
