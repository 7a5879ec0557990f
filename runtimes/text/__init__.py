"""Prompt format and tokenizer."""
