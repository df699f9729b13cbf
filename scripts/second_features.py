"""A second feature network for digits, by which settings are chosen, so that the reported one stays unused.

    python scripts/second_features.py          # trains it: half a minute; runs/second_features.safetensors
    diffkd evaluate STUDENT --reference digits --features scripts/second_features.py

Other layers, activations, seed and held-out digits than the network that ships with diffkd
(scripts/make_digits_features.py). On torch 2.13.0 it reaches the accuracy that is printed at the end.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffkd.data.digits import Digits

WEIGHTS = Path(__file__).resolve().parents[1] / "runs/second_features.safetensors"
SEED, UPDATES, BATCH, RATE = 1, 1200, 128, 3e-3


class SecondFeatures(nn.Module):
    """uint8 digits (B, 1, 8, 8) -> (B, 48), in float64: what the last layer of a small classifier takes.

    It has 5x5 convolutions, GELU and average pooling.
    """

    num_features = 48

    def __init__(self, weights: Path | None = WEIGHTS) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.Conv2d(1, 24, 5, padding=2), nn.GELU(), nn.AvgPool2d(2),
            nn.Conv2d(24, 48, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(48 * 16, 48), nn.Tanh(),
        )  # fmt: skip
        self.classify = nn.Linear(48, 10)
        if weights is not None:
            self.load_state_dict(load_file(weights))
            self.double()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.embed(images.double() / 127.5 - 1)
        return features


def main(path: Path = WEIGHTS) -> float:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    images = Digits(kind="digits").load()
    x, y = torch.from_numpy(images.pixels).float() / 127.5 - 1, images.labels
    held_out = torch.arange(len(x)) % 5 == 2
    train_x, train_y = x[~held_out], y[~held_out]
    network = SecondFeatures(weights=None)

    def logits(x: Tensor) -> Tensor:
        found: Tensor = network.classify(network.embed(x))
        return found

    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)
    for _ in range(UPDATES):
        chosen = torch.randint(len(train_x), (BATCH,))
        batch = train_x[chosen] * (0.8 + 0.4 * torch.rand(BATCH, 1, 1, 1))  # strokes of other strengths
        loss = F.cross_entropy(logits(batch + 0.15 * torch.randn_like(batch)), train_y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    with torch.no_grad():
        accuracy = float((logits(x[held_out]).argmax(1) == y[held_out]).float().mean())
    path.parent.mkdir(exist_ok=True)
    save_file(network.state_dict(), path)
    print(f"{path}: accuracy {accuracy:.4f} on {int(held_out.sum())} held out")
    return accuracy


if __name__ == "__main__":
    main()
