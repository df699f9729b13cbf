"""Makes diffkd/metrics/features/digits_features.safetensors: the feature network of the digits-FID.

    python scripts/make_digits_features.py

Trains a small classifier on 1,437 of scikit-learn's 1,797 digits (the rest, every fifth, is held out), from a
fixed seed. On torch 2.13.0 it reaches the accuracy that is stored in the file and printed at the end.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from diffkd.data.digits import Digits
from diffkd.metrics.features.digits import DIGITS_WEIGHTS, DigitsClassifier

SEED, UPDATES, BATCH, RATE = 0, 1500, 128, 2e-3


def main(path: Path = DIGITS_WEIGHTS) -> float:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    images = Digits(kind="digits").load()
    x = torch.from_numpy(images.pixels).float() / 127.5 - 1
    y = images.labels
    held_out = torch.arange(len(x)) % 5 == 0
    train_x, train_y = x[~held_out], y[~held_out]
    network = DigitsClassifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.05)
    for update in range(UPDATES):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - update / UPDATES)
        chosen = torch.randint(len(train_x), (BATCH,))
        batch = train_x[chosen]
        shift = torch.randint(
            -1, 2, (2,)
        ).tolist()  # a pixel of shift, and noise: features that look at the shape
        batch = torch.roll(batch, shift, (2, 3)) + 0.1 * torch.randn_like(batch)
        loss = F.cross_entropy(network(batch), train_y[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = float((network(x[held_out]).argmax(1) == y[held_out]).float().mean())
    metadata = {
        "accuracy": f"{accuracy:.4f}",
        "held_out": str(int(held_out.sum())),
        "torch": torch.__version__,
    }
    save_file(network.state_dict(), path, metadata=metadata)
    size = path.stat().st_size / 1e3
    print(f"{path}: {size:.0f} kB, accuracy {accuracy:.4f} on {int(held_out.sum())} held out")
    return accuracy


if __name__ == "__main__":
    main()
