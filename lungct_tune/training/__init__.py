"""One training of one set of hyperparameters, in plain PyTorch: it could run in a notebook."""
