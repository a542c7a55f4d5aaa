"""Continuous batching: rows of unequal length, refilled as their texts end."""
