"""Quality of the attention variants at equal parameters, tokens and time; see `__main__`."""
