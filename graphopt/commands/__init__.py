"""The commands, one file each; cli.py lists them."""
