"""The sweep: every architecture of transformers, built tiny, cut in several places, held against the laws."""
