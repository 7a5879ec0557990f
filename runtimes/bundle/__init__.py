"""The bundle format: the manifest, contracts, reading and writing of files, and locks."""
