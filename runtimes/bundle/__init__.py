"""The bundle format: manifest, contracts, files and locks."""
