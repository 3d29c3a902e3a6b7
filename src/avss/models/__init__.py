"""The rooms that know transformers: find the stack, load, rewrite, save, verify."""
