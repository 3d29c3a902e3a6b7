"""Text in: sources of every common kind, and batches of token ids out of them.

Nothing is re-exported: `sources` and `layer_csv` open without torch, `batches` does not.
"""
