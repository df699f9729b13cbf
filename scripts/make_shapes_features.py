"""Trains the network that ships as the features of data kind shapes, and says how well it reads pictures.

    python scripts/make_shapes_features.py     # diffkd/metrics/features/shapes_features.safetensors, 0.6 MB

It learns from 60,000 pictures of another seed than any that is trained on by default, some of them noisy or
blurred a little, as those of a model are. On torch 2.13.0 it reads every attribute of 4,000 others right.
"""

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from diffkd.data import shapes
from diffkd.metrics.features.shapes import SHAPES_WEIGHTS, ShapesNetwork, asked

SEED, IMAGES, HELD_OUT, UPDATES, BATCH, RATE = 1_000_003, 60_000, 4_000, 1_200, 256, 3e-3


def load(start: int, count: int) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, 32, 32) in [-1, 1] and what they show, (N, 7)."""
    found = [shapes.example(SEED, start + i) for i in range(count)]
    pixels = torch.from_numpy(np.stack([pixels for pixels, _, _ in found]))
    return pixels.float() / 127.5 - 1, torch.tensor([asked(scene) for _, _, scene in found])


def main() -> None:
    torch.manual_seed(SEED)
    x, y = load(0, IMAGES)
    network = ShapesNetwork()
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)
    for update in range(UPDATES):
        chosen = torch.randint(IMAGES, (BATCH,))
        images = x[chosen]
        if update % 3 == 1:
            images = images + 0.1 * torch.randn_like(images)
        elif update % 3 == 2:
            images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
        logits = network(images)
        loss = torch.stack(
            [F.cross_entropy(one, y[chosen, k], ignore_index=-1) for k, one in enumerate(logits)]
        ).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        if update % 200 == 0:
            print(f"update {update}: loss {loss.item():.4f}", flush=True)
    save_file(network.state_dict(), SHAPES_WEIGHTS)
    x, y = load(IMAGES, HELD_OUT)
    with torch.no_grad():
        told = torch.stack([one.argmax(1) for one in network(x)], 1)
    shown = y >= 0
    right = (told == y) & shown
    names = ["layout", "kind", "colour", "size", "second kind", "second colour", "second size"]
    print(", ".join(f"{n} {right[:, k].sum() / shown[:, k].sum():.4f}" for k, n in enumerate(names)))
    whole = (right | ~shown).all(1).float().mean()
    attributes = right.sum() / shown.sum()
    print(f"of {HELD_OUT:,} others: {attributes:.4f} of the attributes, {whole:.4f} of the pictures")


if __name__ == "__main__":
    main()
