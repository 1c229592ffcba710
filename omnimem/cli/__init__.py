"""What the commands share: arguments, errors, building from a configuration, preflight, dry run, model card."""
