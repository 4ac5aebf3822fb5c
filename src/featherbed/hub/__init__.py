"""The Hub: an id becomes a folder on disk, and a folder a repository. client.py is the only room with a network."""
