"""Bytes on the wire and in the journal: encoded, bounded, checked on arrival."""
