"""Reports of the ladder: one JSON document with a schema, and one self-contained HTML page of it."""
