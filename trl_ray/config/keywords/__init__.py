"""Options of TRL that hold keyword arguments of a library."""
