"""Prompt lookup decoding: drafts, their verification, and whether they pay."""
