"""Computes figures with their uncertainty from predictions, and predicts with the model of a bundle."""
