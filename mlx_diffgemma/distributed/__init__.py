"""Several processes or Macs: which of them this is, and what they tell each other."""
