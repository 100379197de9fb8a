"""ResNet50 truncated after an activation: its weights, its input, its cost, and what it looks at."""
