"""Settings, hyperparameters and search spaces: what a user can choose, validated in one place."""
