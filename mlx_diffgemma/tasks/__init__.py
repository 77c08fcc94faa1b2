"""Answers requests: each task is one frozen request, prepared once and run by one protocol."""
