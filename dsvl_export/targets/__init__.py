"""Target devices, this machine, options of an export, and known defects of the runtimes."""
