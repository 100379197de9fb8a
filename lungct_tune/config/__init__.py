"""Every choice a user can make, validated in one place, and nothing else."""
