"""The stages, without a terminal: what each subcommand does between its options and its print.

Each writes its file whole or not at all, and returns a summary.
"""
