"""Which numbers of two records can be compared, and what keeps the others apart."""

from __future__ import annotations

from typing import Any

from diffkd import metrics
from diffkd.io.text import differences
from diffkd.metrics.base import MAIN
from diffkd.metrics.evaluation.records import Record

# What every number depends on beside the model. The rest of a protocol says which model, how it was sampled,
# and on what machine, where numbers differ by rounding alone.
DEFINING = ("samples", "image_size", "labels", "prompts")
OF_A_MODEL = ("labels", "prompts")  # unknown of a folder of images


def mismatch(one: Record, two: Record) -> list[str]:
    """Why no number of two records can be compared, each as "key was x, now y"; empty where some can."""
    a, b = one["protocol"], two["protocol"]
    keys = [key for key in DEFINING if key not in OF_A_MODEL or (key in a and key in b)]
    found = differences({k: a.get(k) for k in keys}, {k: b.get(k) for k in keys})
    one_set, other = ({k: p["reference"].get(k) for k in ("sha256", "count")} for p in (a, b))
    found += differences(one_set, other, "reference")
    if found:
        return found
    differ = [line for metric in _shared(a, b) for line in _differences(a, b, metric)]
    return differ if all(_differences(a, b, metric) for metric in _shared(a, b)) else []


def comparable(one: Record, two: Record) -> list[str]:
    """Keys of the numbers that two records both have and that mean the same."""
    a, b = one["protocol"], two["protocol"]
    return [
        key
        for m in _shared(a, b)
        if not _differences(a, b, m)
        for key in _keys_of(m)
        if key in one and key in two
    ]


def _shared(a: Any, b: Any) -> list[str]:
    return [metric for metric in metrics.kinds() if metric in a["metrics"] and metric in b["metrics"]]


def _differences(a: Any, b: Any, metric: str) -> list[str]:
    """Where two protocols differ in what a metric depends on."""
    return differences(_without_places(_depends_on(a, metric)), _without_places(_depends_on(b, metric)))


def _depends_on(protocol: Any, metric: str) -> dict[str, Any]:
    kind = metrics.kinds()[metric]
    key = None if kind.network == MAIN else kind.network
    used = protocol.get("more_features", {}).get(key) if key else protocol["features"]
    made_with = protocol["reference"].get("features")
    return {
        "features": used,
        "reference.features": used if made_with is None or key else made_with,
        metric: protocol["metrics"][metric],
        "teacher": protocol.get("teacher") if kind.with_teacher else None,
        "prompts": protocol.get("prompts") if kind.with_prompts else None,
    }


def _without_places(content: Any) -> Any:
    """Without paths: the same files may lie elsewhere."""
    if not isinstance(content, dict):
        return content
    return {k: _without_places(v) for k, v in content.items() if k not in ("path", "weights")}


def _keys_of(metric: str) -> list[str]:
    return [value.key for value in metrics.kinds()[metric].values]
