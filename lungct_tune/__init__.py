"""Distributed search for the best ResNet50-based lung-CT classifier, and an honest number for it."""

__version__ = "0.2.0.dev0"
