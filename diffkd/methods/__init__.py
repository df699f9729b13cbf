"""Distillation algorithms, one file each; `diffkd.method.find` finds them by name."""
