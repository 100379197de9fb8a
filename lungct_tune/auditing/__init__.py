"""Audits a data set and its split: finds copies, shortcuts and leaks, and draws conclusions."""
