"""The folder of a search on its storage: what is written there, and what can be read back without Ray."""
