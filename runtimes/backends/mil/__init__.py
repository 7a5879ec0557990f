"""Reader and interpreter of saved Core ML packages; they run without Core ML.

The interpreter reads only the files on disk (the protobuf and the weight file) and shares no code
with the exporter. It checks what a package computes. It does not model Apple's compiler nor the
rounding of the Neural Engine.
"""
