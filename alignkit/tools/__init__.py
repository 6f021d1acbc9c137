"""Hold the commands beside ``fit``, ``validate`` and ``test``: a file or a folder for each."""
