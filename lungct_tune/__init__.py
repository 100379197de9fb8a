"""Search for the best truncated ResNet50 for lung CT images, on one machine or a Ray cluster."""

__version__ = "0.2.0.dev0"
