"""Ray Tune's callbacks while a search runs: time, progress, metrics, MLflow, the best bundle so far."""
