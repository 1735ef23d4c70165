"""Optimization passes: one file a pass; the file name is the pass name (``fuse_conv_bn.py`` is ``fuse-conv-bn``)."""
