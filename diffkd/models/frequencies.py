"""Random frequencies of embedded times: as they were drawn, in whatever a network computes."""

from __future__ import annotations

from typing import Any

from torch import nn


class Float32Buffers(nn.Module):
    """A module whose buffers stay in float32, whatever the rest of its network is in: in half precision the
    angles that random frequencies make of a time would be off by a radian."""

    def _apply(self, fn: Any, recurse: bool = True) -> Float32Buffers:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now = self._buffers[name]
            if before is not None and now is not None and now.dtype != before.dtype:
                self._buffers[name] = before.to(now.device)
        return self
