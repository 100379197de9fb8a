"""Figures into words, pages and terminal output: what a person reads."""
