"""Kinds of training: each file has one's configuration, which does not wait for torch, and builds its task."""
