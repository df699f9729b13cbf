"""Datasets of images: to train on, and to compare with."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from diffkd.data.absent import NoData
from diffkd.data.digits import Digits
from diffkd.data.folder import Folder
from diffkd.data.hub import HubDataset

Data = Annotated[Digits | Folder | HubDataset | NoData, Field(discriminator="kind")]
