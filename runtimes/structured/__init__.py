"""Structured answers: formats, their grammars, and checks of JSON Schemas."""
