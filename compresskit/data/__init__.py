"""The embedded checkpoint; tasks and texts."""

#: Name of the text that every Python carries.
EMBEDDED = "python-help-topics"
