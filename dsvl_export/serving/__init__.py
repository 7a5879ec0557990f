"""Serving a bundle over HTTP: the OpenAI chat protocol and a web page."""
