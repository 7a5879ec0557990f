"""Tests of a bundle on the device that runs it; they need no torch and no transformers."""
