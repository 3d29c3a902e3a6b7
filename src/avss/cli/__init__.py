"""The command line: one verb per file. Importing it imports no torch."""
