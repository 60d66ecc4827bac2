"""Taking items in: validation, coalescing, receipts."""
