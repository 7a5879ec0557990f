"""Publishing bundles on the Hugging Face hub."""
