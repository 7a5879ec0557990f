"""Export: from a checkpoint to a bundle, stage by stage."""
