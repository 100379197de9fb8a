"""The folder of a search on its storage: its files, and functions that write and read them without Ray."""
