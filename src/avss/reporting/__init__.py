"""What a run looks like to people: tables, charts, one page, a model card and a notebook's view.

This room reads records and nothing else: no model, no torch.
"""
