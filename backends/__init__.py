"""Backends: one file a backend; each turns an optimized model into what a runtime loads."""
