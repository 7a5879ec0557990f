"""Reports of the parity check: a JSON document with a schema, and a self-contained HTML page."""
