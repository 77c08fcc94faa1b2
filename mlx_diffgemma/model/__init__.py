"""Arrays in, arrays out: no tokenizer, no sampler, nothing is evaluated."""
