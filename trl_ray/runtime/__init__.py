"""Ray and its in-process stand-in: handles, placement, supervision. The only layer that imports Ray."""
