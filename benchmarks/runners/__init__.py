"""One model, one process, one file a library: what engine.py starts and asks."""
