"""One canvas and many steps, in ids: rules, randomness, constraints, the loop, the prompt cache."""
