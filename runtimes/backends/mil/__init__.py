"""Core ML's saved packages, read and executed without Core ML.

What is executed are the files as they lie on disk: the protobuf and the weight blob, nothing of what wrote
them. It proves what a package means; Apple's compiler and the rounding of the Neural Engine are its own.
"""
