"""The subcommands without their terminal: each stage writes its file whole or not at all, and
returns a summary."""
