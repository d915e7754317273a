"""Brain masks of whole heads: by template registration, by a network, or by an external program."""
