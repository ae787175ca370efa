"""The workshop behind briskGPT's scripts: one idea a module, each usable by itself."""
