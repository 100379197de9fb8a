"""Predictions in, figures with their uncertainty out; and the bundle's model asked."""
