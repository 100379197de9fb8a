"""What Ray Tune tells while a search runs, and who listens."""
