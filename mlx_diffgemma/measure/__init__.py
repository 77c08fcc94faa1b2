"""How right and how fast the model is."""
