"""How fast a bundle answers on this machine."""
