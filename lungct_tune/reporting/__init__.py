"""Turns figures into text, HTML pages and terminal output."""
