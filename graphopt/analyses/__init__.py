"""Analyses shared by several passes."""
