"""The ``robust`` command. Nothing here imports torch before a verb needs it."""
