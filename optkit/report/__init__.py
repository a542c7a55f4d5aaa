"""Showing records: Rich tables in the terminal, Markdown, and plain text. Nothing here measures."""
