"""A feature network for the shapes of scripts/shapes_folder.py: it tells all that these images differ in.

    python scripts/shapes_features.py          # trains it: two minutes; runs/shapes_features.safetensors
    diffkd evaluate STUDENT --reference data/shapes-32 --features scripts/shapes_features.py

A classifier of the shape alone would not see that a model draws one colour or one place. So it learns the
numbers that an image was drawn from as well, on images that are not in the folder. On torch 2.13.0 it reaches
the accuracy and the errors that are printed at the end.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).resolve().parents[1] / "runs/shapes_features.safetensors"
SHAPES, NUMBERS = 8, 14  # what it learns to tell of an image
SEED, IMAGES, UPDATES, BATCH, RATE = 1, 8192, 1200, 128, 2e-3


class ShapesFeatures(nn.Module):
    """uint8 (B, 3, 32, 32) -> (B, 64), in float64: what the last layer of a small network takes."""

    num_features = 64

    def __init__(self, weights: Path | None = WEIGHTS) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
            nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU(), nn.Linear(128, 64), nn.Tanh(),
        )  # fmt: skip
        self.tell = nn.Linear(64, SHAPES + NUMBERS)
        if weights is not None:
            self.load_state_dict(load_file(weights))
            self.double()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.embed(images.double() / 127.5 - 1)
        return features


def main(path: Path = WEIGHTS) -> tuple[float, float]:
    from shapes_folder import draw  # as a feature network, this file is on its own

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    found = draw(IMAGES + 1024, SEED)
    x = torch.from_numpy(found.images).float() / 127.5 - 1
    y, factors = torch.from_numpy(found.labels), torch.from_numpy(found.factors)
    network = ShapesFeatures(weights=None)

    def told(x: Tensor) -> tuple[Tensor, Tensor]:
        logits, numbers = network.tell(network.embed(x)).split([SHAPES, NUMBERS], 1)
        return logits, numbers

    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)
    for _ in range(UPDATES):
        chosen = torch.randint(IMAGES, (BATCH,))
        logits, numbers = told(x[chosen] + 0.05 * torch.randn_like(x[chosen]))
        loss = F.cross_entropy(logits, y[chosen]) + F.mse_loss(numbers, factors[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    with torch.no_grad():
        logits, numbers = told(x[IMAGES:])
    accuracy = float((logits.argmax(1) == y[IMAGES:]).float().mean())
    error = float((numbers - factors[IMAGES:]).square().mean().sqrt())
    path.parent.mkdir(exist_ok=True)
    save_file(network.state_dict(), path)
    print(f"{path}: accuracy {accuracy:.4f}, error of the numbers {error:.3f}, on 1,024 other images")
    return accuracy, error


if __name__ == "__main__":
    main()
