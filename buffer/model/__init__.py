"""The words of the project as types: ids, positions, items, records, receipts. Pure, no I/O."""
