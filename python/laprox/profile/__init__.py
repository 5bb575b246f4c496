"""Where a model's heads need their entries: the table of the policy lukv (arXiv 2602.08585), measured and written."""
