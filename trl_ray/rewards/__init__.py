"""Rewards: the functions that ship with the package, how names become functions, and the sandbox they run in."""
