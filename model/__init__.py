"""How the bundled model is made: text from a grammar, a tokenizer, training, frozen tests, figures.

Not part of the installed package. ``python -m model.train`` rebuilds ``optkit/bundled`` (see model/README.md).
"""
