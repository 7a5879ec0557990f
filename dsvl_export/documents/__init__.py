"""Fields from images of documents."""
