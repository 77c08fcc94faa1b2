"""A directory or a hub name: what it holds, whether it fits, the model out of it."""
