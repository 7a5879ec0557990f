"""Commands that look at machines and targets."""
