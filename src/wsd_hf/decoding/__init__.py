"""The fast path: draft, check, decide, keep, for ragged batches in static caches."""
