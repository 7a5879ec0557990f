"""What an export will need, and what this machine can do."""
