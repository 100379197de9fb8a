"""One training with one set of hyperparameters, in plain PyTorch. It can also run in a notebook."""
