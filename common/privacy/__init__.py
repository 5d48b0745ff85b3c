"""Clipping, encoding, noise and what they cost."""

NOT_OFFERED = "not offered"
"""ε_server where the server adds the noise itself, and so knows the sums without."""
