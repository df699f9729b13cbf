"""The comparison of all methods at one cost (scripts/compare_methods.py), in parts."""
