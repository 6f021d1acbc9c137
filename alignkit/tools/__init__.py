"""One file or folder a command: what runs when it is called, beside ``fit`` and its kin."""
