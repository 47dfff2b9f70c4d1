"""Models of other implementations: read (`read_model`) and written (`write_model`)."""

from diffmm.interop.conversion import FAMILIES, read_model, write_model

__all__ = ["FAMILIES", "read_model", "write_model"]
