"""Ids to text and back, and patterns of text over a vocabulary."""
