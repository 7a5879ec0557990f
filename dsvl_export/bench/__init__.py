"""The measurement of a bundle's speed on this machine."""
