"""The torch-free runtime: bundle, preprocessing, prompt, KV cache, sampling, sessions, pipeline."""
