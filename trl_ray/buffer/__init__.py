"""Pure state machines: ledger, admission slots, slot controller, journal; nothing but Python."""
