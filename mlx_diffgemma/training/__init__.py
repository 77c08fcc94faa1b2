"""Fine-tuning: objective, gradients through encoder and decoder, what a run needs of memory."""
