"""Model families: what differs between models of the same architecture."""
