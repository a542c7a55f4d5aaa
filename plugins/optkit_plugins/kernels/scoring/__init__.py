"""Scores without logits beyond what is asked: chunks of positions, compiled layers, several samples in one row."""
