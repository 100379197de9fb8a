"""Serves a bundle's model over HTTP, with Ray Serve: one deployment speaks HTTP, another one has the model."""
