"""ResNet50 truncated after an activation: the network, its weights, its input, its cost, and Grad-CAM."""
