"""Summaries: what stands for the older items of a conversation, made off the hot path.

::

    flusher ──► Counts: items that no summary covers, by conversation, in memory
                   │  enough of them
                   ▼
           buffer.summary_work ──► Worker, in any flusher, under a lease
                                     │  reads the newest summary and the items that follow it, in parts
                                     │  Summarizer: (previous, items) -> text; may fail, be slow, hang
                                     ▼
                              buffer.summaries, if what was read is still what is there

Promises:

* A summary stands for all items up to a position, and for nothing else. It is rolled forward from the one
  before it. Items are never removed for it.
* What a deletion removes is in no summary that a read shows after it: the deletion takes away every summary
  that may hold it, and one that is being made then is not written.
* A summarizer that fails, hangs or answers nonsense delays summaries and nothing else: it runs outside every
  transaction, on connections of its own.
"""
