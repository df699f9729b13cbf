"""`diffkd methods`."""

from __future__ import annotations


def methods() -> None:
    """List the distillation methods: their papers and their config."""
    from diffkd.methods import find, names

    for name in names():
        kind = find(name)
        print(f"{name}: {(kind.__doc__ or '').strip().splitlines()[0]}\n  {kind.reference}")
        for key, field in kind.model_fields.items():
            print(f"  {key}: {field.get_default(call_default_factory=True)!r}  {field.description or ''}")
